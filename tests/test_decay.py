"""decay.py: the public decay in every path, against its formula written out in float64."""

import math
from functools import partial

import pytest
import torch
from conftest import Failed
from test_blockwise import TOLERANCE, assert_close, inputs, run
from test_compiled import needs_c_compiler

from engine.generation import stream
from kernels import blockwise, decay
from model import GPT, GPTConfig, attention, parse_attn_type, pointwise_attention

NAMES = ["GK", "GKpoly-4", "PA_relu", "PA_square", "PA_sigmoid"]
IMPLS = ["reference", "blockwise"]
L = 64  # of training, which is not the length of most inputs below


def written_out(name, q, k, v, length=L):
    """y (B, nh, T, hs), row by row, head by head."""
    B, nh, T, hs = q.shape
    y = []
    for h in range(nh):
        r = math.sqrt(length) if nh == 1 else 2 * (length / 4) ** (h / (nh - 1))
        for i in range(T):
            d = i - torch.arange(i + 1).to(q.dtype)
            qi, kj = q[:, h, i, None], k[:, h, : i + 1]  # (B, 1, hs), (B, i + 1, hs)
            dot = (qi * kj).sum(-1) / math.sqrt(hs)
            if name == "SM":
                A = (dot - d / r).softmax(-1)
            else:
                variant = parse_attn_type(name)
                x = -(qi - kj).square().sum(-1) / (2 * math.sqrt(hs))
                gamma = torch.exp(-d / r)
                A = variant.f(x if variant.score == "distance" else dot) * gamma / gamma.sum()
            y.append((A[:, :, None] * v[:, h, : i + 1]).sum(1))
    return torch.stack(y, 1).view(B, nh, T, -1)


def decayed(name, impl="auto", length=L):
    return attention(name, length, impl=impl, attn_decay="fixed")


def oracle(name, q, k, v, dy, length=L):
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    plain = dict(variant=parse_attn_type(name), reach=decay.fixed_reach(q.size(1), length))
    return run(pointwise_attention, q, k, v, dy.double(), **plain)


@pytest.mark.parametrize("name", ["SM", *NAMES])
@pytest.mark.parametrize("nh", [1, 2, 5])
def test_the_plain_formula_is_the_one_of_the_docstring(name, nh):
    case = inputs(2, nh, 17, 8)
    q, k, v, dy = case
    want = run(lambda *x: written_out(name, *x), *case)
    assert_close(run(decayed(name, "reference"), *case), want, 1e-12)
    one_row = decayed(name)(q[:, :, -1:], k, v)  # as with a cache
    torch.testing.assert_close(one_row, want[0][:, :, -1:])


def test_reaches_are_geometric_from_2_tokens_to_half_the_length():
    assert decay.fixed_reach(1, 256).tolist() == [16.0]
    r = decay.fixed_reach(5, 256)
    assert r[0] == 2 and r[-1] == 128
    torch.testing.assert_close(r[1:] / r[:-1], (r[1] / r[0]).expand(4))
    assert decay.fixed_reach(2, 1).tolist() == [2.0, 2.0]  # no context, and nothing to fade


