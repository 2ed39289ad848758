"""
Pictures, each as PNG and SVG, from what train.py, bench.py and compare.py wrote.

    python plot.py loss OUT [OUT ...]       # losses of runs against tokens      -> loss.png
    python plot.py bench bench.json         # the tables of bench.py --out=...   -> bench-*.png
    python plot.py ranges OUT               # scores in training, of stats.csv   -> ranges.png
    python plot.py attention OUT --start="def main():"    # weights A of a text  -> attention-*.png
    python plot.py kernel GKpoly-4 GK --min=-40 --max=0   # pointwise functions  -> kernel.png
    python plot.py kernel GKpoly-4 GK --run=OUT           # where OUT's scores are
    python plot.py compare DIR              # attentions at their best rates     -> compare-*.png

They go to the current folder (of a comparison: to its own), or to the one that --to=FOLDER names.
"""

import csv
import json
import math
import sys
from pathlib import Path
from statistics import mean

import configurator
from configurator import UserError

# Okabe and Ito's colours, which colour-blind people can tell apart; softmax is always black
COLOURS = ["#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"]
STYLES = ["-", "--", ":"]  # a second and a third attn_type of one colour
MARKERS = "osD^vP*Xphd<>"
COMPARISONS = {  # the pictures of a comparison, and what they show
    "compare-tokens": "Validation loss against tokens",
    "compare-seconds": "Validation loss against training time",
    "compare-rates": "Validation loss against learning rate",
}


