"""The evaluation harness (lm-eval) on exported folders: our log-likelihoods, and our numbers."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from test_evaluate import PASSAGES, results, write_split

import export
from data.tokenizer import CharTokenizer, GPT2Tokenizer
from model import GPT, GPTConfig

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

T = 16
CHARS = "\n .abcdefghijklmnopqrstuvwxyz"
TASK = """
task: {name}
output_type: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
metric_list: [{metrics}]
"""
LAST_WORD = """
doc_to_text: "{{text.rsplit(' ', 1)[0]}}"
doc_to_target: "{{' ' + text.rsplit(' ', 1)[1]}}"
"""
WHOLE_TEXT = 'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """Export a random model and run a task on texts: harness(tokenizer, kind, texts, **args of
    GPTConfig) -> the model, log-likelihood of each text, metrics."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)

    def call(tokenizer, kind, texts, **args):
        torch.manual_seed(0)
        shape = dict(block_size=T, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32)
        model = GPT(GPTConfig(**shape | args)).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.1)
        export.write_folder(tmp_path / "hf", model.state_dict(), model.config, tokenizer)
        of_passages = kind == "loglikelihood"
        metrics = "perplexity acc" if of_passages else "word_perplexity bits_per_byte"
        metrics = ", ".join(f"{{metric: {name}}}" for name in metrics.split())
        yaml = TASK.format(name="some", kind=kind, metrics=metrics)
        (tmp_path / "some.yaml").write_text(yaml + (LAST_WORD if of_passages else WHOLE_TEXT))
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "some.jsonl").write_text("".join(lines))
        hf = HFLM("hf", trust_remote_code=True, dtype="float32", device="cpu", batch_size=2)
        tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
        done = lm_eval.simple_evaluate(
            hf, tasks=["some"], task_manager=tasks, log_samples=True, bootstrap_iters=0
        )
        likelihoods = [sample["filtered_resps"][0] for sample in done["samples"]["some"]]
        return model, likelihoods, done["results"]["some"]

    return call


@torch.no_grad()
def log_likelihood(model, ids, first):
    """Of the ids from `first` on, in float64, given those before them."""
    ids = torch.tensor([list(ids)])
    logits, _ = model.double()(ids[:, :-1], ids[:, 1:])
    log_p = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
    return log_p[0, first - 1 :].sum().item()


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"attn_type": "GK", "attn_decay": "fixed"},
        {"attn_type": "GKpoly-4"},
        {"attn_type": "PA_relu"},
    ],
)
def test_log_likelihoods_of_continuations_are_ours(harness, args):
    tokenizer = CharTokenizer(CHARS)
    texts = ["the cat", "a dog ran", "on the mat"]
    model, found, _ = harness(tokenizer, "loglikelihood", texts, **args)
    for text, (value, _) in zip(texts, found, strict=True):
        expected = log_likelihood(model, tokenizer.encode(text), text.rindex(" "))
        assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("args", [{}, {"attn_type": "GK"}])
def test_perplexity_of_a_document_is_ours(harness, run, tmp_path, args):
    tokenizer = CharTokenizer(CHARS)
    text = "the cat sat on the mat and the dog ran after it."
    assert len(text) % T == 0  # the harness gives a shorter last window more context
    model, (found,), metrics = harness(tokenizer, "loglikelihood_rolling", [text], **args)
    ids = tokenizer.encode("\n" + text)  # a document of characters begins with a newline
    expected = sum(log_likelihood(model, ids[i : i + T + 1], 1) for i in range(0, len(text), T))
    assert found == pytest.approx(expected, rel=1e-6)

    words, meta = len(text.split()), {**tokenizer.meta(), "vocab_size": len(CHARS)}
    write_split(
        tmp_path / "data" / "d", "test", ids, test_words=words, test_bytes=len(text), **meta
    )
    run("evaluate", "--init_from=hf", "--datasets=d", "--data_dir=data", f"--eval_stride={T}",
        "--out_dir=e", "--device=cpu", "--dtype=float32")  # fmt: skip
    row = results(tmp_path / "e")["d"]
    assert metrics["word_perplexity,none"] == pytest.approx(row["word_perplexity"], rel=1e-6)
    assert metrics["bits_per_byte,none"] == pytest.approx(row["bits_per_byte"], rel=1e-6)


def test_last_words_are_guessed_as_evaluate_counts_them(harness, run, tmp_path, gpt2_files):
    tokenizer = GPT2Tokenizer()
    _, _, metrics = harness(tokenizer, "loglikelihood", PASSAGES, attn_type="GK", n_embd=8)
    ids = np.concatenate([[*tokenizer.encode(text), tokenizer.eot] for text in PASSAGES])
    meta = {"tokenizer": "gpt2", "vocab_size": 50257, "last_word": True}
    write_split(tmp_path / "data" / "passages", "test", ids[:-1], **meta)
    run("evaluate", "--init_from=hf", "--datasets=passages", "--data_dir=data", "--out_dir=e",
        "--device=cpu", "--dtype=float32")  # fmt: skip
    row = results(tmp_path / "e")["passages"]
    assert metrics["perplexity,none"] == pytest.approx(row["last_word_perplexity"], rel=1e-5)
    assert metrics["acc,none"] == pytest.approx(row["last_word_accuracy"])
    assert math.isfinite(row["last_word_perplexity"])
