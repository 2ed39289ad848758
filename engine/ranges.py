"""
The numbers that a model's attention computes with, head by head: scores, weights, queries and keys.

Whoever puts GKpoly-n in the place of GK, or evaluates a model under encryption, must know how far
they reach: a polynomial is right on an interval only.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model import GPT, MAX_N, Pointwise, gaussian_poly, parse_attn_type, scores

ROWS = 128  # queries at a time, so that (nh, ROWS, T) numbers are in memory
SAMPLE = 2**18  # percentiles are exact up to so many scores of a head, then those of every s-th row
PERCENTILES = (1, 10, 50, 90, 99)

# One row of stats.csv for each step, layer and head, these counted from 0. Scores x[i, j] are those
# with j <= i; |q| and |k| are Euclidean norms.
COLUMNS = (
    "step layer head "
    "x_min x_p1 x_p10 x_p50 x_p90 x_p99 x_max "  # smallest score, percentiles, largest
    "outside "  # share of x below GKpoly-n's range; empty for others
    "A_max row_min row_mean row_max "  # largest |A[i, j]|; sums of the rows of A
    "entropy "  # of SM's rows, mean, in nats; empty for others
    "q_mean q_max k_mean k_max"
).split()


def squarings(attn_type: str) -> int | None:
    """n of GKpoly-n; None for others."""
    match = re.fullmatch(r"GKpoly-(\d+)", attn_type)
    return int(match[1]) if match else None


def range_end(n: int) -> int:
    """The least x at which GKpoly-n still follows exp, if only just: beyond it exceeds 1."""
    return -(2 ** (n + 1))


@torch.no_grad()
def each_layer(model: GPT, idx: Tensor, rt, look: Callable[[Tensor, Tensor], None]) -> None:
    """Call look(q, k), both (B, nh, T, hs) and at least float32, for each layer from the first on.

    `idx` (B, T) are token ids. `model` is the plain one, neither compiled nor under DDP; it is in
    eval mode for as long as this takes.
    """

    def hook(module, inputs, output):
        B, T, C = output.size(0), output.size(1), output.size(2) // 3
        nh = model.config.n_head
        wide = torch.promote_types(output.dtype, torch.float32)
        q, k, _ = (
            t.view(B, T, nh, C // nh).transpose(1, 2).to(wide) for t in output.split(C, dim=2)
        )
        with torch.autocast(q.device.type, enabled=False):  # or scores would be half precision
            look(q, k)

    handles = [block.attn.c_attn.register_forward_hook(hook) for block in model.transformer.h]
    training = model.training
    model.eval()
    try:
        with rt.autocast():
            model.hidden(idx, torch.arange(idx.size(1), device=idx.device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def row_blocks(q: Tensor, k: Tensor, variant: Pointwise | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The scores of some rows of one sequence after the other, x (nh, t, T'), with the mask, bool
    (t, T'), of those that count: T' keys, of which the t queries are the last."""
    score = "dot" if variant is None else variant.score
    for b in range(q.size(0)):
        for i in range(0, q.size(2), ROWS):
            x = scores(q[b, :, i : i + ROWS], k[b, :, : i + ROWS], score)
            if score == "distance":
                x = x.clamp(max=0)  # what is above is rounding
            yield x, torch.ones(x.shape[1:], dtype=torch.bool, device=x.device).tril(i)


def weights(x: Tensor, causal: Tensor, variant: Pointwise | None, divisor: float) -> Tensor:
    """A of the scores of a row block, (nh, t, T')."""
    if variant is None:
        return x.masked_fill(~causal, -math.inf).softmax(-1)
    return variant.f(x).masked_fill(~causal, 0) / divisor


def attention_of(model: GPT) -> tuple[Pointwise | None, float]:
    """The formula of a model's attention, and what its weights are divided by."""
    config = model.config
    L = config.pa_length  # None for those that aren't divided
    return parse_attn_type(config.attn_type), float(L) ** config.pa_length_power if L else 1.0


def measure(model: GPT, idx: Tensor, rt) -> list[dict]:
    """Rows of stats.csv, without the step, of token ids (B, T). See each_layer for `model`."""
    variant, divisor = attention_of(model)
    n = squarings(model.config.attn_type)
    end = range_end(n) if n else -math.inf
    layers = []
    each_layer(
        model, idx, rt, lambda q, k: layers.append(of_layer(q, k, variant, divisor, end).tolist())
    )
    rows = [
        dict(zip(COLUMNS[1:], (layer, head, *numbers), strict=True))
        for layer, heads in enumerate(layers)
        for head, numbers in enumerate(heads)
    ]
    means_nothing = ([] if n else ["outside"]) + (["entropy"] if variant else [])
    return [row | dict.fromkeys(means_nothing) for row in rows]


