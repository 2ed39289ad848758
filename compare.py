"""
Attentions side by side, each at its best learning rate: what a GPT loses or gains without softmax.

    python compare.py config/compare_11.py                      # nine of them, one layer, one head
    python compare.py config/compare_11.py --attn_types=SM,PA_relu --seeds=1,2,3 --out_dir=out-relu
    python compare.py --base=train_gpt2 --attn_types=SM,GK --learning_rates=6e-4 --jobs=2
    python compare.py config/compare_11.py --vary="n_layer=1,2,4 attn_decay=none,fixed"

Each combination of the lists is trained by a train.py of its own. All see the same tokens, as a
batch is a function of the seed and the step. The same command, started again, goes on where it
stopped: it trains what is missing or was trained with other settings. OUT_DIR then holds
results.csv (a row per run), report.md, its pictures, and the folder and output of each run.
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
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev

import torch

import configurator
from configurator import ROOT, UserError
from engine import comparison
from engine.files import read_rows, text_table, whole_file
from engine.run_folder import holds_checkpoint
from engine.runtime import Interrupt, Runtime, say
from engine.start import (
    KEPT,
    check,
    check_dataset_is_named,
    model_config,
    open_data,
    tokens_per_step,
)
from train import Config


@dataclass
class CompareConfig(Config):
    # Comparison (the keys above hold for every run; attn_type, learning_rate and seed are lists)
    out_dir: str = "out-compare"  # Folder of the comparison
    base: str = "train_11"  # Config file of the runs; keys that are given override it
    attn_types: str = "SM,GK"  # Attentions to compare with SM, or with the first if SM is missing
    learning_rates: str = "1e-3,3e-3,1e-2"  # Peak rates to try for each attention
    seeds: str = "1,2"  # Seeds to train each attention and learning rate with
    vary: str = ""  # Lists of values of other keys, in place of one: "n_layer=1,2 bias=True,False"
    jobs: int | None = None  # Runs at a time; auto: one for each GPU, 1 on a CPU


# Keys that cannot change the results of a run, so that it is not trained again for their sake
WITHOUT_EFFECT = (
    "out_dir data_dir init_from allow_mismatch plot wandb_log wandb_project wandb_run_name "
    "tensorboard_log stats_tolerance"
).split()
LISTS = ("seed", "learning_rate", "attn_type")  # keys whose lists have options of their own
DIVERGED = "diverged.txt"  # in the folder of a diverged run: the error message of train.py

# ---- The trials -------------------------------------------------------------


@dataclass
class Trial:
    """One run of train.py: the keys passed to it, its whole config, the SHA-256 of its data, and
    those of its values that --vary lists."""

    settings: dict
    config: Config
    data: dict | None = None
    varied: dict = field(default_factory=dict)

    def __post_init__(self):
        c = self.config
        self.folder, self.output = Path(c.out_dir), Path(f"{c.out_dir}.txt")
        self.variant = comparison.variant_name(c.attn_type, self.varied)
        self.title = f"{self.variant}, learning rate {c.learning_rate:g}, seed {c.seed}"

    def rows(self) -> list[dict]:
        """The rows of log.csv, none if there is no such file."""
        path = self.folder / "log.csv"
        return read_rows(path, self.config.max_iters) if path.exists() else []

    def saved_config(self) -> dict:
        """The config.json in its folder, {} if there is none."""
        with suppress(OSError, ValueError):
            return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return {}

    def is_same(self) -> bool:
        """Whether its folder holds a run, finished or not, of these settings and data."""
        saved = {"found": {}, **asdict(Config()), **self.saved_config()}  # the run may be older
        settings = {k: v for k, v in asdict(self.config).items() if k not in WITHOUT_EFFECT}
        return settings.items() <= saved.items() and saved["found"].get("data") == self.data

    def is_complete(self) -> bool:
        last = (self.rows() or [{}])[-1]
        return last.get("step") == str(self.config.max_iters) and bool(last["val_loss"])

    def is_done(self) -> bool:
        return self.is_same() and (self.is_complete() or (self.folder / DIVERGED).exists())

    def can_resume(self) -> bool:
        return self.is_same() and holds_checkpoint(self.folder)

    def command(self) -> list[str]:
        settings = self.settings | ({"init_from": "resume"} if self.can_resume() else {})
        options = [f"--{key}={value}" for key, value in settings.items()]
        return [sys.executable, str(ROOT / "train.py"), *options]

    def result(self) -> dict:
        """The row of results.csv."""
        rows, config = self.rows(), self.config
        losses, step_ms, peaks = (
            [float(row[column]) for row in rows if row.get(column)]
            for column in ("val_loss", "step_ms", "peak_mib")
        )
        diverged = not self.is_complete() or not math.isfinite(losses[-1])
        ms = round(median(step_ms), 3) if step_ms else None
        last = rows[-1] if rows else {}
        return {
            "attn_type": config.attn_type,
            **self.varied,
            "learning_rate": config.learning_rate,
            "seed": config.seed,
            "best_val_loss": min(filter(math.isfinite, losses), default=None),
            "final_val_loss": None if diverged else losses[-1],
            "steps": last.get("step"),
            "tokens": last.get("tokens"),
            "ms_per_step": ms,
            "tokens_per_s": ms and round(1000 * tokens_per_step(config) / ms),
            "peak_mib": max(peaks, default=None),
            "diverged": diverged,
            "seconds": last.get("seconds"),
            "run": self.folder.name,
        }


def lists_of_values(given: dict, config: CompareConfig) -> dict[str, list]:
    """{key of Config: the values to try}, those that vary slowest first: seeds, so that a
    comparison stopped halfway has compared something. Raises UserError for what can't be tried."""
    texts = {key: getattr(config, f"{key}s") for key in LISTS}
    options = {key: f"--{key}s={text}" for key, text in texts.items()}
    for key in texts:
        if key in given:
            raise UserError(f"{key} is set by a list here; pass --{key}s={given[key]}")
    for part in config.vary.split():
        key, _, text = part.partition("=")
        option = f"--vary={config.vary}"
        unusable = key in texts or key in WITHOUT_EFFECT or key not in Config.__annotations__
        if unusable or not text:
            problem = f"{option} does not consist of KEY=VALUE,VALUE with other keys of train.py"
            raise UserError(f'{problem}; pass for instance --vary="n_layer=1,2 dropout=0.0,0.1"')
        texts[key], options[key] = text, option
    values = {}
    for key, text in texts.items():
        parts = [part.strip() for part in text.split(",")]
        value_of = partial(configurator.value_of_text, Config, key, source=options[key])
        values[key] = [value_of(text=part) for part in parts]
        if len(set(values[key])) < len(parts):
            raise UserError(f"{options[key]} has a value twice; leave one of them out")
    if 0 in values["learning_rate"]:
        raise UserError(f"{options['learning_rate']}: a rate of 0 learns nothing")
    return values


