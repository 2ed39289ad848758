"""
The results of a comparison: read from results.csv, judged, and drawn.
"""

import csv
import math
from pathlib import Path
from statistics import mean

from configurator import UserError
from engine.pictures import line_looks, new_figure, read_log, save_figure

MARKERS = "osD^vP*Xphd<>"
PICTURES = {  # their names, and what they show
    "compare-tokens": "Validation loss against tokens",
    "compare-seconds": "Validation loss against training time",
    "compare-rates": "Validation loss against learning rate",
}


def read_results(folder: Path) -> list[dict]:
    """The rows of results.csv: numbers as float, None where a cell is empty."""
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


def at_rate(rows: list[dict], attn_type: str, rate: float) -> list[dict]:
    """The rows of one attention at one learning rate, a row for each seed."""
    return [r for r in rows if (r["attn_type"], r["learning_rate"]) == (attn_type, rate)]


def best_rates(rows: list[dict]) -> dict[str, float]:
    """For each attn_type the learning rate at which the mean over seeds of the final validation
    loss is lowest, among those at which no seed diverged; types that have none are left out."""
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


def draw_comparison(folder: Path, to: Path) -> None:
    """Draw the three pictures of a comparison: means over seeds, in bands from lowest to highest.

    A curve is a list of (x, losses over seeds).
    """
    rows = read_results(folder)
    finished = [row for row in rows if not row["diverged"]]
    logs = {row["run"]: read_log(folder / row["run"]) for row in finished}
    looks = line_looks([row["attn_type"] for row in rows])
    for look, marker in zip(looks.values(), MARKERS * 3, strict=False):
        look |= {"marker": marker, "markersize": 4}
    for name, column, unit, label in (
        ("compare-tokens", "tokens", 1e6, "tokens seen (millions)"),
        ("compare-seconds", "seconds", 1, "time in training steps (s)"),
    ):
        curves = {}
        for attn_type, rate in best_rates(rows).items():
            runs = [logs[row["run"]] for row in at_rate(rows, attn_type, rate)]
            # Without the first evaluation, whose loss of random weights would squeeze the others
            evaluations = [[row for row in log if row["val_loss"]][1:] for log in runs]
            curves[attn_type] = [
                (mean(float(r[column]) / unit for r in at), [float(r["val_loss"]) for r in at])
                for at in zip(*evaluations, strict=False)
            ]
        title = f"{PICTURES[name]}, each attention at its best learning rate"
        figure, (axis,) = new_figure(1, title)
        draw_bands(axis, curves, looks)
        axis.set_xlabel(label)
        save_figure(figure, to, name)

    curves = {}
    for row in finished:
        losses_at = curves.setdefault(row["attn_type"], {})
        losses_at.setdefault(row["learning_rate"], []).append(row["final_val_loss"])
    figure, (axis,) = new_figure(1, f"{PICTURES['compare-rates']}, without diverged runs")
    axis.set_xscale("log")
    draw_bands(axis, {t: sorted(losses_at.items()) for t, losses_at in curves.items()}, looks)
    rates = sorted({row["learning_rate"] for row in rows})
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    axis.set_xlabel("peak learning rate")
    save_figure(figure, to, "compare-rates")


def draw_bands(axis, curves: dict[str, list], looks: dict[str, dict]) -> None:
    """Draw each curve as its mean, in a band from the lowest to the highest loss, and write its
    name beside its end."""
    for attn_type, points in curves.items():
        look, xs = looks[attn_type], [x for x, _ in points]
        axis.plot(xs, [mean(losses) for _, losses in points], **look)
        low, high = ([reduce(losses) for _, losses in points] for reduce in (min, max))
        axis.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axis.set_ylabel("validation loss (nats per token)")
    ends = sorted((mean(points[-1][1]), points[-1][0], t) for t, points in curves.items() if points)
    low, high = axis.get_ylim()
    gap, beside = (high - low) / 18, axis.get_yaxis_transform()
    heights = []  # of the names, which must overlap neither each other nor the title
    for end, _, _ in ends:
        heights.append(max(end, heights[-1] + gap) if heights else end)
    heights = [min(height, high - gap * i) for i, height in enumerate(reversed(heights))][::-1]
    for (end, x, attn_type), height in zip(ends, heights, strict=True):
        look = looks[attn_type] | {"linewidth": 1, "markevery": [1], "clip_on": False}
        axis.plot([1.03, 1.1], [height, height], transform=beside, **look)
        axis.text(1.12, height, attn_type, transform=beside, va="center", fontsize=8)
        pointer = {"arrowstyle": "-", "color": look["color"], "linewidth": 0.5, "alpha": 0.6}
        axis.annotate("", (x, end), (1.03, height), "data", beside, arrowprops=pointer)
    axis.set_ylim(low, high)
