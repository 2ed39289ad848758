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
                          the Penn Treebank line ends too, as in the papers; not of passages
    bits_per_byte         sum of -log2 p / bytes of the text in UTF-8; not of passages
    last_word_accuracy    share of passages whose last word is the likeliest, token by token
    last_word_perplexity  exp(mean over passages of the last word's -ln p)
"""

import json
import math
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from configurator import UserError
from data import tokenizer as tokenizers
from data.dataset import Dataset
from data.meta import data_folder, held_splits
from model import GPT

LOGITS = 2**24  # at a time, so that a large vocabulary's are never whole
HEADINGS = {
    "loss": "loss",
    "perplexity": "ppl",
    "word_perplexity": "word ppl",
    "bits_per_byte": "bits/byte",
    "last_word_accuracy": "last word",
    "last_word_perplexity": "its ppl",
}

Window = tuple[int, int, int]  # inputs [first, last), of whose targets those from `scored` on count


@dataclass
class Task:
    """What is to be scored of one data set."""

    name: str
    split: str
    tokens: np.ndarray
    windows: list[Window]
    stride: int | None  # None: windows are passages
    last_words: list[int]  # tokens of each window's last word; 0 where it does not matter
    words: int | None = None  # of the text that the tokens are, None if that is not known
    bytes: int | None = None


def run(model: GPT, known_as: dict | None, about: dict, config, rt) -> int:
    """Evaluate on config.datasets, print the table, and write each row when it is there to
    eval.json, with what is known `about` the model. Returns the exit code: 2 if a data set can't be
    had, which is told on stderr; the others go on.

    `known_as` is the tokenizer that the model was trained with, None if that is not known.
    """
    about = {**about, "attn_type": config.attn_type, "dtype": rt.dtype}
    names = dict.fromkeys(name.strip() for name in config.datasets.split(","))
    rows = {}
    for name in names:
        task, trouble = None, ""
        try:
            task = new_task(model, known_as, name, config)
        except UserError as error:
            trouble = f"{name}: {error}"
        if troubles := list(filter(None, rt.gather(trouble))):  # of any rank: all go on together
            if rt.is_main:
                print(troubles[0], file=sys.stderr)
            continue
        rows[name] = evaluate(model, task, config.batch_size, rt)
        if rt.is_main:
            write(rows, about, Path(config.out_dir))
    if rt.is_main and rows:
        print(table(rows))
    return 0 if len(rows) == len(names) else 2


def new_task(model: GPT, known_as: dict | None, name: str, config) -> Task:
    """Raises UserError if the data set is missing, empty, or not one for this model."""
    held = held_splits(data_folder(name, config.data_dir))
    data = Dataset(name, config.data_dir, splits=["test" if "test" in held else "val"])
    data.check_model(model.config.vocab_size, known_as, "the model")
    ((split, tokens),) = data.tokens.items()
    T = model.config.block_size
    if data.meta.get("last_word") is True:
        found = passages(tokens, tokenizers.from_meta(data.tokenizer), T)
        windows, last_words = [window for window, _ in found], [n for _, n in found]
        task = Task(name, split, tokens, windows, None, last_words)
    else:
        stride = config.eval_stride or max(1, T // 2)
        windows = strided(len(tokens), T, stride)
        task = Task(name, split, tokens, windows, stride, [0] * len(windows))
        task.words, task.bytes = (data.meta.get(f"{split}_{unit}") for unit in ("words", "bytes"))
        if task.words is None and data.tokenizer:  # nanoGPT's: its text is what was encoded
            with suppress(UserError):  # the tokenizer is not on this machine
                task.words, task.bytes = count(tokens, tokenizers.from_meta(data.tokenizer))
        elif task.words is not None and data.meta.get("line_ends") is True:
            task.words += data.meta.get(f"{split}_lines", 0)
    if not windows:
        raise UserError(f"{data.folder / split}.bin has nothing to predict; prepare another text")
    return task


def evaluate(model: GPT, task: Task, batch_size: int, rt) -> dict:
    """One row of eval.json."""
    started = time.perf_counter()
    sums = score(model, task, batch_size, rt)
    nll, n_scored, hits, last_nll = (math.fsum(column) for column in zip(*sums, strict=True))
    words, n_bytes, by_passage = task.words, task.bytes, task.stride is None
    return {
        "split": task.split,
        "stride": task.stride,
        "block_size": model.config.block_size,
        "tokens": int(n_scored),
        "words": words,
        "bytes": n_bytes,
        "loss": nll / n_scored,
        "perplexity": safe_exp(nll / n_scored),
        "word_perplexity": safe_exp(nll / words) if words else None,
        "bits_per_byte": nll / math.log(2) / n_bytes if n_bytes else None,
        "last_word_accuracy": hits / len(task.windows) if by_passage else None,
        "last_word_perplexity": safe_exp(last_nll / len(task.windows)) if by_passage else None,
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
    texts = tokenizer.decode(tokens.tolist()).split(tokenizers.END_OF_TEXT)
    n_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    return sum(len(text.split()) for text in texts), n_bytes


# ----------------------------------------------------------------------------
# Scores


@torch.no_grad()
def score(model: GPT, task: Task, batch_size: int, rt) -> list[list[float]]:
    """For each batch of windows: sum of -ln p, scored tokens, last words that were guessed, and the
    last words' -ln p. Ranks share the batches; each gets all sums, which are the same for any
    number of ranks."""
    model.eval()
    tokens, windows = task.tokens, task.windows
    # The longest first: if memory is short, that is known at once
    order = sorted(range(len(windows)), key=lambda i: windows[i][0] - windows[i][1])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    sums = torch.zeros(len(batches), 4, dtype=torch.float64)
    mine, hide = rt.share(len(batches)), None if rt.is_main else True
    for b in tqdm(mine, task.name, disable=hide, leave=False):
        chosen = [windows[i] for i in batches[b]]
        longest = max(last - first for first, last, _ in chosen)
        ids = torch.zeros(len(chosen), longest + 1, dtype=torch.int64)
        counts = torch.zeros(len(chosen), longest, dtype=torch.bool)
        is_last = torch.zeros_like(counts)
        for row, (i, (first, last, scored)) in enumerate(zip(batches[b], chosen, strict=True)):
            n = last - first
            ids[row, : n + 1] = torch.from_numpy(tokens[first : last + 1].astype(np.int64))
            counts[row, scored:n] = True
            is_last[row, n - task.last_words[i] : n] = True
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
    """-ln p of each target, and whether it is the likeliest token: (B, T) x 2 -> (B, T) x 2.

    Logits are computed in float32: rounded to bfloat16, GPT-2's would be off by a quarter."""
    hidden = model.hidden(x, torch.arange(x.size(1), device=x.device)).flatten(0, 1)  # (B T, C)
    nll, hit, rows = [], [], max(1, LOGITS // model.config.vocab_size)
    with torch.autocast(x.device.type, enabled=False):
        for h, target in zip(hidden.split(rows), y.flatten().split(rows), strict=True):
            logits = F.linear(h.float(), model.lm_head.weight.float())  # (rows, V)
            nll.append(F.cross_entropy(logits, target, reduction="none"))
            hit.append(logits.argmax(dim=1) == target)
    return torch.cat(nll).view_as(y), torch.cat(hit).view_as(y)


# ----------------------------------------------------------------------------
# What is told


def table(rows: dict[str, dict]) -> str:
    """The rows as text, a column of HEADINGS each where any has it."""
    columns = [c for c in HEADINGS if any(row[c] is not None for row in rows.values())]
    cells = [["dataset", "split", "tokens", *(HEADINGS[c] for c in columns)]]
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
    """Write folder/eval.json: what was evaluated, and the rows, beside those of other data sets
    that it holds of the same model. Raises UserError if it can't be written."""
    path, temporary = folder / "eval.json", folder / "eval.json.tmp"
    with suppress(OSError, ValueError, KeyError, TypeError):
        earlier = json.loads(path.read_text("utf-8"))
        if {k: v for k, v in earlier.items() if k != "results"} == about:
            rows = {**earlier["results"], **rows}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n", "utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error


def safe_exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
