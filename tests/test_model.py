"""model.py: the attentions and the model against their formulas in numpy."""

import math
import re

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import EVERY_ATTN_TYPE

from model import ATTN_TYPES, GPT, GPTConfig, attention, parse_attn_type

erf = np.vectorize(math.erf)
NUMPY_F = {
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "square": lambda x: x**2,
    "relu-square": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "softplus": lambda x: np.log1p(np.exp(x)),
    "identity": lambda x: x,
}


def numpy_attention(attn_type, q, k, v, L):
    """y (T, hs) of q, k, v (T, hs) in float64, row by row as README's table defines it."""
    T, hs = q.shape
    y = np.zeros((T, hs))
    for i in range(T):
        dot = k[: i + 1] @ q[i] / math.sqrt(hs)
        x = -((q[i] - k[: i + 1]) ** 2).sum(1) / (2 * math.sqrt(hs))
        if attn_type == "SM":
            a = np.exp(dot - dot.max())
            a = a / a.sum()
        elif attn_type == "GK":
            a = np.exp(x)
        elif match := re.fullmatch(r"GKpoly-(\d+)", attn_type):
            n = int(match[1])
            a = (1 + x / 2**n) ** (2**n)
        else:
            a = NUMPY_F[attn_type.removeprefix("PA_")](dot) / L
        y[i] = a @ v[: i + 1]
    return y


