"""data/pydocs/prepare.py: the documentation of Python as a data set, the same in every run."""

import sys

import pytest
from prepared import read_meta, read_text

from configurator import UserError
from data.pydocs import prepare


def test_pydocs_is_two_megabytes_of_printable_ascii(tmp_path):
    prepare.prepare(tmp_path)
    meta = read_meta(tmp_path)
    train, val = read_text(tmp_path, "train"), read_text(tmp_path, "val")
    assert meta["vocab_size"] <= 96 and set(meta["chars"]) <= {"\n", *map(chr, range(32, 127))}
    assert len(train) + len(val) > 1_500_000 and 0.05 < len(val) / len(train) < 0.2
    assert "Return" in train and "Return" in val


def test_the_order_of_the_documents_depends_on_their_texts_only():
    documents = [f"text {i}" for i in range(50)]
    assert prepare.clean(documents) == prepare.clean(documents[::-1] * 2) != documents


def test_pydocs_shares_no_document_between_its_splits(tmp_path, monkeypatch):
    topics = [f"topic {i // 2} " + "x" * 10_000 for i in range(200)]  # each one twice
    monkeypatch.setattr(prepare, "reference_topics", lambda: topics)
    monkeypatch.setattr(prepare, "docstrings", lambda folder: ["", " ", "“ASCII”", "naïve"])
    prepare.prepare(tmp_path)
    splits = (read_text(tmp_path, split) for split in ("train", "val"))
    train, val = (text.removesuffix("\n\n").split("\n\n") for text in splits)
    assert sorted(train + val) == sorted({*topics, '"ASCII"'}) and len(val) == 11


def test_a_python_without_documentation_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="--input FILE"):
        prepare.prepare(tmp_path)


def test_docstrings_are_parsed_and_never_run(tmp_path):
    code = '''
"""Module."""
raise SystemExit
class A:
    """Class."""
    async def f():
        """F.

        Indented."""
'''
    (tmp_path / "a.py").write_text(code)
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text('"""Not prose."""')
    texts = [text for text in prepare.docstrings(tmp_path) if text]
    assert texts == ["Module.", "Class.", "F.\n\nIndented."]
