"""
The documentation that comes with Python, character by character: needs no network.

    python data/pydocs/prepare.py

The text is made of the reference topics that help() shows (pydoc_data.topics) and the docstrings of
the standard library's modules, classes and functions: about 2 MB with 96 different characters,
always the same for one version of Python. Licence: PSF.

Typographic quotes and dashes become ASCII. Documents with other characters outside printable ASCII
are left out, and so are repetitions. Documents end with a blank line. They are sorted by SHA-256,
and every tenth is validation, so that both splits are fair samples.
"""

import ast
import hashlib
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import UserError, run
from data.command_line import parse_args
from data.splits import split_documents
from data.writing import char_tokenizer, prepare_files, write_dataset

TO_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "..."})
NOT_PROSE = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"}
MIN_CHARS = 200_000


def main():
    args = parse_args(__file__, __doc__)
    if args.input:
        prepare_files(args.input, args.out, "char", val=args.val, val_share=args.val_share)
    else:
        prepare(args.out)


def prepare(out: Path) -> None:
    """Write the data set to `out`. Raises UserError for a Python without its documentation."""
    documents = clean([*reference_topics(), *docstrings(Path(sysconfig.get_path("stdlib")))])
    size = sum(map(len, documents))
    if size < MIN_CHARS:
        raise UserError(
            f"{sys.executable} comes with only {size:,} characters of documentation; use a Python "
            "with its standard library in source form, or pass --input FILE"
        )
    pieces = list(split_documents(documents, end="\n\n"))
    source = f"documentation and docstrings of Python {platform.python_version()}"
    write_dataset(out, char_tokenizer(pieces), pieces, source, size)


def reference_topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    return list(topics.values())


def docstrings(folder: Path) -> Iterator[str]:
    """The docstrings of all Python files in `folder`, which are parsed and never imported."""
    for path in folder.rglob("*.py"):
        if NOT_PROSE.intersection(path.relative_to(folder).parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # invalid on purpose, or not readable
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def clean(documents: list[str]) -> list[str]:
    """The different documents in printable ASCII, in the order of their SHA-256."""
    texts = {document.translate(TO_ASCII).strip() for document in documents}
    ascii_texts = [text for text in texts if re.fullmatch(r"[ -~\n]+", text)]
    return sorted(ascii_texts, key=lambda text: hashlib.sha256(text.encode()).digest())


if __name__ == "__main__":
    run(main)
