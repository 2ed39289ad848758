"""LoRA (Hu et al. 2021, arXiv:2106.09685): small adapters, trained in place of frozen weights."""

import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

# The linear layers of a block, some of which `lora_targets` lists, separated by commas
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def matches(layer: str, target: str) -> bool:
    """Whether `target` is the layer's name, or the end of it after the dot."""
    return f".{layer}".endswith(f".{target.strip()}")


def check(config: Any) -> None:
    """Raise ValueError unless the lora fields of this GPTConfig are possible. Without adapters,
    lora_alpha and lora_targets mean nothing: they get their defaults."""
    if type(config.lora_rank) is not int or config.lora_rank < 0:
        raise ValueError(f"lora_rank={config.lora_rank!r} is not a whole number from 0 on")
    if type(config.lora_alpha) not in (int, float) or not 0 < config.lora_alpha < math.inf:
        raise ValueError(f"lora_alpha={config.lora_alpha!r} is not a positive number")
    if config.lora_rank == 0:
        defaults = type(config)
        config.lora_alpha, config.lora_targets = defaults.lora_alpha, defaults.lora_targets
    for target in str(config.lora_targets).split(","):
        if not any(matches(layer, target) for layer in LAYERS):
            known = ", ".join(LAYERS)
            raise ValueError(f"lora_targets={target!r} is none of {known}, nor the end of one")


class LoRALinear(nn.Linear):
    """y = x W^T + b + (alpha / rank) x A^T B^T, where only A (rank, in) and B (out, rank) are
    trained. B is 0 at first, so that the layer begins as it was."""

    def __init__(self, n_in: int, n_out: int, bias: bool, rank: int, alpha: float):
        super().__init__(n_in, n_out, bias=bias)
        self.lora_A = nn.Parameter(torch.empty(rank, n_in))
        self.lora_B = nn.Parameter(torch.empty(n_out, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def linear(config: Any, layer: str, n_in: int, n_out: int) -> nn.Linear:
    """The linear layer of this name for this GPTConfig, with an adapter if it is a target."""
    if config.lora_rank and any(matches(layer, t) for t in config.lora_targets.split(",")):
        return LoRALinear(n_in, n_out, config.bias, config.lora_rank, config.lora_alpha)
    return nn.Linear(n_in, n_out, bias=config.bias)


def init_adapters(model: nn.Module) -> None:
    """Draw each A, set each B to 0 (as in the paper's code), and freeze all other parameters."""
    for name, p in model.named_parameters():
        if name.endswith(".lora_A"):
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))
        elif name.endswith(".lora_B"):
            nn.init.zeros_(p)
        p.requires_grad_(".lora_" in name)


def fold_lora(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of the same model, of this GPTConfig, with W + (alpha / rank) B A in place of
    each W that has an adapter."""
    folded = {name: t for name, t in state.items() if ".lora_" not in name}
    for name in state:
        layer, _, kind = name.rpartition(".")
        if kind == "lora_A":
            scale = config.lora_alpha / config.lora_rank
            BA = state[f"{layer}.lora_B"] @ state[name]
            folded[f"{layer}.weight"] = state[f"{layer}.weight"] + BA * scale
    return folded
