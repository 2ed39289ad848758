"""
The Triton kernels against the plain formula in float64.

- through Triton's interpreter, on CPU tensors. TRITON_INTERPRET must be set before triton is
  imported, and another test may have imported it by now: so this file runs itself as a script,
  which prints its measurements as JSON. The whole matrix of cases is marked `slow`.
- compiled for sm_90 (Hopper), which takes no GPU: tensor-core instructions, registers, spills.
- marked `gpu`: on a CUDA device.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for the script; under pytest it is there already

import model  # noqa: E402

triton = pytest.importorskip("triton", reason="there is no triton for macOS and Windows")
import triton.language as tl  # noqa: E402

from kernels import triton_kernels, tuning  # noqa: E402
from kernels.blockwise import HAND_WRITTEN  # noqa: E402

NAMES = [name for name in triton_kernels.FORMS if not name.endswith("-n")] + [
    "GKpoly-4",
    "GKpoly-8",
]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 5e-6, "float16": 1e-2, "bfloat16": 1e-2}  # relative, Frobenius
SHAPES = [  # B, nh, T, hs; together: every T, every hs, T and hs that don't fill their blocks
    (2, 2, 1, 16),
    (2, 2, 7, 64),
    (1, 2, 33, 80),
    (1, 2, 77, 128),
    (1, 2, 128, 64),
]
LONG = (1, 1, 300, 64)
SMALL = (1, 1, 37, 24)  # several blocks, not all of them filled
DIVISOR = 4.0


# ----------------------------------------------------------------------------
# Measurements, on any device


def inputs(shape, dtype, device="cpu", offset=0.0, seed=0):
    """q, k, v (B, nh, T, hs) as views of c_attn's output (B, T, 3, nh, hs), and dy. q and k are
    small, so that exp(x) is not, and moved by one vector of length `offset` in each head."""
    B, nh, T, hs = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, 3, nh, hs, generator=generator)
    qkv[:, :, :2] *= 0.6
    away = torch.randn(nh, hs, generator=generator)
    qkv[:, :, :2] += offset * away / away.norm(dim=-1, keepdim=True)
    dy = torch.randn(B, T, nh, hs, generator=generator)
    qkv, dy = qkv.to(device, dtype), dy.to(device, dtype)
    return *qkv.permute(2, 0, 3, 1, 4).unbind(0), dy.transpose(1, 2)


def run(q, k, v, dy, name, attend=triton_kernels.triton_attention, reach=None, sums=False):
    """y, with `sums` the row sums of A, dq, dk, dv, and the gradient of the reach of a decay."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v, reach) if x is not None]
    y = attend(*inputs[:3], name, DIVISOR, *inputs[3:], **{"sums": True} if sums else {})
    y, dy = (y, (dy, 4 * dy[..., 1].to(y[1].dtype))) if sums else ((y,), (dy,))
    return *(t.detach() for t in y), *torch.autograd.grad(y, inputs, dy)


def plain(q, k, v, dy, name, reach=None, sums=False):
    """The same by the plain formula, in float64."""

    def attend(q, k, v, name, divisor, reach=None, sums=False):
        variant = model.parse_attn_type(name)
        return model.pointwise_attention(q, k, v, variant, divisor, reach=reach, sums=sums)

    return run(*(x.double() for x in (q, k, v, dy)), name, attend, reach, sums)