def of_layer(q, k, variant: Pointwise | None, divisor: float, end: float) -> Tensor:
    """The numbers of COLUMNS behind `head`: (B, nh, T, hs) x 2 -> (nh, their number).

    `end` is the least x inside the range. In memory are a block of rows, a few numbers of each row
    and the sample.
    """
    B, _, T, _ = q.shape
    pairs = B * T * (T + 1) // 2
    stride = math.ceil(pairs / SAMPLE)
    found = defaultdict(list)
    for x, causal in row_blocks(q, k, variant):
        t, seen = causal.shape
        kept = slice((t - seen) % stride, None, stride)  # rows 0, stride, ... of the sequence
        found["sample"].append(x[:, kept][:, causal[kept]])
        # Of each row, (nh, t)
        A = weights(x, causal, variant, divisor)
        found["low"].append(x.masked_fill(~causal, math.inf).amin(-1))
        found["high"].append(x.masked_fill(~causal, -math.inf).amax(-1))
        found["outside"].append((~(x >= end) & causal).sum(-1))  # NaN too
        found["A"].append(A.abs().amax(-1))
        found["sum"].append(A.sum(-1))
        found["entropy"].append(torch.special.entr(A).sum(-1))
    of = {name: torch.cat(parts, dim=-1) for name, parts in found.items()}  # (nh, B T)
    levels = torch.tensor(PERCENTILES, device=q.device, dtype=q.dtype) / 100
    numbers = [of["low"].amin(-1), *of["sample"].quantile(levels, dim=-1), of["high"].amax(-1)]
    numbers += [of["outside"].sum(-1) / pairs, of["A"].amax(-1)]
    numbers += [of["sum"].amin(-1), of["sum"].mean(-1), of["sum"].amax(-1), of["entropy"].mean(-1)]
    for norm in (q.norm(dim=-1), k.norm(dim=-1)):  # (B, nh, T)
        numbers += [norm.mean((0, 2)), norm.amax((0, 2))]
    return torch.stack([number.to(q.dtype) for number in numbers], dim=-1)


def maps(model: GPT, idx: Tensor, rt) -> list[Tensor]:
    """A of each layer, (nh, T, T), for the ids (1, T) of a text with T <= ROWS."""
    variant, divisor = attention_of(model)
    found = []

    def look(q, k):
        ((x, causal),) = row_blocks(q, k, variant)
        found.append(weights(x, causal, variant, divisor).cpu())

    each_layer(model, idx, rt, look)
    return found


# ----------------------------------------------------------------------------
# What the numbers say


def per_layer(rows: list[dict]) -> dict[str, float]:
    """A few of the numbers of one step, the most extreme of a layer's heads: {'x_min/layer0': ...}.

    Of the entropy, which only SM has, the mean.
    """
    layers, told = defaultdict(list), {}
    for row in rows:
        layers[row["layer"]].append(row)
    mean = lambda values: math.fsum(values) / len(values)
    for layer, heads in layers.items():
        for name, of in {"x_min": min, "x_max": max, "A_max": max}.items():
            told[f"{name}/layer{layer}"] = of(row[name] for row in heads)
        for name, of in {"outside": max, "entropy": mean}.items():
            if heads[0][name] is not None:
                told[f"{name}/layer{layer}"] = of([row[name] for row in heads])
    return told


def error_of(n: int, low: float, high: float) -> float:
    """The largest |(1 + x / 2^n)^(2^n) - exp(x)| for low <= x <= high, of 40,000 such x."""
    even = torch.linspace(0, 1, 20001, dtype=torch.float64)
    dense_at_high = torch.logspace(-9, 0, 20001, dtype=torch.float64)  # for low = -10000 or so
    x = torch.cat([low + (high - low) * even, high - (high - low) * dense_at_high])
    return (gaussian_poly(x, n) - x.exp()).abs().max().item()


def least_n(fits: Callable[[int], bool]) -> str:
    """'n=...' with the least n of a GKpoly-n that `fits`."""
    n = next((n for n in range(1, MAX_N + 1) if fits(n)), None)
    return f"n={n}" if n else f"more than n={MAX_N}"


def summary(rows: list[dict], attn_type: str, tolerance: float) -> str:
    """One line on the last step of some rows of stats.csv: the range of x, and for GK and GKpoly-n
    which n has the range and which keeps the error of the polynomial below `tolerance`."""
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    low, high = min(float(r["x_min"]) for r in last), max(float(r["x_max"]) for r in last)
    told = f"scores x at step {rows[-1]['step']}: {low:.4g} to {high:.4g}"
    told += f", largest |x| {max(-low, high):.4g}"
    finite = all(math.isfinite(float(r[name])) for r in last for name in ("x_min", "x_max"))
    if attn_type != "GK" and not squarings(attn_type):
        return told
    if not finite:  # min and max see a NaN or not, by where it stands
        return f"{told}: no polynomial follows exp there"
    in_range = least_n(lambda n: range_end(n) <= low)
    precise = least_n(lambda n: error_of(n, low, high) < tolerance)
    needs = f"{precise} for an error below {tolerance:g}, {in_range} for the range alone"
    n = squarings(attn_type)
    if n is None:
        return f"{told}; a polynomial GKpoly-n needs {needs}"
    steps = {row["step"] for row in rows}
    left = {row["step"] for row in rows if not float(row["outside"]) == 0}
    where = f"{attn_type}'s range {range_end(n)} to 0"
    error = f"error against exp up to {error_of(n, low, high):.2g}; it takes {needs}"
    if not left:
        return f"{told}; all in {where}, {error}"
    share = max(float(row["outside"]) for row in last)
    return (
        f"{told}; out of {where} at {len(left)} of {len(steps)} steps measured, at the last up to "
        f"{share:.2%} of a head's x; {error}"
    )
