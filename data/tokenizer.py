"""
Tokenizers: characters, strings of any length, and GPT-2's byte pairs.

Each has vocab_size, encode(text) -> ids, decode(ids) -> text, and meta(): a description that
meta.json and every checkpoint keep, and from which `from_meta` builds the tokenizer again.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from configurator import UserError

END_OF_TEXT = "<|endoftext|>"  # GPT-2 reads it as the one token that ends a document
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


class CharTokenizer:
    """One id per character: its place in `chars`, which holds each character once."""

    chars_per_token = 1

    def __init__(self, chars: str):
        self.chars = chars
        self.vocab_size = len(chars)
        self._ids = np.full(0x110000, -1)  # the id of every code point of Unicode
        self._ids[code_points(chars)] = np.arange(len(chars))

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int64 (n,). Raises UserError for a character not in `chars`."""
        ids = self._ids[code_points(text)]
        if ids.size and ids.min() < 0:
            unknown = "".join(sorted(set(text) - set(self.chars)))
            raise UserError(
                f"the text has characters that the data set does not have: {_short(unknown)}; "
                f"allowed are {_short(self.chars)}"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Raises IndexError for an id from vocab_size on."""
        return "".join(self.chars[i] for i in ids)

    def meta(self) -> dict:
        return {"tokenizer": "char", "chars": self.chars}


class StringTokenizer:
    """One id per string, for example a word: its place in `strings`."""

    chars_per_token = 1

    def __init__(self, strings: list[str]):
        self.strings = strings
        self.vocab_size = len(strings)
        self._ids = {string: i for i, string in reversed([*enumerate(strings)]) if string}
        self._lengths = sorted({len(string) for string in self._ids}, reverse=True)

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int64 (n,), by the longest string that matches at each place. Raises
        UserError where none does."""
        ids, start = [], 0
        while start < len(text):
            candidates = (text[start : start + length] for length in self._lengths)
            string = next((s for s in candidates if s in self._ids), None)
            if string is None:
                raise UserError(
                    f"the text cannot be encoded from {_short(text[start:], 20)} on: no token of "
                    f"the data set matches there; its tokens are {_short(self.strings)}"
                )
            ids.append(self._ids[string])
            start += len(string)
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.strings[i] for i in ids)

    def meta(self) -> dict:
        return {"tokenizer": "strings", "strings": self.strings}


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken, with the ids of OpenAI's models. Raises UserError if
    tiktoken is not installed, or its two vocabulary files cannot be loaded."""

    vocab_size = 50257
    eot = 50256  # the id of END_OF_TEXT
    chars_per_token = 4  # about, in English

    def __init__(self):
        cache, vocab_url = os.environ.get("TIKTOKEN_CACHE_DIR"), GPT2_URL + "vocab.bpe"
        folder = Path(cache or Path(tempfile.gettempdir(), "data-gym-cache"))
        try:
            import tiktoken

            from engine.network import reachable  # imports urllib

            cached = (folder / hashlib.sha1(vocab_url.encode()).hexdigest()).is_file()
            if not cached and not reachable(vocab_url):  # tiktoken would try for minutes
                raise ConnectionError("no network")
            self._encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # of tiktoken, requests, urllib, or the file system
            raise UserError(
                f"GPT-2's tokenizer is not in {folder} (TIKTOKEN_CACHE_DIR is "
                f"{cache or 'not set'}), and cannot be downloaded ({type(error).__name__}); copy "
                "that folder from a machine that has it, and set TIKTOKEN_CACHE_DIR=FOLDER"
            ) from error

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int64 (n,); END_OF_TEXT in it becomes `eot`. Threads encode in
        parallel, because tiktoken releases the interpreter's lock."""
        text = text.encode("utf-8", "replace").decode()  # tiktoken fails on lone surrogates
        return self._encoding.encode_to_numpy(text, allowed_special={END_OF_TEXT}).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, all below vocab_size; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode([int(i) for i in ids])

    def meta(self) -> dict:
        return {"tokenizer": "gpt2"}


Tokenizer = CharTokenizer | StringTokenizer | GPT2Tokenizer


def from_meta(meta: dict) -> Tokenizer:
    """The tokenizer that meta.json or a checkpoint describes. Raises UserError for any other."""
    match meta:
        case {"tokenizer": "gpt2"}:
            return GPT2Tokenizer()
        case {"tokenizer": "char", "chars": str(chars)} if 0 < len(chars) == len(set(chars)):
            return CharTokenizer(chars)
        case {"tokenizer": "strings", "strings": list(strings)} if {*map(type, strings)} == {str}:
            return StringTokenizer(strings)
        case dict() if meta.get("tokenizer") is None:
            raise UserError(
                "no tokenizer is described, only token ids, which cannot be turned into text; add "
                "the strings of the tokens as itos to the meta.pkl of the data set in data/NAME"
            )
    raise UserError(
        f"no tokenizer is described by {_short(meta)}; prepare the data again: allowed are 'gpt2', "
        "'char' with its chars, each once, and 'strings' with its strings"
    )


def meta_of_model(name: str) -> dict:
    """The description of the tokenizer of a model in transformers' format, which is a folder or on
    the hub: the one that export.py has written beside it, or else GPT-2's."""
    file = "tokenizer_config.json"
    try:
        path = Path(name, file)
        if name.count("/") == 1 and not Path(name).is_dir():
            from huggingface_hub import hf_hub_download

            from engine.network import HUB, reachable

            path = Path(hf_hub_download(name, file, local_files_only=not reachable(HUB)))
        return json.loads(path.read_text(encoding="utf-8"))["meta"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {"tokenizer": "gpt2"}


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _short(value: object, limit: int = 100) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
