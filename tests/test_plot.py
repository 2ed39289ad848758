"""plot.py and the modules that draw for it: pictures of what train.py and compare.py wrote."""

import pytest
from conftest import Failed

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))


def draw_what_attention_computes_with(run, run_train, attn_type):
    run_train("--out_dir=run", f"--attn_type={attn_type}", "--stats_interval=1", "--max_iters=2")
    run("plot", "ranges", "run", "--to=pictures")
    run("plot", "attention", "run", "--start=the cat sat", "--to=pictures")
    run("plot", "kernel", "GKpoly-4", "PA_relu", "--run=~/run", "--to=~/pictures")


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
