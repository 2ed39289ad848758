"""
The log of a run: log.csv, stats.csv, the terminal, Weights & Biases and TensorBoard.
"""

import csv
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from engine import ranges
from engine.runtime import say


class RunLog:
    """log.csv, stats.csv, the terminal and trackers. Only the main process writes; for others it
    does nothing.

    A row of log.csv: step (updates done), tokens seen, train_loss of that step's batches (mean over
    micro-steps and ranks), or distill_loss while attentions are matched, val_loss and
    eval_train_loss where an evaluation was due, grad_norm of that step before clipping, lr,
    step_ms, tokens_per_s and mfu (share of the GPU's peak) since the row before, peak_mib, the most
    memory that the process has held (MiB; of the GPU if there is one), and the seconds spent in
    training steps so far. Those of stats.csv are in ranges.COLUMNS.
    """

    COLUMNS = (
        "step tokens train_loss distill_loss val_loss eval_train_loss grad_norm lr step_ms "
        "tokens_per_s mfu peak_mib seconds"
    ).split()

    def __init__(self, folder: Path, config, rt, first_step: int):
        self.active, self.config, self.bar, self.trackers = rt.is_main, config, None, {}
        if not self.active:
            return
        self.table = Table(folder / "log.csv", self.COLUMNS, first_step)
        self.seconds = float(self.table.last.get("seconds") or 0.0)
        self.stats = None
        # What a checkpoint does not know of goes, even if no more is to come
        if config.stats_interval or (folder / "stats.csv").exists():
            self.stats = Table(folder / "stats.csv", ranges.COLUMNS, first_step)
        if sys.stderr.isatty():
            from tqdm import tqdm

            # Without steps/s, which tokens/s imply, a long run's line fits in 80 columns
            form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(total=config.max_iters, initial=first_step, bar_format=form)
        for wanted, kind in ((config.wandb_log, Wandb), (config.tensorboard_log, TensorBoard)):
            name = kind.__name__.lower()
            try:
                if wanted:
                    self.trackers[name] = kind(folder, config, first_step)
            except Exception as error:  # not installed, not logged in: no reason not to train
                self._off(name, error)

    def say(self, line: str) -> None:
        if self.active and self.bar is not None:
            self.bar.write(line)
        elif self.active:
            say(line)

    def _off(self, name: str, error: Exception) -> None:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        self.say(f"{name} is off: {reason}")
        self.trackers.pop(name, None)

    def _track(self, method: str, *args) -> None:
        """Call a method of each tracker. One that fails in any way is left alone from then on."""
        for name, tracker in list(self.trackers.items()):
            try:
                getattr(tracker, method)(*args)
            except Exception as error:
                self._off(name, error)

    def write(self, **row) -> None:
        """Add a row; its seconds are those of the rows before and its window_seconds."""
        if not self.active:
            return
        row["seconds"] = self.seconds = self.seconds + row.pop("window_seconds", 0.0)
        self.table.write([row])
        self._track("log", {k: v for k, v in row.items() if v is not None}, row["step"])
        if "step_ms" in row:
            self._progress(row)
        if "val_loss" in row:
            losses = f"train loss {row['eval_train_loss']:.4f}, val loss {row['val_loss']:.4f}"
            self.say(f"step {row['step']}: {losses}")

    def write_stats(self, step: int, measure: Callable[[], list[dict]]) -> None:
        """Add the rows that `measure` gives, unless this step's are there."""
        if self.active and step > int(self.stats.last.get("step", -1)):
            rows = [{"step": step, **row} for row in measure()]
            self.stats.write(rows)
            self._track("log", ranges.per_layer(rows), step)

    def end(self, draw: Callable[[], list[Path]] | None) -> None:
        """What the stats come to, and the pictures that `draw` makes, if it can."""
        if not self.active:
            return
        config = self.config
        try:
            if config.stats_interval and (rows := self.stats.read()):
                self.say(ranges.summary(rows, config.attn_type, config.stats_tolerance))
            self._close_bar()  # what draws prints
            for path in draw() if draw else []:
                self._track("picture", path, config.max_iters)
        except Exception as error:  # the run itself is done and saved
            self.say(f"it can't be summed up: {error}")

    def _progress(self, row: dict) -> None:
        loss = row["distill_loss"] if "distill_loss" in row else row["train_loss"]
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {loss:.3f}, {row['tokens_per_s']:,.0f} tok/s", refresh=False
            )
            self.bar.update(row["step"] - self.bar.n)
            return
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
        say(
            f"step {row['step']}: loss {loss:.4f}, {row['step_ms']:.1f} ms/step, "
            f"{row['tokens_per_s']:,.0f} tokens/s, mfu {mfu}"
        )

    def close(self) -> None:
        if self.active:
            self.table.close()
            if self.stats:
                self.stats.close()
            self._close_bar()
            self._track("close")

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Table:
    """A CSV file of a run. Rows after `first_step`, the step of the checkpoint that the run goes on
    from, are dropped. A file that can't be written is no reason to stop: it is said once."""

    def __init__(self, path: Path, columns: list[str], first_step: int):
        self.path, self.columns, self.failed = path, columns, False
        rows = rows_until(first_step, path, columns) if first_step > 0 else []
        self.last = rows[-1] if rows else {}
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
            os.replace(temporary, path)
            self.file = open(path, "a", newline="", encoding="utf-8")
        except OSError as error:
            self._fail(error)
            self.file = open(os.devnull, "a", encoding="utf-8")
        self.csv = csv.DictWriter(self.file, columns)

    def write(self, rows: list[dict]) -> None:
        self.last = rows[-1]
        try:
            for row in rows:
                rounded = {k: f"{v:.6g}" if type(v) is float else v for k, v in row.items()}
                self.csv.writerow(rounded)
            self.file.flush()
        except OSError as error:
            self._fail(error)

    def read(self) -> list[dict]:
        return rows_until(sys.maxsize, self.path, self.columns)

    def _fail(self, error: OSError) -> None:
        if not self.failed:
            say(f"{self.path.name} can't be written ({error.strerror}); the run goes on")
        self.failed = True

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was said
            self.file.close()


def rows_until(step: int, path: Path, columns: list[str]) -> list[dict]:
    """The whole rows of a log up to `step`: what a checkpoint of that step knows of."""
    rows = []
    with suppress(OSError), open(path, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            with suppress(KeyError, TypeError, ValueError):  # cut short by a kill, or no log
                float(row[columns[-1]])
                if int(row["step"]) <= step:
                    rows.append({key: row.get(key) for key in columns})
    return rows


# ----------------------------------------------------------------------------
# Trackers: numbers and pictures of a step, by name


class Wandb:
    def __init__(self, folder: Path, config, first_step: int):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name or folder.name,
            config=asdict(config),
            settings=wandb.Settings(login_timeout=60),  # seconds at a prompt nobody may see
        )

    def log(self, numbers: dict, step: int) -> None:
        self.run.log(numbers, step=step)

    def picture(self, path: Path, step: int) -> None:
        self.run.log({path.stem: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    def __init__(self, folder: Path, config, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What a run that is resumed has written beyond its checkpoint is not shown any more
        purge_step = first_step + 1 if first_step > 0 else None
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=purge_step)

    def log(self, numbers: dict, step: int) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def picture(self, path: Path, step: int) -> None:
        from matplotlib.image import imread

        self.writer.add_image(path.stem, imread(path), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
