"""checkpoint.py: nanoGPT's format both ways, a write that is whole or not there, a strict read."""

import pickle
from pathlib import Path

import pytest
import torch

from configurator import UserError
from engine import checkpoint as ckpt
from engine.runtime import Runtime
from model import GPT, GPTConfig

ARGS = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=False, vocab_size=11, dropout=0.0)


def nanogpt_checkpoint(prefix="", **args):
    """A checkpoint with the keys that nanoGPT's train.py writes."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**ARGS, **args}))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    return model, {
        "model": {prefix + k: v for k, v in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {**ARGS, **args},
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "device": "cuda", "compile": True},
    }


def reloaded(saved, folder):
    torch.save(saved, folder / "ckpt.pt")
    return ckpt.build_model(ckpt.load(folder / "ckpt.pt"), folder / "ckpt.pt")


def test_what_is_saved_is_plain_data_under_nanogpts_keys(tmp_path):
    _, saved = nanogpt_checkpoint()
    ckpt.save(saved, tmp_path)
    raw = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert raw.keys() == saved.keys()
    assert not [name for name in raw["model"] if name.startswith(("module.", "_orig_mod."))]


def test_a_failed_save_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    _, saved = nanogpt_checkpoint()
    ckpt.save(saved, tmp_path)
    before = (tmp_path / "ckpt.pt").read_bytes()

    def fail(obj, file):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        ckpt.save(saved, tmp_path)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_every_cut_and_every_flipped_bit_is_noticed(tmp_path):
    _, saved = nanogpt_checkpoint()
    ckpt.save(saved, tmp_path)
    whole = (tmp_path / "ckpt.pt").read_bytes()
    end = range(len(whole) - 200, len(whole))  # where the archive ends and its seal is
    for i in [*range(0, len(whole), 3001), *end]:
        flipped = bytearray(whole)
        flipped[i] ^= 1 << i % 8
        for damaged in (flipped, whole[:i]):
            (tmp_path / "damaged.pt").write_bytes(damaged)
            with pytest.raises(UserError, match="damaged.pt is damaged"):
                ckpt.load(tmp_path / "damaged.pt")


def test_the_newest_whole_checkpoint_is_found_and_the_reason_told(tmp_path):
    _, saved = nanogpt_checkpoint()
    ckpt.save({**saved, "iter_num": 1}, tmp_path)
    assert ckpt.load_newest(tmp_path)[1:] == (tmp_path / "ckpt.pt", None)
    ckpt.save({**saved, "iter_num": 2}, tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(b"PK, and then nothing")
    loaded, path, trouble = ckpt.load_newest(tmp_path)
    assert loaded["iter_num"] == 1 and path.name == "previous.pt"
    assert "ckpt.pt is damaged" in trouble and "going on from" in trouble
    (tmp_path / "ckpt.pt").unlink()
    assert "missing" in ckpt.load_newest(tmp_path)[2]
    (tmp_path / "previous.pt").write_bytes(b"")
    with pytest.raises(UserError, match="previous.pt is damaged"):
        ckpt.load_newest(tmp_path)


def test_a_saver_reports_a_failure_and_tries_again(tmp_path, monkeypatch):
    _, saved = nanogpt_checkpoint()
    said = []
    saver = ckpt.Saver(tmp_path, said.append, None, Runtime("cpu", "float32", False))
    assert saver.save({**saved, "iter_num": 1}, False) and not saver.is_due_again()

    def full(obj, file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert not saver.save({**saved, "iter_num": 2}, True)
    assert saver.failed and saver.step == 1 and not saver.is_due_again()
    assert (
        "step 2 not saved (No space left on device)" in said[0]
        and "the last is of step 1" in said[0]
    )
    assert {p.name for p in tmp_path.iterdir()} == {"ckpt.pt"}
    monkeypatch.setattr(saver, "retry_at", 0.0)
    assert saver.is_due_again() and saver.save({**saved, "iter_num": 3}, False)
    assert not saver.failed and not saver.is_due_again()


def test_best_stays_when_the_latest_is_replaced(tmp_path):
    _, saved = nanogpt_checkpoint()
    ckpt.save({**saved, "iter_num": 1}, tmp_path, is_best=True)
    ckpt.save({**saved, "iter_num": 2}, tmp_path)
    assert ckpt.load(tmp_path / "best.pt")["iter_num"] == 1
    assert ckpt.load(tmp_path / "ckpt.pt")["iter_num"] == 2
    assert ckpt.load(tmp_path / "previous.pt")["iter_num"] == 1
    assert {p.name for p in tmp_path.iterdir()} == {"best.pt", "ckpt.pt", "previous.pt"}


def test_a_missing_checkpoint_is_told_with_the_key_that_names_it():
    with pytest.raises(UserError, match="--out_dir"):
        ckpt.load(Path("nowhere/ckpt.pt"))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 half a zip"])
def test_a_file_that_is_no_checkpoint_is_told(tmp_path, content):
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(UserError, match="ckpt.pt"):
        ckpt.load(tmp_path / "ckpt.pt")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    canary = tmp_path / "canary"

    class Malicious:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    torch.save({"model": Malicious(), "model_args": ARGS}, tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Malicious()))
    for name in ("zip.pt", "pickle.pt"):
        with pytest.raises(UserError, match=name):
            ckpt.load(tmp_path / name)
    assert not canary.exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c.pop("model"), "no model and model_args"),
        (lambda c: c.update(model_args=[1]), "model_args must be a dictionary"),
        (lambda c: c["model_args"].update(n_layer=3), "2 layers, but its model_args say 3"),
        (lambda c: c["model_args"].update(n_layer=10**9), "2 layers"),
        (lambda c: c["model_args"].update(n_embd=32), "of another architecture: .* is"),
        (lambda c: c["model_args"].update(n_embd=10**12), "can't be built"),
        (lambda c: c["model_args"].update(bias=True), "of another architecture: .* is missing"),
        (lambda c: c["model_args"].update(n_head=0), "n_head"),
        (lambda c: c["model_args"].update(n_head="2"), "n_head"),
        (lambda c: c["model_args"].update(attn_type="eval"), "attn_type"),
        (lambda c: c["model_args"].update(new_key=1), "new_key"),
        (lambda c: c["model_args"].update(dropout="x"), "dropout"),
        (lambda c: c["model_args"].update(pa_length=-3), "pa_length"),
        (lambda c: c.update(config=[1]), "config must be"),
        (lambda c: c.update(tokenizer="char"), "tokenizer must be"),
        (lambda c: c["model"].pop("lm_head.weight"), "lm_head.weight"),
        (lambda c: c["model"].update({"lm_head.weight": torch.ones(11, 16).int()}), "lm_head"),
        (lambda c: c["model"].update({"lm_head.weight": 3}), "lm_head.weight"),
        (lambda c: c["model"].update({"lm_head.weight": torch.ones(11, 16)}), "differ"),
        (lambda c: c["model"].update({"transformer.h.0.ln_1.bias": "x"}), "ln_1.bias"),
        (lambda c: c["model"].update({"transformer.h.0.ln_1.bias": torch.ones(16)}), "ln_2.bias"),
        (lambda c: c["model"].update({"transformer.h.0.attn.bias": torch.ones(8)}), "attn.bias"),
        (lambda c: c["model"].update(extra=torch.ones(1)), "extra"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_told(tmp_path, change, said):
    _, saved = nanogpt_checkpoint()
    change(saved)
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=said):
        ckpt.load(tmp_path / "ckpt.pt")


def first_state(checkpoint):
    return checkpoint["optimizer"]["state"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("optimizer"),
        lambda c: c.update(optimizer=None),
        lambda c: c["optimizer"].update(state={}),
        lambda c: c["optimizer"]["param_groups"].pop(),
        lambda c: first_state(c).pop("exp_avg"),
        lambda c: first_state(c).update(exp_avg=torch.zeros(3)),
        lambda c: c.update(iter_num=-5),
        lambda c: c.update(iter_num=float("inf")),
        lambda c: c.update(best_val_loss=float("nan")),
    ],
)
def test_a_state_that_does_not_fit_the_parameters_is_never_resumed_from(tmp_path, change):
    model, saved = nanogpt_checkpoint()
    change(saved)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(UserError, match="no state to resume from"):
        ckpt.restore(saved, tmp_path / "ckpt.pt", optimizer, scaler)


def test_best_is_kept_on_a_disk_without_hard_links(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("not supported")

    monkeypatch.setattr("os.link", fail)
    _, saved = nanogpt_checkpoint()
    ckpt.save(saved, tmp_path, is_best=True)
    assert ckpt.load(tmp_path / "best.pt")["iter_num"] == 7
