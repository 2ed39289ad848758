"""engine/runlog.py: rows, trackers, and what a resume drops."""

import sys
from types import SimpleNamespace

import pytest
from conftest import log_rows as rows

import train


def test_resuming_drops_the_rows_after_the_checkpoint(run_train, tmp_path):
    args = ["--out_dir=run", "--eval_interval=2", "--lr_decay_iters=4"]
    run_train(*args, "--max_iters=2")
    with open(tmp_path / "run" / "log.csv", "a", newline="") as file:
        file.write("3,384,9.9,,,0.1,1,1,,1\r\n")  # a step that a kill took back
    run_train(*args, "--init_from=resume", "--max_iters=3")
    log = rows(tmp_path / "run")
    assert [row["step"] for row in log] == ["0", "1", "2", "3"]
    assert float(log[-1]["train_loss"]) < 9


def test_a_log_with_odd_bytes_and_a_missing_wandb_stop_nothing(run_train, tmp_path, monkeypatch):
    run_train("--out_dir=run", "--max_iters=2", "--lr_decay_iters=4")
    with open(tmp_path / "run" / "log.csv", "ab") as file:
        file.write(b"\xff\xfe,1\r\n3,")
    monkeypatch.setitem(sys.modules, "wandb", None)
    args = ["--init_from=resume", "--lr_decay_iters=4", "--wandb_log=True"]
    out = run_train("--out_dir=run", *args)
    assert "wandb is off" in out and "pip install wandb" in out
    assert [row["step"] for row in rows(tmp_path / "run")] == ["0", "1", "2", "3", "4"]


def fake_wandb(monkeypatch, **methods):
    """A wandb whose run keeps what it is given; `methods` take the place of its own."""
    logged = []
    run = SimpleNamespace(
        id="run-7",
        log=lambda row, step: logged.append((step, row)),
        finish=lambda: logged.append("finished"),
    )
    vars(run).update(methods)
    init = lambda **options: logged.append(options) or run
    fake = SimpleNamespace(init=init, Image=lambda path: path, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return logged


def test_wandb_gets_the_ranges_of_layers_and_the_pictures(run_train, monkeypatch):
    pytest.importorskip("matplotlib")
    logged = fake_wandb(monkeypatch)
    monkeypatch.setattr(train, "PICTURES_FROM", 4)
    run_train("--out_dir=run", "--wandb_log=True", "--stats_interval=4")
    names = set().union(*(row for _, row in logged[1:-1]))
    measured = ("x_min", "x_max", "A_max", "entropy")
    assert {f"{name}/layer{i}" for name in measured for i in (0, 1)} <= names
    assert {"train_loss", "loss", "ranges"} <= names and logged[-1] == "finished"


@pytest.mark.parametrize("name", ["log", "finish"])
def test_a_wandb_that_fails_is_named_once_and_stops_nothing(run_train, tmp_path, monkeypatch, name):
    def fail(*args, **kwargs):
        raise OSError("the server is on fire")

    fake_wandb(monkeypatch, **{name: fail})
    out = run_train("--out_dir=run", "--wandb_log=True", "--n_layer=1")
    assert out.count("wandb is off: the server is on fire") == 1
    assert len(rows(tmp_path / "run")) == 5


def test_trackio_gets_the_rows_of_the_log_and_a_resume_goes_on_with_its_run(run_train, monkeypatch):
    pytest.importorskip("matplotlib")
    logged = []
    log = lambda row, step: logged.append((step, row))
    run = SimpleNamespace(log=log, finish=lambda: logged.append("finished"))
    init = lambda **options: logged.append(options) or run
    fake = SimpleNamespace(init=init, Image=lambda path: path)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setattr(train, "PICTURES_FROM", 4)
    run_train("--out_dir=run", "--trackio_log=True", "--wandb_project=p")
    options, *steps, end = logged
    assert (options["project"], options["name"], options["resume"]) == ("p", "run", "never")
    assert options["config"]["trackio_log"] and end == "finished"
    assert [step for step, row in steps if "train_loss" in row] == [1, 2, 3, 4]
    assert any("loss" in row for _, row in steps)  # the picture
    logged.clear()
    more = ["--init_from=resume", "--max_iters=5", "--lr_decay_iters=4"]
    run_train("--out_dir=run", "--trackio_log=True", *more)
    assert logged[0]["resume"] == "allow" and logged[0]["name"] == "run"


def test_tensorboard_gets_the_same_or_is_off(run_train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out = run_train("--out_dir=run", "--tensorboard_log=True")
    assert out.count("tensorboard is off") == 1
    logged = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            logged.append((folder, purge_step))

        def add_scalar(self, name, number, step):
            logged.append((name, step))

        def close(self):
            logged.append("closed")

    fake = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    run_train("--out_dir=run", "--tensorboard_log=True", "--stats_interval=4")
    assert logged[0] == (tmp_path / "run" / "tensorboard", None) and logged[-1] == "closed"
    assert {("train_loss", 3), ("val_loss", 4), ("x_min/layer1", 4)} <= set(logged[1:-1])


def test_wandb_gets_the_rows_of_the_log_and_a_resume_goes_on_with_its_page(run_train, monkeypatch):
    logged = fake_wandb(monkeypatch)
    run_train("--out_dir=run", "--wandb_log=True", "--wandb_project=p", "--eval_interval=2")
    options, *steps, last, end = logged
    assert (options["project"], options["name"], options["id"]) == ("p", "run", None)
    assert [step for step, _ in (*steps, last)] == [0, 1, 2, 3, 4] and end == "finished"
    assert "val_loss" in last[1]
    logged.clear()
    more = ["--init_from=resume", "--max_iters=5", "--lr_decay_iters=4"]
    run_train("--out_dir=run", "--wandb_log=True", *more)
    assert logged[0]["id"] == "run-7" and logged[0]["resume"] == "allow"
