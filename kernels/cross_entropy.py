"""
The loss over a large vocabulary without all its logits at once: output layer and cross-entropy.

12 x 1024 positions times GPT-2's 50304 tokens are 2.5 GB of logits in float32, and cross-entropy
holds several such tensors. Here logits are computed for a chunk of positions at a time:

    logits = x W^T,   lse_i = log sum_v exp(logits[i, v]),   n targets that are not -1
    loss = sum_i (lse_i - logits[i, target_i]) / n
    G = softmax(logits) - onehot(target),   dx = G W / n,   dW = sum over the chunks of G^T x / n

Forward computes the gradients too, while it has the chunk. As the loss is the last thing that a
model computes, backward only multiplies them by a number.
"""

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.blockwise import add_product_

SMALL_CHUNK = 2**24  # logits at once: 64 MiB in float32
# Each chunk reads and writes dW once, 0.3 GB for GPT-2, where its logits take 8 bytes each
CUDA_CHUNK = 2**28
BYTES_PER_LOGIT = 12  # of all logits at once: in half precision and in float32, and the gradients


def is_better(n_logits: int, device: torch.device) -> bool:
    """Whether chunks are better than all logits at once. On a CPU, where fresh memory is slow, they
    are faster from about 2^22 logits on (1.7 times at 2048 x 50304). On a GPU, where torch.compile
    fuses the plain loss, they only save memory: they are for logits that would take more than half
    of the memory that was free at the first call."""
    return n_logits >= fewest_in_chunks(device)


def fewest_in_chunks(device: torch.device) -> int:
    """The number of logits from which on chunks are better."""
    if device.type == "cuda":
        return free_bytes(device) // (2 * BYTES_PER_LOGIT)
    return 2**22 if device.type == "cpu" else 2**30


fewest_in_chunks._dynamo_marked_constant = True  # see model.choose


@cache
def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that this process could take at the first call. Later there is less, but a
    run must not change its mind: the two losses round differently."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def rows_at_once(N: int, V: int, device_type: str, fewest: int) -> int:
    """How many of N positions a chunk has. On a GPU chunks are of nearly equal size, and none has
    more than half of the number of logits from which on there are chunks, `fewest`."""
    if device_type != "cuda":
        return max(1, SMALL_CHUNK // V)
    largest = max(V, min(CUDA_CHUNK, fewest // 2))
    return math.ceil(N / math.ceil(N * V / largest))


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """F.cross_entropy(x @ weight.T, targets, ignore_index=-1) in nats, for (N, C), (V, C), (N,).
    Products are computed in the dtype that autocast asks for, all else in float32 at least. The
    result can be differentiated once."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    gradients = torch.is_grad_enabled()
    with_dW = gradients and weight.requires_grad  # without dW, a third of the work is saved
    return _linear_cross_entropy(x, weight, targets, dtype, gradients, with_dW)[0]


@torch.library.custom_op("pointwise::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, with_dx: bool, with_dW: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, dx and dW (empty where they are not wanted)."""
    wide = torch.promote_types(dtype, torch.float32)
    narrow = dtype if x.is_cuda else wide  # CPUs add up half-precision products in half precision
    dx = torch.zeros_like(x, dtype=wide) if with_dx else x.new_empty(0)
    dW = torch.zeros_like(weight, dtype=wide) if with_dW else weight.new_empty(0)
    total = x.new_zeros((), dtype=wide)
    counts = targets != -1
    n = counts.sum()
    rows = rows_at_once(len(x), len(weight), x.device.type, fewest_in_chunks(x.device))
    with torch.autocast(x.device.type, enabled=False):
        W = weight.to(narrow)
        for i in range(0, len(x), rows):
            chunk = slice(i, i + rows)
            x_i, target = x[chunk].to(narrow), targets[chunk]
            log_p = F.log_softmax(x_i @ W.T, dim=1, dtype=wide)  # (rows, V)
            total += F.nll_loss(log_p, target, ignore_index=-1, reduction="sum")
            if with_dx:
                G, index = log_p.exp_(), target.clamp(min=0)[:, None]
                G.scatter_(1, index, G.gather(1, index) - 1)
                G = G.mul_(counts[chunk][:, None]).to(narrow)  # not yet / n: float16 has no 1e-9
                add_product_(dx[None, chunk], G[None], W[None], beta=0.0)
                if with_dW:
                    add_product_(dW[None], G.T[None], x_i[None])
    return total / n, (dx / n).to(x.dtype), (dW / n).to(weight.dtype)


@_linear_cross_entropy.register_fake
def _(x, weight, targets, dtype, with_dx, with_dW):
    dx = torch.empty_like(x) if with_dx else x.new_empty(0)
    dW = torch.empty_like(weight) if with_dW else weight.new_empty(0)
    return x.new_empty((), dtype=torch.promote_types(dtype, torch.float32)), dx, dW


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad, *_):
    dx, dW = ctx.saved_tensors
    return dx * grad, dW * grad if ctx.needs_input_grad[1] else None, None, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_save_for_backward)
