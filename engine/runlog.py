"""The log of a run: log.csv, stats.csv, the terminal, wandb, Trackio and TensorBoard."""

import csv
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from engine import ranges
from engine.files import read_rows, whole_file
from engine.progress import tqdm
from engine.runtime import say
from engine.start import tokens_per_step


class RunLog:
    """The log of a run, which only the main process writes. A row of log.csv: step (updates done);
    tokens seen; train_loss of that step's batches (mean over micro-steps and ranks), or
    distill_loss while attention is matched; val_loss and eval_train_loss where an evaluation was
    due; grad_norm of that step before clipping; lr; step_ms, tokens_per_s and mfu (share of the
    GPU's peak) since the row before; peak_mib, the most memory held so far (of the GPU if there is
    one); seconds in training steps so far. stats.csv has ranges.COLUMNS."""

    COLUMNS = (
        "step tokens train_loss distill_loss val_loss eval_train_loss grad_norm lr step_ms "
        "tokens_per_s mfu peak_mib seconds"
    ).split()

    def __init__(self, folder: Path, config, rt, first_step: int):
        self.active, self.config, self.folder, self.rt = rt.is_main, config, folder, rt
        self.stats, self.trackers = None, {}
        if not self.active:
            return
        self.table = Table(folder / "log.csv", self.COLUMNS, first_step)
        self.seconds = float(self.table.last.get("seconds") or 0.0)
        # Rows that are newer than the checkpoint go, even if no more are to come
        if config.stats_interval or (folder / "stats.csv").exists():
            self.stats = Table(folder / "stats.csv", ranges.COLUMNS, first_step)
        # Without steps/s, which tokens/s imply, the line of a long run fits in 80 columns
        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        total, hide_bar = config.max_iters, None  # None: hidden unless stderr is a terminal
        self.bar = tqdm(total=total, initial=first_step, bar_format=form, disable=hide_bar)
        trackers = (config.wandb_log, Wandb), (config.trackio_log, Trackio)
        for wanted, kind in (*trackers, (config.tensorboard_log, TensorBoard)):
            name = kind.__name__.lower()
            if wanted and (tracker := self._try(name, kind, folder, config, first_step)):
                self.trackers[name] = tracker

    def say(self, line: str) -> None:
        """Print a line above the progress bar, if there is one."""
        if self.active:
            print_line = say if self.bar.disable else self.bar.write
            print_line(line)

    def _try(self, name: str, function: Callable, *args) -> object:
        """Call a function of a tracker. Training goes on without one that fails, for example
        because it is not installed or not logged in."""
        try:
            return function(*args)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if isinstance(error, ModuleNotFoundError):
                reason += f"; install it with  pip install {name}"
            self.say(f"{name} is off: {reason}")
            self.trackers.pop(name, None)

    def _track(self, method: str, *args) -> None:
        """Call a method of each tracker."""
        for name, tracker in list(self.trackers.items()):
            self._try(name, getattr(tracker, method), *args)

    def write(self, **row) -> None:
        """Add a row. Its `window_seconds`, those since the last row, are added to `seconds`."""
        if not self.active:
            return
        row["seconds"] = self.seconds = self.seconds + row.pop("window_seconds", 0.0)
        self.table.write([row])
        step, matches = row["step"], "distill_loss" in row
        loss = row["distill_loss"] if matches else row.get("train_loss")
        name = "distill loss" if matches else "loss"
        self._track("log", {k: v for k, v in row.items() if v is not None}, step)
        if "step_ms" in row and self.bar.disable:
            mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
            rates = f"{row['step_ms']:.1f} ms/step, {row['tokens_per_s']:,.0f} tokens/s, mfu {mfu}"
            say(f"step {step}: {name} {loss:.4f}, {rates}")
        elif "step_ms" in row:
            progress = f"{name} {loss:.3f}, {row['tokens_per_s']:,.0f} tok/s"
            self.bar.set_postfix_str(progress, refresh=False)
            self.bar.update(step - self.bar.n)
        if "val_loss" in row:
            losses = f"train loss {row['eval_train_loss']:.4f}, val loss {row['val_loss']:.4f}"
            self.say(f"step {step}: {losses}")

    def write_stats(self, step: int, measure: Callable[[], list[dict]]) -> None:
        """Add the rows that `measure` returns, unless those of this step are already there."""
        if not self.rt.from_main(lambda: step > int(self.stats.last.get("step", -1))):
            return
        rows = [{"step": step, **row} for row in measure()]  # by all ranks, which may share weights
        if self.active:
            self.stats.write(rows)
            self._track("log", ranges.per_layer(rows), step)

    def end(self, draw: bool) -> None:
        """Summarise the stats, and draw pictures of the run if wanted and matplotlib is there."""
        if not self.active:
            return
        config = self.config
        try:
            if config.stats_interval and (rows := read_rows(self.stats.path)):
                self.say(ranges.summary(rows, config.attn_type, config.stats_tolerance))
            self.bar.close()  # drawing prints
            with suppress(ImportError):
                if draw:
                    from engine.pictures import draw_run  # here: matplotlib takes a second

                    for path in draw_run(Path(os.path.relpath(self.folder))):
                        self._track("picture", path, config.max_iters)
        except Exception as error:  # the run itself is done and saved
            self.say(f"no summary of the run: {error}")

    def close(self) -> None:
        if self.active:
            self.table.close()
            if self.stats:
                self.stats.close()
            self.bar.close()
            self._track("close")


