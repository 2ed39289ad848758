"""data/text.py: text files are read in pieces of bounded size, whatever they hold."""

import numpy as np
import pytest

from configurator import UserError
from data import text as text_files
from data.text import read_jsonl, read_lines
from data.tokenizer import GPT2Tokenizer


def test_byte_order_mark_and_carriage_returns_are_not_part_of_a_text(tmp_path):
    (tmp_path / "my.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert "".join(read_lines(tmp_path / "my.txt")) == "one\ntwo\n"


def test_text_in_another_encoding_is_an_error(tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 10)
    with pytest.raises(UserError, match="latin1.txt is not UTF-8"):
        list(read_lines(tmp_path / "latin1.txt"))


def test_a_bad_line_of_jsonl_is_an_error_with_its_number(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(UserError, match="bad.jsonl, line 2"):
        list(read_jsonl(tmp_path / "bad.jsonl"))


def test_a_text_without_line_breaks_is_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK", 100)
    (tmp_path / "my.txt").write_text("x" * 5000)
    pieces = list(read_lines(tmp_path / "my.txt"))
    assert "".join(pieces) == "x" * 5000 and max(map(len, pieces)) <= 100


def test_reading_in_pieces_changes_no_gpt2_token(tmp_path, monkeypatch, gpt2_files):
    space = [" ", "\n", "\n\n", "\n\n\n", " \n", "\n ", " \n ", "\n\n ", "\u00a0\n ", "\t\n"]
    space += ["\n\u00a0", "\n\n<|endoftext|>\n"]
    rng = np.random.default_rng(0)
    words = rng.choice(["to", "be", "'s", "!", "7", "<"], 3000)
    text = "".join(f"{word}{rng.choice(space)}" for word in words)
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(text_files, "CHUNK", 60)
    tokenizer = GPT2Tokenizer()
    pieces = list(read_lines(tmp_path / "my.txt"))
    assert len(pieces) > 100
    ids = np.concatenate([tokenizer.encode(piece) for piece in pieces])
    assert ids.tolist() == tokenizer.encode(text).tolist()
