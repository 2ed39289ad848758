"""
Pointwise attention in O(T) memory: model.py's formulas, tile by tile, for CPU and for CUDA.

With x and f as in model.py's registry, A[i, j] = f(x[i, j]) for j <= i and 0 above the diagonal:

    y_i  = sum_j A_ij v_j / divisor
    dv_j = sum_i A_ij dy_i / divisor
    G_ij = f'(x_ij) dy_i . v_j / divisor                             (the gradient of x)
    dq_i = c sum_j G_ij k_j,   dk_j = c sum_i G_ij q_i               for the score 'dot'
    dq_i = c sum_j G_ij (k_j - q_i),   dk_j = c sum_i G_ij (q_i - k_j)      for 'distance'

Nothing is normalised over j, so a tile needs nothing from the other tiles of its row, and backward
recomputes it from q, k and v alone. A public decay (decay.py) multiplies the tiles of A and G by
gamma^(i-j); y and dy are divided by its row sums. On a CPU, what GK and GKpoly-n do between the
matrix products is compiled from tile.c.

Shapes: B batch, nh heads, T sequence length, hs head size. A tile holds N of the B nh heads, `size`
rows i and `size` columns j (fewer at the end of a sequence).
"""

import math
import re
from collections.abc import Callable
from functools import cache, partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.compiled import PART, compiled_tile
from kernels.decay import TileDecay, with_gradient_of_reach

aten = torch.ops.aten

# ---- Pointwise functions ----------------------------------------------------
#
# f_(x, g) returns f(x) and, if g is given, turns g into g f'(x). It works in place: for a tile that
# fits the cache, fresh memory costs more than the arithmetic.


def exp_(x, g=None):
    x.exp_()
    if g is not None:
        g.mul_(x)
    return x


def gaussian_poly_(x, g=None, *, n):
    """b^(2^n) with b = 1 + x / 2^n, and its derivative as the product b b^2 b^4 ... b^(2^(n-1)).
    Each squaring doubles the relative error, and b itself is rounded by 2^-25 in float32. So only
    the last 6 squarings are done on b. Those before are done on s, where b = 1 + s / 2^m, which is
    more exact: b^2 = 1 + s' / 2^(m-1) with s' = s + s^2 / 2^(m+1), and ds'/ds = b."""
    last = min(n, 6)
    for m in range(n, last, -1):
        if g is not None:
            g.addcmul_(g, x, value=2.0**-m)
        x.addcmul_(x, x, value=2.0 ** -(m + 1))
    torch.add(x.new_ones(()), x, alpha=2.0**-last, out=x)
    for _ in range(last):
        if g is not None:
            g.mul_(x)
        x.mul_(x)
    return x


def square_(x, g=None):
    if g is not None:
        g.mul_(x).mul_(2)
    return x.mul_(x)


def sigmoid_(x, g=None):
    """f' = f(x) f(-x): in float32, f (1 - f) has no digit left where f is nearly 1."""
    if g is not None:
        g.mul_(torch.sigmoid(-x))
    x.sigmoid_()
    if g is not None:
        g.mul_(x)
    return x


def tanh_(x, g=None):
    """f' = 1 / cosh^2: in float32, 1 - f^2 has no digit left where |f| is nearly 1."""
    if g is not None:
        g.div_(torch.cosh(x).square_())
    return x.tanh_()


def with_torchs_derivative(f_, backward, *args):
    """f_(x, g) from torch's in-place f and its backward operator, whose constants are `args`."""

    def apply_(x, g=None):
        if g is not None:
            backward.grad_input(g, x, *args, grad_input=g)
        return f_(x)

    return apply_


# By the names of model.py's registry
HAND_WRITTEN = {
    "GK": exp_,
    "GKpoly-n": gaussian_poly_,
    "PA_gelu": with_torchs_derivative(aten.gelu_, aten.gelu_backward),
    "PA_relu": with_torchs_derivative(torch.relu_, aten.threshold_backward, 0),
    "PA_sigmoid": sigmoid_,
    "PA_square": square_,
    "PA_relu-square": lambda x, g=None: square_(x.relu_(), g),
    "PA_silu": with_torchs_derivative(aten.silu_, aten.silu_backward),
    "PA_tanh": tanh_,
    "PA_softplus": with_torchs_derivative(
        lambda x: aten.softplus.out(x, out=x), aten.softplus_backward, 1, 20
    ),
    "PA_identity": lambda x, g=None: x,
}


