"""train.py, end to end on a tiny model: what a run does, leaves behind, and refuses."""

import json
import os
import re
import signal
import sys
from dataclasses import replace

import pytest
import torch
from conftest import EVERY_ATTN_TYPE, ROOT, Failed, subprocess_run
from conftest import log_rows as rows

import train
from engine import checkpoint as ckpt
from engine import runtime
from engine.muon import MuonAdamW
from train import Config, learning_rate


def same_training_state(a, b):
    a, b = (ckpt.load(folder / "ckpt.pt") for folder in (a, b))
    tensors = [(a["model"][name], b["model"][name]) for name in a["model"]]
    for i, state in a["optimizer"]["state"].items():
        tensors += [(state[key], b["optimizer"]["state"][i][key]) for key in state]
    return a["iter_num"] == b["iter_num"] and all(torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_every_attention_trains_and_leaves_a_whole_run(run_train, tmp_path, attn_type):
    run_train("--out_dir=run", f"--attn_type={attn_type}", "--eval_interval=2")
    checkpoint = ckpt.load(tmp_path / "run" / "ckpt.pt")
    assert checkpoint["iter_num"] == 4
    assert checkpoint["tokenizer"]["tokenizer"] == "char"
    assert all(w.isfinite().all() for w in checkpoint["model"].values())
    log = rows(tmp_path / "run")
    assert [row["step"] for row in log] == ["0", "1", "2", "3", "4"]
    assert [row["step"] for row in log if row["val_loss"]] == ["0", "2", "4"]
    assert log[-1]["tokens"] == str(4 * 2 * 4 * 16)
    assert float(log[-1]["seconds"]) > 0 and log[-1]["mfu"] == ""
    assert float(log[-1]["peak_mib"]) > 50 or sys.platform != "linux"  # of Python and torch alone
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["attn_type"] == attn_type and config["found"]["device"] == "cpu"


def test_training_learns(run_train, tmp_path):
    run_train("--out_dir=run", "--max_iters=150", "--learning_rate=1e-2", "--n_layer=1")
    log = rows(tmp_path / "run")
    assert float(log[-1]["val_loss"]) < float(log[0]["val_loss"]) - 1


def test_exactly_max_iters_updates_are_done(run_train, tmp_path):
    for n in (0, 3):
        run_train(f"--out_dir=run{n}", f"--max_iters={n}")
        assert ckpt.load(tmp_path / f"run{n}" / "ckpt.pt")["iter_num"] == n
    optimizer = ckpt.load(tmp_path / "run3" / "ckpt.pt")["optimizer"]
    assert {int(state["step"]) for state in optimizer["state"].values()} == {3}


def test_the_logged_loss_is_the_mean_over_micro_steps(run_train, tmp_path):
    """At step 1 no weight has moved: the loss is that of one batch with all the sequences."""
    run_train("--out_dir=run", "--max_iters=1", "--learning_rate=0", "--weight_decay=0")
    from data.dataset import Dataset, Purpose

    path = tmp_path / "run" / "ckpt.pt"
    model = ckpt.build_model(ckpt.load(path), path)
    data = Dataset("abc", tmp_path / "data")
    batches = [data.batch("train", Purpose.TRAIN, 1337, 0, micro, 4, 16) for micro in (0, 1)]
    with torch.no_grad():
        mean = sum(model(x, y)[1].item() for x, y in batches) / 2
    assert float(rows(tmp_path / "run")[1]["train_loss"]) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    "extra",
    [[], ["--compile=True", "--n_layer=1"], ["--optimizer=muon", "--lr_schedule=wsd"]],
    ids=["eager", "compiled", "muon"],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run_train, tmp_path, extra):
    extra = [*extra, "--attn_type=GK", "--dropout=0.1", "--lr_decay_iters=4"]
    run_train("--out_dir=whole", "--eval_interval=1", *extra)
    run_train("--out_dir=parts", "--max_iters=2", *extra)
    out = run_train("--out_dir=parts", "--init_from=resume", *extra)
    assert "step 4" in out and "step 2:" not in out
    assert same_training_state(tmp_path / "whole", tmp_path / "parts")
    assert [row["step"] for row in rows(tmp_path / "parts")] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("init_from", ["scratch", "resume", "finetune"])