def error(got, want) -> float:
    """The largest relative error of what `run` gives. Half of the dtype's smallest number per
    element is free: a saturated f has gradients that float16 can't hold."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        quantum = torch.finfo(a.dtype).smallest_normal * torch.finfo(a.dtype).eps / 2
        excess = (a.double() - b).norm().item() - quantum * math.sqrt(b.numel())
        worst = max(worst, excess / max(b.norm().item(), 1e-300)) if math.isfinite(excess) else 1e9
    return worst


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def largest_error(name, dtype, device="cpu", shapes=SHAPES) -> float:
    cases = [(shape, 0.0) for shape in shapes] + [(shapes[-1], 8.0)]
    return max(
        error(run(*x, name), plain(*x, name))
        for x in (inputs(shape, dtype, device, offset) for shape, offset in cases)
    )


def decay_error(
    dtype, device="cpu", names=("GK", "GKpoly-4", "PA_relu"), T=150, sums=False
) -> float:
    """The largest error with a public decay, for reaches short enough to leave blocks out and long
    ones. With the shortest that can be learned, factors of hidden pairs overflow. The gradient of
    the reach, a sum that cancels, has a tenth of the others' exact digits."""
    cases = [((1, 3, T, 16), (0.75, 11.0, 32.0)), ((2, 1, 37, 24), (8.0,))]
    worst = 0.0
    for shape, r in cases:
        x, r = inputs(shape, dtype, device), torch.tensor(r, device=device)
        for name in names:
            got, want = run(*x, name, reach=r, sums=sums), plain(*x, name, reach=r, sums=sums)
            worst = max(worst, error(got[:-1], want[:-1]), error(got[-1:], want[-1:]) / 10)
    return worst


def sums_error(name, dtype, device="cpu", shape=SMALL) -> float:
    """The largest error where the sums of rows are asked for too, without a decay. y has the same
    bits as without them."""
    x = inputs(shape, dtype, device)
    got = run(*x, name, sums=True)
    assert same(got[:1], run(*x, name)[:1])
    return error(got, plain(*x, name, sums=True))


def layouts_agree(name, dtype, device="cpu") -> bool:
    """Views of c_attn's output, contiguous copies, and q, k, v with other strides each."""
    q, k, v, dy = inputs((2, 2, 33, 80), dtype, device)
    reference = run(q, k, v, dy, name)
    others = (
        (q.contiguous(), k.contiguous(), v.contiguous(), dy.contiguous()),
        (q, k.contiguous(), v.mT.contiguous().mT, dy.mT.contiguous().mT),
    )
    return all(same(reference, run(*x, name)) for x in others)


def future_is_hidden(name, dtype, device="cpu", shape=LONG) -> bool:
    """New keys and values from position T/2 on leave y before it alone, bit for bit; new queries
    and dy before T/2 leave dk and dv from there on alone."""
    q, k, v, dy = inputs(shape, dtype, device)
    half = shape[2] // 2
    y, _, dk, dv = run(q, k, v, dy, name)
    k2, v2, q2, dy2 = k.clone(), v.clone(), q.clone(), dy.clone()
    k2[:, :, half:] *= -3
    v2[:, :, half:] += 100
    q2[:, :, :half] *= -3
    dy2[:, :, :half] += 100
    y2 = run(q, k2, v2, dy, name)[0]
    _, _, dk2, dv2 = run(q2, k, v, dy2, name)
    return (
        torch.equal(y[:, :, :half], y2[:, :, :half])
        and torch.equal(dk[:, :, half:], dk2[:, :, half:])
        and torch.equal(dv[:, :, half:], dv2[:, :, half:])
    )


@triton.jit
def pointwise_kernel(X, Y, Slope, unit, f: tl.constexpr, n: tl.constexpr):
    i = tl.arange(0, 2048)
    y, slope = f(tl.load(X + i) * unit, n)
    tl.store(Y + i, y)
    tl.store(Slope + i, slope)


def pointwise_error(name, device="cpu") -> float:
    """The largest error of f and f' alone, against float64; relative where they exceed 1."""
    score, f, unit, n = triton_kernels.parse(name)
    x = torch.linspace(-14, 0 if score == "distance" else 14, 2048, device=device)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    pointwise_kernel[(1,)](x, y, slope, unit, f=f, n=n)
    x64 = x.double().requires_grad_()
    want = model.parse_attn_type(name).f(x64)
    wants = want.detach(), torch.autograd.grad(want.sum(), x64)[0]
    return max(
        ((got - want).abs() / want.abs().clamp(min=1)).max().item()
        for got, want in zip((y, slope), wants, strict=True)
    )


