"""Shared by the tests of data/: the text behind the files of a prepared data set."""

import json
from pathlib import Path

import numpy as np

from data.tokenizer import from_meta

SHARED = Path(__file__).parents[2] / "shared" / "data"  # files that not every machine has


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its path there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text())


def read_ids(folder: Path, split: str) -> np.ndarray:
    return np.fromfile(folder / f"{split}.bin", np.dtype(read_meta(folder)["dtype"]))


def read_text(folder: Path, split: str) -> str:
    return from_meta(read_meta(folder)).decode(read_ids(folder, split))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text, "other": 1}) for text in texts) + "\n\n")
    return path
