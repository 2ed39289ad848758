"""kernels/choice.py: the fastest implementation that can run is chosen, and refusals say why."""

import pytest
import torch
import torch._dynamo.testing

from model import choose


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
