"""
Drawing tokens from a model: a cache of keys and values, so that a new token costs one token.

    for ids in stream(model, prompts, num_samples=10, max_new_tokens=500):   # ids (B,)
        ...

The cache is exact for every attention: a causal row depends on nothing that follows it, and the L
of PA_f is fixed. When it is full (block_size tokens), the oldest `window_stride` of them are
dropped, and the rest is computed again, since positions are absolute. With a stride of 1 that
happens for every token, which is what nanoGPT does.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


class KVCache:
    """Keys and values of the tokens so far, for every layer: (n_layer, B, nh, size, hs) each.

    `at` is the position of the next token: one int for all rows, the quicker way, or a tensor (B,)
    where prompts differ in length, or where a compiled step wants the same shapes every time.
    """

    def __init__(self, model, B: int, size: int, at: int | Tensor):
        config, weight = model.config, model.lm_head.weight
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, B, config.n_head, size, head_size)
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        # Zeros, since a weight of 0 does not hide a NaN
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(2))
        self.at = at

    def layer(self, i: int) -> "LayerCache":
        return LayerCache(self.k[i], self.v[i], self.at)


class LayerCache:
    def __init__(self, k: Tensor, v: Tensor, at: int | Tensor):
        self.k, self.v, self.at = k, v, at

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add k, v (B, nh, t, hs) of the next tokens; return those of all, and what is visible.

        Where `at` is a tensor, t is 1, and the buffers come back whole with a mask (B, 1, 1, size).
        """
        if isinstance(self.at, int):
            end = self.at + k.size(2)
            self.k[:, :, self.at : end] = k
            self.v[:, :, self.at : end] = v
            return self.k[:, :, :end], self.v[:, :, :end], None
        at = self.at[:, None, None, None]
        where = at.expand(-1, k.size(1), 1, k.size(3))
        self.k.scatter_(2, where, k.to(self.k.dtype))
        self.v.scatter_(2, where, v.to(self.v.dtype))
        visible = torch.arange(self.k.size(2), device=k.device) <= at  # (B, 1, 1, size)
        return self.k, self.v, visible


def prefill(model, rows: list[Tensor], cache: KVCache, at: Tensor) -> Tensor:
    """Fill the cache's rows `at` (n,) with token rows of any lengths; (n, V) logits after the last.

    Shorter rows are padded behind their end, where nothing can see it.
    """
    lengths = torch.tensor([len(row) for row in rows], device=at.device)
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (n, T)
    T = idx.size(1)
    mine = KVCache(model, len(rows), T, 0)
    x = model.hidden(idx, torch.arange(T, device=idx.device), mine)  # (n, T, C)
    times = len(at) // len(rows)  # each prompt's row serves several samples
    for buffer, new in ((cache.k, mine.k), (cache.v, mine.v)):
        buffer[:, at, :, :T] = new.repeat_interleave(times, dim=1)
    last = x[torch.arange(len(rows), device=x.device), lengths - 1]  # (n, C)
    return model.lm_head(last).repeat_interleave(times, dim=0)


def draw(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float
) -> Tensor:
    """Token ids (B,) from logits (B, V), each by one number (B,) in (0, 1]: the id at which the
    cumulative probability reaches it. No random state, and nothing waits for the device."""
    if temperature == 0:
        return logits.argmax(-1)
    ids, k = None, min(top_k or logits.size(-1), logits.size(-1))
    if k < logits.size(-1) or top_p < 1:
        logits, ids = logits.topk(k)  # falling
    logits = logits.float()
    p = F.softmax((logits - logits.max(-1, keepdim=True).values) / temperature, dim=-1)
    cumulative = p.cumsum(-1)
    if top_p < 1:  # the likeliest ids that together have probability top_p, the first one anyway
        p = p * (cumulative - p < top_p)
        cumulative = p.cumsum(-1)
    chosen = (cumulative < uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    chosen = chosen.clamp(max=p.size(-1) - 1)
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]


@torch.no_grad()
def stream(
    model,
    prompts: list[Tensor],
    num_samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    vocab_size: int | None = None,
    window_stride: int | None = None,
    uniforms: Tensor | None = None,
    compile: bool = False,
) -> Iterator[Tensor]:
    """Yield `max_new_tokens` times the next token ids (B,) of B = len(prompts) num_samples rows,
    the samples of a prompt (a vector of ids) side by side.

    Ids from `vocab_size` on are never drawn (a padded vocabulary). `window_stride` is by default a
    quarter of block_size. `uniforms` (max_new_tokens, B) in (0, 1] replace torch's random numbers.
    `compile` compiles the step of one token. Raises ValueError for an empty prompt.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no token")
    block_size, device = model.config.block_size, prompts[0].device
    stride = min(window_stride or max(1, block_size // 4), block_size)
    prompts = [prompt[-block_size:] for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts for _ in range(num_samples)]  # in the cache
    B, longest = len(lengths), max(lengths)
    if uniforms is None:
        uniforms = 1 - torch.rand(max_new_tokens, B, device=device)

    size = min(block_size, longest + max_new_tokens)
    uniform_lengths = not compile and len(set(lengths)) == 1
    cache = KVCache(model, B, size, 0)
    rows = torch.arange(B, device=device)
    logits = prefill(model, prompts, cache, rows)
    # The window of each row: its tokens, of which lengths[b] are in the cache
    window = torch.zeros(B, block_size + 1, dtype=torch.long, device=device)
    for b, n in enumerate(lengths):
        window[b, :n] = prompts[b // num_samples]
    step = one_token
    if compile:
        for buffer in (cache.k, cache.v):
            torch._dynamo.mark_static_address(buffer)  # lets CUDA graphs write to it
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        step = torch.compile(one_token, mode=mode, fullgraph=True)
    at = torch.tensor(lengths, device=device)

    for i in range(max_new_tokens):
        ids = draw(logits[:, :vocab_size], uniforms[i], temperature, top_k, top_p)  # (B,)
        yield ids
        if i == max_new_tokens - 1:
            return
        full = [b for b, n in enumerate(lengths) if n == size]
        if full:  # keep the newest tokens of these rows, and compute them again without the oldest
            where = torch.tensor(full, device=device)
            left = size - stride
            window[where, :left] = window[where, stride:size]
            if left:
                prefill(model, list(window[where, :left]), cache, where)
            for b in full:
                lengths[b] = left
            at[where] = left
        window[rows, at] = ids
        cache.at = lengths[0] if uniform_lengths else at
        logits = step(model, ids, cache)
        lengths = [n + 1 for n in lengths]
        at = at + 1


def one_token(model, ids: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, V) after one more token of each row."""
    pos = cache.at
    pos = torch.tensor([pos], device=ids.device) if isinstance(pos, int) else pos[:, None]
    return model.lm_head(model.hidden(ids[:, None], pos, cache)[:, 0])