def make_trials(given: dict, config: CompareConfig) -> list[Trial]:
    """A trial for each combination. Raises UserError for values that no trial could use."""
    values = lists_of_values(given, config)
    common = configurator.read_config_file(Config, config.base)
    common.pop("min_lr", None)  # it suits one learning rate; here it is a tenth of each, or given
    common |= {k: value for k, value in given.items() if k not in CompareConfig.__annotations__}
    trials = []
    for combination in product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        varied = {key: value for key, value in chosen.items() if key not in LISTS}
        name = "-".join(map(str, (chosen["attn_type"], *varied.values())))
        name += f"-lr{chosen['learning_rate']:g}-seed{chosen['seed']}"
        settings = {**common, **chosen, "out_dir": str(Path(config.out_dir) / name)}
        check(Config(**settings))
        # A key that means nothing to an attention, as attn_normalize to SM, gets the value that the
        # run will record: else it would be trained again each time
        recorded = {key: getattr(model_config(Config(**settings)), key) for key in KEPT}
        settings |= {key: recorded[key] for key in recorded.keys() & settings.keys()}
        trials.append(Trial(settings, Config(**settings), varied=varied))
    terms = given.get("attn_normalize")
    if terms and all(trial.config.attn_decay == "none" for trial in trials):
        problem = f"attn_normalize={terms} does nothing without --attn_decay"
        raise UserError(f"{problem}; pass --attn_decay=fixed, or --attn_normalize=0")
    check_dataset_is_named([config.base], trials[0].settings, trials[0].config)
    if common.get("init_from", "scratch") != "scratch" or common.get("eval_only"):
        raise UserError("compare.py trains from scratch; leave init_from and eval_only out")
    if trials[0].config.max_iters < 1:
        raise UserError("max_iters=0 trains nothing to compare; pass at least 1")
    if len({trial.folder for trial in trials}) < len(trials):
        option = f"--learning_rates={config.learning_rates}"
        raise UserError(f"{option} has rates that differ by too little; leave one of them out")
    return trials


