"""data/meta.py: what the folder of a data set says about itself."""

import json
import pickle

import pytest

from configurator import UserError
from data.dataset import Dataset
from data.meta import data_folder, held_splits


@pytest.mark.parametrize("name", ["../abc", "/abc", "", ".", "..", "a/b", "a b"])
def test_a_data_set_is_a_name_and_never_a_path(data_dir, name):
    with pytest.raises(UserError, match="not a name"):
        data_folder(name, data_dir)


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


def test_splits_are_those_of_meta_json_or_else_the_files(data_dir):
    folder = data_dir / "abc"
    (folder / "test.bin").write_bytes(b"\0\0")  # an older file, unknown to meta.json
    assert held_splits(folder) == ("train", "val")
    (folder / "meta.json").unlink()
    assert held_splits(folder) == ("train", "val", "test")