def by_autograd_(x, g=None, *, f):
    """f_(x, g) for any other f."""
    if g is None:
        return f(x)
    # An operator runs with autograd excluded from dispatch. (torch.func would work in spite of
    # that, but not under a TorchDispatchMode such as FlopCounterMode.)
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        x = x.detach().requires_grad_()
        A = f(x)
        dx = torch.autograd.grad(A, x, g)[0] if A.requires_grad else torch.zeros_like(x)
    g.copy_(dx)
    return A.detach()


def family(name: str) -> tuple[str, int]:
    """The registry's key for an attn_type, and its n, or 0: 'GKpoly-8' -> ('GKpoly-n', 8)."""
    match = re.fullmatch(r"(.+-)([0-9]{1,2})", name)
    return (match[1] + "n", int(match[2])) if match else (name, 0)


@cache
def hand_written(name: str, f: Callable[[Tensor], Tensor]) -> Callable[..., Tensor] | None:
    """The f_ of HAND_WRITTEN for this attn_type. None if there is none, or if the registry's f has
    been edited, so that it computes something else."""
    key, n = family(name)
    if key not in HAND_WRITTEN:
        return None
    f_ = partial(HAND_WRITTEN[key], n=n) if n else HAND_WRITTEN[key]
    near, far = (torch.linspace(-x, x, 61, dtype=torch.float64, device="cpu") for x in (3, 100))
    x = torch.cat((near, far))
    return f_ if torch.allclose(f_(x.clone()), f(x), rtol=1e-9, atol=0) else None


# ---- Tiles ------------------------------------------------------------------


def one_pass(f_: Callable, decays: bool) -> Callable | None:
    """The compiled tile for f_; None if there is none."""
    function, n = (f_.func, f_.keywords) if isinstance(f_, partial) else (f_, {})
    return compiled_tile(**n, decays=decays) if function in (exp_, gaussian_poly_) else None


