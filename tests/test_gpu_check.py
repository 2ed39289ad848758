"""gpu_check.py: every stage works on a CPU, and one that fails costs no more than itself."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT, Failed

import gpu_check

pytest.importorskip("triton", reason="triton is not installed (there is none for macOS, Windows)")


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
    (task.out.parent / "child").write_text(str(os.getpid()))
    yield {"a": 1}, lambda: time.sleep(600)


STAGES = {f.__name__: (f, 100) for f in (good, broken, dead, slow)}


@pytest.fixture
def out(monkeypatch, tmp_path):
    """The file of results of the stages above, whose processes run this very file."""
    monkeypatch.setattr(gpu_check, "__file__", __file__)
    monkeypatch.setattr(gpu_check, "STAGES", STAGES)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "out.json"


def test_what_fails_is_recorded_and_the_rest_goes_on(run, out):
    with pytest.raises(Failed) as failed:
        run("gpu_check", "--rehearse", "--stages=good,broken,dead", f"--out={out}")
    assert failed.value.code == 1
    results, row = json.loads(out.read_text()), {"a": 1, "b": 2.0}
    assert results["good"]["rows"] == [row, {"a": 2, "error": "'no such'"}, {"a": 3, "c": "x"}]
    assert results["broken"]["rows"] == results["dead"]["rows"] == [row]
    assert [stage["status"] for stage in results.values()] == ["done", "failed", "failed"]
    assert results["broken"]["error"] == "is full"
    table = gpu_check.table("good", results["good"]).splitlines()
    assert [line.split() for line in table[2:]] == [
        ["a", "b", "error", "c"], ["1", "2"], ["2", "'no", "such'"], ["3", "x"]
    ]  # fmt: skip


def test_a_stage_that_takes_too_long_is_ended(out):
    config = gpu_check.Config(out=str(out), rehearse=True)
    results = gpu_check.supervise("slow", config, 12)
    assert results["status"] == "stopped after 12 s" and results["rows"] == []
    if (child := out.parent / "child").exists():  # else it had not even begun
        with pytest.raises(ProcessLookupError):
            os.kill(int(child.read_text()), 0)


def test_results_of_other_stages_stay(out):
    gpu_check.record(out, "one", rows=[1], status="done")
    gpu_check.record(out, "two", rows=[2])
    assert gpu_check.record(out, "one", rows=[3]) == {"rows": [3], "status": "done"}
    assert json.loads(out.read_text())["two"] == {"rows": [2]}


@pytest.mark.parametrize(
    "args, message",
    [
        (["--rehearse", "--stages=machine,step,sleep"], "sleep is no stage; there are machine,"),
        ([], "there is no CUDA device here; try"),
        (["--rehearse", "--stage=machine,step"], "machine,step is no stage; there are machine,"),
        (["--rehearse", f"--out={ROOT / 'README.md'}"], "README.md holds no results; move it"),
    ],
)
def test_what_can_not_be_checked_is_one_line(run, monkeypatch, args, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Failed, match=message) as failed:
        run("gpu_check", *args)
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1


def test_all_stages_take_25_minutes_at_most_and_each_8():
    assert sum(seconds for _, seconds in gpu_check.STAGES.values()) <= 25 * 60
    assert max(seconds for _, seconds in gpu_check.STAGES.values()) <= gpu_check.LONGEST == 8 * 60
    assert re.findall(r"^    ([a-z]+)  +", gpu_check.__doc__, re.M) == list(gpu_check.STAGES)


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage_through_the_interpreter(tmp_path):
    args = ["--rehearse", f"--out={tmp_path / 'out.json'}"]
    command = [sys.executable, ROOT / "gpu_check.py", *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("the interpreter of Triton 3.6 does not work with NumPy 2.4 and later")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert list(results) == list(gpu_check.STAGES)
    assert all(stage["status"] == "done" and stage["rows"] for stage in results.values())
    assert "aten::" in (tmp_path / "out.profile.txt").read_text()
    assert [row["step"] for row in results["resume"]["rows"]][::2] == ["0", "20"]
    timed = {row["attention"] for row in results["attention"]["rows"] if row["backward ms"] > 0}
    plain = {"SM flash", "GK", "GKpoly-8", "PA_relu", "PA_gelu"}
    assert timed == plain | {"GK decay, 0 terms", "GK decay, 8 terms"}


if __name__ == "__main__":
    gpu_check.STAGES = STAGES
    gpu_check.main()
