"""plot.py: pictures from what train.py and bench.py wrote, and from nothing else."""

import json

import pytest
from conftest import TINY, Failed


def test_the_losses_of_runs_are_drawn(run, run_train, tmp_path):
    pytest.importorskip("matplotlib")
    for attn_type in ("SM", "GK"):
        run_train(f"--out_dir={attn_type}", f"--attn_type={attn_type}")
    run("plot", "loss", "SM", "GK", "--to=pictures")
    assert (tmp_path / "pictures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "pictures" / "loss.svg").read_text()
    assert "<svg" in svg


def test_the_tables_of_bench_are_written_as_json_and_drawn(run, tmp_path):
    pytest.importorskip("matplotlib")
    args = [*TINY, "--vocab_size=11", "--steps=1", "--warmup=0", "--min_T=16", "--max_T=64"]
    out = run("bench", *args, "--attn_types=SM,GK", "--table=all", "--out=bench.json")
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [(r["attn_type"], r["impl"], r["T"]) for r in results["attention"]] == [
        (attn_type, impl, T)
        for T in (16, 64)
        for attn_type, impl in (("SM", "reference"), ("GK", "blockwise"), ("GK", "reference"))
    ]
    assert [r["attn_type"] for r in results["types"]] == ["SM", "GK"]
    assert [r["T"] for r in results["lengths"]] == [16, 16, 64, 64]
    assert all(r["tokens_per_s"] > 0 for r in results["types"] + results["lengths"])
    assert "attention, L2" in out and "times_SDPA" in out
    run("plot", "bench", "bench.json")
    for name in ("attention", "types", "lengths"):
        assert (tmp_path / f"bench-{name}.png").exists()


@pytest.mark.parametrize(
    "args, said",
    [
        (["loss"], "python plot.py"),
        (["pie", "x"], "python plot.py"),
        (["loss", "nowhere"], "nowhere is not the folder of a run"),
        (["compare", "nowhere"], "nowhere is not the folder of a comparison"),
        (["bench", "nothing.json"], "nothing.json is no file of bench.py"),
    ],
)
def test_what_can_not_be_drawn_is_one_line(run, args, said):
    with pytest.raises(Failed, match=said) as failed:
        run("plot", *args)
    assert failed.value.code == 2


@pytest.mark.parametrize(
    "args, said", [(["--table=all_"], "attention, types, lengths"), (["--attn_types=SM,gk"], "gk")]
)
def test_tables_that_bench_has_not_are_refused(run, args, said):
    with pytest.raises(Failed, match=said):
        run("bench", *args)
