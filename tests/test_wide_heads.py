"""
The Triton kernels for wide heads against the plain formula in float64; as in test_triton_kernels.py
through the interpreter in a process of its own, compiled for sm_90, and on a CUDA device.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (there is none for macOS, Windows)")
import test_triton_kernels as narrow  # noqa: E402, for the script: also puts the root on sys.path
from test_triton_kernels import DTYPES, NAMES, TOLERANCE, compiles, error, inputs, plain, same

import model  # noqa: E402
from kernels import choice, triton_kernels, tuning, wide_heads  # noqa: E402

# B, nh, T, hs; several blocks in each direction, not all of them filled
SMALL = (1, 2, 77, 264)
SHAPES = [(2, 1, 1, 272), (1, 1, 200, 320), (1, 2, 33, 768), (1, 1, 256, 384)]
REACHES = (0.75, 11.0, 32.0)  # some leave tiles out; the shortest is the shortest there is


def run(*args, **options):
    return narrow.run(*args, attend=wide_heads.wide_attention, **options)


def error_of(name, dtype, shape, device="cpu", reach=None, offset=0.0, sums=False) -> float:
    """The largest relative error of y, of the row sums and of every gradient. That of the reach, a
    sum that cancels, has a tenth of the others' exact digits."""
    x, last = inputs(shape, dtype, device, offset), 5 if sums else 4
    got, want = (f(*x, name, reach=reach, sums=sums) for f in (run, plain))
    return max(error(got[:last], want[:last]), error(got[last:], want[last:]) / 10)


def decay_error(name, dtype, T, device="cpu", sums=False) -> float:
    reach = torch.tensor(REACHES, device=device)
    return error_of(name, dtype, (1, 3, T, 264), device, reach, sums=sums)


def overflow_error(dtype, device="cpu") -> float:
    """With the last key so far from all queries but the last that GKpoly-8 overflows above the
    diagonal, and for the zero rows that fill the last block."""
    q, k, v, dy = inputs(SMALL, dtype, device)
    far = 10 * torch.sign(k[:, :, -1])
    k[:, :, -1] += far
    q[:, :, -1] += far / 2
    A = model.gaussian_poly(model.scores(q.float(), k.float(), "distance"), 8)
    assert A[:, :, :-1, -1].isinf().all() and A.tril().isfinite().all()
    return error(run(q, k, v, dy, "GKpoly-8"), plain(q, k, v, dy, "GKpoly-8"))


def layouts_agree(name, dtype, shape=SMALL, device="cpu") -> bool:
    """Views of c_attn's output, and q, k, v with other strides each."""
    q, k, v, dy = inputs(shape, dtype, device)
    other = q, k.contiguous(), v.mT.contiguous().mT, dy.mT.contiguous().mT
    return same(run(q, k, v, dy, name), run(*other, name))


def chunks_agree(name, dtype, shape=(2, 2, 130, 16), device="cpu") -> bool:
    """One head at a time, and all at once; every second head sees hardly anything."""
    x, reach = inputs(shape, dtype, device), torch.tensor([32.0, 0.75], device=device)
    at_once, limit = run(*x, name, reach=reach, sums=True), wide_heads.MAX_WEIGHTS
    wide_heads.MAX_WEIGHTS = 1
    in_chunks, wide_heads.MAX_WEIGHTS = run(*x, name, reach=reach, sums=True), limit
    return same(at_once, in_chunks)


def future_is_hidden(name, dtype, shape=SMALL, device="cpu") -> bool:
    """New keys and values from position T/2 on leave y before it alone, bit for bit; new queries
    and dy before T/2 leave dk and dv from there on alone."""
    (q, k, v, dy), half = inputs(shape, dtype, device), shape[2] // 2
    y, _, dk, dv = run(q, k, v, dy, name)
    late = torch.arange(shape[2], device=device)[:, None] >= half
    y2 = run(q, torch.where(late, -3 * k, k), torch.where(late, v + 100, v), dy, name)[0]
    early = torch.where(late, q, -3 * q), k, v, torch.where(late, dy, dy + 100)
    _, _, dk2, dv2 = run(*early, name)
    one = y[:, :, :half], dk[:, :, half:], dv[:, :, half:]
    return same(one, (y2[:, :, :half], dk2[:, :, half:], dv2[:, :, half:]))