def test_eval_only_evaluates_and_writes_nothing(run, run_train, tmp_path, data_dir, init_from):
    run_train("--out_dir=run")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    out = run_train("--out_dir=run", f"--init_from={init_from}", "--eval_only=True")
    assert re.search(r"val loss \d\.\d+", out) and "step" not in out.splitlines()[-1]
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    if init_from == "resume":
        last = rows(tmp_path / "run")[-1]
        assert f"val loss {float(last['val_loss']):.4f}" in out
        again = run(
            "train", "config/EVAL.py", "--out_dir=run", f"--data_dir={data_dir}", "--eval_iters=2"
        )
        assert f"val loss {float(last['val_loss']):.4f}" in again


def test_evaluating_more_often_changes_nothing(run_train, tmp_path):
    run_train("--out_dir=often", "--eval_interval=1")
    run_train("--out_dir=seldom", "--eval_interval=100")
    assert same_training_state(tmp_path / "often", tmp_path / "seldom")


def test_a_model_has_one_loss_whatever_the_seed(data_dir):
    from data.dataset import Dataset
    from engine import runtime
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    data = Dataset("abc", data_dir)
    model = GPT(GPTConfig(16, data.vocab_size, 1, 1, 16))
    rt, args = runtime.Runtime("cpu", "float32", False), {"batch_size": 2, "eval_iters": 2}
    losses = [train.estimate_loss(model, data, rt, Config(seed=s, **args)) for s in (1, 2)]
    assert losses[0] == losses[1] and losses[0]["train"] != losses[0]["val"]


