"""
What happens if softmax is replaced: attentions side by side, each at its best learning rate.

    python compare.py config/compare_11.py                      # nine of them, one layer, one head
    python compare.py config/compare_11.py --attn_types=SM,PA_relu --seeds=1,2,3 --out_dir=out-relu
    python compare.py --base=train_gpt2 --attn_types=SM,GK --learning_rates=6e-4 --jobs=2

Trains every (attn_type, learning rate, seed) by a train.py of its own, on the same tokens: a
batch is a function of the seed and the step. Started again it goes on where it stopped, with what
is missing or was run with other settings. OUT_DIR then holds results.csv (a row per run),
report.md, its pictures, and a folder and the output of each run.
"""

import csv
import fcntl
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev

import torch

import configurator
import plot
from configurator import ROOT, UserError
from engine.files import read_rows
from engine.run_folder import holds_checkpoint
from engine.runtime import Interrupt, Runtime, say
from engine.start import check, open_data, tokens_per_step
from train import Config


@dataclass
class CompareConfig(Config):
    # Comparison: any key of train.py, for all runs, but those that the lists set, and
    out_dir: str = "out-compare"  # folder of the comparison
    base: str = "train_11"  # config file of the runs; what is given beside it overrides it
    attn_types: str = "SM,GK"  # what is compared; the first is compared with if SM isn't there
    learning_rates: str = "1e-3,3e-3,1e-2"  # tried for each, which is judged by its best
    seeds: str = "1,2"  # of each, for the spread
    jobs: int | None = None  # runs at a time; auto: one for each GPU, 1 on a CPU


LISTS = {"attn_type": "attn_types", "learning_rate": "learning_rates", "seed": "seeds"}
# Of a run's config.json: what can't change its results is no reason to do it again
APART = (
    "out_dir data_dir init_from allow_mismatch plot wandb_log wandb_project wandb_run_name "
    "tensorboard_log stats_tolerance"
).split()
DIVERGED = "diverged.txt"  # in the folder of a run that did: what train.py said

# ----------------------------------------------------------------------------
# The runs


@dataclass
class Run:
    """One train.py: what it is given, the whole config that this makes, and its data's SHA-256."""

    settings: dict
    config: Config
    data: dict | None = None

    def __post_init__(self):
        self.folder = Path(self.config.out_dir)
        self.output = Path(f"{self.folder}.txt")
        c = self.config
        self.title = f"{c.attn_type}, learning rate {c.learning_rate:g}, seed {c.seed}"

    def rows(self) -> list[dict]:
        with suppress(OSError):
            return read_rows(self.folder / "log.csv", self.config.max_iters)
        return []

    def saved(self) -> dict:
        """The config.json in its folder, {} if there is none."""
        with suppress(OSError, ValueError):
            text = (self.folder / "config.json").read_text(encoding="utf-8")
            if isinstance(saved := json.loads(text), dict):
                return saved
        return {}

    def found(self) -> dict:
        return self.saved().get("found") or {}

    def is_same(self) -> bool:
        """Whether its folder holds a run, whole or not, with these settings, on these data."""
        saved = {**asdict(Config()), **self.saved()}  # keys may be younger than the run
        same = all(saved[k] == v for k, v in asdict(self.config).items() if k not in APART)
        return same and self.found().get("data") == self.data

    def is_done(self) -> bool:
        return self.is_same() and (self.is_whole() or (self.folder / DIVERGED).exists())

    def is_whole(self) -> bool:
        rows = self.rows()
        last = rows[-1] if rows else {}
        return last.get("step") == str(self.config.max_iters) and bool(last["val_loss"])

    def resumes(self) -> bool:
        return self.is_same() and holds_checkpoint(self.folder)

    def command(self) -> list[str]:
        settings = {**self.settings, **({"init_from": "resume"} if self.resumes() else {})}
        return [
            sys.executable,
            str(ROOT / "train.py"),
            *(f"--{k}={v}" for k, v in settings.items()),
        ]

    def result(self) -> dict:
        """Its row of results.csv."""
        rows, config = self.rows(), self.config
        losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
        diverged = not self.is_whole() or not math.isfinite(losses[-1])
        step_ms = [float(row["step_ms"]) for row in rows if row["step_ms"]]
        ms = round(median(step_ms), 3) if step_ms else None
        last = rows[-1] if rows else {}
        return {
            "attn_type": config.attn_type,
            "learning_rate": config.learning_rate,
            "seed": config.seed,
            "best_val_loss": min(filter(math.isfinite, losses), default=None),
            "final_val_loss": None if diverged else losses[-1],
            "steps": last.get("step"),
            "tokens": last.get("tokens"),
            "ms_per_step": ms,
            "tokens_per_s": ms and round(1000 * tokens_per_step(config) / ms),
            "peak_mib": max((float(r["peak_mib"]) for r in rows if r["peak_mib"]), default=None),
            "diverged": diverged,
            "seconds": last.get("seconds"),
            "run": self.folder.name,
        }


