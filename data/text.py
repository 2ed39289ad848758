"""
Text files as streams of strings. Their content decides how they are read, not their names.

A file may hold plain text, JSON lines, or one JSON array, with a "text" in each object of JSON; in
UTF-8, UTF-16 or UTF-32; compressed with gzip or not. For any other file the error says what it is.
"""

import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from configurator import UserError

CHUNK = 2**20  # characters that are read at a time

# The text up to the last line break that a word follows, or the last space and word. A cut there
# changes no token: such a line break stands alone by GPT-2's pattern, or at least by its merges, of
# which only "\n\n" joins line breaks and spaces. ('<' may begin END_OF_TEXT, where that fails.)
WHOLE_LINES = re.compile(r".*(?=\n[^\s<]|(?<!\n)\n [^\s<])", re.DOTALL)

GZIP = b"\x1f\x8b"
MARKS = {  # byte-order marks, longest first
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
BINARY = {  # the first bytes of files without text: their name, and the command that helps
    b"PK\x03\x04": ("a zip archive", "unpack it with  python -m zipfile -e {path} FOLDER"),
    b"PAR1": (
        "a Parquet file",
        'convert it with  python -c "import datasets; '
        "datasets.Dataset.from_parquet('{path}').to_json('{path}.jsonl')\"",
    ),
    b"BZh": ("a bzip2 file", "unpack it with  bzip2 -dk {path}"),
    b"\xfd7zXZ": ("an xz file", "unpack it with  xz -dk {path}"),
    b"\x28\xb5\x2f\xfd": ("a Zstandard file", "unpack it with  zstd -d {path}"),
    b"%PDF": ("a PDF document", "convert it with  pdftotext {path}"),
}


def read_documents(path: Path) -> Iterator[str] | None:
    """The "text" of each object in JSON lines or in one JSON array; None if `path` is plain text.

    Documents are read one by one, but an array as a whole. The iterator raises UserError for JSON
    without a "text".
    """
    with open_text(path) as file:
        start = file.read(CHUNK).lstrip()
        if start.startswith(("{", "[")):
            file.seek(0)
            if _text_of(next(line for line in file if not line.isspace())) is not None:
                return _read_json_lines(path)
    name = path.name.lower().removesuffix(".gz")
    array = start.startswith("[") if name.endswith(".json") else re.match(r'\[\s*{\s*"', start)
    if array or (name.endswith(".json") and start.startswith("{")):
        return _read_json(path)
    return _read_json_lines(path) if name.endswith((".json", ".jsonl", ".ndjson")) else None


def _read_json_lines(path: Path) -> Iterator[str]:
    advice = "repair it, or rename the file to .txt if it is plain text"
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            if (text := _text_of(line)) is None:
                raise UserError(f'{path}, line {number} is not {{"text": "..."}}; {advice}')
            yield text
            advice = "repair that line, or remove it"


def _read_json(path: Path) -> Iterator[str]:
    with open_text(path) as file:
        content = file.read()
    try:
        objects = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'{path} is neither JSON ({error}) nor JSON lines, {{"text": "..."}} each; repair it'
        ) from error
    for number, value in enumerate(objects if isinstance(objects, list) else [objects], 1):
        if not (isinstance(value, dict) and isinstance(value.get("text"), str)):
            allowed = 'an array, or lines, of {"text": "..."}'
            raise UserError(f'{path}, element {number} has no "text"; JSON must be {allowed}')
        yield value["text"]


def _text_of(line: str) -> str | None:
    """The "text" of a line of JSON; None if it has none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(line)
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            return value["text"]
    return None


def read_lines(path: Path) -> Iterator[str]:
    """The text of a file in strings of whole lines."""
    with open_text(path) as file:
        yield from whole_lines(iter(lambda: file.read(CHUNK), ""))


def whole_lines(parts: Iterable[str]) -> Iterator[str]:
    """The text of `parts`, in strings of about CHUNK characters that end where WHOLE_LINES does,
    or anywhere in a text that has no such place."""
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
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a file of text, compressed or not. Raises UserError if it holds something else."""
    with open(path, "rb") as file:
        compressed = file.read(len(GZIP)) == GZIP
    try:
        with gzip.open(path) if compressed else open(path, "rb") as file:
            encoding = _encoding(path, file.read(2**16))
            file.seek(0)
            yield io.TextIOWrapper(file, encoding)
    except UnicodeDecodeError as error:
        if error.encoding != "utf-8":
            damage = f"{error.encoding} ({error.reason})"
            raise UserError(f"{path} is damaged text in {damage}; fetch it again") from error
        unpack, name = (f"gzip -dc {path} | ", "") if compressed else ("", f" {path}")
        raise UserError(
            f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x}); convert it, for "
            f"example with  {unpack}iconv -f WINDOWS-1252 -t UTF-8{name} > utf8.txt"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}); fetch it again") from error


def _encoding(path: Path, start: bytes) -> str:
    """The encoding of text that begins with `start`. Raises UserError if it is no text."""
    for mark, encoding in MARKS.items():
        if start.startswith(mark):
            return encoding
    for magic, (name, advice) in BINARY.items():
        if start.startswith(magic):
            raise UserError(f"{path} is {name}, not text; {advice.format(path=path)}")
    if start[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive, not text; unpack it with  tar -xf {path}")
    zeros = start.count(0)
    if not zeros:
        return "utf-8-sig"
    for encoding in ("utf-16-le", "utf-16-be"):  # without a byte-order mark, mostly Latin letters
        text = start.decode(encoding, "ignore")
        if 4 * zeros >= len(start) and all(c.isprintable() or c.isspace() for c in text):
            return encoding
    raise UserError(f'{path} holds binary data, not text; give text, or JSON lines with a "text"')
