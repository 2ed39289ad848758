"""
Token files, and batches as a pure function of (seed, split, step, micro-step).

A data set is a folder data/NAME with train.bin and val.bin, raw little-endian token ids, and
meta.json: vocab_size, dtype, tokenizer (with its chars, if it is a character-level one), lengths,
SHA-256 and source. Some have test.bin too, or nothing else: those are for evaluation only.
nanoGPT's folders are read too: bins alone are GPT-2 BPE in uint16, and a meta.pkl goes through an
unpickler that can build nothing but plain containers.

No random state is kept: which tokens a batch holds follows from its numbers alone. So a resumed run
sees the batches that it would have seen, the world size may change between runs, and evaluating
more often changes nothing.
"""

import hashlib
import io
import itertools
import json
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from configurator import UserError

DATA_DIR = Path(__file__).parent
SCAN_LIMIT = 2**30  # bytes; files up to this size are checked whole at the start (a second or two)
PIECE = 2**20  # bytes; of a larger file so many are hashed at a time
TAIL = 1024  # tokens at the end of a file that can't all be zero
SPLITS = ("train", "val", "test")

# What a random number is for: the last word of the generator's key
TRAIN, EVAL, DROPOUT, SAMPLE = range(4)
EVAL_SEED = 1  # of evaluation batches, whatever the run's seed: losses of different seeds compare


def random_bits(seed: int, purpose: int, step: int, micro_step: int, n: int) -> np.ndarray:
    """n random uint64 that depend on nothing but the arguments (Philox, a counter-based generator:
    Salmon et al. 2011). Raw bits, since numpy promises that these never change between versions."""
    return np.random.Philox(key=[seed, purpose], counter=[0, 0, micro_step, step]).random_raw(n)


def dropout_seed(seed: int, step: int, micro_step: int) -> int:
    """The seed for torch's generators in one micro-step of training."""
    return int(random_bits(seed, DROPOUT, step, micro_step, 1)[0] >> np.uint64(1))