def make_runs(given: dict, config: CompareConfig) -> list[Run]:
    """A run for every seed, learning rate and attn_type, in this order: a comparison that is
    stopped halfway has compared something. Raises UserError for what no run could use."""
    values = {}
    for key, plural in LISTS.items():
        if key in given:
            raise UserError(f"{key} is one of a list here; pass --{plural}={given[key]}")
        text = getattr(config, plural)
        parts = [part.strip() for part in text.split(",")]
        values[key] = [configurator.convert(Config, key, p, f"--{plural}={text}") for p in parts]
        if len(set(values[key])) < len(parts):
            raise UserError(f"--{plural}={text} has a value twice; leave one of them out")
    if 0 in values["learning_rate"]:
        raise UserError(f"--learning_rates={config.learning_rates}: with 0 nothing is learnt")
    ours = {f.name for f in fields(CompareConfig)} - {f.name for f in fields(Config)}
    common = configurator.read_config_file(Config, config.base)
    common.pop("min_lr", None)  # it is for one learning rate: here a tenth of each, unless given
    common |= {key: value for key, value in given.items() if key not in ours}
    runs = []
    for seed, rate, attn_type in product(*(values[key] for key in reversed(LISTS))):
        settings = {**common, "attn_type": attn_type, "learning_rate": rate, "seed": seed}
        settings["out_dir"] = str(Path(config.out_dir) / f"{attn_type}-lr{rate:g}-seed{seed}")
        runs.append(Run(settings, Config(**settings)))
        check(runs[-1].config)
    if common.get("init_from", "scratch") != "scratch" or common.get("eval_only"):
        raise UserError("compare.py trains from scratch; leave init_from and eval_only out")
    if runs[0].config.max_iters < 1:
        raise UserError("max_iters=0 trains nothing to compare; pass at least 1")
    if len({run.folder for run in runs}) < len(runs):
        raise UserError(f"--learning_rates={config.learning_rates} differ by too little")
    return runs


# ----------------------------------------------------------------------------
# Training them


