"""engine/files.py: files that are whole or absent, logs, tables."""

import pytest

from engine.files import read_rows, text_table, whole_file


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    with whole_file(path) as file:
        file.write("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with whole_file(path, "wb") as file:
        file.write(b"new")
    assert path.read_text() == "new"


def test_rows_that_were_cut_short_and_later_ones_are_left_out(tmp_path):
    (tmp_path / "log.csv").write_bytes(b"step,loss,seconds\n1,0.5,2\n2,,4\n3,0.4,6\n\xff\n4,0.3")
    rows = read_rows(tmp_path / "log.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3"] and rows[1]["loss"] == ""
    assert [row["step"] for row in read_rows(tmp_path / "log.csv", 2)] == ["1", "2"]
    with pytest.raises(OSError):
        read_rows(tmp_path / "nothing.csv")


def test_a_table_is_aligned_or_markdown():
    rows = [["name", "loss"], ["SM", "1.5"], ["GKpoly-8", "12"]]
    assert text_table(rows) == "name      loss\nSM         1.5\nGKpoly-8    12"
    markdown = text_table(rows, markdown=True).splitlines()
    assert markdown[:3] == ["| name | loss |", "| --- | --- |", "| SM | 1.5 |"]
