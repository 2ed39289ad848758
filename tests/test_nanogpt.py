"""engine/nanogpt.py: nanoGPT is measured in a process of its own."""

import re

import pytest
from conftest import Failed
from test_bench import SMALL


def test_nanogpt_is_measured_beside_this_project(run, tmp_path):
    """A stand-in with nanoGPT's interface: it prints, and forward knows only idx and targets."""
    (tmp_path / "model.py").write_text(
        "import model\n"
        "class GPTConfig(model.GPTConfig): pass\n"
        "class GPT(model.GPT):\n"
        "    def __init__(self, config): super().__init__(config); print('number of parameters')\n"
        "    def forward(self, idx, targets): return super().forward(idx, targets)\n"
    )
    out = run("bench", *SMALL, "--attn_type=GK", "--nanogpt=.")
    assert re.search(r"nanoGPT .*\nGK +blockwise", out) and "parameters" not in out
    (tmp_path / "model.py").write_text("import nothing_that_is_there\n")
    with pytest.raises(Failed, match="nanoGPT's process ended with exit code 1"):
        run("bench", *SMALL, "--nanogpt=.")