def visible_gpus(device: str | None) -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be for one run; nothing if the runs share what they are told to
    use."""
    n = torch.cuda.device_count() if device in (None, "cuda") else 0
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(n)))).split(",")
    return names[:n]


def train_all(runs: list[Run], config: CompareConfig, lock) -> tuple[int, list[str]]:
    """Train what is not done, some at a time. Returns the exit code, that of a signal or 0, and
    what failed.

    Whatever ends it, a signal or settings that can't be, the runs of that time stop too and save.
    """
    gpus = visible_gpus(runs[0].config.device)
    jobs = config.jobs or len(gpus) or 1
    waiting = [run for run in runs if not run.is_done()]
    n, started = len(waiting), time.monotonic()
    say(f"{len(runs)} runs in {config.out_dir}, {len(runs) - n} of them done; {jobs} at a time")
    places, running, failed = list(range(jobs)), {}, []
    with Interrupt() as interrupt:
        try:
            while (waiting or running) and not interrupt.signal:
                while waiting and places:
                    run, place, env = waiting.pop(0), places.pop(0), dict(os.environ)
                    if gpus:
                        env["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
                    elif jobs > 1:
                        env["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // jobs))
                    with open(run.output, "a" if run.resumes() else "w") as out:
                        # They hold the lock too: if we are killed, no other starts beside them
                        process = subprocess.Popen(
                            run.command(), stdout=out, stderr=out, env=env, pass_fds=[lock.fileno()]
                        )
                    running[place] = run, process
                time.sleep(0.05)
                for place, (run, process) in list(running.items()):
                    if process.poll() is None or interrupt.signal:
                        continue
                    del running[place]
                    places.append(place)
                    told, is_result = conclude(run, process.returncode)
                    if not is_result:
                        failed.append(f"{run.title}: {told}")
                    left = len(waiting) + len(running)
                    seconds = (time.monotonic() - started) * left / (n - left)
                    about = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
                    say(f"{len(runs) - left} of {len(runs)}: {run.title}: {told}; {about} left")
                    write_results(runs, config)
        finally:
            for _, process in running.values():
                process.send_signal(interrupt.signal or signal.SIGTERM)
            for _, process in running.values():
                process.wait()
    if interrupt.signal:
        say("stopped; the same command goes on")
        return 128 + interrupt.signal, failed
    return 0, failed


def conclude(run: Run, code: int) -> tuple[str, bool]:
    """What a run that has ended came to, in words, and whether that is a result. Raises UserError
    for a mistake in the settings: then it did not begin."""
    lines = run.output.read_text(encoding="utf-8", errors="replace").split("\n")
    errors = [line for line in lines if line.startswith("error: ")]  # warnings may follow it
    said = (errors or [line for line in lines if line.strip()] or ["it said nothing"])[-1]
    said = said.removeprefix("error: ")
    if code == 2 and re.match(r"step \d+ was not done", said):
        (run.folder / DIVERGED).write_text(said + "\n", encoding="utf-8")
        return f"diverged, {said.split(';')[0]}", True
    if code == 2 and not (run.is_same() and run.rows()):
        raise UserError(said)
    if code or not run.is_whole():
        return f"failed with exit code {code}: {said}; all it said is in {run.output}", False
    return f"val loss {float(run.rows()[-1]['val_loss']):.4f}", True


# ----------------------------------------------------------------------------
# What came of it


def write_results(runs: list[Run], config: CompareConfig) -> None:
    """results.csv, a row for each run that is done, in the order of the lists, and report.md."""
    order = config.attn_types.replace(" ", "").split(",")
    rows = [run.result() for run in runs if run.is_done()]
    rows.sort(key=lambda row: (order.index(row["attn_type"]), row["learning_rate"]))
    if not rows:
        return
    folder = Path(config.out_dir)
    temporary = folder / "results.csv.tmp"
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, folder / "results.csv")
    command = f"python compare.py {shlex.join(sys.argv[1:])}"
    text = report(plot.read_results(folder), runs, command)
    (folder / "report.md").write_text(text, encoding="utf-8")


def table(rows: list[dict]) -> list[str]:
    """Rows of text as a table in Markdown."""
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation, the latter if there are several values."""
    return f"{mean(values):{sign}.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def report(rows: list[dict], runs: list[Run], command: str) -> str:
    """The comparison in Markdown, from the rows of results.csv."""
    config, best = runs[0].config, plot.best_rates(rows)
    types = list(dict.fromkeys(row["attn_type"] for row in rows))
    rates = sorted({row["learning_rate"] for row in rows})
    other = "SM" if "SM" in types else types[0]

    def runs_at(attn_type: str, rate: float) -> list[dict]:
        return [r for r in rows if (r["attn_type"], r["learning_rate"]) == (attn_type, rate)]

    chosen = {attn_type: runs_at(attn_type, rate) for attn_type, rate in best.items()}
    losses = {t: {r["seed"]: r["final_val_loss"] for r in chosen[t]} for t in best}

    def summary(attn_type: str) -> dict:
        mine = [row for row in rows if row["attn_type"] == attn_type]
        cells = {"attention": attn_type, "val loss": "diverged", f"minus {other}'s": "-"}
        cells |= dict.fromkeys(("ms/step", "tokens/s", "peak MiB", "best learning rate"), "-")
        if attn_type in best:
            rate, loss = best[attn_type], losses[attn_type]
            cells["val loss"] = spread(list(loss.values()))
            if attn_type != other and other in best:
                pairs = [loss[s] - losses[other][s] for s in loss if s in losses[other]]
                cells[f"minus {other}'s"] = spread(pairs, "+") if pairs else "-"
            cells["ms/step"] = f"{median(r['ms_per_step'] for r in chosen[attn_type]):.1f}"
            cells["tokens/s"] = f"{median(r['tokens_per_s'] for r in chosen[attn_type]):,.0f}"
            peaks = [row["peak_mib"] for row in chosen[attn_type] if row["peak_mib"]]
            cells["peak MiB"] = f"{max(peaks):,.0f}" if peaks else "n/a"
            at_edge = len(rates) > 1 and rate in (rates[0], rates[-1])
            cells["best learning rate"] = f"{rate:g}" + "*" * at_edge
        return cells | {"diverged": f"{sum(row['diverged'] for row in mine)} of {len(mine)}"}

    def over_rates(attn_type: str) -> dict:
        cells = {"attention": attn_type}
        for rate in rates:
            at = runs_at(attn_type, rate)
            ended = [r["final_val_loss"] for r in at if not r["diverged"]]
            text = spread(ended) if len(ended) == len(at) else f"{len(at) - len(ended)} diverged"
            cells[f"{rate:g}"] = f"**{text}**" if rate == best.get(attn_type) else text
        return cells

    seeds = sorted({int(row["seed"]) for row in rows})
    missing = len(runs) - len(rows)
    return "\n".join(
        [
            f"# {len(types)} attentions compared",
            "",
            f"`{command}`: L{config.n_layer} H{config.n_head} C{config.n_embd} "
            f"T{config.block_size}, data set {config.dataset}, {config.max_iters:,} steps of "
            f"{tokens_per_step(config):,} tokens, seeds {', '.join(map(str, seeds))}; "
            f"{machine(runs)}." + (f" {missing} of {len(runs)} runs are missing." * bool(missing)),
            "",
            "Runs of one seed see the same batches in the same order; all are evaluated on the "
            f"same {config.eval_iters}. Losses are in nats per token, at the last step; ± is the "
            "standard deviation over seeds, for differences that of the pairs of equal seed.",
            "",
            "## Each at its best learning rate",
            "",
            *table([summary(attn_type) for attn_type in types]),
            "",
            "The best has the lowest mean over seeds, none of which diverged; `*`: it is the "
            "lowest or the highest that was tried, and a better one may lie beyond. Time is the "
            "median over the log; memory is what the process (on a GPU: its tensors) took at most.",
            "",
            "## Over learning rates",
            "",
            *table([over_rates(attn_type) for attn_type in types]),
            "",
            *(f"![{title}]({name}.png)\n" for name, title in plot.COMPARISONS.items()),
        ]
    )