def overflow_error(dtype, device="cpu") -> float:
    """The error of GKpoly-8 where every pair above the diagonal that has the last key overflows,
    and so does the zero query that pads the last block: the key is far from all queries but the
    last, which is halfway."""
    q, k, v, dy = inputs((1, 2, 77, 64), dtype, device)
    far = 15 * torch.sign(k[:, :, -1])
    k[:, :, -1] += far
    q[:, :, -1] += far / 2
    A = model.gaussian_poly(model.scores(q.float(), k.float(), "distance"), 8)
    assert A[:, :, :-1, -1].isinf().all() and A.tril().isfinite().all()
    x = (q, k, v, dy)
    return error(run(*x, "GKpoly-8"), plain(*x, "GKpoly-8"))


# ----------------------------------------------------------------------------
# Through the interpreter


def interpret(dtype_name: str, all_cases: bool) -> dict:
    """The measurements of one dtype: for all attentions on small shapes, or in all cases."""
    dtype = DTYPES[dtype_name]
    if not all_cases:
        x = inputs(SMALL, dtype)
        return {
            "error": {name: largest_error(name, dtype, shapes=[SMALL]) for name in NAMES},
            "pointwise": {name: pointwise_error(name) for name in NAMES},
            "error, overflow": overflow_error(dtype),
            "error, decay": decay_error(dtype),
            "error, decay and sums": decay_error(dtype, names=["GKpoly-4"], sums=True),
            "error, sums": sums_error("GK", dtype),
            "layouts": {"GK": layouts_agree("GK", dtype)},
            "future": {"GKpoly-4": future_is_hidden("GKpoly-4", dtype, shape=(1, 1, 77, 16))},
            "repeats": {"GK": same(run(*x, "GK"), run(*x, "GK"))},
        }
    x = inputs(LONG, dtype)
    wide = inputs((1, 1, 33, 256), dtype)
    return {
        "error": {name: largest_error(name, dtype) for name in NAMES},
        "error, T=300": error(run(*x, "GK"), plain(*x, "GK")),
        "error, hs=256": error(run(*wide, "GK"), plain(*wide, "GK")),
        "error, overflow": overflow_error(dtype),
        "error, decay": decay_error(dtype, names=NAMES, T=300),
        "error, decay and sums": decay_error(dtype, names=["GK", "PA_relu"], T=300, sums=True),
        "error, sums": max(sums_error(name, dtype) for name in NAMES),
        "layouts": {name: layouts_agree(name, dtype) for name in ("GK", "PA_gelu")},
        "future": {name: future_is_hidden(name, dtype) for name in ("GK", "GKpoly-4", "PA_silu")},
        "repeats": {name: same(run(*x, name), run(*x, name)) for name in ("GK", "PA_relu")},
    }


def opcheck(device="cpu") -> None:
    """torch.library's own tests of the operators, and a compiled run without a graph break."""
    for name in ("GK", "PA_gelu"):
        q, k, v, _ = inputs((2, 2, 7, 16), torch.float32, device)
        x = [t.detach().requires_grad_() for t in (q, k, v)]
        for decay in ((None, None), triton_kernels._decay(torch.tensor([3.0, 8.0]), x[0])):
            args = *x, name, DIVISOR, *decay, name == "GK"
            torch.library.opcheck(torch.ops.triton_attention.forward, args)
    x = inputs((2, 2, 7, 16), torch.float32, device)
    attend = torch.compile(triton_kernels.triton_attention, fullgraph=True, backend="aot_eager")
    assert same(run(*x, "GK", attend), run(*x, "GK"))


