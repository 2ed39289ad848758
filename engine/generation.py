"""
Drawing tokens from a model, with a cache of keys and values: a new token costs one forward pass of
one token.

    for ids in stream(model, prompts, num_samples=10, max_new_tokens=500):   # ids (B,)
        ...

The cache is exact for every attention: a causal row depends on nothing that follows it, and the L
of PA_f is fixed. When the cache is full (block_size tokens), the oldest `window_stride` tokens are
dropped and those that remain are computed again, since positions are absolute. With a stride of 1,
that happens for every token, as in nanoGPT.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


class KVCache:
    """Keys and values of the tokens so far, for every layer: (n_layer, B, nh, size, hs) each.
    `position` is that of the next token: one int for all rows, which is faster, or a tensor (B,) if
    prompts differ in length or a compiled step needs the same shapes every time."""

    def __init__(self, model, B: int, size: int):
        config, weight = model.config, model.lm_head.weight
        shape = (config.n_layer, B, config.n_head, size, config.n_embd // config.n_head)
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        # Zeros rather than uninitialised memory, since 0 * NaN is NaN
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(2))
        self.position: int | Tensor = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add k, v (B, nh, t, hs) of the next tokens; return k, v of all tokens, and a mask. The
        mask is None, unless `position` is a tensor: then t is 1, the buffers come back whole, and
        the mask (B, 1, 1, size) says which tokens each row has."""
        all_k, all_v = self.k[layer], self.v[layer]  # (B, nh, size, hs)
        if isinstance(self.position, int):
            end = self.position + k.size(2)
            all_k[:, :, self.position : end] = k
            all_v[:, :, self.position : end] = v
            return all_k[:, :, :end], all_v[:, :, :end], None
        position = self.position[:, None, None, None]
        index = position.expand(-1, k.size(1), 1, k.size(3))
        all_k.scatter_(2, index, k.to(all_k.dtype))
        all_v.scatter_(2, index, v.to(all_v.dtype))
        return all_k, all_v, torch.arange(all_k.size(2), device=k.device) <= position


def prefill(model, prompts: list[Tensor], cache: KVCache, rows: Tensor) -> Tensor:
    """Fill rows (n,) of the cache with prompts of any lengths, each n / len(prompts) times; return
    (n, V) logits after their ends. Nothing can see the padding behind the end of a shorter one."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=rows.device)
    idx = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)  # (len(prompts), T)
    T = idx.size(1)
    filled = KVCache(model, len(prompts), T)
    x = model.hidden(idx, torch.arange(T, device=idx.device), filled)  # (len(prompts), T, C)
    num_samples = len(rows) // len(prompts)
    cache.k[:, rows, :, :T] = filled.k.repeat_interleave(num_samples, dim=1)
    cache.v[:, rows, :, :T] = filled.v.repeat_interleave(num_samples, dim=1)
    last = x[torch.arange(len(prompts), device=x.device), lengths - 1]  # (len(prompts), C)
    return model.lm_head(last).repeat_interleave(num_samples, dim=0)


def draw(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float
) -> Tensor:
    """Token ids (B,) from logits (B, V) and random numbers `uniform` (B,) in (0, 1]: each the id at
    which the cumulative probability reaches the random number. It does not wait for the device."""
    if temperature == 0:
        return logits.argmax(-1)
    ids, k = None, min(top_k or logits.size(-1), logits.size(-1))
    if k < logits.size(-1) or top_p < 1:
        logits, ids = logits.topk(k)  # in descending order
    logits = logits.float()
    p = F.softmax((logits - logits.max(-1, keepdim=True).values) / temperature, dim=-1)
    cumulative = p.cumsum(-1)
    if top_p < 1:  # the likeliest ids that together have probability top_p, at least one
        p = p * (cumulative - p < top_p)
        cumulative = p.cumsum(-1)
    chosen = (cumulative < uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    chosen = chosen.clamp(max=p.size(-1) - 1)
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]


@torch.no_grad()
def stream(
    model, prompts: list[Tensor], num_samples: int, max_new_tokens: int,
    temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
    vocab_size: int | None = None, window_stride: int | None = None,
    uniforms: Tensor | None = None, compile: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the next token ids (B,), `max_new_tokens` times, where B = len(prompts) num_samples. A
    prompt is a vector of ids; its samples are neighbours in B. Temperature 0 takes the likeliest
    token. Ids from `vocab_size` on, which pad a vocabulary, are never drawn. `window_stride` is by
    default a quarter of block_size. `uniforms` (max_new_tokens, B) in (0, 1] replace torch's random
    numbers. `compile` compiles the step of one token. Raises ValueError for an empty prompt."""
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no token")
    block_size, device = model.config.block_size, prompts[0].device
    stride = min(window_stride or max(1, block_size // 4), block_size)
    prompts = [prompt[-block_size:] for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts for _ in range(num_samples)]  # in the cache
    B, size = len(lengths), min(block_size, max(lengths) + max_new_tokens)
    if uniforms is None:
        uniforms = 1 - torch.rand(max_new_tokens, B, device=device)
    uniform_lengths = not compile and len(set(lengths)) == 1
    cache, rows = KVCache(model, B, size), torch.arange(B, device=device)
    logits = prefill(model, prompts, cache, rows)
    # Each row's tokens, of which the first lengths[b] are in the cache
    window = torch.zeros(B, block_size + 1, dtype=torch.long, device=device)
    for b, n in enumerate(lengths):
        window[b, :n] = prompts[b // num_samples]
    step = one_token
    if compile:
        for buffer in (cache.k, cache.v):
            torch._dynamo.mark_static_address(buffer)  # lets CUDA graphs write to it
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        step = torch.compile(one_token, mode=mode, fullgraph=True)
    position = torch.tensor(lengths, device=device)

    for i in range(max_new_tokens):
        ids = draw(logits[:, :vocab_size], uniforms[i], temperature, top_k, top_p)  # (B,)
        yield ids
        if i == max_new_tokens - 1:
            return
        full = [b for b, n in enumerate(lengths) if n == size]
        if full:  # drop the oldest tokens of these rows, and compute the others again
            index = torch.tensor(full, device=device)
            kept = size - stride
            window[index, :kept] = window[index, stride:size]
            if kept:
                prefill(model, list(window[index, :kept]), cache, index)
            for b in full:
                lengths[b] = kept
            position[index] = kept
        window[rows, position] = ids
        cache.position = lengths[0] if uniform_lengths else position
        logits = step(model, ids, cache)
        lengths = [n + 1 for n in lengths]
        position = position + 1


def one_token(model, ids: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, V) after one more token of each row."""
    pos = cache.position
    pos = torch.tensor([pos], device=ids.device) if isinstance(pos, int) else pos[:, None]
    return model.lm_head(model.hidden(ids[:, None], pos, cache)[:, 0])
