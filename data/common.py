"""
What the prepare.py scripts share: command line, reading text, downloads, writing a data set.

Text travels as a stream of pieces, ("train", "val" or "test", text), so that nothing is ever held
whole. A piece begins where GPT-2's tokens may be cut: to encode pieces or the whole text is the
same.
"""

import argparse
import collections
import contextlib
import functools
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError
from data.dataset import SPLITS
from data.tokenizer import END_OF_TEXT, CharTokenizer, GPT2Tokenizer
from engine.network import HUB, reachable

CHUNK = 2**20  # characters or bytes read, and characters encoded, at a time
OFFLINE = "on a machine that is offline, pass --input FILE (text or .jsonl)"

# Everything before the last line break that a word follows, or a space and a word. To cut there
# changes no token: such a line break stands alone by GPT-2's pattern, or at least by its merges, of
# which only "\n\n" joins line breaks and spaces. ('<' may begin END_OF_TEXT, where it does not.)
WHOLE_LINES = re.compile(r".*(?=\n[^\s<]|(?<!\n)\n [^\s<])", re.DOTALL)

IS_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])  # U+3000 is the last one

Pieces = Iterable[tuple[str, str]]


# ---- command line ----


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def _positive(text: str) -> int:
    if not 1 <= (value := float(text)) < 1e15:
        raise argparse.ArgumentTypeError(f"{text} is impossible; it must be from 1 to 1e15")
    return int(value)


def parse_args(
    script: str,
    doc: str,
    input_required: bool = False,
    num_proc: bool = False,
    raw: bool = False,
    tokens: int = 0,
):
    """The command line of a prepare.py: `input` (list of paths), `out`, and, if wanted, `num_proc`,
    `raw`, and `tokens` with that default.

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
        help="where the .bin files and meta.json go (default: %(default)s)",
    )
    if num_proc:
        parser.add_argument(
            "--num_proc",
            type=int,
            default=os.cpu_count(),
            metavar="N",
            help="threads and processes to use (default: %(default)s)",
        )
    if raw:
        parser.add_argument(
            "--raw",
            action="store_true",
            help="leave the text as it is, with its words and punctuation apart",
        )
    if tokens:
        parser.add_argument(
            "--tokens",
            type=_positive,
            default=tokens,
            metavar="N",
            help="about how many tokens of training to take, such as 1e8 (default: %(default)s)",
        )
    args = parser.parse_args()
    for path in args.input:
        if not (path.is_file() and os.access(path, os.R_OK)):
            raise UserError(f"--input {path} can't be read; give a file of text, or .jsonl")
    if num_proc and args.num_proc < 1:
        raise UserError(f"--num_proc {args.num_proc} is impossible; it must be at least 1")
    return args


# ---- reading ----


def read_files(
    paths: list[Path], end: str, every: int = 10, own_splits: bool = False
) -> Iterator[tuple[str, str]]:
    """The pieces of text files and of .jsonl files; one part in `every` is validation.

    Of a plain text it is the end (the last tenth, by characters); of .jsonl documents it is the
    first and each `every`-th after it. `end` is put after each document, and between plain texts.
    With `own_splits`, three files are the training, validation and test split, each whole.
    Raises UserError for a file that is not UTF-8 or not such .jsonl.
    """
    if own_splits and len(paths) == 3:
        for split, path in zip(SPLITS, paths, strict=True):
            yield from ((split, text) for _, text in read_files([path], end, every=1))
        return
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
        length = sum(map(len, chunks(file)))
    train_left = length * (every - 1) // every
    with open_text(path) as file:
        for piece in whole_lines(chunks(file)):
            yield "train", piece[:train_left]
            yield "val", piece[train_left:]
            train_left = max(0, train_left - len(piece))


def chunks(file) -> Iterator[str]:
    return iter(lambda: file.read(CHUNK), "")


def whole_lines(parts: Iterable[str]) -> Iterator[str]:
    """The text of `parts`, in strings of about CHUNK characters, each cut as WHOLE_LINES finds it
    (or anywhere, in a text that has no such place)."""
    rest = ""
    for part in parts:
        rest += part
        if len(rest) >= CHUNK:
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
    own_splits: bool = False,
    detokenize: Callable[[str], str] | None = None,
) -> None:
    """Make a data set of text and .jsonl files; `tokenizer` is "char" or "gpt2".

    Characters are those of the files, in the order of their code points. Documents end with a blank
    line or with END_OF_TEXT. Split as in `read_files`; raises as it and `write_dataset` do.
    """
    end = {"char": "\n\n", "gpt2": END_OF_TEXT}[tokenizer]
    read = functools.partial(read_files, paths, end, every, own_splits)
    encoder = GPT2Tokenizer() if tokenizer == "gpt2" else char_tokenizer(read())
    source = source or ", ".join(path.name for path in paths)
    size = sum(path.stat().st_size for path in paths)
    write_dataset(out, encoder, read(), source, size, num_proc, detokenize, line_ends=own_splits)


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
) -> None:
    """Write a .bin of raw little-endian ids for each split, and meta.json, and say so.

    There must be a training and a validation split, unless all is "test": for evaluation only.
    `size` is about how many characters will come, for the progress bar and to see beforehand that
    the disk has room; `num_proc` threads encode. `detokenize` changes the text before that, many
    whole lines at a time. meta.json says how long each split is: in tokens, in UTF-8 bytes of what
    was encoded, and in words and lines of the text before `detokenize`; END_OF_TEXT is a token and
    nothing else. And it has those `facts`, for evaluation, that are true: `line_ends` count as
    words, as in the papers; of each document, ended by END_OF_TEXT, the `last_word` is guessed.

    All files are written to a temporary folder and renamed when they are whole, meta.json last:
    whatever happens before, Ctrl-C included, what was in `out` stays. Raises UserError for an empty
    split, an id that the vocabulary or the dtype has no room for, and a disk that is full or can't
    be written.
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
            meta |= {f"{split}_{unit}": n for unit, n in files[split].meta().items()}
        meta |= {name: True for name, true in facts.items() if true} | {"source": source}
        with open(folder / "meta.json", "w", encoding="utf-8") as file:
            file.write(json.dumps(meta, indent=1) + "\n")
            flush_to_disk(file)
        for name in (*(f"{split}.bin" for split in splits), "meta.json"):
            os.replace(folder / name, out / name)
    for split in splits:
        print(f"{split}: {meta[f'{split}_tokens']:,} tokens in {out / split}.bin")