@pytest.mark.parametrize(
    "dtype, cases",
    [("float32", "small")]
    + [pytest.param(dtype, "all", marks=pytest.mark.slow) for dtype in ("float32", "float16")],
)
def test_interpreted_kernels_compute_the_plain_formula(dtype, cases):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, dtype, cases]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of Triton 3.6 does not work with NumPy 2.4 and later")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    errors = measured["error"] | {k: e for k, e in measured.items() if k.startswith("error, ")}
    assert not {name: e for name, e in errors.items() if not e <= TOLERANCE[dtype]}
    for name, e in measured.get("pointwise", {}).items():
        # GKpoly-8's last six squarings double the error of rounding six times
        assert e < (5e-7 if "GKpoly" not in name else 4e-6), name
    for promise in ("layouts", "future", "repeats"):  # strides, causality, determinism: bit for bit
        assert all(measured[promise].values()), promise


# ----------------------------------------------------------------------------
# What is declined


def test_a_triton_form_has_the_score_and_a_formula_by_hand_of_its_name():
    assert triton_kernels.FORMS.keys() <= HAND_WRITTEN.keys() & model.POINTWISE.keys()
    for name in NAMES:
        variant = model.parse_attn_type(name)
        reason = triton_kernels.refusal(name, 64, torch.float32, "cuda", variant)
        assert reason is None or "another formula" not in reason


@pytest.mark.parametrize(
    "name, head_size, dtype, device, word",
    [
        ("PA_mine", 64, torch.float32, "cuda", "PA_mine"),
        ("GKpoly", 64, torch.float32, "cuda", "GKpoly"),
        ("GK", 768, torch.float32, "cuda", "768"),
        ("GK", 64, torch.float64, "cuda", "float64"),
        ("GK", 64, torch.float32, "cpu", "CUDA"),
    ],
)
def test_what_can_not_run_is_declined_in_one_line(name, head_size, dtype, device, word):
    if triton_kernels.INTERPRETED and device == "cpu":
        pytest.skip("TRITON_INTERPRET is set, and the interpreter runs on a CPU")
    reason = triton_kernels.refusal(name, head_size, dtype, device)
    assert word in reason and "\n" not in reason
    q = torch.zeros(1, 1, 2, head_size, dtype=dtype)
    with pytest.raises(ValueError):
        triton_kernels.triton_attention(q, q, q, name, 1.0)


# ----------------------------------------------------------------------------
# Compiled for sm_90, without a GPU

KERNELS = triton_kernels.KERNELS
# What a thread may spill to its stack, in bytes, by head size: 32 are eight values. The masks of 80
# take registers where reaches are learned, and at 256 dkv spills whatever the tile is.
MAX_STACK = {32: 32, 64: 32, 80: 192, 128: 96, 256: 640}
HARDEST = ("GK", "GKpoly-8", "PA_gelu")  # of those in NAMES: with the most values at a time
MODES = {  # of a decay: what compile_kernel takes, and the programs per multiprocessor at 64
    "no decay": ({}, {"forward": 2, "dq": 3, "dkv": 2}),
    "decay": ({"decays": True}, {"forward": 2, "dq": 2, "dkv": 2}),
    "learned": ({"decays": True, "learned": True}, {"dq": 2}),
    "sums": ({"decays": True, "sums": True}, {"forward": 2, "dq": 2, "dkv": 2}),
    "learned, sums": ({"decays": True, "learned": True, "sums": True}, {"dq": 2}),
}
CASES = [(kernel, mode) for mode, (_, programs) in MODES.items() for kernel in programs]
compiles = pytest.mark.skipif(
    bool(triton_kernels.INTERPRETED), reason="TRITON_INTERPRET is set: nothing can be compiled"
)


def compile_for_hopper(kernel, name, shape=(1, 12, 1024, 64), blocks=None, **decay):
    """The kernel as launched for bfloat16, and what it uses."""
    q, k, v, _ = inputs(shape, torch.bfloat16)
    with tuning.for_hopper():
        blocks = blocks or triton_kernels.blocks_for(kernel, q, bool(decay), "sums" in decay)
        compiled = tuning.compile_kernel(kernel, blocks, q, k, v, name, **decay)
        return compiled, tuning.usage(compiled)


