"""
Fused causal pointwise attention for CUDA, as Triton kernels: blockwise.py's formulas for every
attention of model.py's registry and head sizes up to 256.

There is no row maximum, no rescaling and no log-sum-exp: a block of A is one matrix product, a
pointwise function, and another matrix product. Backward recomputes A block by block.

A public decay (decay.py) multiplies A and G by gamma^(i-j) / s_i, tile by tile; the loops leave out
blocks that are beyond the reach of their head. Where the sums a_i = sum_j A_ij / divisor are asked
for as well, dA_ij is dy_i . v_j + da_i.

Shapes as in blockwise.py. In the kernels, rows are queries (i) and cols are keys (j); BLOCK_D is hs
padded to a power of two. Sums are float32. float32 inputs are multiplied in full precision (`ieee`,
not TF32), which is slow, but a distance is a small difference of large numbers.

`triton_attention` is the entry; `refusal` says where it can't run, and why. An attention has a
Triton form if FORMS lists its pair f, f', and blockwise.HAND_WRITTEN the formula to compare with.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import decay
from kernels.blockwise import empty_heads_last, family, hand_written

# ----------------------------------------------------------------------------
# The pointwise functions: each takes a tile of scores in float32 and returns f and f' = df/dx.
# Forward takes f alone, and the compiler drops the rest. z is x times the attention's `unit` (see
# FORMS), which saves a multiplication per score: exp(x) = exp2(z), which the hardware has.

LOG2_E = tl.constexpr(math.log2(math.e))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: runs on a CPU


@triton.jit
def gaussian(z, n):
    """exp(x), z = x log2(e)."""
    a = tl.exp2(z)
    return a, a


@triton.jit
def gaussian_poly(z, n: tl.constexpr):
    """(1 + x / 2^n)^(2^n), z = x / 2^n: with a = 1 + z, n squarings. f' = a^(2^n - 1), the product
    a a^2 a^4 ..., and not f / a, which is 0 / 0 at a = 0. All squarings but the last 6 work on
    e = a - 1, by (1 + e)^2 - 1 = e (2 + e): blockwise.gaussian_poly_ says why."""
    e, a = z, 1.0 + z
    slope = a
    for i in tl.static_range(1, n + 1):
        if i <= n - 6:
            e = e * (2.0 + e)
            a = 1.0 + e
        else:
            a = a * a
        if i < n:
            slope = slope * a
    return a, slope


@triton.jit
def reciprocal(u):
    """1 / u for 2^-126 < u < 2^126, to a relative 3e-7: one instruction of the hardware and one
    product. A division also scales u against overflow."""
    r = tl.rsqrt(u)
    return r * r


@triton.jit
def gelu(z, n):
    """x Phi(x) with the normal distribution Phi. Its tail beyond |x| is exp(-x^2 / 2) t P(t) with
    t = 1 / (1 + 0.3 |x|), and P was fitted on |x| < 13 (Remez; exact to a relative 1.2e-7), where
    exp(-x^2 / 2) ends in float32. f' = Phi + x phi has the same exponential."""
    e = tl.exp2(z * z * (-0.5 * LOG2_E))
    t = reciprocal(1.0 + 0.3 * tl.abs(z))
    P = 0.210118164 + t * (-0.159378166 + t * 0.0361948183)
    P = 0.0993471474 + t * (0.130416365 + t * (-0.0571671755 + t * P))
    tail = e * t * (0.119623263 + t * (0.120845527 + t * P))
    Phi = tl.where(z < 0, tail, 1.0 - tail)
    return z * Phi, Phi + z * (0.3989422804014327 * e)


@triton.jit
def relu(z, n):
    return tl.maximum(z, 0.0), tl.where(z > 0, 1.0, 0.0)


@triton.jit
def sigmoid(z, n):
    """1 / (1 + t), z = x log2(e), with t = exp(-x), at most 2^126, so that nothing overflows;
    f' = t / (1 + t)^2, where f (1 - f) would cancel."""
    t = tl.exp2(tl.minimum(-z, 126.0, propagate_nan=tl.PropagateNan.ALL))
    u = reciprocal(1.0 + t)
    return u, t * u * u


@triton.jit
def square(z, n):
    return z * z, 2.0 * z


@triton.jit
def relu_square(z, n):
    r = tl.maximum(z, 0.0)
    return r * r, 2.0 * r


@triton.jit
def silu(z, n):
    """x sigmoid(x)."""
    s, s_slope = sigmoid(z * LOG2_E, n)
    return z * s, s + z * s_slope


@triton.jit
def tanh(z, n):
    """(1 - t) / (1 + t) with t = exp(-2|x|), and the sign of x; f' = 4 t / (1 + t)^2. Where 1 - t
    would cancel, four terms of the series: the fifth is below 2e-8 of x for |x| < 0.15."""
    t = tl.exp2(tl.abs(z) * (-2.0 * LOG2_E))
    u = reciprocal(1.0 + t)
    far = (1.0 - t) * u
    z2 = z * z
    near = z * (1.0 + z2 * (-1.0 / 3.0 + z2 * (2.0 / 15.0 - z2 * (17.0 / 315.0))))
    return tl.where(tl.abs(z) < 0.15, near, tl.where(z < 0, -far, far)), 4.0 * t * u * u


