"""
Which part of a text is for training, and which for validation.

Text travels as a stream of pieces, (split, text), so that no file is ever held whole. A piece
begins where GPT-2's tokens may be cut: the tokens of the pieces are those of the whole text.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from data.meta import SPLITS
from data.text import read_jsonl, read_lines

Pieces = Iterable[tuple[str, str]]


def split_files(
    paths: list[Path], end: str, every: int = 10, own_splits: bool = False
) -> Iterator[tuple[str, str]]:
    """The pieces of text files and of .jsonl files; one part in `every` is validation.

    Of a plain text validation is the end, the last tenth by characters; of .jsonl documents it is
    the first and each `every`-th after it. `end` follows each document, and each of several texts.
    With `own_splits`, three files are the training, validation and test split.
    Raises UserError for a file that cannot be read as text or .jsonl.
    """
    if own_splits and len(paths) == 3:
        for split, path in zip(SPLITS, paths, strict=True):
            yield from ((split, text) for _, text in split_files([path], end, every=1))
        return
    jsonl = [path for path in paths if path.suffix == ".jsonl"]
    plain = [path for path in paths if path.suffix != ".jsonl"]
    yield from split_documents((d for path in jsonl for d in read_jsonl(path)), end, every)
    for path in plain:
        yield from split_text(path, every)
        if len(plain) > 1:
            yield "train", end
            yield "val", end


def split_documents(documents: Iterable[str], end: str, every: int = 10) -> Iterator:
    """Pieces of documents: the first and each `every`-th after it are validation."""
    for number, document in enumerate(documents):
        yield "train" if number % every else "val", document + end


def split_text(path: Path, every: int) -> Iterator[tuple[str, str]]:
    """Pieces of a plain text file, whose end is validation."""
    length = sum(map(len, read_lines(path)))
    train_left = length * (every - 1) // every
    for text in read_lines(path):
        yield "train", text[:train_left]
        yield "val", text[train_left:]
        train_left = max(0, train_left - len(text))
