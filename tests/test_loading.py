"""engine/loading.py: a trained model finds its tokenizer, or says what is missing."""

import math
import pickle

import pytest
import torch
from conftest import Failed
from test_sample import RULER, SHORT

import export
from configurator import UserError
from data.tokenizer import CharTokenizer
from engine.loading import encode_prompt, load_trained
from model import GPT, GPTConfig


@pytest.fixture
def nanogpt(tmp_path):
    """Save a checkpoint as nanoGPT does in the current folder: nanogpt(dataset)."""

    def save(dataset):
        args = dict(n_layer=1, n_head=2, n_embd=8, block_size=8, bias=False, vocab_size=8)
        state = GPT(GPTConfig(**args)).state_dict()
        state = {f"_orig_mod.{name}": weight for name, weight in state.items()}
        checkpoint = {"model": state, "model_args": {**args, "dropout": 0.2}}
        torch.save({**checkpoint, "config": {"dataset": dataset}}, tmp_path / "ckpt.pt")

    return save


def test_a_checkpoint_of_nanogpt_samples_with_the_meta_pkl_of_its_data(run, nanogpt, tmp_path):
    chars = "\nabcdefg"
    nanogpt("old")
    (tmp_path / "data" / "old").mkdir()
    meta = {"vocab_size": 8, "itos": dict(enumerate(chars)), "stoi": {}}
    (tmp_path / "data" / "old" / "meta.pkl").write_bytes(pickle.dumps(meta))
    texts = run("sample", "--out_dir=.", "--data_dir=data", *SHORT)
    assert len(texts) == 2 * (21 + len(RULER)) and set(texts) <= set(chars + "-")


@pytest.mark.parametrize(
    "dataset, data_dir, repair",
    [
        ("old", None, "put its meta.pkl into .*data/old, or pass --data_dir=FOLDER .* FOLDER/old/"),
        ("old", "elsewhere", "put its meta.pkl into elsewhere/old, "),
        (
            "shakespeare_char",
            "elsewhere",
            "run python data/shakespeare_char/prepare.py --out elsewhere/shakespeare_char, ",
        ),
    ],
)
def test_a_missing_tokenizer_is_named_with_its_data_set(run, nanogpt, dataset, data_dir, repair):
    nanogpt(dataset)
    folder = [f"--data_dir={data_dir}"] if data_dir else []
    with pytest.raises(Failed, match=f"trained on data set {dataset}, and .*{repair}") as failed:
        run("sample", "--out_dir=.", *folder, *SHORT)
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1


def test_an_empty_prompt_is_what_a_document_begins_with():
    newline, none = CharTokenizer("\nab"), CharTokenizer("ab")
    assert list(encode_prompt(newline, "")) == [0]
    assert list(encode_prompt(type("BPE", (), {"eot": 50256})(), "")) == [50256]
    with pytest.raises(UserError, match="empty"):
        encode_prompt(none, "")


def test_gpt2_without_its_tokenizer_says_where_it_looks(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8))
    export.write_folder(tmp_path / "hf", model.state_dict(), model.config)
    with pytest.raises(Failed, match="TIKTOKEN_CACHE_DIR") as failed:
        run("sample", "--init_from=hf")
    assert failed.value.code == 2 and "\nerror: GPT-2's tokenizer is not in" in failed.value.stderr


@pytest.mark.parametrize("loss", [None, "low", [1]])
def test_a_loss_that_is_no_number_is_not_known(nanogpt, tmp_path, loss):
    nanogpt("old")
    checkpoint = torch.load(tmp_path / "ckpt.pt")
    torch.save({**checkpoint, "best_val_loss": loss}, tmp_path / "ckpt.pt")
    assert load_trained(tmp_path, "ckpt.pt", "resume", None).best_val_loss == math.inf
