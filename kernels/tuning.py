"""
The block sizes of the Triton kernels: what the assembler says of a choice, and which is fastest.

`compile_kernel` compiles a kernel just as triton_kernels.py launches it; without a GPU inside
`for_hopper()`. `tune` looks for the fastest block sizes on the GPU at hand.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from kernels import triton_kernels
from kernels.blockwise import empty_heads_last
from kernels.triton_kernels import BLOCKS, BLOCKS_FLOAT32, Blocks


class Usage(NamedTuple):
    """What a compiled kernel takes. `serialised`: each wgmma, Hopper's product on the tensor cores,
    waits for the one before it, which costs more than any choice of block sizes gains."""

    registers: int  # per thread
    stack: int  # bytes per thread: what did not fit into the registers
    shared: int  # bytes per program
    serialised: bool


class _Hopper:
    """A Triton driver of a Hopper GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def for_hopper() -> Iterator[None]:
    """Inside, kernels are compiled for sm_90, on any machine. They can't be launched."""
    triton.runtime.driver.set_active(_Hopper())
    try:
        yield
    finally:
        triton.runtime.driver.set_active(None)  # Triton looks for a GPU again when it needs one


def compile_kernel(
    kernel: str, blocks: Blocks, q: Tensor, k: Tensor, v: Tensor, name: str,
    decays: bool = False, learned: bool = False, sums: bool = False,
) -> triton.compiler.CompiledKernel:  # fmt: skip
    """The kernel as triton_kernels.py would launch it for these inputs. What the tensors hold does
    not matter, but their shapes, strides and dtype do, as Triton compiles for each anew."""
    output = lambda: empty_heads_last(q)
    norms = triton_kernels._norms(q, name), triton_kernels._norms(k, name)
    norms = triton_kernels._per_row(q, True) if sums else None, *norms
    own = {
        "forward": lambda: (output(), *norms),
        "dq": lambda: (output(), output(), *norms, triton_kernels._moments(q, learned)),
        "dkv": lambda: (output(), output(), output(), *norms),
    }[kernel]()
    reach = torch.ones(q.size(1), device=q.device) if decays else None
    decay = triton_kernels._decay(reach, q)
    args, options = triton_kernels._arguments(kernel, blocks, (q, k, v, *own), name, 1.0, *decay)
    with torch.cuda.device_of(q):
        return triton_kernels.KERNELS[kernel].warmup(*args, **options)


def usage(compiled: triton.compiler.CompiledKernel) -> Usage:
    """What the machine code takes by cuobjdump, and what the assembler remarks when it makes it
    from the kernel's PTX once more; Triton brings both along."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        cubin.write_bytes(compiled.asm["cubin"])
        assembler = get_ptxas(compiled.metadata.target.arch).path
        target = re.search(r"\.target (\w+)", ptx)[1]
        remarks = _output(
            assembler, "-v", "--gpu-name", target, source, "-o", source.with_suffix("")
        )
        code = _output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    return Usage(
        registers=int(re.search(r"REG:(\d+)", code)[1]),
        stack=int(re.search(r"STACK:(\d+)", code)[1]),
        shared=compiled.metadata.shared,
        serialised="wgmma.mma_async instructions are serialized" in remarks,
    )


def _output(*command) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


# ---- Tuning -----------------------------------------------------------------

MAX_STACK = 128  # bytes that a candidate may spill
CANDIDATES = [
    Blocks(BLOCK_M, BLOCK_N, num_warps, num_stages, maxnreg)
    for BLOCK_M in (32, 64, 128)
    for BLOCK_N in (32, 64, 128)
    for num_warps, maxnreg in ((4, None), (4, 168), (8, None), (8, 128))
    for num_stages in (2, 3, 4)
]


def worth_timing(
    kernel: str, candidates: Iterable[Blocks], q: Tensor, k: Tensor, v: Tensor, name: str
) -> list[Blocks]:
    """The candidates that fit the device and neither serialise nor spill much. Compiles them on all
    cores; Triton keeps what it compiled."""

    def passes(blocks: Blocks) -> bool:
        own, other = blocks[:2] if kernel != "dkv" else blocks[1::-1]
        if own % other != 0:  # see BLOCKS
            return False
        used = usage(compile_kernel(kernel, blocks, q, k, v, name))
        fits = used.shared <= triton_kernels.shared_bytes(q.device)
        return fits and not used.serialised and used.stack <= MAX_STACK

    candidates = list(candidates)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [b for b, good in zip(candidates, pool.map(passes, candidates), strict=True) if good]


def tune(
    q: Tensor, k: Tensor, v: Tensor, name: str, candidates: Iterable[Blocks] = CANDIDATES
) -> dict[str, Blocks]:
    """Time the candidates that are worth it and the present block sizes on these inputs, and use
    the fastest for their head size until the process ends. Returns them by kernel."""
    table = BLOCKS_FLOAT32 if q.dtype == torch.float32 else BLOCKS
    forward = lambda: triton_kernels._forward(q, k, v, name, 1.0, None, None, False)
    y, no_sums, *norms = forward()
    tensors = y, no_sums, q, k, v, *norms
    backward = lambda: triton_kernels._backward(*tensors, name, 1.0, None, None, False)
    fastest = {}
    for kernel, launch in {"forward": forward, "dkv": backward, "dq": backward}.items():
        key, times = (kernel, max(64, triton_kernels.padded(q.size(-1)))), {}
        for blocks in [table[key], *worth_timing(kernel, candidates, q, k, v, name)]:
            table[key] = blocks
            times[blocks] = triton.testing.do_bench(launch)
        fastest[kernel] = table[key] = min(times, key=times.get)
    return fastest
