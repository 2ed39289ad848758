"""data/dataset.py: files are checked, and batches depend on nothing but their numbers."""

import json

import numpy as np
import pytest
import torch
from conftest import write_dataset

from configurator import UserError
from data import dataset
from data.dataset import Batches, Dataset, Purpose, dropout_seed, random_bits
from data.meta import held_splits


@pytest.fixture
def abc(data_dir):
    return Dataset("abc", data_dir)


def test_targets_are_the_inputs_one_token_later_at_random_places(abc):
    x, y = abc.batch("train", Purpose.TRAIN, seed=1, step=0, micro_step=0, B=64, T=8)
    assert x.shape == y.shape == (64, 8) and x.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    text = abc.tokens["train"].tobytes()
    windows = torch.cat([x, y[:, -1:]], 1).numpy().astype("<u2")
    assert all(row.tobytes() in text for row in windows)
    assert len(np.unique(windows, axis=0)) > 10


def test_a_batch_is_a_function_of_seed_split_step_and_micro_step(abc, data_dir):
    def batch(split="train", purpose=Purpose.TRAIN, seed=1, step=3, micro_step=2, data=abc):
        return data.batch(split, purpose, seed, step, micro_step, B=8, T=16)[0]

    first = batch()
    torch.manual_seed(99), np.random.seed(99)
    assert torch.equal(first, batch(data=Dataset("abc", data_dir)))
    for other in ({"seed": 2}, {"step": 4}, {"micro_step": 3}, {"purpose": Purpose.EVAL}):
        assert not torch.equal(first, batch(**other)), other


def test_random_bits_never_change():
    bits = random_bits(1337, Purpose.TRAIN, 5, 1, 2)
    assert bits.tolist() == [208852408542721788, 12149193057237555774]
    assert [int(purpose) for purpose in Purpose] == [0, 1, 2, 3]
    assert dropout_seed(1337, 5, 1) == 8943546680033676020


def test_the_next_batch_is_loaded_by_advance_and_none_follows_the_last():
    loaded = []
    load = lambda step, micro_step: loaded.append((step, micro_step)) or loaded[-1]
    batches = Batches(load, range(1, 3), first_step=5, last_step=7)
    for key in ((5, 1), (5, 2), (6, 1), (6, 2)):
        assert batches.next == key == loaded[-1]
        batches.advance()
    assert batches.next is None and len(loaded) == 4


def test_the_last_window_of_a_file_can_be_drawn(tmp_path):
    write_dataset(tmp_path / "short", "ab" * 10)  # 18 tokens for training
    data = Dataset("short", tmp_path)
    data.check_length(1)
    starts = {int(data.batch("train", Purpose.TRAIN, 0, s, 0, 1, 17)[0][0, 0]) for s in range(5)}
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


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_data_are_an_error_that_names_the_file(data_dir, message):
    DAMAGES[message](data_dir / "abc")
    with pytest.raises(UserError, match=message):
        Dataset("abc", data_dir)


def test_data_shorter_than_a_sequence_are_an_error_with_the_length_that_fits(abc):
    n = len(abc.tokens["val"])  # shorter than train
    abc.check_length(n - 1)
    with pytest.raises(UserError, match=f"block_size={n}; pass --block_size={n - 1}"):
        abc.check_length(n)


def test_uint32_tokens_are_read(tmp_path):
    folder = tmp_path / "big"
    folder.mkdir()
    for split in ("train", "val"):
        np.arange(99_000, 99_100, dtype="<u4").tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text('{"vocab_size": 100000, "dtype": "uint32"}')
    x, _ = Dataset("big", tmp_path).batch("train", Purpose.TRAIN, 0, 0, 0, 2, 5)
    assert x.min() >= 99_000


def test_fingerprints_differ_between_files_and_are_checked_against_meta_json(data_dir, monkeypatch):
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


@pytest.mark.parametrize(
    "n, message", [(3, "pass --block_size=2 or less"), (1, "no block_size fits; prepare more text")]
)
def test_the_advice_for_short_data_is_one_for_all_splits(data_dir, n, message):
    meta = {"vocab_size": 20, "dtype": "uint16"}
    (data_dir / "abc" / "meta.json").write_text(json.dumps(meta))
    np.ones(7, "<u2").tofile(data_dir / "abc" / "train.bin")
    np.ones(n, "<u2").tofile(data_dir / "abc" / "val.bin")
    with pytest.raises(UserError, match=f"val.bin has {n} tokens.*{message}"):
        Dataset("abc", data_dir).check_length(7)


def keep_only_a_test_split(folder):
    """Turn the data set in `folder` into one for evaluation only."""
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "train.bin").unlink()
    (folder / "val.bin").rename(folder / "test.bin")
    tokens = meta.pop("train_tokens") and meta.pop("val_tokens")
    (folder / "meta.json").write_text(json.dumps({**meta, "test_tokens": tokens}))


def test_any_split_is_opened_by_itself_with_its_checks(data_dir):
    keep_only_a_test_split(data_dir / "abc")
    data = Dataset("abc", data_dir, splits=("test",))
    assert held_splits(data.folder) == ("test",)
    assert data.tokens.keys() == data.fingerprint().keys() == {"test"}
    with pytest.raises(UserError, match="test.bin has"):
        data.check_length(len(data.tokens["test"]))
    (data_dir / "abc" / "test.bin").write_bytes(b"\0\0")
    with pytest.raises(UserError, match="test.bin is damaged"):
        Dataset("abc", data_dir, splits=("test",))


def test_a_data_set_for_evaluation_is_not_for_training(data_dir):
    keep_only_a_test_split(data_dir / "abc")
    with pytest.raises(UserError, match="abc is for evaluation only; choose another --dataset"):
        Dataset("abc", data_dir)
    with pytest.raises(UserError, match="no val split, only test; choose"):
        Dataset("abc", data_dir, splits=("val",))


def test_a_missing_split_is_an_error_that_names_the_others(data_dir):
    with pytest.raises(UserError, match="no test split, only train, val; choose"):
        Dataset("abc", data_dir, splits=("train", "test"))


def test_a_file_that_ends_in_zeros_is_an_interrupted_one(data_dir):
    path = data_dir / "abc" / "train.bin"
    (data_dir / "abc" / "meta.json").unlink()  # as nanoGPT's bins have none
    path.write_bytes(path.read_bytes() + bytes(2 * dataset.TAIL))
    with pytest.raises(UserError, match="ends in zeros"):
        Dataset("abc", data_dir)
