"""
Pictures of runs, drawn from their log.csv and stats.csv, and the style that all pictures share.

matplotlib is optional and slow to import: only the functions that draw import it.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from configurator import UserError
from engine.files import read_rows

# Okabe and Ito's colours, which colour-blind people can tell apart; softmax is always black
COLOURS = ["#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"]
LINE_STYLES = ["-", "--", ":"]  # the second and the third attn_type of the same colour
SMALL_PANEL = (4.2, 3.2)  # inches, where a figure has many panels
LEGEND = {"frameon": False, "fontsize": 8}


def line_looks(names: list[str]) -> dict[str, dict]:
    """Colour and line style for each name, usually an attn_type."""
    looks = {"SM": {"color": "black", "linestyle": "-"}}
    for i, name in enumerate(dict.fromkeys(name for name in names if name != "SM")):
        looks[name] = {"color": COLOURS[i % 6], "linestyle": LINE_STYLES[i // 6 % 3]}
    return looks


def new_figure(n_panels: int, title: str, panel_size: tuple = (5.2, 4)):
    """A figure of panels, up to four in a row, of `panel_size` inches each; and its panels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns, rows = min(4, n_panels), math.ceil(n_panels / 4)
    size = (panel_size[0] * columns, panel_size[1] * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axis in axes.flat[n_panels:]:
        axis.remove()
    for axis in axes.flat[:n_panels]:
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes.flat[:n_panels]


def legend_beside(figure, axis) -> None:
    """One legend for all panels, to their right."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="center left", bbox_to_anchor=(1.0, 0.5), **LEGEND)


def save_figure(figure, folder: Path, name: str) -> None:
    """Write NAME.png and NAME.svg into the folder."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=120, bbox_inches="tight")
    plt.close(figure)
    print(f"{folder / name}.png and .svg")


def read_log(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's log.csv as text. Raises UserError if there is none."""
    try:
        return read_rows(folder / "log.csv")
    except OSError as error:
        raise UserError(f"{folder} is not the folder of a run: {error}") from error


def read_attn_type(folder: Path) -> str:
    """The attn_type of a run, from its config.json. Raises UserError if there is none."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["attn_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not the folder of a run: {error}") from error


def read_stats(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's stats.csv as numbers, NaN where a cell is empty."""
    if not (folder / "stats.csv").exists():
        raise UserError(
            f"{folder} has no stats.csv; train with --stats_interval=N, or measure a finished run "
            f"with  python train.py --init_from=resume --out_dir={folder} --stats_interval=1"
        )
    rows = read_rows(folder / "stats.csv")
    if not rows:
        raise UserError(f"{folder}/stats.csv has no rows yet")
    return [{key: float(x) if x else math.nan for key, x in row.items()} for row in rows]


def run_label(attn_type: str, folder: Path | str) -> str:
    """'GK (out-11)', or 'GK' if the folder has the name of the attention."""
    return attn_type if attn_type == Path(folder).name else f"{attn_type} ({folder})"


def draw_losses(folders: list[Path], to: Path) -> None:
    """Draw loss.png, and print after how many tokens the runs reach the first one's final loss."""
    logs = {folder: read_log(folder) for folder in folders}
    attn_types = {folder: read_attn_type(folder) for folder in logs}
    title = "Loss against tokens: dots are validation loss, thin lines training loss"
    figure, (axis,) = new_figure(1, title)
    for (folder, rows), look in zip(logs.items(), run_looks(attn_types), strict=True):
        label = run_label(attn_types[folder], folder)
        of_random_weights = dict(losses_of(rows, "val_loss")).get(0, math.inf)
        for column, style in (
            ("train_loss", {"linewidth": 0.6, "alpha": 0.5}),
            ("val_loss", {"marker": "o", "markersize": 3, "label": label}),
        ):
            points = [(tokens / 1e6, loss) for tokens, loss in losses_of(rows, column)]
            if len(points) > 1:  # what is no better than random weights would squeeze the others
                points = [point for point in points if point[1] < of_random_weights]
            points = points or [(math.nan, math.nan)]  # drawn in the legend only
            axis.plot(*zip(*points, strict=True), **look | style)
    axis.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)")
    axis.legend(**LEGEND)
    save_figure(figure, to, "loss")
    baseline, *others = logs
    for folder in others:
        print(tokens_to_reach(folder, baseline, logs))


def run_looks(attn_types: dict[Path, str]) -> list[dict]:
    """The look of each run: a colour for each attention and a line style for each of its runs, or,
    if all runs have the same attention, a colour for each run."""
    names = list(attn_types.values())
    if len(set(names)) == 1 < len(names):
        names = [str(folder) for folder in attn_types]
    looks = [dict(line_looks(names)[name]) for name in names]
    for i, name in enumerate(names):
        if repetition := names[:i].count(name):
            looks[i]["linestyle"] = LINE_STYLES[repetition % 3]
    return looks


def losses_of(rows: list[dict], column: str) -> list[tuple[int, float]]:
    """(tokens, loss) of the rows of a log that have this loss."""
    return [(int(row["tokens"]), float(row[column])) for row in rows if row[column]]


def tokens_to_reach(folder: Path, baseline: Path, logs: dict[Path, list[dict]]) -> str:
    """One line that says after how many tokens a run first reached another one's final loss."""
    points, goals = (losses_of(logs[run], "val_loss") for run in (folder, baseline))
    if not goals:
        return f"{baseline} has no validation loss"
    budget, goal = goals[-1]
    goal_text = f"the final validation loss of {baseline} ({goal:.4f} after {budget:,} tokens)"
    for tokens, loss in points:
        if loss <= goal:
            times = f"{tokens / max(1, budget):.2f} times as many"
            return f"{folder} reaches {goal_text} after {tokens:,} tokens, {times}"
    return f"{folder} does not reach {goal_text}"


# The panels beside those of the scores: label of the axis, title, and curves. A curve is a column
# of stats.csv, the function that reduces it over a layer's heads, and a line style.
ROW_SUMS = [("row_mean", mean, "-"), ("row_min", min, ":"), ("row_max", max, ":")]
WEIGHT_PANELS = [
    ("largest |A|", "over all rows and heads", [("A_max", max, "-")]),
    ("sum of a row of A", "solid: mean; dotted: extremes", ROW_SUMS),
]
SOFTMAX_PANELS = [  # every row of softmax sums to 1
    ("largest norm", "solid: q; dotted: k", [("q_max", max, "-"), ("k_max", max, ":")]),
    ("entropy (nats)", "mean over the rows of A", [("entropy", mean, "-")]),
]


def draw_ranges(folder: Path, to: Path) -> None:
    """Draw ranges.png: over a run, the scores of each layer, the largest |A| and the sums of rows;
    of softmax, norms and entropies instead."""
    from matplotlib import colormaps

    rows, attn_type = read_stats(folder), read_attn_type(folder)
    n_layer = 1 + int(max(row["layer"] for row in rows))
    title = f"{run_label(attn_type, folder.name)}: scores x and weights A during training"
    if any(row["head"] for row in rows):
        title += " (extremes over the heads of a layer)"
    figure, axes = new_figure(n_layer + 2, title, SMALL_PANEL)
    colours = COLOURS[1:] + COLOURS[:1]
    if n_layer > len(colours):
        colours = [colormaps["viridis"](0.9 * i / (n_layer - 1)) for i in range(n_layer)]
    for layer, axis in enumerate(axes[:n_layer]):
        draw_scores(axis, rows, layer)
        mark_polynomial_ranges(axis, attn_type)
    panels = SOFTMAX_PANELS if attn_type == "SM" else WEIGHT_PANELS
    for axis, (label, title, curves) in zip(axes[n_layer:], panels, strict=False):
        for layer in range(n_layer):
            for column, reduce, style in curves:
                look = {"color": colours[layer], "linestyle": style}
                if style == "-" and n_layer > 1:
                    look["label"] = f"layer {layer}"
                axis.plot(*over_time(rows, layer, column, reduce), **look)
        axis.set_ylabel(label, fontsize=9)
        axis.set_title(title, fontsize=9)
        y = [number for line in axis.lines for number in line.get_ydata() if math.isfinite(number)]
        if y and 0 < 20 * min(y) < max(y):  # all positive, and widely spread
            axis.set_yscale("log")
    legends = [axes[i].get_legend_handles_labels() for i in (0, n_layer)]
    handles, names = (a + b for a, b in zip(*legends, strict=True))
    figure.legend(handles, names, loc="outside lower left", ncols=7 if n_layer > 1 else 4, **LEGEND)
    for axis in axes:
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
    save_figure(figure, to, "ranges")


def draw_scores(axis, rows: list[dict], layer: int) -> None:
    """Bands of a layer's scores over time."""
    for low, high, alpha, label in (
        ("x_min", "x_max", 0.15, "all x"),
        ("x_p1", "x_p99", 0.25, "1 to 99 % of x"),
        ("x_p10", "x_p90", 0.4, "10 to 90 % of x"),
    ):
        steps, bottom = over_time(rows, layer, low, min)
        _, top = over_time(rows, layer, high, max)
        axis.fill_between(steps, bottom, top, color=COLOURS[1], alpha=alpha, lw=0, label=label)
    axis.plot(*over_time(rows, layer, "x_p50", mean), "k", linewidth=1.2, label="median of x")
    axis.set_ylabel("score x", fontsize=9)
    if axis.get_ylim()[0] < -200:
        axis.set_yscale("symlog", linthresh=10)
        axis.set_ylabel("score x (log scale below -10)", fontsize=9)
    axis.set_title(f"layer {layer}", fontsize=9)


def over_time(rows: list[dict], layer: int, column: str, reduce: Callable) -> tuple[list, list]:
    """The steps, and at each of them a column reduced over the layer's heads."""
    values_at = {}
    for row in rows:
        if row["layer"] == layer:
            values_at.setdefault(row["step"], []).append(row[column])
    return list(values_at), [reduce(values) for values in values_at.values()]


def mark_polynomial_ranges(axis, attn_type: str) -> None:
    """Mark where GKpoly-n's range ends: for the run's n, or for GK every n that is in sight."""
    from engine.ranges import range_end, squarings
    from model import MAX_N

    n_of_run, bottom = squarings(attn_type), axis.get_ylim()[0]
    if n_of_run and (end := range_end(n_of_run)) < 2.5 * bottom:  # far below all x
        axis.set_title(f"{axis.get_title()}; {attn_type}'s range is {end} to 0", fontsize=9)
    elif n_of_run:
        axis.set_ylim(bottom=min(bottom, 1.15 * end))
        bottom = axis.get_ylim()[0]
        axis.axhspan(bottom, end, color=COLOURS[3], alpha=0.15, linewidth=0)
    for n in [n_of_run] if n_of_run else range(1, MAX_N + 1) if attn_type == "GK" else []:
        end = range_end(n)
        if bottom < end and (n_of_run or end < 0.25 * bottom):
            axis.axhline(end, color=COLOURS[3], linewidth=1, linestyle="--")
            text, beside = f"end of GKpoly-{n}'s range", axis.get_yaxis_transform()
            axis.text(1, end, text, transform=beside, fontsize=7, ha="right", va="bottom")


def draw_run(folder: Path) -> list[Path]:
    """Draw a run into its folder; returns the PNGs. Raises ImportError without matplotlib."""
    draw_losses([folder], folder)
    if not (folder / "stats.csv").exists():
        return [folder / "loss.png"]
    draw_ranges(folder, folder)
    return [folder / "loss.png", folder / "ranges.png"]
