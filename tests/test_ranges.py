"""ranges.py: what stats.csv says of a model's attention, and what follows for its polynomial."""

import csv
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, subprocess_run
from torch.nn import functional as F

from engine import ranges
from engine.runtime import Runtime
from model import GPT, GPTConfig

RT = Runtime("cpu", "float32", False)
ATTN_TYPES = ["SM", "GK", "GKpoly-4", "PA_relu"]
T = 24


def trained_looking(attn_type, scale=8.0, **more):
    """A model whose scores spread, and ids for it; GKpoly-4's leave its range."""
    torch.manual_seed(0)
    shape = dict(block_size=T, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**shape, attn_type=attn_type, **more))
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:32] *= scale * 10
    return model, torch.randint(11, (3, T))


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def plainly(model, idx):
    """The rows of `measure`, by full matrices in float64."""
    model = model.double().requires_grad_(False)
    attn_type, rows = model.config.attn_type, []
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(T))
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    for layer, block in enumerate(model.transformer.h):
        read = F.layer_norm(x, (16,), block.ln_1.weight, block.ln_1.bias, 1e-5)
        qkv = F.linear(read, block.attn.c_attn.weight, block.attn.c_attn.bias)
        q, k, v = qkv.view(3, T, 3, 2, 8).permute(2, 0, 3, 1, 4)
        if attn_type.startswith("GK"):
            s = -((q[:, :, :, None] - k[:, :, None]) ** 2).sum(-1) / 2 / math.sqrt(8)
        else:
            s = (q[:, :, :, None] * k[:, :, None]).sum(-1) / math.sqrt(8)
        if attn_type == "SM":
            A = s.exp() * mask / (s.exp() * mask).sum(-1, keepdim=True)
        else:
            f = {"GK": torch.exp, "GKpoly-4": lambda s: (1 + s / 16) ** 16, "PA_relu": F.relu}
            A = f[attn_type](s) * mask / (T if attn_type == "PA_relu" else 1)
        for head in range(2):
            seen, sums = s[:, head][:, mask].flatten(), A[:, head].sum(-1)
            row = {"layer": layer, "head": head, "x_min": seen.min(), "x_max": seen.max()}
            for p in (1, 10, 50, 90, 99):
                row[f"x_p{p}"] = np.percentile(seen, p)
            outside = ((seen < -32) | (seen > 0)).double().mean()
            row["outside"] = outside if attn_type == "GKpoly-4" else None
            row |= {"A_max": A[:, head].abs().max(), "row_min": sums.min()}
            row |= {"row_mean": sums.mean(), "row_max": sums.max(), "entropy": None}
            if attn_type == "SM":
                logs = torch.where(mask, A[:, head], 1.0).log()
                row["entropy"] = -(A[:, head] * logs).sum(-1).mean()
            for name, t in (("q", q), ("k", k)):
                norms = t[:, head].square().sum(-1).sqrt()
                row |= {f"{name}_mean": norms.mean(), f"{name}_max": norms.max()}
            rows.append({k: v if v is None else float(v) for k, v in row.items()})
        y = (A @ v).transpose(1, 2).reshape(3, T, 16)
        x = x + F.linear(y, block.attn.c_proj.weight, block.attn.c_proj.bias)
        x = x + block.mlp(block.ln_2(x))
    return rows


@pytest.mark.parametrize("attn_type", ATTN_TYPES)
@pytest.mark.parametrize("rows_at_a_time", [5, 128])
def test_every_number_is_that_of_full_matrices(monkeypatch, attn_type, rows_at_a_time):
    monkeypatch.setattr(ranges, "ROWS", rows_at_a_time)
    model, idx = trained_looking(attn_type, bias=True)
    measured, true = ranges.measure(model, idx, RT), plainly(model, idx)
    assert len(measured) == len(true) == 4
    for ours, theirs in zip(measured, true, strict=True):
        assert ours.keys() == theirs.keys() == set(ranges.COLUMNS) - {"step"}
        for name, value in theirs.items():
            assert ours[name] == (None if value is None else pytest.approx(value, 1e-4, 1e-5)), name
    if attn_type == "GKpoly-4":
        assert all(0 < row["outside"] < 1 for row in true)  # or it would prove little


