"""model.py: the attentions against their formulas in numpy, the model against GPT-2."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import EVERY_ATTN_TYPE

import model as model_module
from model import (
    ATTN_TYPES,
    GPT,
    GPTConfig,
    Pointwise,
    attention,
    choose,
    parse_attn_type,
    peak_flops,
)

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
    """(T, hs) each, in float64, row by row as DESIGN's table defines it."""
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


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_logits_and_loss_equal_an_independent_float64_forward(attn_type, bias, impl):
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_output_and_gradients_are_finite(attn_type, bias):
    model = tiny_gpt(attn_type, bias=bias, dropout=0.1)
    idx = torch.randint(11, (2, 12))
    _, loss = model(idx, idx)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_one_token_is_enough(attn_type):
    model = tiny_gpt(attn_type).eval()
    assert model(torch.tensor([[3]]))[0].shape == (1, 1, 11)


@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_gradients_pass_gradcheck_in_float64(attn_type):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(attention(attn_type, block_size=8), (q, k, v))


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


@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_torch_compile_makes_one_graph_for_training_and_one_for_evaluation(attn_type):
    torch._dynamo.reset()
    counts = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = GPT(GPTConfig(8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, attn_type=attn_type))
    compiled = torch.compile(model, fullgraph=True, backend=counts)
    for _ in range(3):
        idx = torch.randint(11, (2, 8))
        compiled(idx, idx, with_logits=False)[1].backward()
    with torch.no_grad():
        compiled.eval()(idx, idx, with_logits=False)
    assert counts.frame_count == 2


def test_auto_takes_the_fastest_implementation_and_others_say_why_they_can_not_run():
    where = (64, torch.float32, "cpu")
    assert choose("auto", "GK", *where) == "blockwise"
    assert choose("auto", "SM", *where) == choose("triton", "SM", *where) == "SDPA"
    assert choose("reference", "GK", *where) == "reference"
    with pytest.raises(ValueError, match="need a CUDA device"):
        choose("triton", "GK", *where)
    with pytest.raises(ValueError, match="none of auto, reference, blockwise, triton"):
        choose("cuda", "GK", *where)
    with pytest.raises(ValueError, match="no dropout"):
        choose("triton", "GK", 64, torch.float32, "cuda", dropout=0.1)
    assert choose("auto", "GK", 64, torch.float32, "cuda", dropout=0.1) == "blockwise"


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
    [
        "",
        "gk",
        "sm",
        "GKpoly",
        "GKpoly-",
        "GKpoly-x",
        "GKpoly-0",
        "GKpoly-17",
        "GKpoly-8 ",
        "GKpoly-n",
    ]
    + ["PA", "PA_", "PA_none", "PA_relu-", "SM-1", "__import__('os')", None, 3],
)
def test_an_unknown_attn_type_is_a_value_error_that_names_the_valid_ones(attn_type):
    with pytest.raises(ValueError) as error:
        GPTConfig(attn_type=attn_type)
    assert all(name in str(error.value) for name in ATTN_TYPES)


