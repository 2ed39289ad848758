"""Muon for the matrices of the blocks and AdamW for everything else, as one optimizer."""

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer


def decay_groups(params: list[Tensor], weight_decay: float) -> list[dict]:
    """Parameter groups: matrices and embeddings decay, biases and LayerNorm gains don't."""
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


class MuonAdamW(Optimizer):
    """torch's Muon (Jordan et al. 2024) and AdamW; each parameter belongs to one of them. Muon's
    updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one
    learning rate and one weight decay serve both. The groups and the state of the two are kept
    here, for checkpoints, and the two work on these very objects."""

    def __init__(
        self, params: list[Tensor], blocks: set[Tensor], weight_decay: float, lr: float, **options
    ):
        """Of `params`, Muon gets the matrices among `blocks`. `options` are AdamW's."""
        matrices = [p for p in params if p.dim() == 2 and p in blocks]
        others = [p for p in params if p.dim() != 2 or p not in blocks]
        muon = Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = AdamW(decay_groups(others, weight_decay), lr=lr, **options)
        self.parts = [(muon, slice(0, 1)), (adamw, slice(1, None))]  # with their groups below
        super().__init__(muon.param_groups + adamw.param_groups, {})
        self._share()

    def _share(self) -> None:
        for part, groups in self.parts:
            part.param_groups, part.state = self.param_groups[groups], self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for part, _ in self.parts:
            part.step()
