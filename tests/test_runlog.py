"""engine/runlog.py: rows, trackers, and what a resume drops."""

import sys

from conftest import log_rows as rows


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
    assert "wandb is off" in run_train("--out_dir=run", *args)
    assert [row["step"] for row in rows(tmp_path / "run")] == ["0", "1", "2", "3", "4"]


def test_wandb_gets_the_rows_of_the_log(run_train, tmp_path, monkeypatch):
    logged = []

    class FakeRun:
        id = "run-7"

        def log(self, row, step):
            logged.append((step, row))

        def finish(self):
            logged.append("finished")

    fake = type(sys)("wandb")
    fake.Settings = dict
    fake.init = lambda **options: logged.append(options) or FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_train("--out_dir=run", "--wandb_log=True", "--wandb_project=p", "--eval_interval=2")
    assert (logged[0]["project"], logged[0]["name"], logged[0]["id"]) == ("p", "run", None)
    assert [step for step, _ in logged[1:-1]] == [0, 1, 2, 3, 4] and logged[-1] == "finished"
    assert "val_loss" in logged[-2][1]
    logged.clear()  # a resumed run goes on with its own page
    args = ["--init_from=resume", "--max_iters=5", "--lr_decay_iters=4"]
    run_train("--out_dir=run", "--wandb_log=True", *args)
    assert logged[0]["id"] == "run-7" and logged[0]["resume"] == "allow"
