"""
Pictures, each as PNG and SVG, from what train.py, bench.py and compare.py wrote.

    python plot.py loss OUT [OUT ...]       # losses of runs against tokens      -> loss.png
    python plot.py bench bench.json         # the tables of bench.py --out=...   -> bench-*.png
    python plot.py compare DIR              # attentions at their best rates     -> compare-*.png

They go to the current folder, or to the one that --to=FOLDER names.
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


def new_figure(columns: int, title: str):
    """A figure with `columns` panels side by side and one line that says what is seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(5.2 * columns, 4), squeeze=False)
    figure.suptitle(title, fontsize=11)
    for axis in axes[0]:
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def save(figure, folder: Path, name: str) -> None:
    figure.tight_layout()
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=120, bbox_inches="tight")
    print(f"{folder / name}.png and .svg")


def plot_loss(folders: list[str], to: Path) -> None:
    """Validation loss (points) and training loss (thin) of each run against tokens."""
    runs = {}
    for folder in map(Path, folders):
        try:
            rows = read_log(folder)
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            runs[folder] = (config["attn_type"], rows)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} is not the folder of a run: {error}") from error
    figure, (axis,) = new_figure(
        1, "Loss against tokens: dots on validation data, thin in training"
    )
    looks = look_of([attn_type for attn_type, _ in runs.values()])
    for folder, (attn_type, rows) in runs.items():
        name = attn_type if attn_type == folder.name else f"{attn_type} ({folder.name})"
        for column, style in (
            ("train_loss", {"linewidth": 0.6, "alpha": 0.5}),
            ("val_loss", {"marker": "o", "markersize": 3, "label": name}),
        ):
            points = [(int(r["tokens"]) / 1e6, float(r[column])) for r in rows if r[column]]
            axis.plot(*zip(*points, strict=True), **looks[attn_type] | style)
    axis.set_xlabel("tokens seen (millions)")
    axis.set_ylabel("loss (nats per token)")
    axis.legend(frameon=False, fontsize=8)
    save(figure, to, "loss")


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
    axis.set_xlabel("sequence length T (tokens)")
    axis.set_ylabel(label)


def legend_beside(figure, axis) -> None:
    """One legend for all panels, to their right."""
    handles, names = axis.get_legend_handles_labels()
    kwargs = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False, "fontsize": 8}
    figure.legend(handles, names, **kwargs)


PLOTS = {"loss": plot_loss, "bench": plot_bench, "compare": plot_compare}


def main() -> None:
    args = [arg for arg in sys.argv[1:] if not arg.startswith("--to=")]
    to = Path(next((arg[5:] for arg in sys.argv[1:] if arg.startswith("--to=")), "."))
    if len(args) < 2 or args[0] not in PLOTS:
        raise UserError(f"{' '.join(args)!r}: python plot.py [{'|'.join(PLOTS)}] OUT_OR_FILE ...")
    to.mkdir(parents=True, exist_ok=True)
    PLOTS[args[0]](args[1:], to)


if __name__ == "__main__":
    configurator.run(main)
