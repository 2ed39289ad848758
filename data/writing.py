"""Encoding text, and writing it as a data set: a .bin file for each split, and meta.json."""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np

from configurator import UserError
from data.meta import SPLITS, UNITS
from data.splits import TENTH, Pieces, split_files
from data.tokenizer import END_OF_TEXT, CharTokenizer, GPT2Tokenizer, code_points

BLOCK = 2**20  # characters that one thread encodes at a time
IS_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])  # U+3000 is the last one


def prepare_files(
    paths: list[Path],
    out: Path,
    tokenizer: str,
    source: str | None = None,
    num_proc: int = 1,
    detokenize: Callable[[str], str] | None = None,
    val: Sequence[Path] = (),
    val_share: Fraction = TENTH,
    own_splits: bool = False,
) -> None:
    """Make a data set of files of text or JSON; `tokenizer` is "char" or "gpt2".

    A character vocabulary holds the characters of the files in the order of their code points. A
    document ends with a blank line, or with END_OF_TEXT for GPT-2. The splits are those of
    `split_files`; a warning on stderr tells where validation is very small or more than half.
    Raises UserError as `split_files` and `write_dataset` do.
    """
    end = {"char": "\n\n", "gpt2": END_OF_TEXT}[tokenizer]
    pieces = functools.partial(split_files, paths, end, val, val_share, own_splits)
    encoder = GPT2Tokenizer() if tokenizer == "gpt2" else char_tokenizer(pieces())
    source = source or ", ".join(path.name for path in (*paths, *val))
    size = sum(path.stat().st_size for path in (*paths, *val))
    tokens = write_dataset(
        out, encoder, pieces(), source, size, num_proc, detokenize, line_ends=own_splits
    )
    share = tokens["val"] / sum(tokens.values())
    lowest, highest = min(0.01, val_share / 2), max(0.5, (1 + val_share) / 2)
    if "test" not in tokens and not lowest <= share <= highest:
        advice = "give other files to --val, or use --val_share X instead"
        if not val:
            advice = "the lengths of the documents differ much; choose some with --val FILE"
        print(f"warning: {share:.2%} of all tokens are for validation; {advice}", file=sys.stderr)


def char_tokenizer(pieces: Pieces) -> CharTokenizer:
    """The tokenizer whose characters are those of the pieces, in the order of their code points."""
    chars = set()
    for _, text in pieces:
        chars.update(text)
    return CharTokenizer("".join(sorted(chars)))


