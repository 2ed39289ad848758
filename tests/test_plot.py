"""plot.py and the modules that draw for it: pictures of what train.py and compare.py wrote."""

import json
import sys
from pathlib import Path

import pytest
from conftest import Failed, subprocess_run

import train
from engine import pictures
from engine.comparison import draw_comparison

pytest.importorskip("matplotlib")


def write_run(folder, attn_type, log):
    """The folder of a run, with a log of (tokens, val_loss)."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"attn_type": attn_type}))
    lines = ["tokens,train_loss,val_loss", *(f"{tokens},,{loss}" for tokens, loss in log)]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")


def test_losses_are_drawn_and_the_tokens_to_the_first_ones_loss_printed(run, tmp_path):
    write_run(tmp_path / "a", "SM", [(0, 4.0), (100, 2.0), (200, 1.5)])
    write_run(tmp_path / "b", "SM", [(0, 4.0), (50, 2.0), (150, 1.4)])
    write_run(tmp_path / "c", "GK", [(0, 4.0), (900, 1.6)])
    out = run("plot", "loss", "a", "b", "c", "--to=pictures")
    goal = "the final validation loss of a (1.5000 after 200 tokens)"
    assert f"b reaches {goal} after 150 tokens, 0.75 times as many" in out
    assert f"c does not reach {goal}" in out
    assert (tmp_path / "pictures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "pictures" / "loss.svg").read_text()


@pytest.fixture
def figures(monkeypatch):
    """The figures by name, instead of files."""
    drawn = {}
    keep = lambda figure, path, **_: drawn.update({Path(path).stem: figure})
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
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
    draw_comparison(tmp_path, tmp_path)

    def curves(name):
        (axis,) = figures[name].axes
        found = [(line.get_color(), *map(list, line.get_data())) for line in axis.lines]
        bands = [sorted({y for _, y in c.get_paths()[0].vertices}) for c in axis.collections]
        return found[:2], bands

    (sm, gk), bands = curves("compare-tokens")
    assert sm == ("black", [1, 2], pytest.approx([3.5, 2.1]))
    assert gk == (pictures.COLOURS[0], [1, 2], pytest.approx([5, 2.7]))
    assert bands == [[2.0, 2.2, 3, 4], [2.5, 2.9, 5]]
    (sm, gk), bands = curves("compare-rates")
    assert sm == ("black", [1e-3, 1e-2], pytest.approx([2.1, 3])) and gk[2] == [2.7]


def test_runs_of_a_picture_can_be_told_apart(figures, tmp_path):
    for i, attn_type in enumerate(["SM"] * 5 + ["GK"]):
        write_run(tmp_path / str(i), attn_type, [(0, 4), (9, 3)])

    def looks(*names):
        pictures.draw_losses([tmp_path / name for name in names], tmp_path)
        lines = figures["loss"].axes[0].lines
        return [(a.get_color(), a.get_linestyle()) for a in lines if a.get_marker() == "o"]

    assert len(set(looks(*"01234"))) == 5
    assert looks(*"015") == [("black", "-"), ("black", "--"), (pictures.COLOURS[0], "-")]


def draw_what_attention_computes_with(run, run_train, attn_type):
    run_train("--out_dir=run", f"--attn_type={attn_type}", "--stats_interval=1", "--max_iters=2")
    run("plot", "ranges", "run", "--to=pictures")
    run("plot", "attention", "run", "--start=the cat sat", "--to=pictures")
    run("plot", "kernel", "GKpoly-4", "PA_relu", "--run=run", "--to=pictures")


@pytest.mark.parametrize("attn_type", ["SM", "GKpoly-1"])
def test_what_attention_computes_with_is_drawn(run, run_train, tmp_path, attn_type):
    draw_what_attention_computes_with(run, run_train, attn_type)
    for name in ("ranges", "attention-0", "attention-1", "kernel"):
        assert (tmp_path / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<path" in (tmp_path / "pictures" / f"{name}.svg").read_text()


@pytest.mark.parametrize("attn_type, has_negative_weights", [("GK", False), ("PA_tanh", True)])
def test_weights_have_a_scale_of_their_own(
    run, run_train, figures, attn_type, has_negative_weights
):
    draw_what_attention_computes_with(run, run_train, attn_type)
    assert figures.keys() == {"ranges", "attention-0", "attention-1", "kernel"}
    assert len(figures["ranges"].axes) == 4  # two layers, largest |A|, sums of rows
    norm = figures["attention-0"].axes[0].images[0].norm
    assert norm.vmin == -norm.vmax if has_negative_weights else norm.vmin > 0


def test_a_run_of_some_length_leaves_its_pictures(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PICTURES_FROM", 4)
    args = ["--stats_interval=2", "--attn_type=GK", "--n_layer=1"]
    run_train("--out_dir=short", *args, "--max_iters=3")
    run_train("--out_dir=long", *args)
    run_train("--out_dir=without", *args, "--plot=False")
    drawn = {path.parent.name + "/" + path.name for path in tmp_path.glob("*/*.png")}
    assert drawn == {"long/loss.png", "long/ranges.png"}


def test_a_run_does_not_depend_on_its_pictures(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PICTURES_FROM", 4)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "draw_losses", lambda *_: 1 / 0)
        assert "division by zero" in run_train("--out_dir=a", "--n_layer=1")
    for name in ("matplotlib", "matplotlib.pyplot"):  # not installed: no word of it
        monkeypatch.setitem(sys.modules, name, None)
    assert "summed up" not in run_train("--out_dir=b", "--n_layer=1")
    assert not list(tmp_path.glob("*/*.png"))


def test_training_imports_no_matplotlib():
    code = "import train, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess_run("-c", code).returncode == 0


@pytest.mark.parametrize(
    "args, message",
    [
        (["loss"], "python plot.py"),
        (["loss", "x", "--start=a"], "unknown option --start; plot.py loss knows --to"),
        (["pie", "x"], "python plot.py"),
        (["loss", "nowhere"], "nowhere is not the folder of a run"),
        (["compare", "nowhere"], "nowhere is not the folder of a comparison"),
        (["bench", "nothing.json"], "nothing.json was not written by bench.py"),
        (["ranges", "nowhere"], "nowhere has no stats.csv; train with --stats_interval=N"),
        (["attention", "nowhere"], 'python plot.py attention OUT --start="Some text"'),
        (["attention", "nowhere", "--start=a"], "nowhere"),
        (["attention", "a", "b", "--start=a"], "attention takes one name, not 2: a b"),
        (["kernel", "GKpoly"], "attn_type='GKpoly' is not known"),
        (["kernel", "SM"], "SM is not a pointwise function"),
        (["kernel", "GK", "--min=x"], "could not convert"),
        (["kernel", "GK", "--min=1", "--max=0"], "are no range"),
        (["kernel", "GK", "--min=1", "--max=5"], "are no range"),
        (["kernel", "GK", "--min=-inf"], "are no range"),
        (["kernel", "GK", "--to=/dev/null/x"], "choose another folder with --to="),
        (["kernel", "GK", "--low=1"], "unknown option --low; plot.py kernel knows --to=..., --min"),
    ],
)
def test_what_can_not_be_drawn_is_one_line(run, args, message):
    with pytest.raises(Failed, match=message) as failed:
        run("plot", *args)
    assert failed.value.code == 2


def test_plot_tells_what_it_can_do(run):
    assert "python plot.py ranges OUT" in run("plot", "--help")