# ---- Training ---------------------------------------------------------------


def start_training(trial: Trial, slot: int, jobs: int, gpus: list[str], lock) -> subprocess.Popen:
    """Start train.py on the slot's GPU, or on its share of the CPU's threads."""
    environment = dict(os.environ)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    elif jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // jobs))
    with open(trial.output, "a" if trial.can_resume() else "w") as output:
        # It holds the lock too: if this process is killed, no other comparison starts beside it
        options = {"stdout": output, "stderr": output, "pass_fds": [lock.fileno()]}
        return subprocess.Popen(trial.command(), env=environment, **options)


def train_all(trials: list[Trial], config: CompareConfig, lock) -> tuple[int, list[str]]:
    """Train the trials that are not done. If a signal or an error ends this, those that are running
    stop too, and save. Returns the exit code of a signal, or 0, and a line for each failure."""
    n_gpus = torch.cuda.device_count() if trials[0].config.device in (None, "cuda") else 0
    every_gpu = ",".join(map(str, range(n_gpus)))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every_gpu).split(",")[:n_gpus]
    jobs = config.jobs or len(gpus) or 1
    waiting = [trial for trial in trials if not trial.is_done()]
    n, started = len(waiting), time.monotonic()
    say(f"{len(trials)} runs in {config.out_dir}, {len(trials) - n} of them done; {jobs} at a time")
    running, failures = {}, []  # the trial and the process of each slot
    with Interrupt() as interrupt:
        try:
            while (waiting or running) and not interrupt.signal:
                for slot in range(jobs):
                    if waiting and slot not in running:
                        trial = waiting.pop(0)
                        running[slot] = trial, start_training(trial, slot, jobs, gpus, lock)
                time.sleep(0.05)
                for slot, (trial, process) in list(running.items()):
                    if process.poll() is None or interrupt.signal:
                        continue
                    del running[slot]
                    outcome, is_result = conclude(trial, process.returncode)
                    if not is_result:
                        failures.append(f"{trial.title}: {outcome}")
                    left = len(waiting) + len(running)
                    seconds = (time.monotonic() - started) * left / (n - left)
                    eta = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
                    done = f"{len(trials) - left} of {len(trials)}"
                    say(f"{done}: {trial.title}: {outcome}; {eta} left")
                    write_results(trials, config)
        finally:
            for _, process in running.values():
                process.send_signal(interrupt.signal or signal.SIGTERM)
            for _, process in running.values():
                process.wait()
    if not interrupt.signal:
        return 0, failures
    say("stopped; the same command goes on where it stopped")
    return 128 + interrupt.signal, failures


