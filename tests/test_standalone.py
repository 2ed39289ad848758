"""standalone.py: one file that does what a module and its imports do."""

import re

import pytest

from engine import standalone

FILES = {
    "main.py": '''"""What it is for: é."""

import math
import os.path as osp
from pack import part as p
from pack.other import twice

SIZE = 2


@staticmethod
def run(x):
    """é"""; return twice(p.area(x)) * SIZE  # é
''',
    "pack/part.py": '''"""Another docstring."""
from math import pi

TABLE = {"full": lambda r: pi * r}  # a comment
def unused(): return TABLE
def area(r): return TABLE["full"](r) * r
''',
    "pack/other.py": "from pack import part\ndef twice(x: float) -> float:\n    return 2 * x\n",
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(standalone, "ROOT", tmp_path)
    (tmp_path / "pack").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_what_is_referred_to_is_written_into_the_file_and_nothing_else(files):
    text = standalone.standalone(files / "main.py")
    names = {}
    exec(text, names)
    assert names["run"].__func__(3.0) == pytest.approx(2 * 3.1415926535 * 9 * 2)
    assert names["__doc__"] == "What it is for: é." and "a comment" in text
    assert not re.search("unused|osp|pack|Another", text)
    assert text.index("TABLE =") < text.index("def area") < text.index("def run")


def test_two_definitions_of_one_name_are_refused(files):
    (files / "pack" / "other.py").write_text("SIZE = 3\ndef twice(x): return SIZE * x\n")
    with pytest.raises(ValueError, match="SIZE is defined in both .*other.py"):
        standalone.standalone(files / "main.py")
    (files / "third.py").write_text("from main import run as go\ngo(1)\n")
    with pytest.raises(ValueError, match="gives run another name, go"):
        standalone.standalone(files / "third.py")


@pytest.mark.parametrize(
    "code, value",
    [
        ("import os.path\ndef f(x): return x + len(os.path.sep)", 2),
        ("import os, os.path as here\ndef f(x): return x + len(here.sep + os.sep)", 3),
        ("a, b = 2, 3\ndef f(x): return x + a * b", 7),
        ("C = 1\nC += 1\ndef f(x): return C * x", 2),
        ("if True:\n    def f(x): return x + 1", 2),
        ("TABLE = {}\nTABLE['a'] = 3\ndef f(x): return TABLE['a']", 3),
        ("try:\n    import no\nexcept ImportError:\n    no = 4\ndef f(x): return no", 4),
        ("def f(x):\n    import math as m\n    return m.floor(x)", 1),
    ],
)
def test_names_may_be_defined_in_any_way(files, code, value):
    (files / "pack" / "mine.py").write_text(code + "\n")
    (files / "user.py").write_text("from pack.mine import f\nfound = f(1)\n")
    names = {}
    exec(standalone.standalone(files / "user.py"), names)
    assert names["found"] == value


@pytest.mark.parametrize(
    "code, problem",
    [
        ("import pack.part\ndef f(x): return pack.part.area(x)", "says import pack.part"),
        ("def f(x):\n    from pack import part\n    return x", "inside a function"),
        ("def f(x):\n    from pack.part import area\n    return x", "inside a function"),
        ("def f(x):\n    import pack.part\n    return x", "inside a function"),
        (
            "from pack import part\ndef f(part): return part.real",
            "part in line 2 .* a module too; rename it",
        ),
        ("from pack import part\ndef f(x):\n    part = x\n    return part.real", "a module too"),
    ],
)
def test_what_would_break_elsewhere_is_refused(files, code, problem):
    (files / "pack" / "mine.py").write_text(code + "\n")
    (files / "user.py").write_text("from pack.mine import f\nfound = f(1)\n")
    with pytest.raises(ValueError, match=problem):
        standalone.standalone(files / "user.py")
