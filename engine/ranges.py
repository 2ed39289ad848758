"""
What a model's attention computes with, head by head: scores, weights, queries and keys.

A polynomial follows exp on an interval only. So whoever replaces GK by GKpoly-n, or evaluates a
model under encryption, must know how far the scores reach.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from kernels import decay
from model import GPT, MAX_N, GPTConfig, gaussian_poly, parse_attn_type, scores

ROWS = 128  # queries at a time: (nh, ROWS, T) scores are in memory
SAMPLE = 2**18  # scores of a head up to which percentiles are exact; beyond, every s-th row counts
PERCENTILES = (1, 10, 50, 90, 99)

# stats.csv has a row for each step, layer and head, the latter two counted from 0. Its numbers are
# of the scores x[i, j] with j <= i; |q| and |k| are Euclidean norms.
COLUMNS = (
    "step layer head "
    "x_min x_p1 x_p10 x_p50 x_p90 x_p99 x_max "  # smallest score, percentiles, largest
    "outside "  # share of x below GKpoly-n's range; empty for others
    "A_max row_min row_mean row_max "  # largest |A[i, j]|; sums of the rows of A
    "entropy "  # of SM's rows, mean, in nats; empty for others
    "q_mean q_max k_mean k_max"
).split()


def squarings(attn_type: str) -> int | None:
    """n of GKpoly-n; None for other attentions."""
    match = re.fullmatch(r"GKpoly-(\d+)", attn_type)
    return int(match[1]) if match else None


def range_end(n: int) -> int:
    """The lowest x at which GKpoly-n still follows exp, if only roughly: below it, A exceeds 1."""
    return -(2 ** (n + 1))


@torch.no_grad()
def each_layer(model: GPT, idx: Tensor, rt, measure: Callable[..., object]) -> list:
    """What measure(q, k, reach) returns for each layer, of queries and keys (B, nh, T, hs), in
    float32 or float64, that `model`, the plain one without compilation and DDP, makes of token ids
    (B, T). `reach` is the layer's, (nh,), or None without a decay."""
    results = []

    def hook(attn, module, inputs, output):
        q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in output)
        with torch.autocast(q.device.type, enabled=False):  # or scores would be half precision
            results.append(measure(q, k, attn.reach()))

    handles = [
        block.attn.qk.register_forward_hook(partial(hook, block.attn))
        for block in model.transformer.h
    ]
    training = model.training
    model.eval()
    try:
        with rt.autocast():
            model(idx)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return results


