"""bench.py: the step of train.py is timed beside others, and tables are printed, written, drawn."""

import json
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, Failed, subprocess_run

import bench
from configurator import UserError
from engine.muon import MuonAdamW

SMALL = [*TINY, "--n_layer=1", "--vocab_size=11", "--steps=1", "--warmup=0"]


def test_the_training_step_is_timed_on_synthetic_and_on_real_data(run, data_dir):
    synthetic = run("bench", *SMALL, "--attn_type=GK")
    assert "training step, L1 H2 C16 V11" in synthetic
    assert re.search(r"GK +blockwise +16 +4 +[\d.,]+ +1 +[\d,.]+ +n/a", synthetic)
    real = run("bench", *SMALL, "--real_data=True", "--dataset=abc", f"--data_dir={data_dir}")
    assert "training step, L1 H2 C16 V" in real and "V11" not in real


def test_the_tables_are_written_as_json_and_drawn(run, tmp_path):
    args = ["--min_T=16", "--max_T=64", "--max_new_tokens=4", "--num_samples=2"]
    out = run("bench", *SMALL, *args, "--attn_types=SM,GK", "--table=all", "--out=bench.json")
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [(r["attn_type"], r["impl"], r["T"]) for r in results["attention"]] == [
        (attn_type, impl, T)
        for T in (16, 64)
        for attn_type, impl in (("SM", "SDPA"), ("GK", "blockwise"), ("GK", "reference"))
    ]
    assert [r["attn_type"] for r in results["types"]] == ["SM", "GK"]
    assert [r["T"] for r in results["lengths"]] == [16, 16, 64, 64]
    assert [r["samples"] for r in results["sampling"]] == [1, 2, 1, 2]
    rows = results["types"] + results["lengths"] + results["sampling"]
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert "attention, L1" in out and "times_SDPA" in out
    assert "left out: FlexAttention has a backward pass on CUDA only" in out
    assert (results["config"]["batch_size"], results["config"]["max_T"]) == (4, 64)
    pytest.importorskip("matplotlib")
    run("plot", "bench", "bench.json")
    for name in ("attention", "types", "lengths"):
        assert (tmp_path / f"bench-{name}.png").exists()


def test_rows_are_written_length_by_length(run, monkeypatch, tmp_path):
    """Without a GPU, default sizes are those that a CPU can do."""

    def rows(config, attn_types, T, rt):
        if T > 1024:
            raise UserError(f"B {config.batch_size}, T {T} of {config.max_T}")
        return [{"T": T}]

    monkeypatch.setattr(bench, "attention_rows", rows)
    with pytest.raises(Failed, match="B 1, T 4096 of 4096"):
        run("bench", "--table=attention", "--out=bench.json", "--device=cpu")
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [row["T"] for row in results["attention"]] == [256, 1024]


@pytest.mark.parametrize(
    "arg, message",
    [
        ("--table=all_", "table=all_ is none of step, attention, types, lengths"),
        ("--attn_types=SM,gk", "attn_type='gk'"),
        ("--nanogpt=.", "no clone of nanoGPT"),
        ("--max_T=8", "min_T=16 is above max_T=8; pass a lower --min_T"),
        ("--out=no/such.json", "is in a folder that is not there"),
    ],
)
def test_what_can_not_be_measured_is_one_line(run, arg, message):
    with pytest.raises(Failed, match=message) as failed:
        run("bench", *SMALL, "--table=lengths", "--min_T=16", arg)
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1


def test_options_of_attention_and_optimizer_are_those_that_are_measured(run, monkeypatch):
    built, stepped = [], []
    attention, train_step = bench.attention, bench.train_step
    spy = lambda *args, **options: built.append((args, options)) or attention(*args, **options)
    monkeypatch.setattr(bench, "attention", spy)
    spy_step = lambda model, optimizer, *rest: (
        stepped.append(type(optimizer)) or train_step(model, optimizer, *rest)
    )
    monkeypatch.setattr(bench, "train_step", spy_step)
    table = ["--table=attention", "--attn_types=GK", "--max_T=256"]
    run("bench", *SMALL, *table, "--attn_decay=fixed", "--attn_normalize=4")
    options = {"attn_decay": "fixed", "attn_normalize": 4}
    assert (("GK", 256, 1.0, "blockwise"), options) in built
    run("bench", *SMALL, "--optimizer=muon")
    assert set(stepped) == {MuonAdamW}


def test_one_micro_step_is_profiled_and_nothing_else_printed(tmp_path):
    args = [*SMALL, "--gradient_accumulation_steps=40", "--profile", "--out_dir=prof"]
    done = subprocess_run(ROOT / "bench.py", *args, cwd=tmp_path)
    assert re.search(r"aten::embedding .* 2 *\n", done.stdout) and done.stderr == ""
    assert (tmp_path / "prof" / "trace.json").stat().st_size > 1000


class FakeGPU:
    """Its queue and the host's clock, in seconds: a call costs `host` there and `work` here."""

    def __init__(self, host, work):
        self.host, self.work, self.now, self.free_at = host, work, 0.0, 0.0

    def _sleep(self, cycles):
        self.free_at = max(self.now, self.free_at) + cycles / 2e9

    def call(self):
        self.now += self.host
        self.free_at = max(self.now, self.free_at) + self.work

    def Event(self, enable_timing):
        event = SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "time", max(self.now, self.free_at))
        event.elapsed_time = lambda end: 1000 * (end.time - event.time)
        return event


@pytest.mark.parametrize("work", [2e-5, 1e-3])
def test_on_a_gpu_the_time_of_python_between_calls_does_not_count(work):
    gpu = FakeGPU(host=2e-4, work=work)
    assert bench.seconds_in_a_row(gpu.call, 50, gpu) == pytest.approx(work)


def test_on_a_gpu_as_many_calls_are_timed_as_fit_into_a_turn(monkeypatch):
    calls, timed = [], []
    rt = SimpleNamespace(device_type="cuda", world_size=1, synchronize=lambda: None)
    monkeypatch.setattr(bench, "seconds_in_a_row", lambda run, n: timed.append(n) or 0.5)
    assert bench.seconds_per_call(lambda: calls.append(1), rt) == 0.5
    assert timed == [50] and len(calls) == 1
    rt.world_size = 2
    assert bench.seconds_per_call(lambda: calls.append(1), rt) != 0.5
    assert len(timed) == 1 and len(calls) == 2


@pytest.mark.slow
def test_two_ranks_are_measured_step_by_step(tmp_path):
    """Ranks that each made as many calls as fit into a turn would wait for each other forever."""
    args = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "bench.py"]
    args += [*SMALL, "--table=types", "--attn_types=SM,GK", "--steps=20"]
    done = subprocess_run(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"SM +SDPA .*\nGK +blockwise", done.stdout)
