"""engine/pictures.py: a run leaves its pictures, and does not depend on them."""

import math
import sys

import pytest
from conftest import subprocess_run, write_run

import train
from engine import pictures


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


def test_runs_of_a_picture_can_be_told_apart(figures, tmp_path):
    for i, attn_type in enumerate(["SM"] * 5 + ["GK"]):
        write_run(tmp_path / str(i), attn_type, [(0, 4), (9, 3)])

    def looks(*names):
        pictures.draw_losses([tmp_path / name for name in names], tmp_path)
        lines = figures["loss"].axes[0].lines
        return [(a.get_color(), a.get_linestyle()) for a in lines if a.get_marker() == "o"]

    assert len(set(looks(*"01234"))) == 5
    assert looks(*"015") == [("black", "-"), ("black", "--"), (pictures.COLOURS[0], "-")]


@pytest.mark.filterwarnings("error")
def test_what_is_no_better_than_random_weights_is_left_out(figures, tmp_path):
    write_run(tmp_path / "annealed", "GKpoly-3", [(0, 4.5), (10**6, 5e7), (2 * 10**6, 1.5)])
    write_run(tmp_path / "worse", "GK", [(0, 4.5), (10**6, 4.6)])
    pictures.draw_losses([tmp_path / "annealed", tmp_path / "worse"], tmp_path)
    axis = figures["loss"].axes[0]
    points = [point for line in axis.lines for point in line.get_xydata().tolist()]
    assert [point for point in points if not math.isnan(point[1])] == [[2.0, 1.5]]
    assert len(axis.get_legend().texts) == 2
    pictures.draw_losses([tmp_path / "worse"], tmp_path)  # without a warning


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
