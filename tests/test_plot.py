"""plot.py: pictures from what train.py and bench.py wrote, and from nothing else."""

import json
import sys

import pytest
from conftest import TINY, Failed, subprocess_run

import plot
import train


def test_the_losses_of_runs_are_drawn(run, run_train, tmp_path):
    pytest.importorskip("matplotlib")
    for attn_type in ("SM", "GK"):
        run_train(f"--out_dir={attn_type}", f"--attn_type={attn_type}")
    run("plot", "loss", "SM", "GK", "--to=pictures")
    assert (tmp_path / "pictures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "pictures" / "loss.svg").read_text()
    assert "<svg" in svg


def test_of_several_runs_it_is_told_when_they_come_to_the_first_ones_loss(run, tmp_path):
    pytest.importorskip("matplotlib")
    logs = {"a": [(0, 4.0), (100, 2.0), (200, 1.5)], "b": [(0, 4.0), (50, 2.0), (150, 1.4)]}
    logs["c"] = [(0, 4.0), (900, 1.6)]
    for name, points in logs.items():
        (tmp_path / name).mkdir()
        lines = ["tokens,train_loss,val_loss", *(f"{t},,{loss}" for t, loss in points)]
        (tmp_path / name / "log.csv").write_text("\n".join(lines) + "\n")
        (tmp_path / name / "config.json").write_text('{"attn_type": "SM"}')
    out = run("plot", "loss", "a", "b", "c")
    assert "b comes to the 1.5000 that a has after 200 tokens after 150, 0.75 of them" in out
    assert "c does not come to the 1.5000 that a has" in out


@pytest.fixture
def figures(monkeypatch):
    """What plot.py draws, by name, instead of files."""
    pytest.importorskip("matplotlib")
    drawn = {}
    monkeypatch.setattr(plot, "save", lambda figure, to, name: drawn.update({name: figure}))
    return drawn


def test_a_comparison_is_drawn_as_means_and_bands_at_the_best_rates(figures, tmp_path):
    losses = {("SM", 1e-3): [(9, 3, 2.0), (9, 4, 2.2)], ("SM", 1e-2): [(9, 5, 3), (9, 5, 3)]}
    losses["GK", 1e-3] = [(9, 5, 2.5), (9, 5, 2.9)]
    lines = ["attn_type,learning_rate,seed,final_val_loss,diverged,run"]
    for (attn_type, rate), seeds in losses.items():
        for seed, at in enumerate(seeds):
            name = f"{attn_type}-{rate}-{seed}"
            lines.append(f"{attn_type},{rate},{seed},{at[-1]},False,{name}")
            (tmp_path / name).mkdir()
            rows = [f"{10**6 * i},{i},{loss}" for i, loss in enumerate(at)]
            log = "\n".join(["tokens,seconds,val_loss", *rows])
            (tmp_path / name / "log.csv").write_text(log + "\n")
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    plot.plot_compare([tmp_path], tmp_path)

    def curves(name):
        (axis,) = figures[name].axes
        found = [(line.get_color(), *map(list, line.get_data())) for line in axis.lines]
        bands = [sorted({y for _, y in c.get_paths()[0].vertices}) for c in axis.collections]
        return found[:2], bands

    (sm, gk), bands = curves("compare-tokens")
    assert sm == ("black", [1, 2], pytest.approx([3.5, 2.1]))
    assert gk == (plot.COLOURS[0], [1, 2], pytest.approx([5, 2.7]))
    assert bands == [[2.0, 2.2, 3, 4], [2.5, 2.9, 5]]
    (sm, gk), bands = curves("compare-rates")
    assert sm == ("black", [1e-3, 1e-2], pytest.approx([2.1, 3])) and gk[2] == [2.7]


def test_runs_of_a_picture_can_be_told_apart(figures, tmp_path):
    for i, attn_type in enumerate(["SM"] * 5 + ["GK"]):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "log.csv").write_text("tokens,train_loss,val_loss\n0,,4\n9,,3\n")
        (tmp_path / str(i) / "config.json").write_text(json.dumps({"attn_type": attn_type}))

    def looks(*names):
        plot.plot_loss([tmp_path / name for name in names], tmp_path)
        lines = figures["loss"].axes[0].lines
        return [(a.get_color(), a.get_linestyle()) for a in lines if a.get_marker() == "o"]

    assert len(set(looks(*"01234"))) == 5
    assert looks(*"015") == [("black", "-"), ("black", "--"), (plot.COLOURS[0], "-")]


