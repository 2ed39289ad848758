"""
Pictures, each as PNG and SVG, from what train.py, bench.py and compare.py wrote.

    python plot.py loss OUT [OUT ...]       # losses of runs against tokens       -> loss.png
    python plot.py bench bench.json         # the tables of bench.py --out=...    -> bench-*.png
    python plot.py ranges OUT               # scores during training (stats.csv)  -> ranges.png
    python plot.py attention OUT --start="def main():"    # weights A of a text   -> attention-*.png
    python plot.py kernel GKpoly-4 GK --min=-40 --max=0   # pointwise functions   -> kernel.png
    python plot.py kernel GKpoly-4 GK --run=OUT           # over the range of OUT's scores
    python plot.py compare DIR              # attentions at their best rates      -> compare-*.png

Pictures are written to the current folder (those of a comparison to its own folder), or to the
folder that --to=FOLDER names.
"""

import json
import math
import os
import sys
from pathlib import Path

import configurator
from configurator import UserError
from engine import pictures
from engine.comparison import draw_comparison


def draw_bench(file: str, to: Path) -> None:
    """Draw the tables in one JSON file of bench.py: curves against T, and bars for attentions."""
    try:
        results = json.loads(Path(file).read_text(encoding="utf-8"))
        machine = results["machine"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} was not written by bench.py --out: {error}") from error
    if "attention" in results:
        title = f"Attention alone; dots: fused, crosses: plain formula ({machine})"
        labels = {"times_SDPA": "forward + backward (time of SM = 1)"}
        labels["peak_MiB"] = "peak memory (MiB)"
        draw_against_length(results["attention"], labels, title, to, "bench-attention")
    if "types" in results:
        title = f"Speed of a training step by attention ({machine})"
        figure, (axis,) = pictures.new_figure(1, title)
        names = [row["attn_type"] for row in results["types"]]
        looks = pictures.line_looks(names)
        speeds = [row["tokens_per_s"] for row in results["types"]]
        bars = axis.barh(names, speeds, color=[looks[name]["color"] for name in names])
        axis.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2)
        axis.invert_yaxis()
        axis.set_xlabel("tokens/s (longer is faster)")
        pictures.save_figure(figure, to, "bench-types")
    if "lengths" in results:
        title = f"Speed of a training step against sequence length ({machine})"
        labels = {"tokens_per_s": "tokens/s"}
        draw_against_length(results["lengths"], labels, title, to, "bench-lengths")


def draw_against_length(rows: list[dict], labels: dict, title: str, to: Path, name: str) -> None:
    """Draw each column in `labels` against T on logarithmic axes, a line for each attn_type and
    implementation."""
    from matplotlib.ticker import LogFormatter

    looks = pictures.line_looks([row["attn_type"] for row in rows])
    figure, axes = pictures.new_figure(len(labels), title)
    for axis, (column, label) in zip(axes, labels.items(), strict=True):
        curves = {}
        for row in rows:
            curve = curves.setdefault((row["attn_type"], row.get("impl")), [])
            if row[column]:
                curve.append((row["T"], row[column]))
        for (attn_type, impl), points in curves.items():
            look = looks[attn_type] | {"marker": "o", "markersize": 4, "label": attn_type}
            if impl == "reference" and attn_type != "SM":
                look = looks[attn_type] | {"alpha": 0.4, "marker": "x", "linewidth": 0.8}
            axis.plot([T for T, _ in points], [y for _, y in points], **look)
        axis.set_xscale("log", base=2)
        axis.set(yscale="log", xlabel="sequence length T (tokens)", ylabel=label)
        axis.set_xticks(sorted({row["T"] for row in rows}))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter(LogFormatter())  # 0.8 and 100, not 8 x 10^-1 and 10^2
        axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    pictures.legend_beside(figure, axes[0])
    pictures.save_figure(figure, to, name)


def draw_attention(folder: str, to: Path, start: str) -> None:
    """Draw A of each head on the first 40 tokens of a text, a picture for each layer."""
    if not start:
        raise UserError('attention needs a text: python plot.py attention OUT --start="Some text"')
    import torch

    from engine import ranges
    from engine.loading import encode_prompt, load
    from engine.runtime import Runtime

    model, tokenizer = load(folder)
    ids = torch.as_tensor(encode_prompt(tokenizer, start))[: min(40, model.config.block_size)]
    tokens = [repr(tokenizer.decode([i]))[1:-1].replace(" ", "\u2423") for i in ids.tolist()]
    rotation, small = 90 * (max(map(len, tokens)) > 2), {"fontsize": 6, "parse_math": False}
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    label = pictures.run_label(model.config.attn_type, Path(folder).name)
    side = max(3, 1.3 + 0.1 * len(ids))  # inches
    maps = ranges.attention_maps(model, ids[None], Runtime("cpu", "float32", False))
    for layer, A in enumerate(maps):  # (nh, T, T)
        title = f"{label}, layer {layer}: weight A of each key for each query"
        figure, axes = pictures.new_figure(len(A), title, (side + 0.3, side))
        look, scale = map_look(A.numpy(), model.config.attn_type)
        for head, axis in enumerate(axes):
            axis.grid(False)
            shown = A[head].clamp(min=look["norm"].vmin).masked_fill(future, math.nan)
            image = axis.imshow(shown.numpy(), **look)
            axis.set_title(f"head {head}", fontsize=9)
            axis.set_xticks(range(len(ids)), tokens, rotation=rotation, **small)
            axis.set_yticks(range(len(ids)), tokens, **small)
            axis.tick_params(length=0, pad=2)
            axis.set_xlabel("key j (token)", fontsize=9)
            axis.set_ylabel("query i (token)", fontsize=9)
        extend = "neither" if look["norm"].vmin < 0 else "min"
        figure.colorbar(image, ax=list(axes), label=scale, shrink=0.8, extend=extend)
        pictures.save_figure(figure, to, f"attention-{layer}")


