"""
Causal pointwise attention for CUDA at head sizes above 256, as Triton kernels.

The kernels of triton_kernels.py keep whole rows of q, k, v and of their sums in registers and
shared memory, which head size 256 fills. Here the weights go through memory instead, and every
kernel is a matrix product:

    forward    A = f(x)                          y = A v / divisor
    backward   A = f(x), G = f'(x) (dy v^T)      dq, dk, dv by G, G^T, A^T as blockwise.py says

Only tiles on or below the diagonal are computed, and the products with A and G leave out the rest.
The scores x are computed again for the backward: that is one product in seven, and kept weights
would take B nh T^2 elements per layer. A and G have the dtype of q; all sums are in float32.

Heads are taken in chunks of at most MAX_WEIGHTS weights, or of one head where it has more. One
such matrix exists at a time in the forward, two in the backward.

A public decay (decay.py) is part of A and G; tiles beyond the reach of their head are left out.
The functions f, the scores and what `refusal` says are those of triton_kernels.py.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import triton_kernels
from kernels.blockwise import empty_heads_last
from kernels.triton_kernels import (
    column_factors,
    load_norms,
    norm_kernel,
    parse,
    reach_in_blocks,
    rounded,
    row_factors,
)

# ---- The kernels ------------------------------------------------------------
#
# Q, K, V are (B, nh, T, hs) of one set of strides (stride_b, stride_h, stride_t, 1), like views of
# c_attn's output. A chunk has the heads from number first_head on, counted through the batch. A and
# G are (heads of the chunk, length, length), where length is T rounded up to whole blocks: their
# tiles need no masks, and what lies past T is zero. Norms are (B, nh, T) in float32.


@triton.jit
def load_block(
    X, row, dim, T, stride,
    ROWS: tl.constexpr, DIMS: tl.constexpr, HS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The block (ROWS, DIMS) at (row, dim) of X (T, HS), with zeros outside X. RAGGED says whether
    it may reach past row T."""
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, DIMS)[None, :]
    X = X + tl.cast(row, tl.int64) * stride + dim + rows * stride + dims  # 32 bits do in a block
    if RAGGED or HS % DIMS != 0:
        return tl.load(X, (row + rows < T) & (dim + dims < HS), other=0.0)
    else:
        return tl.load(X)


