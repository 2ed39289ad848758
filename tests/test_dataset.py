"""dataset.py: what a folder must hold, and batches that depend on nothing but their numbers."""

import json
import pickle

import numpy as np
import pytest
import torch
from conftest import write_dataset

from configurator import UserError
from data import dataset
from data.dataset import EVAL, TRAIN, Dataset, random_bits


@pytest.fixture
def abc(data_dir):
    return Dataset("abc", data_dir)


def test_targets_are_the_inputs_one_token_later_at_random_places(abc):
    x, y = abc.batch("train", TRAIN, seed=1, step=0, micro_step=0, B=64, T=8)
    assert x.shape == y.shape == (64, 8) and x.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    text = abc.tokens["train"].tobytes()
    windows = torch.cat([x, y[:, -1:]], 1).numpy().astype("<u2")
    assert all(row.tobytes() in text for row in windows)
    assert len(np.unique(windows, axis=0)) > 10


def test_a_batch_is_a_function_of_seed_split_step_and_micro_step(abc, data_dir):
    def batch(split="train", purpose=TRAIN, seed=1, step=3, micro_step=2, data=abc):
        return data.batch(split, purpose, seed, step, micro_step, B=8, T=16)[0]

    first = batch()
    torch.manual_seed(99), np.random.seed(99)
    assert torch.equal(first, batch(data=Dataset("abc", data_dir)))
    for other in ({"seed": 2}, {"step": 4}, {"micro_step": 3}, {"purpose": EVAL}):
        assert not torch.equal(first, batch(**other)), other


def test_random_bits_never_change():
    assert random_bits(1337, TRAIN, 5, 1, 2).tolist() == [208852408542721788, 12149193057237555774]


def test_the_last_window_of_a_file_can_be_drawn(tmp_path):
    write_dataset(tmp_path / "short", "ab" * 10)  # 18 tokens for training
    data = Dataset("short", tmp_path)
    data.check_length(1)
    starts = {int(data.batch("train", TRAIN, 0, s, 0, 1, 17)[0][0, 0]) for s in range(5)}
    assert starts == {0}  # one window of 17 + 1 tokens fits, and it begins with "a"


def damage(name):
    def decorate(change):
        DAMAGES[name] = change
        return change

    return decorate


DAMAGES = {}


@damage("train.bin is missing")
def _(folder):
    (folder / "train.bin").unlink()


@damage("val.bin is damaged: 0 bytes")
def _(folder):
    (folder / "val.bin").write_bytes(b"")


@damage("train.bin is damaged")
def _(folder):
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-7])


@damage("in meta.json")
def _(folder):
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-8])


@damage("token id 60000")
def _(folder):
    tokens = np.fromfile(folder / "val.bin", "<u2")
    tokens[-1] = 60000
    tokens.tofile(folder / "val.bin")


@damage("is not JSON")
def _(folder):
    (folder / "meta.json").write_text("{")


@damage("needs a dtype")
def _(folder):
    (folder / "meta.json").write_text('{"vocab_size": 5, "dtype": "float32"}')


@damage("whole number as test_bytes")
def _(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"test_bytes": "5"}))


@damage("vocab_size that fits")
def _(folder):
    (folder / "meta.json").write_text('{"vocab_size": 70000, "dtype": "uint16"}')


@pytest.mark.parametrize("said", DAMAGES)
def test_damaged_data_are_told_by_file(data_dir, said):
    DAMAGES[said](data_dir / "abc")
    with pytest.raises(UserError, match=said):
        Dataset("abc", data_dir)


def test_data_shorter_than_a_sequence_are_told_with_the_length_that_fits(abc):
    n = len(abc.tokens["val"])
    abc.check_length(n - 1)
    with pytest.raises(UserError, match=f"block_size={n}; pass --block_size={n - 1}"):
        abc.check_length(n)


@pytest.mark.parametrize("name", ["../abc", "/abc", "", ".", "..", "a/b", "a b"])
def test_a_data_set_is_a_name_and_never_a_path(data_dir, name):
    with pytest.raises(UserError, match="not a name"):
        Dataset(name, data_dir)


def test_nanogpts_bins_alone_are_gpt2_tokens_in_uint16(data_dir):
    (data_dir / "abc" / "meta.json").unlink()
    data = Dataset("abc", data_dir)
    assert data.vocab_size == 50257 and data.tokenizer == {"tokenizer": "gpt2"}


