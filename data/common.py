"""
What the prepare.py scripts share: command line, reading text, downloads, writing a data set.

Text travels as a stream of pieces, ("train" or "val", text), so that nothing is ever held whole.
A piece begins where GPT-2's tokens may be cut: to encode pieces or the whole text is the same.
"""

import argparse
import contextlib
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError
from runtime import HUB, reachable
from tokenizer import END_OF_TEXT, CharTokenizer, GPT2Tokenizer

CHUNK = 2**20  # characters or bytes read, and characters encoded, at a time
OFFLINE = "on a machine that is offline, pass --input FILE (text or .jsonl)"

# Everything before the last line break that a word follows. To cut there changes no token, since in
# GPT-2's pattern such a line break stands alone. ('<' may begin END_OF_TEXT, where it does not.)
WHOLE_LINES = re.compile(r".*(?=\n[^\s<])", re.DOTALL)

Pieces = Iterable[tuple[str, str]]


# ---- command line ----


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse_args(script: str, doc: str, input_required: bool = False, num_proc: bool = False):
    """The command line of a prepare.py: `input` (list of paths), `out`, and `num_proc` if wanted.

    Raises UserError for an option that isn't understood and a file that isn't there.
    """
    parser = _Parser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        required=input_required,
        metavar="FILE",
        help='text in UTF-8, or .jsonl with a "text" in each line; several may be given',
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(script).parent,
        metavar="DIR",
        help="where train.bin, val.bin and meta.json go (default: %(default)s)",
    )
    if num_proc:
        parser.add_argument(
            "--num_proc",
            type=int,
            default=os.cpu_count(),
            metavar="N",
            help="threads and processes to use (default: %(default)s)",
        )
    args = parser.parse_args()
    for path in args.input:
        if not (path.is_file() and os.access(path, os.R_OK)):
            raise UserError(f"--input {path} can't be read; give a file of text, or .jsonl")
    if num_proc and args.num_proc < 1:
        raise UserError(f"--num_proc {args.num_proc} is impossible; it must be at least 1")
    return args


# ---- reading ----


def read_files(paths: list[Path], end: str, every: int = 10) -> Iterator[tuple[str, str]]:
    """The pieces of text files and of .jsonl files; one part in `every` is validation.

    Of a plain text it is the end (the last tenth, by characters); of .jsonl documents it is the
    first and each `every`-th after it. `end` is put after each document, and between plain texts.
    Raises UserError for a file that is not UTF-8 or not such .jsonl.
    """
    jsonl = [path for path in paths if path.suffix == ".jsonl"]
    plain = [path for path in paths if path.suffix != ".jsonl"]
    yield from split_documents((d for path in jsonl for d in read_jsonl(path)), end, every)
    for path in plain:
        yield from read_text(path, every)
        if len(plain) > 1:
            yield "train", end
            yield "val", end


def split_documents(documents: Iterable[str], end: str, every: int = 10) -> Iterator:
    """Pieces of documents: the first and each `every`-th after it are validation."""
    for number, document in enumerate(documents):
        yield "train" if number % every else "val", document + end


def read_jsonl(path: Path) -> Iterator[str]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                document = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                document = None
            if not isinstance(document, str):
                raise UserError(
                    f'{path}, line {number} is not {{"text": "..."}}; give .jsonl with a "text" in '
                    "each line, or rename the file if it is plain text"
                )
            yield document


def read_text(path: Path, every: int) -> Iterator[tuple[str, str]]:
    with open_text(path) as file:
        length = sum(len(chunk) for chunk in iter(lambda: file.read(CHUNK), ""))
    train_left = length * (every - 1) // every
    with open_text(path) as file:
        for piece in whole_lines(file):
            yield "train", piece[:train_left]
            yield "val", piece[train_left:]
            train_left = max(0, train_left - len(piece))


def whole_lines(file) -> Iterator[str]:
    """The text of a file in strings of about CHUNK characters, each cut as WHOLE_LINES finds it (or
    anywhere, in a text that has no such place)."""
    rest = ""
    while chunk := file.read(CHUNK):
        rest += chunk
        lines = WHOLE_LINES.match(rest)
        cut = (lines and lines.end()) or len(rest)
        yield rest[:cut]
        rest = rest[cut:]
    yield rest


@contextlib.contextmanager
def open_text(path: Path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason}); convert it, for instance with  "
            f"iconv -f latin1 -t utf-8 {path} > utf8.txt"
        ) from error