def opcheck(device="cpu") -> None:
    """torch.library's own tests of the operators, and a compiled run without a graph break."""
    x = inputs((1, 2, 7, 264), torch.float32, device)
    q, k, v = (t.detach().requires_grad_() for t in x[:3])
    for reach in (None, torch.tensor([3.0, 8.0], device=device)):
        args = q, k, v, "GK", 4.0, *triton_kernels._decay(reach, q), reach is None
        torch.library.opcheck(torch.ops.triton_attention.wide_forward, args)
    attend = torch.compile(wide_heads.wide_attention, fullgraph=True, backend="aot_eager")
    assert same(narrow.run(*x, "GK", attend), run(*x, "GK"))


# ----------------------------------------------------------------------------
# Through the interpreter


def interpret(dtype_name: str, all_cases: bool) -> dict:
    """The measurements of one dtype: some on small shapes and blocks, or all."""
    dtype = DTYPES[dtype_name]
    if not all_cases:
        opcheck()
        # The interpreter takes as long for a small block as for a large one
        wide_heads.FLOAT32 = wide_heads.FLOAT32._replace(BLOCK_K=64, BLOCK_D=512)
    names, decaying = ["GK", "GKpoly-4", "PA_gelu"], ["GK"]
    if all_cases:
        names, decaying = NAMES, names
    errors = {name: error_of(name, dtype, SMALL) for name in names}
    errors |= {f"{name}, decay": decay_error(name, dtype, 150) for name in decaying}
    errors |= {"decay and sums": decay_error("GK", dtype, 150, sums=True)}
    errors |= {"far from 0": error_of("GK", dtype, SMALL, offset=8.0)}
    errors |= {"overflow": overflow_error(dtype)}
    if all_cases:
        errors |= {str(shape): error_of("GK", dtype, shape) for shape in SHAPES}
    promises = {"layouts": layouts_agree, "chunks": chunks_agree, "future": future_is_hidden}
    return {"errors": errors} | {key: holds("GK", dtype) for key, holds in promises.items()}


@pytest.mark.parametrize(
    "dtype, cases",
    [("float32", "small")]
    + [pytest.param(dtype, "all", marks=pytest.mark.slow) for dtype in ("float32", "float16")],
)
def test_interpreted_kernels_compute_the_plain_formula(dtype, cases):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, dtype, cases]
    done = subprocess.run(
        command, cwd=narrow.ROOT, env=environment, capture_output=True, text=True, timeout=3600
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of Triton 3.6 does not work with NumPy 2.4 and later")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert not {case: e for case, e in measured["errors"].items() if not e <= TOLERANCE[dtype]}
    for promise in ("layouts", "chunks", "future"):  # strides, memory, causality: bit for bit
        assert measured[promise], promise


# ----------------------------------------------------------------------------
# Where it runs


def test_auto_takes_the_kernels_for_half_precision_and_beyond_the_formulas_memory(monkeypatch):
    half, single = ((768, dtype, "cuda", 0.0) for dtype in (torch.bfloat16, torch.float32))
    assert wide_heads.refusal("PA_mine", *half[:3]) == "PA_mine has no Triton kernel"
    assert "float64" in wide_heads.refusal("GK", 768, torch.float64, "cuda")
    monkeypatch.setattr(wide_heads, "refusal", lambda *_: None)
    assert choice.triton_module(256) is triton_kernels and choice.triton_module(257) is wide_heads
    assert model.choose("auto", "GK", *half) == "triton"
    assert model.choose("auto", "GK", *half, small=False) == "triton"
    assert model.choose("auto", "GK", *single) == "reference"
    assert model.choose("auto", "GK", *single, small=False) == "triton"


def test_attention_hands_wide_heads_to_these_kernels(monkeypatch):
    monkeypatch.setattr(model, "choose", lambda *_: "triton")
    monkeypatch.setattr(wide_heads, "attention", lambda name, divisor: lambda *_: (name, divisor))
    q = torch.zeros(1, 1, 2, 257)
    assert model.attention("PA_relu", 16)(q, q, q) == ("PA_relu", 16.0)


# ----------------------------------------------------------------------------
# Compiled for sm_90, without a GPU


class Recorder:
    """Stands for a kernel, and keeps what it is started with."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def launches(monkeypatch, name, shape=(4, 1, 1024, 768), dtype=torch.bfloat16, reach=None):
    """What a forward and a backward pass start: (kernel, arguments, options) each."""
    started = []
    with monkeypatch.context() as patch:
        patch.setattr(triton_kernels, "refusal", lambda *_: None)
        for kernel in ("norm_kernel", "weights_kernel", "gradients_kernel", "product_kernel"):
            patch.setattr(wide_heads, kernel, Recorder(getattr(wide_heads, kernel), started))
        run(*inputs(shape, dtype), name, reach=reach)
    return started


def compile_for_hopper(kernel, args: tuple, options: dict):
    """A kernel started so, and what it uses."""
    with tuning.for_hopper():
        compiled = kernel.warmup(*args, grid=(1,), **options)
        return compiled, tuning.usage(compiled)


def distinct(started: list) -> dict[str, tuple]:
    """The launches that Triton compiles apart, by the kernel's name and flags."""
    flags = lambda options: [key for key, on in options.items() if on is True and key.isupper()]
    return {" ".join([k.__name__, *flags(o)]): (k, a, o) for k, a, o in started}


@compiles
def test_compiled_for_hopper(monkeypatch):
    kernels = distinct(launches(monkeypatch, "PA_relu"))
    assert kernels.keys() == {
        "weights_kernel", "gradients_kernel", "product_kernel", "product_kernel TRANSPOSED"
    }  # fmt: skip
    check(kernels["gradients_kernel"])


def check(launch: tuple, stack=32, registers=255) -> None:
    compiled, used = compile_for_hopper(*launch)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert not used.serialised
    assert used.stack <= stack and used.registers <= registers
    assert used.shared <= 99 * 2**10  # what consumer GPUs have, too


@compiles
@pytest.mark.parametrize(
    "name",
    [pytest.param("GK", marks=pytest.mark.slow)]
    + [pytest.param(name, marks=pytest.mark.exhaustive) for name in (*NAMES, "GKpoly-16")],
)
def test_every_kernel_compiles_for_hopper_without_serial_products_or_spills(monkeypatch, name):
    for key, launch in distinct(launches(monkeypatch, name)).items():
        if key.startswith("norm_kernel"):
            assert compile_for_hopper(*launch)[1].stack == 0
        else:  # two programs of a product share a multiprocessor
            stack = 256 if name == "PA_softplus" else 32  # outside the loops
            check(launch, stack, registers=128 if key.startswith("product_kernel") else 255)


@compiles
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["GK", "PA_gelu"])
def test_a_decay_ragged_blocks_and_a_single_position_compile_for_hopper(monkeypatch, name):
    reach = torch.tensor([8.0])
    for shape in ((1, 1, 1, 768), (4, 1, 1000, 800)):
        started = distinct(launches(monkeypatch, name, shape, reach=reach))
        assert any("LEARNED" in key for key in started)
        for key, launch in started.items():
            if not key.startswith("norm_kernel"):
                check(launch, stack=400 if "LEARNED" in key else 32)  # outside the loops