# B, nh, T, hs: one tile and many, ragged and whole, one sequence (where short heads skip tiles)
SHAPES = [(2, 3, 1, 16), (2, 3, 77, 16), (1, 2, 128, 64), (1, 5, 300, 16), (3, 1, 150, 8)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blockwise_output_and_gradients_are_those_of_the_plain_formula(name, dtype):
    for shape in SHAPES:
        case = inputs(*shape, dtype)
        got = run(decayed(name, "blockwise"), *case)
        assert_close(got, oracle(name, *case), TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["GK", "PA_relu"])
@pytest.mark.parametrize("heads", [1, 3, 100])
def test_every_grouping_of_heads_gives_the_same(name, heads, monkeypatch):
    monkeypatch.setattr(blockwise, "tile_size", lambda *shape: (4, heads))
    for B, nh, dtype in [(1, 5, torch.float64), (3, 2, torch.float64), (1, 5, torch.float32)]:
        case = inputs(B, nh, 200, 8, dtype)
        want = oracle(name, *case)
        assert_close(run(decayed(name, "blockwise"), *case), want, TOLERANCE[dtype])


def test_tiles_beyond_the_reach_of_every_head_are_not_computed(monkeypatch):
    """A head of reach 2 sees 2^-30 of what lies 42 tokens back."""
    monkeypatch.setattr(blockwise, "tile_size", lambda *shape: (8, 1))
    tiles, weights = [], blockwise.Tiles.weights

    def noted(self, i, j, *args):
        tiles.append((i, j))
        return weights(self, i, j, *args)

    monkeypatch.setattr(blockwise.Tiles, "weights", noted)
    q, k, v, _ = inputs(1, 1, 256, 8, torch.float32)
    decayed("GK", "blockwise", length=4)(q, k, v)
    assert decay.fixed_reach(1, 4).tolist() == [2.0]
    assert max(i - j for i, j in tiles) == 6  # the nearest pair of tiles 7 apart is 49 apart


@needs_c_compiler
@pytest.mark.parametrize("n", [None, 4])
def test_tile_c_is_compiled_with_a_decay(n):
    for _ in range(3):
        assert blockwise.compiled_tile.__wrapped__(n, True) is not None


def test_no_factor_overflows_however_large_the_tile():
    """gamma^-511 with a reach of 2 is beyond float32."""
    table = decay.TileDecay(decay.fixed_reach(1, 4), 512, 512, torch.float32, "cpu")
    d = torch.arange(512)[:, None] - torch.arange(512)
    got, want = table.tile(slice(0, 1), 0, 0, 512, 512)[0], torch.exp(-d.clamp(min=0) / 2.0)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["GKpoly-4", "PA_gelu"])
def test_backward_drops_what_forward_dropped(name, monkeypatch):
    monkeypatch.setattr(blockwise, "tile_size", lambda *shape: (4, 2))

    def seeded(q, k, v):
        torch.manual_seed(0)
        return decayed(name, "blockwise")(q, k, v, dropout=0.4)

    for shape in [(1, 3, 6, 4), (2, 1, 60, 2)]:
        assert torch.autograd.gradcheck(seeded, inputs(*shape)[:3], fast_mode=True)


def test_dropout_zeroes_weights_and_scales_the_rest(monkeypatch):
    monkeypatch.setattr(blockwise, "tile_size", lambda *shape: (16, 2))
    for dtype in (torch.float64, torch.float32):  # torch's operations and tile.c
        q, k, _, _ = inputs(1, 1, 64, 64, dtype)
        identity = torch.eye(64, dtype=dtype)[None, None]
        A, dropped = (decayed("GK", "blockwise")(q, k, identity, p) for p in (0.0, 0.25))
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], A[kept] / 0.75)
        lower = torch.ones(64, 64, dtype=torch.bool).tril()
        assert abs(kept[..., lower].double().mean() - 0.75) < 0.05


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["SM", *NAMES])
def test_the_length_of_the_input_does_not_change_a_row(name, impl):
    q, k, v, _ = inputs(2, 3, 50, 8, torch.float32)
    attend = decayed(name, impl)
    short = attend(*(t[:, :, :5] for t in (q, k, v)))
    torch.testing.assert_close(attend(q, k, v)[:, :, :5], short)


def test_the_operators_keep_torch_librarys_promises(monkeypatch):
    monkeypatch.setattr(blockwise, "tile_size", lambda *shape: (4, 2))
    decayed("GK", "blockwise")
    q, k, v, dy = inputs(2, 3, 6, 4)
    args = None, "GK", 1.0, 0.0, decay.fixed_reach(3, L)
    torch.library.opcheck(blockwise.blockwise_forward, (q, k, v, *args))
    q, k, v = q.detach(), k.detach(), v.detach()
    torch.library.opcheck(blockwise.blockwise_backward, (dy, q, k, v, *args))


