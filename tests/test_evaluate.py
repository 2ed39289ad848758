"""evaluate.py: every token of a split once, and numbers that another computation confirms."""

import json
import math
import os
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, Failed, subprocess_run
from torch.nn import functional as F

from data.tokenizer import CharTokenizer
from engine.loading import load
from model import GPT, GPTConfig

PASSAGES = ["the cat sat on the mat", "a dog ran to the cat", "the mat"]


def write_split(folder, split, ids, **meta):
    folder.mkdir(parents=True, exist_ok=True)
    np.array(ids, dtype="<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({"dtype": "uint16", **meta}))


@pytest.fixture
def gpt2_folder(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = dict(vocab_size=50257, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.5)).eval()
    model.save_pretrained(tmp_path / "hf")
    return model


def results(folder):
    return json.loads((folder / "eval.json").read_text())["results"]


def target_by_target(logits_of, ids, T, stride):
    """-ln p of all targets but the first, each computed alone, with the context that it should
    have: of the windows that begin 0, stride, 2 stride, ... the first that holds the target."""
    nll = []
    for target in range(1, len(ids)):
        first = max(0, math.ceil((target - T) / stride)) * stride
        logits = logits_of(torch.tensor([ids[first:target]]))[0, -1]
        nll.append(F.cross_entropy(logits.double(), torch.tensor(ids[target])).item())
    return nll


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_transformers_computes_the_same(run, tmp_path, gpt2_folder, stride):
    ids = np.random.default_rng(0).integers(0, 50257, 75).tolist()
    write_split(
        tmp_path / "data" / "some", "test", ids, vocab_size=50257, test_words=40, test_bytes=300
    )
    run("evaluate", "--init_from=hf", "--datasets=some", "--data_dir=data", "--batch_size=3",
        f"--eval_stride={stride}", "--out_dir=e", "--device=cpu")  # fmt: skip
    with torch.no_grad():
        nll = target_by_target(lambda x: gpt2_folder(x).logits, ids, 16, stride)
    row = results(tmp_path / "e")["some"]
    assert (row["tokens"], row["stride"], row["split"]) == (74, stride, "test")
    assert row["loss"] == pytest.approx(sum(nll) / 74, abs=1e-4)
    assert row["perplexity"] == pytest.approx(math.exp(sum(nll) / 74), rel=1e-4)
    assert row["word_perplexity"] == pytest.approx(math.exp(sum(nll) / 40), rel=1e-3)
    assert row["bits_per_byte"] == pytest.approx(sum(nll) / math.log(2) / 300, rel=1e-4)


@pytest.mark.parametrize("attn_type", ["SM", "GK", "PA_relu"])
def test_characters_of_a_trained_model(run_train, run, tmp_path, data_dir, attn_type):
    run_train("--out_dir=run", f"--attn_type={attn_type}")
    out = run("evaluate", "--out_dir=run", f"--data_dir={data_dir}")  # the run's own data set
    row = results(tmp_path / "run")["abc"]
    model, tokenizer = load(tmp_path / "run")
    ids = np.fromfile(data_dir / "abc" / "val.bin", "<u2").tolist()
    with torch.no_grad():
        nll = target_by_target(lambda x: model(x)[0], ids, 16, 8)
    assert row["loss"] == pytest.approx(sum(nll) / len(nll), abs=1e-4)
    text = tokenizer.decode(ids)
    assert (row["words"], row["bytes"]) == (len(text.split()), len(text))
    assert re.search(rf"abc +val +{len(nll)} +{row['loss']:.4f}", out)


def test_a_checkpoint_of_nanogpt_is_evaluated_on_its_data_set(run, tmp_path, data_dir):
    V = json.loads((data_dir / "abc" / "meta.json").read_text())["vocab_size"]
    args = dict(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=V)
    checkpoint = {"model": GPT(GPTConfig(**args)).state_dict(), "model_args": args}
    torch.save({**checkpoint, "config": {"dataset": "abc"}}, tmp_path / "ckpt.pt")
    run("evaluate", "--out_dir=.", "--data_dir=data", "--device=cpu")
    assert results(tmp_path)["abc"]["loss"] == pytest.approx(math.log(V), abs=0.2)
    checkpoint["config"] = {"dataset": "nowhere"}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    run("evaluate", "--out_dir=.", "--data_dir=data", "--device=cpu", "--datasets=abc")


def test_last_words_are_told_apart_from_the_rest(run, run_train, tmp_path, data_dir):
    run_train("--out_dir=run")
    meta = json.loads((data_dir / "abc" / "meta.json").read_text())
    del meta["train_tokens"], meta["val_tokens"]
    tokenizer = CharTokenizer(meta["chars"])
    ids = tokenizer.encode(" ".join(PASSAGES[:1]))
    write_split(data_dir / "last", "test", ids, **{**meta, "last_word": True})
    out = run("evaluate", "--out_dir=run", "--datasets=last", f"--data_dir={data_dir}")
    row = results(tmp_path / "run")["last"]
    model, _ = load(tmp_path / "run")
    ids = torch.from_numpy(ids[-17:].astype(np.int64))  # the last 16 targets
    targets = ids[1:]
    with torch.no_grad():
        logits = model(ids[None, :-1], ids[None, 1:])[0][0]
    hits = logits.argmax(dim=1) == targets
    last = F.cross_entropy(logits[-3:], targets[-3:], reduction="sum").item()
    assert row["last_word_accuracy"] == float(hits[-3:].all())
    assert row["last_word_perplexity"] == pytest.approx(math.exp(last), rel=1e-4)
    assert row["tokens"] == 16 and "last word" in out
    assert row["word_perplexity"] is None  # passages need not be scored whole


def test_other_data_and_batches_than_the_runs_may_be_evaluated(run, run_train, tmp_path, data_dir):
    run_train("--out_dir=run")
    (data_dir / "abc").rename(data_dir / "other")
    args = ["EVAL", "--out_dir=run", f"--data_dir={data_dir}", "--batch_size=2", "--eval_iters=2"]
    assert "val loss" in run("train", *args, "--dataset=other")
    run("train", *args, "--datasets=other")
    with pytest.raises(Failed, match="batch_size=4, not 2"):
        run_train("--out_dir=run", "--init_from=resume", "--dataset=other", "--batch_size=2")


def test_train_and_evaluate_write_the_same_rows_which_stay_while_the_model_does(
    run, run_train, tmp_path, data_dir
):
    run_train("--out_dir=run", "--attn_type=SM")
    meta = json.loads((data_dir / "abc" / "meta.json").read_text())
    del meta["train_tokens"], meta["val_tokens"]
    write_split(data_dir / "two", "val", [1, 2, 3], **meta)
    write_split(data_dir / "one", "val", [1], **meta)
    args = ["--out_dir=run", f"--data_dir={data_dir}"]
    run("train", "EVAL", *args, "--datasets=abc")
    by_train = results(tmp_path / "run")["abc"]
    run("evaluate", *args, "--datasets=two,abc")
    assert results(tmp_path / "run").keys() == {"abc", "two"}
    by_evaluate = results(tmp_path / "run")["abc"]
    assert {**by_train, "seconds": 0} == {**by_evaluate, "seconds": 0}
    run("train", "EVAL", *args, "--datasets=two", "--init_from=finetune", "--attn_type=GK")
    assert results(tmp_path / "run").keys() == {"two"}
    with pytest.raises(Failed, match="one: .* has nothing to predict"):
        run("evaluate", *args, "--datasets=one")


def test_what_is_not_there_is_a_line_and_the_others_go_on(
    run, run_train, tmp_path, data_dir, capsys
):
    run_train("--out_dir=run")
    write_split(data_dir / "other", "val", [0, 1, 2], vocab_size=3)
    write_split(data_dir / "large", "val", [0, 1, 2], vocab_size=300)
    with pytest.raises(Failed) as failed:
        run("evaluate", "--out_dir=run", f"--data_dir={data_dir}", "--datasets=none,large,abc,ptb")
    lines = failed.value.stderr.splitlines()
    assert failed.value.code == 2 and len(lines) == 3
    assert "there is no data set 'none'" in lines[0] and "vocab_size=300" in lines[1]
    assert "python data/ptb/prepare.py" in lines[2]
    assert results(tmp_path / "run").keys() == {"abc"}
    with pytest.raises(Failed, match="datasets are for the evaluation"):
        run_train("--out_dir=run2", "--datasets=abc")
    assert not (tmp_path / "run2").exists()


def test_a_table_that_can_not_be_written_is_printed(run_train, tmp_path, data_dir):
    run_train("--out_dir=run")
    (tmp_path / "run" / "eval.json.tmp").mkdir()
    args = ["--out_dir=run", f"--data_dir={data_dir}", "--datasets=abc", "--device=cpu"]
    done = subprocess_run(ROOT / "evaluate.py", *args, cwd=tmp_path)
    assert done.returncode == 2 and "\nabc " in done.stdout
    assert "eval.json can't be written" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_two_processes_write_one_table_and_the_same_row(run, run_train, tmp_path, data_dir):
    run_train("--out_dir=run", "--attn_type=GK")
    args = ["--out_dir=run", "--datasets=abc", f"--data_dir={data_dir}", "--device=cpu"]
    run("evaluate", *args)
    one = results(tmp_path / "run")["abc"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess_run(*launch, ROOT / "evaluate.py", *args, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("abc") == 1
    two = results(tmp_path / "run")["abc"]
    assert {**one, "seconds": 0} == {**two, "seconds": 0}


@pytest.mark.parametrize(
    "args, message",
    [
        (["--init_from=gpt2"], "datasets is not set; name some, e.g. --datasets="),
        (["--out_dir=nowhere"], "no checkpoint nowhere"),
        (["eval_gpt2", "--eval_only=False"], "run train.py instead"),
        (["--checkpoint=../ckpt.pt"], "file name inside out_dir"),
    ],
)
def test_what_can_not_be_evaluated_is_one_line(run, args, message):
    with pytest.raises(Failed, match=message) as failed:
        run("evaluate", *args)
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1