def test_percentiles_of_many_scores_are_those_of_every_sth_row(monkeypatch):
    model, idx = trained_looking("GK")
    exact = ranges.measure(model, idx, RT)
    monkeypatch.setattr(ranges, "SAMPLE", 300)
    monkeypatch.setattr(ranges, "ROWS", 7)
    for a, b in zip(exact, ranges.measure(model, idx, RT), strict=True):
        assert a["x_min"] == b["x_min"] and a["row_mean"] == pytest.approx(b["row_mean"])
        assert a["x_p50"] != b["x_p50"]
        assert a["x_p50"] == pytest.approx(b["x_p50"], rel=0.3)


@pytest.mark.parametrize("more", [{}, {"lora_rank": 2}, {"dropout": 0.5}])
def test_measuring_leaves_the_model_as_it_was_and_sees_adapters(more):
    model, idx = trained_looking("GK", **more)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    first = ranges.measure(model, idx, RT)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    if more.get("lora_rank"):
        with torch.no_grad():
            model.transformer.h[0].attn.c_attn.lora_B += 1
        assert ranges.measure(model, idx, RT)[0]["x_min"] != first[0]["x_min"]


def test_under_half_precision_scores_are_float32():
    model, idx = trained_looking("GK", 1.0)
    half = Runtime("cpu", "bfloat16", False)
    first_block = lambda *qkr: next(ranges.row_blocks(*qkr, model.config))
    x, *_ = ranges.each_layer(model, idx, half, first_block)[0]
    assert x.dtype == torch.float32
    assert not torch.equal(x, x.bfloat16().float())  # nor rounded on the way
    a, b = ranges.measure(model, idx, RT)[0], ranges.measure(model, idx, half)[0]
    assert a["x_p50"] == pytest.approx(b["x_p50"], rel=0.05)


def line(attn_type, low, high=0.0, tolerance=1e-2, outside=(0, 0)):
    rows = [
        {"step": str(step), "x_min": str(low), "x_max": str(high), "outside": str(share)}
        for step, share in enumerate(outside)
    ]
    return ranges.summary(rows, attn_type, tolerance)


@pytest.mark.parametrize("low", [-0.5, -3.9, -34.85, -300.0, -1e4])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
def test_the_last_line_names_the_least_n(low, tolerance):
    x = np.concatenate([np.linspace(low, 0, 40_001), np.linspace(max(low, -20), 0, 40_001)])
    with np.errstate(over="ignore"):
        errors = [np.abs((1 + x / 2**n) ** 2**n - np.exp(x)).max() for n in range(1, 17)]
    precise = 1 + next(i for i, error in enumerate(errors) if error < tolerance)
    reaches = next(n for n in range(1, 17) if -(2 ** (n + 1)) <= low)
    text = line("GK", low, tolerance=tolerance)
    assert "\n" not in text and f"largest |x| {-low:.4g}" in text
    needs = f"n={precise} for an error below {tolerance:g}, n={reaches} for the range alone"
    assert text.endswith(needs)
    assert line("GKpoly-16", low, tolerance=tolerance).endswith(needs)


def test_the_last_line_says_whether_the_polynomial_was_in_range():
    assert "all in GKpoly-4's range -32 to 0, error against exp up to 0.017;" in line(
        "GKpoly-4", -20
    )
    text = line("GKpoly-4", -40, outside=(0, 0.1, 0.25))
    assert "out of GKpoly-4's range -32 to 0 at 2 of 3 measured steps" in text and "25.00%" in text
    assert "more than n=16" in line("GK", -1e6)
    assert "no polynomial" in line("GK", -math.inf) and "no polynomial" in line("GK", math.nan)
    for attn_type in ("SM", "PA_relu"):
        assert line(attn_type, -3, 5) == "scores x at step 1: -3 to 5, largest |x| 5"