@triton.jit
def softplus(z, n):
    """log(1 + exp(x)) = max(x, 0) + log(1 + t) with t = exp(-|x|). log(1 + t) = 2 artanh(s) with
    s = t / (2 + t) <= 1/3, by six terms of the series: the seventh is below 2e-7 of the first.
    f' = 1 / (1 + exp(-x))."""
    t = tl.exp2(tl.abs(z) * -LOG2_E)
    s = t * reciprocal(2.0 + t)
    s2 = s * s
    series = 1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9 + s2 * (1 / 11))))
    log = 2.0 * s * (1.0 + s2 * series)
    return tl.maximum(z, 0.0) + log, tl.where(z < 0, t, 1.0) * reciprocal(1.0 + t)


@triton.jit
def identity(z, n):
    return z, tl.full(z.shape, 1.0, tl.float32)


# attn_type: (score, f and f', unit). `unit` is a function of n, which only GKpoly-n has.
FORMS = {
    "GK": ("distance", gaussian, lambda n: math.log2(math.e)),
    "GKpoly-n": ("distance", gaussian_poly, lambda n: 0.5**n),
    "PA_gelu": ("dot", gelu, lambda n: 1.0),
    "PA_relu": ("dot", relu, lambda n: 1.0),
    "PA_sigmoid": ("dot", sigmoid, lambda n: math.log2(math.e)),
    "PA_square": ("dot", square, lambda n: 1.0),
    "PA_relu-square": ("dot", relu_square, lambda n: 1.0),
    "PA_silu": ("dot", silu, lambda n: 1.0),
    "PA_tanh": ("dot", tanh, lambda n: 1.0),
    "PA_softplus": ("dot", softplus, lambda n: 1.0),
    "PA_identity": ("dot", identity, lambda n: 1.0),
}

# ---- The kernels ------------------------------------------------------------
#
# Q, K, V are (B, nh, T, hs) of one set of strides (stride_b, stride_h, stride_t, 1), like views of
# c_attn's output. Y, dY, dQ, dK, dV are contiguous (B, T, nh, hs). Norms and sums of rows are (B,
# nh, T) in float32; A_sum and dA_sum are None where nobody asks for sums, and leave no instruction.
#
# The loops run over the blocks wholly below the diagonal, which need no mask, and over those on the
# diagonal, where A and G get zeros by a select, whatever f makes of a hidden score, inf or NaN. If
# that is one block, there is nothing to load ahead, and Triton 3.6, where it prepared for that,
# serialised the products of the whole kernel.