def conclude(trial: Trial, code: int) -> tuple[str, bool]:
    """The outcome of a process that ended with exit code `code`, and whether it is a result. Raises
    UserError for a mistake in the settings, which kept training from beginning."""
    output = trial.output.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in output.split("\n") if line.strip()] or ["no output"]
    errors = [line for line in lines if line.startswith("error: ")]  # warnings may follow it
    message = (errors or lines)[-1].removeprefix("error: ")
    if code == 2 and re.match(r"step \d+ was not done", message):
        (trial.folder / DIVERGED).write_text(message + "\n", encoding="utf-8")
        return f"diverged, {message.split(';')[0]}", True
    if code == 2 and not (trial.is_same() and trial.rows()):
        raise UserError(message)
    if code or not trial.is_complete():
        return f"failed with exit code {code}: {message}; its output is in {trial.output}", False
    return f"val loss {float(trial.rows()[-1]['val_loss']):.4f}", True


# ---- Results ----------------------------------------------------------------


def write_results(trials: list[Trial], config: CompareConfig) -> None:
    """Write results.csv, a row for each trial that is done, and report.md."""
    order = list(dict.fromkeys(trial.variant for trial in trials))
    done = [trial for trial in trials if trial.is_done()]
    done.sort(key=lambda trial: (order.index(trial.variant), trial.config.learning_rate))
    rows = [trial.result() for trial in done]
    if not rows:
        return
    folder = Path(config.out_dir)
    with whole_file(folder / "results.csv") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    command = f"python compare.py {shlex.join(sys.argv[1:])}"
    with whole_file(folder / "report.md") as file:
        file.write(report(comparison.read_results(folder), trials, command))


def mean_and_spread(values: Iterable[float], sign: str = "") -> str:
    """The mean, and the standard deviation if there are several values; '-' if there are none."""
    values = list(values)
    text = f"{mean(values):{sign}.4f}" if values else "-"
    return text + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def best_rate_table(rows: list[dict]) -> str:
    """A row for each attention, and each combination of what else varies, at its best learning
    rate."""
    rates = sorted({row["learning_rate"] for row in rows})
    best, baseline = comparison.best_runs(rows), comparison.baseline(rows)
    heading = ["attention", "val loss", f"minus {baseline}'s", "ms/step", "tokens/s", "peak MiB"]
    table = [[*heading, "best learning rate", "diverged"]]
    for variant, runs in best.items():
        cells = ["diverged", *["-"] * 5]
        if runs:
            is_baseline = runs[0]["attn_type"] == baseline
            differences = [] if is_baseline else comparison.differences(runs, best, baseline)
            peaks = [run["peak_mib"] for run in runs if run["peak_mib"]]
            rate = runs[0]["learning_rate"]
            at_edge = len(rates) > 1 and rate in (rates[0], rates[-1])
            cells = [
                mean_and_spread(run["final_val_loss"] for run in runs),
                mean_and_spread(differences, "+"),
                f"{median(run['ms_per_step'] for run in runs):.1f}",
                f"{median(run['tokens_per_s'] for run in runs):,.0f}",
                f"{max(peaks):,.0f}" if peaks else "n/a",
                f"{rate:g}" + "*" * at_edge,
            ]
        diverged = [row["diverged"] for row in rows if row["variant"] == variant]
        table.append([variant, *cells, f"{sum(diverged)} of {len(diverged)}"])
    return text_table(table, markdown=True)


def all_rates_table(rows: list[dict]) -> str:
    """A row for each attention and a column for each learning rate."""
    rates, best = sorted({row["learning_rate"] for row in rows}), comparison.best_runs(rows)
    table = [["attention", *(f"{rate:g}" for rate in rates)]]
    for variant, runs_at in comparison.by_rate(rows).items():
        table.append([variant])
        for runs in (runs_at.get(rate, []) for rate in rates):
            diverged = sum(run["diverged"] for run in runs)
            text = f"{diverged} diverged"
            if not diverged:
                text = mean_and_spread(run["final_val_loss"] for run in runs)
            table[-1].append(f"**{text}**" if runs and runs == best[variant] else text)
    return text_table(table, markdown=True)


