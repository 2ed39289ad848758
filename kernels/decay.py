"""
The public decay: every head weighs what lies d tokens back by gamma^d, whatever the tokens are.

    A[i, j] = f(x[i, j]) gamma^(i - j) / s_i       s_i = gamma^0 + gamma^1 + ... + gamma^i
    A[i, j] = softmax over j of x[i, j] - (i - j) / r       for softmax: the bias of ALiBi

gamma = exp(-1 / r), where r is the reach of the head in tokens. The reaches of a layer grow
geometrically from 2 tokens to L / 2, the shortest first; a single head has their geometric mean,
sqrt(L). L is the block_size of training: no weight depends on the length of the present input.

Shapes: B batch, nh heads, T sequence length; t queries belong to the last t of T tokens.
"""

import math
from functools import cache

import torch
from torch import Tensor

SHORTEST = 2.0  # tokens


@cache
def reaches(nh: int, L: int) -> tuple[float, ...]:
    """r of each head, in ascending order."""
    longest = max(SHORTEST, L / 2)
    if nh == 1:
        return (math.sqrt(SHORTEST * longest),)
    return tuple(SHORTEST * (longest / SHORTEST) ** (h / (nh - 1)) for h in range(nh))


def row_sums(reach: Tensor, i: Tensor) -> Tensor:
    """s_i = (1 - gamma^(i + 1)) / (1 - gamma)."""
    return torch.expm1(-(i + 1) / reach) / torch.expm1(-1 / reach)


def steps_back(like: Tensor, T: int, visible: Tensor | None, L: int) -> tuple[Tensor, ...]:
    """r (nh, 1, 1), positions i of the queries, positions j of the keys, and i - j, which is 0 for
    j > i. `like`, (B, nh, t, anything), is at least float32; `visible`, bool (B, 1, t, T), says how
    many of the T keys each query sees, None that the t queries are those of the last tokens."""
    nh, t = like.shape[1:3]
    reach = torch.tensor(reaches(nh, L), dtype=like.dtype, device=like.device)[:, None, None]
    j = torch.arange(T, device=like.device)
    i = j[T - t :, None] if visible is None else visible.sum(-1, keepdim=True) - 1
    return reach, i, j, (i - j).clamp(min=0)


def apply(A: Tensor, visible: Tensor | None, L: int) -> Tensor:
    """A gamma^(i - j) / s_i, for A (B, nh, t, T) in float32 or float64; A itself if L = 0."""
    if L == 0:
        return A
    reach, i, _, distance = steps_back(A, A.size(-1), visible, L)
    return A * (torch.exp(-distance / reach) / row_sums(reach, i))


def bias(q: Tensor, T: int, visible: Tensor | None, L: int) -> Tensor | None:
    """-(i - j) / r, and -inf where query i does not see key j, which broadcasts to (B, nh, t, T),
    in the dtype of q (B, nh, t, hs); `visible` itself if L = 0."""
    if L == 0:
        return visible
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    reach, i, j, distance = steps_back(wide, T, visible, L)
    return (-distance / reach).masked_fill(j > i, -math.inf).to(q.dtype)


class TileDecay:
    """gamma^(i - j) for tiles of `size` rows by `size` columns, for the heads of one layer. Factors
    below 2^-30 in float32, or 2^-60 in float64, count as nothing: a tile that has no larger one is
    not computed, so that a head of short reach takes linear time in T."""

    def __init__(self, nh: int, L: int, T: int, size: int, dtype: torch.dtype, device):
        self.T, self.size, self.reach = T, size, reaches(nh, L)
        self.bits = 60 if dtype == torch.float64 else 30
        # powers[h, m] = gamma^(T - 1 - m): the factors of a row of a tile are neighbours, and those
        # of the row below begin one place before. No exponent is negative, so nothing overflows: it
        # is 0 for the hidden j > i.
        exponents = torch.arange(T - 1, -size, -1, dtype=torch.float64).clamp_(min=0)
        reach = torch.tensor(self.reach, dtype=torch.float64)[:, None]
        powers = torch.exp(-exponents / reach)
        powers[powers < 2.0**-90] = 0  # denormal numbers would be slow
        self.powers = powers.to(device, dtype)
        self.sums = row_sums(reach, torch.arange(T)).to(device, dtype)[..., None]  # (nh, T, 1)

    def first(self, h: slice, i: int, j: int) -> int | None:
        """The first of the heads h that reaches from row block i to column block j; None if none
        does. All heads after it do."""
        distance = (i - j - 1) * self.size + 1  # of the nearest pair
        nearest = distance / (self.bits * math.log(2))
        heads = self.reach[h]
        return next((n for n, r in enumerate(heads) if r >= nearest), None)

    def at(self, i: int, j: int) -> int:
        """Where `powers` has the factors of the first row of tile (i, j)."""
        return self.T - 1 - (i - j) * self.size

    def pointer(self, h: slice, i: int, j: int) -> tuple[int, int, int]:
        """What tile.c reads for the heads h: the address of the first head's factors of row 0, the
        distance to those of the next head, and the number of heads."""
        step = self.powers.size(1)
        address = self.powers.data_ptr() + 4 * (h.start * step + self.at(i, j))
        return address, step, len(self.reach[h])

    def tile(self, h: slice, i: int, j: int, rows: int, columns: int) -> Tensor:
        """gamma^(i - j) of tile (i, j) for the heads h, (heads, rows, columns)."""
        end = self.at(i, j) + 1
        return self.powers[h].unfold(1, columns, 1)[:, end - rows : end].flip(1)
