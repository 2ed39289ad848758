"""engine/polynomial.py: folded matrices compute what torch does; the rest is refused."""

import numpy as np
import pytest
import torch

from configurator import UserError
from engine.polynomial import fold
from model import GPT, GPTConfig

ARGS = dict(block_size=16, vocab_size=30, n_layer=1, n_head=1, n_embd=32)
ARGS |= dict(attn_type="GKpoly-2", attn_decay="fixed", norm="fixed", mlp_act="quad")


def random_model(**args) -> GPT:
    """A polynomial model whose weights, buffers and biases are all far from their first values."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**ARGS, **args})).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


@pytest.mark.parametrize("attn_type", ["GKpoly-1", "GKpoly-4", "PA_square", "PA_identity"])
@pytest.mark.parametrize("decay", ["none", "fixed", "learned"])
@pytest.mark.parametrize("mlp_act", ["quad", "quartic"])
@pytest.mark.parametrize("others", [{}, {"bias": False}, {"lora_rank": 2}])
def test_the_polynomial_equals_torch_in_float64(attn_type, decay, mlp_act, others):
    args = dict(attn_type=attn_type, attn_decay=decay, mlp_act=mlp_act, **others)
    model = random_model(**args).double()
    polynomial = fold(model)
    for T in (1, 5, 16):
        ids = np.random.default_rng(T).integers(0, 30, T)
        with torch.no_grad():
            expected = model(torch.from_numpy(ids)[None])[0][0, -1].numpy()
        found = polynomial.logits(polynomial.embed(ids))
        assert np.abs(found - expected).max() <= 1e-10
        assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(
    "args, said",
    [
        (dict(norm="layer"), "norm=layer can't be encrypted, only norm=fixed"),
        (dict(norm="rms"), "norm=rms"),
        (dict(mlp_act="gelu"), "mlp_act=gelu can't be encrypted, only mlp_act=quad or quartic"),
        (dict(position="rope"), "position=rope"),
        (dict(qk_norm=True), "qk_norm=True"),
        (dict(attn_normalize=4), "attn_normalize=4"),
        (dict(n_layer=2), "n_layer=2"),
        (dict(n_head=2), "n_head=2"),
        (dict(attn_type="SM"), "SM is no polynomial"),
        (dict(attn_type="GK"), "GK is no polynomial"),
        (dict(attn_type="PA_gelu"), "PA_gelu is no polynomial"),
    ],
)
def test_what_is_no_polynomial_of_one_layer_is_refused(args, said):
    with pytest.raises(UserError, match=said) as refused:
        fold(random_model(**args))
    assert "train.py config/train_he.py" in str(refused.value)


def test_prompts_that_are_empty_too_long_or_out_of_range_are_refused():
    polynomial = fold(random_model())
    with pytest.raises(UserError, match="the prompt is empty; it must have 1 to 16"):
        polynomial.embed(np.arange(0))
    with pytest.raises(UserError, match="the prompt has 17 tokens"):
        polynomial.embed(np.arange(17))
    x = polynomial.embed(np.arange(9))
    polynomial.check_range(x)
    polynomial.query = 100 * polynomial.query
    with pytest.raises(UserError, match="outside the range -8 to 0 of GKpoly-2; .*GKpoly-3"):
        polynomial.check_range(x)
