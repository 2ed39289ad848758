"""
The results of a comparison: read from results.csv, judged, and drawn.

A variant is an attention with one value of each key that compare.py's --vary lists; its learning
rate and its seed are not part of it.
"""

import csv
from collections import defaultdict
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


def variant_name(attn_type: str, varied: dict) -> str:
    return " ".join((attn_type, *(f"{key}={value}" for key, value in varied.items())))


def varied_keys(row: dict) -> list[str]:
    """The keys that vary: their columns lie between two that are always there."""
    columns = list(row)
    return columns[columns.index("attn_type") + 1 : columns.index("learning_rate")]


def read_results(folder: Path) -> list[dict]:
    """The rows of results.csv: numbers as float, None where a cell is empty, values of keys that
    vary as text. A column `variant` is added."""
    try:
        with open(folder / "results.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["diverged"] = row["diverged"] == "True"
            varied = varied_keys(row)
            for key in row.keys() - {"attn_type", "run", "diverged", *varied}:
                row[key] = float(row[key]) if row[key] else None
            row["variant"] = variant_name(row["attn_type"], {key: row[key] for key in varied})
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is not the folder of a comparison: {error}") from error
    return rows


def by_rate(rows: list[dict]) -> dict[str, dict[float, list[dict]]]:
    """{variant: {learning rate: rows, one for each seed}}."""
    runs = defaultdict(lambda: defaultdict(list))
    for row in rows:
        runs[row["variant"]][row["learning_rate"]].append(row)
    return runs


def best_runs(rows: list[dict]) -> dict[str, list[dict]]:
    """For each variant the rows at the learning rate with the lowest mean of the final validation
    loss over seeds, among those at which no seed diverged; [] if there is none."""
    best = {}
    for variant, runs_at in by_rate(rows).items():
        finished = [runs for runs in runs_at.values() if not any(run["diverged"] for run in runs)]
        mean_loss = lambda runs: mean(run["final_val_loss"] for run in runs)
        best[variant] = min(finished, key=mean_loss, default=[])
    return best


def baseline(rows: list[dict]) -> str:
    """The attention that the others are compared with: SM, or the first where SM is missing."""
    attn_types = [row["attn_type"] for row in rows]
    return "SM" if "SM" in attn_types else attn_types[0]


def differences(runs: list[dict], best: dict[str, list[dict]], baseline: str) -> list[float]:
    """The final validation losses of `runs`, of one variant, minus those of `baseline` where all
    else is equal, for each seed that both have."""
    losses = {run["seed"]: run["final_val_loss"] for run in runs}
    name = baseline + runs[0]["variant"].removeprefix(runs[0]["attn_type"])
    of_baseline = {run["seed"]: run["final_val_loss"] for run in best.get(name, [])}
    return [loss - of_baseline[seed] for seed, loss in losses.items() if seed in of_baseline]


def numeric_axes(rows: list[dict]) -> dict[str, str]:
    """{name of a picture: its title} for each key that varies over whole numbers, as n_layer."""
    return {
        f"compare-{key}": f"Validation loss minus {baseline(rows)}'s against {key}"
        for key in varied_keys(rows[0])
        if all(row[key].isdigit() for row in rows)
    }


def draw_comparison(folder: Path, to: Path) -> None:
    """Draw the pictures of a comparison: means over seeds, in bands from lowest to highest."""
    rows = read_results(folder)
    finished = [row for row in rows if not row["diverged"]]
    logs = {row["run"]: read_log(folder / row["run"]) for row in finished}
    looks = line_looks([row["variant"] for row in rows])
    for look, marker in zip(looks.values(), MARKERS * 9, strict=False):
        look |= {"marker": marker, "markersize": 4}
    for name, column, unit, label in (
        ("compare-tokens", "tokens", 1e6, "tokens seen (millions)"),
        ("compare-seconds", "seconds", 1, "time in training steps (s)"),
    ):
        curves = defaultdict(list)
        for variant, runs in best_runs(rows).items():
            # Without the first evaluation, whose loss of random weights would squeeze the others
            evaluations = [[row for row in logs[run["run"]] if row["val_loss"]][1:] for run in runs]
            for at in zip(*evaluations, strict=False):
                x = mean(float(row[column]) / unit for row in at)
                curves[variant].append((x, [float(row["val_loss"]) for row in at]))
        title = f"{PICTURES[name]}, each attention at its best learning rate"
        figure, (axis,) = new_figure(1, title)
        draw_bands(axis, curves, looks)
        axis.set_xlabel(label)
        save_figure(figure, to, name)

    curves = defaultdict(list)
    for variant, runs_at in by_rate(finished).items():
        for rate, runs in sorted(runs_at.items()):
            curves[variant].append((rate, [run["final_val_loss"] for run in runs]))
    figure, (axis,) = new_figure(1, f"{PICTURES['compare-rates']}, without diverged runs")
    axis.set_xscale("log")
    draw_bands(axis, curves, looks)
    rates = sorted({row["learning_rate"] for row in rows})
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    axis.set_xlabel("peak learning rate")
    save_figure(figure, to, "compare-rates")

    best = best_runs(rows)
    for name, title in numeric_axes(rows).items():
        key, curves = name.removeprefix("compare-"), defaultdict(list)
        for variant, runs in best.items():
            if runs and (gaps := differences(runs, best, baseline(rows))):
                rest = variant.replace(f" {key}={runs[0][key]}", "")
                curves[rest].append((int(runs[0][key]), gaps))
                looks.setdefault(rest, looks[variant])
        figure, (axis,) = new_figure(1, title)
        draw_bands(axis, {rest: sorted(points) for rest, points in curves.items()}, looks)
        axis.set_xlabel(key)
        axis.set_ylabel(f"validation loss minus {baseline(rows)}'s (nats per token)")
        save_figure(figure, to, name)


def draw_bands(axis, curves: dict[str, list], looks: dict[str, dict]) -> None:
    """Draw each curve, points (x, losses over seeds), as its mean in a band from the lowest to the
    highest loss, and write its name beside its end."""
    ends = []
    for name, points in curves.items():
        look, (xs, losses) = looks[name], zip(*points, strict=True)
        means = list(map(mean, losses))
        axis.plot(xs, means, **look)
        band = list(map(min, losses)), list(map(max, losses))
        axis.fill_between(xs, *band, color=look["color"], alpha=0.15, linewidth=0)
        ends.append((means[-1], xs[-1], name))
    axis.set_ylabel("validation loss (nats per token)")
    low, high = axis.get_ylim()
    gap, beside = (high - low) / 18, axis.get_yaxis_transform()
    heights = []  # of the names, which must overlap neither each other nor the title
    for end, _, _ in sorted(ends):
        heights.append(max(end, heights[-1] + gap) if heights else end)
    heights = [min(height, high - gap * i) for i, height in enumerate(reversed(heights))][::-1]
    for (end, x, name), height in zip(sorted(ends), heights, strict=True):
        look = looks[name] | {"linewidth": 1, "markevery": [1], "clip_on": False}
        axis.plot([1.03, 1.1], [height, height], transform=beside, **look)
        axis.text(1.12, height, name, transform=beside, va="center", fontsize=8)
        pointer = {"arrowstyle": "-", "color": look["color"], "linewidth": 0.5, "alpha": 0.6}
        axis.annotate("", (x, end), (1.03, height), "data", beside, arrowprops=pointer)
    axis.set_ylim(low, high)