def speed(model, config, rt, seconds: float, steps: int, matching: bool = False) -> dict:
    """What a row says about the time of the last steps, and about memory. The cost of a step that
    matches attention is not modelled: it has no mfu."""
    sequences = config.gradient_accumulation_steps * config.batch_size // rt.world_size
    mfu = model.estimate_mfu(sequences, seconds / steps, config.block_size)
    return {
        "step_ms": 1000 * seconds / steps,
        "tokens_per_s": tokens_per_step(config) * steps / seconds,
        "mfu": None if matching else mfu,
        "window_seconds": seconds,
        "peak_mib": rt.peak_memory(),
    }


class Table:
    """A CSV file of a run. Rows newer than `first_step`, the step of the checkpoint that the run
    goes on from, are dropped. A file that can't be written costs one line, and the run goes on."""

    def __init__(self, path: Path, columns: list[str], first_step: int):
        self.path, self.failed, rows = path, False, []
        with suppress(OSError):
            rows = read_rows(path, first_step) if first_step > 0 else []
        self.last = rows[-1] if rows else {}
        try:
            with whole_file(path) as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
            self.file = open(path, "a", newline="", encoding="utf-8")
        except OSError as error:
            self._fail(error)
            self.file = open(os.devnull, "a", encoding="utf-8")
        self.csv = csv.DictWriter(self.file, columns)

    def write(self, rows: list[dict]) -> None:
        self.last = rows[-1]
        text = lambda value: f"{value:.6g}" if type(value) is float else value
        try:
            self.csv.writerows({key: text(value) for key, value in row.items()} for row in rows)
            self.file.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self.failed:
            say(f"{self.path.name} can't be written ({error.strerror}); the run goes on")
        self.failed = True

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was said before
            self.file.close()


class Wandb:
    """A tracker, which is called with numbers and pictures of a step; so is TensorBoard."""

    def __init__(self, folder: Path, config, first_step: int):
        import wandb

        self.wandb, id_file, run_id = wandb, folder / "wandb_id.txt", None
        with suppress(OSError):  # a resumed run goes on with its own page
            run_id = id_file.read_text(encoding="utf-8").strip() if first_step > 0 else None
        self.run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name or folder.name,
            config=asdict(config),
            id=run_id,
            resume="allow",
            settings=wandb.Settings(login_timeout=60),  # seconds at a prompt nobody may see
        )
        with whole_file(id_file) as file:
            file.write(f"{self.run.id}\n")

    def log(self, numbers: dict, step: int) -> None:
        self.run.log(numbers, step=step)

    def picture(self, path: Path, step: int) -> None:
        self.run.log({path.stem: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio(Wandb):
    """Trackio has the functions of wandb. It keeps runs on this disk, and knows them by name."""

    def __init__(self, folder: Path, config, first_step: int):
        import trackio

        self.wandb = trackio
        self.run = trackio.init(
            project=config.wandb_project,
            name=config.wandb_run_name or folder.name,
            config=asdict(config),
            resume="allow" if first_step > 0 else "never",
        )


class TensorBoard:
    def __init__(self, folder: Path, config, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What a resumed run had written after its checkpoint is no longer shown
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