# ----------------------------------------------------------------------------
# A learned reach


@pytest.mark.parametrize("name", ["SM", *NAMES])
def test_any_reach_may_be_given(name):
    """Short beyond what the fixed ones are, so that factors underflow, and in no order."""
    case = inputs(2, 3, 150, 8)
    reach = torch.tensor([40.0, 0.3, 7.0], dtype=torch.float64)
    given = [run(partial(decayed(name, impl), reach=reach), *case) for impl in IMPLS]
    assert_close(given[1], given[0], 1e-12)
    ordered = [t[:, [1, 2, 0]] for t in case]
    y = decayed(name)(*ordered[:3], reach=reach[[1, 2, 0]])
    torch.testing.assert_close(y, given[0][0][:, [1, 2, 0]])
    fixed = run(partial(decayed(name), reach=decay.fixed_reach(3, L)), *case)
    assert all(map(torch.equal, fixed, run(decayed(name), *case)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_fast_paths_know_the_gradient_of_the_reach(name, dtype):
    """It is a difference of sums, T / r times as large, so it has fewer exact digits."""

    def gradients(impl, case, reach):
        reach = reach.detach().requires_grad_()
        q, k, v, dy = (t.detach().requires_grad_() for t in case)
        y = decayed(name, impl)(q, k, v, reach=reach)
        return y, *torch.autograd.grad(y, (reach, q, k, v), dy)

    for T, reach in [(150, [2.0, 30.0, 9.0]), (300, [5.0])]:
        case = inputs(2, len(reach), T, 16, dtype)
        reach = torch.tensor(reach, dtype=torch.promote_types(dtype, torch.float32))
        want = gradients("reference", [t.double() for t in case], reach.double())
        got = gradients("blockwise", case, reach)
        assert_close(got[:1] + got[2:], want[:1] + want[2:], TOLERANCE[dtype])
        error = (got[1] - want[1]).norm() / want[1].norm()
        assert error <= T / reach.min() * TOLERANCE[dtype], error
        constant = decayed(name, "blockwise")(*case[:3], reach=reach)
        assert torch.equal(got[0], constant)


def test_a_model_learns_its_reaches():
    model = tiny("GK", "learned").train()
    attn = model.transformer.h[0].attn
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.99), "cpu")
    torch.testing.assert_close(attn.reach(), decay.fixed_reach(2, 16).float())
    before = attn.reach().tolist()
    idx = torch.randint(31, (4, 16))
    for _ in range(3):
        model(idx, idx)[1].backward()
        optimizer.step()
    assert all(b != a > 0 for b, a in zip(before, attn.reach().tolist(), strict=True))
    undecayed = next(g for g in optimizer.param_groups if g["weight_decay"] == 0)
    assert any(p is attn.log_reach for p in undecayed["params"])
    assert attn.log_reach.numel() == 2 and attn.log_reach.dtype == torch.float32
    attn.log_reach.data[:] = -9.0  # beyond what the Triton kernels can compute
    assert attn.reach().tolist() == [0.75, 0.75]


# ----------------------------------------------------------------------------
# attn_normalize: rows of sum 1


def normalised(name, impl="auto", terms=4):
    return attention(name, L, impl=impl, attn_decay="fixed", attn_normalize=terms)


@pytest.mark.parametrize(
    "name, terms", [(name, n) for name in NAMES for n in (1, 2, 4, 32) if n == 1 or "GK" in name]
)
@pytest.mark.parametrize("nh", [1, 3])
def test_terms_of_a_series_divide_the_rows_and_the_decay_gets_the_rest(name, nh, terms):
    q, k, *_ = inputs(2, nh, 17, 8)
    identity = torch.eye(17).double().expand(2, nh, 17, 17)
    A = decayed(name, "reference")(q, k, identity)
    D = written_out("PA_identity", *[torch.ones(2, nh, 17, 4).double()] * 2, identity) / 2  # x = 2
    s = A.sum(-1, keepdim=True)
    want = A * sum((1 - s) ** n for n in range(terms)) + D * (1 - s) ** terms
    got = normalised(name, terms=terms)(q, k, identity)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, nh, 17).double())
    assert got.min() >= 0 or name.startswith("PA")
    one_row = normalised(name, terms=terms)(q[:, :, -1:], k, identity)  # as with a cache
    torch.testing.assert_close(one_row, got[:, :, -1:])


