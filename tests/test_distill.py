"""Conversion: the student's attention learns the teacher's, then the whole is trained."""

import csv
import os

import pytest
import torch
from conftest import EVERY_ATTN_TYPE, ROOT, Failed, subprocess_run

from engine import checkpoint as ckpt
from engine.distill import Matching
from model import GPT, GPTConfig

DISTILL = ["--init_from=distill", "--teacher=teacher", "--out_dir=student", "--attn_type=GK"]


def pair(attn_type, **fields):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
    teacher, student = GPT(GPTConfig(**shape)), GPT(GPTConfig(**shape, attn_type=attn_type))
    student.load_state_dict(teacher.state_dict())
    return student, teacher


def rows(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


def weights(folder):
    return ckpt.load(folder / "ckpt.pt")["model"]


@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_only_attention_is_matched_and_the_teacher_stays(attn_type):
    student, teacher = pair(attn_type)
    matching = Matching(student, teacher)
    _, loss = matching(torch.randint(11, (2, 16)))
    assert loss.item() == 0 if attn_type == "SM" else loss.item() > 0
    loss.backward()
    trained = {name for name, p in student.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in student.named_parameters() if ".attn." in n}
    assert all(p.grad is None for p in teacher.parameters())
    matching.release()
    assert all(p.requires_grad for p in student.parameters())


def test_the_loss_is_what_its_docstring_says():
    student, teacher = pair("GK")
    idx, read, said = torch.randint(11, (2, 16)), [], []
    for block in teacher.transformer.h:
        block.ln_1.register_forward_hook(lambda _, x, y: read.append(y))
        block.attn.register_forward_hook(lambda _, x, y: said.append(y))
    teacher(idx, idx)  # the plain forward pass, as any
    errors = [
        ((block.attn(x, torch.arange(16)) - y).square().sum() / y.square().sum()).item()
        for block, x, y in zip(student.transformer.h, read, said, strict=True)
    ]
    loss = Matching(student, teacher)(idx)[1].item()
    assert loss == pytest.approx(sum(errors) / 2, rel=1e-5)


def test_a_distilled_run_logs_both_kinds_of_loss(run_train, tmp_path):
    run_train("--out_dir=teacher", "--attn_type=SM")
    out = run_train(*DISTILL, "--max_iters=6", "--distill_iters=3", "--learning_rate=0.01")
    assert "GK" in out
    log = rows(tmp_path / "student")
    assert [bool(r["distill_loss"]) for r in log] == [False, True, True, True, False, False, False]
    assert [bool(r["train_loss"]) for r in log] == [False] * 4 + [True] * 3
    assert [r["step"] for r in log if r["val_loss"]] == ["0", "3", "6"]
    assert float(log[3]["distill_loss"]) < float(log[1]["distill_loss"])
    before, after = weights(tmp_path / "teacher"), weights(tmp_path / "student")
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_while_matching_all_but_attention_is_the_teachers(run_train, tmp_path):
    run_train("--out_dir=teacher", "--attn_type=SM")
    run_train(*DISTILL, "--max_iters=3", "--distill_iters=3", "--weight_decay=0.5")
    before, after = weights(tmp_path / "teacher"), weights(tmp_path / "student")
    assert all(torch.equal(before[n], after[n]) != (".attn." in n) for n in before)


@pytest.mark.parametrize("stop", [2, 3, 4])
@pytest.mark.parametrize("options", [["--dropout=0.1"], ["--lora_rank=2"]])
def test_a_resumed_conversion_ends_bit_for_bit(run_train, tmp_path, stop, options):
    run_train("--out_dir=teacher", "--attn_type=SM")
    args = [*DISTILL[:2], "--attn_type=GKpoly-4", "--distill_iters=3", "--lr_decay_iters=6"]
    args += options
    run_train(*args, "--out_dir=whole", "--max_iters=6")
    run_train(*args, "--out_dir=run", f"--max_iters={stop}")
    (tmp_path / "teacher").rename(tmp_path / "gone")  # the run's folder is all that it takes
    run_train("--out_dir=run", "--init_from=resume", "--max_iters=6", "--lr_decay_iters=6")
    whole, run = (torch.load(tmp_path / f / "ckpt.pt") for f in ("whole", "run"))
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, run["model"][name]), name
    for i, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(t, run["optimizer"]["state"][i][k]) for k, t in state.items())