# ----------------------------------------------------------------------------
# In a run


def test_a_run_leaves_a_row_for_each_step_layer_and_head(run_train, tmp_path):
    out = run_train("--out_dir=run", "--stats_interval=2", "--attn_type=GKpoly-4")
    rows = rows_of(tmp_path / "run" / "stats.csv")
    keys = [(int(row["step"]), int(row["layer"]), int(row["head"])) for row in rows]
    assert keys == [
        (step, layer, head) for step in (0, 2, 4) for layer in (0, 1) for head in (0, 1)
    ]
    assert list(rows[0]) == ranges.COLUMNS
    assert "all in GKpoly-4's range" in out.splitlines()[-1]
    x_min = min(float(row["x_min"]) for row in rows[-4:])
    assert f"scores x at step 4: {x_min:.4g} to" in out.splitlines()[-1]


def test_resuming_drops_the_stats_after_the_checkpoint_and_repeats_none(run_train, tmp_path):
    args = ["--out_dir=run", "--eval_interval=2", "--stats_interval=1", "--n_layer=1"]
    run_train(*args)
    whole = (tmp_path / "run" / "stats.csv").read_text()
    run_train(*args, "--max_iters=2", "--lr_decay_iters=4")
    stats = tmp_path / "run" / "stats.csv"
    taken_back = whole[whole.index("\n3,0,0") + 1 :]
    with open(stats, "a", newline="") as file:
        file.write(taken_back + "5,0,")  # steps that a kill took back, the last of them torn
    run_train(*args, "--init_from=resume", "--lr_decay_iters=4")
    assert stats.read_text() == whole
    with open(stats, "a", newline="") as file:
        file.write("9" + taken_back.splitlines(keepends=True)[0])
    run_train("--out_dir=run", "--n_layer=1", "--init_from=resume", "--stats_interval=0")
    assert stats.read_text() == whole  # trimmed by a run that measures nothing, too


def test_a_run_that_is_done_can_be_measured(run, run_train, tmp_path, data_dir):
    run_train("--out_dir=run", "--attn_type=GK", "--n_layer=1", "--max_iters=1")
    given = ["--out_dir=run", f"--data_dir={data_dir}", "--device=cpu", "--stats_interval=1"]
    assert "a polynomial GKpoly-n needs" in run("train", "--init_from=resume", *given)
    assert [row["step"] for row in rows_of(tmp_path / "run" / "stats.csv")] == ["1"] * 2


def test_measuring_changes_nothing_that_is_trained_and_is_off_by_default(
    run_train, tmp_path, monkeypatch
):
    args = ["--dropout=0.1", "--n_layer=1"]
    run_train("--out_dir=on", "--stats_interval=1", *args)
    monkeypatch.setattr(ranges, "each_layer", lambda *args: 1 / 0)
    assert "scores x" not in run_train("--out_dir=off", *args)
    assert not (tmp_path / "off" / "stats.csv").exists()
    on, off = (rows_of(tmp_path / name / "log.csv") for name in ("on", "off"))
    assert [row["train_loss"] for row in on] == [row["train_loss"] for row in off]


@pytest.mark.slow
def test_two_ranks_measure_once_and_like_one(run_train, tmp_path, data_dir):
    args = [*TINY, "--dataset=abc", f"--data_dir={data_dir}", "--max_iters=2", "--attn_type=GK"]
    args += ["--stats_interval=1", "--warmup_iters=2"]
    flags = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    done = subprocess_run(*flags, *args, "--out_dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run_train(*args, "--out_dir=one")
    one, two = (rows_of(tmp_path / name / "stats.csv") for name in ("one", "two"))
    assert one == two and len(one) == 12


# ----------------------------------------------------------------------------
# Trackers
