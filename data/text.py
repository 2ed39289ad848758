"""
Text files as streams of strings: plain text, and JSON lines with a "text" each.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from configurator import UserError

CHUNK = 2**20  # characters that are read at a time

# The text up to the last line break that a word follows, or the last space and word. A cut there
# changes no token: such a line break stands alone by GPT-2's pattern, or at least by its merges, of
# which only "\n\n" joins line breaks and spaces. ('<' may begin END_OF_TEXT, where that fails.)
WHOLE_LINES = re.compile(r".*(?=\n[^\s<]|(?<!\n)\n [^\s<])", re.DOTALL)


def read_jsonl(path: Path) -> Iterator[str]:
    """The "text" of each line. Raises UserError for a line that has none."""
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
    """Open a file of UTF-8 text. Raises UserError where it proves to be something else."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason}); convert it, for instance with  "
            f"iconv -f latin1 -t utf-8 {path} > utf8.txt"
        ) from error
