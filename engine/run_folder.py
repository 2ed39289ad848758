"""The folder of a run: which one it is, how it is made ready, what config.json says."""

import json
import os
import subprocess
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from configurator import ROOT, UserError
from engine import checkpoint as ckpt
from engine import sharding
from engine.files import whole_file
from engine.runtime import Runtime


def run_folder(config) -> Path:
    """The folder that the run writes to. A finetune has one of its own. Links are followed, so that
    a folder on another disk stays there. Raises UserError if the run would write to the folder that
    it starts from."""
    source = Path(os.path.realpath(config.out_dir))  # resolve() fails on a loop of links
    if config.init_from == "distill" and Path(config.teacher).resolve().is_relative_to(source):
        raise UserError(f"out_dir={config.out_dir} holds the teacher; choose another")
    if config.init_from != "finetune":
        return source
    default = f"{Path(config.out_dir).absolute()}-finetune-{config.attn_type}"
    folder = Path(os.path.realpath(config.save_dir or default))
    if source.is_relative_to(folder):
        raise UserError(f"save_dir={folder} holds the run to start from; choose another")
    return folder


def prepare(run, rt: Runtime) -> tuple[Path, dict | None]:
    """Make the folder of a run (start.Start), with config.json and, if there must be one, base.pt.
    Returns the folder, and what each checkpoint says about base.pt. A run that is already there is
    moved aside, and so is the damaged checkpoint of a run that goes on from the checkpoint before
    it. Raises UserError if the folder can't be written."""
    config, folder = run.config, run_folder(run.config)
    resumes = config.init_from == "resume"
    unchanged = run.teacher or (run.model if config.lora_rank else None)
    base = sharding.weights(unchanged, rt) if unchanged and not resumes else None
    if config.init_from == "finetune":
        rt.print(f"finetune of {config.out_dir}, written to {os.path.relpath(folder)}")

    def make() -> dict | None:
        try:
            if not resumes:
                move_aside(folder, rt)
            elif run.source.name != ckpt.LATEST and (folder / ckpt.LATEST).exists():
                os.replace(folder / ckpt.LATEST, folder / f"{ckpt.LATEST}.damaged")
            folder.mkdir(parents=True, exist_ok=True)
            settings = {**asdict(config), "found": environment(run.fingerprint, rt)}
            with whole_file(folder / "config.json") as file:
                file.write(json.dumps(settings, indent=2) + "\n")
            if resumes:
                return run.checkpoint.get("base")
            args = unchanged and unchanged.config.model_args()
            return base and ckpt.save_base(base, args, str(run.source), folder)
        except OSError as error:
            problem = f"{folder} can't be written ({error.strerror})"
            raise UserError(f"{problem}; choose another folder, or make room") from error

    return folder, rt.from_main(make)


def environment(fingerprint: dict, rt: Runtime) -> dict:
    """What config.json says beside the settings: machine, versions, data and commit."""
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return {
        **{key: getattr(rt, key) for key in ("device", "dtype", "compile", "world_size", "launch")},
        "device_name": rt.device_name(),
        "torch": torch.__version__,
        "data": fingerprint,
        "commit": commit,
    }


def move_aside(folder: Path, rt: Runtime) -> None:
    """Rename a folder that holds a run to the first free name of FOLDER.1, FOLDER.2, ..."""
    if holds_checkpoint(folder) or (folder / "log.csv").exists():
        n = 1
        while (aside := folder.with_name(f"{folder.name}.{n}")).exists():
            n += 1
        folder.rename(aside)
        before, after = os.path.relpath(folder), os.path.relpath(aside)
        rt.print(f"{before} holds a run already: moved to {after}")


def holds_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in (ckpt.LATEST, ckpt.PREVIOUS))


def saved_by_this_launch(folder: Path, rt: Runtime) -> bool:
    """Whether `folder` holds a checkpoint that an earlier start of the same torchrun wrote."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return holds_checkpoint(folder) and settings["found"]["launch"] == rt.launch
    except (OSError, ValueError, KeyError, TypeError):
        return False
