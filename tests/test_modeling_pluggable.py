"""modeling_pluggable.py: exported models in transformers, with the logits of model.py."""

import sys
from itertools import product

import pytest
import torch
from conftest import EVERY_ATTN_TYPE, subprocess_run

import export
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

T, V = 16, 40
OPTIONS = [
    {"norm": "fixed", "mlp_act": "quad", "attn_type": "GKpoly-4", "attn_decay": "fixed"},
    {"norm": "rms", "mlp_act": "relu-square", "position": "rope", "qk_norm": True},
    {"position": "rope", "attn_type": "PA_sigmoid", "pa_length": 24, "pa_length_power": 0.5},
    {"gelu": "tanh", "qk_norm": True, "attn_type": "GK", "attn_decay": "learned"},
]
EVERY = [
    {"attn_type": attn_type, "attn_decay": decay}
    for attn_type, decay in product(EVERY_ATTN_TYPE, ("none", "fixed", "learned"))
]


@pytest.fixture
def both(tmp_path, monkeypatch):
    """A random GPT, and what transformers makes of its exported folder: both(attn_type=..., ...)"""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # the cache is appended to it

    def call(**args):
        torch.manual_seed(0)
        shape = dict(block_size=T, vocab_size=V, n_layer=2, n_head=2, n_embd=32)
        model = GPT(GPTConfig(**shape | args)).eval()
        with torch.no_grad():
            for weight in model.state_dict().values():  # far from the initial values
                weight.add_(torch.randn_like(weight) * 0.1)
        export.write_folder(tmp_path / "hf", model.state_dict(), model.config)
        hf, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "hf", trust_remote_code=True, output_loading_info=True
        )
        assert not any(info.values()), info
        return model, hf

    return call


def assert_close(logits, expected, tolerance=2e-6):
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    "args", EVERY + OPTIONS, ids=lambda args: "-".join(map(str, args.values()))
)
def test_transformers_computes_the_same_logits(both, args):
    model, hf = both(**args)
    plain = args == {"attn_type": "SM", "attn_decay": "none"}
    assert (type(hf) is transformers.GPT2LMHeadModel) == plain
    idx = torch.randint(V, (2, T))
    # GKpoly-n multiplies what is rounded in 1 + x / 2^n by 2^n
    single = 2e-5 if model.config.attn_type == "GKpoly-8" else 2e-6
    for dtype, tolerance in ((torch.float32, single), (torch.float64, 1e-12)):
        model, hf = model.to(dtype), hf.to(dtype)
        expected = model(idx, idx)[0]
        assert_close(hf(idx).logits, expected, tolerance)
        # The same tokens in two parts, by a cache
        start = hf(idx[:, :9], use_cache=True)
        rest = hf(idx[:, 9:], past_key_values=start.past_key_values)
        assert_close(torch.cat((start.logits, rest.logits), 1), expected, tolerance)


@torch.no_grad()
@pytest.mark.parametrize("args", [{"attn_type": "GK"}, {"attn_type": "PA_relu"}, *OPTIONS])
def test_texts_of_several_lengths_are_continued_with_and_without_a_cache(both, args):
    model, hf = both(**args)
    prompts = [torch.randint(1, V, (n,)) for n in (3, 9)]
    padded = torch.stack([torch.cat((torch.zeros(9 - len(p), dtype=int), p)) for p in prompts])
    options = {"attention_mask": (padded > 0).long(), "max_new_tokens": 7, "pad_token_id": 0}
    options |= {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for cache in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}):
        drawn = hf.generate(padded, **options, **cache)
        for row, prompt in enumerate(prompts):
            expected = model.generate(prompt[None], 7, 0)[0]  # temperature 0
            assert torch.equal(drawn.sequences[row, 9 - len(prompt) :], expected), cache
        last = torch.cat((padded[1], drawn.sequences[1, 9:-1]))[None]
        assert_close(drawn.logits[-1][1], model(last)[0][0, -1])


def test_gradients_are_those_of_model_py(both):
    args = OPTIONS[0]
    model, hf = both(**args)
    idx = torch.randint(V, (2, T + 1))
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    torch.nn.functional.cross_entropy(
        hf(idx[:, :-1]).logits.flatten(0, 1), idx[:, 1:].flatten()
    ).backward()
    for name in ("transformer.wte.weight", "transformer.h.0.mlp.act.a", "transformer.ln_f.weight"):
        ours, theirs = (dict(m.named_parameters())[name].grad for m in (model, hf))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_folder_needs_nothing_of_this_repository(both, tmp_path):
    model, _ = both(attn_type="GK", attn_decay="fixed")
    code = """
import sys, torch, transformers
load = transformers.AutoModelForCausalLM.from_pretrained
try:
    raise SystemExit(type(load("hf", trust_remote_code=False)))  # softmax would be computed
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
model = load("hf", trust_remote_code=True)
assert not {"model", "engine", "kernels", "configurator"} & {*sys.modules}
print(model(torch.arange(5)[None]).logits[0, -1, :3].tolist())
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess_run("-c", code, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    expected = model(torch.arange(5)[None])[0][0, -1, :3]
    torch.testing.assert_close(torch.tensor(eval(done.stdout)), expected, rtol=1e-5, atol=1e-5)