@triton.jit
def dot_products(
    X, Z, x_row, z_row, T, x_stride, z_stride,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, HS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """x_i . z_j, (BLOCK, BLOCK) in float32, for a block of rows of X and one of Z, (T, HS) each."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for dim in tl.range(0, HS, BLOCK_K):
        x = load_block(X, x_row, dim, T, x_stride, BLOCK, BLOCK_K, HS, RAGGED)
        z = load_block(Z, z_row, dim, T, z_stride, BLOCK, BLOCK_K, HS, RAGGED)
        total = tl.dot(x, tl.trans(z), total, input_precision="ieee")
    return total


@triton.jit
def assigned_tile(T, BLOCK: tl.constexpr):
    """The head in its chunk, the row block and the column block of this program's tile, on or below
    the diagonal. The row with the most tiles makes a pair with that of the fewest, and so on: all
    pairs have blocks + 1 tiles."""
    blocks = tl.cdiv(T, BLOCK)
    tiles = blocks * (blocks + 1) // 2
    pid = tl.program_id(0)
    pair, place = pid % tiles // (blocks + 1), pid % tiles % (blocks + 1)
    longer = blocks - pair
    row = tl.where(place < longer, longer - 1, pair)
    return pid // tiles, row, tl.where(place < longer, place, place - longer)


@triton.jit
def head_start(head, nh, stride_b, stride_h):
    """Where this head begins in (B, nh, T, hs), in 64 bits."""
    return tl.cast(head // nh, tl.int64) * stride_b + tl.cast(head % nh, tl.int64) * stride_h


@triton.jit
def weights(
    Q, K, Q_norm, K_norm, Rates, S, head, row, col, stride_t, nh, T, scale,
    f: tl.constexpr, n: tl.constexpr, DISTANCE: tl.constexpr, DECAY: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, HS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """f and f' of a tile, both times the decay: zeros above the diagonal and past T by a select,
    whatever f makes of a hidden score, inf or NaN."""
    rows, cols = row + tl.arange(0, BLOCK), col + tl.arange(0, BLOCK)
    z = scale * dot_products(Q, K, row, col, T, stride_t, stride_t, BLOCK, BLOCK_K, HS, RAGGED)
    if DISTANCE:
        start = tl.cast(head, tl.int64) * T
        z -= load_norms(Q_norm + start, rows, T, RAGGED, DISTANCE)[:, None]
        z -= load_norms(K_norm + start, cols, T, RAGGED, DISTANCE)[None, :]
    A, slope = f(z, n)
    if DECAY:
        rate = tl.load(Rates + head % nh)
        origin = tl.where(row == col, row + BLOCK // 2, row)  # see triton_kernels.py
        factor = row_factors(S + head % nh * T, rows, T, rate, origin)[:, None]
        factor *= column_factors(cols, rate, origin)[None, :]
        A *= factor
        slope *= factor
    visible = (rows[:, None] >= cols[None, :]) & (rows[:, None] < T)
    return tl.where(visible, A, 0.0), tl.where(visible, slope, 0.0)


@triton.jit
def store_tile(M, head, row, col, length, tile, BLOCK: tl.constexpr):
    """Write a tile to M (heads, length, length)."""
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    M += (tl.cast(head, tl.int64) * length + row) * length + col
    tl.store(M + rows * length + cols, tile.to(M.dtype.element_ty))


@triton.jit
def weights_kernel(
    Q, K, A, A_sums, Q_norm, K_norm, Rates, S,
    first_head, stride_b, stride_h, stride_t, nh, T, c, unit,
    f: tl.constexpr, n: tl.constexpr, DISTANCE: tl.constexpr, DECAY: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, HS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One tile of A, and its row sums, without the factor 1/divisor: see gradients_kernel."""
    place, row, col = assigned_tile(T, BLOCK)
    head = first_head + place
    if DECAY:
        if row - col > reach_in_blocks(tl.load(Rates + head % nh), BLOCK):
            return
    start = head_start(head, nh, stride_b, stride_h)
    row, col = row * BLOCK, col * BLOCK
    tile, _ = weights(
        Q + start, K + start, Q_norm, K_norm, Rates, S, head, row, col, stride_t, nh, T, c * unit,
        f, n, DISTANCE, DECAY, BLOCK, BLOCK_K, HS, RAGGED,
    )  # fmt: skip
    length = tl.cdiv(T, BLOCK) * BLOCK
    if A_sums is not None:
        A_sums += (tl.cast(place, tl.int64) * (length // BLOCK) + col // BLOCK) * length + row
        tl.store(A_sums + tl.arange(0, BLOCK), tl.sum(tile, axis=1))
    store_tile(A, place, row, col, length, tile, BLOCK)


@triton.jit
def gradients_kernel(
    Q, K, V, dY, dA_sum, A, G, Row_sums, Col_sums, P_sums, P_moments, Q_norm, K_norm, Rates, S,
    first_head, stride_b, stride_h, stride_t, nh, T, c, unit,
    f: tl.constexpr, n: tl.constexpr, DISTANCE: tl.constexpr, DECAY: tl.constexpr,
    LEARNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, HS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One tile of A and of G = f'(x) dA, without the factor 1/divisor. dA_ij = dy_i . v_j, plus the
    gradient of the sum of row i, dA_sum (B, nh, T), if there is one. dY is a contiguous (B, T, nh,
    hs).

    The sums over a tile are parts of sums over rows and columns of the matrix, kept as (heads,
    blocks, length). For a distance, those of G go to Row_sums and Col_sums, added up as rounded, so
    that what should cancel in dq and dk does. LEARNED asks for sum_j P_ij and sum_j P_ij (i - j)
    with P = A dA, from which the gradient of the decay follows."""
    place, row, col = assigned_tile(T, BLOCK)
    head, length = first_head + place, tl.cdiv(T, BLOCK) * BLOCK
    row_part = (tl.cast(place, tl.int64) * (length // BLOCK) + col) * length
    col_part = (tl.cast(place, tl.int64) * (length // BLOCK) + row) * length
    if DECAY:
        if row - col > reach_in_blocks(tl.load(Rates + head % nh), BLOCK):
            return
    row, col = row * BLOCK, col * BLOCK
    rows, cols = row + tl.arange(0, BLOCK), col + tl.arange(0, BLOCK)
    start = head_start(head, nh, stride_b, stride_h)
    dY += head_start(head, nh, tl.cast(T, tl.int64) * nh * HS, HS)

    # First the products, then f: as its results replace them, no other order needs fewer registers
    dA = dot_products(dY, V + start, row, col, T, nh * HS, stride_t, BLOCK, BLOCK_K, HS, RAGGED)
    if dA_sum is not None:
        dA += load_norms(dA_sum + tl.cast(head, tl.int64) * T, rows, T, RAGGED, True)[:, None]
    tile, slope = weights(
        Q + start, K + start, Q_norm, K_norm, Rates, S, head, row, col, stride_t, nh, T, c * unit,
        f, n, DISTANCE, DECAY, BLOCK, BLOCK_K, HS, RAGGED,
    )  # fmt: skip
    store_tile(A, place, row, col, length, tile, BLOCK)
    if LEARNED:
        P = tile * dA
        tl.store(P_sums + row_part + rows, tl.sum(P, axis=1))
        tl.store(P_moments + row_part + rows, tl.sum(P * (rows[:, None] - cols[None, :]), axis=1))
    tile = rounded(slope * dA, G.dtype.element_ty)
    if DISTANCE:
        tl.store(Row_sums + row_part + rows, tl.sum(tile.to(tl.float32), axis=1))
        tl.store(Col_sums + col_part + cols, tl.sum(tile.to(tl.float32), axis=0))
    store_tile(G, place, row, col, length, tile, BLOCK)


@triton.jit
def product_kernel(
    M, X, Y, Own, Sums, Rates,
    first_head, heads, group, stride_b, stride_h, stride_t, nh, T, scale,
    TRANSPOSED: tl.constexpr, DISTANCE: tl.constexpr, DECAY: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, HS: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """A block (BLOCK, BLOCK_D) of y_i = scale (sum_{j <= i} M_ij x_j - own_i sum_{j <= i} M_ij),
    where the second sum is the distance's; TRANSPOSED, of the same with M_ji and j >= i. Y is a
    contiguous (B, T, nh, hs), Own has the strides of X, Sums are from gradients_kernel.

    Masks in the loop would let ptxas serialise its products. Past T, where M is zero, the last row
    of X serves as well; the last block of columns begins early enough to be full, and what overlaps
    is written twice, with the same bits.

    Programs are numbered in groups of heads that fit in the L2 cache together. In a group, the
    longest sums come first, and those that read the same rows of M are neighbours."""
    blocks, parts = tl.cdiv(T, BLOCK), tl.cdiv(HS, BLOCK_D)
    length = blocks * BLOCK
    pid = tl.program_id(0)
    dim, pid = pid % parts * BLOCK_D, pid // parts
    if HS > BLOCK_D:
        dim = tl.minimum(dim, HS - BLOCK_D)
    group_start = pid // (group * blocks) * group
    group_heads = tl.minimum(group, heads - group_start)
    pid = pid % (group * blocks)
    place, rank = group_start + pid % group_heads, pid // group_heads
    head = first_head + place

    reach = blocks
    if DECAY:
        reach = reach_in_blocks(tl.load(Rates + head % nh), BLOCK)
    if TRANSPOSED:
        block = rank
        begin, end = block, tl.minimum(block + reach + 1, blocks)
    else:
        block = blocks - 1 - rank
        begin, end = tl.maximum(block - reach, 0), block + 1

    X += head_start(head, nh, stride_b, stride_h)
    M += tl.cast(place, tl.int64) * length * length
    row, rows, inner = block * BLOCK, tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    dims = dim + tl.arange(0, BLOCK_D)[None, :]
    y = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for j in tl.range(begin * BLOCK, end * BLOCK, BLOCK_K):
        if TRANSPOSED:
            tile = M + tl.cast(j, tl.int64) * length + row
            m = tl.load(tile + inner[None, :] * length + rows[:, None])
        else:
            tile = M + tl.cast(row, tl.int64) * length + j
            m = tl.load(tile + rows[:, None] * length + inner[None, :])
        at = tl.minimum(j + inner, T - 1).to(tl.int64)[:, None] * stride_t
        if HS >= BLOCK_D:
            x = tl.load(X + at + dims)
        else:
            x = tl.load(X + at + dims, dims < HS, other=0.0)
        y = tl.dot(m, x, y, input_precision="ieee")
    if DISTANCE:
        Sums += tl.cast(place, tl.int64) * blocks * length + row
        total = tl.zeros((BLOCK,), tl.float32)
        for part in tl.range(begin, end):
            total += tl.load(Sums + part * length + rows)
        Own += head_start(head, nh, stride_b, stride_h)
        own = load_block(Own, row, dim, T, stride_t, BLOCK, BLOCK_D, HS, RAGGED)
        y -= total[:, None] * own.to(tl.float32)

    rows = rows[:, None]
    Y += head_start(head, nh, tl.cast(T, tl.int64) * nh * HS, HS) + tl.cast(row, tl.int64) * nh * HS
    inside = (row + rows < T) & (dims < HS)
    tl.store(Y + rows * nh * HS + dims, (y * scale).to(Y.dtype.element_ty), inside)


# ---- Block sizes ------------------------------------------------------------


class Blocks(NamedTuple):
    """A tile of A or G is BLOCK x BLOCK, a block of y, dq, dk, dv BLOCK x BLOCK_D. Products advance
    by BLOCK_K, on num_warps warps of 32 threads, with num_stages steps in shared memory. BLOCK_K
    has to divide BLOCK: A and G end with a block."""

    BLOCK: int
    BLOCK_D: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


HALF = Blocks(128, 128, 64, 8, 3)
FLOAT32 = Blocks(64, 64, 32, 4, 3)  # on the ordinary cores, its operands in registers
MAX_WEIGHTS = 2**26  # in a chunk: 128 MiB in half precision, and still some 2000 tiles of 128 x 128
NORM_ROWS = 8


def blocks_for(dtype: torch.dtype) -> Blocks:
    return FLOAT32 if dtype == torch.float32 else HALF


# ---- The entry --------------------------------------------------------------


def refusal(
    name: str, head_size: int, dtype: torch.dtype, device: torch.device | str, variant=None
) -> str | None:
    """One line on why `wide_attention` can't run here; None if it can, at any head size."""
    return triton_kernels.refusal(name, min(head_size, 64), dtype, device, variant)


def wide_attention(
    q: Tensor, k: Tensor, v: Tensor, name: str, divisor: float, reach: Tensor | None = None,
    sums: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """What triton_kernels.triton_attention computes, from and to the same shapes, at any head
    size. Differentiable once, and the same bit for bit in every run. Raises ValueError where
    `refusal` has a reason."""
    y, a_sum, *_ = _forward(q, k, v, name, float(divisor), *triton_kernels._decay(reach, q), sums)
    return (y, a_sum) if sums else y


def attention(name: str, divisor: float) -> Callable[..., Tensor]:
    """`wide_attention` as a callable (q, k, v, dropout, reach, sums); dropout has to be 0."""
    return lambda q, k, v, _, reach, sums: wide_attention(q, k, v, name, divisor, reach, sums)


class Launcher:
    """What all launches for one input share: its shape, the attention and the decay."""

    def __init__(self, q: Tensor, name: str, rates: Tensor | None, S: Tensor | None):
        score, f, self.unit, n = parse(name)
        B, self.nh, self.T, self.hs = q.shape
        self.c, self.distance = 1 / math.sqrt(self.hs), score == "distance"
        self.blocks = blocks_for(q.dtype)
        self.n_blocks = triton.cdiv(self.T, self.blocks.BLOCK)
        self.length = self.n_blocks * self.blocks.BLOCK
        self.heads = B * self.nh
        self.chunk = min(self.heads, max(1, MAX_WEIGHTS // self.length**2))  # heads at a time
        # Without a decay its pointers are not followed
        self.decay = (q, q) if rates is None else (rates, S)
        self.of_score = {"f": f, "n": n, "DISTANCE": self.distance}
        self.common = self.blocks._asdict() | {
            "HS": self.hs, "RAGGED": self.T != self.length, "DECAY": rates is not None,
            "enable_fp_fusion": True,
        }  # fmt: skip

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(the first head, the number of heads) of each chunk, heads counted through the batch."""
        firsts = range(0, self.heads, self.chunk)
        return ((first, min(self.chunk, self.heads - first)) for first in firsts)

    def norms(self, x: Tensor) -> Tensor:
        """c/2 unit |x_i|^2, (B, nh, T) in float32; empty for a dot product."""
        if not self.distance:
            return x.new_empty(0, dtype=torch.float32)
        norms = x.new_empty(x.shape[:3], dtype=torch.float32)
        norm_kernel[(self.heads * triton.cdiv(self.T, NORM_ROWS),)](
            x, norms, *x.stride()[:3], self.nh, self.T, self.c, self.unit,
            BLOCK=NORM_ROWS, HS=self.hs, BLOCK_D=triton_kernels.padded(self.hs),
            enable_fp_fusion=True,
        )  # fmt: skip
        return norms

    def tiles(self, kernel, tensors: tuple[Tensor, ...], first: int, heads: int, **own) -> None:
        """Start weights_kernel or gradients_kernel for a chunk; tensors[0] is q."""
        options = {key: value for key, value in self.common.items() if key != "BLOCK_D"}
        kernel[(heads * self.n_blocks * (self.n_blocks + 1) // 2,)](
            *tensors, *self.decay, first, *tensors[0].stride()[:3], self.nh, self.T, self.c,
            self.unit, **self.of_score, **options, **own,
        )  # fmt: skip

    def product(
        self, M: Tensor, x: Tensor, y: Tensor, scale: float, first: int, heads: int,
        transposed: bool, own: Tensor | None = None, sums: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Start product_kernel for a chunk; own and sums are given for dq and dk of a distance."""
        head_bytes = (self.length**2 + self.T * self.hs) * x.element_size()
        group = max(1, triton_kernels.L2_BYTES // head_bytes)
        parts = triton.cdiv(self.hs, self.blocks.BLOCK_D)
        distance = own is not None
        product_kernel[(heads * self.n_blocks * parts,)](
            M, x, y, own if distance else x, sums if distance else x, self.decay[0],
            first, heads, group, *x.stride()[:3], self.nh, self.T, scale,
            TRANSPOSED=transposed, DISTANCE=distance, **self.common,
        )  # fmt: skip


@torch.library.custom_op("triton_attention::wide_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, name: str, divisor: float,
    rates: Tensor | None, S: Tensor | None, sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, the row sums of A, and the norms of q and k, (B, nh, T) each. The sums are empty if not
    asked for, the norms for a dot product."""
    triton_kernels._check(q, k, v, refusal(name, q.size(-1), q.dtype, q.device))
    q, k, v = triton_kernels._one_set_of_strides(q, k, v)
    y, a_sum = empty_heads_last(q), triton_kernels._per_row(q, sums)
    launch = Launcher(q, name, rates, S)
    A = q.new_empty(launch.chunk, launch.length, launch.length)
    parts = launch.chunk, launch.n_blocks, launch.length
    A_sums = q.new_empty(parts, dtype=torch.float32) if sums else None
    with torch.cuda.device_of(q):
        norms = launch.norms(q), launch.norms(k)
        for first, heads in launch.chunks():
            if sums:
                A_sums.zero_()  # where no tile writes
            launch.tiles(weights_kernel, (q, k, A, A_sums, *norms), first, heads)
            if sums:
                of_chunk = A_sums[:heads, :, : launch.T].sum(1) / divisor
                a_sum.flatten(0, 1)[first : first + heads] = of_chunk
            launch.product(A, v, y, 1 / divisor, first, heads, False)
    return y, a_sum, *norms


@_forward.register_fake
def _(q, k, v, name, divisor, rates, S, sums):
    triton_kernels._check(q, k, v, refusal(name, q.size(-1), q.dtype, q.device))
    norms = (triton_kernels._norms(q, name) for _ in range(2))
    return empty_heads_last(q), triton_kernels._per_row(q, sums), *norms


@torch.library.custom_op("triton_attention::wide_backward", mutates_args=())
def _backward(
    dy: Tensor, da_sum: Tensor, q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor,
    name: str, divisor: float, rates: Tensor | None, S: Tensor | None, learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dq, dk, dv, without atomics: each program owns what it writes. The last result, (B, nh, T,
    2), is for the gradient of a decay if `learned`, else empty."""
    q, k, v = triton_kernels._one_set_of_strides(q, k, v)
    dy = dy.transpose(1, 2).contiguous().transpose(1, 2)  # no copy in a model: y was laid out so
    da_sum = da_sum.contiguous() if da_sum.numel() else None
    dq, dk, dv = empty_heads_last(q), empty_heads_last(q), empty_heads_last(q)
    moments, launch = triton_kernels._moments(q, learned), Launcher(q, name, rates, S)
    A, G = q.new_empty(2, launch.chunk, launch.length, launch.length)
    parts = launch.n_blocks, launch.length
    n_sums, n_moments = launch.chunk * launch.distance, launch.chunk * learned
    G_rows, G_cols = q.new_empty(2, n_sums, *parts, dtype=torch.float32)
    P = q.new_empty(2, n_moments, *parts, dtype=torch.float32)
    own = ((q, G_rows), (k, G_cols)) if launch.distance else ((), ())
    scale = launch.c / divisor
    with torch.cuda.device_of(q):
        for first, heads in launch.chunks():
            P.zero_()  # beyond the reach and above the diagonal, where no tile writes
            tensors = (q, k, v, dy, da_sum, A, G, G_rows, G_cols, *P, q_norm, k_norm)
            launch.tiles(gradients_kernel, tensors, first, heads, LEARNED=learned)
            if learned:
                of_chunk = P[:, :heads, :, : launch.T].sum(2).permute(1, 2, 0)
                moments.flatten(0, 1)[first : first + heads] = of_chunk
            launch.product(A, dy, dv, 1 / divisor, first, heads, True)
            launch.product(G, k, dq, scale, first, heads, False, *own[0])
            launch.product(G, q, dk, scale, first, heads, True, *own[1])
    return dq, dk, dv, moments


@_backward.register_fake
def _(dy, da_sum, q, k, v, q_norm, k_norm, name, divisor, rates, S, learned):
    moments = triton_kernels._moments(q, learned)
    return empty_heads_last(q), empty_heads_last(q), empty_heads_last(q), moments


_forward.register_autograd(
    partial(triton_kernels._gradients, _backward), setup_context=triton_kernels._save
)