def test_nanogpts_meta_pkl_is_read(data_dir):
    meta = json.loads((data_dir / "abc" / "meta.json").read_text())
    (data_dir / "abc" / "meta.json").unlink()
    itos = dict(enumerate(meta["chars"]))
    old = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    (data_dir / "abc" / "meta.pkl").write_bytes(pickle.dumps(old))
    data = Dataset("abc", data_dir)
    assert data.tokenizer == {"tokenizer": "char", "chars": meta["chars"]}


def test_a_meta_pkl_that_would_run_code_is_refused(data_dir, tmp_path):
    canary = tmp_path / "canary"

    class Malicious:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    (data_dir / "abc" / "meta.json").unlink()
    (data_dir / "abc" / "meta.pkl").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match="not a plain meta.pkl"):
        Dataset("abc", data_dir)
    assert not canary.exists()


def test_uint32_tokens_are_read(tmp_path):
    folder = tmp_path / "big"
    folder.mkdir()
    for split in ("train", "val"):
        np.arange(99_000, 99_100, dtype="<u4").tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text('{"vocab_size": 100000, "dtype": "uint32"}')
    x, _ = Dataset("big", tmp_path).batch("train", TRAIN, 0, 0, 0, 2, 5)
    assert x.min() >= 99_000


def test_a_fingerprint_tells_files_apart_and_checks_the_hash_in_meta_json(data_dir, monkeypatch):
    whole = Dataset("abc", data_dir).fingerprint()
    assert whole.keys() == {"train", "val"} and len(set(whole.values())) == 2
    monkeypatch.setattr(dataset, "SCAN_LIMIT", 100)  # larger files are hashed in pieces
    monkeypatch.setattr(dataset, "PIECE", 64)
    pieces = Dataset("abc", data_dir).fingerprint()
    assert pieces != whole
    path = data_dir / "abc" / "val.bin"
    data = path.read_bytes()
    path.write_bytes(data[2:] + data[:2])
    assert Dataset("abc", data_dir).fingerprint()["val"] != pieces["val"]
    assert Dataset("abc", data_dir).fingerprint()["train"] == pieces["train"]
    monkeypatch.undo()
    meta = json.loads((data_dir / "abc" / "meta.json").read_text())
    meta["val_sha256"] = whole["val"]
    (data_dir / "abc" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="SHA-256 differs"):
        Dataset("abc", data_dir).fingerprint()


def give_test_split(folder):
    """Let `folder` be for evaluation only."""
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "train.bin").unlink()
    (folder / "val.bin").rename(folder / "test.bin")
    tokens = meta.pop("train_tokens") and meta.pop("val_tokens")
    (folder / "meta.json").write_text(json.dumps({**meta, "test_tokens": tokens}))


def test_splits_are_those_of_meta_json_or_else_the_files(data_dir):
    folder = data_dir / "abc"
    (folder / "test.bin").write_bytes(b"\0\0")  # an older one, that meta.json tells nothing of
    assert dataset.held_splits(folder) == ("train", "val")
    (folder / "meta.json").unlink()
    assert dataset.held_splits(folder) == ("train", "val", "test")


def test_any_split_is_opened_by_itself_with_its_checks(data_dir):
    give_test_split(data_dir / "abc")
    data = Dataset("abc", data_dir, splits=("test",))
    assert dataset.held_splits(data.folder) == ("test",)
    assert data.tokens.keys() == data.fingerprint().keys() == {"test"}
    with pytest.raises(UserError, match="test.bin has"):
        data.check_length(len(data.tokens["test"]))
    (data_dir / "abc" / "test.bin").write_bytes(b"\0\0")
    with pytest.raises(UserError, match="test.bin is damaged"):
        Dataset("abc", data_dir, splits=("test",))


def test_a_data_set_for_evaluation_is_not_for_training(data_dir):
    give_test_split(data_dir / "abc")
    with pytest.raises(UserError, match="abc is for evaluation only; choose another --dataset"):
        Dataset("abc", data_dir)
    with pytest.raises(UserError, match="no val split, only test; choose"):
        Dataset("abc", data_dir, splits=("val",))


def test_a_missing_split_is_told_with_those_that_are_there(data_dir):
    with pytest.raises(UserError, match="no test split, only train, val; choose"):
        Dataset("abc", data_dir, splits=("train", "test"))


def test_a_file_that_ends_in_zeros_was_not_written_to_its_end(data_dir):
    path = data_dir / "abc" / "train.bin"
    (data_dir / "abc" / "meta.json").unlink()  # as nanoGPT's bins have none
    path.write_bytes(path.read_bytes() + bytes(2 * dataset.TAIL))
    with pytest.raises(UserError, match="ends in zeros"):
        Dataset("abc", data_dir)
