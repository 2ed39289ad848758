"""engine/run_folder.py: a run has a folder of its own, and what was there is kept."""

import pytest
from conftest import Failed

from engine import checkpoint as ckpt


def test_a_run_that_is_there_already_is_moved_aside(run_train, tmp_path):
    run_train("--out_dir=run", "--max_iters=1")
    first = (tmp_path / "run" / "ckpt.pt").read_bytes()
    assert "moved to run.1" in run_train("--out_dir=run", "--max_iters=2")
    assert (tmp_path / "run.1" / "ckpt.pt").read_bytes() == first
    assert "moved to run.2" in run_train("--out_dir=run", "--max_iters=2")


@pytest.mark.parametrize("given", ["--out_dir=", "--out_dir=.", "--out_dir=.."])
def test_the_current_folder_is_never_moved_aside(run_train, tmp_path, given):
    with pytest.raises(Failed, match="is the current folder, or around it"):
        run_train(given)
    assert tmp_path.exists()


def test_a_folder_that_is_a_link_stays_one(run_train, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "scratch" / "run")
    for n in (1, 2):
        run_train("--out_dir=run", f"--max_iters={n}")
    assert (tmp_path / "run").is_symlink()
    assert ckpt.load(tmp_path / "scratch" / "run" / "ckpt.pt")["iter_num"] == 2
    assert ckpt.load(tmp_path / "scratch" / "run.1" / "ckpt.pt")["iter_num"] == 1