def test_norms_and_activations_are_annealed_once_the_whole_model_is_trained(run_train, tmp_path):
    run_train("--out_dir=teacher", "--attn_type=SM")
    options = ["--mlp_act=quartic", "--distill_iters=2", "--max_iters=4"]
    for steps in (0, 2):
        run_train(*DISTILL, *options, f"--anneal_iters={steps}", f"--out_dir=student{steps}")
    plain, annealed = (rows(tmp_path / f"student{steps}") for steps in (0, 2))
    assert [r["distill_loss"] for r in plain] == [r["distill_loss"] for r in annealed]
    assert plain[3]["train_loss"] != annealed[3]["train_loss"]


def test_a_finished_conversion_can_be_made_longer(run_train, tmp_path):
    run_train("--out_dir=teacher", "--attn_type=SM")
    run_train(*DISTILL, "--max_iters=4")  # two steps of each kind
    with pytest.raises(Failed, match="pass --lr_decay_iters=4"):
        run_train("--out_dir=student", "--init_from=resume", "--max_iters=8")
    run_train("--out_dir=student", "--init_from=resume", "--max_iters=8", "--lr_decay_iters=4")
    assert sum(bool(r["distill_loss"]) for r in rows(tmp_path / "student")) == 2


def test_a_compiled_conversion_does_the_same(run_train, tmp_path):
    run_train("--out_dir=teacher", "--attn_type=SM")
    losses = []
    for compiled in ("True", "False"):
        run_train(*DISTILL, "--max_iters=4", f"--compile={compiled}")
        losses.append([float(r["distill_loss"] or r["train_loss"] or 0)
                       for r in rows(tmp_path / "student")])  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("options", [[], ["--optimizer=muon", "--lora_rank=2"]])
def test_two_ranks_end_where_one_does_up_to_rounding(run_train, tmp_path, data_dir, options):
    run_train("--out_dir=teacher", "--attn_type=SM")
    args = [*DISTILL[:2], "--attn_type=GK", "--distill_iters=2", "--max_iters=4", *options]
    args += ["--dataset=abc", f"--data_dir={data_dir}", "--batch_size=4", "--device=cpu"]
    args += ["--gradient_accumulation_steps=4", "--eval_iters=2", "--warmup_iters=1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    train, env = ROOT / "train.py", {**os.environ, "OMP_NUM_THREADS": "1"}
    for launch, out in ((torchrun, "two"), ([], "one")):
        done = subprocess_run(*launch, train, *args, f"--out_dir={out}", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
    two = weights(tmp_path / "two")
    for name, weight in weights(tmp_path / "one").items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6)


def test_mistakes_are_one_line(run_train, tmp_path):
    run_train("--out_dir=teacher", "--attn_type=SM")
    for args, told in (
        (["--init_from=distill"], "needs a teacher: pass --teacher=OUT"),
        (["--teacher=teacher"], "teacher is for --init_from=distill"),
        ([*DISTILL, "--out_dir=teacher"], "out_dir=teacher holds the teacher"),
        ([*DISTILL, "--lora_rank=1", "--lora_targets=mlp.c_fc"], "no attention layer is trained"),
        (["--init_from=distill", "--teacher=nowhere"], "teacher=nowhere has no checkpoint"),
    ):
        with pytest.raises(Failed, match=told) as failed:
            run_train(*args)
        assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1
    assert (tmp_path / "teacher" / "ckpt.pt").exists()
    run_train(*DISTILL, "--max_iters=2", "--distill_iters=1", "--lr_decay_iters=2")
    with pytest.raises(Failed, match="distill_iters=1, not 2"):
        run_train("--out_dir=student", "--init_from=resume", "--distill_iters=2", "--max_iters=2")
