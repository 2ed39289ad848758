"""
The folder of a data set, its metadata and its splits; it can be read without torch.

A data set is a folder data/NAME with train.bin and val.bin, raw little-endian token ids, and
meta.json: vocab_size, dtype, tokenizer (with its chars or strings, if it has any), lengths, SHA-256
and source. Some also have test.bin, or only that: it is for evaluation. nanoGPT's folders are read
too, with a meta.pkl in place of meta.json, or neither.
"""

import io
import itertools
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from configurator import UserError

DATA_DIR = Path(__file__).parent
SPLITS = ("train", "val", "test")
UNITS = ("tokens", "bytes", "words", "lines")  # in which meta.json gives the length of a split


def data_folder(name: str, data_dir: str | Path | None = None) -> Path:
    """The folder of data set `name`. Raises UserError for a path in place of a name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"dataset={name!r} is not a name; the data sets are {known_datasets()}")
    return (Path(data_dir) if data_dir else DATA_DIR) / name


def known_datasets() -> str:
    """The names of the data sets that have a prepare.py, separated by commas. That of `char` is for
    the user's own text."""
    names = {path.parent.name for path in DATA_DIR.glob("*/prepare.py")}
    return ", ".join(sorted(names - {"char"}))


def held_splits(folder: Path) -> tuple[str, ...]:
    """The splits that a data set's meta.json describes, or else those that it has a file of."""
    meta = read_meta(folder)
    described = tuple(split for split in SPLITS if f"{split}_tokens" in meta)
    return described or tuple(split for split in SPLITS if (folder / f"{split}.bin").is_file())


def read_meta(folder: Path) -> dict:
    """The metadata of a data set. Raises UserError for a file that cannot be read or contradicts
    itself."""
    if (path := folder / "meta.json").is_file():
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error}); prepare the data again") from error
    elif (path := folder / "meta.pkl").is_file():
        meta = read_meta_pickle(path)
    else:  # nanoGPT's openwebtext: GPT-2 BPE, two bytes a token
        meta = {"vocab_size": 50257, "dtype": "uint16", "tokenizer": "gpt2"}
    meta = meta if isinstance(meta, dict) else {}
    limit = {"uint16": 2**16, "uint32": 2**32}.get(str(meta.get("dtype")), 0)
    vocab_size, fits = meta.get("vocab_size"), meta.get("tokenizer") is None
    if not (type(vocab_size) is int and 0 < vocab_size <= limit):
        raise UserError(f"{path} needs a dtype (uint16 or uint32) and a vocab_size that fits it")
    for split, unit in itertools.product(SPLITS, UNITS):
        if type(meta.get(key := f"{split}_{unit}", 0)) is not int:
            raise UserError(f"{path} needs a whole number as {key}; prepare the data again")
    match meta:
        case {"tokenizer": "gpt2"}:
            fits = vocab_size == 50257
        case {"tokenizer": "char", "chars": str(tokens)}:
            fits = 0 < len(tokens) <= vocab_size  # the ids from len(tokens) on may be unused
        case {"tokenizer": "strings", "strings": list(tokens)}:
            fits = 0 < len(tokens) <= vocab_size
    if not fits:
        raise UserError(f"{path} has a tokenizer that does not fit its vocab_size={vocab_size}")
    return meta


def tokenizer_of(meta: dict) -> dict:
    """The part of the metadata that describes the tokenizer; checkpoints keep it."""
    return {key: meta[key] for key in ("tokenizer", "chars", "strings") if key in meta}


def read_meta_pickle(path: Path) -> dict:
    """nanoGPT's meta.pkl (vocab_size, itos, stoi) as a meta.json; nothing in it is run. Tokens that
    are no strings make no tokenizer, which is enough for training."""
    try:
        old = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        meta = {"vocab_size": old["vocab_size"], "dtype": "uint16"}
        itos = old.get("itos") or {}
        itos = itos if isinstance(itos, dict) else dict(enumerate(itos))
        strings = [itos.get(i) for i in range(min(len(itos), meta["vocab_size"]))]
    except Exception as error:  # a pickle can fail in any way
        raise UserError(f"{path} is not a plain meta.pkl of nanoGPT: {error}") from error
    if not strings or not all(isinstance(string, str) for string in strings):
        return meta
    if all(len(string) == 1 for string in strings) and len(set(strings)) == len(strings):
        return {**meta, "tokenizer": "char", "chars": "".join(strings)}
    return {**meta, "tokenizer": "strings", "strings": strings}


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that imports nothing and calls nothing but the stand-ins made here: all that
    they can build is Python's scalars, from those of numpy."""

    def find_class(self, module: str, name: str) -> Callable:
        class Dtype:
            def __init__(self, code, align, copy):
                self.code = code

            def __setstate__(self, state):
                self.code = f"{state[1]}{self.code}"  # with the byte order

        def scalar(dtype, data):
            if not re.fullmatch(r"[<>|]([biuf][1248]|U\d+)", dtype.code):
                raise pickle.UnpicklingError(f"it has a number of type {dtype.code}")
            return np.frombuffer(data, dtype.code).item()

        stand_ins = {
            "numpy.dtype": Dtype,
            "numpy.core.multiarray.scalar": scalar,
            "numpy._core.multiarray.scalar": scalar,
            "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # bytes in old pickles
        }
        if f"{module}.{name}" not in stand_ins:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return stand_ins[f"{module}.{name}"]
