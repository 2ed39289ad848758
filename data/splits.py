"""
Which part of a text is for training, and which for validation.

Text travels as a stream of pieces, (split, text), so that no file is ever held whole. A piece
begins where GPT-2's tokens may be cut: the tokens of the pieces are those of the whole text.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

from data.meta import SPLITS
from data.text import read_documents, read_lines

Pieces = Iterable[tuple[str, str]]
TENTH = Fraction(1, 10)


def split_files(
    paths: Sequence[Path],
    end: str,
    val: Sequence[Path] = (),
    val_share: Fraction = TENTH,
    own_splits: bool = False,
) -> Iterator[tuple[str, str]]:
    """The pieces of files of text or JSON; `end` follows each document and each of several texts.

    Files of `val`, if there are any, are the validation split. Otherwise it is `val_share` of the
    paths: the end of each text, and documents at equal distances, the first one included. Where
    documents are too few for that, it is the end of all of them together. With `own_splits`, three
    paths are the training, validation and test split. Raises UserError for a file without text.
    """
    if own_splits and len(paths) == 3:
        for split, path in zip(SPLITS, paths, strict=True):
            yield from ((split, text) for text in whole_files([path], end))
    elif val:
        yield from (("train", text) for text in whole_files(paths, end))
        yield from (("val", text) for text in whole_files(val, end))
    else:
        plain = [path for path in paths if read_documents(path) is None]
        documents = lambda: chain.from_iterable(read_documents(path) or () for path in paths)
        needed = math.ceil(1 / val_share)
        if sum(1 for _ in islice(documents(), needed)) < needed:
            yield from split_end(documents, val_share, end)
        else:
            yield from split_documents(documents(), end, val_share)
        for path in plain:
            yield from split_end(functools.partial(read_lines, path), val_share)
            if len(plain) > 1:
                yield "train", end
                yield "val", end


def split_documents(documents: Iterable[str], end: str, val_share: Fraction = TENTH) -> Iterator:
    """Pieces of documents; with a share of 1/10 documents 0, 10, 20 and so on are validation."""
    part, whole = val_share.as_integer_ratio()
    for number, document in enumerate(documents):
        yield "val" if number * part % whole < part else "train", document + end


def split_end(read: Callable[[], Iterable[str]], val_share: Fraction, end: str = "") -> Iterator:
    """Pieces of the texts of `read()`, of which the last characters together are validation.

    `end` follows each text. `read` is called twice.
    """
    train_left = int(sum(map(len, read())) * (1 - val_share))
    for text in read():
        yield "train", text[:train_left]
        yield "val", text[train_left:]
        yield "train" if 0 < train_left >= len(text) else "val", end
        train_left = max(0, train_left - len(text))


def whole_files(paths: Sequence[Path], end: str) -> Iterator[str]:
    """The text of all paths, with `end` after each document and between texts."""
    for path in paths:
        documents = read_documents(path)
        if documents is None:
            yield from read_lines(path)
            yield end if len(paths) > 1 else ""
        else:
            yield from (document + end for document in documents)
