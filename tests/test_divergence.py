"""divergence.py: the first module that makes something infinite out of finite numbers is named."""

import pytest
import torch

import model as model_module
from engine.divergence import where_it_began
from engine.runtime import Runtime
from model import GPT, GPTConfig, Pointwise

RT = Runtime("cpu", "float32", False)


def tiny(attn_type="GK"):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=11, n_layer=3, n_head=2, n_embd=16)
    return GPT(GPTConfig(**shape, attn_type=attn_type)), torch.randint(11, (2, 16))


def scale(weight, factor):
    with torch.no_grad():
        weight *= factor


def test_a_sound_model_gives_none():
    model, x = tiny()
    assert where_it_began(model, [(x, x), (x, x)], RT) is None
    assert all(p.grad is None for p in model.parameters())


def test_weights_come_first():
    model, x = tiny()
    scale(model.transformer.h[2].mlp.c_fc.weight[3:4, 3:4], float("nan"))
    assert (
        where_it_began(model, [(x, x)], RT)
        == "it began in the weights transformer.h.2.mlp.c_fc.weight"
    )


def test_a_layer_and_the_range_of_the_polynomial_are_named():
    model, x = tiny("GKpoly-4")
    scale(model.transformer.h[1].attn.c_attn.weight[:32], 3e3)
    message = where_it_began(model, [(x, x)], RT)
    assert message.startswith("it began in attn of layer 1; x fell to -")
    assert message.endswith("in layer 1, and GKpoly-4 needs -32 or more")


def test_of_several_micro_steps_the_bad_one_is_found():
    model, x = tiny()
    attn = model.transformer.h[1].attn
    attend = attn.attend
    attn.attend = lambda q, k, v, *_: attend(q, k, v) / (len(q) != 3)  # three are too many
    assert where_it_began(model, [(x, x)], RT) is None
    three = torch.randint(11, (3, 16))
    assert where_it_began(model, [(x, x), (three, three)], RT) == "it began in attn of layer 1"


@pytest.mark.parametrize("layer", [0, 2])
def test_a_gradient_is_named_when_the_loss_is_finite(monkeypatch, layer):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + 0

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    monkeypatch.setitem(model_module.POINTWISE, "PA_id", Pointwise("dot", lambda x: x, True))
    model, x = tiny("PA_id")
    attn = model.transformer.h[layer].attn
    attend = attn.attend
    attn.attend = lambda q, k, v, *_: attend(Bad.apply(q), k, v)
    message = where_it_began(model, [(x, x)], RT)
    assert message == f"it began in the gradient of attn of layer {layer}"
