"""Files that are whole or absent, tables as text, and the CSV logs of a run."""

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator:
    """Open a temporary file, which replaces `path`, safe on the disk, when the body ends. Readers
    see either the old file or the new one. If the body raises, `path` stays as it was. Text is
    UTF-8, without translation of line ends. Raises OSError, for example for a full disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        with suppress(OSError):  # some network file systems can't
            os.fsync(directory)  # the rename, too, is on the disk now
        os.close(directory)


def read_rows(path: Path, last_step: int | None = None) -> list[dict[str, str]]:
    """The rows of a run's CSV log as text, up to step `last_step`; None means all. A row that was
    cut short, as by a kill, is left out. Raises OSError if there is no such file."""
    rows = []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            with suppress(KeyError, TypeError, ValueError):
                float(list(row.values())[-1])  # every log ends in a column that is always filled
                if last_step is None or int(row["step"]) <= last_step:
                    rows.append(row)
    return rows


def text_table(rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Rows of cells as one table, headed by the first row. In plain text the first column is
    aligned on the left and the others on the right."""
    if markdown:
        lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
