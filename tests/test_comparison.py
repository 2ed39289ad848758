"""engine/comparison.py: each attention is judged and drawn at its best learning rate."""

import pytest

import compare
from compare import Trial
from engine import pictures
from engine.comparison import best_runs, draw_comparison
from train import Config


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


def test_a_number_that_varies_becomes_an_axis(figures, tmp_path):
    lines = ["attn_type,optimizer,n_layer,learning_rate,seed,final_val_loss,diverged,run"]
    gaps = {1: 0.5, 2: 0.25, 4: 0.125}
    for n_layer, gap in gaps.items():
        for attn_type, loss in (("SM", 1.0), ("GK", 1.0 + gap)):
            name = f"{attn_type}-{n_layer}"
            lines.append(f"{attn_type},muon,{n_layer},0.001,1,{loss},False,{name}")
            (tmp_path / name).mkdir()
            log = "tokens,seconds,val_loss\n0,0,9\n1000000,1,2\n"
            (tmp_path / name / "log.csv").write_text(log)
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    draw_comparison(tmp_path, tmp_path)
    (axis,) = figures["compare-n_layer"].axes
    curves = [tuple(map(list, line.get_data())) for line in axis.lines[:2]]
    assert curves == [([1, 2, 4], [0, 0, 0]), ([1, 2, 4], [0.5, 0.25, 0.125])]
    assert "SM optimizer=muon" in [text.get_text() for text in axis.texts]


def row_of(attn_type, rate, seed, loss):
    """A row of results.csv; a loss of None has diverged."""
    numbers = {"ms_per_step": 10.0, "tokens_per_s": 1000.0, "peak_mib": None}
    row = {"attn_type": attn_type, "learning_rate": rate, "seed": seed, "final_val_loss": loss}
    row |= {"variant": attn_type}
    return row | numbers | {"diverged": loss is None}


def test_each_attention_is_judged_at_its_best_learning_rate():
    losses = {
        "SM": {1e-3: (1.7, 1.5), 3e-3: (1.9, 1.8), 1e-2: (1.0, None)},
        "GK": {1e-3: (2.2, 2.0), 3e-3: (1.9, 2.1), 1e-2: (2.3, 2.0)},
        "PA_relu": {1e-3: (None, None), 3e-3: (1.0, None), 1e-2: (None, None)},
    }
    rows = [
        row_of(attn_type, rate, seed, loss)
        for attn_type, at in losses.items()
        for rate, pair in at.items()
        for seed, loss in enumerate(pair, 1)
    ]
    assert best_runs(rows) == {"SM": rows[:2], "GK": rows[8:10], "PA_relu": []}
    trial = Trial({}, Config(out_dir="nowhere"))
    text = compare.report(rows, [trial] * 20, "python compare.py")
    cells = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    sm, gk, relu = cells[2:5]
    assert sm[1:3] == ["1.6000 ± 0.1414", "-"] and sm[-2:] == ["0.001*", "1 of 6"]
    assert gk[1:3] == ["2.0000 ± 0.1414", "+0.4000 ± 0.2828"] and gk[-2:] == ["0.003", "0 of 6"]
    assert relu[1:] == ["diverged", "-", "-", "-", "-", "-", "5 of 6"]
    assert cells[-1] == ["PA_relu", "2 diverged", "1 diverged", "2 diverged"]
    assert "2 of 20 runs are missing" in text
    text = compare.report([r for r in rows if r["attn_type"] != "SM"], [trial] * 12, "")
    assert "minus GK's" in text and "missing" not in text
