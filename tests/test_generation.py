"""generation.py: the cache changes nothing but the time, for every attention; draws are exact."""

import pytest
import torch
from conftest import EVERY_ATTN_TYPE

from engine.generation import draw, stream
from model import GPT, GPTConfig


def tiny(attn_type, **shape):
    torch.manual_seed(0)
    shape = dict(block_size=8, vocab_size=31, n_layer=2, n_head=2, n_embd=16) | shape
    model = GPT(GPTConfig(**shape, attn_type=attn_type)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # or the likeliest token is the same for all
    return model


@torch.no_grad()
def without_cache(model, idx, n):
    """Greedy, and the whole context again for every token, as nanoGPT does."""
    for _ in range(n):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


def greedy(model, prompts, n, samples=1, **options):
    rows = stream(model, prompts, samples, n, temperature=0, **options)
    return torch.stack(list(rows), dim=1)


@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_greedy_tokens_are_those_without_a_cache(attn_type):
    model = tiny(attn_type)
    idx = torch.randint(31, (3, 3))
    expected = without_cache(model, idx, 14)
    assert len(expected[0].unique()) > 3
    assert torch.equal(model.generate(idx, 5, temperature=0), expected[:, :8])
    assert torch.equal(model.generate(idx, 14, temperature=0, window_stride=1), expected)


PROMPTS = [torch.arange(n) for n in (2, 5, 1, 11)]  # the last is longer than block_size


@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_prompts_of_any_length_give_in_one_batch_what_each_gives_alone(attn_type):
    model = tiny(attn_type)
    together = greedy(model, PROMPTS, 12, samples=2, window_stride=3)
    alone = [greedy(model, [p], 12, samples=2, window_stride=3) for p in PROMPTS]
    assert torch.equal(together, torch.cat(alone))


def test_random_draws_of_one_batch_are_those_of_each_prompt_alone():
    model, uniforms = tiny("GK"), 1 - torch.rand(12, 2)
    options = dict(temperature=0.9, top_k=7, top_p=0.9, window_stride=8)

    def drawn(prompts):
        u = uniforms.repeat(1, len(prompts))
        return torch.stack(list(stream(model, prompts, 2, 12, uniforms=u, **options)), dim=1)

    assert torch.equal(drawn(PROMPTS), torch.cat([drawn([prompt]) for prompt in PROMPTS]))


def test_beyond_block_size_the_oldest_tokens_are_forgotten_stride_by_stride():
    model = tiny("GK", block_size=16)
    prompt = torch.randint(31, (16,))
    drawn = greedy(model, [prompt], 9, window_stride=4)[0].tolist()
    context = prompt.tolist()
    for token in drawn:  # 16 tokens at most; a 17th pushes out 4
        with torch.no_grad():
            assert token == model(torch.tensor([context]))[0][0, -1].argmax()
        context = (context if len(context) < 16 else context[4:]) + [token]


@pytest.mark.slow
def test_the_compiled_step_draws_the_same_tokens():
    model = tiny("GK")
    prompts = [torch.randint(31, (n,)) for n in (3, 7)]
    torch._dynamo.reset()
    assert torch.equal(greedy(model, prompts, 9, compile=True), greedy(model, prompts, 9))


def test_a_draw_is_where_the_cumulative_probability_reaches_the_number():
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    cases = [(1e-7, 0), (0.099, 0), (0.101, 1), (0.499, 1), (0.501, 2), (0.699, 2), (0.701, 3)]
    for u, expected in [*cases, (1.0, 3)]:
        assert draw(p.log(), torch.tensor([u]), 1.0, None, 1.0).item() == expected
    # sorted: 0.4 (id 1), 0.3 (3), 0.2 (2), 0.1 (0)
    for top_k, top_p, u, expected in [
        (2, 1.0, 0.57, 1),  # 0.4 of 0.7
        (2, 1.0, 0.58, 3),
        (None, 0.4, 0.999, 1),
        (None, 0.41, 0.999, 3),
        (3, 0.95, 1.0, 2),
        (1, 1.0, 1.0, 1),
        (99, 1.0, 1.0, 3),
    ]:
        assert draw(p.log(), torch.tensor([u]), 1.0, top_k, top_p).item() == expected
    assert draw(p.log(), torch.tensor([0.999]), 0, None, 1.0).item() == 1
    assert draw(p.log(), torch.tensor([0.999]), 1e-30, None, 1.0).item() == 1


def test_draws_have_the_distribution_of_the_model():
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])
    u = (torch.arange(10000) + 0.5) / 10000
    ids = draw(p.log().expand(10000, -1), u, 1.0, None, 1.0)
    torch.testing.assert_close(ids.bincount() / 10000, p, atol=2e-4, rtol=0)
    half = draw(p.log().expand(10000, -1), u, 0.5, None, 1.0)
    torch.testing.assert_close(half.bincount() / 10000, p**2 / (p**2).sum(), atol=2e-4, rtol=0)


def test_an_impossible_token_is_never_drawn():
    logits = torch.tensor([[-float("inf"), 0.0, -float("inf")]])
    for u in (1e-8, 0.5, 1.0):
        assert draw(logits, torch.tensor([u]), 1.0, None, 1.0).item() == 1


def test_a_prompt_without_tokens_is_a_value_error():
    with pytest.raises(ValueError, match="no token"):
        next(stream(tiny("SM"), [torch.zeros(0, dtype=torch.long)], 1, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_on_a_gpu_the_cache_changes_nothing():
    model = tiny("GK").cuda()
    prompts = [torch.randint(31, (n,), device="cuda") for n in (3, 7)]
    expected = torch.cat([without_cache(model, p[None], 9)[:, -9:] for p in prompts])
    for compile in (False, True):
        assert torch.equal(greedy(model, prompts, 9, compile=compile), expected)