def write_dataset(
    out: Path,
    tokenizer: CharTokenizer | GPT2Tokenizer,
    pieces: Pieces,
    source: str,
    size: int = 0,
    num_proc: int = 1,
    detokenize: Callable[[str], str] | None = None,
    **facts: bool,
) -> dict[str, int]:
    """Write a .bin file of raw little-endian ids for each split, and meta.json; return the number
    of tokens of each split, which is printed too.

    Training and validation must not be empty, unless all text is "test": that data set is for
    evaluation only. `size` is the approximate number of characters, for the progress bar and for an
    early check of the free disk space. `num_proc` threads encode. `detokenize` changes the text
    before it is encoded, many whole lines at a time.

    meta.json gives the length of each split in tokens, in UTF-8 bytes of the encoded text, and in
    words and lines of the text before `detokenize`; END_OF_TEXT counts as a token only. The `facts`
    that are true go there too, for evaluation: with `line_ends` the ends of lines count as words,
    as in the papers; with `last_word` the last word of each document, which ends with END_OF_TEXT,
    is to be predicted.

    All files are written to a temporary folder and renamed once they are complete, meta.json last:
    whatever interrupts the preparation, the earlier files in `out` stay. Raises UserError for an
    empty split, an id outside the vocabulary or the dtype, and a disk that is full or read-only.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    check_disk((out, size // tokenizer.chars_per_token * dtype.itemsize))
    meta = {"vocab_size": tokenizer.vocab_size, "dtype": dtype.name, **tokenizer.meta()}
    with temporary_folder(out) as folder:
        with contextlib.ExitStack() as stack:
            files = {
                split: stack.enter_context(TokenFile(folder / f"{split}.bin", dtype, tokenizer))
                for split in SPLITS
            }
            for split, original, text, ids in encode(pieces, tokenizer, size, num_proc, detokenize):
                files[split].append(original, text, ids)
        splits = [split for split in SPLITS if files[split].tokens]
        for split in ("train", "val"):
            if split not in splits and splits != ["test"]:
                raise UserError(
                    f"{split}.bin would be empty: {source} is too short; give more text"
                )
        for split in splits:
            meta |= {f"{split}_{key}": value for key, value in files[split].meta().items()}
        meta |= {name: True for name, true in facts.items() if true} | {"source": source}
        with open(folder / "meta.json", "w", encoding="utf-8") as file:
            file.write(json.dumps(meta, indent=1) + "\n")
            flush_to_disk(file)
        for name in (*(f"{split}.bin" for split in splits), "meta.json"):
            os.replace(folder / name, out / name)
    for split in splits:
        print(f"{split}: {files[split].tokens:,} tokens in {out / split}.bin")
    return {split: files[split].tokens for split in splits}


def encode(pieces: Pieces, tokenizer, size: int, num_proc: int, detokenize) -> Iterator[tuple]:
    """(split, original, text, ids) of the pieces in order: the text before and after `detokenize`,
    and its ids. Threads work ahead while a progress bar shows."""

    def work(text):
        text = detokenize(text) if detokenize else text
        return text, tokenizer.encode(text)

    blocks = join_pieces(pieces)
    waiting = collections.deque()
    with ThreadPoolExecutor(num_proc) as pool, progress_bar(size, "char") as progress:
        while True:
            for split, text in itertools.islice(blocks, 2 * num_proc - len(waiting)):
                waiting.append((split, text, pool.submit(work, text)))
            if not waiting:
                return
            split, original, done = waiting.popleft()
            yield split, original, *done.result()
            progress.update(len(original))


def join_pieces(pieces: Pieces) -> Iterator[tuple[str, str]]:
    """The pieces joined to about BLOCK characters each, which takes less time to encode."""
    waiting = {split: [] for split in SPLITS}
    length = dict.fromkeys(SPLITS, 0)
    for split, text in pieces:
        waiting[split].append(text)
        length[split] += len(text)
        if length[split] >= BLOCK:
            yield split, "".join(waiting[split])
            waiting[split], length[split] = [], 0
    for split, texts in waiting.items():
        yield split, "".join(texts)


class TokenFile:
    """A file of token ids in the making, with its lengths and its SHA-256."""

    def __init__(self, path: Path, dtype: np.dtype, tokenizer: CharTokenizer | GPT2Tokenizer):
        self.dtype = dtype
        self.largest = min(tokenizer.vocab_size - 1, np.iinfo(dtype).max)
        self.has_eot = hasattr(tokenizer, "eot")
        self.tokens = self.bytes = self.words = self.lines = 0
        self._after_space = True  # a word begins where a letter follows a space, or nothing
        self._sha256 = hashlib.sha256()
        self._file = open(path, "wb")

    def append(self, original: str, text: str, ids: np.ndarray) -> None:
        """Write the ids of `text`, and count; words and lines are those of `original`."""
        if ids.size and not (0 <= ids.min() and ids.max() <= self.largest):
            raise UserError(
                f"the tokenizer gave ids from {ids.min()} to {ids.max()}, but the vocabulary and "
                f"{self.dtype.name} allow 0 to {self.largest}; prepare with another tokenizer"
            )
        data = ids.astype(self.dtype).tobytes()
        self._file.write(data)
        self._sha256.update(data)
        self.tokens += len(ids)
        if self.has_eot:
            original = original.replace(END_OF_TEXT, " ")
            text = text.replace(END_OF_TEXT, "")
        self.bytes += len(text.encode("utf-8", "replace"))
        self.lines += original.count("\n")
        spaces = IS_SPACE[np.minimum(code_points(original), 0x3001)]
        spaces = np.append(self._after_space, spaces)
        self.words += int(np.count_nonzero(spaces[:-1] > spaces[1:]))
        self._after_space = spaces[-1]

    def meta(self) -> dict:
        """What meta.json says about the file."""
        return {**{unit: getattr(self, unit) for unit in UNITS}, "sha256": self._sha256.hexdigest()}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with self._file:
            flush_to_disk(self._file)


def progress_bar(total: int, unit: str):
    """A progress bar where stderr is a terminal, else nothing; `total` is 0 if unknown."""
    from engine.progress import tqdm  # imports tqdm, where it is installed

    return tqdm(total=total or None, unit=unit, unit_scale=True, disable=None)


def flush_to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """A folder inside `out`, and so on the same disk, that is removed with all it still holds."""
    with writable(out), tempfile.TemporaryDirectory(dir=out, suffix=".tmp") as folder:
        yield Path(folder)


@contextlib.contextmanager
def writable(out: Path) -> Iterator[None]:
    """Make the folder `out`. An OSError in there becomes a UserError that names --out."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"{out} can't be written ({error}); choose another with --out") from error


def check_disk(*needs: tuple[Path, int]) -> None:
    """Raise UserError unless the disks have room for all `needs`, (folder, bytes) each."""
    needed = {}  # by disk: [bytes, one of its folders]
    for folder, size in needs:
        folder = folder.absolute()
        while not folder.exists():
            folder = folder.parent
        disk = needed.setdefault(folder.stat().st_dev, [0, folder])
        disk[0] += size
    for size, folder in needed.values():
        if size > (free := shutil.disk_usage(folder).free):
            raise UserError(
                f"the disk of {folder} has {free / 1e9:.1f} GB free, but {size / 1e9:.1f} GB are "
                "needed; make room, or choose another disk with --out (and HF_HOME, for the hub)"
            )