def test_enough_terms_divide_each_row_by_its_sum():
    q, k, v, _ = inputs(2, 3, 17, 8)
    q, k = q / 4, k / 4
    y, s = (decayed("GK", "reference")(q, k, t) for t in (v, torch.ones_like(v)))
    assert s.min() > 0.5  # 0.5^32 = 2e-10
    torch.testing.assert_close(normalised("GK", terms=32)(q, k, v), y / s)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_mean_by_chunks_is_that_of_all_factors_at_once(dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6}[dtype]
    for shape in SHAPES:
        _, _, v, dy = inputs(*shape, dtype)
        reach = decay.fixed_reach(shape[1], L).requires_grad_()
        m, wide = decay.mean(v, shape[2], None, reach), v.detach().double().requires_grad_()
        D = decay.apply(torch.ones(*shape[:3], shape[2]).double().tril(), None, reach)
        want = D @ wide, *torch.autograd.grad(D @ wide, (wide, reach), dy.double())
        got = m, *torch.autograd.grad(m, (v, reach), dy)
        # The gradient of a reach is a small difference of large numbers
        for a, b, factor in zip(got, want, (1, 1, 100), strict=True):
            assert (a - b).norm() <= factor * tolerance * max(1, b.norm()), shape


@pytest.mark.parametrize("name", ["GK", "GKpoly-4", "PA_relu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blockwise_normalised_attention_is_the_plain_formula(name, dtype):
    for shape in SHAPES:
        if shape[2] == 1:  # the only weight is 1: gradients of q and k are rounding errors
            continue
        q, k, v, dy = inputs(*shape, dtype)
        wide = (t.detach().double().requires_grad_() for t in (q, k, v))
        want = run(normalised(name, "reference"), *wide, dy.double())
        assert_close(run(normalised(name, "blockwise"), q, k, v, dy), want, TOLERANCE[dtype])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_of_a_learned_reach_includes_the_sums_of_rows(impl, dtype):
    """Written out: y_i = p(s_i) sum_j A_ij v_j + (1 - s_i)^4 m_i."""
    q, k, v, dy = (t.detach() for t in inputs(2, 3, 150, 8, dtype))
    reach = torch.tensor([2.0, 30.0, 9.0], dtype=dtype)

    def gradient(y, reach):
        return torch.autograd.grad(y, reach, dy.to(y.dtype))[0]

    wide = reach.double().requires_grad_()
    x = -(q[:, :, :, None] - k[:, :, None]).double().square().sum(-1) / (2 * math.sqrt(8))
    D = decay.apply(torch.ones_like(x).tril(), None, wide)
    A = x.exp() * D
    rest = 1 - A.sum(-1, keepdim=True)
    y = ((1 + rest) * (1 + rest**2) * A + rest**4 * D) @ v.double()
    want, reach = gradient(y, wide), reach.requires_grad_()
    got = gradient(normalised("GK", impl)(q, k, v, reach=reach), reach)
    assert (got - want).norm() <= 150 / 2 * TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("head_size", [8, 257])
def test_triton_gives_the_sums_of_rows(head_size, monkeypatch):
    """Its kernels can't run here; the plain formula takes their place."""
    from kernels import choice

    def kernels(q, k, v, dropout, reach, sums):
        assert sums
        return pointwise_attention(q, k, v, parse_attn_type("GK"), reach=reach, sums=True)

    case = inputs(2, 3, 20, head_size)
    want = run(normalised("GK", "reference"), *case)
    monkeypatch.setattr("model.choose", lambda *_: "triton")
    module = choice.triton_module(head_size)
    monkeypatch.setattr(module, "attention", lambda *_: kernels)
    assert_close(run(normalised("GK", "triton"), *case), want, 1e-12)


def test_terms_without_a_use_are_left_out():
    terms = lambda **args: GPTConfig(attn_normalize=4, **args).attn_normalize
    assert terms(attn_type="GK", attn_decay="learned") == 4
    assert terms(attn_type="GK") == terms(attn_type="SM", attn_decay="fixed") == 0
    assert terms(attn_type="PA_relu", attn_decay="fixed") == 1  # its weights may exceed 1
    for wrong in (3, True, -1, 64):
        with pytest.raises(ValueError, match=f"attn_normalize={wrong} is not one of .*0, 1, 2, 4,"):
            GPTConfig(attn_normalize=wrong)
    with pytest.raises(ValueError, match="dropout=0.6 is not at most 0.5, as attn_normalize needs"):
        GPTConfig(attn_type="GK", attn_decay="fixed", attn_normalize=2, dropout=0.6)


# ----------------------------------------------------------------------------
# The model


def tiny(attn_type, attn_decay="fixed", **more):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=16) | more
    model = GPT(GPTConfig(**shape, attn_type=attn_type, attn_decay=attn_decay)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1 if "reach" in name else 4)
    return model


@pytest.mark.parametrize("attn_type", ["SM", *NAMES])
def test_without_it_nothing_changes_by_a_bit(attn_type):
    idx = torch.randint(31, (2, 16))
    plain = GPTConfig(block_size=16, attn_type=attn_type)
    assert not hasattr(plain, "reach") and "attn_decay" not in plain.model_args()
    torch.manual_seed(0)
    default = GPT(GPTConfig(16, 31, 2, 2, 16, attn_type=attn_type)).eval()
    with torch.no_grad():
        for p in default.parameters():
            p.mul_(4)
    off, on = tiny(attn_type, "none"), tiny(attn_type)
    assert torch.equal(off(idx, idx)[0], default(idx, idx)[0])
    assert not torch.allclose(on(idx, idx)[0], off(idx, idx)[0])


@pytest.mark.parametrize("attn_decay", ["fixed", "learned"])
@pytest.mark.parametrize("attn_type", ["SM", *NAMES])
@pytest.mark.parametrize("attn_normalize", [0, 4])
def test_a_cache_changes_nothing(attn_type, attn_decay, attn_normalize):
    model = tiny(attn_type, attn_decay, attn_normalize=attn_normalize)
    prompts = [torch.arange(n) for n in (2, 5, 1)]
    drawn = torch.stack(list(stream(model, prompts, 1, 9, temperature=0)), dim=1)
    for prompt, ids in zip(prompts, drawn, strict=True):
        for n in range(9):
            with torch.no_grad():
                logits = model(torch.cat((prompt, ids[:n]))[None])[0][0, -1]
            assert ids[n] == logits.argmax()
    assert len(drawn.unique()) > 3


def test_its_length_is_that_of_training():
    model = tiny("GK")
    idx = torch.randint(31, (1, 8))
    before = model(idx)[0]
    model.crop_block_size(8)
    assert torch.equal(model(idx)[0], before)
    args = model.config.model_args()
    assert (args["attn_decay"], args["pa_length"], args["block_size"]) == ("fixed", 16, 8)
    again = GPT(GPTConfig(**args)).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(idx)[0], before)
    relu = GPTConfig(attn_type="PA_relu", attn_decay="fixed", pa_length_power=0.5)
    assert relu.pa_length == 1024 and relu.pa_length_power == 1.0  # its row sums divide, not L


