"""compare.py: every run once, on the same data, and a report that says what the runs did."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from statistics import mean, median, stdev
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, Failed, write_dataset

import compare
import train
from compare import CompareConfig, Trial
from configurator import UserError
from engine import comparison
from engine.runlog import RunLog
from train import Config

COMMON = [
    *TINY,
    "--n_layer=1",
    "--dataset=abc",
    "--max_iters=3",
    "--warmup_iters=1",
    "--eval_interval=1",
    "--attn_decay=none",
]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def wait_for(path, process):
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)


def train_in_this_process(trial, *_):
    """Takes the place of start_training: no second Python has to start."""
    with pytest.MonkeyPatch.context() as patch, open(trial.output, "w") as output:
        patch.setattr(sys, "argv", trial.command()[1:])
        with redirect_stdout(output), redirect_stderr(output):
            train.main()
    return SimpleNamespace(returncode=0, poll=lambda: 0)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder in which two attentions were compared; GKpoly-16 is GK to 1e-4."""
    folder = tmp_path_factory.mktemp("compared")
    write_dataset(folder / "data" / "abc", "the cat sat on the mat, and the dog sat too.\n" * 40)
    lists = ["--attn_types=GK,GKpoly-16", "--seeds=1,2", "--learning_rates=1e-2", "--jobs=2"]
    args = [*COMMON, f"--data_dir={folder / 'data'}", "--out_dir=out"]
    output = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["compare.py", *args, *lists])
        patch.setattr(compare, "start_training", train_in_this_process)
        compare.main()
    return folder / "out", args, output.getvalue()


def test_each_run_of_the_lists_is_trained_and_reported(compared):
    out, _, said = compared
    rows = read(out / "results.csv")
    assert [(row["attn_type"], row["seed"]) for row in rows] == [
        (attn_type, seed) for attn_type in ("GK", "GKpoly-16") for seed in "12"
    ]
    assert "4 runs in out, 0 of them done; 2 at a time" in said
    assert re.search(r"^4 of 4: .*, seed 2: val loss \d\.\d{4}; 0 s left$", said, re.MULTILINE)
    for row in rows:
        log = read(out / row["run"] / "log.csv")
        losses = [float(line["val_loss"]) for line in log]
        assert float(row["best_val_loss"]) == min(losses)
        assert float(row["final_val_loss"]) == losses[-1] and row["diverged"] == "False"
        assert (row["steps"], row["tokens"]) == ("3", str(3 * 2 * 4 * 16))
        assert (row["seconds"], row["peak_mib"]) == (log[-1]["seconds"], log[-1]["peak_mib"])
        ms = median(float(line["step_ms"]) for line in log if line["step_ms"])
        assert float(row["ms_per_step"]) == pytest.approx(ms, abs=1e-3)
        assert float(row["tokens_per_s"]) == pytest.approx(2 * 4 * 16 / ms * 1000, rel=1e-3)
    for name in ("tokens", "seconds", "rates"):
        assert (out / f"compare-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"compare-{name}.svg").read_text()


def test_runs_of_one_seed_see_the_same_batches(compared):
    """GK and GKpoly-16 are almost the same function: only other data would part their losses."""
    out, *_ = compared

    def losses(attn_type, seed):
        log = read(out / f"{attn_type}-lr0.01-seed{seed}" / "log.csv")
        return [float(row[key]) for row in log for key in ("train_loss", "val_loss") if row[key]]

    for seed in "12":
        assert losses("GK", seed) == pytest.approx(losses("GKpoly-16", seed), abs=1e-3)
    assert min(abs(a - b) for a, b in zip(losses("GK", 1), losses("GK", 2), strict=True)) > 2e-3


def test_the_report_is_what_the_logs_say(compared):
    out, *_ = compared
    text = (out / "report.md").read_text()
    final = {
        (attn_type, seed): float(read(folder / "log.csv")[-1]["val_loss"])
        for folder in out.glob("*-seed?")
        for attn_type, seed in [(folder.name.split("-lr")[0], folder.name[-1])]
    }
    cells = {line.split(" | ")[0][2:]: line.split(" | ") for line in text.splitlines()[8:12]}
    gk, poly = ([final[name, seed] for seed in "12"] for name in ("GK", "GKpoly-16"))
    assert cells["GKpoly-16"][1] == f"{mean(poly):.4f} ± {stdev(poly):.4f}"
    differences = [a - b for a, b in zip(poly, gk, strict=True)]
    assert cells["attention"][2] == "minus GK's"
    assert cells["GKpoly-16"][2] == f"{mean(differences):+.4f} ± {stdev(differences):.4f}"
    assert cells["GK"][2] == "-" and cells["GK"][-1] == "0 of 2 |"
    assert f"| GK | **{mean(gk):.4f} ± {stdev(gk):.4f}** |" in text
    assert "`python compare.py --n_layer=2" in text and "torch " in text
    assert "L1 H2 C16 T16, data set abc, 3 steps of 128 tokens, seeds 1, 2; cpu (" in text


def test_a_diverged_run_is_a_row_and_is_not_tried_again(run, compared, monkeypatch):
    out, args, _ = compared
    before = {path: path.stat().st_mtime_ns for path in out.glob("GK-lr0.01-*/*")}
    lists = ["--attn_types=GK", "--seeds=1", "--learning_rates=1e-2,1e30"]
    args = [*args, f"--out_dir={out}", *lists]
    said = run("compare", *args)
    assert "2 runs in" in said and "1 of them done" in said
    assert re.search(r"seed 1: diverged, step \d was not done: loss", said)
    good, bad = read(out / "results.csv")
    assert (good["diverged"], bad["diverged"], bad["final_val_loss"]) == ("False", "True", "")
    text = (out / "report.md").read_text()
    assert "| 1 of 2 |" in text and "| 1 diverged |" in text
    assert "2 of them done" in run("compare", *args)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("GK-lr0.01-*/*")}


