"""
The parts of a block that may differ from GPT-2's: each option is one plain formula.

    norm=layer           (x - mean(x)) / sqrt(var(x) + 1e-5) * weight + bias    GPT-2's LayerNorm
    norm=rms             x / sqrt(mean(x^2) + 1e-5) * weight                    no mean, no bias
    norm=fixed           (x - mean(x)) / std * weight + bias                    std: one constant
    mlp_act=gelu         x Phi(x), or its form with tanh                        GPT-2's
    mlp_act=relu-square  max(x, 0)^2                                            (Primer)
    mlp_act=quad         a x^2 + b x                                            a, b are learned
    mlp_act=quartic      x / 2 + x^2 / 4 - 0.006 x^4      within 0.5 of GELU for |x| < 5
    position=learned     one vector per position, added to the embeddings       GPT-2's
    position=rope        q and k rotated by angles that grow with the position  (RoFormer)
    qk_norm=True         g hs^(1/4) q / |q|, the same for k                     one gain g per head

With norm=fixed, mlp_act=quad or quartic, and GKpoly-n, a model is a polynomial of its embeddings.
Sources: RMSNorm arXiv:1910.07467, Primer arXiv:2109.08668, RoFormer arXiv:2104.09864, QK-norm
arXiv:2010.04245.

Shapes: B batch, T sequence length, C embedding width, nh heads, hs head size.
"""

import math
import os
import sys
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

# The fields of GPTConfig that choose a part
OPTIONS = ("norm", "mlp_act", "position", "qk_norm")
# The ends of the names of weights that GPT-2 does not have; the last are those of a learned decay
OWN_WEIGHTS = (".std", ".act.a", ".act.b", ".qk.gain", ".log_reach")
EPS = 1e-5  # nn.LayerNorm's

# ---- From GPT-2's parts to polynomials, step by step ------------------------


