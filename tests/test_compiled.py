"""compiled.py and tile.c: the compiled tile does what torch's operations do, or is not used."""

import math
import shutil
import sys

import pytest
import torch
from test_blockwise import NAMES, SHAPES, assert_close, attention, inputs, oracle, run

from kernels import blockwise
from model import POINTWISE, parse_attn_type

needs_c_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None or sys.platform != "linux", reason="GCC is not installed"
)


def tile(n, x, g=None, diagonal=False, threads=2, q_norm=0.0, k_norm=0.0):
    """tile.c's tile of x (N, rows, columns): A, the gradient of x, its sums over the others."""
    N, rows, columns = x.shape
    parts = math.ceil(rows / blockwise.PART)
    x, g = x.clone(), None if g is None else g.clone()
    q_norm, k_norm = torch.full((N, rows), q_norm), torch.full((N, columns), k_norm)
    g_rows, g_columns = torch.zeros(N, rows), torch.zeros(N, parts, columns)
    pointers = [t if t is None else t.data_ptr() for t in (x, g, q_norm, k_norm, g_rows, g_columns)]
    blockwise.compiled_tile(n)(*pointers, *x.shape, parts, diagonal, threads)
    return x, g, g_rows, g_columns.sum(1)


@needs_c_compiler
@pytest.mark.parametrize("name", ["GK", "GKpoly-1", "GKpoly-4", "GKpoly-8", "GKpoly-16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_tile_c_does_what_torchs_operations_do(name, dropout, monkeypatch):
    for shape in [(2, 3, 7, 16), (1, 1, 150, 64)]:
        case = inputs(*shape, torch.float32)
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            results.append(run(attention(name), *case, dropout=dropout))
            monkeypatch.setattr(blockwise, "compiled_tile", lambda *_, **__: None)
        monkeypatch.undo()
        assert not torch.equal(results[0][0], results[1][0])  # they are two ways, then
        assert_close(results[0], [t.double() for t in results[1]], 5e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("GK")])
def test_without_a_compiler_it_is_as_right(name, monkeypatch):
    monkeypatch.setattr(blockwise, "compiled_tile", lambda *_, **__: None)
    for shape in SHAPES:
        case = inputs(*shape, torch.float32)
        assert_close(run(attention(name), *case), oracle(parse_attn_type(name), *case), 5e-6)


@needs_c_compiler
def test_exp_is_right_wherever_float32_is():
    x = torch.cat([torch.linspace(-87, 88, 10001), torch.tensor([-0.0, 1e-30])])[None, None]
    A, slope, _, _ = tile(None, x, torch.ones_like(x))
    torch.testing.assert_close(A.double(), x.double().exp(), rtol=1e-7, atol=0)
    assert torch.equal(A, slope)
    x = torch.tensor([[[-math.inf, -1e30, -88, 100, 1e30, math.inf, math.nan]]])
    zero, inf = [0.0] * 3, [math.inf] * 3
    torch.testing.assert_close(
        tile(None, x)[0][0, 0], torch.tensor([*zero, *inf, math.nan]), equal_nan=True
    )


@needs_c_compiler
@pytest.mark.parametrize("n", [None, 8])
@pytest.mark.parametrize("rows, columns", [(1, 1), (31, 5), (33, 64), (100, 100)])
def test_a_tile_adds_norms_hides_the_future_and_sums(n, rows, columns):
    torch.manual_seed(0)
    x, g = -torch.rand(3, rows, columns), torch.randn(3, rows, columns)
    A, dx, over_columns, over_rows = tile(n, x, g, rows == columns, q_norm=-1.0, k_norm=-0.5)
    f = POINTWISE["GK"].f if n is None else parse_attn_type(f"GKpoly-{n}").f
    exact = (x.double() - 1.5).requires_grad_()
    want = f(exact).tril() if rows == columns else f(exact)
    (want_dx,) = torch.autograd.grad(want, exact, g.double())
    sums = want_dx.sum(2), want_dx.sum(1)
    for got, right in zip((A, dx, over_columns, over_rows), (want, want_dx, *sums), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)
    forward, _, _, _ = tile(n, x, None, rows == columns, q_norm=-1.0, k_norm=-0.5)
    assert torch.equal(forward, A)
    for threads in (1, 3):
        again = tile(n, x, g, rows == columns, threads, q_norm=-1.0, k_norm=-0.5)
        assert all(map(torch.equal, again, (A, dx, over_columns, over_rows)))


@pytest.mark.parametrize(
    "CC", ["/nowhere/cc", "false", "cc --no-such-flag", "cc 'x", "cc -fvisibility=hidden -Dtile=t"]
)
def test_a_compiler_that_fails_is_done_without(CC, monkeypatch):
    monkeypatch.setenv("CC", CC)
    assert blockwise.compiled_tile.__wrapped__() is None


@needs_c_compiler
@pytest.mark.parametrize("CC", ["", "cc -ffast-math"])
def test_an_empty_CC_is_cc_and_fast_math_is_switched_off(CC, monkeypatch):
    monkeypatch.setenv("CC", CC)
    assert blockwise.compiled_tile.__wrapped__() is not None
    assert torch.tensor(1e-40) * 1 != 0  # nobody flushes this process's subnormal numbers


@needs_c_compiler
def test_what_was_compiled_wrongly_is_not_used(monkeypatch):
    monkeypatch.setenv("CC", "cc -Dfloat=int")
    assert blockwise.compiled_tile.__wrapped__(8) is None
