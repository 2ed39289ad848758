"""
Muon for the hidden matrices, AdamW for everything else, as one optimizer.
"""

import torch
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """torch's Muon (Jordan et al. 2024) for the matrices of the blocks, its AdamW for embeddings,
    biases and gains: each parameter that is trained belongs to exactly one of them.

    Updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that both go
    by one learning rate and weight decay. Groups and state are kept here, for saving, and are those
    that the two work on.
    """

    def __init__(self, muons: list, weight_decay: float, groups: list[dict], lr: float, **options):
        """`muons` are the parameters for Muon, `groups` and `options` AdamW's."""
        muon = Muon(muons, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = AdamW(groups, lr=lr, **options)
        self.parts = [(muon, 0, 1), (adamw, 1, 1 + len(groups))]
        super().__init__([g for part, *_ in self.parts for g in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        for part, first, end in self.parts:
            part.param_groups, part.state = self.param_groups[first:end], self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for part, *_ in self.parts:
            part.step()