def tile_size(B: int, nh: int, T: int, hs: int, device: torch.device) -> tuple[int, int]:
    """(rows = columns of a tile, heads in a tile at most). Small tiles save arithmetic, as half of
    each tile on the diagonal is wasted. Many heads at once save calls: a tile costs some 15 of
    them, of a few microseconds each. But a tile and its gradient should stay in the cache: at most
    2^17 elements (512 KiB in float32) per thread, measured on 2 cores with 2 MiB of L2 each. On a
    GPU, 2^25 elements (not measured)."""
    if device.type != "cpu":
        size, elements = 512, 2**25
    else:
        size = 64 if T <= 512 else 128 if B * nh * hs > 256 else 256
        elements = 2**17 * torch.get_num_threads()
    return size, max(1, elements // size**2)


def slices(length: int, at_most: int) -> list[slice]:
    """Slices of range(length), of equal size where possible, of at most max(1, `at_most`) each."""
    step = math.ceil(length / math.ceil(length / max(1, at_most)))
    return [slice(i, i + step) for i in range(0, length, step)]


def add_product_(acc: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
    """acc = beta acc + alpha a b, with beta 0 or 1; a and b may be half where acc is float32."""
    if a.dtype == acc.dtype:
        acc.baddbmm_(a, b, alpha=alpha, beta=beta)
    else:  # CUDA only; not addmm, whose accumulator must be half too
        torch.baddbmm(acc, a, b, alpha=alpha, beta=beta, out_dtype=acc.dtype, out=acc)


def multiply_(x: Tensor, masks: list[Tensor]) -> None:
    """x (N, rows, columns) times each mask (heads, rows, columns), the same for every sequence."""
    for mask in masks:
        x.view(-1, *mask.shape).mul_(mask)


def empty_heads_last(like: Tensor) -> Tensor:
    """An uninitialised (B, nh, T, hs) that is (B, T, nh, hs) in memory: its heads can be put side
    by side, as (B, T, C), without a copy."""
    B, nh, T, hs = like.shape
    return like.new_empty(B, T, nh, hs).transpose(1, 2)


class Tiles:
    """What forward and backward share: blocks of q and k, memory, and the weights of a tile."""

    def __init__(
        self, q: Tensor,
        seed: Tensor | None, name: str, divisor: float, dropout: float, reach: Tensor | None,
    ):  # fmt: skip
        score, self.f_ = REGISTERED[name]
        self.distance = score == "distance"
        self.c = 1 / math.sqrt(q.size(3))
        self.keep = 1 - dropout
        self.scale = 1 / (divisor * self.keep)
        B, nh, T, _ = q.shape
        self.size, heads = tile_size(*q.shape, q.device)
        # All heads of some sequences, or some heads of one
        self.groups = list(product(slices(B, heads // nh), slices(nh, heads)))
        # Scores, weights and sums are float32 at least: a distance between half-precision vectors
        # is a small difference of large numbers. On CUDA the factors of a product stay half.
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.narrow = q.dtype if q.is_cuda else self.wide
        compilable = self.distance and self.wide == torch.float32 and q.device.type == "cpu"
        self.tile = one_pass(self.f_, reach is not None) if compilable else None
        self.parts = math.ceil(min(self.size, T) / PART) if self.tile else 1
        self.device, self.memory = q.device, {}
        self.decay, self.first = None, 0  # the first head of the group that this tile needs
        if reach is not None:
            self.decay = TileDecay(reach, T, self.size, self.wide, q.device)
        if dropout:
            # Forward and backward walk the tiles in the same order: same seed, same masks
            self.generator = torch.Generator(q.device).manual_seed(int(seed))

    def empty(self, name: str | tuple, shape: tuple, dtype: torch.dtype) -> Tensor:
        """Memory that every later tile gets for the same `name`, so that it stays in the cache."""
        if (name, shape) not in self.memory:
            self.memory[name, shape] = torch.empty(shape, dtype=dtype, device=self.device)
        return self.memory[name, shape]

    def zeros(self, name: str | tuple, *shape: int) -> Tensor:
        return self.empty(name, shape, self.wide).zero_()

    def rows(self, t: Tensor) -> tuple[Tensor, ...]:
        """(b, h, T, hs) -> blocks of rows, each (b, h, size, hs)."""
        return t.split(self.size, dim=2)

    def blocks(self, name: str, t: Tensor) -> list[Tensor]:
        """(b, h, T, hs) -> blocks of rows to multiply, each (N, size, hs); views where possible."""
        mergeable = 1 in t.shape[:2] or t.stride(0) == t.size(1) * t.stride(1)
        if t.dtype != self.narrow or t.stride(3) != 1 or not mergeable:
            t = self.empty(name, t.shape, self.narrow).copy_(t)
        return [row.flatten(0, 1) for row in self.rows(t)]

    def transposed(self, name: str, row: Tensor) -> Tensor:
        """(b, h, size, hs) -> (N, hs, size), a copy, with which q k^T is a fifth faster."""
        return self.empty(name, row.mT.shape, self.narrow).copy_(row.mT).flatten(0, 1)

    def sum(self, name: str | tuple, row: Tensor) -> Tensor:
        """Memory (N, size, hs) for the sum that is written to `row` in the end: uninitialised, or
        with a decay, where tiles are skipped, zeros."""
        memory = self.empty(name, row.shape, self.wide).flatten(0, 1)
        return memory.zero_() if self.decay else memory

    def reaches(self, i: int, j: int) -> bool:
        """Whether tile (i, j) is to be computed: without a decay always, with one if any head of
        the group reaches so far. Of one sequence, heads before the first that does are left out:
        `near` cuts them off."""
        first = self.decay.first(self.heads, i, j) if self.decay else 0
        self.first = first if first and self.sequences == 1 else 0
        return first is not None

    def near(self, t: Tensor) -> Tensor:
        return t[self.first :] if self.first else t

    def tile_memory(self, name: str, i: int) -> Tensor:
        """Memory for a tile of row block i and of the columns that were taken."""
        return self.near(self.empty(name, (*self.q[i].shape[:2], self.kt.size(2)), self.wide))

    def take_rows(self, q: Tensor, h: slice) -> None:
        """Keep the q (b, h, T, hs) of a group of heads and, for a distance, -c/2 |q|^2."""
        self.heads, self.sequences = h, q.size(0)
        self.q = self.blocks("q", q)
        if self.distance:
            norm = partial(torch.linalg.vector_norm, dim=2, keepdim=True, dtype=self.wide)
            self.q_norm = [norm(q_i).square_().mul_(-self.c / 2) for q_i in self.q]

    def take_columns(self, k_j: Tensor) -> None:
        """Keep a block (b, h, size, hs) of k and, for a distance, -c/2 |k|^2."""
        self.kt = self.transposed("kt", k_j)
        if self.distance:
            square = self.empty("square", self.kt.shape, self.wide)
            torch.square(self.kt.to(self.wide), out=square)
            self.k_norm = square.sum(1, keepdim=True).mul_(-self.c / 2)

    def weights(
        self, i: int, j: int, G: Tensor | None = None, G_row: Tensor = None, G_column: Tensor = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tile (i, j) of A, dropout included, and from G = dy v^T, if given, the gradient of x. For
        a distance, the sums of that gradient over columns and over rows are added to G_row (N,
        size) and to G_column (N, parts, size); the caller adds up the parts."""
        q_i, kt, x = self.near(self.q[i]), self.near(self.kt), self.tile_memory("x", i)
        norms = tuple(map(self.near, (self.q_norm[i], self.k_norm))) if self.distance else ()
        add_norms = self.distance and not self.tile
        if add_norms:
            torch.add(*norms, out=x)
        add_product_(x, q_i, kt, alpha=self.c, beta=float(add_norms))
        masks = []  # factors of A and of G
        if self.keep < 1:
            kept = self.tile_memory("kept", i)
            masks.append(kept.bernoulli_(self.keep, generator=self.generator))
        h = slice(self.heads.start + self.first, self.heads.stop)
        if self.decay and not self.tile:
            masks.append(self.decay.tile(h, i, j, *x.shape[1:]))
        if G is not None:
            multiply_(G, masks)
        if self.tile:
            pointers = (t if t is None else t.data_ptr() for t in (x, G, *norms, G_row, G_column))
            decay = self.decay.pointer(h, i, j) if self.decay else ()
            threads = torch.get_num_threads()
            self.tile(*pointers, *x.shape, self.parts, i == j, threads, *decay)
        else:
            x = self.f_(x, G)
            if i == j:  # zeros are written, not multiplied by, since a hidden score may overflow
                x = x.tril_()
                if G is not None:
                    G.tril_()
        multiply_(x, masks)
        if G is not None:
            G = G.to(self.narrow)
            if self.distance and not self.tile:
                G_row += G.sum(2, dtype=self.wide)
                G_column += G.sum(1, keepdim=True, dtype=self.wide)
        return x.to(self.narrow), G

    def write(self, out: Tensor, total: Tensor, row: Tensor, G_sum: Tensor) -> None:
        """Write the gradient of a block `row` (b, h, size, hs) of q or k to `out`, from the sum of
        products `total` (N, size, hs) and, for a distance, the sum of gradients G_sum (N, size)."""
        total = total.view(out.shape)
        if self.distance:
            G_sum = G_sum.view(*out.shape[:3], 1)
            torch.addcmul(total, row, G_sum, value=-self.c * self.scale, out=out)
        else:
            out.copy_(total)


# ----------------------------------------------------------------------------
# Forward and backward, as operators that torch.compile does not look into

REGISTERED = {}  # name -> (score, f_), since an operator takes strings but no functions


@torch.library.custom_op("pointwise::blockwise", mutates_args=())
def blockwise_forward(
    q: Tensor, k: Tensor, v: Tensor,
    seed: Tensor | None, name: str, divisor: float, dropout: float, reach: Tensor | None,
) -> Tensor:  # fmt: skip
    """y (B, nh, T, hs) as defined at the top of this file."""
    y = empty_heads_last(v)
    with torch.autocast(q.device.type, enabled=False):
        t = Tiles(q, seed, name, divisor, dropout, reach)
        for b, h in t.groups:
            k_rows, y_rows = t.rows(k[b, h]), t.rows(y[b, h])
            t.take_rows(q[b, h], h)
            y_sums = [t.sum(("y", i), y_i) for i, y_i in enumerate(y_rows)]
            for j, v_j in enumerate(t.blocks("v", v[b, h])):
                t.take_columns(k_rows[j])
                later = float(j > 0 or t.decay is not None)  # whether a sum holds something by now
                for i in range(j, len(y_sums)):
                    if not t.reaches(i, j):
                        break
                    A, _ = t.weights(i, j)
                    add_product_(t.near(y_sums[i]), A, t.near(v_j), t.scale, beta=later)
            for y_i, y_sum in zip(y_rows, y_sums, strict=True):
                y_i.copy_(y_sum.view(y_i.shape))
    return y.div_(t.decay.sums) if t.decay else y


@torch.library.custom_op("pointwise::blockwise_backward", mutates_args=())
def blockwise_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor,
    seed: Tensor | None, name: str, divisor: float, dropout: float, reach: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv (B, nh, T, hs) as defined at the top of this file."""
    dq, dk, dv = map(empty_heads_last, (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        t = Tiles(q, seed, name, divisor, dropout, reach)
        alpha, dy = t.c * t.scale, (dy / t.decay.sums).to(q.dtype) if t.decay else dy
        for b, h in t.groups:
            q_rows, k_rows, v_rows = t.rows(q[b, h]), t.rows(k[b, h]), t.rows(v[b, h])
            dq_rows, dk_rows, dv_rows = t.rows(dq[b, h]), t.rows(dk[b, h]), t.rows(dv[b, h])
            k_blocks, dy_blocks = t.blocks("k", k[b, h]), t.blocks("dy", dy[b, h])
            t.take_rows(q[b, h], h)
            dq_sums = [t.sum(("dq", i), dq_i) for i, dq_i in enumerate(dq_rows)]
            G_rows = [t.zeros(("G_row", i), *q_i.shape[:2]) for i, q_i in enumerate(t.q)]
            for j, k_j in enumerate(k_blocks):
                t.take_columns(k_rows[j])
                vt_j = t.transposed("vt", v_rows[j])
                dk_sum, dv_sum = t.sum("dk", dk_rows[j]), t.sum("dv", dv_rows[j])
                later = float(j > 0 or t.decay is not None)
                G_column = t.zeros("G_column", t.kt.size(0), t.parts, t.kt.size(2))
                for i in range(j, len(dq_rows)):
                    if not t.reaches(i, j):
                        break
                    q_i, dy_i = t.near(t.q[i]), t.near(dy_blocks[i])
                    G = t.tile_memory("G", i)
                    add_product_(G, dy_i, t.near(vt_j), beta=0.0)
                    A, G = t.weights(i, j, G, t.near(G_rows[i]), t.near(G_column))
                    add_product_(t.near(dv_sum), A.mT, dy_i, t.scale, beta=float(i > j))
                    add_product_(t.near(dk_sum), G.mT, q_i, alpha, beta=float(i > j))
                    add_product_(t.near(dq_sums[i]), G, t.near(k_j), alpha, beta=later)
                dv_rows[j].copy_(dv_sum.view(dv_rows[j].shape))
                t.write(dk_rows[j], dk_sum, k_rows[j], G_column.sum(1))
            for dq_i, dq_sum, q_i, G_row in zip(dq_rows, dq_sums, q_rows, G_rows, strict=True):
                t.write(dq_i, dq_sum, q_i, G_row)
    return dq, dk, dv


@blockwise_forward.register_fake
def _(q, k, v, seed, name, divisor, dropout, reach):
    return empty_heads_last(v)


@blockwise_backward.register_fake
def _(dy, q, k, v, seed, name, divisor, dropout, reach):
    return empty_heads_last(q), empty_heads_last(k), empty_heads_last(v)


def _save_for_backward(ctx, inputs, output):
    q, k, v, seed, *ctx.settings, reach = inputs
    ctx.save_for_backward(q, k, v, seed, reach)


def _backward(ctx, dy):
    *tensors, reach = ctx.saved_tensors
    return *blockwise_backward(dy, *tensors, *ctx.settings, reach), *[None] * 5


blockwise_forward.register_autograd(_backward, setup_context=_save_for_backward)


def attention(name: str, variant, divisor: float) -> Callable[..., Tensor]:
    """The attention `name` ('GKpoly-8', ...), whose registry entry is `variant`. Returns a callable
    (q, k, v, dropout=0.0, reach=None, sums=False) -> y for q, k, v (B, nh, T, hs) of one dtype and
    any strides, and with a public decay the reach of each head, (nh,). v may be wider or narrower
    than q and k. y has the shape of v, with its heads last in memory; dropout is of weights. With
    `sums` the result is y and the row sums of A, (B, nh, T), as precise as y. A later call with
    the same name and another entry changes what the earlier callables compute."""
    f_ = hand_written(name, variant.f) or partial(by_autograd_, f=variant.f)
    REGISTERED[name] = variant.score, f_

    def by_tiles(q: Tensor, k: Tensor, v: Tensor, dropout: float, reach: Tensor | None) -> Tensor:
        # The seed comes from torch's own generator, so that a seed and a checkpoint reproduce it
        seed = torch.randint(2**62, (), device="cpu") if dropout else None
        return blockwise_forward(q, k, v, seed, name, divisor, dropout, reach)

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, reach=None, sums=False):
        if sums:  # a column of ones
            both = attend(q, k, F.pad(v, (0, 1), value=1.0), dropout, reach)
            return both[..., :-1], both[..., -1].to(torch.promote_types(v.dtype, torch.float32))
        learned = reach is not None and reach.requires_grad
        return (with_gradient_of_reach(by_tiles) if learned else by_tiles)(q, k, v, dropout, reach)

    return attend
