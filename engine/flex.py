"""
torch's FlexAttention, to be measured beside our kernels: softmax, and GK as softmax times a sum.

FlexAttention computes out = softmax(s) v and lse = log sum_j exp(s). So y = exp(lse) out is the sum
of exp(s) v without normalisation: with the score s = log f(x) it is any pointwise attention whose f
is positive. For GK, f = exp and s = x, the distance: exact.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def refusal(attn_type: str, head_size: int, device: str) -> str | None:
    """One line on why FlexAttention can't be measured; None if it can."""
    if attn_type not in ("SM", "GK"):
        return f"FlexAttention is measured for SM and GK, not for {attn_type}"
    if torch.device(device).type != "cuda":
        return "FlexAttention has a backward pass on CUDA only"
    if head_size > 256 or head_size & (head_size - 1):
        return f"FlexAttention takes head sizes that are powers of 2 up to 256, not {head_size}"
    return None


def attention(attn_type: str, T: int, device: str) -> Callable[..., Tensor]:
    """Causal SM or GK for T tokens, compiled: (B, nh, T, hs) x 3 -> (B, nh, T, hs)."""
    from torch.nn.attention import flex_attention as flex  # here: it imports the compiler

    causal = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)
    softmax = partial(torch.compile(flex.flex_attention), block_mask=causal)
    if attn_type == "SM":
        return softmax

    def gaussian(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half_c = 0.5 / math.sqrt(q.size(-1))
        q2, k2 = (half_c * t.float().square().sum(-1) for t in (q, k))  # (B, nh, T)
        distance = lambda s, b, h, i, j: s - q2[b, h, i] - k2[b, h, j]
        wants = flex.AuxRequest(lse=True)
        y, aux = softmax(q, k, v, score_mod=distance, return_aux=wants)
        return (y * aux.lse.exp()[..., None]).to(v.dtype)

    return gaussian
