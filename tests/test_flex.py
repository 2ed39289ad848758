"""engine/flex.py: FlexAttention computes the attentions that it is measured for."""

import pytest
import torch

from engine import flex
from model import attention


@pytest.mark.parametrize("attn_type", ["SM", "GK"])
@pytest.mark.filterwarnings("ignore")  # torch advises to compile it, which takes seconds
def test_flex_attention_is_the_formula(monkeypatch, attn_type):
    compile = torch.compile  # FlexAttention itself calls it, with options
    eager = lambda function, **options: compile(function, **options) if options else function
    monkeypatch.setattr(torch, "compile", eager)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 128, 16).unbind(0)
    expected = attention(attn_type, 128, impl="reference")(q, k, v)
    got = flex.attention(attn_type, 128, "cpu")(q, k, v)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_what_can_not_be_measured_says_why():
    assert "CUDA only" in flex.refusal("SM", 64, "cpu")
    assert "not for PA_relu" in flex.refusal("PA_relu", 64, "cuda")
    assert "not 768" in flex.refusal("GK", 768, "cuda") and flex.refusal("GK", 64, "cuda") is None
