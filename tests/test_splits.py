"""data/splits.py: which part of a text is for training, and which for validation."""

from fractions import Fraction

import pytest
from prepared import write_jsonl

from data import text as text_files
from data.splits import split_documents, split_files


def read(*paths, end="|", **options):
    """The text of each split."""
    texts = {}
    for split, text in split_files(list(paths), end, **options):
        texts[split] = texts.get(split, "") + text
    return texts


@pytest.mark.parametrize("chunk", [7, 2**20])
def test_the_last_tenth_of_a_text_is_validation(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "my.txt").write_text(text)
    cut = len(text) * 9 // 10
    assert read(tmp_path / "my.txt") == {"train": text[:cut], "val": text[cut:]}


def test_every_tenth_document_of_jsonl_is_validation(tmp_path):
    path = write_jsonl(tmp_path / "my.jsonl", [f"text {i}" for i in range(12)])
    train = "".join(f"text {i}|" for i in range(12) if i % 10)
    assert read(path) == {"train": train, "val": "text 0|text 10|"}


def test_several_texts_each_give_their_end_to_validation(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text(path.stem * 10)
    assert read(*paths) == {"train": "a" * 9 + "|" + "b" * 9 + "|", "val": "a|b|"}


def test_three_files_may_be_the_splits_themselves(tmp_path):
    paths = [tmp_path / f"{name}.txt" for name in "abc"]
    for path in paths:
        path.write_text(path.stem * 10)
    splits = {"train": "a" * 10, "val": "b" * 10, "test": "c" * 10}
    assert read(*paths, own_splits=True) == splits
    assert read(*paths[:2], own_splits=True).keys() == {"train", "val"}


@pytest.mark.parametrize("lengths", [[40], [30, 10], [1] * 5 + [35], [0, 40, 0]])
def test_few_documents_give_the_last_tenth_of_their_text_to_validation(tmp_path, lengths):
    documents = ["abcdefghi"[i] * length for i, length in enumerate(lengths)]
    texts = read(write_jsonl(tmp_path / "my.jsonl", documents), end="|")
    assert texts["train"] + texts["val"] == "".join(document + "|" for document in documents)
    assert len(texts["val"].replace("|", "")) == 4


@pytest.mark.parametrize("share", ["0.1", "0.3", "0.0625", "0.5", "0.9"])
def test_a_share_of_the_documents_and_of_each_text_is_validation(tmp_path, share):
    share = Fraction(share)
    splits = [split for split, _ in split_documents(["a"] * 1000, "|", share)]
    assert abs(splits.count("val") - 1000 * share) <= 1 and splits[0] == "val"
    (tmp_path / "my.txt").write_text("a" * 2000)
    texts = read(tmp_path / "my.txt", val_share=share)
    assert len(texts["val"]) == 2000 * share and len(texts["train"]) == 2000 * (1 - share)


def test_files_for_validation_leave_all_others_for_training(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 10)
    (tmp_path / "b.txt").write_text("b" * 10)
    c = write_jsonl(tmp_path / "c.jsonl", ["c", "d"])
    paths = [tmp_path / "a.txt", c]
    assert read(*paths, val=[tmp_path / "b.txt"]) == {
        "train": "a" * 10 + "|c|d|",
        "val": "b" * 10,
    }
    assert read(tmp_path / "a.txt", val=[c]) == {"train": "a" * 10, "val": "c|d|"}
