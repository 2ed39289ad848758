"""blockwise.py: the blockwise path against the plain formula of model.py in float64."""

import math

import pytest
import torch
from conftest import EVERY_ATTN_TYPE
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import blockwise
from model import POINTWISE, Pointwise, parse_attn_type, pointwise_attention

NAMES = [name for name in EVERY_ATTN_TYPE if name != "SM"]
# B, nh, T, hs: 1 to 3 tiles per row, ragged and whole; head sizes from 16 to 768
SHAPES = [
    (2, 3, 1, 16),
    (2, 2, 7, 64),
    (1, 1, 33, 768),
    (2, 3, 77, 80),
    (2, 1, 128, 128),
    (1, 2, 300, 64),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DIVISOR = 7.0
user_f = lambda x: torch.sin(x) / (1 + x.square())  # nobody wrote its derivative by hand


def inputs(B, nh, T, hs, dtype=torch.float64, offset=0.0):
    """q, k, v as the model has them, views of one (B, T, 3, nh, hs), and dy."""
    torch.manual_seed(T * hs)
    qkv = torch.randn(B, T, 3, nh, hs, dtype=torch.float64)
    qkv[:, :, :2] += offset / math.sqrt(hs)
    qkv = qkv.to(dtype)
    q, k, v = (t.detach().requires_grad_() for t in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    return q, k, v, torch.randn(B, nh, T, hs, dtype=torch.float64).to(dtype)


def run(attend, q, k, v, dy, **kwargs):
    """y, dq, dk, dv."""
    y = attend(q, k, v, **kwargs)
    return y, *torch.autograd.grad(y, (q, k, v), dy)


def oracle(variant, q, k, v, dy):
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    return run(pointwise_attention, q, k, v, dy.double(), variant=variant, divisor=DIVISOR)


def assert_close(got, want, tolerance):
    for what, a, b in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        assert a.shape == b.shape
        if b.norm() == 0:  # e.g. the gradient of exp(-|q - k|^2) where q = k
            assert a.norm() == 0, what
        else:
            error = ((a.double() - b).norm() / b.norm()).item()
            assert error <= tolerance, f"{what}: relative error {error:.1e} > {tolerance:.0e}"


def attention(name, divisor=DIVISOR):
    return blockwise.attention(name, parse_attn_type(name), divisor)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles and several groups of heads from small inputs."""
    monkeypatch.setattr(blockwise, "tile_size", lambda *shape: (4, 2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_output_and_gradients_are_those_of_the_plain_formula(name, dtype):
    for shape in SHAPES:
        case = inputs(*shape, dtype)
        want = oracle(parse_attn_type(name), *case)
        assert_close(run(attention(name), *case), want, TOLERANCE[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_far_from_the_origin_too(name):
    """|q| and |k| about 8: their distances are small differences of large numbers."""
    # float64 at 1e-10: tanh is saturated there, and torch's 1 - tanh^2 in the oracle loses 6 digits
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 5e-6)):
        case = inputs(2, 2, 77, 16, dtype, offset=8.0)
        want = oracle(parse_attn_type(name), *case)
        assert_close(run(attention(name), *case), want, tolerance)


@pytest.mark.parametrize("name", ["GK", "GKpoly-8", "PA_gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(name, dtype):
    case = inputs(2, 2, 77, 64, dtype)
    with torch.autocast("cpu", torch.bfloat16):  # it must not reach inside
        got = run(attention(name), *case)
    assert got[0].dtype == dtype
    assert_close(got, oracle(parse_attn_type(name), *case), TOLERANCE[dtype])


@pytest.mark.parametrize("B, nh", [(1, 5), (3, 2), (5, 3)])
@pytest.mark.parametrize("heads", [1, 4, 100])
def test_every_grouping_of_heads_into_tiles_gives_the_same(B, nh, heads, monkeypatch):
    monkeypatch.setattr(blockwise, "tile_size", lambda *shape: (4, heads))
    case = inputs(B, nh, 10, 8)
    assert_close(run(attention("GK"), *case), oracle(POINTWISE["GK"], *case), 1e-12)


def test_any_strides_are_taken(small_tiles):
    q, k, v, _ = inputs(2, 3, 9, 8)
    q, k = q.detach().contiguous(), k.detach().mT.contiguous().mT
    q, k = q.requires_grad_(), k.requires_grad_()
    case = q, k, v, torch.ones(()).double().expand(2, 3, 9, 8)  # as from y.sum().backward()
    assert_close(run(attention("GK"), *case), oracle(POINTWISE["GK"], *case), 1e-12)


def test_the_heads_of_the_output_lie_side_by_side():
    y = attention("GK")(*inputs(2, 3, 5, 8)[:3])
    assert y.transpose(1, 2).reshape(2, 5, 24).data_ptr() == y.data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_is_bit_identical(name):
    case = inputs(2, 3, 150, 16, torch.float32)
    first, second = run(attention(name), *case), run(attention(name), *case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_future_key_and_value_change_nothing_bit_for_bit(name):
    q, k, v, _ = (t.detach() for t in inputs(2, 2, 150, 16, torch.float32))
    before = attention(name)(q, k, v)
    for t in (5, 70, 149):  # within a tile, in a later tile, the last one
        changed = k.clone(), v.clone()
        for x in changed:
            x[:, :, t:] = 9.0
        after = attention(name)(q, *changed)
        assert torch.equal(before[:, :, :t], after[:, :, :t])
        assert not torch.equal(before[:, :, t], after[:, :, t])


@pytest.mark.parametrize("name", ["GKpoly-8", "PA_square", "PA_relu-square"])
def test_an_overflow_above_the_diagonal_poisons_nothing(name):
    q, k, v, dy = inputs(1, 1, 6, 16, torch.float32)
    with torch.no_grad():
        # only the last query, which is zero, sees the last key: |k|^2 and (q.k)^2 are infinite
        k[:, :, -1], q[:, :, -1] = 1e19, 0.0
        dy[:, :, -1] = 0.0
    got = run(attention(name), q, k, v, dy)
    assert all(t[:, :, :-1].isfinite().all() for t in got)
    cut = [t[:, :, :-1].detach().requires_grad_() for t in (q, k, v)]
    want = oracle(parse_attn_type(name), *cut, dy[:, :, :-1])
    assert_close([t[:, :, :-1] for t in got], want, 5e-6)


@pytest.mark.parametrize("n", [1, 4, 8, 12, 16])
def test_squarings_keep_float32_accurate_however_many(n):
    """Where 1 + x / 2^n is rounded first, as in the plain formula, n = 16 has 2 digits left."""
    case = inputs(1, 2, 40, 16, torch.float32)
    want = oracle(parse_attn_type(f"GKpoly-{n}"), *case)
    assert_close(run(attention(f"GKpoly-{n}"), *case), want, 5e-6)


def test_polynomials_are_right_where_they_no_longer_follow_exp():
    """Below x = -2^n, where 1 + x / 2^n is negative; at x = -2^n, where it is 0."""
    x = torch.tensor([-100.0, -17, -16, -15, 0], dtype=torch.float64, requires_grad=True)
    y = parse_attn_type("GKpoly-4").f(x)
    (want,) = torch.autograd.grad(y.sum(), x)
    g = torch.ones_like(x)
    got = blockwise.gaussian_poly_(x.detach().clone(), g, n=4)
    torch.testing.assert_close(got, y.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(g, want, rtol=1e-12, atol=0)


# ----------------------------------------------------------------------------
# Variants that the user adds or changes


@pytest.mark.parametrize("score", ["dot", "distance"])
def test_a_variant_without_a_derivative_by_hand_gets_it_from_autograd(score, small_tiles):
    variant = Pointwise(score, user_f, by_length=True)
    attend = blockwise.attention("PA_mine", variant, DIVISOR)
    case = inputs(2, 3, 10, 8)
    assert_close(run(attend, *case), oracle(variant, *case), 1e-12)


def test_an_f_without_a_derivative_lets_the_values_learn(small_tiles):
    step = Pointwise("dot", lambda x: (x > 0).to(x.dtype))
    case = inputs(1, 2, 10, 8)
    _, dq, dk, dv = run(blockwise.attention("PA_step", step, DIVISOR), *case)
    assert not dq.any() and not dk.any() and dv.any()


@pytest.mark.parametrize("name", blockwise.HAND_WRITTEN)
def test_a_derivative_by_hand_is_used_while_the_registry_has_that_formula(name):
    name = name.replace("-n", "-8")
    assert blockwise.hand_written(name, parse_attn_type(name).f)


@pytest.mark.parametrize(
    "name, f",
    [("PA_relu", F.relu6), ("GK", lambda x: x.clamp(min=-20).exp()), ("GKpoly-4", torch.exp)],
)
def test_a_formula_that_differs_only_far_away_is_another_one(name, f):
    assert blockwise.hand_written(name, f) is None


def test_an_edited_registry_entry_is_what_runs():
    """Not what was written by hand for the formula that had that name before."""
    variant = Pointwise("dot", lambda x: F.gelu(x, approximate="tanh"), by_length=True)
    case = inputs(1, 2, 10, 8)
    got = run(blockwise.attention("PA_gelu", variant, DIVISOR), *case)
    assert_close(got, oracle(variant, *case), 1e-12)


# ----------------------------------------------------------------------------
# Dropout


def test_dropout_zeroes_weights_and_scales_the_rest(small_tiles):
    """With v the identity, y is the matrix A itself."""
    q, k, _, _ = inputs(1, 1, 64, 64)
    attend = attention("GK")
    A = attend(q, k, torch.eye(64).double()[None, None])
    dropped = attend(q, k, torch.eye(64).double()[None, None], dropout=0.25)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], A[kept] / 0.75)
    lower = torch.ones(64, 64, dtype=torch.bool).tril()
    assert not kept[..., ~lower].any()
    assert abs(kept[..., lower].double().mean() - 0.75) < 0.05


@pytest.mark.parametrize("name", ["GKpoly-4", "PA_gelu"])
def test_backward_drops_what_forward_dropped(name, small_tiles):
    """The gradient by finite differences, under one seed."""
    attend = attention(name, 1.0)

    def seeded(q, k, v):
        torch.manual_seed(0)
        return attend(q, k, v, dropout=0.4)

    assert torch.autograd.gradcheck(seeded, inputs(1, 3, 6, 4)[:3], fast_mode=True)


def test_dropout_follows_torchs_seed():
    q, k, v, _ = inputs(1, 2, 50, 16)
    attend = attention("GK")
    torch.manual_seed(1)
    first, second = attend(q, k, v, dropout=0.5), attend(q, k, v, dropout=0.5)
    torch.manual_seed(1)
    again = attend(q, k, v, dropout=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


# ----------------------------------------------------------------------------
# torch: autograd, torch.library, torch.compile, memory


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(name, small_tiles):
    assert torch.autograd.gradcheck(attention(name, 1.0), inputs(1, 2, 5, 3)[:3], fast_mode=True)


@pytest.mark.parametrize(
    "variant, dropout", [(POINTWISE["GK"], 0.3), (Pointwise("dot", user_f), 0.0)]
)
def test_torch_library_accepts_the_operators(variant, dropout, small_tiles):
    blockwise.attention("PA_checked", variant, 1.0)
    q, k, v, dy = inputs(2, 3, 6, 4)
    args = torch.tensor(5) if dropout else None, "PA_checked", 1.0, dropout, None
    torch.library.opcheck(blockwise.blockwise_forward, (q, k, v, *args))
    q, k, v = q.detach(), k.detach(), v.detach()
    torch.library.opcheck(blockwise.blockwise_backward, (dy, q, k, v, *args))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_torch_compile_finds_no_graph_break_and_the_same_result(dropout):
    attend = attention("GK")

    def attention_layer(q, k, v, dropout):
        y = attend(q, k, v, dropout)
        return y.transpose(1, 2).flatten(2) * 2

    case = *inputs(2, 2, 10, 8)[:3], dropout
    results = []
    compiled_layer = torch.compile(attention_layer, fullgraph=True, backend="aot_eager")
    for layer in (attention_layer, compiled_layer):
        torch.manual_seed(0)
        y = layer(*case)
        results.append((y, *torch.autograd.grad(y.square().sum(), case[:3])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any tensor made under it has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("name", ["GK", "PA_gelu", "PA_sigmoid"])
def test_memory_grows_with_T_not_with_its_square(name, monkeypatch):
    size, hs = 16, 4
    monkeypatch.setattr(blockwise, "tile_size", lambda *shape: (size, 1))
    args = None, name, DIVISOR, 0.0, None
    attention(name)
    for T in (64, 128):
        q, k, v, dy = (t.detach() for t in inputs(1, 1, T, hs, torch.float32))
        # the bodies of the operators: a mode does not look into an operator
        with LargestTensor() as largest:
            blockwise.blockwise_forward._init_fn(q, k, v, *args)
            blockwise.blockwise_backward._init_fn(dy, q, k, v, *args)
        assert largest.numel == T * hs
    total = sum(t.numel() for t in tile_memory(name, 128, hs))
    assert total < 3 * sum(t.numel() for t in tile_memory(name, 64, hs))


def tile_memory(name, T, hs):
    """What a forward and a backward keep for their tiles."""
    seen = []
    init = blockwise.Tiles.__init__

    def remember(self, *args):
        init(self, *args)
        seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise.Tiles, "__init__", remember)
        run(attention(name), *inputs(1, 1, T, hs, torch.float32))
    return [t for tiles in seen for t in tiles.memory.values()]


def test_the_tile_size_fills_the_cache_and_not_more():
    for B, nh, T, hs in [(1, 12, 1024, 64), (4, 1, 1024, 768), (16, 6, 256, 64), (1, 1, 16384, 64)]:
        size, heads = blockwise.tile_size(B, nh, T, hs, torch.device("cpu"))
        assert heads >= 1
        assert size**2 * heads <= max(size**2, 2**17 * torch.get_num_threads())
        assert size <= T / 4