@compiles
@pytest.mark.slow
def test_float32_compiles_for_hopper_without_spills(monkeypatch):
    for launch in distinct(launches(monkeypatch, "GK", dtype=torch.float32)).values():
        assert compile_for_hopper(*launch)[1].stack <= 32


# ----------------------------------------------------------------------------
# On a GPU


@narrow.on_gpu
def test_gpu_output_and_gradients_are_those_of_the_plain_formula():
    for shape in [*SHAPES, SMALL, (4, 1, 1024, 768), (1, 2, 1000, 800)]:
        for name in NAMES:
            for dtype, tolerance in TOLERANCE.items():
                worst = error_of(name, DTYPES[dtype], shape, "cuda")
                assert worst <= tolerance, (name, dtype, shape, worst)


@narrow.on_gpu
def test_gpu_decay_and_overflow():
    for dtype, tolerance in TOLERANCE.items():
        for name in NAMES:
            for sums in (False, True):
                worst = decay_error(name, DTYPES[dtype], 1024, "cuda", sums)
                assert worst <= tolerance, (name, dtype, sums)
        assert overflow_error(DTYPES[dtype], "cuda") <= tolerance, dtype


@narrow.on_gpu
def test_gpu_promises():
    opcheck("cuda")
    shape = (2, 2, 1000, 768)
    for dtype in DTYPES.values():
        for name in ("GK", "GKpoly-8", "PA_gelu"):
            for holds in (layouts_agree, chunks_agree, future_is_hidden):
                assert holds(name, dtype, shape, "cuda"), (holds.__name__, name, dtype)
            x = inputs(shape, dtype, "cuda")
            assert same(run(*x, name), run(*x, name)), (name, dtype)
            attend = torch.compile(wide_heads.wide_attention, fullgraph=True)
            assert same(narrow.run(*x, name, attend), run(*x, name)), (name, dtype)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(interpret(sys.argv[1], all_cases=sys.argv[2] == "all")))