def row_blocks(
    q: Tensor, k: Tensor, reach: Tensor | None, config: GPTConfig
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """t queries at a time, with the T' keys of their sequence up to the last of them: scores x and
    weights A, (nh, t, T') each, and the causal mask between them, bool (t, T')."""
    variant, L = parse_attn_type(config.attn_type), config.pa_length
    divisor = float(L) ** config.pa_length_power if L and reach is None else 1.0
    for b in range(q.size(0)):
        for i in range(0, q.size(2), ROWS):
            block = q[b, :, i : i + ROWS], k[b, :, : i + ROWS]
            x = scores(*block, variant.score if variant else "dot")
            causal = torch.ones(x.shape[1:], dtype=torch.bool, device=x.device).tril(i)
            if variant is None:
                biased = x if reach is None else x + decay.bias(x[None], x.size(-1), None, reach)
                A = biased.masked_fill(~causal, -math.inf).softmax(-1)
            else:
                if variant.score == "distance":
                    x = x.clamp(max=0)  # above 0 there are rounding errors only
                A = variant.f(x).masked_fill(~causal, 0) / divisor
                A = decay.apply(A[None], None, reach)[0]
                if config.attn_normalize:
                    share = decay.apply(causal.to(A.dtype).expand_as(A)[None], None, reach)[0]
                    rest, terms = 1 - A.sum(-1, keepdim=True), config.attn_normalize
                    A = A * sum(rest**n for n in range(terms)) + share * rest**terms
            yield x, causal, A


def measure(model: GPT, idx: Tensor, rt) -> list[dict]:
    """The rows of stats.csv, without the step, for token ids (B, T). See each_layer for `model`."""
    config = model.config
    layers = each_layer(model, idx, rt, lambda *qkr: of_layer(*qkr, config).tolist())
    has_entropy, has_range = config.attn_type == "SM", squarings(config.attn_type)
    empty = ([] if has_range else ["outside"]) + ([] if has_entropy else ["entropy"])
    return [
        dict(zip(COLUMNS[1:], (layer, head, *numbers), strict=True)) | dict.fromkeys(empty)
        for layer, heads in enumerate(layers)
        for head, numbers in enumerate(heads)
    ]


def of_layer(q: Tensor, k: Tensor, reach: Tensor | None, config: GPTConfig) -> Tensor:
    """The numbers of COLUMNS after `head`, from q and k (B, nh, T, hs): a row for each head. Memory
    holds one block of rows, a few numbers of every row, and the sample for the percentiles."""
    B, _, T, _ = q.shape
    n_scores = B * T * (T + 1) // 2
    stride = math.ceil(n_scores / SAMPLE)
    n = squarings(config.attn_type)
    lowest = range_end(n) if n else -math.inf
    blocks = defaultdict(list)
    for x, causal, A in row_blocks(q, k, reach, config):
        n_queries, n_keys = causal.shape
        sampled = slice((n_queries - n_keys) % stride, None, stride)  # rows 0, stride, ...
        blocks["sample"].append(x[:, sampled][:, causal[sampled]])
        # One number for each row, (nh, t)
        blocks["low"].append(x.masked_fill(~causal, math.inf).amin(-1))
        blocks["high"].append(x.masked_fill(~causal, -math.inf).amax(-1))
        blocks["outside"].append((~(x >= lowest) & causal).sum(-1))  # counts NaN too
        blocks["A"].append(A.abs().amax(-1))
        blocks["sum"].append(A.sum(-1))
        blocks["entropy"].append(torch.special.entr(A).sum(-1))
    of = {name: torch.cat(parts, dim=-1) for name, parts in blocks.items()}  # (nh, B T)
    levels = torch.tensor(PERCENTILES, device=q.device, dtype=q.dtype) / 100
    numbers = [of["low"].amin(-1), *of["sample"].quantile(levels, dim=-1), of["high"].amax(-1)]
    numbers += [of["outside"].sum(-1) / n_scores, of["A"].amax(-1)]
    numbers += [of["sum"].amin(-1), of["sum"].mean(-1), of["sum"].amax(-1), of["entropy"].mean(-1)]
    for norms in (q.norm(dim=-1), k.norm(dim=-1)):  # (B, nh, T)
        numbers += [norms.mean((0, 2)), norms.amax((0, 2))]
    return torch.stack([number.to(q.dtype) for number in numbers], dim=-1)


def attention_maps(model: GPT, idx: Tensor, rt) -> list[Tensor]:
    """A of each layer, (nh, T, T), for the token ids (1, T) of one text with T <= ROWS."""
    first_block = lambda *qkr: next(row_blocks(*qkr, model.config))
    return [A.cpu() for _, _, A in each_layer(model, idx, rt, first_block)]


def per_layer(rows: list[dict]) -> dict[str, float]:
    """Some numbers of one step, {'x_min/layer0': ...}: extremes, or the mean entropy, of heads."""
    reductions = {"x_min": min, "x_max": max, "A_max": max, "outside": max, "entropy": fmean}
    values = defaultdict(list)
    for row in rows:
        for name in reductions:
            if row[name] is not None:
                values[name, row["layer"]].append(row[name])
    return {f"{name}/layer{i}": reductions[name](heads) for (name, i), heads in values.items()}


def polynomial_error(n: int, low: float, high: float) -> float:
    """The largest |(1 + x / 2^n)^(2^n) - exp(x)| at 40,000 points x from `low` to `high`."""
    even = torch.linspace(0, 1, 20001, dtype=torch.float64)
    dense_at_high = torch.logspace(-9, 0, 20001, dtype=torch.float64)  # for low = -10000 or so
    x = torch.cat([low + (high - low) * even, high - (high - low) * dense_at_high])
    return (gaussian_poly(x, n) - x.exp()).abs().max().item()


def least_n(fits: Callable[[int], bool]) -> str:
    """'n=...' with the least n for which GKpoly-n `fits`."""
    n = next((n for n in range(1, MAX_N + 1) if fits(n)), None)
    return f"n={n}" if n else f"more than n={MAX_N}"


def summary(rows: list[dict], attn_type: str, tolerance: float) -> str:
    """One line about the last step in stats.csv: the range of x, and for GK and GKpoly-n which n
    has that range and which one keeps the polynomial's error below `tolerance`."""
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    lows, highs = ([float(row[name]) for row in last] for name in ("x_min", "x_max"))
    low, high, n = min(lows), max(highs), squarings(attn_type)
    line = f"scores x at step {rows[-1]['step']}: {low:.4g} to {high:.4g}"
    line += f", largest |x| {max(-low, high):.4g}"
    if attn_type != "GK" and n is None:
        return line
    if not all(map(math.isfinite, lows + highs)):  # min and max may miss a NaN
        return f"{line}: no polynomial follows exp there"
    in_range = least_n(lambda n: range_end(n) <= low)
    precise = least_n(lambda n: polynomial_error(n, low, high) < tolerance)
    needs = f"{precise} for an error below {tolerance:g}, {in_range} for the range alone"
    if n is None:
        return f"{line}; a polynomial GKpoly-n needs {needs}"
    range_text = f"{attn_type}'s range {range_end(n)} to 0"
    error = f"error against exp up to {polynomial_error(n, low, high):.2g}; it takes {needs}"
    steps = {row["step"] for row in rows}
    steps_outside = {row["step"] for row in rows if float(row["outside"]) != 0}  # or NaN
    if not steps_outside:
        return f"{line}; all in {range_text}, {error}"
    share = max(float(row["outside"]) for row in last)
    line += f"; out of {range_text} at {len(steps_outside)} of {len(steps)} measured steps"
    return f"{line}, at the last one up to {share:.2%} of a head's x; {error}"