class Annealed(nn.Module):
    """A polynomial that may replace GPT-2's part gradually. While it `anneals`, the output in
    training is a mixture of the two, of which `share` is the polynomial's. Evaluation sees the
    polynomial alone, and so does whoever loads a checkpoint from the middle."""

    def __init__(self):
        super().__init__()
        self.anneals = False
        self.register_buffer("share", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.polynomial(x)
        if self.training and self.anneals:
            before = self.gpt2(x)
            y = before + self.share.to(y.dtype) * (y - before)
        return y


def anneal(model: nn.Module, step: int, steps: int) -> None:
    """Set the share of every polynomial for the update after `step` of them: it grows from 0 to 1
    over the first `steps` updates."""
    for part in model.modules():
        if isinstance(part, Annealed):
            part.anneals = step < steps
            part.share.fill_(min(1.0, step / max(1, steps)))


def say_left_out(names: list[str], source: Any) -> None:
    """Say in one line on stderr which weights of `source` a model has no place for, if any."""
    kinds = sorted({".".join(name.split(".")[-2:]) for name in names})
    if kinds and os.environ.get("RANK", "0") == "0":
        print(f"{source}: left out {', '.join(kinds)}: this model has none", file=sys.stderr)


# ---- Norms ------------------------------------------------------------------


class FixedNorm(Annealed):
    """LayerNorm with a constant in place of each token's own deviation, so that it folds into the
    next matrix. The constant follows the root mean square of x - mean(x) in training: `track` moves
    it after every step, and nothing else does. No gradient flows through it."""

    KEEP = 0.999  # share of std^2 that a step keeps; 0.9 cost 0.06 to 0.56 nats

    def __init__(self, C: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C)) if bias else None
        self.register_buffer("std", torch.ones(()))
        # Since the last step: the sum over forward passes of mean((x - mean(x))^2), and their count
        self.register_buffer("seen", torch.zeros(2), persistent=False)

    def gpt2(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, EPS)

    def polynomial(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        if self.training and self.weight.requires_grad:  # not under adapters: all else is frozen
            square = x.detach().float().square().mean()
            self.seen += torch.stack([square, torch.ones_like(square)])
        y = x * (self.weight / self.std)
        return y if self.bias is None else y + self.bias


def norm(config: Any) -> nn.Module:
    """The norm (B, T, C) -> (B, T, C) of this GPTConfig."""
    match config.norm:
        case "fixed":
            return FixedNorm(config.n_embd, config.bias)
        case "rms":
            return nn.RMSNorm(config.n_embd, eps=EPS)
    return nn.LayerNorm(config.n_embd, eps=EPS, bias=config.bias)


def fixed_norms(model: nn.Module) -> list[FixedNorm]:
    return [module for module in model.modules() if isinstance(module, FixedNorm)]


def norms_are_new(model: nn.Module) -> bool:
    """Whether there are FixedNorms whose std is the 1 of a new one, as it came with no weights."""
    return any(norm.std == 1 for norm in fixed_norms(model))


@torch.no_grad()
def track(model: nn.Module, rt: Any, updated: bool) -> None:
    """Let every FixedNorm's std follow what its micro-steps on all ranks have seen, unless the
    weights were not `updated`. To be called once a step, on all ranks, which stay equal."""
    if not (norms := fixed_norms(model)):
        return
    # Sums are rounded to float32, so that two micro-steps give the same bits on one rank and on two
    seen = torch.tensor(rt.sum(torch.cat([norm.seen for norm in norms]))).view(-1, 2)
    for norm, (total, count) in zip(norms, seen, strict=True):
        if updated and count > 0:
            square = FixedNorm.KEEP * norm.std.cpu() ** 2 + (1 - FixedNorm.KEEP) * total / count
            norm.std.copy_(square.sqrt())
        norm.seen.zero_()


@torch.no_grad()
def calibrate(model: nn.Module, idx: Tensor, rt: Any) -> None:
    """Set the std of every FixedNorm to what the token ids (B, T) give, on the main process's word:
    that is where training begins, with new weights or with those of another norm."""

    def measure(norm: FixedNorm, inputs: tuple[Tensor]) -> None:
        x = inputs[0].float()
        norm.std.copy_((x - x.mean(-1, keepdim=True)).square().mean().sqrt())

    norms, training = fixed_norms(model), model.training
    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    model.eval()
    with rt.autocast():
        model(idx)
    model.train(training)
    for handle in handles:
        handle.remove()
    rt.broadcast([norm.std for norm in norms])


# ---- Activations of the MLP -------------------------------------------------


class ReluSquare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class PolynomialActivation(Annealed):
    def gpt2(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class Quad(PolynomialActivation):
    """a x^2 + b x. It begins as the parabola that touches GELU at 0 in value and slope."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.full((1,), 1 / math.sqrt(2 * math.pi)))
        self.b = nn.Parameter(torch.full((1,), 0.5))

    def polynomial(self, x: Tensor) -> Tensor:
        return (self.a * x + self.b) * x


class Quartic(PolynomialActivation):
    """x / 2 + x^2 / 4 - 0.006 x^4, which falls without end for |x| > 5. Learning the coefficients
    changed neither them nor the loss, as the matrix before scales and shifts x."""

    LINEAR, SQUARE, FOURTH = 0.5, 0.25, -0.006

    def polynomial(self, x: Tensor) -> Tensor:
        square = x * x
        return self.LINEAR * x + (self.SQUARE + self.FOURTH * square) * square


def activation(config: Any) -> nn.Module:
    """The function between the MLP's two matrices, of this GPTConfig."""
    match config.mlp_act:
        case "quad":
            return Quad()
        case "quartic":
            return Quartic()
        case "relu-square":
            return ReluSquare()
    return nn.GELU(approximate=config.gelu)


# ---- Positions, queries and keys --------------------------------------------


class NoEmbedding(nn.Module):
    """In place of the position embeddings where q and k are rotated: adds 0."""

    def forward(self, pos: Tensor) -> Tensor:
        return torch.zeros((), device=pos.device)


def position_embedding(config: Any) -> nn.Module:
    if config.position == "rope":
        return NoEmbedding()
    return nn.Embedding(config.block_size, config.n_embd)


def rotate(x: Tensor, pos: Tensor) -> Tensor:
    """x (B, nh, T, hs), in float32 or float64, at positions (T,) or (B, T): each pair of numbers
    (x[m], x[m + hs/2]) turned by pos 10000^(-2 m / hs). So q.k and |q - k| depend on the distance
    of two tokens, and norms stay what they are."""
    half = x.size(-1) // 2
    m = torch.arange(half, device=x.device, dtype=x.dtype)
    angle = pos[..., None] * 10000 ** (-m / half)  # (T, hs/2) or (B, T, hs/2)
    if pos.dim() == 2:
        angle = angle[:, None]  # the same for all heads
    cos, sin = angle.cos(), angle.sin()
    a, b = x.split(half, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class QueriesAndKeys(nn.Module):
    """What happens to q and k (B, nh, T, hs) at positions (T,) or (B, T) before attention reads
    them: nothing, as in GPT-2, unless qk_norm or rope is set.

    With qk_norm, |q| = |k| = g hs^(1/4), so that the score of GK, -|q - k|^2 / (2 sqrt(hs)), is
    between -2 g^2 and 0: GKpoly-n stays in its range for every text exactly if g <= 2^(n/2)."""

    def __init__(self, config: Any):
        super().__init__()
        self.rope = config.position == "rope"
        # 2 reaches down to a score of -8
        self.gain = nn.Parameter(torch.full((config.n_head,), 2.0)) if config.qk_norm else None

    def forward(self, q: Tensor, k: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        return self.prepare(q, pos), self.prepare(k, pos)

    def prepare(self, x: Tensor, pos: Tensor) -> Tensor:
        if self.gain is None and not self.rope:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.gain is not None:
            gain = self.gain[:, None, None] * wide.size(-1) ** 0.25
            wide = gain * F.normalize(wide, dim=-1)
        if self.rope:
            wide = rotate(wide, pos)
        return wide.to(x.dtype)
