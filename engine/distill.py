"""Conversion to another attention: each layer learns to give the output of the teacher's."""

import torch
from torch import Tensor, nn

from configurator import UserError
from model import GPT


class Matching(nn.Module):
    """Student and teacher as one module that is trained as a GPT is. The student begins with the
    teacher's weights. Until `release` is called, only its attention layers (c_attn and c_proj, or
    their adapters) are trained. Raises UserError if there is none to train."""

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
        output of the teacher's layer and y that of the student's for the same input: 1 if y is 0.
        The other arguments are GPT.forward's, unused."""
        errors = []
        with torch.no_grad():
            pos = torch.arange(idx.size(1), device=idx.device)
            x = self.teacher.transformer.wte(idx) + self.teacher.transformer.wpe(pos)  # (B, T, C)
        for ours, block in zip(self.student.transformer.h, self.teacher.transformer.h, strict=True):
            with torch.no_grad():
                layer_input = block.ln_1(x)
                y_t = block.attn(layer_input, pos)  # (B, T, C)
                if block is not self.teacher.transformer.h[-1]:  # the rest of it is not needed
                    x = x + y_t
                    x = x + block.mlp(block.ln_2(x))
            error = (ours.attn(layer_input, pos) - y_t).float().square().mean()
            errors.append(error / y_t.float().square().mean())
        return None, torch.stack(errors).mean()

    def release(self) -> None:
        for p in self.trained:
            p.requires_grad_(True)


class Trainee:
    """The model to train now: first, given a teacher, the attention layers only, then all of it.
    `model` is what a training step takes, under DDP if there are several ranks; `whole_model` is
    the student to evaluate. Both are compiled if that was asked for."""

    def __init__(self, student: GPT, teacher: GPT | None, rt):
        self.rt, self.matching = rt, None  # the latter for as long as attention layers are matched
        if teacher:
            self.matching = Matching(student, teacher).to(rt.device)
        self.whole_model = rt.compiled(student)  # not under DDP: it has no gradients to average
        self.model = rt.wrap(rt.compiled(self.matching) if teacher else self.whole_model)

    def train_whole_model(self) -> None:
        """End the matching, and free the teacher."""
        self.matching.release()
        self.matching, self.model = None, self.rt.wrap(self.whole_model)