def report(rows: list[dict], trials: list[Trial], command: str) -> str:
    """The comparison in Markdown, from the rows of results.csv."""
    config, missing = trials[0].config, len(trials) - len(rows)
    n_types = len({row["attn_type"] for row in rows})
    keys = list(trials[0].varied)
    varied = f" (except for {', '.join(keys)}, which vary)" if keys else ""
    seeds = ", ".join(str(seed) for seed in sorted({int(row["seed"]) for row in rows}))
    missing_runs = f" {missing} of {len(trials)} runs are missing." if missing else ""
    titles = comparison.PICTURES | comparison.numeric_axes(rows)
    pictures = "\n\n".join(f"![{title}]({name}.png)" for name, title in titles.items())
    return f"""# {n_types} attentions compared

`{command}`: L{config.n_layer} H{config.n_head} C{config.n_embd} T{config.block_size}, data set \
{config.dataset}, {config.max_iters:,} steps of {tokens_per_step(config):,} tokens{varied}, seeds \
{seeds}; \
{machines(trials)}.{missing_runs}

Runs with the same seed see the same batches in the same order, and every run is evaluated on the \
same {config.eval_iters} batches. Losses are those of the last step, in nats per token. Values are \
means over seeds, ± one standard deviation. Differences are taken seed by seed, between runs that \
differ in the attention only, each at its best learning rate.

## Each attention at its best learning rate

{best_rate_table(rows)}

The best learning rate has the lowest mean loss over seeds, among those at which no seed diverged. \
`*` marks a best rate that is the lowest or the highest tried: a better one may lie beyond. Times \
are medians over the log. Memory is the peak of the process or, on a GPU, of its tensors.

## Every learning rate

{all_rates_table(rows)}

{pictures}
"""


def machines(trials: list[Trial]) -> str:
    """The machines on which the trials were trained, and the commits of the code, each once."""
    kinds, commits = [], []
    for found in (trial.saved_config()["found"] for trial in trials if trial.is_done()):
        compiled = "compiled, " if found["compile"] else ""
        kinds.append(f"{found['device_name']}, {found['dtype']}, {compiled}torch {found['torch']}")
        if found["commit"]:
            commits.append(f"commit {found['commit']}")
    return "; ".join(dict.fromkeys(kinds + commits))


def main() -> None:
    given = configurator.parse(CompareConfig, sys.argv[1:])
    config = CompareConfig(**given)
    trials = make_trials(given, config)
    # Here, so that mistakes are reported at once, and trials side by side don't all prepare pydocs
    opened = {}
    for trial in trials:
        if (name := trial.config.dataset) not in opened:
            data = open_data(trial.config, Runtime("cpu", "float32", False))
            opened[name] = data, data.fingerprint()
        data, trial.data = opened[name]
        data.check_length(trial.config.block_size)
    folder = Path(config.out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                problem = f"{folder} is in use by another compare.py, or a train.py that it started"
                raise UserError(f"{problem}; wait for it, or choose another --out_dir") from error
            code, failures = train_all(trials, config, lock)
            write_results(trials, config)
            if code:
                sys.exit(code)
            if any(trial.is_done() for trial in trials):
                comparison.draw_comparison(folder, folder)
    except OSError as error:
        problem = f"{error.filename or folder} can't be written ({error.strerror})"
        raise UserError(f"{problem}; make room, or choose another --out_dir") from error
    except ImportError as error:
        raise UserError(f"no pictures: {error}; pip install matplotlib") from error
    if (folder / "report.md").exists():
        say(f"the report is {folder / 'report.md'}")
    if failures:
        problem = f"{len(failures)} failed and have no row, {failures[0]}"
        raise UserError(f"{problem}; the same command tries them again")


if __name__ == "__main__":
    configurator.run(main)
