"""
The log of a run: log.csv, the terminal, and Weights & Biases.
"""

import csv
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from runtime import say


class RunLog:
    """log.csv, the terminal and wandb. Only the main process writes; for others it does nothing.

    A row of log.csv: step (updates done), tokens seen, train_loss of that step's batches (mean over
    micro-steps and ranks), or distill_loss while attentions are matched, val_loss and
    eval_train_loss where an evaluation was due, grad_norm of that step before clipping, lr,
    step_ms, tokens_per_s and mfu (share of the GPU's peak) since the row before, the seconds spent
    in training steps so far, and the memory that the process has held at most (MiB; of the GPU if
    there is one). A log that can't be written is no reason to stop: it is said once.
    """

    COLUMNS = (
        "step tokens train_loss distill_loss val_loss eval_train_loss grad_norm lr step_ms "
        "tokens_per_s mfu seconds peak_mib"
    ).split()

    def __init__(self, folder: Path, config, rt, first_step: int):
        self.active, self.seconds, self.wandb, self.failed = rt.is_main, 0.0, None, False
        if not self.active:
            return
        path = folder / "log.csv"
        rows = rows_until(first_step, path) if first_step > 0 else []
        self.seconds = float(rows[-1]["seconds"] or 0.0) if rows else 0.0
        temporary = path.with_name("log.csv.tmp")
        try:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
            os.replace(temporary, path)
        except OSError as error:
            self._fail(error)
        self.file = open(path, "a", newline="", encoding="utf-8")
        self.csv = csv.DictWriter(self.file, self.COLUMNS)
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=config.max_iters, initial=first_step, unit="step", leave=True)
        if config.wandb_log:
            name = config.wandb_run_name or folder.name
            try:
                import wandb

                self.wandb = wandb.init(
                    project=config.wandb_project, name=name, config=asdict(config)
                )
            except Exception as error:  # not installed, not logged in: no reason not to train
                self.say(f"wandb is off: {error}")

    def say(self, line: str) -> None:
        if self.active and self.bar is not None:
            self.bar.write(line)
        elif self.active:
            say(line)

    def _fail(self, error: OSError) -> None:
        if not self.failed:
            say(f"log.csv can't be written ({error.strerror}); the run goes on")
        self.failed = True

    def write(self, **row) -> None:
        """Add a row; its seconds are those of the rows before and its window_seconds."""
        if not self.active:
            return
        row["seconds"] = self.seconds = self.seconds + row.pop("window_seconds", 0.0)
        try:
            self.csv.writerow({k: f"{v:.6g}" if type(v) is float else v for k, v in row.items()})
            self.file.flush()
        except OSError as error:
            self._fail(error)
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        if "step_ms" in row:
            self._progress(row)
        if "val_loss" in row:
            losses = f"train loss {row['eval_train_loss']:.4f}, val loss {row['val_loss']:.4f}"
            self.say(f"step {row['step']}: {losses}")

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
            with suppress(OSError):  # what could not be written was said
                self.file.close()
            if self.bar is not None:
                self.bar.close()
            if self.wandb:
                self.wandb.finish()


def rows_until(step: int, path: Path) -> list[dict]:
    """The whole rows of a log.csv up to `step`: what a checkpoint of that step knows of."""
    rows = []
    with suppress(OSError), open(path, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            with suppress(TypeError, ValueError):  # a row that a kill cut short
                if int(row["step"]) <= step and float(row["seconds"]) >= 0:
                    rows.append({key: row.get(key) for key in RunLog.COLUMNS})
    return rows