@pytest.mark.slow
def test_a_stopped_comparison_goes_on_where_it_was(run, tmp_path, data_dir):
    args = [*COMMON, f"--data_dir={data_dir}", "--seeds=1", "--learning_rates=1e-2"]
    args += ["--out_dir=out", "--max_iters=200", "--eval_interval=20"]
    command = [sys.executable, ROOT / "compare.py", *args, "--attn_types=SM,GK"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    first, second = (tmp_path / "out" / f"{t}-lr0.01-seed1" for t in ("SM", "GK"))
    output = first.with_name(f"{first.name}.txt")
    wait_for(output, process)
    with pytest.raises(Failed, match="out is in use by another compare.py"):
        run("compare", *args)
    wait_for(first / "ckpt.pt", process)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in process.communicate(timeout=60)[0]
    assert process.returncode == 143 and not second.exists()
    (stopped,) = re.findall(r"stopped at step (\d+); go on", output.read_text())
    assert read(first / "log.csv")[-1]["step"] == stopped  # so that no seconds are lost
    run("compare", *args, "--attn_types=SM")
    assert json.loads((first / "config.json").read_text())["init_from"] == "resume"
    evaluated = [row["step"] for row in read(first / "log.csv") if row["val_loss"]]
    assert evaluated == [str(step) for step in range(0, 201, 20)]
    assert not first.with_name(f"{first.name}.1").exists()


def test_a_run_is_done_again_if_its_result_could_change(tmp_path):
    config = Config(out_dir=str(tmp_path / "run"), attn_type="SM")
    trial = Trial({}, config, {"train": "a", "val": "b"})
    assert not trial.is_same()
    trial.folder.mkdir()
    saved = {"out_dir": "x", "data_dir": "y", "plot": False, "wandb_log": True, "attn_type": "SM"}

    def holds(data=trial.data, **more):
        text = json.dumps({**saved, **more, "found": {"data": data}})
        (trial.folder / "config.json").write_text(text)
        return trial.is_same()

    assert holds()
    assert not holds(data={"train": "a", "val": "c"}) and not holds(data=None)
    assert not holds(weight_decay=0.2)
    (trial.folder / "config.json").write_text("[1")
    assert not trial.is_same()


def test_a_run_is_not_done_again_for_a_key_that_means_nothing_to_its_attention(run, data_dir):
    args = [*COMMON, f"--data_dir={data_dir}", "--seeds=1", "--learning_rates=1e-2"]
    args += ["--attn_types=SM,PA_relu", "--pa_length_power=0.5", "--attn_normalize=4"]
    args += ["--vary=attn_decay=none,fixed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "start_training", train_in_this_process)
        assert "0 of them done" in run("compare", *args)
    assert "4 of them done" in run("compare", *args)
    with pytest.raises(Failed, match="attn_normalize=4 does nothing without --attn_decay"):
        run("compare", *args, "--vary=attn_decay=none")


def test_what_a_process_that_ended_means(tmp_path):
    trial = Trial({}, Config(out_dir=str(tmp_path / "run"), max_iters=2), {})
    trial.folder.mkdir()
    trial.output.write_text("error: out of memory (no more); halve --batch_size\nwarning: x\n")
    (trial.folder / "config.json").write_text(json.dumps({"max_iters": 2, "found": {"data": {}}}))
    with pytest.raises(UserError, match="out of memory"):
        compare.conclude(trial, 2)  # it did not begin
    columns = ",".join(RunLog.COLUMNS)
    row = "{},,,,{},,,,,,,,1.0\n".format
    log = trial.folder / "log.csv"
    log.write_text(f"{columns}\n{row(0, 4.0)}")
    outcome, is_result = compare.conclude(trial, 2)
    assert "exit code 2: out of memory (no more)" in outcome and not is_result
    log.write_text(f"{columns}\n{row(0, 4.0)}{row(2, 1.5)}")
    assert compare.conclude(trial, 0) == ("val loss 1.5000", True)
    trial.output.write_text("error: step 1 was not done: loss nan; start again\n")
    assert compare.conclude(trial, 2) == ("diverged, step 1 was not done: loss nan", True)


@pytest.mark.parametrize(
    "gpus, device, given, jobs, places",
    [
        (2, None, None, None, {("0", None), ("1", None)}),
        (2, None, "3,5", 2, {("3", None), ("5", None)}),
        (2, None, None, 1, {("0", None)}),
        (2, "cpu", None, None, {(None, None)}),  # of the base's config
        (0, None, None, None, {(None, None)}),
        (0, None, None, 2, {(None, "3")}),
    ],
)
def test_runs_are_shared_among_gpus_and_threads(
    gpus, device, given, jobs, places, monkeypatch, tmp_path
):
    seen = []

    def start(command, stdout, stderr, env, pass_fds):
        seen.append((env.get("CUDA_VISIBLE_DEVICES"), env.get("OMP_NUM_THREADS")))
        return SimpleNamespace(returncode=0, poll=lambda: 0)

    for key, value in (("CUDA_VISIBLE_DEVICES", given), ("OMP_NUM_THREADS", None)):
        monkeypatch.delenv(key, raising=False)
        if value:
            monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(compare.subprocess, "Popen", start)
    monkeypatch.setattr(compare, "conclude", lambda trial, code: ("done", True))
    monkeypatch.setattr(compare, "write_results", lambda trials, config: None)
    trials = [Trial({}, Config(out_dir=str(tmp_path / str(i)), device=device)) for i in range(4)]
    with open(tmp_path / "lock", "w") as lock:
        assert compare.train_all(trials, CompareConfig(jobs=jobs), lock) == (0, [])
    assert len(seen) == 4 and set(seen) == places


def test_a_min_lr_of_the_base_is_for_its_own_learning_rate():
    config = CompareConfig(learning_rates="1e-4,1e-2", seeds="1", attn_types="SM")
    trials = compare.make_trials({}, config)
    assert [trial.config.min_lr for trial in trials] == [None, None]
    assert compare.make_trials({"min_lr": 1e-5}, config)[0].config.min_lr == 1e-5
    with pytest.raises(UserError, match="min_lr=0.001 is above learning_rate=0.0001"):
        compare.make_trials({"min_lr": 1e-3}, config)


def test_values_that_no_run_could_use_are_refused_at_once(run, data_dir, tmp_path):
    wrong = {
        "--attn_types=SM,gk": "attn_type='gk' is not known",
        "--attn_types=SM,SM": "--attn_types=SM,SM has a value twice",
        "--seeds=1,x": "--seeds=1,x: seed must be int",
        "--learning_rates=": "learning_rate must be float",
        "--learning_rates=1e-3,-1": "learning_rate must not be negative",
        "--learning_rates=1e-3,0": "a rate of 0 learns nothing",
        "--learning_rates=1e-3,1.0000001e-3": "differ by too little",
        "--seed=3": "pass --seeds=3",
        "--base=nothing": "no config file 'nothing'",
        "--base=eval_gpt2": "trains from scratch",
        "--dataset=nothing": "prepare.py",
        "--max_iters=0": "max_iters=0 trains nothing",
        "--jobs=0": "jobs must be at least 1",
        "--vary=n_layers=1,2": "--vary=n_layers=1,2 does not consist of KEY=VALUE,VALUE",
        "--vary=out_dir=a,b": "does not consist of KEY=VALUE,VALUE with other keys of train.py",
        "--vary=seed=1,2": "does not consist of",
        "--vary=n_layer=1,x": "n_layer",
        "--vary=n_layer=1,1": "has a value twice",
    }
    for arg, message in wrong.items():
        with pytest.raises(Failed, match=re.escape(message)) as failed:
            run("compare", *COMMON, f"--data_dir={data_dir}", arg)
        assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1
    assert not (tmp_path / "out-compare").exists()


def test_a_base_must_name_its_data_set(tmp_path):
    """As a config file of train.py must: nanoGPT's count on another default."""
    (tmp_path / "old.py").write_text("n_layer = 1\n")
    config = CompareConfig(base=str(tmp_path / "old.py"), learning_rates="1e-3")
    with pytest.raises(UserError, match="old.py names no data set; pass --dataset=NAME"):
        compare.make_trials({}, config)
    assert compare.make_trials({"dataset": "abc"}, config)[0].config.dataset == "abc"
    config.vary = "dataset=abc,pydocs"
    assert {trial.config.dataset for trial in compare.make_trials({}, config)} == {"abc", "pydocs"}


def test_a_mistake_that_only_train_finds_stops_the_comparison(run, data_dir):
    with pytest.raises(Failed, match="device=cuda:99 can't be used here") as failed:
        run("compare", *COMMON, f"--data_dir={data_dir}", "--device=cuda:99")
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1


def test_other_keys_vary_too_and_softmax_is_compared_where_they_are_equal():
    config = CompareConfig(
        base="train_gk",
        seeds="1",
        learning_rates="1e-3",
        vary="n_layer=1,2 attn_decay=none,learned",
    )
    trials = compare.make_trials({"n_layer": 6, "dataset": "abc"}, config)
    assert len(trials) == len({trial.folder for trial in trials}) == 8
    chosen = {(t.config.attn_type, t.config.n_layer, t.config.attn_decay) for t in trials}
    assert ("GK", 2, "learned") in chosen and len(chosen) == 8
    assert "--n_layer=2" in trials[-1].command()
    rows = [
        {"attn_type": t.config.attn_type, **{k: str(v) for k, v in t.varied.items()}}
        | {"learning_rate": 1e-3, "seed": 1.0, "final_val_loss": 2.0 + 0.1 * i, "diverged": False}
        | {"variant": t.variant, "ms_per_step": 1.0, "tokens_per_s": 1.0, "peak_mib": None}
        for i, t in enumerate(trials)
    ]
    table = compare.best_rate_table(rows)
    cells = {line.split(" | ")[0][2:]: line.split(" | ")[2] for line in table.splitlines()[2:]}
    assert cells["SM n_layer=2 attn_decay=none"] == "-"
    assert cells["GK n_layer=2 attn_decay=none"] == "+0.4000"  # four trials after softmax's
    assert list(comparison.numeric_axes(rows)) == ["compare-n_layer"]