def test_the_tables_of_bench_are_written_as_json_and_drawn(run, tmp_path):
    pytest.importorskip("matplotlib")
    args = [*TINY, "--vocab_size=11", "--steps=1", "--warmup=0", "--min_T=16", "--max_T=64"]
    out = run("bench", *args, "--attn_types=SM,GK", "--table=all", "--out=bench.json")
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [(r["attn_type"], r["impl"], r["T"]) for r in results["attention"]] == [
        (attn_type, impl, T)
        for T in (16, 64)
        for attn_type, impl in (("SM", "SDPA"), ("GK", "blockwise"), ("GK", "reference"))
    ]
    assert [r["attn_type"] for r in results["types"]] == ["SM", "GK"]
    assert [r["T"] for r in results["lengths"]] == [16, 16, 64, 64]
    assert all(r["tokens_per_s"] > 0 for r in results["types"] + results["lengths"])
    assert "attention, L2" in out and "times_SDPA" in out
    run("plot", "bench", "bench.json")
    for name in ("attention", "types", "lengths"):
        assert (tmp_path / f"bench-{name}.png").exists()


@pytest.mark.parametrize("attn_type", ["SM", "GK", "GKpoly-1", "PA_tanh"])
def test_what_attention_computes_with_is_drawn(run, run_train, tmp_path, attn_type):
    pytest.importorskip("matplotlib")
    run_train("--out_dir=run", f"--attn_type={attn_type}", "--stats_interval=2")
    run("plot", "ranges", "run", "--to=pictures")
    run("plot", "attention", "run", "--start=the cat sat", "--to=pictures")
    run("plot", "kernel", "GKpoly-4", "PA_relu", "--run=run", "--to=pictures")
    for name in ("ranges", "attention-0", "attention-1", "kernel"):
        assert (tmp_path / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<path" in (tmp_path / "pictures" / f"{name}.svg").read_text()


def test_a_run_of_some_length_leaves_its_pictures(run_train, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(train, "DRAWN_FROM", 4)
    args = ["--stats_interval=2", "--attn_type=GK"]
    run_train("--out_dir=short", *args, "--max_iters=3")
    run_train("--out_dir=long", *args)
    run_train("--out_dir=without", *args, "--plot=False")
    pictures = {path.parent.name + "/" + path.name for path in tmp_path.glob("*/*.png")}
    assert pictures == {"long/loss.png", "long/ranges.png"}


def test_a_run_does_not_depend_on_its_pictures(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "DRAWN_FROM", 4)
    with monkeypatch.context() as patch:
        patch.setattr(train, "pictures", lambda folder: 1 / 0)
        assert "division by zero" in run_train("--out_dir=a")
    for name in ("matplotlib", "matplotlib.pyplot"):  # not installed: no word of it
        monkeypatch.setitem(sys.modules, name, None)
    assert "summed up" not in run_train("--out_dir=b")
    assert not list(tmp_path.glob("*/*.png"))


def test_training_imports_no_matplotlib():
    code = "import train, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess_run("-c", code).returncode == 0


@pytest.mark.parametrize(
    "args, said",
    [
        (["loss"], "python plot.py"),
        (["pie", "x"], "python plot.py"),
        (["loss", "nowhere"], "nowhere is not the folder of a run"),
        (["compare", "nowhere"], "nowhere is not the folder of a comparison"),
        (["bench", "nothing.json"], "nothing.json is no file of bench.py"),
        (["ranges", "nowhere"], "nowhere has no stats.csv; train with --stats_interval=N"),
        (["attention", "nowhere"], 'python plot.py attention OUT --start="Some text"'),
        (["attention", "nowhere", "--start=a"], "nowhere"),
        (["attention", "a", "b", "--start=a"], "'a b' should be 1 name"),
        (["kernel", "GKpoly"], "attn_type='GKpoly' is not known"),
        (["kernel", "SM"], "SM is no pointwise function"),
        (["kernel", "GK", "--min=x"], "could not convert"),
        (["kernel", "GK", "--min=1", "--max=0"], "are no range"),
        (["kernel", "GK", "--min=1", "--max=5"], "are no range"),
        (["kernel", "GK", "--min=-inf"], "are no range"),
        (["kernel", "GK", "--to=/dev/null/x"], "choose another folder with --to="),
        (["kernel", "GK", "--low=1"], "unknown option --low; there is --to=..., --min=..."),
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


def test_plot_tells_what_it_can_do(run):
    assert "python plot.py ranges OUT" in run("plot", "--help")