def look_of(attn_types: list[str]) -> dict:
    """Colour and line style for each attn_type."""
    others = [t for t in dict.fromkeys(attn_types) if t != "SM"]
    looks = {
        t: {"color": COLOURS[i % 6], "linestyle": STYLES[i // 6 % 3]} for i, t in enumerate(others)
    }
    return {"SM": {"color": "black", "linestyle": "-"}, **looks}


def new_figure(columns: int, title: str, rows: int = 1, size: tuple = (5.2, 4)):
    """A figure of rows x columns panels of `size` inches and one line that says what is seen; the
    panels as one array."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figsize = (size[0] * columns, size[1] * rows)
    figure, axes = plt.subplots(rows, columns, figsize=figsize, squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axis in axes.flat:
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes.ravel()


def save(figure, folder: Path, name: str) -> None:
    import matplotlib.pyplot as plt

    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=120, bbox_inches="tight")
    plt.close(figure)
    print(f"{folder / name}.png and .svg")


def read_run(folder: Path, name: str) -> tuple[str, list[dict]]:
    """The attn_type of a run and the rows of its log `name`."""
    try:
        with open(folder / name, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config["attn_type"], rows
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is not the folder of a run: {error}") from error


def read_stats(folder: Path) -> tuple[str, list[dict]]:
    """The attn_type of a run and the rows of its stats.csv as numbers."""
    if not (folder / "stats.csv").exists():
        raise UserError(
            f"{folder} has no stats.csv; train with --stats_interval=N, or measure a run that is "
            f"done with  python train.py --init_from=resume --out_dir={folder} --stats_interval=1"
        )
    attn_type, rows = read_run(folder, "stats.csv")
    try:
        rows = [{k: float(v) if v else math.nan for k, v in row.items()} for row in rows]
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}/stats.csv is damaged: {error}") from error
    if not rows:
        raise UserError(f"{folder}/stats.csv has no rows yet")
    return attn_type, rows


def options_of(args: list[str], *known: str, names: int = 0) -> tuple[list[str], dict[str, str]]:
    """What in `args` is no option, and the options, written --key=value. Raises UserError for an
    unknown one, and where there are not as many others as `names` (0: any number)."""
    options = dict(a[2:].partition("=")[::2] for a in args if a.startswith("--"))
    others = [a for a in args if not a.startswith("--")]
    if unknown := options.keys() - set(known):
        told = ", ".join(f"--{key}=..." for key in ("to", *known))
        raise UserError(f"unknown option --{min(unknown)}; there is {told}")
    if len(others) != (names or len(others)) or not others:
        raise UserError(f"{' '.join(others)!r} should be {names or 'one or more'} name(s)")
    return others, options


def plot_loss(folders: list[str], to: Path) -> None:
    """Validation loss (points) and training loss (thin) of each run against tokens. Of several, it
    is told how many tokens each needed for the last loss of the first."""
    runs = {folder: read_run(folder, "log.csv") for folder in map(Path, folders)}
    figure, (axis,) = new_figure(
        1, "Loss against tokens: dots on validation data, thin in training"
    )
    attn_types = [attn_type for attn_type, _ in runs.values()]
    # A colour for each attention, and a line style for each of its runs; or if there is only one
    # attention, a colour for each run
    by_run = len(set(attn_types)) == 1 < len(runs)
    looks = look_of([str(folder) for folder in runs] if by_run else attn_types)
    for i, (folder, (attn_type, rows)) in enumerate(runs.items()):
        name = attn_type if attn_type == folder.name else f"{attn_type} ({folder})"
        look = looks[str(folder) if by_run else attn_type]
        if not by_run and (before := attn_types[:i].count(attn_type)):
            look = look | {"linestyle": STYLES[before % 3]}
        for column, style in (
            ("train_loss", {"linewidth": 0.6, "alpha": 0.5}),
            ("val_loss", {"marker": "o", "markersize": 3, "label": name}),
        ):
            points = [(int(r["tokens"]) / 1e6, float(r[column])) for r in rows if r[column]]
            if len(points) > 1 and points[0][0] == 0:  # before the first step, far above the rest
                points = points[1:]
            axis.plot(*zip(*points, strict=True), **look | style)
    axis.set_xlabel("tokens seen (millions)")
    axis.set_ylabel("loss (nats per token)")
    axis.legend(frameon=False, fontsize=8)
    save(figure, to, "loss")
    first, *others = ((folder, evaluations(rows)) for folder, (_, rows) in runs.items())
    for folder, points in others:
        print(reached(folder, points, *first))


def evaluations(rows: list[dict]) -> list[tuple[int, float]]:
    """Tokens and validation loss of a log's evaluations."""
    return [(int(r["tokens"]), float(r["val_loss"])) for r in rows if r["val_loss"]]


def reached(folder: Path, points: list, other: Path, other_points: list) -> str:
    """After how many tokens an evaluation of a run first found the last loss of another one."""
    if not other_points:
        return f"{other} has no validation loss"
    budget, goal = other_points[-1]
    told = f"the {goal:.4f} that {other} has after {budget:,} tokens"
    tokens = next((tokens for tokens, loss in points if loss <= goal), None)
    if tokens is None:
        return f"{folder} does not come to {told}"
    return f"{folder} comes to {told} after {tokens:,}, {tokens / max(1, budget):.2f} of them"


def plot_bench(files: list[str], to: Path) -> None:
    """The tables of one JSON file of bench.py: time against T, and bars for the attentions."""
    for name in files:
        try:
            results = json.loads(Path(name).read_text(encoding="utf-8"))
            machine = results["machine"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{name} is no file of bench.py --out: {error}") from error
        if "attention" in results:
            rows = results["attention"]
            title = f"Attention alone: dots are fused, crosses the plain formula ({machine})"
            figure, axes = new_figure(2, title)
            lines(axes[0], rows, "times_SDPA", "forward + backward (time of SM = 1)")
            lines(axes[1], rows, "peak_MiB", "peak memory (MiB)")
            legend_beside(figure, axes[0])
            save(figure, to, "bench-attention")
        if "types" in results:
            rows = results["types"]
            figure, (axis,) = new_figure(1, f"Training step by attention ({machine})")
            looks = look_of([row["attn_type"] for row in rows])
            names = [row["attn_type"] for row in rows]
            colours = [looks[n]["color"] for n in names]
            bars = axis.barh(names, [row["tokens_per_s"] for row in rows], color=colours)
            axis.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2)
            axis.invert_yaxis()
            axis.set_xlabel("tokens/s (longer is faster)")
            save(figure, to, "bench-types")
        if "lengths" in results:
            figure, (axis,) = new_figure(1, f"Training step against sequence length ({machine})")
            lines(axis, results["lengths"], "tokens_per_s", "tokens/s")
            legend_beside(figure, axis)
            save(figure, to, "bench-lengths")


def read_results(folder: Path) -> list[dict]:
    """The rows of a comparison's results.csv: numbers as float, None where there is none."""
    try:
        with open(folder / "results.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["diverged"] = row["diverged"] == "True"
            for key in row.keys() - {"attn_type", "run", "diverged"}:
                row[key] = float(row[key]) if row[key] else None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is not the folder of a comparison: {error}") from error
    return rows


def best_rates(rows: list[dict]) -> dict[str, float]:
    """For each attn_type the learning rate at which the mean over seeds of the final validation
    loss is lowest, of those at which no seed diverged; types that have none are left out."""
    best = {}
    for attn_type in dict.fromkeys(row["attn_type"] for row in rows):
        losses = {}
        for row in (row for row in rows if row["attn_type"] == attn_type):
            loss = math.inf if row["diverged"] else row["final_val_loss"]
            losses.setdefault(row["learning_rate"], []).append(loss)
        rate = min(losses, key=lambda rate: mean(losses[rate]))
        if math.isfinite(mean(losses[rate])):
            best[attn_type] = rate
    return best


def plot_compare(folders: list[str], to: Path) -> None:
    """The three pictures of a comparison: means over seeds, and bands from the lowest to the
    highest."""
    for folder in map(Path, folders):
        rows = read_results(folder)
        best = best_rates(rows)
        logs = {row["run"]: read_log(folder / row["run"]) for row in rows if not row["diverged"]}
        looks = look_of(list(dict.fromkeys(row["attn_type"] for row in rows)))
        for (_, look), marker in zip(looks.items(), MARKERS * 3, strict=False):
            look |= {"marker": marker, "markersize": 4}
        for name, column, unit, label in (
            ("compare-tokens", "tokens", 1e6, "tokens seen (millions)"),
            ("compare-seconds", "seconds", 1, "time in training steps (s)"),
        ):
            curves = {}
            for attn_type, rate in best.items():
                mine = [
                    r for r in rows if (r["attn_type"], r["learning_rate"]) == (attn_type, rate)
                ]
                # Without the first evaluation, of random weights, which would squeeze the others
                seeds = [[p for p in logs[r["run"]] if p["val_loss"]][1:] for r in mine]
                curves[attn_type] = [
                    (mean(float(p[column]) / unit for p in at), [float(p["val_loss"]) for p in at])
                    for at in zip(*seeds, strict=False)
                ]
            figure, (axis,) = new_figure(1, f"{COMPARISONS[name]}, each at its best learning rate")
            bands(axis, curves, looks)
            axis.set_xlabel(label)
            save(figure, to, name)

        curves = {}
        for row in (row for row in rows if not row["diverged"]):
            at = curves.setdefault(row["attn_type"], {}).setdefault(row["learning_rate"], [])
            at.append(row["final_val_loss"])
        figure, (axis,) = new_figure(1, f"{COMPARISONS['compare-rates']}, without what diverged")
        axis.set_xscale("log")
        bands(axis, {t: sorted(at.items()) for t, at in curves.items()}, looks)
        rates = sorted({row["learning_rate"] for row in rows})
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        axis.set_xlabel("learning rate (its maximum)")
        save(figure, to, "compare-rates")


def bands(axis, curves: dict, looks: dict) -> None:
    """Each curve, of (x, losses over seeds), as its mean in a band from lowest to highest, with its
    name beside its end."""
    for attn_type, points in curves.items():
        look, xs = looks[attn_type], [x for x, _ in points]
        axis.plot(xs, [mean(losses) for _, losses in points], **look)
        low, high = ([f(losses) for _, losses in points] for f in (min, max))
        axis.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axis.set_ylabel("validation loss (nats per token)")
    ends = sorted((mean(points[-1][1]), points[-1][0], t) for t, points in curves.items() if points)
    low, high = axis.get_ylim()
    gap, beside = (high - low) / 18, axis.get_yaxis_transform()
    places = []  # names must not lie over each other, nor over the title
    for end, _, _ in ends:
        places.append(max(end, places[-1] + gap) if places else end)
    places = [min(place, high - gap * i) for i, place in enumerate(reversed(places))][::-1]
    for (end, x, attn_type), place in zip(ends, places, strict=True):
        look = looks[attn_type] | {"linewidth": 1, "markevery": [1], "clip_on": False}
        axis.plot([1.03, 1.1], [place, place], transform=beside, **look)
        axis.text(1.12, place, attn_type, transform=beside, va="center", fontsize=8)
        pointer = {"arrowstyle": "-", "color": look["color"], "linewidth": 0.5, "alpha": 0.6}
        axis.annotate("", (x, end), (1.03, place), "data", beside, arrowprops=pointer)
    axis.set_ylim(low, high)


def read_log(folder: Path) -> list[dict]:
    """The rows of a run's log.csv, as text."""
    try:
        with open(folder / "log.csv", newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not the folder of a run: {error}") from error


def lines(axis, rows: list[dict], column: str, label: str) -> None:
    """`column` against T on logarithmic axes, a line for each attn_type and implementation."""
    from matplotlib.ticker import LogFormatter

    looks = look_of([row["attn_type"] for row in rows])
    for key in dict.fromkeys((row["attn_type"], row.get("impl")) for row in rows):
        mine = [r for r in rows if (r["attn_type"], r.get("impl")) == key and r[column]]
        name, impl = key
        if impl == "reference" and name != "SM":
            look = looks[name] | {"alpha": 0.4, "marker": "x", "linewidth": 0.8}
        else:
            look = looks[name] | {"marker": "o", "markersize": 4, "label": name}
        axis.plot([r["T"] for r in mine], [r[column] for r in mine], **look)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sorted({row["T"] for row in rows}))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter(LogFormatter())  # 0.8 and 100, not 8 x 10^-1 and 10^2
    axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    axis.set_xlabel("sequence length T (tokens)")
    axis.set_ylabel(label)


def legend_beside(figure, axis) -> None:
    """One legend for all panels, to their right."""
    handles, names = axis.get_legend_handles_labels()
    kwargs = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False, "fontsize": 8}
    figure.legend(handles, names, **kwargs)


# ----------------------------------------------------------------------------
# What attention computes with

SMALL = (4.2, 3.2)  # inches of a panel among many
LEGEND = {"frameon": False, "fontsize": 8}


def plot_ranges(args: list[str], to: Path) -> None:
    """Over a run: the scores of each layer, the largest |A| and sums of rows; of SM, whose sums are
    all 1, norms and entropies."""
    (folder,), _ = options_of(args, names=1)
    attn_type, rows = read_stats(Path(folder))
    n_layer = 1 + int(max(row["layer"] for row in rows))
    columns = min(n_layer + 2, 4)
    title = f"{named(attn_type, folder)}: scores x in training, and what attention makes of them"
    if any(row["head"] for row in rows):
        title += " (of a layer's heads the extremes)"
    figure, axes = new_figure(columns, title, -(-(n_layer + 2) // columns), SMALL)
    for layer, axis in enumerate(axes[:n_layer]):
        draw_scores(axis, rows, layer)
        mark_ranges(axis, attn_type)
    # For the two panels behind: label, what is seen, and (column, of a layer's heads, line style)
    shown = [
        ("largest |A|", "any row, any head", [("A_max", max, "-")]),
        (
            *("sum of a row of A", "mean, and dotted the extremes"),
            [("row_mean", mean, "-"), ("row_min", min, ":"), ("row_max", max, ":")],
        ),
    ]
    if attn_type == "SM":
        norms = [("q_max", max, "-"), ("k_max", max, ":")]
        shown = [
            ("largest norm", "queries q, and dotted keys k", norms),
            ("entropy (nats)", "mean of the rows of A", [("entropy", mean, "-")]),
        ]
    for axis, (label, seen, curves) in zip(axes[n_layer:], shown, strict=False):
        for layer in range(n_layer):
            for column, of, style in curves:
                look = {"color": layer_colour(layer, n_layer), "linestyle": style}
                look |= {"label": f"layer {layer}"} if style == "-" and n_layer > 1 else {}
                axis.plot(*over_time(rows, layer, column, of), **look)
        axis.set_ylabel(label, fontsize=9)
        axis.set_title(seen, fontsize=9)
        logarithmic(axis)
    legends = [axes[i].get_legend_handles_labels() for i in (0, n_layer)]
    handles, names = (a + b for a, b in zip(*legends, strict=True))
    figure.legend(handles, names, loc="outside lower left", ncols=4 + 3 * (columns > 3), **LEGEND)
    for axis in axes[: n_layer + 2]:
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
    for axis in axes[n_layer + 2 :]:
        axis.remove()
    save(figure, to, "ranges")


def draw_scores(axis, rows: list[dict], layer: int) -> None:
    """Bands of a layer's scores over time."""
    for low, high, alpha, label in (
        ("x_min", "x_max", 0.15, "all x"),
        ("x_p1", "x_p99", 0.25, "1 to 99 % of x"),
        ("x_p10", "x_p90", 0.4, "10 to 90 % of x"),
    ):
        steps, bottom = over_time(rows, layer, low, min)
        top = over_time(rows, layer, high, max)[1]
        look = {"color": COLOURS[1], "alpha": alpha, "linewidth": 0}
        axis.fill_between(steps, bottom, top, label=label, **look)
    median = over_time(rows, layer, "x_p50", mean)
    axis.plot(*median, color="black", linewidth=1.2, label="median of x")
    axis.set_ylabel("score x", fontsize=9)
    if axis.get_ylim()[0] < -200:
        axis.set_yscale("symlog", linthresh=10)
        axis.set_ylabel("score x (log scale below -10)", fontsize=9)
    axis.set_title(f"layer {layer}", fontsize=9)


def named(attn_type: str, folder: str) -> str:
    name = Path(folder).name
    return attn_type if attn_type == name else f"{attn_type} ({name})"


def over_time(rows: list[dict], layer: int, column: str, of) -> tuple[list, list]:
    """The steps, and at each of them `of` the numbers of the layer's heads."""
    steps = {}
    for row in rows:
        if row["layer"] == layer:
            steps.setdefault(row["step"], []).append(row[column])
    return list(steps), [of(values) for values in steps.values()]


def logarithmic(axis) -> None:
    """A log scale, if numbers are positive and differ much."""
    import numpy as np

    y = np.concatenate([line.get_ydata() for line in axis.lines])
    y = y[np.isfinite(y)]
    if y.size and 0 < 20 * y.min() < y.max():
        axis.set_yscale("log")


def mark_ranges(axis, attn_type: str) -> None:
    """Where GKpoly-n's range ends: of the run's n, or for GK of each n that is in sight."""
    from engine.ranges import range_end, squarings
    from model import MAX_N

    bottom, n = axis.get_ylim()[0], squarings(attn_type)
    ends = [range_end(m) for m in ([n] if n else range(1, MAX_N + 1) if attn_type == "GK" else [])]
    if n and ends[0] < 2.5 * bottom:  # far below all x
        axis.set_title(f"{axis.get_title()}; {attn_type}'s range is {ends[0]} to 0", fontsize=9)
    elif n:
        axis.set_ylim(bottom=min(bottom, 1.15 * ends[0]))
        axis.axhspan(axis.get_ylim()[0], ends[0], color=COLOURS[3], alpha=0.15, linewidth=0)
    bottom = axis.get_ylim()[0]
    for end in (end for end in ends if bottom < end and (n or end < 0.25 * bottom)):
        axis.axhline(end, color=COLOURS[3], linewidth=1, linestyle="--")
        text = f"end of GKpoly-{int(math.log2(-end)) - 1}'s range"
        place = {"xy": (1, end), "xycoords": ("axes fraction", "data")}
        axis.annotate(text, **place, fontsize=7, ha="right", va="bottom")


def layer_colour(layer: int, n_layer: int):
    import matplotlib

    if n_layer <= len(COLOURS):
        return COLOURS[(layer + 1) % len(COLOURS)]
    return matplotlib.colormaps["viridis"](0.9 * layer / (n_layer - 1))


def plot_attention(args: list[str], to: Path) -> None:
    """A of each head on the first 40 tokens of a text, a picture for each layer."""
    (folder,), options = options_of(args, "start", names=1)
    if not options.get("start"):
        raise UserError('attention needs a text: python plot.py attention OUT --start="Some text"')
    import torch

    from engine import ranges
    from engine.loading import encode_prompt, load
    from engine.runtime import Runtime

    model, tokenizer = load(folder)
    T = min(40, model.config.block_size)
    ids = torch.as_tensor(encode_prompt(tokenizer, options["start"]))[:T]
    names = [repr(tokenizer.decode([i]))[1:-1].replace(" ", "\u2423") for i in ids.tolist()]
    turned = {"rotation": 90} if max(map(len, names)) > 2 else {}
    hidden = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    attn_type = model.config.attn_type
    name = named(attn_type, folder)
    side = max(3, 1.3 + 0.1 * len(ids))  # inches
    for layer, A in enumerate(ranges.maps(model, ids[None], Runtime("cpu", "float32", False))):
        columns = min(4, len(A))
        title = f"{name}, layer {layer}: weight A of each key for each query"
        figure, axes = new_figure(columns, title, -(-len(A) // columns), (side + 0.3, side))
        look, label = scale_of(A.numpy(), attn_type)
        for head, axis in enumerate(axes[: len(A)]):
            axis.grid(False)
            seen = A[head].clamp(min=look["norm"].vmin).masked_fill(hidden, math.nan)
            image = axis.imshow(seen.numpy(), **look)
            axis.set_title(f"head {head}", fontsize=9)
            for set_ticks, more in ((axis.set_xticks, turned), (axis.set_yticks, {})):
                set_ticks(range(len(ids)), names, fontsize=6, parse_math=False, **more)
            axis.tick_params(length=0, pad=2)
            axis.set_xlabel("key j (token)", fontsize=9)
            axis.set_ylabel("query i (token)", fontsize=9)
        for axis in axes[len(A) :]:
            axis.remove()
        extend = "neither" if look["norm"].vmin < 0 else "min"
        figure.colorbar(image, ax=list(axes[: len(A)]), label=label, shrink=0.8, extend=extend)
        save(figure, to, f"attention-{layer}")


def scale_of(A, attn_type: str) -> tuple[dict, str]:
    """How imshow shows the weights of a layer, and the label that says so. Negative weights are
    blue and positive ones red; where there are none, the least are dark."""
    import numpy as np
    from matplotlib import colors

    top = np.abs(A[np.isfinite(A)]).max(initial=1e-30)
    if A.min() < 0:
        norm = colors.SymLogNorm(top / 100, vmin=-top, vmax=top)
        return {"norm": norm, "cmap": "RdBu_r"}, "A (log scale on\nboth sides of 0)"
    label = "each row sums to 1" if attn_type == "SM" else "rows are not normalised"
    return {"norm": colors.LogNorm(top / 1e3, top), "cmap": "viridis"}, f"A (log scale)\n{label}"


def plot_kernel(args: list[str], to: Path) -> None:
    """Pointwise functions over a range of scores, and how far those of GK's kind are from exp."""
    names, options = options_of(args, "min", "max", "run")
    import torch

    from model import parse_attn_type

    try:
        variants = {name: parse_attn_type(name) for name in names}
        low, high = (float(options.get(key, math.nan)) for key in ("min", "max"))
    except ValueError as error:
        raise UserError(error) from error
    if None in variants.values():
        raise UserError("SM is no pointwise function; leave it out")
    kernels = [name for name in names if variants[name].score == "distance"]
    polynomials = [name for name in kernels if name != "GK"]
    known, where = (-40.0, 0.0) if len(kernels) == len(names) else (-5.0, 5.0), ""
    if "run" in options:
        rows = read_stats(Path(options["run"]))[1]
        last = [row for row in rows if row["step"] == rows[-1]["step"]]
        known = min(row["x_min"] for row in last), max(row["x_max"] for row in last)
        where = f", where {Path(options['run']).name} has it at step {rows[-1]['step']:.0f}"
    low, high = (b if math.isnan(a) else a for a, b in zip((low, high), known, strict=True))
    if not (low < high and math.isfinite(high - low)) or (kernels and low >= 0):
        raise UserError(f"the scores from {low:g} to {high:g} are no range; pass --min= and --max=")

    title = f"Pointwise functions of the score x{where}"
    title += "; right: how far polynomials are from exp" if polynomials else ""
    figure, axes = new_figure(1 + bool(polynomials), title)
    looks = look_of(names)
    shown = []
    for name in names:
        x = torch.linspace(low, min(high, 0) if name in kernels else high, 2001).double()
        y = variants[name].f(x)
        axes[0].plot(x.numpy(), y.numpy(), **looks[name], label=name)
        top = 1.5 * math.exp(min(high, 0))
        shown += [-0.1 * top, top] if name in kernels else [y.min().item(), y.max().item()]
        if name in polynomials:
            error = (y - x.exp()).abs().clamp(1e-12)
            axes[1].plot(x.numpy(), error.numpy(), **looks[name])
    axes[0].set_ylim(min(shown), max(shown))  # beyond their range polynomials explode
    axes[0].set_ylabel("f(x)")
    if polynomials:
        x = torch.linspace(low, min(high, 0), 2001)
        look = {"color": "black", "linewidth": 0.8, "linestyle": ":", "label": "exp(x)"}
        axes[0].plot(x.numpy(), x.exp().numpy(), **look)
        axes[1].set_yscale("log")
        axes[1].set_ylim(bottom=1e-8)
        axes[1].set_ylabel("|f(x) - exp(x)|")
    for axis in axes:
        axis.set_xlabel("score x")
        axis.set_xlim(low, high)
    legend_beside(figure, axes[0])
    save(figure, to, "kernel")


def of_run(folder: Path) -> list[Path]:
    """The pictures of a run, into its folder; their paths."""
    plot_loss([str(folder)], folder)
    if (folder / "stats.csv").exists():
        plot_ranges([str(folder)], folder)
    return [path for path in (folder / "loss.png", folder / "ranges.png") if path.exists()]


PLOTS = {
    "loss": plot_loss,
    "bench": plot_bench,
    "compare": plot_compare,
    "ranges": plot_ranges,
    "attention": plot_attention,
    "kernel": plot_kernel,
}


def main() -> None:
    args = [arg for arg in sys.argv[1:] if not arg.startswith("--to=")]
    if {"--help", "-h"} & set(args):
        print(__doc__.strip())
        return
    if len(args) < 2 or args[0] not in PLOTS:
        raise UserError(f"{' '.join(args)!r}: python plot.py [{'|'.join(PLOTS)}] OUT_OR_FILE ...")
    place = args[1] if args[0] == "compare" else "."  # a comparison's report shows its pictures
    to = Path(next((arg[5:] for arg in sys.argv[1:] if arg.startswith("--to=")), place))
    try:
        to.mkdir(parents=True, exist_ok=True)
        PLOTS[args[0]](args[1:], to)
    except ImportError as error:
        raise UserError(f"{error}; pip install matplotlib") from error
    except OSError as error:
        told = f"{error.filename or to} can't be written ({error.strerror})"
        raise UserError(f"{told}; choose another folder with --to=") from error


if __name__ == "__main__":
    configurator.run(main)
