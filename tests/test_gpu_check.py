"""gpu_check.py: every stage works on a CPU, and one that fails costs no more than itself."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Failed, subprocess_run

import gpu_check

pytest.importorskip("triton", reason="triton is not installed (there is none for macOS, Windows)")


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Four stages that end in different ways, in processes that run this very file."""
    monkeypatch.setattr(gpu_check, "__file__", __file__)
    monkeypatch.setattr(gpu_check, "STAGES", STAGES)
    return tmp_path / "out.json"


def good(task):
    yield {"a": 1}, lambda: {"b": 2.0}
    yield {"a": 2}, lambda: {}["no such"]
    yield {"a": 3}, lambda: {"c": "x"}


def broken(task):
    yield {"a": 1}, lambda: {"b": 2.0}
    raise OSError("the disk\nis full")


def dead(task):
    yield {"a": 1}, lambda: {"b": 2.0}
    os._exit(3)


def slow(task):
    yield {"a": 1}, lambda: {"b": 2.0}
    time.sleep(600)


STAGES = {"good": (good, 60), "broken": (broken, 60), "dead": (dead, 60), "slow": (slow, 20)}


def test_what_fails_or_takes_too_long_is_recorded_and_the_rest_goes_on(
    run, monkeypatch, stages, tmp_path
):
    monkeypatch.setattr(gpu_check, "LONGEST", 20)
    with pytest.raises(Failed) as failed:
        run("gpu_check", "--rehearse", f"--out={stages}")
    assert failed.value.code == 1
    results, row = json.loads(stages.read_text()), {"a": 1, "b": 2.0}
    assert results["good"]["rows"] == [row, {"a": 2, "error": "'no such'"}, {"a": 3, "c": "x"}]
    assert all(results[name]["rows"] == [row] for name in ("broken", "dead", "slow"))
    status = [results[name]["status"] for name in STAGES]
    assert status == ["done", "failed", "failed", "stopped after 20 s"]
    assert results["broken"]["error"] == "is full"
    table = gpu_check.table("good", results["good"])
    assert table.splitlines()[2:] == ["1  2", "2            'no such'", "3     x"] or table


def test_results_of_other_stages_stay(stages):
    gpu_check.record(stages, "one", rows=[1], status="done")
    gpu_check.record(stages, "two", rows=[2])
    assert gpu_check.record(stages, "one", rows=[3]) == {"rows": [3], "status": "done"}
    assert json.loads(stages.read_text())["two"] == {"rows": [2]}


@pytest.mark.parametrize(
    "args, message",
    [
        (["--rehearse", "--stages=machine,step,sleep"], "sleep is no stage; there are machine,"),
        ([], "there is no CUDA device here; try  python gpu_check.py --rehearse"),
    ],
)
def test_what_can_not_be_checked_is_one_line(run, monkeypatch, args, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Failed, match=message) as failed:
        run("gpu_check", *args)
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1


def test_all_stages_take_25_minutes_at_most_and_each_8():
    assert sum(seconds for _, seconds in gpu_check.STAGES.values()) <= 25 * 60
    assert gpu_check.LONGEST == 8 * 60 and set(gpu_check.STAGES) == set(
        line.split()[0] for line in gpu_check.__doc__.split("Stages:")[1].split("Each")[0].split("\n    ")[1:]
    )


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage_through_the_interpreter(tmp_path):
    args = ["--rehearse", f"--out={tmp_path / 'out.json'}"]
    done = subprocess_run(ROOT / "gpu_check.py", *args, cwd=tmp_path)
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("the interpreter of Triton 3.6 does not work with NumPy 2.4 and later")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert list(results) == list(gpu_check.STAGES)
    assert all(stage["status"] == "done" and stage["rows"] for stage in results.values())
    assert "aten::" in (tmp_path / "out.profile.txt").read_text()
    assert [row["step"] for row in results["resume"]["rows"]][::2] == ["0", "20"]
    timed = {row["attention"] for row in results["attention"]["rows"] if row["backward ms"] > 0}
    assert timed == {"SM flash", "GK", "GKpoly-8", "PA_relu", "PA_gelu"}


if __name__ == "__main__":
    gpu_check.STAGES = STAGES
    gpu_check.main()