# ---- writing ----


def prepare_files(
    paths: list[Path],
    out: Path,
    tokenizer: str,
    source: str | None = None,
    every: int = 10,
    num_proc: int = 1,
) -> None:
    """Make a data set of text and .jsonl files; `tokenizer` is "char" or "gpt2".

    Characters are those of the files, in the order of their code points. Documents end with a blank
    line or with END_OF_TEXT. Split as in `read_files`; raises as it and `write_dataset` do.
    """
    end = {"char": "\n\n", "gpt2": END_OF_TEXT}[tokenizer]
    if tokenizer == "gpt2":
        encoder = GPT2Tokenizer()
    else:
        encoder = char_tokenizer(read_files(paths, end, every))
    source = source or ", ".join(path.name for path in paths)
    size = sum(path.stat().st_size for path in paths)
    write_dataset(out, encoder, read_files(paths, end, every), source, size, num_proc)


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
) -> None:
    """Write out/train.bin, out/val.bin (raw little-endian ids) and out/meta.json, and say so.

    `size` is about how many characters will come, for the progress bar and to see beforehand that
    the disk has room; `num_proc` threads encode. All three files are written to a temporary folder
    and renamed when they are whole, meta.json last: whatever happens before, Ctrl-C included, what
    was in `out` stays. Raises UserError for an empty split, an id that the vocabulary or the dtype
    has no room for, and a disk that is full or can't be written.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    check_disk((out, size // tokenizer.chars_per_token * dtype.itemsize))
    meta = {"vocab_size": tokenizer.vocab_size, "dtype": dtype.name, **tokenizer.meta()}
    with temporary_folder(out) as folder:
        with (
            TokenFile(folder / "train.bin", dtype, tokenizer.vocab_size) as train,
            TokenFile(folder / "val.bin", dtype, tokenizer.vocab_size) as val,
        ):
            files = {"train": train, "val": val}
            for split, ids in encode(pieces, tokenizer, size, num_proc):
                files[split].append(ids)
        for split, file in files.items():
            if file.tokens == 0:
                raise UserError(
                    f"{split}.bin would be empty: {source} is too short; give more text"
                )
            meta |= {f"{split}_tokens": file.tokens, f"{split}_sha256": file.sha256.hexdigest()}
        meta["source"] = source
        with open(folder / "meta.json", "w", encoding="utf-8") as file:
            file.write(json.dumps(meta, indent=1) + "\n")
            flush_to_disk(file)
        for name in ("train.bin", "val.bin", "meta.json"):
            os.replace(folder / name, out / name)
    for split in files:
        print(f"{split}: {meta[f'{split}_tokens']:,} tokens in {out / split}.bin")


def encode(pieces: Pieces, tokenizer, size: int, num_proc: int) -> Iterator[tuple[str, np.ndarray]]:
    """(split, ids) of the pieces, in order, encoded by threads while a progress bar shows."""
    blocks = join_pieces(pieces)
    with (
        ThreadPoolExecutor(num_proc) as pool,
        progress_bar(size, "char") as progress,
    ):
        while group := list(itertools.islice(blocks, 2 * num_proc)):
            all_ids = pool.map(tokenizer.encode, [text for _, text in group])
            for (split, text), ids in zip(group, all_ids, strict=True):
                yield split, ids
                progress.update(len(text))


def join_pieces(pieces: Pieces) -> Iterator[tuple[str, str]]:
    """The pieces, joined to about CHUNK characters, which are quicker to encode than many short."""
    waiting = {"train": [], "val": []}
    length = {"train": 0, "val": 0}
    for split, text in pieces:
        waiting[split].append(text)
        length[split] += len(text)
        if length[split] >= CHUNK:
            yield split, "".join(waiting[split])
            waiting[split], length[split] = [], 0
    for split, texts in waiting.items():
        yield split, "".join(texts)


class TokenFile:
    """A file of token ids that is being written: `tokens` counts them, `sha256` is of its bytes."""

    def __init__(self, path: Path, dtype: np.dtype, vocab_size: int):
        self.dtype = dtype
        self.largest = min(vocab_size - 1, np.iinfo(dtype).max)
        self.tokens = 0
        self.sha256 = hashlib.sha256()
        self._file = open(path, "wb")

    def append(self, ids: np.ndarray) -> None:
        if ids.size and not (0 <= ids.min() and ids.max() <= self.largest):
            raise UserError(
                f"the tokenizer gave ids from {ids.min()} to {ids.max()}, but the vocabulary and "
                f"{self.dtype.name} allow 0 to {self.largest}; prepare with another tokenizer"
            )
        data = ids.astype(self.dtype).tobytes()
        self._file.write(data)
        self.sha256.update(data)
        self.tokens += len(ids)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with self._file:
            flush_to_disk(self._file)


def progress_bar(total: int, unit: str) -> tqdm:
    """A progress bar on a terminal, elsewhere nothing; `total` is 0 if unknown."""
    return tqdm(total=total or None, unit=unit, unit_scale=True, disable=None)


def flush_to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """A folder inside `out`, on the same disk, that is gone in the end with what is still in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, suffix=".tmp") as folder:
            yield Path(folder)
    except OSError as error:
        raise UserError(f"{out} can't be written ({error}); choose another with --out") from error