def map_look(A, attn_type: str) -> tuple[dict, str]:
    """How imshow draws the weights of a layer, and the label that explains it. Negative weights are
    blue and positive ones red; where there are none, the smallest are dark."""
    import numpy as np
    from matplotlib import colors

    top = np.abs(A[np.isfinite(A)]).max(initial=1e-30)
    if A.min() < 0:
        norm = colors.SymLogNorm(top / 100, vmin=-top, vmax=top)
        return {"norm": norm, "cmap": "RdBu_r"}, "A (log scale on\nboth sides of 0)"
    label = "each row sums to 1" if attn_type == "SM" else "rows are not normalised"
    return {"norm": colors.LogNorm(top / 1e3, top), "cmap": "viridis"}, f"A (log scale)\n{label}"


def draw_kernels(names: list[str], to: Path, **options: str) -> None:
    """Draw pointwise functions over a range of scores, and the errors of GK's polynomials."""
    import torch

    from model import parse_attn_type

    try:
        variants = {name: parse_attn_type(name) for name in names}
        limits = {key: float(options[key]) for key in ("min", "max") if key in options}
    except ValueError as error:
        raise UserError(error) from error
    if None in variants.values():
        raise UserError("SM is not a pointwise function; leave it out")
    kernels = [name for name in names if variants[name].score == "distance"]  # of x <= 0 only
    polynomials = [name for name in kernels if name != "GK"]
    low, high = (-40.0, 0.0) if len(kernels) == len(names) else (-5.0, 5.0)
    title = "Pointwise functions of the score x"
    if "run" in options:
        folder = Path(options["run"])
        rows = pictures.read_stats(folder)
        last = [row for row in rows if row["step"] == rows[-1]["step"]]
        low, high = min(row["x_min"] for row in last), max(row["x_max"] for row in last)
        title += f" over its range in {folder.name}, step {rows[-1]['step']:.0f}"
    low, high = limits.get("min", low), limits.get("max", high)
    if not (low < high and math.isfinite(high - low)) or (kernels and low >= 0):
        raise UserError(f"the scores from {low:g} to {high:g} are no range; pass --min= and --max=")

    title += "; right: error of the polynomials against exp" if polynomials else ""
    figure, axes = pictures.new_figure(1 + bool(polynomials), title)
    looks = pictures.line_looks(names)
    negative_x, all_x = (torch.linspace(low, end, 2001).double() for end in (min(high, 0), high))
    heights = []  # that must be in sight; beyond their range polynomials explode
    for name in names:
        x = negative_x if name in kernels else all_x
        y, top = variants[name].f(x), 1.5 * math.exp(min(high, 0))
        axes[0].plot(x, y, **looks[name], label=name)
        heights += [-0.1 * top, top] if name in kernels else [y.min().item(), y.max().item()]
        if name in polynomials:
            axes[1].plot(x, (y - x.exp()).abs().clamp(1e-12), **looks[name])
    axes[0].set(ylim=(min(heights), max(heights)), ylabel="f(x)")
    if polynomials:
        look = {"color": "black", "linewidth": 0.8, "linestyle": ":", "label": "exp(x)"}
        axes[0].plot(negative_x, negative_x.exp(), **look)
        axes[1].set(yscale="log", ylim=(1e-8, None), ylabel="|f(x) - exp(x)|")
    for axis in axes:
        axis.set(xlabel="score x", xlim=(low, high))
    pictures.legend_beside(figure, axes[0])
    pictures.save_figure(figure, to, "kernel")


COMMANDS = {  # draw(names, to, **options)
    "loss": lambda names, to: pictures.draw_losses([Path(name) for name in names], to),
    "bench": lambda names, to: draw_bench(names[0], to),
    "compare": lambda names, to: draw_comparison(Path(names[0]), to),
    "ranges": lambda names, to: pictures.draw_ranges(Path(names[0]), to),
    "attention": lambda names, to, start="": draw_attention(names[0], to, start),
    "kernel": draw_kernels,
}
OPTIONS = {"attention": ("start",), "kernel": ("min", "max", "run")}


def main() -> None:
    args = sys.argv[1:]
    if {"--help", "-h"} & set(args):
        print(__doc__.strip())
        return
    options = dict(arg[2:].partition("=")[::2] for arg in args if arg.startswith("--"))
    options |= {key: os.path.expanduser(options[key]) for key in ("to", "run") if key in options}
    names = [arg for arg in args if not arg.startswith("--")]
    if len(names) < 2 or names[0] not in COMMANDS:
        usage = f"python plot.py [{'|'.join(COMMANDS)}] OUT_OR_FILE ..."
        raise UserError(f"{' '.join(args)!r}: {usage}")
    command, *names = names
    known = ("to", *OPTIONS.get(command, ()))
    if unknown := options.keys() - set(known):
        allowed = ", ".join(f"--{key}=..." for key in known)
        raise UserError(f"unknown option --{min(unknown)}; plot.py {command} knows {allowed}")
    if command not in ("loss", "kernel") and len(names) > 1:
        raise UserError(f"plot.py {command} takes one name, not {len(names)}: {' '.join(names)}")
    # The report of a comparison shows its pictures
    to = Path(options.pop("to", names[0] if command == "compare" else "."))
    try:
        COMMANDS[command](names, to, **options)
    except ImportError as error:
        raise UserError(f"{error}; pip install matplotlib") from error
    except OSError as error:
        problem = f"{error.filename or to} can't be written ({error.strerror})"
        raise UserError(f"{problem}; choose another folder with --to=") from error


if __name__ == "__main__":
    configurator.run(main)
