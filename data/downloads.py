"""Downloads: single files, and data sets of the Hugging Face hub."""

import contextlib
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from configurator import UserError
from data.tokenizer import END_OF_TEXT
from data.writing import progress_bar, writable
from engine.files import whole_file
from engine.network import HUB, reachable

OFFLINE = "on a machine without a network, pass --input FILE (text or .jsonl)"
TINY_SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)


def tiny_shakespeare(folder: Path) -> Path:
    """Download tiny Shakespeare to folder/input.txt, unless it is there already."""
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    return download(TINY_SHAKESPEARE, folder / "input.txt", min_bytes=1_115_394, sha256=sha256)


def download(url: str, path: Path, min_bytes: int = 1, sha256: str | None = None) -> Path:
    """Download `url` to `path`, unless `path` already has that SHA-256; return `path`.

    Raises UserError, and leaves `path` as it was, if the server cannot be reached, answers with an
    error or a web page, or sends a file that is too short or not the expected one.
    """
    if sha256 and path.is_file():
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                return path
    with writable(path.parent), whole_file(path, "wb") as file:
        start, digest = b"", hashlib.sha256()
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                expected = int(response.headers.get("Content-Length") or 0)
                with progress_bar(expected, "B") as progress:
                    while chunk := response.read(2**20):
                        file.write(chunk)
                        digest.update(chunk)
                        start = start or chunk[:100].lstrip().lower()
                        progress.update(len(chunk))
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{url} cannot be downloaded ({error}); {OFFLINE}") from error
        size = file.tell()
        if start.startswith((b"<!doctype html", b"<html")):
            problem = "is a web page, not data"
        elif expected and size != expected:
            problem = f"broke off after {size:,} of {expected:,} bytes"
        elif size < min_bytes:
            problem = f"is too short, {size:,} bytes of at least {min_bytes:,}"
        elif sha256 and digest.hexdigest() != sha256:
            problem = "is not the expected file (its SHA-256 differs)"
        else:
            return path
        raise UserError(f"{url} {problem}; try again, or {OFFLINE}")


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn any error in reading data set `name` from the hub into a UserError."""
    try:
        yield
    except Exception as error:  # of any of the libraries that take part
        raise UserError(
            f"{name} cannot be read from the Hugging Face hub ({type(error).__name__}: {error}); "
            f"{OFFLINE}"
        ) from error


def load_hub(name: str, *config: str, **options):
    """Data set `name` of the Hugging Face hub, or from its cache on this machine.

    It is a DatasetDict unless `options`, those of datasets.load_dataset, ask for another form.
    Raises UserError if the data set is in neither place, or `datasets` is not installed.
    """
    if not reachable(HUB):
        os.environ["HF_HUB_OFFLINE"] = "1"  # look into the cache at once, without retries
    with hub_errors(name):
        import datasets

        return datasets.load_dataset(name, *config, **options)


def hub_space(name: str, size: int, config: str = "") -> tuple[Path, int]:
    """For `check_disk`: the hub's cache folder, and `size`, or 0 if it holds the data set."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    owner, name = name.split("/")
    folder = f"{owner}___{re.sub('(?<=[a-z])(?=[A-Z])', '_', name).lower()}"  # as `datasets` does
    cached = any((cache / "datasets" / folder / config).rglob("*.arrow"))
    return cache, 0 if cached else size


def hub_texts(table, column: str = "text") -> Iterator[str]:
    """One column of a `datasets.Dataset`."""
    for batch in table.select_columns(column).iter(batch_size=1000):
        yield from batch[column]


def hub_documents(**tables) -> Iterator[tuple[str, str]]:
    """Pieces of a `datasets.Dataset` for each split: its texts, each ended by END_OF_TEXT."""
    for split, table in tables.items():
        for text in hub_texts(table):
            yield split, text + END_OF_TEXT
