"""compare.py: every run once, on the same data, and a report that says what the runs did."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from statistics import mean, median, stdev

import pytest
from conftest import ROOT, TINY, Failed, subprocess_run, write_dataset

COMMON = [*TINY, "--dataset=abc", "--max_iters=3", "--warmup_iters=1", "--eval_interval=1"]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def wait_for(path, process):
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder in which three attentions were compared; GKpoly-16 is GK but for rounding."""
    folder = tmp_path_factory.mktemp("compared")
    write_dataset(folder / "data" / "abc", "the cat sat on the mat, and the dog sat too.\n" * 40)
    lists = ["--attn_types=SM,GK,GKpoly-16", "--seeds=1,2", "--learning_rates=1e-2", "--jobs=2"]
    args = [*COMMON, f"--data_dir={folder / 'data'}", "--out_dir=out"]
    done = subprocess_run(ROOT / "compare.py", *args, *lists, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out", args, done.stdout


def test_each_run_of_the_lists_is_trained_and_told(compared):
    out, _, said = compared
    rows = read(out / "results.csv")
    assert [(row["attn_type"], row["seed"]) for row in rows] == [
        (attn_type, seed) for attn_type in ("SM", "GK", "GKpoly-16") for seed in "12"
    ]
    assert "6 runs in out, 0 of them done; 2 at a time" in said
    assert re.search(r"^6 of 6: .*, seed 2: val loss \d\.\d{4}; 0 s left$", said, re.MULTILINE)
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
    """GK and GKpoly-16 are the same function to 1e-4, so that they part only where data do."""
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
    cells = {line.split(" | ")[0][2:]: line.split(" | ") for line in text.splitlines()[7:12]}
    sm, gk = ([final[name, seed] for seed in "12"] for name in ("SM", "GK"))
    assert cells["GK"][1] == f"{mean(gk):.4f} ± {stdev(gk):.4f}"
    differences = [a - b for a, b in zip(gk, sm, strict=True)]
    assert cells["GK"][2] == f"{mean(differences):+.4f} ± {stdev(differences):.4f}"
    assert cells["SM"][2] == "-" and cells["SM"][-1] == "0 of 2 |"
    assert f"| SM | **{mean(sm):.4f} ± {stdev(sm):.4f}** |" in text
    assert "`python compare.py --n_layer=2" in text and "torch " in text
    assert "L2 H2 C16 T16, data set abc, 3 steps of 128 tokens, seeds 1, 2; cpu (" in text


def test_a_diverged_run_is_a_row_and_is_not_tried_again(run, compared, monkeypatch):
    out, args, _ = compared
    before = {path: path.stat().st_mtime_ns for path in out.glob("SM-lr0.01-*/*")}
    lists = ["--attn_types=SM", "--seeds=1", "--learning_rates=1e-2,1e30"]
    args = [*args, f"--out_dir={out}", *lists]
    said = run("compare", *args)
    assert "2 runs in" in said and "1 of them done" in said
    assert re.search(r"seed 1: diverged, step \d was not done: loss", said)
    good, bad = read(out / "results.csv")
    assert (good["diverged"], bad["diverged"], bad["final_val_loss"]) == ("False", "True", "")
    text = (out / "report.md").read_text()
    assert "| 1 of 2 |" in text and "| 1 diverged |" in text
    assert "2 of them done" in run("compare", *args)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("SM-lr0.01-*/*")}


def test_a_stopped_comparison_goes_on_where_it_was(run, tmp_path, data_dir):
    args = [*COMMON, f"--data_dir={data_dir}", "--seeds=1", "--learning_rates=1e-2"]
    args += ["--out_dir=out", "--max_iters=400", "--eval_interval=20"]
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
    assert re.search(r"stopped at step \d+; go on", output.read_text())
    run("compare", *args, "--attn_types=SM")
    assert json.loads((first / "config.json").read_text())["init_from"] == "resume"
    evaluated = [row["step"] for row in read(first / "log.csv") if row["val_loss"]]
    assert evaluated == [str(step) for step in range(0, 401, 20)]
    assert not first.with_name(f"{first.name}.1").exists()


def test_what_no_run_could_be_made_of_is_told_at_once(run, data_dir, tmp_path):
    wrong = {
        "--attn_types=SM,gk": "attn_type='gk' is not known",
        "--attn_types=SM,SM": "--attn_types=SM,SM has a value twice",
        "--seeds=1,x": "--seeds=1,x: seed must be int",
        "--learning_rates=": "learning_rate must be float",
        "--learning_rates=1e-3,-1": "learning_rate must not be negative",
        "--learning_rates=1e-3,1.0000001e-3": "differ by too little",
        "--seed=3": "pass --seeds=3",
        "--base=nothing": "no config file 'nothing'",
        "--base=eval_gpt2": "trains from scratch",
        "--dataset=nothing": "prepare.py",
        "--max_iters=0": "max_iters=0 trains nothing",
        "--jobs=0": "jobs must be at least 1",
    }
    for arg, said in wrong.items():
        with pytest.raises(Failed, match=re.escape(said)) as failed:
            run("compare", *COMMON, f"--data_dir={data_dir}", arg)
        assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1
    assert not (tmp_path / "out-compare").exists()


def test_a_mistake_that_only_train_finds_stops_the_comparison(run, data_dir):
    with pytest.raises(Failed, match="device=cuda:99 can't be used here") as failed:
        run("compare", *COMMON, f"--data_dir={data_dir}", "--device=cuda:99")
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1