class Dataset:
    """The token files of one data set: those of `splits`, opened and checked, are in `tokens`.

    `meta` is what meta.json says; `vocab_size` bounds the ids. Raises UserError if the folder, a
    file or the metadata is missing, damaged or contradicts itself, and if the data set has not
    these splits.
    """

    def __init__(
        self,
        name: str,
        data_dir: str | Path | None = None,
        splits: Sequence[str] = ("train", "val"),
    ):
        self.folder = data_folder(name, data_dir)
        self.name = name
        known = (DATA_DIR / name / "prepare.py").is_file()
        script = f"data/{name if known else 'char'}/prepare.py"
        self.repair = f"python {script}" + ("" if known else " --input YOUR.txt")
        if data_dir or not known:
            self.repair += f" --out {os.path.relpath(self.folder)}"
        if not known and not self.folder.is_dir():
            raise UserError(
                f"there is no data set {name!r}; there is {known_datasets()}, and of your own text "
                f"you make one with  {self.repair}"
            )
        self.meta = read_meta(self.folder)
        self.vocab_size = self.meta["vocab_size"]
        # What a checkpoint keeps, so that it can be sampled by itself
        self.tokenizer = {k: self.meta[k] for k in ("tokenizer", "chars") if k in self.meta}
        held = held_splits(self.folder)
        if held == ("test",) and "train" in splits:
            raise UserError(f"dataset={name} is for evaluation only; choose another --dataset")
        for split in splits:
            if held and split not in held:
                raise UserError(
                    f"{self.folder} has no {split} split, only {', '.join(held)}; choose of these, "
                    f"or prepare the data again with  {self.repair}"
                )
        self.tokens = {split: self._open(split) for split in splits}

    def _open(self, split: str) -> np.ndarray:
        path = self.folder / f"{split}.bin"
        if not path.is_file():
            raise UserError(f"{path} is missing: prepare the data with  {self.repair}")
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        size, expected = path.stat().st_size, self.meta.get(f"{split}_tokens")
        if size == 0 or size % dtype.itemsize or expected not in (None, size // dtype.itemsize):
            told = "" if expected is None else f", {expected * dtype.itemsize:,} in meta.json"
            raise UserError(
                f"{path} is damaged: {size:,} bytes{told}; prepare it again with  {self.repair}"
            )
        tokens = np.memmap(path, dtype=dtype, mode="r")
        if size <= SCAN_LIMIT:
            self._check_ids(tokens, split)
        if len(tokens) > TAIL and not tokens[-TAIL:].any():
            raise UserError(
                f"{path} ends in zeros, so it was not written to its end; prepare it again with  "
                f"{self.repair}"
            )
        return tokens

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of each split's bytes; of a file larger than SCAN_LIMIT, of its size and of 1024
        pieces. Raises UserError if a whole file's is not the one in meta.json."""
        digests = {}
        for split, tokens in self.tokens.items():
            data = tokens.view(np.uint8)
            sha256, known = hashlib.sha256(), self.meta.get(f"{split}_sha256")
            if data.nbytes <= SCAN_LIMIT:
                sha256.update(data)
                if known not in (None, sha256.hexdigest()):
                    raise UserError(
                        f"{self.folder / split}.bin is not the file that meta.json describes (its "
                        f"SHA-256 differs); prepare it again with  {self.repair}"
                    )
            else:
                sha256.update(str(data.nbytes).encode())
                for start in np.linspace(0, data.nbytes - PIECE, 1024, dtype=np.int64):
                    sha256.update(data[start : start + PIECE])
            digests[split] = sha256.hexdigest()
        return digests

    def _check_ids(self, tokens: np.ndarray, split: str) -> None:
        if (largest := int(tokens.max())) >= self.vocab_size:
            raise UserError(
                f"{self.folder / split}.bin holds token id {largest}, but vocab_size is "
                f"{self.vocab_size}; prepare it again with  {self.repair}",
                this_rank=True,  # another rank's batch may be whole
            )

    def check_length(self, block_size: int) -> None:
        """Raise UserError if a split has no room for one sequence and its targets."""
        for split, tokens in self.tokens.items():
            if len(tokens) <= block_size:
                raise UserError(
                    f"{self.folder / split}.bin has {len(tokens)} tokens, which is too short for "
                    f"block_size={block_size}; pass --block_size={max(1, len(tokens) - 1)} or less"
                )

    def check_model(self, vocab_size: int, tokenizer: dict | None, model: object) -> None:
        """Raise UserError if a model of this vocabulary, and tokenizer if known, can't read it."""
        if tokenizer and self.tokenizer and tokenizer != self.tokenizer:
            raise UserError(
                f"data set {self.name} is not tokenized as {model} was; prepare it with that "
                "tokenizer, or choose another --dataset"
            )
        if self.vocab_size > vocab_size:
            raise UserError(
                f"data set {self.name} has vocab_size={self.vocab_size}, but {model} was trained "
                f"with {vocab_size}; choose another --dataset"
            )

    def batch(
        self, split: str, purpose: int, seed: int, step: int, micro_step: int, B: int, T: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 (B, T) each: B random windows, targets one token later."""
        tokens = self.tokens[split]
        starts = random_bits(seed, purpose, step, micro_step, B) % np.uint64(len(tokens) - T)
        windows = starts.astype(np.int64)[:, None] + np.arange(T + 1)  # (B, T + 1)
        window = tokens[windows]
        self._check_ids(window, split)
        window = torch.from_numpy(window.astype(np.int64))
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def data_folder(name: str, data_dir: str | Path | None = None) -> Path:
    """The folder of data set `name`, which is a name and never a path."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"dataset={name!r} is not a name; the data sets are {known_datasets()}")
    return (Path(data_dir) if data_dir else DATA_DIR) / name


def known_datasets() -> str:
    return ", ".join(sorted(p.parent.name for p in DATA_DIR.glob("*/prepare.py")))


def held_splits(folder: Path) -> tuple[str, ...]:
    """The splits that a data set's meta.json tells of, or else those that it has a file of."""
    meta = read_meta(folder)
    told = tuple(split for split in SPLITS if f"{split}_tokens" in meta)
    return told or tuple(split for split in SPLITS if (folder / f"{split}.bin").is_file())


def read_meta(folder: Path) -> dict:
    """The metadata of a data set: of meta.json, of nanoGPT's meta.pkl, or what bins alone imply."""
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
    fits = {"uint16": 2**16, "uint32": 2**32}.get(str(meta.get("dtype")), 0)
    vocab_size = meta.get("vocab_size")
    if not (type(vocab_size) is int and 0 < vocab_size <= fits):
        raise UserError(f"{path} needs a dtype (uint16 or uint32) and a vocab_size that fits it")
    for split, unit in itertools.product(SPLITS, ("tokens", "bytes", "words", "lines")):
        if type(meta.get(key := f"{split}_{unit}", 0)) is not int:
            raise UserError(f"{path} needs a whole number as {key}; prepare the data again")
    known = {"char": len(str(meta.get("chars", ""))), "gpt2": 50257, None: vocab_size}
    tokenizer = meta.get("tokenizer")
    if not isinstance(tokenizer, str | None) or known.get(tokenizer) != vocab_size:
        raise UserError(f"{path} has a tokenizer that does not fit its vocab_size={vocab_size}")
    return meta


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_meta_pickle(path: Path) -> dict:
    """nanoGPT's meta.pkl (vocab_size, itos, stoi) as our metadata; nothing in it is run."""
    try:
        old = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        chars = "".join(old["itos"][i] for i in range(old["vocab_size"]))
    except Exception as error:  # a pickle can fail in any way
        raise UserError(f"{path} is not a plain meta.pkl of nanoGPT: {error}") from error
    return {"vocab_size": len(chars), "dtype": "uint16", "tokenizer": "char", "chars": chars}


class Batches:
    """The batches of this rank, one step after the other, each loaded while the device is busy.

    `load(step, micro_step)` gives inputs and targets (B, T) on the device. `next` is the batch to
    use now; `advance`, called when the device has been given work, loads the one after it.
    """

    def __init__(self, load, micro_steps: range, first_step: int, last_step: int):
        self.load = load
        self.order = ((s, m) for s in range(first_step, last_step) for m in micro_steps)
        self.advance()

    def advance(self) -> None:
        key = next(self.order, None)
        self.next = None if key is None else self.load(*key)