@triton.jit
def assigned_head(T, nh, group, stride_b, stride_h, BLOCK: tl.constexpr, HS: tl.constexpr):
    """How many blocks of its head are longer than this program's, and where that head begins in (B,
    nh, T, hs) with these strides, in contiguous (B, T, nh, hs) and in (B, nh, T), in 64 bits. Heads
    are taken in groups whose keys and values fit in the L2 cache together; within a group all heads
    do their longest block first, so that the last programs to start are the shortest."""
    blocks = tl.cdiv(T, BLOCK)
    pid = tl.program_id(0)
    first_head = pid // (group * blocks) * group
    group_heads = tl.minimum(group, tl.num_programs(0) // blocks - first_head)
    pid = pid % (group * blocks)
    head = first_head + pid % group_heads
    b, h = tl.cast(head // nh, tl.int64), tl.cast(head % nh, tl.int64)
    start, y_start = b * stride_b + h * stride_h, b * T * nh * HS + h * HS
    return pid // group_heads, start, y_start, tl.cast(head, tl.int64) * T


@triton.jit
def load_rows(
    X, first, T, stride,
    ROWS: tl.constexpr, HS: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Rows first, first + 1, ... of X (T, HS) as a tile (ROWS, BLOCK_D), with zeros outside X.
    CHECK says whether the tile may reach past row T."""
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    X = X + tl.cast(first, tl.int64) * stride + rows * stride + dims  # 32 bits do in a tile
    if CHECK:
        return tl.load(X, (first + rows < T) & (dims < HS), other=0.0)
    elif HS < BLOCK_D:
        return tl.load(X, dims < HS, other=0.0)
    else:
        return tl.load(X)


@triton.jit
def store_rows(
    X, first, T, stride, tile, ROWS: tl.constexpr, HS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The inverse of load_rows: what lies outside X (T, HS) is dropped."""
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    X = X + tl.cast(first, tl.int64) * stride + rows * stride + dims
    tl.store(X, tile.to(X.dtype.element_ty), (first + rows < T) & (dims < HS))


@triton.jit
def scores(a, b, a_norm, b_norm, scale, DISTANCE: tl.constexpr, PRECISION: tl.constexpr):
    """z for the rows of tiles a and b: scale a.b, less their norms scale/2 |.|^2 for the distance.
    exp(-c/2 |a|^2) is never a factor of its own: it underflows where exp(c a.b) overflows."""
    z = scale * tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if DISTANCE:
        z = z - a_norm[:, None] - b_norm[None, :]
    return z


@triton.jit
def load_norms(X, rows, T, CHECK: tl.constexpr, DISTANCE: tl.constexpr):
    """The norms (or sums) of these rows; 0 for a dot product, which has none."""
    if not DISTANCE:
        return 0.0
    elif CHECK:
        return tl.load(X + rows, rows < T, other=0.0)
    else:
        return tl.load(X + rows)


@triton.jit
def rounded(tile, dtype: tl.constexpr):
    """tile.to(dtype) for a tile whose rounded values are added up in float32 too. From .to, Triton
    makes an instruction per value, on the unit that exp2 needs; these round two values each."""
    if INTERPRETED or dtype == tl.float32:
        return tile.to(dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [tile], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [tile], tl.float16, is_pure=True, pack=2
        )


# The decay, gamma^(i - j) = 2^(-rate (i - j)), is a factor of the row times one of the column, both
# relative to a position between them, so that neither exceeds 1. The program's own rows or columns
# get theirs after the loop. On the diagonal, where there is no position between them, it is the
# middle of at most 128: with the shortest reach, 0.75 tokens, a factor is 2^123 at most, which
# float32 holds; both are applied at once there.


@triton.jit
def row_factors(S, rows, T, rate, origin):
    """2^(-rate (i - origin)) / s_i for these rows i of a head; S holds its 1 / s_i."""
    s = tl.load(S + rows, rows < T, other=0.0)
    return tl.exp2(rate * (origin - rows).to(tl.float32)) * s


@triton.jit
def column_factors(cols, rate, origin):
    """2^(rate (j - origin)) for these columns j."""
    return tl.exp2(rate * (cols - origin).to(tl.float32))


@triton.jit
def reach_in_blocks(rate, BLOCK: tl.constexpr):
    """The number of blocks of positions after which the decay is below 2^-30, which is nothing."""
    return tl.cast(tl.ceil(30.0 / (rate * BLOCK)), tl.int32)


@triton.jit
def load_decay(Rates, S, norm_start, T, nh):
    """log2(e) / r of a head, and where its 1 / s_i begin."""
    h = norm_start // T % nh
    return tl.load(Rates + h), S + h * T


@triton.jit
def norm_kernel(
    K, K_norm, stride_b, stride_h, stride_t, nh, T, c, unit,
    BLOCK: tl.constexpr, HS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """K_norm[j] = c/2 unit |k_j|^2, from k as it is given, rounded, for a block of cols j."""
    rank, k_start, _, norm_start = assigned_head(T, nh, 1, stride_b, stride_h, BLOCK, HS)
    cols = rank * BLOCK + tl.arange(0, BLOCK)
    k = load_rows(K + k_start, rank * BLOCK, T, stride_t, BLOCK, HS, BLOCK_D, True).to(tl.float32)
    tl.store(K_norm + norm_start + cols, 0.5 * c * unit * tl.sum(k * k, axis=1), cols < T)


@triton.jit
def forward_kernel(
    Q, K, V, Y, A_sum, Q_norm, K_norm, Rates, S,
    stride_b, stride_h, stride_t, nh, T, group, c, unit, divisor,
    f: tl.constexpr, n: tl.constexpr, DISTANCE: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y_i = 1/divisor sum_j f(x_ij) v_j for BLOCK_M rows i. Writes Q_norm too, for the backward."""
    rank, start, y_start, norm_start = assigned_head(T, nh, group, stride_b, stride_h, BLOCK_M, HS)
    Q, K, V, Y = Q + start, K + start, V + start, Y + y_start
    Q_norm, K_norm = Q_norm + norm_start, K_norm + norm_start
    scale = c * unit
    first_row = (tl.cdiv(T, BLOCK_M) - 1 - rank) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)

    q = load_rows(Q, first_row, T, stride_t, BLOCK_M, HS, BLOCK_D, True)
    q_norm = 0.0
    if DISTANCE:
        q_norm = 0.5 * scale * tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=1)
        tl.store(Q_norm + rows, q_norm, rows < T)
    nearest = 0  # the first column that is not beyond the head's reach
    if DECAY:
        rate, S = load_decay(Rates, S, norm_start, T, nh)
        nearest = tl.maximum(first_row - reach_in_blocks(rate, BLOCK_M) * BLOCK_M, 0)
    y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    a_sum = tl.zeros((BLOCK_M,), tl.float32)
    for DIAGONAL in tl.static_range(2):
        begin = first_row if DIAGONAL else nearest
        end = tl.minimum(first_row + BLOCK_M, T) if DIAGONAL else first_row
        if DECAY:
            origin = first_row + BLOCK_M // 2 if DIAGONAL else first_row
            row_factor = row_factors(S, rows, T, rate, origin)
        for first_col in tl.range(
            begin, end, BLOCK_N, num_stages=1 if DIAGONAL and BLOCK_M == BLOCK_N else None
        ):
            cols = first_col + tl.arange(0, BLOCK_N)
            k = load_rows(K, first_col, T, stride_t, BLOCK_N, HS, BLOCK_D, DIAGONAL)
            k_norm = load_norms(K_norm, cols, T, DIAGONAL, DISTANCE)
            A, _ = f(scores(q, k, q_norm, k_norm, scale, DISTANCE, PRECISION), n)
            if DECAY:
                A *= column_factors(cols, rate, origin)[None, :]
                if DIAGONAL:
                    A *= row_factor[:, None]
            if DIAGONAL:
                # The same condition twice: with norms, the indices of the columns are at hand, and
                # without, they would fill registers. Elsewhere it makes no difference.
                if DISTANCE:
                    below = rows[:, None] >= cols[None, :]
                else:
                    below = (rows - first_col)[:, None] >= tl.arange(0, BLOCK_N)[None, :]
                A = tl.where(below, A, 0.0)
            if A_sum is not None:
                a_sum += tl.sum(A, axis=1)
            v = load_rows(V, first_col, T, stride_t, BLOCK_N, HS, BLOCK_D, DIAGONAL)
            y = tl.dot(A.to(v.dtype), v, y, input_precision=PRECISION)
        if DECAY and not DIAGONAL:
            y *= row_factor[:, None]
            a_sum *= row_factor
    if A_sum is not None:
        tl.store(A_sum + norm_start + rows, a_sum * (1.0 / divisor), rows < T)
    store_rows(Y, first_row, T, nh * HS, y * (1.0 / divisor), BLOCK_M, HS, BLOCK_D)


@triton.jit
def dq_kernel(
    Q, K, V, dY, dQ, dA_sum, Q_norm, K_norm, Moments, Rates, S,
    stride_b, stride_h, stride_t, nh, T, group, c, unit, divisor,
    f: tl.constexpr, n: tl.constexpr, DISTANCE: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr, LEARNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq_i = c/divisor (sum_j G_ij k_j - q_i sum_j G_ij) for BLOCK_M rows i; the second sum is the
    distance's, and adds up G as rounded for the first, so that what should cancel does.

    LEARNED asks for sum_j P_ij and sum_j P_ij (i - j) too, with P_ij = A_ij dA_ij, from which the
    gradient of the decay follows."""
    rank, start, y_start, norm_start = assigned_head(T, nh, group, stride_b, stride_h, BLOCK_M, HS)
    Q, K, V, dY, dQ = Q + start, K + start, V + start, dY + y_start, dQ + y_start
    Q_norm, K_norm = Q_norm + norm_start, K_norm + norm_start
    scale = c * unit
    first_row = (tl.cdiv(T, BLOCK_M) - 1 - rank) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)

    q = load_rows(Q, first_row, T, stride_t, BLOCK_M, HS, BLOCK_D, True)
    dy = load_rows(dY, first_row, T, nh * HS, BLOCK_M, HS, BLOCK_D, True)
    q_norm = load_norms(Q_norm, rows, T, True, DISTANCE)
    if dA_sum is not None:
        da_sum = load_norms(dA_sum + norm_start, rows, T, True, True)
    nearest = 0  # the first column that is not beyond the head's reach
    if DECAY:
        rate, S = load_decay(Rates, S, norm_start, T, nh)
        nearest = tl.maximum(first_row - reach_in_blocks(rate, BLOCK_M) * BLOCK_M, 0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    P_sum = tl.zeros((BLOCK_M,), tl.float32)
    P_moment = tl.zeros((BLOCK_M,), tl.float32)
    for DIAGONAL in tl.static_range(2):
        begin = first_row if DIAGONAL else nearest
        end = tl.minimum(first_row + BLOCK_M, T) if DIAGONAL else first_row
        if DECAY:
            origin = first_row + BLOCK_M // 2 if DIAGONAL else first_row
            row_factor = row_factors(S, rows, T, rate, origin)
        for first_col in tl.range(
            begin, end, BLOCK_N, num_stages=1 if DIAGONAL and BLOCK_M == BLOCK_N else None
        ):
            cols = first_col + tl.arange(0, BLOCK_N)
            k = load_rows(K, first_col, T, stride_t, BLOCK_N, HS, BLOCK_D, DIAGONAL)
            v = load_rows(V, first_col, T, stride_t, BLOCK_N, HS, BLOCK_D, DIAGONAL)
            k_norm = load_norms(K_norm, cols, T, DIAGONAL, DISTANCE)
            A, slope = f(scores(q, k, q_norm, k_norm, scale, DISTANCE, PRECISION), n)
            dA = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
            if dA_sum is not None:
                dA += da_sum[:, None]
            if DECAY:
                dA *= column_factors(cols, rate, origin)[None, :]
                if DIAGONAL:
                    dA *= row_factor[:, None]
            if LEARNED:
                P = A * dA
                if DIAGONAL:
                    P = tl.where(rows[:, None] >= cols[None, :], P, 0.0)
                # i - j = (i - first_col) - (j - first_col): no conversion per element
                sum_here, local = tl.sum(P, axis=1), tl.arange(0, BLOCK_N).to(tl.float32)
                P_sum += sum_here
                P_moment += (rows - first_col).to(tl.float32) * sum_here
                P_moment -= tl.sum(P * local[None, :], axis=1)
            G = slope * dA
            if DIAGONAL:
                G = tl.where(rows[:, None] >= cols[None, :], G, 0.0)
            G = rounded(G, k.dtype)
            dq = tl.dot(G, k, dq, input_precision=PRECISION)
            if DISTANCE:
                row_sum += tl.sum(G.to(tl.float32), axis=1)
        if DECAY and not DIAGONAL:
            dq *= row_factor[:, None]
            row_sum *= row_factor
            P_sum *= row_factor
            P_moment *= row_factor
    if DISTANCE:
        # Load q again: kept since the start, it would fill registers all through the loop. The
        # barrier is what stops the compiler from doing just that.
        tl.debug_barrier()
        q = load_rows(Q, first_row, T, stride_t, BLOCK_M, HS, BLOCK_D, True)
        dq -= row_sum[:, None] * q.to(tl.float32)
    if LEARNED:
        Moments += 2 * (norm_start + rows)
        tl.store(Moments, P_sum, rows < T)
        tl.store(Moments + 1, P_moment, rows < T)
    store_rows(dQ, first_row, T, nh * HS, dq * (c / divisor), BLOCK_M, HS, BLOCK_D)


@triton.jit
def dkv_kernel(
    Q, K, V, dY, dK, dV, dA_sum, Q_norm, K_norm, Rates, S,
    stride_b, stride_h, stride_t, nh, T, group, c, unit, divisor,
    f: tl.constexpr, n: tl.constexpr, DISTANCE: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dv_j = 1/divisor sum_i A_ij dy_i and dk_j = c/divisor (sum_i G_ij q_i - k_j sum_i G_ij) for
    BLOCK_N cols j. Tiles are transposed, (cols, rows), so that each product reads them as they are.

    RAGGED says that T is no multiple of BLOCK_M. A row past T meets dy = 0, but f of it may be inf.
    """
    rank, start, y_start, norm_start = assigned_head(T, nh, group, stride_b, stride_h, BLOCK_N, HS)
    Q, K, V = Q + start, K + start, V + start
    dY, dK, dV = dY + y_start, dK + y_start, dV + y_start
    Q_norm, K_norm = Q_norm + norm_start, K_norm + norm_start
    scale = c * unit
    first_col = rank * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)

    k = load_rows(K, first_col, T, stride_t, BLOCK_N, HS, BLOCK_D, True)
    v = load_rows(V, first_col, T, stride_t, BLOCK_N, HS, BLOCK_D, True)
    k_norm = load_norms(K_norm, cols, T, True, DISTANCE)
    farthest = T  # the rows from here on are beyond the head's reach
    if DECAY:
        rate, S = load_decay(Rates, S, norm_start, T, nh)
        farthest = first_col + (1 + reach_in_blocks(rate, BLOCK_N)) * BLOCK_N
        farthest = tl.minimum(farthest, T)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    col_sum = tl.zeros((BLOCK_N,), tl.float32)
    for DIAGONAL in tl.static_range(2):
        begin = first_col if DIAGONAL else first_col + BLOCK_N
        end = tl.minimum(first_col + BLOCK_N, T) if DIAGONAL else farthest
        if DECAY:
            origin = first_col + (BLOCK_N // 2 if DIAGONAL else BLOCK_N)
            column_factor = column_factors(cols, rate, origin)
        for first_row in tl.range(
            begin, end, BLOCK_M, num_stages=1 if DIAGONAL and BLOCK_M == BLOCK_N else None
        ):
            rows = first_row + tl.arange(0, BLOCK_M)
            q = load_rows(Q, first_row, T, stride_t, BLOCK_M, HS, BLOCK_D, RAGGED)
            dy = load_rows(dY, first_row, T, nh * HS, BLOCK_M, HS, BLOCK_D, RAGGED)
            q_norm = load_norms(Q_norm, rows, T, RAGGED, DISTANCE)
            A, slope = f(scores(k, q, k_norm, q_norm, scale, DISTANCE, PRECISION), n)
            dA = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
            if dA_sum is not None:
                dA += load_norms(dA_sum + norm_start, rows, T, RAGGED, True)[None, :]
            G = slope * dA
            if DECAY:
                factor = row_factors(S, rows, T, rate, origin)[None, :]
                if DIAGONAL:
                    factor = column_factor[:, None] * factor
                A *= factor
                G *= factor
            if RAGGED:
                A = tl.where(rows[None, :] < T, A, 0.0)
                G = tl.where(rows[None, :] < T, G, 0.0)
            if DIAGONAL:
                A = tl.where(rows[None, :] >= cols[:, None], A, 0.0)
                G = tl.where(rows[None, :] >= cols[:, None], G, 0.0)
            dv = tl.dot(A.to(dy.dtype), dy, dv, input_precision=PRECISION)
            G = rounded(G, q.dtype)
            dk = tl.dot(G, q, dk, input_precision=PRECISION)
            if DISTANCE:
                col_sum += tl.sum(G.to(tl.float32), axis=1)
        if DECAY and not DIAGONAL:
            dv *= column_factor[:, None]
            dk *= column_factor[:, None]
            col_sum *= column_factor
    if DISTANCE:
        tl.debug_barrier()  # and load k again, like q in dq_kernel
        k = load_rows(K, first_col, T, stride_t, BLOCK_N, HS, BLOCK_D, True)
        dk -= col_sum[:, None] * k.to(tl.float32)
    store_rows(dK, first_col, T, nh * HS, dk * (c / divisor), BLOCK_N, HS, BLOCK_D)
    store_rows(dV, first_col, T, nh * HS, dv * (1.0 / divisor), BLOCK_N, HS, BLOCK_D)


KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}

# How tl.dot multiplies float32. `tf32x3`, three products on the tensor cores, is faster; in an
# emulation its operands, rounded to 22 bits, add no error. But tensor cores truncate the sums that
# they accumulate, which can't be emulated here, so that `ieee` stays until a GPU has shown more.
FLOAT32_PRECISION = "ieee"

# ---- Block sizes ------------------------------------------------------------


class Blocks(NamedTuple):
    """How a kernel cuts up its work: BLOCK_M queries by BLOCK_N keys, on num_warps warps of 32
    threads, with num_stages tiles in shared memory, of which all but one are on their way. maxnreg
    caps a thread's registers, to fit more programs on a multiprocessor (which has 65536)."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


# (kernel, padded head size) -> Blocks; head sizes below 64 take the line of 64. Behind each line,
# for the worst of the attentions on sm_90 (Triton 3.9): registers, bytes on the stack (spills),
# shared memory, programs per multiprocessor. No wgmma is serialised. Why these:
# - wgmma multiplies 64 rows per 4 warps; wider tiles read shared memory less often per product.
# - A program alternates between tensor cores and f. Two or three of them on a multiprocessor fill
#   each other's gaps, most of all at head size 64, where f costs as much as the products.
# - The accumulators set the limit: one of BLOCK_M x hs in forward and dq, two of BLOCK_N x hs in
#   dkv. At 256, dkv spills whatever the tile, as wgmma has none smaller.
# - With two stages a tile is asked for when the one before is done with, and waited for at once;
#   where three don't fit, the other programs have to fill the gap.
# - The loop without a mask ends at the diagonal only if BLOCK_N divides BLOCK_M (dkv: vice versa).
BLOCKS = {
    ("forward", 64): Blocks(128, 64, 8, 3, maxnreg=128),  # 128 registers, 8 B, 65 KB, 2 programs
    ("forward", 128): Blocks(128, 64, 8, 3),  # 244, 0 B, 129 KB, 1
    ("forward", 256): Blocks(64, 64, 8, 2),  # 254, 0 B, 161 KB, 1
    ("dq", 64): Blocks(64, 64, 4, 3, maxnreg=168),  # 168, 0 B, 65 KB, 3
    ("dq", 128): Blocks(64, 64, 4, 2),  # 255, 0 B, 97 KB, 2
    ("dq", 256): Blocks(64, 32, 8, 2),  # 255, 128 B, 128 KB, 1
    ("dkv", 64): Blocks(64, 64, 4, 3),  # 254, 0 B, 65 KB, 2
    ("dkv", 128): Blocks(32, 128, 8, 2),  # 255, 8 B, 97 KB, 1
    ("dkv", 256): Blocks(32, 64, 8, 2),  # 255, 512 B, 128 KB, 1
}
# With a decay, whose factors and, if its reach is learned, two more sums take registers
BLOCKS_DECAY = BLOCKS | {
    ("forward", 64): Blocks(64, 64, 4, 3, maxnreg=168),  # 168, 0 B, 57 KB, 3
    ("dq", 64): Blocks(64, 64, 4, 3),  # 211, 0 B, 65 KB, 2; a learned reach: 255, 32 B
    ("dq", 128): Blocks(64, 64, 8, 3),  # 239, 0 B, 129 KB, 1; a learned reach: 255, 96 B
}
BLOCKS_SUMS = BLOCKS_DECAY | {("forward", 64): Blocks(64, 64, 4, 3)}  # 178, 0 B, 57 KB, 2
# float32 in full precision runs on the ordinary cores, its operands in registers: small tiles
BLOCKS_FLOAT32 = {
    **dict.fromkeys(BLOCKS, Blocks(32, 32, 8, 2)),
    ("forward", 256): Blocks(32, 16, 8, 2),
    **{("dq", hs): Blocks(32, 16, 8, 2) for hs in (128, 256)},
    **{("dkv", hs): Blocks(16, 32, 8, 2) for hs in (128, 256)},
}
NORM_ROWS = 64
# Shared memory that one program may have: the tables count on Hopper's. With two stages, head sizes
# up to 128 fit the 99 KB of consumer GPUs; the wider ones don't.
HOPPER_SHARED_BYTES = 227 * 2**10
WIDE_SHARED_BYTES = 163 * 2**10


def padded(head_size: int) -> int:
    """The power of two to which the kernels pad the head size; matrix products take 16 or more."""
    return max(16, triton.next_power_of_2(head_size))


def shared_bytes(device: torch.device) -> int:
    """The shared memory that one program may have on this device."""
    if device.type != "cuda":  # the interpreter
        return HOPPER_SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def blocks_for(kernel: str, q: Tensor, decays: bool = False, sums: bool = False) -> Blocks:
    """The block sizes of a kernel for these inputs."""
    table = BLOCKS_SUMS if sums else BLOCKS_DECAY if decays else BLOCKS
    table = BLOCKS_FLOAT32 if q.dtype == torch.float32 else table
    blocks = table[kernel, max(64, padded(q.size(-1)))]
    if shared_bytes(q.device) < HOPPER_SHARED_BYTES:
        blocks = blocks._replace(num_stages=min(2, blocks.num_stages))
    return blocks


# ---- The entry --------------------------------------------------------------

MAX_HEAD_SIZE = 256
L2_BYTES = 16 * 2**20  # for keys and values of the heads at work; an H100's L2 is 2 x 25 MB


def parse(name: str) -> tuple[str, triton.JITFunction, float, int] | None:
    """An attn_type -> (score, f and f', unit, n), or None if there is no Triton form of it."""
    key, n = family(name)
    if key not in FORMS:
        return None
    score, f, unit = FORMS[key]
    return score, f, unit(n), n


def refusal(
    name: str, head_size: int, dtype: torch.dtype, device: torch.device | str, variant=None
) -> str | None:
    """One line on why `triton_attention` can't run this attn_type here; None if it can. `variant`
    is the registry's entry: if it was edited, the kernels would compute another function."""
    device, form = torch.device(device), parse(name)
    if form is None:
        return f"{name} has no Triton kernel"
    if variant and not (variant.score == form[0] and hand_written(name, variant.f)):
        return f"the Triton kernel of {name} computes another formula than model.py's registry"
    if head_size > MAX_HEAD_SIZE:
        return f"the Triton kernels take head sizes up to {MAX_HEAD_SIZE}, not {head_size}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the Triton kernels take bfloat16, float16 and float32, not {dtype}"
    if INTERPRETED:
        # Its bfloat16 is made of uint16, and its products of them are wrong
        return "Triton's interpreter has no bfloat16" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"the Triton kernels need a CUDA device, not {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    if torch.version.hip:
        return "the Triton kernels were never tried on ROCm"
    gpu = torch.cuda.get_device_name(device)
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{gpu} is older than Ampere, which Triton needs"
    if head_size > 128 and shared_bytes(device) < WIDE_SHARED_BYTES:
        return f"{gpu} has too little shared memory above head size 128"
    return None


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, name: str, divisor: float, reach: Tensor | None = None,
    sums: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Causal pointwise attention `name` (GK, GKpoly-8, PA_gelu, ...): (B, nh, T, hs) x 3 -> same.
    y_i = sum_{j <= i} f(x_ij) v_j / divisor in the dtype of q, k and v, as a view of a contiguous
    (B, T, nh, hs). Views of c_attn's output (B, T, 3, nh, hs) are read where they are; q, k, v with
    different strides are copied first. Differentiable once, and the same bit for bit in every run.
    `reach`, (nh,), is that of a public decay; if it requires a gradient, it gets one. With `sums`
    the result is y and the sums of A's rows, (B, nh, T) in float32. Raises ValueError where
    `refusal` has a reason."""
    y, a_sum, *_ = _forward(q, k, v, name, float(divisor), *_decay(reach, q), sums)
    return (y, a_sum) if sums else y


def attention(name: str, divisor: float) -> Callable[..., Tensor]:
    """`triton_attention` as a callable (q, k, v, dropout, reach, sums); dropout has to be 0."""
    return lambda q, k, v, _, reach, sums: triton_attention(q, k, v, name, divisor, reach, sums)


def _check(q: Tensor, k: Tensor, v: Tensor, reason: str | None) -> None:
    if reason is not None:
        raise ValueError(reason)
    if not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        raise ValueError("q, k and v must have one shape and one dtype")


def _one_set_of_strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if q.stride() == k.stride() == v.stride() and q.stride(-1) == 1:
        return q, k, v
    return q.contiguous(), k.contiguous(), v.contiguous()


def _per_row(q: Tensor, wanted: bool) -> Tensor:
    """Memory for a number per row, (B, nh, T); none unless it is wanted."""
    return q.new_empty(q.shape[:3] if wanted else (0,), dtype=torch.float32)


def _norms(q: Tensor, name: str) -> Tensor:
    """Memory for the norms of q or k; none for a dot product."""
    return _per_row(q, parse(name)[0] == "distance")


def _moments(q: Tensor, learned: bool) -> Tensor:
    return q.new_empty((*q.shape[:3], 2) if learned else 0, dtype=torch.float32)


def _decay(reach: Tensor | None, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What the kernels read of a decay: log2(e) / r (nh,) and 1 / s_i (nh, T), in float32."""
    if reach is None:
        return None, None
    sums = decay.row_sums(reach[:, None], torch.arange(q.size(2), device=reach.device))
    return (math.log2(math.e) / reach).float().to(q.device), (1 / sums).float().to(q.device)


def _arguments(
    kernel: str, blocks: Blocks, tensors: tuple[Tensor | None, ...], name: str, divisor: float,
    rates: Tensor | None, S: Tensor | None,
) -> tuple[tuple, dict]:  # fmt: skip
    """What a kernel is started with: positional arguments and keywords. tensors[0] is q."""
    q = tensors[0]
    score, f, unit, n = parse(name)
    B, nh, T, hs = q.shape
    group = max(1, L2_BYTES // (2 * T * hs * q.element_size()))
    block = blocks.BLOCK_N if kernel == "dkv" else blocks.BLOCK_M
    own = {}
    if kernel == "dkv":
        own["RAGGED"] = T % blocks.BLOCK_M != 0
    if kernel == "dq":
        own["LEARNED"] = tensors[-1].numel() > 0
    # Without a decay its pointers are not followed
    of_decay = tensors[-2:] if rates is None else (rates, S)
    return (*tensors, *of_decay, *q.stride()[:3], nh, T, group, 1 / math.sqrt(hs), unit, divisor), {
        "f": f, "n": n, "DISTANCE": score == "distance", "DECAY": rates is not None, "HS": hs,
        "BLOCK_D": padded(hs), "PRECISION": FLOAT32_PRECISION, "enable_fp_fusion": True,
        **blocks._asdict(), **own, "grid": (B * nh * triton.cdiv(T, block),),
    }  # fmt: skip


def _launch(
    kernel: str, tensors: tuple[Tensor | None, ...], name: str, divisor: float,
    rates: Tensor | None, S: Tensor | None,
) -> None:  # fmt: skip
    """Start one program of a kernel per head and block."""
    sums = kernel == "forward" and tensors[4] is not None
    blocks = blocks_for(kernel, tensors[0], rates is not None, sums)
    args, options = _arguments(kernel, blocks, tensors, name, divisor, rates, S)
    KERNELS[kernel][options.pop("grid")](*args, **options)


@torch.library.custom_op("triton_attention::forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, name: str, divisor: float,
    rates: Tensor | None, S: Tensor | None, sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, the row sums of A, and the norms of q and k, (B, nh, T) each. The sums are empty if not
    asked for, the norms for a dot product."""
    _check(q, k, v, refusal(name, q.size(-1), q.dtype, q.device))
    q, k, v = _one_set_of_strides(q, k, v)
    y, a_sum = empty_heads_last(q), _per_row(q, sums)
    q_norm, k_norm = _norms(q, name), _norms(q, name)
    score, _, unit, _ = parse(name)
    B, nh, T, hs = q.shape
    with torch.cuda.device_of(q):
        if score == "distance":
            norm_kernel[(B * nh * triton.cdiv(T, NORM_ROWS),)](
                k, k_norm, *k.stride()[:3], nh, T, 1 / math.sqrt(hs), unit,
                BLOCK=NORM_ROWS, HS=hs, BLOCK_D=padded(hs), enable_fp_fusion=True,
            )  # fmt: skip
        tensors = q, k, v, y, a_sum if sums else None, q_norm, k_norm
        _launch("forward", tensors, name, divisor, rates, S)
    return y, a_sum, q_norm, k_norm


@_forward.register_fake
def _(q, k, v, name, divisor, rates, S, sums):
    _check(q, k, v, refusal(name, q.size(-1), q.dtype, q.device))
    return empty_heads_last(q), _per_row(q, sums), _norms(q, name), _norms(q, name)


@torch.library.custom_op("triton_attention::backward", mutates_args=())
def _backward(
    dy: Tensor, da_sum: Tensor, q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor,
    name: str, divisor: float, rates: Tensor | None, S: Tensor | None, learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dq, dk, dv, by two kernels without atomics: each program owns its rows (or cols). The last
    result, (B, nh, T, 2), is dq_kernel's for the gradient of a decay if `learned`, else empty."""
    q, k, v = _one_set_of_strides(q, k, v)
    dy = dy.transpose(1, 2).contiguous().transpose(1, 2)  # no copy in a model: y was laid out so
    da_sum = da_sum.contiguous() if da_sum.numel() else None
    dq, dk, dv = empty_heads_last(q), empty_heads_last(q), empty_heads_last(q)
    moments = _moments(q, learned)
    with torch.cuda.device_of(q):
        _launch("dkv", (q, k, v, dy, dk, dv, da_sum, q_norm, k_norm), name, divisor, rates, S)
        _launch("dq", (q, k, v, dy, dq, da_sum, q_norm, k_norm, moments), name, divisor, rates, S)
    return dq, dk, dv, moments


@_backward.register_fake
def _(dy, da_sum, q, k, v, q_norm, k_norm, name, divisor, rates, S, learned):
    return *(empty_heads_last(q) for _ in range(3)), _moments(q, learned)


def _save(ctx, inputs, output):
    q, k, v, *ctx.formula, rates, S, _ = inputs
    ctx.save_for_backward(q, k, v, *output[2:], rates, S)


def _gradients(backward, ctx, dy, da_sum, *_):
    *tensors, rates, S = ctx.saved_tensors
    learned = ctx.needs_input_grad[-3]
    dq, dk, dv, moments = backward(dy, da_sum, *tensors, *ctx.formula, rates, S, learned)
    d_rates = d_S = None
    if learned:  # y_i = sum_j 2^(-rate (i - j)) S_i ...
        P_sum, P_moment = moments.unbind(-1)
        scale = 1 / ctx.formula[1]
        d_rates = -math.log(2) * scale * P_moment.sum((0, 2))
        d_S = scale * P_sum.sum(0) / S
    return dq, dk, dv, None, None, d_rates, d_S, None


_forward.register_autograd(partial(_gradients, _backward), setup_context=_save)
