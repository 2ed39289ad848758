"""
Token files in memory, and batches that depend on nothing but their numbers.

Which tokens a batch holds is a pure function of seed, split, step and micro-step. So a resumed run
sees the batches that it would have seen without the interruption, the number of processes may
change between runs, and evaluating more often changes nothing. data/meta.py describes the files.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from data.meta import data_folder, held_splits, known_datasets, read_meta, tokenizer_of

SCAN_LIMIT = 2**30  # bytes; files up to this size are checked whole at the start (a second or two)
PIECE = 2**20  # bytes in each of the 1024 samples of a larger file that are hashed
TAIL = 1024  # tokens at the end of a file that can't all be zero
EVAL_SEED = 1  # of evaluation batches in every run, so that losses of different seeds compare


class Purpose(IntEnum):
    """What random numbers are for; each purpose has a generator of its own."""

    TRAIN = 0
    EVAL = 1
    DROPOUT = 2
    SAMPLING = 3


def random_bits(seed: int, purpose: Purpose, step: int, micro_step: int, n: int) -> np.ndarray:
    """n random uint64 that depend on nothing but the arguments: the raw bits, which numpy promises
    never to change, of Philox, a counter-based generator (Salmon et al. 2011)."""
    return np.random.Philox(key=[seed, purpose], counter=[0, 0, micro_step, step]).random_raw(n)


def dropout_seed(seed: int, step: int, micro_step: int) -> int:
    """The seed for torch's generators in one micro-step of training."""
    return int(random_bits(seed, Purpose.DROPOUT, step, micro_step, 1)[0] >> np.uint64(1))


class Dataset:
    """The token files of one data set; `tokens` maps each of `splits` to its checked file. `meta`
    is what meta.json says, `tokenizer` the part of it that a checkpoint keeps; every id is below
    `vocab_size`. Raises UserError if the folder, a split or the metadata is missing, damaged or
    contradicts itself."""

    def __init__(
        self,
        name: str,
        data_dir: str | Path | None = None,
        splits: Sequence[str] = ("train", "val"),
    ):
        self.name, self.folder = name, data_folder(name, data_dir)
        known = name in known_datasets().split(", ")
        command = f"{name}/prepare.py" if known else "char/prepare.py --input YOUR.txt"
        self.repair = f"python data/{command}"
        if data_dir or not known:
            self.repair += f" --out {os.path.relpath(self.folder)}"
        if not known and not self.folder.is_dir():
            raise UserError(
                f"there is no data set {name!r}; choose from {known_datasets()}, or prepare your "
                f"own text with  {self.repair}"
            )
        self.meta = read_meta(self.folder)
        self.vocab_size, self.tokenizer = self.meta["vocab_size"], tokenizer_of(self.meta)
        held = held_splits(self.folder)
        if held == ("test",) and "train" in splits:
            raise UserError(f"dataset={name} is for evaluation only; choose another --dataset")
        for split in splits:
            if held and split not in held:
                raise UserError(
                    f"{self.folder} has no {split} split, only {', '.join(held)}; choose one of "
                    f"these, or prepare the data again with  {self.repair}"
                )
        self.tokens = {split: self._open(split) for split in splits}

    def _open(self, split: str) -> np.ndarray:
        path = self.folder / f"{split}.bin"
        if not path.is_file():
            raise UserError(f"{path} is missing: prepare the data with  {self.repair}")
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        size, expected = path.stat().st_size, self.meta.get(f"{split}_tokens")
        if size == 0 or size % dtype.itemsize or expected not in (None, size // dtype.itemsize):
            wanted = "" if expected is None else f", {expected * dtype.itemsize:,} in meta.json"
            raise self._damage(split, f"is damaged: {size:,} bytes{wanted}")
        tokens = np.memmap(path, dtype=dtype, mode="r")
        if size <= SCAN_LIMIT:
            self._check_ids(tokens, split)
        if len(tokens) > TAIL and not tokens[-TAIL:].any():
            raise self._damage(split, "ends in zeros, so its writing was interrupted")
        return tokens

    def _damage(self, split: str, what: str, this_rank: bool = False) -> UserError:
        text = f"{self.folder / split}.bin {what}; prepare it again with  {self.repair}"
        return UserError(text, this_rank)

    def _check_ids(self, tokens: np.ndarray, split: str) -> None:
        if (largest := int(tokens.max())) >= self.vocab_size:
            what = f"holds token id {largest}, but vocab_size is {self.vocab_size}"
            raise self._damage(split, what, this_rank=True)  # other ranks' batches may be good

    def fingerprint(self) -> dict[str, str]:
        """The SHA-256 of each split's bytes; for a file larger than SCAN_LIMIT, that of its size
        and 1024 samples. Raises UserError if meta.json gives another one for a whole file."""
        digests = {}
        for split, tokens in self.tokens.items():
            data, sha256 = tokens.view(np.uint8), hashlib.sha256()
            if data.nbytes <= SCAN_LIMIT:
                sha256.update(data)
                if self.meta.get(f"{split}_sha256") not in (None, sha256.hexdigest()):
                    what = "is not the file that meta.json describes (its SHA-256 differs)"
                    raise self._damage(split, what)
            else:
                sha256.update(str(data.nbytes).encode())
                for start in np.linspace(0, data.nbytes - PIECE, 1024, dtype=np.int64):
                    sha256.update(data[start : start + PIECE])
            digests[split] = sha256.hexdigest()
        return digests

    def check_length(self, block_size: int) -> None:
        """Raise UserError if the shortest split has no room for one sequence and its targets."""
        split, tokens = min(self.tokens.items(), key=lambda item: len(item[1]))
        longest = len(tokens) - 1
        if longest < block_size:
            advice = f"pass --block_size={longest} or less"
            if longest == 0:
                advice = f"no block_size fits; prepare more text with  {self.repair}"
            raise UserError(
                f"{self.folder / split}.bin has {len(tokens)} tokens, which is too short for "
                f"block_size={block_size}; {advice}"
            )

    def check_model(self, vocab_size: int, tokenizer: dict | None, model: object) -> None:
        """Raise UserError if the tokens are not for a model with this vocabulary and tokenizer
        (None: not known). `model` names it in the message."""
        if tokenizer and self.tokenizer and tokenizer != self.tokenizer:
            raise UserError(
                f"data set {self.name} is not tokenized as {model} was; prepare it with the same "
                "tokenizer, or choose another --dataset"
            )
        if self.vocab_size > vocab_size:
            raise UserError(
                f"data set {self.name} has vocab_size={self.vocab_size}, but {model} was trained "
                f"with {vocab_size}; choose another --dataset"
            )

    def batch(
        self, split: str, purpose: Purpose, seed: int, step: int, micro_step: int, B: int, T: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 (B, T) each: B random windows, and the same one token later."""
        tokens = self.tokens[split]
        starts = random_bits(seed, purpose, step, micro_step, B) % np.uint64(len(tokens) - T)
        positions = starts.astype(np.int64)[:, None] + np.arange(T + 1)  # (B, T + 1)
        windows = tokens[positions]
        self._check_ids(windows, split)
        windows = torch.from_numpy(windows.astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class Batches:
    """The batches of one rank in the order of training, each loaded while the device works. `next`
    is the one to use now, what load(step, micro_step) returned, or None after the last one. Call
    `advance` once the device has work, to load another."""

    def __init__(self, load: Callable, micro_steps: range, first_step: int, last_step: int):
        self.load = load
        self.order = ((s, m) for s in range(first_step, last_step) for m in micro_steps)
        self.advance()

    def advance(self) -> None:
        key = next(self.order, None)
        self.next = None if key is None else self.load(*key)
