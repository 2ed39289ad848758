"""data/writing.py: a data set is written whole, with true metadata, or not at all."""

import hashlib
import shutil
from fractions import Fraction

import numpy as np
import pytest
from prepared import contents, read_ids, read_meta, read_text, write_jsonl

from configurator import UserError
from data import writing
from data.dataset import Dataset
from data.tokenizer import CharTokenizer, GPT2Tokenizer
from data.words import detokenize_ptb


class OddTokenizer(CharTokenizer):
    """Encodes any text as the given ids."""

    def __init__(self, vocab_size, *ids):
        super().__init__("a")
        self.vocab_size, self.ids = vocab_size, ids

    def encode(self, text):
        return np.array(self.ids)


def test_meta_json_describes_the_files(tmp_path):
    pieces = [("train", "abcabc\n"), ("val", "cab"), ("train", "b")]
    writing.write_dataset(tmp_path, CharTokenizer("\nabc"), pieces, "a test")
    assert [read_text(tmp_path, split) for split in ("train", "val")] == ["abcabc\nb", "cab"]
    digests = {s: hashlib.sha256((tmp_path / f"{s}.bin").read_bytes()) for s in ("train", "val")}
    assert read_meta(tmp_path) == {
        "vocab_size": 4,
        "dtype": "uint16",
        "tokenizer": "char",
        "chars": "\nabc",
        "train_tokens": 8,
        "train_bytes": 8,
        "train_words": 2,
        "train_lines": 1,
        "train_sha256": digests["train"].hexdigest(),
        "val_tokens": 3,
        "val_bytes": 3,
        "val_words": 1,
        "val_lines": 0,
        "val_sha256": digests["val"].hexdigest(),
        "source": "a test",
    }
    assert sorted(contents(tmp_path)) == ["meta.json", "train.bin", "val.bin"]


def test_a_written_data_set_can_be_read(tmp_path):
    pieces = [("train", "abc"), ("val", "cab")]
    writing.write_dataset(tmp_path / "mine", CharTokenizer("abc"), pieces, "a test")
    assert Dataset("mine", data_dir=tmp_path).tokens["val"].tolist() == [2, 0, 1]


@pytest.mark.parametrize("vocab_size, dtype", [(65536, "uint16"), (65537, "uint32")])
def test_ids_take_two_bytes_while_they_fit(tmp_path, vocab_size, dtype):
    tokenizer = OddTokenizer(vocab_size, 0, vocab_size - 1)
    writing.write_dataset(tmp_path, tokenizer, [("train", "a"), ("val", "a")], "a test")
    assert read_meta(tmp_path)["dtype"] == dtype
    assert read_ids(tmp_path, "val").tolist() == [0, vocab_size - 1]


@pytest.mark.parametrize("bad", [-1, 10, 70000])
def test_an_id_outside_the_vocabulary_is_never_written(tmp_path, bad):
    with pytest.raises(UserError, match="allow 0 to 9"):
        writing.write_dataset(tmp_path, OddTokenizer(10, 1, bad), [("train", "a")], "a test")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_split_is_an_error(tmp_path, split):
    with pytest.raises(UserError, match="would be empty"):
        writing.write_dataset(tmp_path, CharTokenizer("a"), [(split, "aaa")], "a test")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("trouble", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [True, False])
def test_an_interrupted_preparation_leaves_what_was_there(tmp_path, monkeypatch, trouble, before):
    if before:
        pieces = [("train", "a"), ("val", "b"), ("test", "a")]
        writing.write_dataset(tmp_path, CharTokenizer("ab"), pieces, "old")
    old = contents(tmp_path)

    def pieces():
        yield "train", "ccc"
        yield "val", "ccc"
        yield "test", "ccc"
        assert len(contents(tmp_path)) == len(old) + 3  # it is in the middle of writing
        raise trouble

    monkeypatch.setattr(writing, "BLOCK", 1)
    with pytest.raises(trouble):
        writing.write_dataset(tmp_path, CharTokenizer("c"), pieces(), "new")
    assert contents(tmp_path) == old
    assert len(list(tmp_path.iterdir())) == len(old)


def test_a_disk_without_room_is_noticed_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 0, 9))
    writing.check_disk((tmp_path, 4), (tmp_path / "new", 5))
    with pytest.raises(UserError, match="are needed"):
        writing.check_disk((tmp_path, 5), (tmp_path / "new", 5))
    with pytest.raises(UserError, match="are needed"):
        pieces = [("train", "a"), ("val", "a")]
        writing.write_dataset(tmp_path / "new", CharTokenizer("a"), pieces, "a test", size=5)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another with --out"):
        writing.write_dataset(tmp_path / "file" / "new", CharTokenizer("a"), [], "a test")


