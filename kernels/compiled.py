"""
tile.c as a function: norms, f, f', the decay, the zeros above the diagonal and the sums of G in one
pass over a tile.
"""

import ctypes
import math
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

PART = 32  # rows of a tile over which G is summed at a time, so that no thread waits for another


@cache
def compiled_tile(n: int | None = None, decays: bool = False) -> Callable | None:
    """tile.c's `tile` for GK or, given n, for GKpoly-n, with or without a decay; None if no GCC
    here can compile it. Each process that needs it compiles it, for exactly this CPU, in a quarter
    of a second."""
    flags = ["-O3", "-march=native", "-fno-fast-math", "-fno-math-errno", "-fno-trapping-math"]
    # A loop split at the diagonal would be two loops, neither of which fills its vectors
    flags += ["-fopenmp", "-fno-split-loops", "-shared", "-fPIC", f"-DPART={PART}"]
    if platform.machine() == "x86_64":
        flags += ["-mprefer-vector-width=512"]  # by default GCC uses half of AVX-512's width
    if n is not None:
        flags += [f"-DSQUARINGS={n}"]
    if decays:
        flags += ["-DDECAY"]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 60}
    try:
        compiler = shlex.split(os.environ.get("CC") or "cc")
        with tempfile.TemporaryDirectory() as folder:
            library = f"{folder}/tile.so"
            command = [*compiler, *flags, Path(__file__).with_name("tile.c"), "-o", library]
            subprocess.run(command, check=True, **options)
            tile = ctypes.CDLL(library).tile
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        return None
    decay_types = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int] * decays
    tile.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int] * 6 + decay_types
    tile.restype = None
    # $CC may hold options that change arithmetic; then the compiled tile is not trusted
    x = torch.tensor([*range(-63, 0), math.nan], dtype=torch.float32, device="cpu") / 3
    norms, ones = torch.zeros_like(x), torch.ones_like(x)
    expected = x.exp() if n is None else ((1 + x.double() / 2**n) ** 2**n).float()
    no_decay = (ones.data_ptr(), 64, 1) if decays else ()
    pointers = x.data_ptr(), None, norms.data_ptr(), norms.data_ptr(), None, None
    tile(*pointers, 1, 1, 64, 1, 0, 1, *no_decay)
    return tile if torch.allclose(x, expected, 1e-4, equal_nan=True) else None