def check_disk(*needs: tuple[Path, int]) -> None:
    """Raise UserError unless there is room for `needs`, (folder, bytes) each, all together."""
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


# ---- from the network ----


def download(url: str, path: Path, min_bytes: int = 1, sha256: str | None = None) -> Path:
    """Download `url` to `path`, unless `path` is already the file with that SHA-256; return `path`.

    Under its own name the file is always whole. Raises UserError, and leaves nothing, if the server
    can't be reached, answers with an error or a web page, or the file is short or not the expected.
    """
    if sha256 and path.is_file() and sha256_of(path) == sha256:
        return path
    with temporary_folder(path.parent) as folder:
        part = folder / path.name
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:
                expected = int(response.headers.get("Content-Length") or 0)
                with progress_bar(expected, "B") as progress:
                    while chunk := response.read(CHUNK):
                        file.write(chunk)
                        progress.update(len(chunk))
                flush_to_disk(file)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{url} can't be downloaded ({error}); {OFFLINE}") from error
        size = part.stat().st_size
        with open(part, "rb") as file:
            start = file.read(100).lstrip().lower()
        if start.startswith((b"<!doctype html", b"<html")):
            odd = "is a web page, not data"
        elif expected and size != expected:
            odd = f"broke off after {size:,} of {expected:,} bytes"
        elif size < min_bytes:
            odd = f"is too short, {size:,} bytes of at least {min_bytes:,}"
        elif sha256 and sha256_of(part) != sha256:
            odd = "is not the file that it was (another SHA-256)"
        else:
            os.replace(part, path)
            return path
        raise UserError(f"{url} {odd}; try again, or {OFFLINE}")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare_tiny_shakespeare(paths: list[Path], out: Path, tokenizer: str) -> None:
    """Make a data set of `paths`, or of tiny Shakespeare, which is downloaded to out/input.txt."""
    url = (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    )
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    if paths:
        prepare_files(paths, out, tokenizer)
    else:
        text = download(url, out / "input.txt", min_bytes=1_115_394, sha256=sha256)
        prepare_files([text], out, tokenizer, source=url)


def load_hub(name: str, **options):
    """A DatasetDict from the Hugging Face hub, or from its cache on this machine. Raises UserError
    if the data set is in neither, or `datasets` is not installed."""
    if not reachable(HUB):
        os.environ["HF_HUB_OFFLINE"] = "1"  # look into the cache at once, without retries
    try:
        import datasets

        return datasets.load_dataset(name, **options)
    except Exception as error:  # of any of the libraries that take part
        raise UserError(
            f"{name} can't be had from the Hugging Face hub ({type(error).__name__}: {error}); "
            f"{OFFLINE}"
        ) from error


def hub_need(name: str, size: int) -> tuple[Path, int]:
    """For `check_disk`: the hub's cache, and `size`, or 0 if the data set is there already."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    there = any((cache / "datasets" / name.replace("/", "___")).rglob("*.arrow"))
    return cache, 0 if there else size


def hub_documents(train, val) -> Iterator[tuple[str, str]]:
    """Pieces of two `datasets.Dataset`s: their "text" column, each text ended by END_OF_TEXT."""
    for split, dataset in (("train", train), ("val", val)):
        for batch in dataset.select_columns("text").iter(batch_size=1000):
            for text in batch["text"]:
                yield split, text + END_OF_TEXT
