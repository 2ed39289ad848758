"""engine/scoring.py: every token of a split is scored once, whatever the batches and ranks."""

import numpy as np
import pytest
import torch
from test_evaluate import PASSAGES
from torch.nn import functional as F

from data.tokenizer import CharTokenizer
from engine import scoring
from engine.runtime import Runtime
from model import GPT, GPTConfig


@pytest.mark.parametrize("T, stride", [(16, 16), (16, 5), (16, 1), (16, 40), (4, 2), (1, 1)])
@pytest.mark.parametrize("n", [2, 16, 17, 18, 75])
def test_every_target_is_scored_once(n, T, stride):
    scored = []
    for first, last, begin in scoring.strided(n, T, stride):
        assert 0 < last - first <= T
        assert first == 0 or begin >= min(T - 1, T - stride)
        scored += range(first + begin + 1, last + 1)
    assert scored == list(range(1, n))


def test_the_last_word_is_guessed_or_not():
    tokenizer = CharTokenizer("".join(sorted(set("".join(PASSAGES)) | {"\n"})))
    tokenizer.eot = tokenizer.encode("\n").item()
    tokens = tokenizer.encode("\n".join(PASSAGES))
    windows, last_words = scoring.passages(tokens, tokenizer, 64)
    texts = [tokenizer.decode(tokens[first : last + 1]) for first, last, _ in windows]
    assert texts == PASSAGES and last_words == [3, 3, 3]
    (first, last, _), *_ = scoring.passages(tokens, tokenizer, 5)[0]
    assert tokenizer.decode(tokens[first : last + 1]) == "he mat"

    class Oracle(GPT):  # knows that "a" follows "m" and "c", and "t" follows "a", and that is all
        def hidden(self, idx, pos, cache=None):
            after = {"m": "a", "c": "a", "a": "t", " ": "m"}
            chars = tokenizer.chars
            next_id = [
                [chars.index(after.get(chars[i], "\n")) for i in row] for row in idx.tolist()
            ]
            return F.one_hot(torch.tensor(next_id), self.config.n_embd).float() * 9

    V = len(tokenizer.chars)
    model = Oracle(GPTConfig(64, V, 1, 1, V))
    torch.nn.init.eye_(model.lm_head.weight)
    rt = Runtime("cpu", "float32", False)
    task = scoring.Task("x", "test", tokens, windows, None, last_words)
    sums = scoring.score(model, task, 2, rt)
    assert sum(s[2] for s in sums) == 2  # "mat" twice; "cat" would have needed a "c"
    assert sum(s[1] for s in sums) == len("".join(PASSAGES)) - 3


def test_scores_are_computed_without_tf32_even_where_training_uses_it():
    seen = []

    class Watched(GPT):
        def hidden(self, *args):
            seen.append(torch.get_float32_matmul_precision())
            return super().hidden(*args)

    model, rt = Watched(GPTConfig(8, 11, 1, 1, 4)), Runtime("cpu", "float32", False)
    windows = scoring.strided(9, 8, 8)
    task = scoring.Task("x", "val", np.arange(9), windows, 8, [0])
    torch.set_float32_matmul_precision("high")
    try:
        scoring.score(model, task, 2, rt)
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_last_word_of_several_tokens_is_whole():
    class Pieces:  # as BPE has them: a blank belongs to the word behind it
        pieces, eot = ["<>", "the", " cat", " s", "at", " on", " mat", "\n"], 0

        def decode(self, ids):
            return "".join(self.pieces[i] for i in ids)

    tokens = np.array([1, 2, 3, 4, 0, 1, 6, 7, 0, 1])  # the cat sat <> the mat \n <> the
    assert scoring.passages(tokens, Pieces(), 64) == ([(0, 3, 0), (5, 7, 0)], [2, 2])
    assert scoring.passages(tokens, Pieces(), 1) == ([(2, 3, 0), (6, 7, 0)], [1, 1])


def test_logits_are_never_rounded_to_bfloat16(monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 50, 1, 2, 16)).eval()
    x, y = torch.randint(50, (2, 3, 16))
    hidden = 20 * torch.randn(3, 16, 16)
    monkeypatch.setattr(model, "hidden", lambda idx, pos: hidden)
    exact = scoring.token_scores(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = scoring.token_scores(model, x, y)
    assert torch.equal(exact[0], rounded[0]) and torch.equal(exact[1], rounded[1])


def test_the_ranks_share_the_windows_and_their_sums_add_up():
    class Rank(Runtime):
        def sum(self, values):  # without the other rank's
            return values.tolist()

    torch.manual_seed(0)
    model, tokens = GPT(GPTConfig(16, 50, 1, 2, 16)), np.random.default_rng(0).integers(0, 50, 75)
    windows = scoring.strided(75, 16, 5)
    task = scoring.Task("x", "val", tokens, windows, 5, [0] * len(windows))
    one = scoring.score(model, task, 2, Runtime("cpu", "float32", False))
    first, second = (
        scoring.score(model, task, 2, Rank("cpu", "float32", False, rank, world_size=2))
        for rank in range(2)
    )
    assert all(any(a) != any(b) for a, b in zip(first, second, strict=True))  # one rank's each
    assert (torch.tensor(first) + torch.tensor(second)).tolist() == torch.tensor(one).tolist()


def test_scores_do_not_depend_on_how_the_vocabulary_is_cut(monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 50, 1, 2, 16)).eval()
    x, y = torch.randint(50, (2, 3, 16))
    whole = scoring.token_scores(model, x, y)
    monkeypatch.setattr(scoring, "MAX_LOGITS", 100)
    cut = scoring.token_scores(model, x, y)
    torch.testing.assert_close(whole[0], cut[0])
    expected = F.cross_entropy(model(x, y)[0].flatten(0, 1), y.flatten(), reduction="none")
    torch.testing.assert_close(whole[0].flatten(), expected)
    assert torch.equal(whole[1], cut[1])