@pytest.mark.parametrize(
    "text", ["to be\u2003or  not\n\nto be", " to be", "to be ", "", "é\u00a0\x1c"]
)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_words_and_bytes_are_counted_across_pieces(tmp_path, monkeypatch, text, size):
    monkeypatch.setattr(writing, "BLOCK", 1)
    pieces = [("train", text[i : i + size]) for i in range(0, len(text), size)]
    pieces = [("val", "a b"), *pieces, ("train", "end"), ("val", "c")]
    writing.write_dataset(
        tmp_path, CharTokenizer("".join(sorted({*text, *"abcend "}))), pieces, "-"
    )
    meta, train = read_meta(tmp_path), read_text(tmp_path, "train")
    assert train == text + "end" and meta["train_bytes"] == len(train.encode())
    assert (meta["train_words"], meta["val_words"]) == (len(train.split()), 2)
    assert meta["train_lines"] == text.count("\n")


def test_end_of_text_is_a_token_and_neither_bytes_nor_a_word(tmp_path, gpt2_files):
    pieces = [("test", "to be<|endoftext|>"), ("test", "or\ud800<|endoftext|>not")]
    writing.write_dataset(tmp_path, GPT2Tokenizer(), pieces, "a test", last_word=True)
    meta = read_meta(tmp_path)
    assert meta["test_words"] == 4
    assert meta["test_bytes"] == len("to beor?not") and meta["test_tokens"] == 7


def test_end_of_text_is_text_where_it_is_not_a_token(tmp_path):
    pieces = [("test", "<|endoftext|>")]
    writing.write_dataset(tmp_path, CharTokenizer("".join(sorted(set(pieces[0][1])))), pieces, "-")
    meta = read_meta(tmp_path)
    assert meta["test_tokens"] == meta["test_bytes"] == 13 and meta["test_words"] == 1


def test_words_are_those_before_detokenizing_and_bytes_those_after(tmp_path):
    pieces = [("test", " it 's \n"), ("test", " so \n")]
    tokenizer = CharTokenizer("\n 'iost")
    writing.write_dataset(tmp_path, tokenizer, pieces, "a test", detokenize=detokenize_ptb)
    meta = read_meta(tmp_path)
    assert read_text(tmp_path, "test") == "it's\nso\n"
    assert (meta["test_words"], meta["test_lines"], meta["test_bytes"]) == (3, 2, 8)


def test_a_data_set_may_have_a_third_split_or_nothing_else(tmp_path):
    tokenizer, pieces = CharTokenizer("ab"), [("test", "ab"), ("train", "a"), ("val", "b")]
    writing.write_dataset(tmp_path / "three", tokenizer, pieces, "a test")
    assert Dataset("three", tmp_path, ("val", "test")).tokens["test"].tolist() == [0, 1]
    writing.write_dataset(tmp_path / "one", tokenizer, pieces[:1], "a test")
    assert sorted(contents(tmp_path / "one")) == ["meta.json", "test.bin"]
    with pytest.raises(UserError, match="one is for evaluation only"):
        Dataset("one", tmp_path)
    with pytest.raises(UserError, match="val.bin would be empty"):
        writing.write_dataset(tmp_path / "two", tokenizer, pieces[:2], "a test")


# ---- from files ----


def test_characters_are_those_of_the_files_in_the_order_of_their_code_points(tmp_path):
    (tmp_path / "my.txt").write_text("to be or not to be\n" * 3)
    writing.prepare_files([tmp_path / "my.txt"], tmp_path / "out", "char")
    meta = read_meta(tmp_path / "out")
    assert meta["chars"] == "\n benort" and meta["source"] == "my.txt"
    assert meta["train_tokens"] + meta["val_tokens"] == 57


def test_one_document_is_enough(tmp_path):
    path = write_jsonl(tmp_path / "my.jsonl", ["to be or not to be, " * 10])
    writing.prepare_files([path], tmp_path / "out", "char")
    meta = read_meta(tmp_path / "out")
    assert (meta["train_tokens"], meta["val_tokens"]) == (180, 22)  # a blank line ends it


def test_a_very_small_or_large_validation_split_is_a_warning_with_its_cause(tmp_path, capsys):
    def warning(lengths, **options):
        path = write_jsonl(tmp_path / "my.jsonl", ["a" * length for length in lengths])
        writing.prepare_files([path], tmp_path / "out", "char", **options)
        return capsys.readouterr().err

    assert warning([100] * 20) == warning([100] * 20, val_share=Fraction(9, 10)) == ""
    large = warning([1000] + [10] * 11)
    assert "warning: 89.42% of all tokens are for validation; the lengths of the doc" in large
    assert "choose some with --val FILE" in large and large.count("\n") == 1
    assert "warning: 0.33% of all tokens" in warning([1] + [100] * 9)
    (tmp_path / "val.txt").write_text("aaaaa")
    assert "warning: 0.25% of all tokens are for val" in warning([2000], val=[tmp_path / "val.txt"])


def test_gpt2_documents_end_with_end_of_text(tmp_path, gpt2_files):
    path = write_jsonl(tmp_path / "my.jsonl", [f"text {i}" for i in range(11)])
    writing.prepare_files([path], tmp_path / "out", "gpt2", num_proc=2)
    meta = read_meta(tmp_path / "out")
    assert read_text(tmp_path / "out", "val") == "text 0<|endoftext|>text 10<|endoftext|>"
    assert read_ids(tmp_path / "out", "train").tolist().count(50256) == 9
    assert meta["vocab_size"] == 50257 and meta["tokenizer"] == "gpt2" and "chars" not in meta