@pytest.mark.parametrize("attn_type", ["SM", "GK", "PA_relu"])
@pytest.mark.parametrize("attn_normalize", [0, 4])
def test_pictures_and_ranges_show_the_decaying_weights(attn_type, attn_normalize):
    from engine import ranges
    from engine.runtime import Runtime

    model, rt = tiny(attn_type, attn_normalize=attn_normalize), Runtime("cpu", "float32", False)
    idx = torch.randint(31, (1, 16))
    qkv = ranges.each_layer(model, idx, rt, lambda q, k, _: (q, k))
    for (q, k), A in zip(qkv, ranges.attention_maps(model, idx, rt), strict=True):
        width = torch.eye(16)[None, None]
        columns = [
            written_out(attn_type, q, k, width[..., c : c + 8].expand(1, 2, 16, 8), 16)
            for c in (0, 8)
        ]
        want = torch.cat(columns, -1)
        if model.config.attn_normalize:
            identity = torch.eye(16).expand(1, 2, 16, 16)
            want = attention(attn_type, 16, attn_decay="fixed", attn_normalize=4)(q, k, identity)
        torch.testing.assert_close(A[None], want, rtol=1e-4, atol=1e-6)
    rows = ranges.measure(model, idx, rt)
    if attn_type == "GK":
        assert all(0 < row["row_max"] <= 1 + 1e-6 for row in rows)


