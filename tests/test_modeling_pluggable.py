"""modeling_pluggable.py: exported models in transformers, with the logits of model.py."""

import pickle
import sys
from contextlib import suppress
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
    {"attn_type": "GKpoly-4", "attn_decay": "fixed", "attn_normalize": 4, "mlp_act": "quartic"},
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
@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_a_model_can_be_pickled(attn_type):
    from engine.modeling_pluggable import PluggableConfig, PluggableGPT

    config = PluggableConfig(attn_type=attn_type, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    hf, idx = PluggableGPT(config).eval(), torch.randint(V, (1, 8))
    assert torch.equal(pickle.loads(pickle.dumps(hf))(idx).logits, hf(idx).logits)


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


POSITIONS = [
    {"attn_type": "PA_relu"},
    {"attn_type": "GK", "position": "rope"},
    {"attn_type": "SM", "attn_decay": "fixed"},
    {"attn_type": "GK", "attn_decay": "fixed"},
]


@torch.no_grad()
@pytest.mark.parametrize("args", POSITIONS, ids=str)
def test_padding_in_the_middle_does_not_count_as_positions(both, args):
    model, hf = both(**args)
    texts = [torch.randint(1, V, (n,)) for n in (4, 9)]
    right_padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = (right_padded > 0).long()
    start = hf(right_padded, attention_mask=mask, use_cache=True)
    more = torch.randint(1, V, (2, 3))  # of each text, after the padding
    mask = torch.cat((mask, torch.ones_like(more)), dim=1)
    position_ids = (mask.cumsum(-1) - 1)[:, 9:]
    cache = {"past_key_values": start.past_key_values}
    rest = hf(more, attention_mask=mask, position_ids=position_ids, **cache)
    for row, text in enumerate(texts):
        whole = torch.cat((text, more[row]))[None]
        expected = model(whole, whole)[0][0]
        assert_close(start.logits[row, : len(text)], expected[: len(text)])
        assert_close(rest.logits[row], expected[len(text) :])


@torch.no_grad()
@pytest.mark.parametrize("args", POSITIONS, ids=str)
def test_texts_that_share_a_row_do_not_see_each_other(both, args):
    model, hf = both(**args)
    texts = [torch.randint(V, (1, n)) for n in (4, 9)]
    positions = torch.cat([torch.arange(text.size(1)) for text in texts])[None]
    logits = hf(torch.cat(texts, 1), position_ids=positions, use_cache=False).logits
    assert_close(logits, torch.cat([model(text, text)[0] for text in texts], 1))


@torch.no_grad()
def test_no_other_implementation_of_attention_is_ever_used(both):
    model, hf = both(attn_type="GK")
    idx = torch.arange(9)[None]
    for part, name in product((hf, hf.transformer), ("eager", "sdpa")):  # which are softmax
        with suppress(ValueError):
            part.set_attn_implementation(name)
        assert_close(hf(idx).logits, model(idx, idx)[0])


def test_an_unknown_attention_is_refused_when_the_model_is_built(both):
    _, hf = both(attn_type="GK")
    hf.config.attn_type = "GKpoly"
    with pytest.raises(ValueError, match="attn_type='GKpoly' is not known"):
        type(hf)(hf.config)


@torch.no_grad()
def test_folders_with_other_formulas_are_loaded_side_by_side(both, tmp_path):
    _, hf = both(attn_type="GK")
    idx = torch.arange(9)[None]
    expected = hf(idx).logits
    (tmp_path / "hf").rename(tmp_path / "other")
    path = tmp_path / "other" / "modeling_pluggable.py"
    text = path.read_text()
    assert text.count('"distance", torch.exp)') == 1
    path.write_text(text.replace('"distance", torch.exp)', '"distance", torch.zeros_like)'))
    load = transformers.AutoModelForCausalLM.from_pretrained
    other = load(tmp_path / "other", trust_remote_code=True)
    assert not torch.equal(other(idx).logits, expected)
    assert torch.equal(hf(idx).logits, expected)
    GPT.from_pretrained(str(tmp_path / "other"))  # has its own classes, and registers them nowhere
    assert type(load(tmp_path / "other", trust_remote_code=True).config) is type(other.config)


def test_new_weights_begin_with_the_reaches_of_model_py(both):
    model, hf = both(attn_type="GK", attn_decay="learned", pa_length=24)
    new = type(hf)(hf.config).transformer.h[0].attn.log_reach
    torch.testing.assert_close(new.exp(), model.transformer.h[0].attn.fixed_reach.float())


@torch.no_grad()
@pytest.mark.parametrize("args", [{"attn_type": "GKpoly-4", "attn_decay": "learned"}, OPTIONS[1]])
def test_the_compiler_takes_the_whole_model(both, args):
    _, hf = both(**args)
    idx = torch.arange(9)[None]
    compiled = torch.compile(hf, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(idx).logits, hf(idx).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits(both, tmp_path, dtype):
    model, _ = both(**OPTIONS[3])
    load = transformers.AutoModelForCausalLM.from_pretrained
    hf = load(tmp_path / "hf", trust_remote_code=True, dtype=dtype)
    assert {weight.dtype for weight in hf.parameters()} == {dtype}
    idx = torch.randint(V, (2, T))
    assert_close(hf(idx).logits, model(idx, idx)[0], 3e-2)


def test_a_folder_that_transformers_saved_is_loaded_by_both(both, tmp_path):
    model, hf = both(**OPTIONS[3])
    hf.save_pretrained(tmp_path / "again")
    load = transformers.AutoModelForCausalLM.from_pretrained
    again = load(tmp_path / "again", trust_remote_code=True)
    idx = torch.randint(V, (2, T))
    assert torch.equal(again(idx).logits, hf(idx).logits)
    ours = GPT.from_pretrained(str(tmp_path / "again")).eval()
    assert torch.equal(ours(idx, idx)[0], model(idx, idx)[0])
    assert ours.config == model.config


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
