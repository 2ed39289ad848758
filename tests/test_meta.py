"""data/meta.py: what the folder of a data set says about itself."""

import json
import math
import pickle
import re

import numpy as np
import pytest
from conftest import Failed

from configurator import UserError
from data import meta as meta_module
from data.dataset import Dataset
from data.meta import data_folder, held_splits, known_datasets, read_meta


@pytest.mark.parametrize("name", ["../abc", "/abc", "", ".", "..", "a/b", "a b"])
def test_a_data_set_is_a_name_and_never_a_path(data_dir, name):
    with pytest.raises(UserError, match="not a name"):
        data_folder(name, data_dir)


def test_the_script_for_any_text_is_no_data_set():
    assert known_datasets().startswith("fineweb_edu, ")
    with pytest.raises(UserError, match="data/char/prepare.py --input YOUR.txt --out"):
        Dataset("char")


def test_nanogpts_bins_alone_are_gpt2_tokens_in_uint16(data_dir):
    (data_dir / "abc" / "meta.json").unlink()
    data = Dataset("abc", data_dir)
    assert data.vocab_size == 50257 and data.tokenizer == {"tokenizer": "gpt2"}


def test_nanogpts_meta_pkl_is_read(data_dir):
    meta = json.loads((data_dir / "abc" / "meta.json").read_text())
    itos = dict(enumerate(meta["chars"]))
    old = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    write_pickle(data_dir / "abc", old)
    data = Dataset("abc", data_dir)
    assert data.tokenizer == {"tokenizer": "char", "chars": meta["chars"]}


def write_pickle(folder, meta, protocol=None):
    """Put a meta.pkl in place of the meta.json of `folder`."""
    (folder / "meta.json").unlink(missing_ok=True)
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))


WORDS = ["the ", "cat ", "sat ", "on ", "mat ", "a ", "dog ", "and ", "ran ", "\n"]


@pytest.mark.parametrize(
    "old, meta",
    [
        ({"vocab_size": 7}, {"vocab_size": 7}),
        ({"vocab_size": 2, "itos": {0: 5, 1: 7}}, {"vocab_size": 2}),
        ({"vocab_size": 3, "itos": {0: "a", 2: "b"}}, {"vocab_size": 3}),
        (
            {"vocab_size": 3, "itos": ["ab", "cd", "ef"]},
            {"vocab_size": 3, "tokenizer": "strings", "strings": ["ab", "cd", "ef"]},
        ),
        (
            {"vocab_size": 2, "itos": {0: "a", 1: "a"}},
            {"vocab_size": 2, "tokenizer": "strings", "strings": ["a", "a"]},
        ),
        (
            {"vocab_size": 64, "itos": {0: "a", 1: "b"}},
            {"vocab_size": 64, "tokenizer": "char", "chars": "ab"},
        ),
        (
            {"vocab_size": np.int64(2), "itos": {np.int32(0): np.str_("a"), np.uint8(1): "é"}},
            {"vocab_size": 2, "tokenizer": "char", "chars": "aé"},
        ),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_meta_pkl_needs_no_more_than_the_size_of_the_vocabulary(tmp_path, old, meta, protocol):
    write_pickle(tmp_path, old, protocol)
    assert read_meta(tmp_path) == {"dtype": "uint16", **meta}


def test_tokens_longer_than_a_character_are_trained_on_and_sampled_as_they_are(run, data_dir):
    write_pickle(data_dir / "abc", {"vocab_size": 10, "itos": dict(enumerate(WORDS))})
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        rng.integers(0, 10, 500).astype("<u2").tofile(data_dir / "abc" / f"{split}.bin")
    size = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--batch_size=4"]
    args = [*size, "--dataset=abc", f"--data_dir={data_dir}", "--device=cpu", "--max_iters=1"]
    out = run("train", *args, "--eval_iters=2", "--gradient_accumulation_steps=1")
    loss = float(re.search(r"val loss (\d+\.\d+)", out)[1])
    assert abs(loss - math.log(10)) < 0.05
    sample = ["--num_samples=1", "--max_new_tokens=8", "--device=cpu"]
    words = re.findall(
        r"\w+ |\n", run("sample", *sample, "--start=the dog ")[: -len("\n---\n") - 12]
    )
    assert words[:2] == ["the ", "dog "] and len(words) == 10 and set(words) <= set(WORDS)
    with pytest.raises(Failed, match="cannot be encoded from 'bird'"):
        run("sample", *sample, "--start=the bird")


def test_data_without_a_tokenizer_are_trained_on_and_only_sampling_asks_for_it(
    run, run_train, data_dir, monkeypatch
):
    write_pickle(data_dir / "abc", {"vocab_size": np.int64(20)})
    run_train("--max_iters=1")
    monkeypatch.setattr(meta_module, "DATA_DIR", data_dir)
    with pytest.raises(Failed, match="only token ids.*add the strings of the tokens") as failed:
        run("sample", "--device=cpu")
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1


def test_a_meta_pkl_that_would_run_code_is_refused(data_dir, tmp_path):
    canary = tmp_path / "canary"

    class Malicious:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    write_pickle(data_dir / "abc", Malicious())
    with pytest.raises(UserError, match="not a plain meta.pkl.*it asks for io.open"):
        Dataset("abc", data_dir)
    assert not canary.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy\ndtype\ncnumpy._core.multiarray\nscalar\n\x86.",
        b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR"
        b"(I3\nS'|'\ntbS'12345678'\ntR.",
    ],
)
def test_the_scalars_of_numpy_in_a_meta_pkl_can_build_nothing_else(tmp_path, code):
    (tmp_path / "meta.pkl").write_bytes(code)
    with pytest.raises(UserError, match="not a plain meta.pkl"):
        read_meta(tmp_path)


def test_splits_are_those_of_meta_json_or_else_the_files(data_dir):
    folder = data_dir / "abc"
    (folder / "test.bin").write_bytes(b"\0\0")  # an older file, unknown to meta.json
    assert held_splits(folder) == ("train", "val")
    (folder / "meta.json").unlink()
    assert held_splits(folder) == ("train", "val", "test")
