"""What the tests share: a small data set, and scripts run in this process or in another."""

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

# One thread in each process: pytest-xdist runs as many processes as there are cores, and OpenMP's
# threads would wait for each other while another process has their core
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network

import numpy as np
import pytest
import torch

import configurator
from model import ATTN_TYPES

ROOT = Path(__file__).parent.parent
# Every attention of the registry; families by two of their members
EVERY_ATTN_TYPE = [
    name.replace("-n", n) for name in ATTN_TYPES for n in (("-4", "-8") if "-n" in name else ("",))
]
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4"]
TINY += ["--gradient_accumulation_steps=2", "--eval_iters=2", "--device=cpu", "--dtype=float32"]

torch.set_num_threads(1)


def write_dataset(folder: Path, text: str) -> None:
    """A character-level data set of `text`, 90 % of it for training."""
    chars = "".join(sorted(set(text)))
    ids = np.array([chars.index(c) for c in text], dtype="<u2")
    n = len(ids) * 9 // 10
    folder.mkdir(parents=True, exist_ok=True)
    ids[:n].tofile(folder / "train.bin")
    ids[n:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(chars), "dtype": "uint16", "tokenizer": "char", "chars": chars}
    meta |= {"train_tokens": n, "val_tokens": len(ids) - n}
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture
def data_dir(tmp_path):
    """A folder of data sets that holds one, `abc`."""
    write_dataset(tmp_path / "data" / "abc", "the cat sat on the mat, and the dog sat too.\n" * 40)
    return tmp_path / "data"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, data_dir):
    """Call a script's main in this process: run("train", "--key=value", ...) -> its stdout.

    The working directory is tmp_path. A UserError becomes `Failed` with what stderr said.
    """
    monkeypatch.chdir(tmp_path)

    def call(script: str, *args: str) -> str:
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *args])
        capsys.readouterr()
        try:
            configurator.run(module.main)
        except SystemExit as stop:
            if stop.code not in (0, None):
                raise Failed(stop.code, capsys.readouterr().err) from None
        return capsys.readouterr().out

    return call


class Failed(Exception):
    """A script ended with an exit code other than 0."""

    def __init__(self, code: int, stderr: str):
        super().__init__(f"exit code {code}: {stderr}")
        self.code, self.stderr = code, stderr


@pytest.fixture
def run_train(run, data_dir):
    """Train a tiny model on the data set abc: run_train("--out_dir=OUT", ...) -> stdout."""
    common = [*TINY, "--dataset=abc", f"--data_dir={data_dir}", "--max_iters=4", "--warmup_iters=2"]
    return lambda *args: run("train", *common, *args)


def log_rows(folder: Path, name: str = "log.csv") -> list[dict[str, str]]:
    """The rows of a run's log, as text."""
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def subprocess_run(*args: str, cwd: Path = ROOT, **kwargs) -> subprocess.CompletedProcess:
    """Run a Python command line in a process of its own, with stdout and stderr kept."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, **kwargs)


@pytest.fixture
def gpt2_files(monkeypatch):
    """Let tiktoken find GPT-2's vocabulary, or skip the test."""
    folder = ROOT.parent / "shared" / "data" / "tiktoken"
    if not folder.is_dir():
        pytest.skip("GPT-2's vocabulary is not on this machine")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))


def write_run(folder, attn_type, log):
    """The folder of a run, with a log of (tokens, val_loss)."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"attn_type": attn_type}))
    lines = ["tokens,train_loss,val_loss", *(f"{tokens},,{loss}" for tokens, loss in log)]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def figures(monkeypatch):
    """The figures by name, instead of files."""
    drawn = {}
    keep = lambda figure, path, **_: drawn.update({Path(path).stem: figure})
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
    return drawn
