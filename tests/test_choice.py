"""kernels/choice.py: the fastest implementation that can run is chosen, and refusals say why."""

import pytest
import torch
import torch._dynamo.testing

from kernels.choice import is_small
from model import attention, choose


def test_auto_takes_the_fastest_implementation_and_others_say_why_they_can_not_run():
    on_cpu = 64, torch.float32, "cpu"
    assert choose("auto", "GK", *on_cpu) == "blockwise"
    assert choose("auto", "SM", *on_cpu) == choose("triton", "SM", *on_cpu) == "SDPA"
    assert choose("reference", "GK", *on_cpu) == "reference"
    with pytest.raises(ValueError, match="need a CUDA device"):
        choose("triton", "GK", *on_cpu)
    with pytest.raises(ValueError, match="not one of auto, reference, blockwise, triton"):
        choose("cuda", "GK", *on_cpu)
    with pytest.raises(ValueError, match="no dropout"):
        choose("triton", "GK", 64, torch.float32, "cuda", dropout=0.1)
    assert choose("auto", "GK", 64, torch.float32, "cuda", dropout=0.1) == "blockwise"


def test_a_wide_head_takes_the_formula_on_a_gpu_while_its_matrices_are_small():
    wide, narrow = ((hs, torch.bfloat16, "cuda", 0.1) for hs in (768, 256))  # no Triton: dropout
    assert is_small(16, 16, 1024) and not is_small(16, 16, 1025)
    assert choose("auto", "GK", *wide) == choose("auto", "GK", *wide, small=True) == "reference"
    assert choose("auto", "GK", *wide, small=False) == "blockwise"
    assert choose("auto", "GK", *narrow) == "blockwise"
    assert choose("auto", "GK", 768, torch.float32, "cpu") == "blockwise"
    assert choose("blockwise", "GK", *wide) == "blockwise"


def test_compiled_attention_takes_any_length_without_a_graph_break_or_a_second_compilation():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    attend = attention("GK", 64)
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for T in (33, 34, 50):
        q, k, v = torch.randn(3, 2, 1, T, 16).unbind()
        for t in (q, k, v):
            torch._dynamo.mark_dynamic(t, 2)
        torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
    assert counter.frame_count == 1
