"""
Which implementation of an attention can run, and which one does.

`reference` is model.py's formula, `blockwise` and `triton` compute the same function in O(T)
memory, and `auto` means the fastest that can run. Softmax has torch's own kernels (SDPA) instead.

Above head size 256, `triton` means wide_heads.py, whose memory is O(T^2) for some heads at a time.
There a GPU prefers the formula to `blockwise` while its T x T matrices are small, as torch.compile
fuses what is between its products. In float32 it prefers the formula to `triton` too: without
tensor cores, Triton's products may be slower than cuBLAS's by more than the half that they save.
"""

from typing import Literal, get_args

import torch

Device = torch.device | str
Implementation = Literal["auto", "reference", "blockwise", "triton"]

MAX_FUSED = 256  # the largest head size of triton_kernels.py
MAX_MATRIX = 2**28  # scores of all heads: 1 GiB in float32, and the formula holds several such


def is_small(B: int, nh: int, T: int) -> bool:
    """Whether the formula's matrices, B nh T^2 scores, are small enough to prefer it on a GPU. The
    branch gives torch.compile a constant to pass on, also where T is symbolic."""
    return True if B * nh * T * T <= MAX_MATRIX else False


def triton_module(head_size: int):
    """The module with the Triton kernels for this head size. Raises ImportError without Triton."""
    from kernels import triton_kernels, wide_heads

    return triton_kernels if head_size <= MAX_FUSED else wide_heads


def refusals(
    attn_type: str, variant, head_size: int, dtype: torch.dtype, device: Device, dropout: float,
    small: bool = True,
) -> dict[str, str | None]:  # fmt: skip
    """For each implementation, the fastest first: one line on why it can't run, None if it can.
    `variant` is the registry's entry for `attn_type`, None for softmax; `small` is `is_small` of
    the input."""
    if variant is None:
        return {"SDPA": None}
    device = torch.device(device)
    if device.type != "cuda":
        triton = f"the Triton kernels need a CUDA device, not {device.type}"
    elif dropout > 0:
        triton = "the Triton kernels have no dropout"
    else:
        try:
            module = triton_module(head_size)
            triton = module.refusal(attn_type, head_size, dtype, device, variant)
        except ImportError as error:
            triton = f"the Triton kernels can't be imported: {error}"
    tested = device.type in ("cpu", "cuda")
    blockwise = None if tested else f"blockwise attention was never tested on {device.type}"
    reasons = {"triton": triton, "blockwise": blockwise, "reference": None}
    if device.type == "cuda" and head_size > MAX_FUSED and small:
        first = ("reference", "triton") if dtype == torch.float32 else ("triton", "reference")
        return {name: reasons[name] for name in (*first, "blockwise")}
    return reasons


def pick(impl: str, reasons: dict[str, str | None]) -> str:
    """The implementation that `impl` stands for, given its `refusals`. Raises ValueError if it is
    unknown or can't run."""
    if impl not in (known := get_args(Implementation)):
        raise ValueError(f"attn_impl={impl!r} is not one of {', '.join(known)}")
    if impl == "auto" or "SDPA" in reasons:
        return next(name for name, reason in reasons.items() if reason is None)
    if reasons[impl] is not None:
        raise ValueError(f"attn_impl={impl} can't run: {reasons[impl]}; use attn_impl=auto")
    return impl
