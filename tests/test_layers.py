"""engine/layers.py: each option against its formula in numpy, and through every path of a run."""

import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import ROOT, TINY, Failed, subprocess_run
from test_generation import PROMPTS, greedy, without_cache
from test_model import erf, numpy_attention
from test_train import same_training_state

from engine import checkpoint as ckpt
from engine import layers, ranges
from engine.lora import fold_lora
from engine.runtime import Runtime
from model import GPT, GPTConfig, attention, parse_attn_type

POLYNOMIAL = {"norm": "fixed", "mlp_act": "quad"}
MODERN = {"norm": "rms", "mlp_act": "relu-square", "position": "rope", "qk_norm": True}
OPTIONS = [POLYNOMIAL, MODERN, {**POLYNOMIAL, "position": "rope"}, {"qk_norm": True, "bias": False}]
OPTIONS += [{"norm": "fixed", "mlp_act": "quartic"}]
SHAPE = dict(block_size=8, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
RT = Runtime("cpu", "float32", False)
AS_FLAGS = lambda options: [f"--{key}={value}" for key, value in options.items()]


def tiny(attn_type="GK", **options):
    """A model whose parts all matter: no weight, gain or constant is at its first value."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, "attn_type": attn_type, **options})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4).add_(0.2 * torch.randn_like(p)) if p.dim() > 1 else p.add_(
                0.1 * torch.randn_like(p)
            )
        for norm in layers.fixed_norms(model):
            norm.std.uniform_(0.7, 1.5)
    return model


def numpy_logits(model, row):
    """Logits (T, V) of a row of ids, from the state dict, by the formulas of layers.py's table."""
    w = {name: t.double().numpy() for name, t in model.state_dict().items()}
    c, T = model.config, len(row)

    def add_bias(y, name):
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        if c.norm == "layer":
            y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        elif c.norm == "rms":
            y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        else:
            y = centred / w[f"{name}.std"]
        return add_bias(y * w[f"{name}.weight"], name)

    def linear(x, name):
        return add_bias(x @ w[f"{name}.weight"].T, name)

    def act(x, name):
        if c.mlp_act == "gelu":
            return x * (1 + erf(x / math.sqrt(2))) / 2
        if c.mlp_act == "relu-square":
            return np.maximum(x, 0) ** 2
        if c.mlp_act == "quartic":
            return 0.5 * x + 0.25 * x**2 - 0.006 * x**4
        return w[f"{name}.a"] * x**2 + w[f"{name}.b"] * x

    def prepare(x, gain):  # (T, hs)
        if c.qk_norm:
            x = gain * x.shape[1] ** 0.25 * x / np.linalg.norm(x, axis=1, keepdims=True)
        if c.position == "rope":
            half = x.shape[1] // 2
            turn = np.exp(1j * np.outer(np.arange(T), 10000.0 ** (-np.arange(half) / half)))
            turned = (x[:, :half] + 1j * x[:, half:]) * turn
            x = np.concatenate([turned.real, turned.imag], 1)
        return x

    x = w["transformer.wte.weight"][row]
    if c.position == "learned":
        x = x + w["transformer.wpe.weight"][:T]
    for i in range(c.n_layer):
        block, heads = f"transformer.h.{i}", []
        qkv = np.split(linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn"), 3, 1)
        for h in range(c.n_head):
            q, k, v = (np.split(m, c.n_head, 1)[h] for m in qkv)
            gain = w[f"{block}.attn.qk.gain"][h] if c.qk_norm else None
            q, k = prepare(q, gain), prepare(k, gain)
            heads.append(numpy_attention(c.attn_type, q, k, v, c.block_size))
        x = x + linear(np.concatenate(heads, 1), f"{block}.attn.c_proj")
        hidden = act(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"), f"{block}.mlp.act")
        x = x + linear(hidden, f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize("attn_type", ["SM", "GK", "PA_relu"])
@pytest.mark.parametrize("options", OPTIONS)
def test_logits_equal_an_independent_float64_forward(options, attn_type, impl):
    model, row = tiny(attn_type, **options, attn_impl=impl), torch.randint(31, (8,))
    expected = numpy_logits(model, row.numpy())
    got = model(row[None], row[None])[0][0].detach().numpy()
    assert np.abs(got - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("attn_type", ["SM", "GK"])
def test_greedy_tokens_are_those_without_a_cache_for_prompts_of_any_length(options, attn_type):
    model = tiny(attn_type, **options)
    idx = torch.randint(31, (3, 3))
    expected = without_cache(model, idx, 14)
    assert len(expected.unique()) > 3
    assert torch.equal(model.generate(idx, 14, temperature=0, window_stride=1), expected)
    together = greedy(model, PROMPTS, 12, samples=2, window_stride=3)
    alone = [greedy(model, [p], 12, samples=2, window_stride=3) for p in PROMPTS]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_future_token_changes_no_earlier_logit(options):
    model = tiny(**options)
    idx = torch.randint(31, (2, 8))
    changed = idx.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 31
    before, after = (model(i, i)[0] for i in (idx, changed))
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before, after)


@pytest.mark.parametrize("options", OPTIONS)
def test_every_weight_gets_a_gradient_and_compiles_into_one_graph(options):
    torch._dynamo.reset()
    counts = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model, idx = tiny(**options).train(), torch.randint(31, (2, 8))
    compiled = torch.compile(model, fullgraph=True, backend=counts)
    for _ in range(2):
        compiled(idx, idx, with_logits=False)[1].backward()
    assert counts.frame_count == 1
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    for norm in layers.fixed_norms(model):
        assert norm.seen[1] == 2 and norm.seen[0] > 0


def test_names_in_the_state_dict_and_in_model_args():
    nanogpt = GPT(GPTConfig(**SHAPE)).state_dict().keys()
    polynomial, modern = (GPT(GPTConfig(**SHAPE, **o)) for o in (POLYNOMIAL, MODERN))
    h = [f"transformer.h.{i}" for i in (0, 1)]
    norms = [f"{block}.ln_{i}.std" for block in h for i in (1, 2)] + ["transformer.ln_f.std"]
    assert polynomial.state_dict().keys() - nanogpt == {
        *norms, *(f"{block}.mlp.act.{x}" for block in h for x in "ab")
    }  # fmt: skip
    state = modern.state_dict()
    assert state.keys() - nanogpt == {f"{block}.attn.qk.gain" for block in h}
    assert "transformer.wpe.weight" not in state and not any("ln_1.bias" in n for n in state)
    assert MODERN.items() <= modern.config.model_args().items()
    assert not set(layers.OPTIONS) & GPTConfig().model_args().keys()
    n = modern.get_num_params()
    assert n == modern.get_num_params(non_embedding=False) == sum(map(torch.numel, state.values()))\
        - state["lm_head.weight"].numel()  # fmt: skip


@pytest.mark.parametrize(
    "wrong", [{"norm": "x"}, {"mlp_act": "x"}, {"position": 0}, {"qk_norm": 1}]
)
def test_an_unknown_option_is_a_value_error(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig(**wrong)
    with pytest.raises(ValueError, match="an even multiple of n_head=2, as rope needs"):
        GPTConfig(n_embd=6, n_head=2, position="rope")


# ---- Queries and keys -------------------------------------------------------


def test_rotation_keeps_norms_and_makes_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 3, 6, 8, dtype=torch.float64).unbind()
    pos = torch.arange(6)
    near, far = ([layers.rotate(x, p) for x in (q, k)] for p in (pos, pos + 1000))
    torch.testing.assert_close(near[0] @ near[1].mT, far[0] @ far[1].mT)
    torch.testing.assert_close(near[0].norm(dim=-1), q.norm(dim=-1))
    assert not torch.allclose(near[0] @ near[1].mT, q @ k.mT)
    rows = layers.rotate(q, torch.stack((pos, pos + 3))[:1])  # positions of each row of a batch
    torch.testing.assert_close(rows, near[0])


@pytest.mark.parametrize("n", [2, 4, 5])
def test_gkpoly_is_in_range_exactly_while_the_gain_is_at_most_2_to_the_half_n(n):
    config = GPTConfig(**SHAPE, attn_type=f"GKpoly-{n}", qk_norm=True)
    qk, hs = layers.QueriesAndKeys(config).double(), 8
    opposite = torch.randn(1, 2, 1, hs, dtype=torch.float64)
    A = {}
    for factor in (0.999, 1.001):
        torch.nn.init.constant_(qk.gain, factor * 2 ** (n / 2))
        q, k = qk(opposite, -3 * opposite, torch.arange(1))
        x = -((q - k) ** 2).sum(-1) / (2 * math.sqrt(hs))
        torch.testing.assert_close(x, -2 * qk.gain[None, :, None] ** 2)  # the lowest that there is
        A[factor] = attention(config.attn_type, 8)(q, k, torch.ones_like(q))
        torch.testing.assert_close(A[factor][..., 0], parse_attn_type(config.attn_type).f(x))
        assert (x >= ranges.range_end(n)).all() == (factor < 1)
    assert A[0.999].max() <= 1 < A[1.001].min()


def test_ranges_are_measured_on_what_attention_reads():
    model = tiny("GKpoly-4", **MODERN)
    rows = ranges.measure(model, torch.randint(31, (2, 8)), RT)
    for row in rows:
        gain = model.transformer.h[row["layer"]].attn.qk.gain[row["head"]].item()
        for name in ("q_mean", "q_max", "k_mean", "k_max"):
            assert row[name] == pytest.approx(abs(gain) * 8**0.25, rel=1e-5)
        assert -2 * gain**2 * (1 + 1e-5) <= row["x_min"]


def test_a_shorter_context_takes_nothing_from_rope():
    model, idx = tiny(**MODERN), torch.randint(31, (2, 4))
    before = model(idx)[0]
    model.crop_block_size(4)
    assert torch.equal(model(idx)[0], before) and model.config.block_size == 4


# ---- The constant of norm=fixed ---------------------------------------------


def test_the_constant_follows_what_all_micro_steps_saw_and_only_updates_count():
    norm = layers.FixedNorm(16, bias=True).train()
    x = torch.randn(3, 2, 4, 16) * 2 + 1
    norm.std.fill_(1.5)
    for part in x:
        norm(part)
    norm.eval()(100 * x)  # an evaluation in between
    keep = layers.FixedNorm.KEEP
    expected = math.sqrt(keep * 1.5**2 + (1 - keep) * x.var(-1, unbiased=False).mean())
    layers.track(norm, RT, updated=True)
    assert norm.std.item() == pytest.approx(expected, rel=1e-6) and not norm.seen.any()
    before = norm.std.clone()
    norm.train()(100 * x)
    layers.track(norm, RT, updated=False)
    layers.track(norm, RT, updated=True)  # nothing was seen since
    assert torch.equal(norm.std, before)


def test_no_gradient_flows_through_the_constant():
    norm, x = layers.FixedNorm(4, bias=False).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    norm.std.fill_(1.3)
    torch.autograd.gradcheck(norm, x.requires_grad_())
    jacobian = torch.autograd.functional.jacobian(norm, x[0, 0])
    torch.testing.assert_close(jacobian, (torch.eye(4).double() - 0.25) / norm.std)


def test_training_begins_with_the_constants_of_the_first_batch(run_train, tmp_path):
    run_train("--out_dir=run", *AS_FLAGS(POLYNOMIAL), "--max_iters=0")
    state = ckpt.load(tmp_path / "run" / "ckpt.pt")["model"]
    embedded = math.sqrt(2) * 0.02  # token and position
    assert state["transformer.h.0.ln_1.std"].item() == pytest.approx(embedded, rel=0.2)
    assert state["transformer.ln_f.std"] > state["transformer.h.0.ln_1.std"]
    run_train("--out_dir=trained", *AS_FLAGS(POLYNOMIAL), "--max_iters=2")
    trained = ckpt.load(tmp_path / "trained" / "ckpt.pt")["model"]
    assert all(trained[name] != state[name] for name in state if name.endswith(".std"))


@pytest.mark.parametrize("options", [POLYNOMIAL, MODERN])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(run_train, tmp_path, options):
    args = [*AS_FLAGS(options), "--attn_type=GKpoly-4", "--lr_decay_iters=6", "--anneal_iters=5"]
    run_train(*args, "--out_dir=whole", "--max_iters=6")
    run_train(*args, "--out_dir=run", "--max_iters=3")
    run_train("--out_dir=run", "--init_from=resume", "--max_iters=6", "--lr_decay_iters=6")
    assert same_training_state(tmp_path / "whole", tmp_path / "run")
    with pytest.raises(Failed, match="was trained with norm="):
        run_train("--out_dir=run", "--init_from=resume", "--norm=layer")


@pytest.mark.parametrize("mlp_act", ["quad", "quartic"])
def test_an_annealed_model_goes_from_gpt2s_parts_to_the_polynomial_in_training(mlp_act):
    model, idx = tiny(norm="fixed", mlp_act=mlp_act), torch.randint(31, (2, 8))
    gpt2 = tiny()
    gpt2.load_state_dict(model.state_dict(), strict=False)
    logits = lambda model: model(idx, idx)[0].detach()
    alone = logits(model)
    layers.anneal(model, 0, 4)
    assert torch.equal(logits(model), alone)  # in evaluation
    assert torch.equal(logits(model.train()), logits(gpt2))
    x = torch.randn(3, 16)
    for part in (module for module in model.modules() if isinstance(module, layers.Annealed)):
        layers.anneal(model, 1, 4)
        expected = 0.75 * part.gpt2(x) + 0.25 * part.polynomial(x)
        torch.testing.assert_close(part(x), expected)
    layers.anneal(model, 4, 4)
    assert torch.equal(logits(model), alone)


def test_annealing_changes_its_own_steps_and_is_not_inherited(run_train, tmp_path):
    args = [*AS_FLAGS(POLYNOMIAL), "--learning_rate=0.01"]
    run_train("--out_dir=plain", *args)
    run_train("--out_dir=annealed", *args, "--anneal_iters=3")
    assert not same_training_state(tmp_path / "plain", tmp_path / "annealed")
    run_train("--init_from=finetune", "--out_dir=annealed", "--save_dir=tuned", "--max_iters=1")
    assert ckpt.load(tmp_path / "tuned" / "ckpt.pt")["config"]["anneal_iters"] == 0
    with pytest.raises(Failed, match="anneal_iters=3, not 2"):
        run_train("--out_dir=annealed", "--init_from=resume", "--anneal_iters=2")


def test_an_exported_model_keeps_its_constants(run, run_train, data_dir):
    pytest.importorskip("transformers")
    run_train("--out_dir=run", *AS_FLAGS(POLYNOMIAL), "--max_iters=10")
    run("export", "--out_dir=run", "--to=lm")
    args = ["--eval_only=True", "--dataset=abc", f"--data_dir={data_dir}", *TINY]
    losses = lambda *source: run("train", *source, *args).splitlines()[-1]
    assert losses("--init_from=lm") == losses("--init_from=resume", "--out_dir=run")


def test_weights_that_a_conversion_leaves_out_are_named(run_train, tmp_path, capsys):
    run_train("--out_dir=run", "--bias=True", "--max_iters=0")
    path = tmp_path / "run" / "ckpt.pt"
    checkpoint = ckpt.load(path)
    ckpt.build_model(checkpoint, path, norm="rms", lora_rank=0)
    told = capsys.readouterr().err
    assert told == f"{path}: left out ln_1.bias, ln_2.bias, ln_f.bias: this model has none\n"
    ckpt.build_model(checkpoint, path, norm="fixed", lora_rank=0)
    assert capsys.readouterr().err == ""


def test_two_ranks_have_the_constants_of_one(run_train, tmp_path, data_dir):
    args = [*AS_FLAGS(POLYNOMIAL), "--attn_type=GKpoly-4", "--gradient_accumulation_steps=2"]
    run_train("--out_dir=one", *args)
    run_train("--out_dir=two", *args, "--max_iters=0", "--lr_decay_iters=4")
    resume = ["--out_dir=two", "--init_from=resume", "--max_iters=4", "--lr_decay_iters=4"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    resume += [f"--data_dir={data_dir}", "--device=cpu"]
    done = subprocess_run(*torchrun, ROOT / "train.py", *resume, cwd=tmp_path)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert same_training_state(tmp_path / "one", tmp_path / "two")


def test_finetuning_to_other_options_begins_where_the_weights_are(run_train, tmp_path):
    run_train("--out_dir=run", "--bias=True", "--learning_rate=0.01", "--max_iters=20")
    load = lambda name: ckpt.load(tmp_path / name / "ckpt.pt")
    before, tune = load("run"), ["--init_from=finetune", "--out_dir=run"]
    run_train(*tune, *AS_FLAGS(POLYNOMIAL), "--save_dir=poly", "--max_iters=0")
    poly = load("poly")
    assert POLYNOMIAL.items() <= poly["model_args"].items()
    assert all(torch.equal(t, poly["model"][name]) for name, t in before["model"].items())
    assert poly["best_val_loss"] < before["best_val_loss"] + 0.2
    run_train(*tune, "--norm=rms", "--qk_norm=True", "--save_dir=rms", "--max_iters=1")
    assert load("rms")["model"]["transformer.h.0.attn.qk.gain"].shape == (2,)
    with pytest.raises(Failed, match="position=learned, not rope"):
        run_train(*tune, "--position=rope", "--save_dir=rope")


def test_adapters_leave_the_constants_alone(run_train, tmp_path):
    args = ["--out_dir=run", "--lora_rank=2", *AS_FLAGS(POLYNOMIAL), "--learning_rate=0.1"]
    run_train(*args)
    state = ckpt.load(tmp_path / "run" / "ckpt.pt")["model"]
    base = torch.load(tmp_path / "run" / "base.pt", weights_only=True)["model"]
    assert all(torch.equal(state[name], base[name]) for name in base)
    model = tiny(lora_rank=2, lora_targets="c_attn,c_fc", **POLYNOMIAL)
    plain = tiny(**POLYNOMIAL)
    plain.load_state_dict(fold_lora(model.state_dict(), model.config))
    idx = torch.randint(31, (2, 8))
    torch.testing.assert_close(plain(idx)[0], model(idx)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [POLYNOMIAL, {"norm": "rms", "qk_norm": True}])
def test_a_student_may_have_options_that_its_teacher_has_not(run_train, tmp_path, options):
    run_train("--out_dir=run", "--attn_type=SM")
    args = ["--init_from=distill", "--teacher=run", "--attn_type=GK", "--out_dir=student"]
    out = run_train(*args, *AS_FLAGS(options), "--distill_iters=2")
    assert "distill" in out
    assert options.items() <= ckpt.load(tmp_path / "student" / "ckpt.pt")["model_args"].items()


def test_a_gpt2_folder_takes_the_options_that_fit(run, run_train, tmp_path, data_dir):
    pytest.importorskip("transformers")
    run_train("--out_dir=run", "--max_iters=0")
    run("export", "--out_dir=run", "--to=hf")
    run_train("--out_dir=poly", "--init_from=hf", *AS_FLAGS(POLYNOMIAL), "--max_iters=1")
    assert POLYNOMIAL.items() <= ckpt.load(tmp_path / "poly" / "ckpt.pt")["model_args"].items()
