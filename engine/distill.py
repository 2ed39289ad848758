"""
Conversion of a trained model to another attention: each of the student's attention layers learns
what the teacher's says to the same input, all layers at once, in one pass through the teacher.
"""

import torch
from torch import Tensor, nn

from configurator import UserError
from model import GPT


class Matching(nn.Module):
    """Student and teacher as one module, to be trained as a GPT is.

    The student begins with the teacher's weights. While it is matched only its attention layers
    (their c_attn and c_proj, or adapters of these) are trained; `release` ends that. Raises
    UserError if none of them can be.
    """

    def __init__(self, student: GPT, teacher: GPT):
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False).eval()
        self.trained = [p for p in student.parameters() if p.requires_grad]
        attention = {p for block in student.transformer.h for p in block.attn.parameters()}
        for p in self.trained:
            p.requires_grad_(p in attention)
        if not attention & set(self.trained):
            raise UserError("no attention layer is trained; add attn.c_attn to --lora_targets")

    def forward(self, idx: Tensor, targets=None, with_logits=False) -> tuple[None, Tensor]:
        """Token ids (B, T) -> (None, mean over layers of |y - y_t|^2 / |y_t|^2), where y_t is the
        output of the teacher's layer and y that of the student's on the same input.

        A student that says nothing has 1. The other arguments are those of GPT.forward, unused.
        """
        errors = []
        with torch.no_grad():
            pos = torch.arange(idx.size(1), device=idx.device)
            x = self.teacher.transformer.wte(idx) + self.teacher.transformer.wpe(pos)  # (B, T, C)
        for ours, block in zip(self.student.transformer.h, self.teacher.transformer.h, strict=True):
            with torch.no_grad():
                read = block.ln_1(x)
                y_t = block.attn(read)  # (B, T, C)
                if block is not self.teacher.transformer.h[-1]:  # nobody reads the last one's
                    x = x + y_t
                    x = x + block.mlp(block.ln_2(x))
            error = (ours.attn(read) - y_t).float().square().mean()
            errors.append(error / y_t.float().square().mean())
        return None, torch.stack(errors).mean()

    def release(self) -> None:
        for p in self.trained:
            p.requires_grad_(True)