def test_a_run_keeps_it_and_a_finetune_may_change_it(run_train, tmp_path):
    def args_of(folder):
        return torch.load(tmp_path / folder / "ckpt.pt", weights_only=True)["model_args"]

    run_train("--out_dir=run", "--attn_type=GK", "--attn_decay=fixed", "--attn_normalize=4")
    assert args_of("run")["attn_decay"] == "fixed" and args_of("run")["pa_length"] == 16
    assert args_of("run")["attn_normalize"] == 4
    run_train("--init_from=resume", "--out_dir=run")
    assert args_of("run")["attn_decay"] == "fixed"
    with pytest.raises(Failed, match="attn_decay=fixed"):
        run_train("--init_from=resume", "--out_dir=run", "--attn_decay=none")
    tune = ["--init_from=finetune", "--out_dir=run", "--save_dir=tuned", "--lora_rank=2"]
    run_train(*tune, "--attn_decay=none")
    assert not {"attn_decay", "attn_normalize"} & args_of("tuned").keys()
    assert "pa_length" not in args_of("tuned")
    distill = ["--init_from=distill", "--teacher=tuned", "--out_dir=student"]
    run_train(*distill, "--attn_type=GKpoly-4", "--attn_decay=fixed", "--block_size=8")
    assert args_of("student")["attn_decay"] == "fixed" and args_of("student")["pa_length"] == 8


def test_a_run_keeps_its_learned_reaches(run_train, tmp_path):
    def reach_of(folder):
        checkpoint = torch.load(tmp_path / folder / "ckpt.pt", weights_only=True)
        assert checkpoint["model_args"]["attn_decay"] == "learned"
        return checkpoint["model"]["transformer.h.0.attn.log_reach"].exp()

    run_train("--out_dir=fixed", "--attn_type=GK", "--attn_decay=fixed")
    tune = ["--init_from=finetune", "--out_dir=fixed", "--save_dir=run", "--attn_decay=learned"]
    run_train(*tune, "--max_iters=0")
    torch.testing.assert_close(reach_of("run"), decay.fixed_reach(2, 16).float())
    learned = ["--attn_type=GK", "--attn_decay=learned", "--lr_decay_iters=4"]
    run_train("--out_dir=whole", *learned, "--max_iters=4")
    assert not torch.equal(reach_of("whole"), reach_of("run"))
    run_train("--out_dir=half", *learned, "--max_iters=2")
    run_train("--init_from=resume", "--out_dir=half", "--max_iters=4")
    assert torch.equal(reach_of("half"), reach_of("whole"))
    tune = ["--init_from=finetune", "--out_dir=whole", "--save_dir=lora", "--lora_rank=2"]
    run_train(*tune)
    lora = torch.load(tmp_path / "lora" / "ckpt.pt", weights_only=True)
    assert lora["model_args"]["attn_decay"] == "learned"
    assert not any("reach" in name for name in lora["model"])  # adapters alone are trained