def numpy_gpt(model, idx, targets):
    """Logits (B, T, V) and loss of a GPT, from its state dict, in float64."""
    state = {k: v.double().numpy() for k, v in model.state_dict().items()}
    config = model.config

    def linear(x, name):
        y = x @ state[f"{name}.weight"].T
        return y + state[f"{name}.bias"] if config.bias else y

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = x * state[f"{name}.weight"]
        return x + state[f"{name}.bias"] if config.bias else x

    logits = []
    for row in idx:
        x = state["transformer.wte.weight"][row] + state["transformer.wpe.weight"][: len(row)]
        for i in range(config.n_layer):
            block = f"transformer.h.{i}"
            qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
            q, k, v = np.split(qkv, 3, axis=1)
            heads = [
                numpy_attention(
                    config.attn_type,
                    *(np.split(m, config.n_head, 1)[h] for m in (q, k, v)),
                    config.block_size,
                )
                for h in range(config.n_head)
            ]
            x = x + linear(np.concatenate(heads, 1), f"{block}.attn.c_proj")
            hidden = NUMPY_F["gelu"](linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
            x = x + linear(hidden, f"{block}.mlp.c_proj")
        logits.append(norm(x, "transformer.ln_f") @ state["lm_head.weight"].T)
    logits = np.array(logits)
    log_z = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return logits, (log_z - picked).mean()


def tiny_gpt(attn_type="SM", **kwargs):
    """A 2-layer model whose weights are large enough for the attention to matter."""
    torch.manual_seed(0)
    config = dict(block_size=12, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**{**config, "attn_type": attn_type, **kwargs}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("impl, bias", [("reference", True), ("blockwise", False)])
@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_logits_and_loss_equal_an_independent_float64_forward(attn_type, impl, bias):
    if attn_type.startswith("PA_") and attn_type.removeprefix("PA_") not in NUMPY_F:
        pytest.skip(f"NUMPY_F has no formula of {attn_type} to compare with")
    model = tiny_gpt(attn_type, bias=bias, attn_impl=impl).eval()
    idx, targets = torch.randint(11, (3, 10)), torch.randint(11, (3, 10))
    logits, loss = model(idx, targets)
    expected_logits, expected_loss = numpy_gpt(model, idx.numpy(), targets.numpy())
    scale = np.abs(expected_logits).max()
    assert np.abs(logits.detach().numpy() - expected_logits).max() <= 1e-5 * max(1, scale)
    assert abs(loss.item() - expected_loss) <= 1e-5 * max(1, expected_loss)


@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_a_future_token_changes_no_earlier_logit_by_a_bit(attn_type):
    model = tiny_gpt(attn_type).eval()
    idx = torch.randint(11, (2, 12))
    changed = idx.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 11
    before, after = (model(i, targets=i)[0] for i in (idx, changed))
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_output_and_gradients_are_finite(attn_type):
    model = tiny_gpt(attn_type, dropout=0.1)
    idx = torch.randint(11, (2, 12))
    _, loss = model(idx, idx)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_one_token_is_enough(attn_type):
    model = tiny_gpt(attn_type).eval()
    assert model(torch.tensor([[3]]))[0].shape == (1, 1, 11)


@pytest.mark.parametrize("attn_type", [t for t in EVERY_ATTN_TYPE if t != "SM"])
def test_the_length_of_the_input_does_not_change_a_row(attn_type):
    q, k, v = torch.randn(3, 1, 2, 9, 4).unbind()
    attend = attention(attn_type, block_size=64)
    short = attend(*(m[:, :, :5] for m in (q, k, v)))
    torch.testing.assert_close(attend(q, k, v)[:, :, :5], short)


def test_pa_divides_by_a_power_of_the_trained_length():
    q, k, v = torch.randn(3, 1, 1, 6, 4).unbind()
    y = {
        p: attention("PA_relu", block_size=64, pa_length_power=p)(q, k, v) for p in (0.0, 0.5, 1.0)
    }
    torch.testing.assert_close(y[0.0], 8 * y[0.5])
    torch.testing.assert_close(y[0.0], 64 * y[1.0])


def test_an_overflow_among_hidden_scores_reaches_neither_output_nor_gradient():
    # Visible distances are 1 (within GKpoly-8's range), the hidden one of q_0 and k_1 is 3
    q, k = (torch.tensor(m).view(1, 1, 2, 1) * 28.0 for m in ([0.0, 2.0], [1.0, 3.0]))
    q.requires_grad_(), k.requires_grad_()
    assert parse_attn_type("GKpoly-8").f(-((q[0, 0, 0] - k[0, 0, 1]) ** 2) / 2).isinf()
    y = attention("GKpoly-8", block_size=2)(q, k, torch.ones(1, 1, 2, 1))
    y.sum().backward()
    assert y.isfinite().all() and q.grad.isfinite().all() and k.grad.isfinite().all()


def test_under_autocast_distances_are_computed_in_float32():
    q = 8 + torch.randn(1, 1, 6, 16)
    attend = attention("GK", block_size=6)
    half = [m.bfloat16() for m in (q, q + 0.1, torch.randn_like(q))]
    exact = attend(*(m.double() for m in half))
    with torch.autocast("cpu", torch.bfloat16):
        y = attend(*half)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("attn_type", ["SM", "GK"])  # the others differ from GK in an operator
def test_torch_compile_makes_one_graph_for_training_and_one_for_evaluation(attn_type):
    torch._dynamo.reset()
    counts = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = GPT(GPTConfig(8, vocab_size=11, n_layer=1, n_head=2, n_embd=8, attn_type=attn_type))
    compiled = torch.compile(model, fullgraph=True, backend=counts)
    for _ in range(3):
        idx = torch.randint(11, (2, 8))
        compiled(idx, idx, with_logits=False)[1].backward()
    with torch.no_grad():
        compiled.eval()(idx, idx, with_logits=False)
    assert counts.frame_count == 2


def test_the_implementation_is_no_property_of_the_model():
    config = GPTConfig(attn_type="GK", attn_impl="reference")
    assert "attn_impl" not in config.model_args()


def test_gkpoly_approaches_the_gaussian_kernel():
    x = torch.linspace(-10, 0, 100, dtype=torch.float64)
    errors = [
        (parse_attn_type(f"GKpoly-{n}").f(x) - x.exp()).abs().max().item() for n in (4, 8, 12)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


@pytest.mark.parametrize(
    "attn_type",
    ["", "gk", "sm", "GKpoly", "GKpoly-", "GKpoly-x", "GKpoly-0", "GKpoly-17", "GKpoly-8 "]
    + ["GKpoly-n", "PA", "PA_", "PA_none", "PA_relu-", "SM-1", "__import__('os')", None, 3],
)
def test_an_unknown_attn_type_is_a_value_error_that_names_the_valid_ones(attn_type):
    with pytest.raises(ValueError) as error:
        GPTConfig(attn_type=attn_type)
    assert all(name in str(error.value) for name in ATTN_TYPES)


def test_state_dict_has_the_names_and_shapes_of_nanogpt():
    shapes = {k: tuple(v.shape) for k, v in tiny_gpt("GK", n_layer=1).state_dict().items()}
    block = {
        "ln_1.weight": (16,),
        "ln_1.bias": (16,),
        "attn.c_attn.weight": (48, 16),
        "attn.c_attn.bias": (48,),
        "attn.c_proj.weight": (16, 16),
        "attn.c_proj.bias": (16,),
        "ln_2.weight": (16,),
        "ln_2.bias": (16,),
        "mlp.c_fc.weight": (64, 16),
        "mlp.c_fc.bias": (64,),
        "mlp.c_proj.weight": (16, 64),
        "mlp.c_proj.bias": (16,),
    }
    assert list(shapes.items()) == [
        ("transformer.wte.weight", (11, 16)),
        ("transformer.wpe.weight", (12, 16)),
        *((f"transformer.h.0.{name}", shape) for name, shape in block.items()),
        ("transformer.ln_f.weight", (16,)),
        ("transformer.ln_f.bias", (16,)),
        ("lm_head.weight", (11, 16)),
    ]


def test_model_args_of_a_softmax_model_are_nanogpts_and_others_add_theirs():
    nanogpt = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"}
    assert GPTConfig().model_args().keys() == nanogpt
    args = GPTConfig(attn_type="PA_relu", pa_length_power=0.5).model_args()
    assert args.keys() - nanogpt == {"attn_type", "pa_length", "pa_length_power"}
    assert GPTConfig(**args) == GPTConfig(attn_type="PA_relu", pa_length_power=0.5)


def test_cropping_the_context_keeps_logits_and_the_length_of_pa():
    model = tiny_gpt("PA_gelu").eval()
    idx = torch.randint(11, (2, 6))
    before, _ = model(idx)
    model.crop_block_size(6)
    assert torch.equal(model(idx)[0], before)
    assert model.config.block_size == 6 and model.config.model_args()["pa_length"] == 12
    with pytest.raises(ValueError, match="block_size=6"):
        model(torch.randint(11, (2, 7)))
    with pytest.raises(ValueError, match="1..6"):
        model.crop_block_size(7)


@pytest.mark.parametrize(
    "wrong",
    [{"n_embd": 15}, {"n_head": 0}, {"n_layer": "2"}, {"block_size": -1}, {"gelu": "x"}]
    + [{"dropout": 1}, {"pa_length": 0}, {"pa_length_power": 8}, {"attn_impl": "fast"}],
)
def test_a_config_that_can_not_be_built_is_a_value_error(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig(**{"n_embd": 16, "n_head": 2, **wrong})


def test_matrices_decay_and_vectors_do_not():
    model = tiny_gpt()
    decayed, others = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() >= 2 for p in decayed["params"])
    assert others["weight_decay"] == 0.0 and all(p.dim() < 2 for p in others["params"])
    n = sum(p.numel() for group in (decayed, others) for p in group["params"])
    assert n == model.get_num_params(non_embedding=False)


def test_mfu_counts_the_tokens_given_against_the_peak_given():
    model = tiny_gpt()
    per_token = 6 * model.get_num_params() + 12 * 2 * 16 * 6
    assert model.estimate_mfu(4, 0.5, seq_len=6, peak=1e9) == pytest.approx(
        per_token * 6 * 4 / 0.5 / 1e9
    )
    assert model.estimate_mfu(4, 0.5) is None  # a CPU has no entry


def test_generate_is_greedy_at_temperature_zero_and_draws_no_padding_id():
    model = tiny_gpt("GK").eval()
    idx = torch.tensor([[1, 2, 3]])
    greedy = model.generate(idx, 12, temperature=0, window_stride=1)  # runs past block_size
    for t in range(3, 15):
        logits, _ = model(greedy[:, :t][:, -12:])
        assert greedy[0, t] == logits[0, -1].argmax()
    drawn = model.generate(idx.expand(8, -1), 12, vocab_size=4)
    assert drawn.shape == (8, 15) and drawn.max() < 4
    torch.manual_seed(0)
    top_1 = model.generate(idx, 5, top_k=1)
    assert torch.equal(top_1, greedy[:, :8])
