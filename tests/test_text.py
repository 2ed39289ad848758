"""data/text.py: text files are read in pieces of bounded size, whatever they hold."""

import bz2
import gzip
import json
import lzma

import numpy as np
import pytest

from configurator import UserError
from data import text as text_files
from data.text import read_documents, read_lines
from data.tokenizer import GPT2Tokenizer

TEXT = "naïve\n«один» \N{GRINNING FACE}\n"
DOCUMENTS = ["one\n", "", "naïve"]
LINES = "\n".join(json.dumps({"id": 0, "text": text}) for text in DOCUMENTS) + "\n\n"
ARRAY = json.dumps([{"id": 0, "text": text} for text in DOCUMENTS], indent=1)


def zipped(content):
    """content as gzip writes it, but without the time, which would be in the names of tests"""
    return gzip.compress(content, mtime=0)


def text_of(path):
    return "".join(read_lines(path))


@pytest.mark.parametrize("compress", [bytes, zipped])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_unicode_text_is_read_in_any_encoding_and_compressed(tmp_path, encoding, compress):
    path = tmp_path / "my.txt"
    path.write_bytes(compress(TEXT.encode(encoding)))
    assert text_of(path) == TEXT and read_documents(path) is None


def test_big_endian_byte_order_marks_and_carriage_returns_are_not_part_of_a_text(tmp_path):
    (tmp_path / "my.txt").write_bytes(b"\xfe\xff" + "one\r\ntwo\r\n".encode("utf-16-be"))
    assert text_of(tmp_path / "my.txt") == "one\ntwo\n"


@pytest.mark.parametrize("compress", [bytes, zipped])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a", "a.jsonl.gz"])
@pytest.mark.parametrize("content", [LINES, ARRAY, ARRAY.replace("\n", ""), "\n" + ARRAY])
def test_json_is_known_by_its_content_whatever_its_name(tmp_path, name, content, compress):
    (tmp_path / name).write_bytes(compress(content.encode("utf-8-sig")))
    assert list(read_documents(tmp_path / name)) == DOCUMENTS


def test_text_that_only_begins_like_json_is_plain_text(tmp_path):
    for content in ("", "[Scene I]\n", "{ a\n", "[1] a note\n", '{"txt": 1}\n'):
        (tmp_path / "my.txt").write_text(content)
        assert read_documents(tmp_path / "my.txt") is None


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2 is not.*repair that line"),
        ("a.jsonl", b"\nto be\n", "line 2 is not.*rename the file to .txt"),
        ("a.json", b"to be\n", "line 1 is not.*rename the file to .txt"),
        ("a.json", b'["to be"]', 'element 1 has no "text"'),
        ("a.json", b'{\n"txt": "b"}', 'element 1 has no "text"'),
        ("a.json", b'[{"text": "a"},\n', "neither JSON .* nor JSON lines"),
        ("a.txt", b"caf\xe9 " * 10, "0xe9.*with  iconv -f WINDOWS-1252 -t UTF-8 .*a.txt > utf8"),
        ("a.gz", zipped(b"caf\xe9 "), "gzip -dc .*a.gz | iconv -f WINDOWS-1252 -t UTF-8 >"),
        ("a.txt", "ab".encode("utf-16") + b"c", "damaged text in utf-16"),
        ("a.gz", zipped(b"to be or not" * 99)[:-9], "damaged gzip"),
        ("a.gz", b"\x1f\x8b\x07" + bytes(99), "damaged gzip"),
        ("a.docx", b"PK\x03\x04" + bytes(9), "zip archive.*python -m zipfile -e .*a.docx FOLDER"),
        ("a.xz", lzma.compress(b"to be"), "xz file.*xz -dk"),
        ("a.bz2", bz2.compress(b"to be"), "bzip2 file.*bzip2 -dk"),
        ("a.tar", bytes(257) + b"ustar", "tar archive.*tar -xf"),
        ("a.bin", np.arange(99, dtype="<u2").tobytes(), "holds binary data"),
        ("a.npy", b"\x93NUMPY\x01\0v\0{'descr'", "holds binary data"),
        ("a.gz", zipped(b"PAR1"), "a Parquet file"),
    ],
)
def test_other_files_are_an_error_with_their_true_name_and_what_helps(
    tmp_path, name, content, message
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        text_of(tmp_path / name) if (d := read_documents(tmp_path / name)) is None else list(d)


def test_the_command_for_parquet_makes_documents_of_it(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"text": DOCUMENTS}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="Parquet") as error:
        read_documents(tmp_path / "a.parquet")
    exec(str(error.value).split(" -c ")[1].strip('"'))
    assert list(read_documents(tmp_path / "a.parquet.jsonl")) == DOCUMENTS


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