def faults(kernel, mode, name, head_size) -> list[str]:
    """What is wrong with a shipped configuration."""
    decay, programs = MODES[mode]
    compiled, used = compile_for_hopper(kernel, name, (1, 12, 1024, head_size), **decay)
    padded = max(64, triton_kernels.padded(head_size))
    programs = programs[kernel] if padded == 64 else 1
    registers = (used.registers + 7) // 8 * 8 * 32 * compiled.metadata.num_warps
    wrong = {
        "no wgmma": "wgmma.mma_async" not in compiled.asm["ptx"],
        "serialised": used.serialised,
        f"{used.stack} bytes spilled": used.stack > MAX_STACK[head_size],
        f"{used.shared} bytes shared": used.shared > triton_kernels.HOPPER_SHARED_BYTES,
        f"{used.registers} registers, {used.shared} bytes shared: fewer than {programs} programs": (
            programs * registers > 65536 or programs * (used.shared + 1024) > 228 * 1024
        ),  # 1 KB is the system's
    }
    return [fault for fault, holds in wrong.items() if holds]


@compiles
@pytest.mark.parametrize("kernel, mode", CASES)
def test_block_sizes_neither_serialise_nor_spill(kernel, mode):
    assert faults(kernel, mode, "GK", 64) == []


@compiles
@pytest.mark.parametrize(
    "kernel, mode, head_size, names",
    [
        pytest.param(*case, hs, HARDEST, marks=pytest.mark.slow)
        for case in CASES
        for hs in (64, 128)
        if "sums" not in case[1]
    ]
    + [
        pytest.param(*case, hs, NAMES, marks=pytest.mark.exhaustive)
        for case in CASES
        for hs in MAX_STACK
    ],
)
def test_no_shipped_configuration_serialises_or_spills(kernel, mode, head_size, names):
    found = {name: faults(kernel, mode, name, head_size) for name in names}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_head_and_one_position_compile(kernel):  # which Triton compiles apart
    compiled, _ = compile_for_hopper(kernel, "GK", (1, 1, 1, 64))
    assert "wgmma.mma_async" in compiled.asm["ptx"]


@compiles
def test_usage_tells_what_spills_and_what_is_serialised():
    for maxnreg, bad in ((None, False), (128, True)):
        blocks = triton_kernels.BLOCKS["dkv", 64]._replace(maxnreg=maxnreg)
        used = compile_for_hopper("dkv", "PA_identity", blocks=blocks)[1]
        assert (used.stack > 128, used.serialised) == (bad, bad)
        assert used.registers == maxnreg or not bad


@triton.jit
def rounding_kernel(X, Y, IN_PAIRS: tl.constexpr):
    i = tl.arange(0, 512)
    x = tl.load(X + i)
    if IN_PAIRS:
        tl.store(Y + i, triton_kernels.rounded(x, Y.dtype.element_ty))
    else:
        tl.store(Y + i, x.to(Y.dtype.element_ty))