def encode(pieces: Pieces, tokenizer, size: int, num_proc: int, detokenize) -> Iterator[tuple]:
    """(split, original, text, ids) of the pieces, in order, the text detokenized and its ids found
    by threads while a progress bar shows."""

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
    """The pieces, joined to about CHUNK characters, which are quicker to encode than many short."""
    waiting = {split: [] for split in SPLITS}
    length = dict.fromkeys(SPLITS, 0)
    for split, text in pieces:
        waiting[split].append(text)
        length[split] += len(text)
        if length[split] >= CHUNK:
            yield split, "".join(waiting[split])
            waiting[split], length[split] = [], 0
    for split, texts in waiting.items():
        yield split, "".join(texts)


class TokenFile:
    """A file of token ids that is being written, and what there is to tell of it."""

    def __init__(self, path: Path, dtype: np.dtype, tokenizer: CharTokenizer | GPT2Tokenizer):
        self.dtype = dtype
        self.largest = min(tokenizer.vocab_size - 1, np.iinfo(dtype).max)
        self.has_eot = hasattr(tokenizer, "eot")
        self.tokens = self.bytes = self.words = self.lines = 0
        self._spaced = True  # so the first word begins, as one does after a space
        self._sha256 = hashlib.sha256()
        self._file = open(path, "wb")

    def append(self, original: str, text: str, ids: np.ndarray) -> None:
        """Write the ids of `text`, which was made of `original`, and count all three."""
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
        codes = np.frombuffer(original.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        spaced = np.append(self._spaced, IS_SPACE[np.minimum(codes, 0x3001)])
        self.words += int(np.count_nonzero(spaced[:-1] > spaced[1:]))
        self._spaced = spaced[-1]

    def meta(self) -> dict:
        counts = {unit: getattr(self, unit) for unit in ("tokens", "bytes", "words", "lines")}
        return {**counts, "sha256": self._sha256.hexdigest()}

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


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn whatever goes wrong in reading data set `name` from the hub into a UserError."""
    try:
        yield
    except Exception as error:  # of any of the libraries that take part
        raise UserError(
            f"{name} can't be had from the Hugging Face hub ({type(error).__name__}: {error}); "
            f"{OFFLINE}"
        ) from error


def load_hub(name: str, *config: str, **options):
    """A DatasetDict, or what else `options` of datasets.load_dataset make, from the Hugging Face
    hub, or from its cache on this machine. Raises UserError if the data set is in neither, or
    `datasets` is not installed."""
    if not reachable(HUB):
        os.environ["HF_HUB_OFFLINE"] = "1"  # look into the cache at once, without retries
    with hub_errors(name):
        import datasets

        return datasets.load_dataset(name, *config, **options)


def hub_need(name: str, size: int, config: str = "") -> tuple[Path, int]:
    """For `check_disk`: the hub's cache, and `size`, or 0 if the data set is there already."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    owner, name = name.split("/")
    folder = f"{owner}___{re.sub('(?<=[a-z])(?=[A-Z])', '_', name).lower()}"  # as `datasets` does
    there = any((cache / "datasets" / folder / config).rglob("*.arrow"))
    return cache, 0 if there else size


def hub_texts(table, column: str = "text") -> Iterator[str]:
    """One column of a `datasets.Dataset`."""
    for batch in table.select_columns(column).iter(batch_size=1000):
        yield from batch[column]


def hub_documents(**tables) -> Iterator[tuple[str, str]]:
    """Pieces of `datasets.Dataset`s, by split: their texts, each ended by END_OF_TEXT."""
    for split, table in tables.items():
        for text in hub_texts(table):
            yield split, text + END_OF_TEXT


def prepare_corpus(
    args,
    name: str,
    *config: str,
    size: int,
    detokenize: Callable[[str], str],
    column: str = "text",
    line: Callable[[str], str],
    **options,
) -> None:
    """Make a data set of words that stand apart, in three splits, as WikiText and the Penn Treebank
    come: of args.input, or of a column of hub data set `name`, each row made a `line`.

    `size` is about how many characters there are in all."""
    detokenize = None if args.raw else detokenize
    if args.input:
        prepare_files(
            args.input,
            args.out,
            "gpt2",
            num_proc=args.num_proc,
            own_splits=True,
            detokenize=detokenize,
        )
        return
    tokenizer = GPT2Tokenizer()
    check_disk(hub_need(name, 2 * size, *config), (args.out, size // 2))
    tables = load_hub(name, *config, **options)
    pieces = (
        (split, text)
        for split, there in zip(SPLITS, ("train", "validation", "test"), strict=True)
        for text in whole_lines(map(line, hub_texts(tables[there], column)))
    )
    source = " ".join((name, *config))
    write_dataset(
        args.out, tokenizer, pieces, source, size, args.num_proc, detokenize, line_ends=True
    )