def test_a_new_attention_is_one_entry_of_the_registry(monkeypatch):
    monkeypatch.setitem(
        model_module.POINTWISE, "PA_cube", Pointwise("dot", lambda x: x**3, by_length=True)
    )
    model = tiny_gpt("PA_cube")
    monkeypatch.setitem(NUMPY_F, "cube", lambda x: x**3)
    idx = torch.randint(11, (1, 8))
    logits, _ = model.eval()(idx, idx)
    expected, _ = numpy_gpt(model, idx.numpy(), idx.numpy())
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-5)


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
    [{"n_embd": 15}, {"n_head": 0}, {"n_layer": "2"}, {"block_size": -1}, {"gelu": "x"}],
)
def test_a_config_that_can_not_be_built_is_a_value_error(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig(**{"n_embd": 16, "n_head": 2, **wrong})


@pytest.fixture
def hf_folder(tmp_path):
    """A tiny random GPT-2 in transformers' own format."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=37, n_positions=24, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
    )
    hf = transformers.GPT2LMHeadModel(config).eval()
    hf.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", hf


def imports_as(folder, hf):
    """Whether from_pretrained(folder) computes what `hf` does."""
    model = GPT.from_pretrained(str(folder)).eval()
    idx = torch.randint(hf.config.vocab_size, (2, hf.config.n_positions))
    with torch.no_grad():
        logits, _ = model(idx, idx)
        expected = hf(idx).logits
    return (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def write_bin(folder, hf, state):
    hf.config.save_pretrained(folder)
    torch.save(state, folder / "pytorch_model.bin")


def test_from_pretrained_gives_the_logits_of_transformers(hf_folder):
    assert imports_as(*hf_folder)


@pytest.mark.parametrize("shape", [{"n_layer": 6}, {"vocab_size": 64}, {"vocab_size": 50257}])
def test_from_pretrained_takes_any_depth_and_vocabulary(tmp_path, shape):
    transformers = pytest.importorskip("transformers")
    config = {"vocab_size": 37, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, **shape}
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    hf.save_pretrained(tmp_path)
    assert imports_as(tmp_path, hf)


def test_from_pretrained_takes_a_bin_file_and_a_body_saved_without_its_head(hf_folder, tmp_path):
    _, hf = hf_folder
    write_bin(tmp_path / "bin", hf, hf.state_dict())
    hf.transformer.save_pretrained(tmp_path / "body")  # names without the prefix `transformer.`
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    write_bin(tmp_path / "old", hf, {**hf.transformer.state_dict(), **masks})
    for name in ("bin", "body", "old"):
        assert imports_as(tmp_path / name, hf), name


def test_an_output_layer_of_its_own_is_refused_whatever_the_config_says(hf_folder, tmp_path):
    _, hf = hf_folder
    state = {**hf.state_dict(), "lm_head.weight": torch.randn(37, 32)}
    for tied in (True, False):
        hf.config.tie_word_embeddings = tied
        write_bin(tmp_path / "untied", hf, state)
        with pytest.raises(ValueError, match="output layer of its own"):
            GPT.from_pretrained(str(tmp_path / "untied"))
    write_bin(tmp_path / "tied", hf, hf.state_dict())  # the config says False, the weights are one
    assert imports_as(tmp_path / "tied", hf)


def test_from_pretrained_reads_the_attention_that_config_json_names(hf_folder):
    folder = str(hf_folder[0])
    path = hf_folder[0] / "config.json"
    plain = json.loads(path.read_text())
    ours = {"attn_type": "PA_relu", "pa_length": 16, "pa_length_power": 0.5}
    path.write_text(json.dumps({**plain, **ours}))

    def attention_args(*args):
        config = GPT.from_pretrained(folder, *args).config
        return config.attn_type, config.pa_length, config.pa_length_power

    assert attention_args({}, 8) == ("PA_relu", 16, 0.5)
    assert attention_args({"attn_type": "PA_gelu", "pa_length": 4}) == ("PA_gelu", 4, 0.5)
    assert attention_args({"attn_type": "GK"}) == ("GK", None, 1.0)
    path.write_text(json.dumps({**plain, "attn_type": "PA_relu"}))
    assert attention_args({}, 8) == ("PA_relu", 8, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [{"attn_type": "eval"}, {"attn_type": None}, {"attn_type": ["GK"]}, {"pa_length_power": "1"}]
    + [{"attn_type": "PA_relu", "pa_length": L} for L in ("3", 0, True, 10**400)]
    + [{"n_head": "2"}, {"n_layer": 3}, {"n_embd": 10**12}, {"add_cross_attention": True}],
)
def test_a_config_json_that_can_not_be_is_a_value_error(hf_folder, wrong):
    path = hf_folder[0] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    with pytest.raises(ValueError):
        GPT.from_pretrained(str(hf_folder[0]))


def test_from_pretrained_takes_another_attention_and_dropout(hf_folder):
    model = GPT.from_pretrained(str(hf_folder[0]), {"attn_type": "GK", "dropout": 0.1})
    assert model.config.attn_type == "GK" and model.config.dropout == 0.1
    with pytest.raises(ValueError, match="n_layer"):
        GPT.from_pretrained(str(hf_folder[0]), {"n_layer": 1})


def test_from_pretrained_says_where_it_looked():
    with pytest.raises(OSError, match="HF_HOME"):
        GPT.from_pretrained("nobody/has-this-model")


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


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA B200", 2250),
        ("Some other GPU", None),
    ],
)
def test_peaks_are_found_by_the_name_of_the_gpu(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)


def test_generate_is_greedy_at_temperature_zero_and_draws_no_padding_id():
    model = tiny_gpt("GK").eval()
    idx = torch.tensor([[1, 2, 3]])
    greedy = model.generate(idx, 20, temperature=0, window_stride=1)  # runs past block_size
    for t in range(3, 23):
        logits, _ = model(greedy[:, :t][:, -12:])
        assert greedy[0, t] == logits[0, -1].argmax()
    drawn = model.generate(idx.expand(8, -1), 20, vocab_size=4)
    assert drawn.shape == (8, 23) and drawn.max() < 4
    torch.manual_seed(0)
    top_1 = model.generate(idx, 5, top_k=1)
    assert torch.equal(top_1, greedy[:, :8])