def machine(runs: list[Run]) -> str:
    """On what the runs that are done ran, and of which commit the code was, each once."""
    kinds, commits = {}, {}  # sets that keep their order
    for found in (run.found() for run in runs if run.is_done()):
        compiled = "compiled, " if found["compile"] else ""
        kinds[f"{found['device_name']}, {found['dtype']}, {compiled}torch {found['torch']}"] = None
        if found["commit"]:
            commits[f"commit {found['commit']}"] = None
    return "; ".join([*kinds, *commits])


def main() -> None:
    given = configurator.parse(CompareConfig, sys.argv[1:])
    config = CompareConfig(**given)
    runs = make_runs(given, config)
    # Here, so that what is wrong is told at once, and runs side by side don't all prepare pydocs
    data = open_data(runs[0].config, Runtime("cpu", "float32", False))
    data.check_length(runs[0].config.block_size)
    for run in runs:
        run.data = data.fingerprint()
    folder = Path(config.out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                told = f"{folder} is in use by another compare.py, or a train.py that it started"
                raise UserError(f"{told}; wait for it, or choose another --out_dir") from error
            code, failed = train_all(runs, config, lock)
            write_results(runs, config)
            if code:
                sys.exit(code)
            if any(run.is_done() for run in runs):
                plot.plot_compare([config.out_dir], folder)
    except OSError as error:
        told = f"{error.filename or folder} can't be written ({error.strerror})"
        raise UserError(f"{told}; make room, or choose another --out_dir") from error
    except ImportError as error:
        raise UserError(f"no pictures: {error}; pip install matplotlib") from error
    if (folder / "report.md").exists():
        say(f"the report is {folder / 'report.md'}")
    if failed:
        raise UserError(
            f"{len(failed)} failed and have no row, {failed[0]}; try them again with "
            "the same command"
        )


if __name__ == "__main__":
    configurator.run(main)
