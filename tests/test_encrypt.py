"""encrypt.py: the commands, alone and as client and server."""

import json
import sys

import pytest
from conftest import Failed
from test_polynomial import random_model

from data.tokenizer import CharTokenizer
from engine import checkpoint as ckpt

CHARS = "\n abcdefghijklmnopqrstuvwxyz.,"


@pytest.fixture
def saved(tmp_path):
    def call(**args):
        model = random_model(vocab_size=len(CHARS), **args)
        checkpoint = {"model": model.state_dict(), "model_args": model.config.model_args()}
        ckpt.save({**checkpoint, "tokenizer": CharTokenizer(CHARS).meta()}, tmp_path)

    return call


def test_client_and_server_as_two_processes_agree_with_plain_numbers(saved, run, tmp_path):
    pytest.importorskip("tenseal", reason="tenseal is not installed")
    saved()
    args = ["--out_dir=.", "--save=keys"]
    run("encrypt", *args, "--role=encrypt", "--start=the cat")
    (tmp_path / "keys" / "client").rename(tmp_path / "elsewhere")  # the server has no need of it
    run("encrypt", *args, "--role=serve")
    (tmp_path / "elsewhere").rename(tmp_path / "keys" / "client")
    assert "decrypt" in run("encrypt", *args, "--role=decrypt")
    assert json.loads((tmp_path / "keys" / "server" / "packing.json").read_text())["T"] == 16


def test_the_plan_needs_no_tenseal(saved, run, monkeypatch):
    saved()
    monkeypatch.setitem(sys.modules, "tenseal", None)
    assert "L12 H12 C768 T1024" in run("encrypt", "--out_dir=.", "--plan")


def test_a_config_file_is_planned_without_a_run(run):
    table = run("encrypt", "train_he", "--plan")
    assert "L1 H1 C128 T64" in table and "L12 H12 C768 T1024" in table
    assert "L3 H2 C128 T64" in run("encrypt", "train_he", "--plan", "--n_layer=3", "--n_head=2")
    for args, said in [("--n_head=3", "not divisible by n_head"), ("--ring=16384", "unknown key")]:
        with pytest.raises(Failed, match=said) as failed:
            run("encrypt", "train_he", "--plan", args)
        assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1


def test_a_config_file_without_a_plan_is_answered_with_the_command_that_trains_it(run):
    with pytest.raises(Failed, match="only --plan reads .* python train.py train_he,") as failed:
        run("encrypt", "train_he")
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args, said",
    [
        (["--start="], "the prompt is empty"),
        (["--start=the cat sat on the mat"], "the prompt has 22 tokens; it must have 1 to 16"),
        (["--role=serve"], "add --save=DIR"),
        (["--save=nothing", "--role=serve"], "run --role=encrypt first"),
        (["--ring=8192"], "ring must be 16384 or 32768"),
    ],
)
def test_what_can_not_be_encrypted_is_one_line(saved, run, args, said):
    saved()
    with pytest.raises(Failed, match=said) as failed:
        run("encrypt", "--out_dir=.", *args)
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1