def machine_code(cubin: bytes) -> list[str]:
    """The instructions of a cubin, without addresses and names."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "--print-code", file]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.split("*/")[1] for line in listing.splitlines() if "/*0" in line]


@compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_pairs_is_the_machine_code_of_the_conversion(dtype):
    x, y, code = torch.empty(512), torch.empty(512, dtype=dtype), []
    with tuning.for_hopper():
        for in_pairs in (True, False):
            compiled = rounding_kernel.warmup(x, y, in_pairs, enable_fp_fusion=True, grid=(1,))
            code.append(machine_code(compiled.asm["cubin"]))
    assert code[0] == code[1] and any("F2FP" in line for line in code[0])


@compiles
def test_tuning_leaves_out_what_spills_serialises_or_does_not_fit():
    good = triton_kernels.BLOCKS["dkv", 64]
    spills, too_large = good._replace(maxnreg=128), good._replace(BLOCK_M=128, num_stages=8)
    q, k, v, _ = inputs((1, 12, 1024, 64), torch.bfloat16)
    with tuning.for_hopper():
        assert tuning.worth_timing("dkv", [spills, good, too_large], q, k, v, "GK") == [good]


# ----------------------------------------------------------------------------
# On a GPU


def on_gpu(test):
    no_gpu = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(no_gpu, reason="there is no CUDA device here")(test))


@on_gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype, tolerance", TOLERANCE.items())
def test_gpu_output_and_gradients_are_those_of_the_plain_formula(name, dtype, tolerance):
    shapes = [*SHAPES, LONG, (2, 2, 1024, 64), (1, 2, 300, 256), (1, 2, 300, 96)]
    assert largest_error(name, DTYPES[dtype], "cuda", shapes) <= tolerance


@on_gpu
def test_gpu_pointwise_functions():
    assert max(pointwise_error(name, "cuda") for name in NAMES) < 4e-6


@on_gpu
def test_gpu_tf32x3_is_as_exact_as_float32_has_to_be(monkeypatch):
    """If it passes and is faster, FLOAT32_PRECISION can be tf32x3."""
    monkeypatch.setattr(triton_kernels, "FLOAT32_PRECISION", "tf32x3")
    for shape in (*SHAPES, (1, 1, 8192, 64)):
        for name in ("GK", "GKpoly-8", "PA_relu"):
            x = inputs(shape, torch.float32, "cuda")
            assert error(run(*x, name), plain(*x, name)) <= TOLERANCE["float32"], (shape, name)


@on_gpu
def test_gpu_tuning_finds_block_sizes_that_run():
    q, k, v, _ = inputs((2, 4, 1024, 64), torch.bfloat16, "cuda")
    before = dict(triton_kernels.BLOCKS)
    try:
        found = tuning.tune(q, k, v, "GK", tuning.CANDIDATES[::9])
        assert found == {kernel: triton_kernels.BLOCKS[kernel, 64] for kernel in KERNELS}
    finally:
        triton_kernels.BLOCKS.update(before)


@on_gpu
@pytest.mark.parametrize("name", NAMES)
def test_gpu_decay(name):
    for dtype, tolerance in TOLERANCE.items():
        for sums in (False, True):
            assert decay_error(DTYPES[dtype], "cuda", [name], 1024, sums) <= tolerance, dtype
        assert sums_error(name, DTYPES[dtype], "cuda") <= tolerance, dtype


@on_gpu
@pytest.mark.parametrize("name", ["GK", "GKpoly-8", "PA_gelu", "PA_relu"])
def test_gpu_promises(name):
    for dtype in DTYPES.values():
        assert layouts_agree(name, dtype, "cuda"), dtype
        assert future_is_hidden(name, dtype, "cuda", (2, 3, 1000, 64)), dtype
        x = inputs((4, 8, 1024, 64), dtype, "cuda")
        assert same(run(*x, name), run(*x, name)), dtype


@on_gpu
def test_gpu_overflow_above_the_diagonal_stays_there():
    for dtype, tolerance in TOLERANCE.items():
        assert overflow_error(DTYPES[dtype], "cuda") <= tolerance, dtype


@on_gpu
def test_gpu_operators_keep_torch_librarys_promises_and_compile_without_a_graph_break():
    opcheck("cuda")
    x = inputs((2, 2, 128, 64), torch.bfloat16, "cuda")
    attend = torch.compile(triton_kernels.triton_attention, fullgraph=True)
    for name in ("GK", "GKpoly-8", "PA_gelu"):
        assert same(run(*x, name, attend=attend), run(*x, name)), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured = interpret(sys.argv[1], all_cases=sys.argv[2] == "all")
    if sys.argv[1] == "float32" and sys.argv[2] == "small":
        opcheck()
    print(json.dumps(measured))