@pytest.mark.parametrize("options", [[], ["--optimizer=muon", "--lora_rank=2"]])
def test_two_ranks_train_like_one(run_train, tmp_path, data_dir, options):
    options = [*options, "--gradient_accumulation_steps=4", "--attn_type=GK", "--dropout=0.1"]
    run_train("--out_dir=one", *options)
    run_train("--out_dir=two", *options, "--max_iters=2", "--lr_decay_iters=4")
    args = ["--out_dir=two", "--init_from=resume", "--max_iters=4", "--lr_decay_iters=4"]
    args += [f"--data_dir={data_dir}", "--device=cpu"]  # two micro-steps for each rank
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess_run(*torchrun, ROOT / "train.py", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for key in ("train_loss", "val_loss", "eval_train_loss"):
            if one[key]:
                assert float(two[key]) == pytest.approx(float(one[key]), rel=2e-6)
    a, b = (ckpt.load(tmp_path / d / "ckpt.pt")["model"] for d in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_a_run_that_diverges_stops_and_keeps_the_checkpoint_before(run_train, tmp_path):
    args = ["--out_dir=run", "--attn_type=GKpoly-4", "--eval_interval=1", "--warmup_iters=0"]
    with pytest.raises(Failed, match="was not done: loss") as failed:
        run_train(*args, "--learning_rate=1e5", "--grad_clip=0", "--max_iters=40")
    assert re.search("it began in attn of layer .*GKpoly-4 needs -32", failed.value.stderr)
    assert "more squarings" in failed.value.stderr
    if (tmp_path / "run" / "ckpt.pt").exists():
        weights = ckpt.load(tmp_path / "run" / "ckpt.pt")["model"].values()
        assert all(w.isfinite().all() for w in weights)


def test_best_is_the_lowest_validation_loss_and_the_latest_is_kept_on_request(run_train, tmp_path):
    args = ["--learning_rate=3", "--warmup_iters=0", "--eval_interval=1", "--max_iters=5"]
    args += ["--decay_lr=False", "--n_layer=1"]
    out = run_train("--out_dir=run", *args)
    losses = {int(r["step"]): float(r["val_loss"]) for r in rows(tmp_path / "run")}
    best = min(losses, key=losses.get)
    if best > 0:
        assert ckpt.load(tmp_path / "run" / "best.pt")["iter_num"] == best
    else:
        assert not (tmp_path / "run" / "best.pt").exists()
    assert ("(at step 0, so there is no best.pt); the run is in run" in out) == (best == 0)
    assert ckpt.load(tmp_path / "run" / "ckpt.pt")["iter_num"] == 5


def test_evaluation_and_training_draw_different_batches(data_dir):
    from data.dataset import Dataset, Purpose

    data = Dataset("abc", data_dir)
    purposes = Purpose.TRAIN, Purpose.EVAL
    a, b = (data.batch("train", purpose, 1337, 0, 0, 4, 16)[0] for purpose in purposes)
    assert not torch.equal(a, b)


def test_clipping_bounds_the_step(run_train, tmp_path):
    """AdamW's first step does not feel the size of the gradient; its moments do."""
    for name, clip in (("free", 0.0), ("clipped", 1e-3)):
        run_train(f"--out_dir={name}", f"--grad_clip={clip}", "--max_iters=1")
    norms = []
    for name in ("free", "clipped"):
        state = ckpt.load(tmp_path / name / "ckpt.pt")["optimizer"]["state"].values()
        norms.append(sum((s["exp_avg"] / 0.1).square().sum() for s in state).sqrt().item())
    assert norms[1] == pytest.approx(1e-3, rel=1e-2) and norms[0] > 0.1


def test_a_damaged_checkpoint_is_passed_over_set_aside_and_never_replaces_a_good_one(
    run_train, tmp_path
):
    run_train("--out_dir=whole", "--eval_interval=1")
    args = ["--out_dir=run", "--eval_interval=1", "--lr_decay_iters=4"]
    run_train(*args, "--max_iters=3")
    path = tmp_path / "run" / "ckpt.pt"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    out = run_train(*args, "--init_from=resume")
    assert out.count("SHA-256") == 1 and "going on from run/previous.pt" in out
    assert (tmp_path / "run" / "ckpt.pt.damaged").read_bytes() == damaged
    assert same_training_state(tmp_path / "whole", tmp_path / "run")
    ckpt.load(tmp_path / "run" / "previous.pt")


@pytest.mark.parametrize("on_device", [False, True])
def test_skipping_passes_over_so_many_bad_steps_and_no_more(
    run_train, tmp_path, monkeypatch, on_device
):
    """Steps 2 and 3 have an infinite gradient; the weights before and after them are the same."""
    import model

    if on_device:  # AdamW's fused kernel leaves steps out on a CPU too
        monkeypatch.setattr(train, "decides_on_device", lambda *a: True)
    calls = []

    def f(x):
        if x.requires_grad:
            calls.append(x)
        return x * (float("inf") if len(calls) in (3, 4, 5, 6) and x.requires_grad else 1.0)

    entry = model.Pointwise("dot", f, by_length=True)
    monkeypatch.setitem(model.POINTWISE, "PA_moody", entry)
    args = ["--attn_type=PA_moody", "--n_layer=1", "--attn_impl=reference", "--eval_interval=1"]
    out = run_train("--out_dir=run", *args, "--skip_nonfinite=2")
    assert "step 2: loss nan" in out and "skipped, 2 of 2" in out
    last = ckpt.load(tmp_path / "run" / "ckpt.pt")
    assert last["iter_num"] == 4
    assert {int(state["step"]) for state in last["optimizer"]["state"].values()} == {2}
    calls.clear()
    with pytest.raises(Failed, match="step 3 was not done"):
        run_train("--out_dir=run2", *args, "--skip_nonfinite=1")


def test_an_optimizer_that_decides_itself_gives_the_same_bits(run_train, tmp_path, monkeypatch):
    run_train("--out_dir=host")
    monkeypatch.setattr(train, "decides_on_device", lambda *a: True)
    run_train("--out_dir=device")
    assert same_training_state(tmp_path / "host", tmp_path / "device")


def test_only_adamw_on_a_gpu_decides_itself():
    parameters = [torch.zeros(2, 2, requires_grad=True)]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    gpu = runtime.Runtime("cuda:0", "bfloat16", True)
    assert train.decides_on_device(optimizer, gpu)
    others = [{"device": "cpu"}, {"dtype": "float16"}, {"shard": True}]
    assert not any(train.decides_on_device(optimizer, replace(gpu, **o)) for o in others)
    for other in (MuonAdamW(parameters, {*parameters}, 0.1, 0.1), torch.optim.AdamW(parameters)):
        assert not train.decides_on_device(other, gpu)


def test_a_run_whose_first_step_was_passed_over_can_be_resumed(run_train, tmp_path, monkeypatch):
    import model

    factor = [1.0]
    entry = model.Pointwise("dot", lambda x: x * factor[0], by_length=True)
    monkeypatch.setitem(model.POINTWISE, "PA_moody", entry)
    args = ["--out_dir=run", "--decay_lr=False", "--skip_nonfinite=1", "--eval_iters=1"]
    train_step = train.train_step

    def only_the_first_is_bad(*a):
        factor[0] = float("inf") if a[6] == 0 else 1.0
        result = train_step(*a)
        factor[0] = 1.0
        return result

    monkeypatch.setattr(train, "train_step", only_the_first_is_bad)
    run_train(*args, "--attn_type=PA_moody", "--attn_impl=reference", "--max_iters=1")
    assert ckpt.load(tmp_path / "run" / "ckpt.pt")["optimizer"]["state"] == {}
    run_train(*args, "--init_from=resume", "--max_iters=2")
    assert ckpt.load(tmp_path / "run" / "ckpt.pt")["iter_num"] == 2


@pytest.mark.parametrize("place", ["train_step", "estimate_loss"])
def test_an_interrupted_run_saves_and_ends_like_the_whole_one(
    run_train, tmp_path, monkeypatch, place
):
    args = ["--eval_interval=2", "--attn_type=GK", "--dropout=0.1"]
    run_train("--out_dir=whole", *args)
    calls, original = [], getattr(train, place)

    def interrupted(*a, **k):
        calls.append(place)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*a, **k)

    monkeypatch.setattr(train, place, interrupted)
    with pytest.raises(Failed) as failed:
        run_train("--out_dir=run", *args)
    assert failed.value.code == 143 and failed.value.stderr == ""
    saved = ckpt.load(tmp_path / "run" / "ckpt.pt")
    # It is noticed between steps: an evaluation ends, and its step is saved as ever
    steps = {"train_step": (2, 0), "estimate_loss": (3, 2)}
    assert (saved["iter_num"], saved["evaluated"]) == steps[place]
    run_train("--out_dir=run", *args, "--init_from=resume")
    assert same_training_state(tmp_path / "whole", tmp_path / "run")
    losses = [
        {r["step"]: r["val_loss"] for r in rows(tmp_path / d) if r["val_loss"]}
        for d in ("whole", "run")
    ]
    assert losses[0] == losses[1] and set(losses[0]) == {"0", "2", "4"}


def test_the_gradient_norm_is_logged_before_clipping(run_train, tmp_path):
    run_train("--out_dir=run", "--grad_clip=1e-3", "--max_iters=1")
    assert float(rows(tmp_path / "run")[1]["grad_norm"]) > 0.01


def test_half_precision_trains_and_resumes_with_its_loss_scale(run_train, tmp_path):
    args = ["--out_dir=run", "--dtype=float16", "--attn_type=GK", "--lr_decay_iters=4"]
    run_train(*args, "--max_iters=2")
    assert ckpt.load(tmp_path / "run" / "ckpt.pt")["scaler"]["scale"] > 1
    run_train(*args, "--init_from=resume", "--max_iters=3")
    run_train("--out_dir=bf16", "--dtype=bfloat16", "--attn_type=GK", "--max_iters=1")


def test_with_float16_too_bad_steps_are_passed_over(run_train, tmp_path):
    args = ["--out_dir=run", "--dtype=float16", "--learning_rate=1e30", "--warmup_iters=0"]
    with pytest.raises(Failed, match="was not done") as failed:
        run_train(*args, "--skip_nonfinite=1", "--max_iters=9")
    assert failed.value.code == 2


@pytest.mark.parametrize(
    "asked, dtype, precision",
    [
        (None, "float16", "high"),
        ("bfloat16", "bfloat16", "high"),
        ("float32", "float32", "highest"),
    ],
)
def test_cuda_gets_an_index_and_tf32_unless_float32_is_asked_for(
    monkeypatch, asked, dtype, precision
):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda n, device: seen.append(device))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    rt = runtime.start(None, asked, None)
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    assert seen == ["cuda:0", "cuda:0"] and chosen == precision
    assert (rt.device, rt.dtype, rt.compile) == ("cuda:0", dtype, True)
    assert rt.precision.startswith(dtype) and ("TF32" in rt.precision) == (precision == "high")


def test_the_learning_rate_warms_up_decays_and_stays():
    config = Config(learning_rate=1.0, warmup_iters=3, max_iters=13, min_lr=0.2)
    rates = [learning_rate(step, config) for step in range(16)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.6) and rates[13:] == [0.2] * 3
    assert sorted(rates[3:], reverse=True) == rates[3:]
    assert learning_rate(12, Config(learning_rate=1.0, decay_lr=False)) == 1.0
    assert learning_rate(600000, Config(learning_rate=1.0)) == pytest.approx(0.1)


def test_wsd_is_constant_until_its_last_fifth():
    config = Config(learning_rate=1.0, warmup_iters=3, max_iters=20, min_lr=0.2, lr_schedule="wsd")
    rates = [learning_rate(step, config) for step in range(22)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:17] == [1.0] * 13
    assert rates[17:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2])
    config.warmup_iters = 18  # it decays when the warm-up is over
    assert [learning_rate(s, config) for s in (17, 18, 19, 20)] == pytest.approx(
        [18 / 19, 1.0, 0.6, 0.2]
    )
