"""One line in model.py's registry is all that a new attention takes, or a change to an old one."""

import os
import re
import shutil

import pytest
import torch
from conftest import ROOT, TINY, subprocess_run, write_dataset

import model
from model import Pointwise, attention, choose, refusals

# Asks for help, trains two steps, samples, benches and runs the suite's walks, in one process
SCRIPT = """
import sys
import pytest
import bench, configurator, sample, train

def call(script, *args):
    sys.argv = [f"{script.__name__}.py", *args]
    try:
        configurator.run(script.main)
    except SystemExit as stop:
        assert not stop.code, stop.code

assert "PA_cube" in configurator.help_text(train.Config)
tiny, *tests = sys.argv[1].split(","), *sys.argv[2:]
call(train, *tiny, "--attn_type=PA_cube", "--dataset=abc", "--data_dir=sets", "--max_iters=2")
call(sample, "--num_samples=1", "--max_new_tokens=5", "--start=the", "--device=cpu")
shapes = ["--min_T=16", "--max_T=16", "--steps=1", "--warmup=0"]
call(bench, *tiny, *shapes, "--table=attention", "--attn_types=PA_cube")
sys.exit(pytest.main(["-p", "no:cacheprovider", "-rs", "-k", "cube", *tests]))
"""
WALKS = ["model", "blockwise", "generation", "lora"]


def test_the_line_in_the_readme_adds_an_attention_everywhere(tmp_path):
    line = re.search(r'^ *"PA_cube": Pointwise.*$', (ROOT / "README.md").read_text(), re.M)[0]
    for folder in (".", "kernels", "engine", "data", "config", "tests"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for source in [*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("*.c")]:
            shutil.copy(source, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = (tmp_path / "model.py").read_text()
    assert source.count("POINTWISE = {\n") == 1
    (tmp_path / "model.py").write_text(
        source.replace("POINTWISE = {\n", f"POINTWISE = {{\n{line}\n")
    )
    write_dataset(tmp_path / "sets" / "abc", "the cat sat on the mat, and the dog sat too.\n" * 40)

    tests = [f"tests/test_{name}.py" for name in WALKS]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess_run("-c", SCRIPT, ",".join(TINY), *tests, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"PA_cube +blockwise +16", done.stdout)  # of bench
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 10
    skips = re.findall(r"SKIPPED \[\d+\].*", done.stdout)
    assert len(skips) == 1 and "[2]" in skips[0] and "NUMPY_F has no formula" in skips[0]


def test_an_edited_formula_is_what_every_implementation_computes(monkeypatch):
    cube = Pointwise("dot", lambda x: x**3, by_length=True)
    monkeypatch.setitem(model.POINTWISE, "PA_gelu", cube)
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64).unbind()
    expected = ((q @ k.mT / 2) ** 3).tril() @ v / 16
    reasons = refusals("PA_gelu", 4, torch.float64, "cpu")
    can_run = [impl for impl, reason in reasons.items() if reason is None]
    assert can_run == ["blockwise", "reference"]
    for impl in can_run:
        torch.testing.assert_close(attention("PA_gelu", 16, impl=impl)(q, k, v), expected)


@pytest.mark.parametrize("name", ["PA_gelu", "GKpoly-n"])
@pytest.mark.parametrize("edit", [{"f": lambda x, n=1: x**3}, {"score": "none of the kernels'"}])
def test_triton_refuses_an_edited_entry_and_auto_takes_another(monkeypatch, name, edit):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setitem(model.POINTWISE, name, model.POINTWISE[name]._replace(**edit))
    on_gpu = name.replace("-n", "-4"), 64, torch.bfloat16, "cuda"
    with pytest.raises(ValueError, match="another formula than model.py's registry"):
        choose("triton", *on_gpu)
    assert choose("auto", *on_gpu) == "blockwise"
