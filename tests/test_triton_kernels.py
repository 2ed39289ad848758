"""
The Triton kernels against the plain formula in float64.

- through Triton's interpreter, on CPU tensors. TRITON_INTERPRET has to be set before triton is
  imported, and another test may have done that by now: so this file runs itself as a script, twice
  at a time, which prints what it found as JSON.
- compiled for sm_90 (Hopper), which takes no GPU: tensor-core instructions, registers, spills.
- marked `gpu`: on a CUDA device.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for the script; under pytest it is there already

import model  # noqa: E402

pytest.importorskip("triton", reason="triton is not installed (there is none for macOS, Windows)")
import triton_kernels  # noqa: E402

NAMES = [name for name in model.POINTWISE if not name.endswith("-n")] + ["GKpoly-4", "GKpoly-8"]
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
DIVISOR = 16.0


# ----------------------------------------------------------------------------
# Evidence: plain functions, for any device


def inputs(shape, dtype, device="cpu", offset=0.0, seed=0):
    """q, k, v (B, nh, T, hs) as views of c_attn's output (B, T, 3, nh, hs), and dy. q and k are
    moved from the origin by a common vector of length `offset` in each head."""
    B, nh, T, hs = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, 3, nh, hs, generator=generator)
    away = torch.randn(nh, hs, generator=generator)
    qkv[:, :, :2] += offset * away / away.norm(dim=-1, keepdim=True)
    dy = torch.randn(B, T, nh, hs, generator=generator)
    qkv, dy = qkv.to(device, dtype), dy.to(device, dtype)
    return *qkv.permute(2, 0, 3, 1, 4).unbind(0), dy.transpose(1, 2)


def run(q, k, v, dy, name, attend=triton_kernels.triton_attention):
    """y, dq, dk, dv."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    y = attend(q, k, v, name, DIVISOR)
    return y.detach(), *torch.autograd.grad(y, (q, k, v), dy)


def plain(q, k, v, dy, name):
    """The same by the plain formula, in float64."""

    def attend(q, k, v, name, divisor):
        return model.pointwise_attention(q, k, v, model.parse_attn_type(name), divisor)

    return run(*(x.double() for x in (q, k, v, dy)), name, attend)


def error(got, want) -> float:
    """The largest relative error of y, dq, dk, dv. Half of the dtype's smallest number per element
    is free: a saturated f has gradients that float16 can't hold."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        quantum = torch.finfo(a.dtype).smallest_normal * torch.finfo(a.dtype).eps / 2
        excess = (a.double() - b).norm().item() - quantum * math.sqrt(b.numel())
        worst = max(worst, excess / max(b.norm().item(), 1e-300)) if math.isfinite(excess) else 1e9
    return worst


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def largest_error(name, dtype, device="cpu", shapes=SHAPES) -> float:
    cases = [(shape, offset) for shape in shapes for offset in (0.0, 8.0)]
    return max(
        error(run(*x, name), plain(*x, name))
        for x in (inputs(shape, dtype, device, offset) for shape, offset in cases)
    )


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


def overflow_error(dtype, device="cpu") -> float:
    """GKpoly-8 overflows where a key is far away. Here all such pairs are above the diagonal: the
    first half of the positions is at the origin, and so are the queries and keys of the second half
    but for its last key. And T is not a multiple of a block: past its end too, f is inf."""
    q, k, v, dy = inputs((1, 2, 77, 64), dtype, device)
    k[:, :, -1] += 40 * torch.sign(k[:, :, -1])
    q[:, :, -1] = k[:, :, -1]
    x = (q, k, v, dy)
    assert not model.gaussian_poly(model.scores(q.float(), k.float(), "distance"), 8).isfinite().all()
    # The last query meets far keys too: below the diagonal, so take its row out
    return x


if __name__ == "__main__":
    torch.set_num_threads(1)
