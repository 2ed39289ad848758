"""
The public decay: every head weighs what lies d tokens back by gamma^d, whatever the tokens are.

    A[i, j] = f(x[i, j]) gamma^(i - j) / s_i       s_i = gamma^0 + gamma^1 + ... + gamma^i
    A[i, j] = softmax over j of x[i, j] - (i - j) / r       for softmax: the bias of ALiBi

gamma = exp(-1 / r), where r is the reach of the head in tokens. The fixed reaches of a layer grow
geometrically from 2 tokens to L / 2, the shortest first; a single head has their geometric mean,
sqrt(L). L is the block_size of training: no weight depends on the length of the present input.
Learned reaches start there, and stay above 0.75 tokens; once trained they are constants too.

Shapes: B batch, nh heads, T sequence length; t queries belong to the last t of T tokens. `reach` is
r of each head, (nh,), or None without a decay.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SHORTEST = 2.0  # tokens
SHORTEST_LEARNED = 0.75  # a factor of 0.26 for the last token but one; see triton_kernels.py


def fixed_reach(nh: int, L: int) -> Tensor:
    """r of each head, in ascending order, (nh,) in float64."""
    longest = max(SHORTEST, L / 2)
    powers = [h / (nh - 1) for h in range(nh)] if nh > 1 else [0.5]
    return torch.tensor([SHORTEST * (longest / SHORTEST) ** p for p in powers], dtype=torch.float64)


def row_sums(reach: Tensor, i: Tensor) -> Tensor:
    """s_i = (1 - gamma^(i + 1)) / (1 - gamma)."""
    return torch.expm1(-(i + 1) / reach) / torch.expm1(-1 / reach)


def steps_back(like: Tensor, T: int, visible: Tensor | None, reach: Tensor) -> tuple[Tensor, ...]:
    """r (nh, 1, 1), positions i of the queries, positions j of the keys, and i - j, which is 0 for
    j > i. `like`, (B, nh, t, anything), is at least float32; `visible`, bool (B, 1, t, T), says
    which of the T keys each query sees: the first one has position 0, and keys that it does not see
    do not count. None means that the t queries are those of the last tokens."""
    # First the dtype: not every device has float64
    t, reach = like.size(2), reach.to(like.dtype).to(like.device)[:, None, None]
    j = torch.arange(T, device=like.device)
    if visible is None:
        i = j[T - t :, None]
    else:
        j = visible.cumsum(-1) - 1
        i = j[..., -1:]
    return reach, i, j, (i - j).clamp(min=0)


def apply(A: Tensor, visible: Tensor | None, reach: Tensor | None) -> Tensor:
    """A gamma^(i - j) / s_i, for A (B, nh, t, T) in float32 or float64."""
    if reach is None:
        return A
    reach, i, _, distance = steps_back(A, A.size(-1), visible, reach)
    return A * (torch.exp(-distance / reach) / row_sums(reach, i))


def mean(v: Tensor, t: int, visible: Tensor | None, reach: Tensor) -> Tensor:
    """m_i = sum_(j <= i) gamma^(i - j) v_j / s_i for the last t tokens of v (B, nh, T, hs), or for
    t queries that see what `visible` says: (B, nh, t, hs), in float32 or float64. All T at once
    take O(T^1.5): chunks of sqrt(T) tokens, and before each the sum of those that precede it."""
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    B, nh, T, hs = v.shape
    with torch.autocast(v.device.type, enabled=False):
        if visible is not None or t < T:
            seen = v.new_ones(t, T).tril(T - t) if visible is None else visible.to(v.dtype)
            return apply(seen.expand(B, nh, t, T), visible, reach) @ v
        reach, j = reach.to(v.dtype).to(v.device)[:, None, None], torch.arange(T, device=v.device)
        size = math.ceil(math.sqrt(T))
        n, i = math.ceil(T / size), j[:size, None]
        chunks = F.pad(v, (0, 0, 0, n * size - T)).view(B, nh, n, size, hs)
        # gamma^(i - j): (nh, size, size)
        powers = torch.exp(-(i - i.mT).clamp(min=0) / reach).tril()
        sums = powers[:, None] @ chunks
        ends = sums[:, :, :, -1]  # (B, nh, n, hs)
        between = (j[:n, None] - j[:n] - 1).clamp(min=0) * size
        # At the last token of the chunk before: (B, nh, n, hs)
        before = torch.exp(-between / reach).tril(-1) @ ends
        sums = sums + torch.exp(-(i + 1) / reach)[:, None] * before[:, :, :, None]
        return sums.flatten(2, 3)[:, :, :T] / row_sums(reach, j[:, None])


def bias(q: Tensor, T: int, visible: Tensor | None, reach: Tensor | None) -> Tensor | None:
    """-(i - j) / r, and -inf where query i does not see key j, which broadcasts to (B, nh, t, T),
    in the dtype of q (B, nh, t, hs); `visible` itself without a decay."""
    if reach is None:
        return visible
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    reach, i, j, distance = steps_back(wide, T, visible, reach)
    hidden = j > i if visible is None else ~visible
    return (-distance / reach).masked_fill(hidden, -math.inf).to(q.dtype)


def with_gradient_of_reach(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`attend`, a callable (q, k, v, dropout, reach) -> y that treats the reach as a constant, made
    differentiable in it. Let g be gamma, and g0 the same number as a constant:

        y_i = (g / g0)^i s0_i / s_i  sum_j f(x_ij) g0^(i - j) / s0_i  (g0 / g)^j v_j

    The factors of v and of y are exactly 1, and their gradients are those of gamma: differences of
    sums T / r times as large, which half precision is too coarse for."""

    def differentiable(q, k, v, dropout, reach):
        j = torch.arange(v.size(2), device=reach.device)[:, None]  # (T, 1)
        change = (1 / reach - 1 / reach.detach())[:, None, None]  # log(g0 / g) = 0
        s = row_sums(reach[:, None, None], j)  # (nh, T, 1)
        v = (v * torch.exp(j * change)).to(v.dtype)
        y = attend(q, k, v, dropout, reach.detach())
        return (y * (torch.exp(-j * change) * (s.detach() / s))).to(y.dtype)

    return differentiable


class TileDecay:
    """gamma^(i - j) for tiles of `size` rows by `size` columns, for the heads of one layer. Factors
    below 2^-30 in float32, or 2^-60 in float64, count as nothing: a tile that has no larger one is
    not computed, so that a head of short reach takes linear time in T."""

    def __init__(self, reach: Tensor, T: int, size: int, dtype: torch.dtype, device):
        reach = reach.double().cpu()
        self.T, self.size, self.reach = T, size, reach.tolist()
        self.bits = 60 if dtype == torch.float64 else 30
        # powers[h, m] = gamma^(T - 1 - m): the factors of a row of a tile are neighbours, and those
        # of the row below begin one place before. No exponent is negative, so nothing overflows: it
        # is 0 for the hidden j > i.
        exponents = torch.arange(T - 1, -size, -1, dtype=torch.float64).clamp_(min=0)
        powers = torch.exp(-exponents / reach[:, None])
        powers[powers < 2.0**-90] = 0  # denormal numbers would be slow
        self.powers = powers.to(device, dtype)
        sums = row_sums(reach[:, None], torch.arange(T))
        self.sums = sums.to(device, dtype)[..., None]  # (nh, T, 1)

    def first(self, h: slice, i: int, j: int) -> int | None:
        """The first of the heads h that reaches from row block i to column block j; None if none
        does. The heads after it count as reaching too: reaches begin in ascending order."""
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
