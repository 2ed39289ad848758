"""
Evaluation as papers do it: every token of a split, once, each with a context that is stated.

A split of N tokens is read in windows of T = block_size inputs that begin `stride` tokens apart.
Each window scores the targets that those before it did not, so that all but the split's first token
are scored once, from the second window on with at least T - stride tokens of context. In a data set
of passages with a last word to guess (LAMBADA) each passage is a window of its own.

    loss                  mean over the scored tokens of -ln p, in nats
    perplexity            exp(loss)
    word_perplexity       exp(sum of -ln p / words); words are what white space separates in the
                          original text, before a detokeniser has changed it, and of WikiText and
                          the Penn Treebank line ends too, as in the papers
    bits_per_byte         sum of -log2 p / bytes of the text in UTF-8
    last_word_accuracy    share of passages whose last word is the likeliest, token by token
    last_word_perplexity  exp(mean over passages of the last word's -ln p)
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import tokenizer as tokenizers
from configurator import UserError
from dataset import Dataset, data_folder, held_splits
from model import GPT

LOGITS = 2**24  # at a time, so that a large vocabulary's are never whole
COLUMNS = ("loss", "perplexity", "word_perplexity", "bits_per_byte", "last_word_accuracy")

Window = tuple[int, int, int]  # inputs [first, last), of whose targets those from `scored` on count


def evaluate(model: GPT, known_as: dict | None, names: list[str], config, rt) -> dict:
    """The rows of eval.json, by data set; those that can't be had are told on stderr and left out.

    `known_as` is the tokenizer that the model was trained with, None if that is not known.
    """
    stride = config.eval_stride or max(1, model.config.block_size // 2)
    rows = {}
    for name in names:
        try:
            rows[name] = evaluate_dataset(model, known_as, name, stride, config, rt)
        except UserError as error:
            if rt.is_main:
                print(f"{name}: {error}", file=sys.stderr)
    if rt.is_main and rows:
        print(table(rows))
    return rows


def evaluate_dataset(model: GPT, known_as: dict | None, name: str, stride: int, config, rt) -> dict:
    """One row. Raises UserError if the data set is missing or not one for this model."""
    held = held_splits(data_folder(name, config.data_dir))
    data = Dataset(name, config.data_dir, splits=["test" if "test" in held else "val"])
    data.check_model(model.config.vocab_size, known_as, "the model")
    ((split, tokens),) = data.tokens.items()
    T, by_passage = model.config.block_size, data.meta.get("last_word") is True
    if by_passage:
        found = passages(tokens, tokenizers.from_meta(data.tokenizer), T)
        windows = [window for window, _ in found]
        last_words = torch.tensor([n for _, n in found])
    else:
        windows = strided(len(tokens), T, stride)
        last_words = torch.zeros(len(windows), dtype=torch.int64)
    started = time.perf_counter()
    sums = score(model, tokens, windows, last_words, config.batch_size, rt, name)
    nll, n_scored, hits, last_nll = (math.fsum(column) for column in zip(*sums, strict=True))
    words, n_bytes, lines = (data.meta.get(f"{split}_{u}") for u in ("words", "bytes", "lines"))
    if data.meta.get("line_ends") is True:
        words += lines
    if words is None and data.tokenizer:  # a folder of nanoGPT's: its text is what was encoded
        words, n_bytes = count(tokens, tokenizers.from_meta(data.tokenizer))
    return {
        "split": split,
        "stride": None if by_passage else stride,
        "block_size": T,
        "tokens": int(n_scored),
        "words": words,
        "bytes": n_bytes,
        "loss": nll / n_scored,
        "perplexity": safe_exp(nll / n_scored),
        "word_perplexity": safe_exp(nll / words) if words else None,
        "bits_per_byte": nll / math.log(2) / n_bytes if n_bytes else None,
        "last_word_accuracy": hits / len(windows) if by_passage else None,
        "last_word_perplexity": safe_exp(last_nll / len(windows)) if by_passage else None,
        "seconds": round(time.perf_counter() - started, 3),
    }


# ----------------------------------------------------------------------------
# Windows


def strided(n_tokens: int, T: int, stride: int) -> list[Window]:
    """Windows of at most T inputs over n_tokens, `stride` apart (but never so far that a target is
    left out), the last one ending with the last target."""
    windows, scored = [], 0
    while scored < n_tokens - 1:
        first = max(0, scored - max(0, T - stride))
        last = min(first + T, n_tokens - 1)
        windows.append((first, last, scored - first))
        scored = last
    return windows


def passages(tokens: np.ndarray, tokenizer, T: int) -> list[tuple[Window, int]]:
    """A window for each passage, of its last T inputs, and how many tokens its last word has."""
    ends = np.flatnonzero(tokens == getattr(tokenizer, "eot", -1)).tolist()
    found, first = [], 0
    for end in [*ends, len(tokens)]:
        ids = tokens[first:end].tolist()
        word = tokenizer.decode(ids).split()[-1:]
        if len(ids) > 1 and word:
            n = 1  # tokens of the last word
            while tokenizer.decode(ids[-n:]).split() != word:
                n += 1
            found.append(((max(first, end - 1 - T), end - 1, 0), min(n, len(ids) - 1, T)))
        first = end + 1
    return found


def count(tokens: np.ndarray, tokenizer) -> tuple[int, int]:
    """Words and UTF-8 bytes of the text of `tokens`."""
    text = tokenizer.decode(tokens.tolist()).replace(tokenizers.END_OF_TEXT, "\n")
    return len(text.split()), len(text.encode("utf-8", "surrogatepass"))


# ----------------------------------------------------------------------------
# Scores


@torch.no_grad()
def score(
    model: GPT,
    tokens: np.ndarray,
    windows: list[Window],
    last_words: torch.Tensor,
    batch_size: int,
    rt,
    name: str,
) -> list[list[float]]:
    """For each batch of windows: sum of -ln p, scored tokens, last words that were guessed, and the
    last words' -ln p. Ranks share the batches; each gets all sums, which are the same for any
    number of ranks."""
    model.eval()
    order = sorted(range(len(windows)), key=lambda i: windows[i][1] - windows[i][0])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    sums = torch.zeros(len(batches), 4, dtype=torch.float64)
    for b in tqdm(rt.share(len(batches)), name, disable=None if rt.is_main else True, leave=False):
        chosen = [windows[i] for i in batches[b]]
        longest = max(last - first for first, last, _ in chosen)
        ids = torch.zeros(len(chosen), longest + 1, dtype=torch.int64)
        counts = torch.zeros(len(chosen), longest, dtype=torch.bool)
        is_last = torch.zeros_like(counts)
        for row, (i, (first, last, scored)) in enumerate(zip(batches[b], chosen, strict=True)):
            n = last - first
            ids[row, : n + 1] = torch.from_numpy(tokens[first : last + 1].astype(np.int64))
            counts[row, scored:n] = True
            is_last[row, n - int(last_words[i]) : n] = True
        x, y = rt.to_device(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        with rt.autocast():
            nll, hit = token_scores(model, x, y)
        nll, hit = nll.cpu().double(), hit.cpu()
        guessed = (hit | ~is_last).all(dim=1) & is_last.any(dim=1)
        sums[b] = torch.stack(
            [nll[counts].sum(), counts.sum(), guessed.sum(), nll[is_last].sum()]
        ).double()
    flat = rt.sum(sums.flatten())
    return [flat[i : i + 4] for i in range(0, len(flat), 4)]


def token_scores(model: GPT, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-ln p of each target, and whether it is the likeliest token: (B, T) x 2 -> (B, T) x 2."""
    hidden = model.hidden(x, torch.arange(x.size(1), device=x.device)).flatten(0, 1)  # (B T, C)
    nll, hit = [], []
    rows = max(1, LOGITS // model.config.vocab_size)
    for h, target in zip(hidden.split(rows), y.flatten().split(rows), strict=True):
        logits = model.lm_head(h).float()  # (rows, V)
        nll.append(F.cross_entropy(logits, target, reduction="none"))
        hit.append(logits.argmax(dim=1) == target)
    return torch.cat(nll).view_as(y), torch.cat(hit).view_as(y)


# ----------------------------------------------------------------------------
# What is told


def table(rows: dict[str, dict]) -> str:
    """The rows as text, a column of COLUMNS each where any has it."""
    columns = [c for c in COLUMNS if any(row[c] is not None for row in rows.values())]
    cells = [["dataset", "split", "tokens", *columns]]
    for name, row in rows.items():
        values = ("" if row[c] is None else f"{row[c]:.4g}" for c in columns[1:])
        cells.append([name, row["split"], f"{row['tokens']:,}", f"{row['loss']:.4f}", *values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [cell.rjust(w) for cell, w in zip(line, widths, strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *padded[1:]]).rstrip())
    return "\n".join(lines)


def write(rows: dict[str, dict], about: dict, folder: Path) -> None:
    """Write folder/eval.json: what was evaluated, and the rows. Raises UserError if it can't."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "eval.json.tmp"
        temporary.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n", "utf-8")
        os.replace(temporary, folder / "eval.json")
    except OSError as error:
        raise UserError(f"{folder / 'eval.json'} can't be written: {error.strerror}") from error


def safe_exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
