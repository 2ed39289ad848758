"""
A model's scores on whole data sets: every token of a split once, with a context that is stated.

A split is read in windows of at most T = block_size inputs that begin `stride` tokens apart. A
window scores those of its targets that earlier windows did not score. So each token but the split's
first is scored exactly once, and from the second window on with at least T - stride tokens of
context. In a data set of passages whose last word is to be guessed (LAMBADA), each passage is a
window of its own. The docstring of evaluate.py defines the numbers that are reported.
"""

import json
import math
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from configurator import UserError
from data.dataset import Dataset
from data.meta import data_folder, held_splits
from data.tokenizer import END_OF_TEXT, from_meta
from engine.files import text_table, whole_file
from engine.progress import tqdm
from engine.runtime import Runtime, full_precision
from model import GPT

MAX_LOGITS = 2**24  # computed at a time: (B T, V) of a large vocabulary would need gigabytes
HEADINGS = {
    "loss": "loss",
    "perplexity": "ppl",
    "word_perplexity": "word ppl",
    "bits_per_byte": "bits/byte",
    "last_word_accuracy": "last word",
    "last_word_perplexity": "its ppl",
}

# first, last, n_skipped: inputs are tokens [first, last); scored is what follows first + n_skipped
Window = tuple[int, int, int]


@dataclass
class Task:
    """What is scored of one data set."""

    name: str
    split: str
    tokens: np.ndarray
    windows: list[Window]
    stride: int | None  # None: each window is a passage
    last_words: list[int]  # length in tokens of each passage's last word; 0 for other windows
    words: int | None = None  # in the text of the split; None: not known
    bytes: int | None = None


def run_evaluation(
    model: GPT, tokenizer_meta: dict | None, about: dict, config, rt: Runtime
) -> int:
    """Score the data sets that config.datasets lists, write the row of each to eval.json together
    with `about` the model, and print a table. `tokenizer_meta` describes the model's tokenizer, if
    that is known. The config also has out_dir, data_dir, eval_stride and batch_size. Returns the
    exit code. A data set that can't be scored is a line on stderr and makes the code 2; the others
    are scored nevertheless."""
    about = {**about, "attn_type": model.config.attn_type, "dtype": rt.dtype}
    names = dict.fromkeys(name.strip() for name in config.datasets.split(","))
    rows, unwritten = {}, None
    for name in names:
        message = ""
        try:
            task = new_task(model, tokenizer_meta, name, config)
        except UserError as error:
            message = f"{name}: {error}"
        if messages := list(filter(None, rt.gather(message))):  # no rank may go on alone
            if rt.is_main:
                print(messages[0], file=sys.stderr)
            continue
        rows[name] = evaluate(model, task, config.batch_size, rt)
        if rt.is_main:
            try:
                write_rows(rows, about, Path(config.out_dir))
                unwritten = None
            except UserError as error:
                unwritten = error
    if rt.is_main and rows:
        print(table(rows))
    if unwritten:
        raise unwritten
    return 0 if len(rows) == len(names) else 2


def new_task(model: GPT, tokenizer_meta: dict | None, name: str, config) -> Task:
    """Raises UserError if the data set is missing or empty, or does not fit the model."""
    held = held_splits(data_folder(name, config.data_dir))
    split = "test" if "test" in held else "val"
    data = Dataset(name, config.data_dir, splits=[split])
    data.check_model(model.config.vocab_size, tokenizer_meta, "the model")
    tokens, T = data.tokens[split], model.config.block_size
    if data.meta.get("last_word") is True:
        windows, last_words = passages(tokens, from_meta(data.tokenizer), T)
        task = Task(name, split, tokens, windows, None, last_words)
    else:
        stride = config.eval_stride or max(1, T // 2)
        windows = strided(len(tokens), T, stride)
        task = Task(name, split, tokens, windows, stride, [0] * len(windows))
        task.words, task.bytes = words_and_bytes(data, split)
    if not windows:
        raise UserError(f"{data.folder / split}.bin has nothing to predict; prepare another text")
    return task


def words_and_bytes(data: Dataset, split: str) -> tuple[int | None, int | None]:
    """Numbers of words and of UTF-8 bytes in the text of a split; None where not known."""
    words, n_bytes = (data.meta.get(f"{split}_{unit}") for unit in ("words", "bytes"))
    if words is not None and data.meta.get("line_ends") is True:
        words += data.meta.get(f"{split}_lines", 0)
    if words is None and data.tokenizer:  # nanoGPT's folders: the tokens are the text
        with suppress(UserError):  # the tokenizer is not on this machine
            text = from_meta(data.tokenizer).decode(data.tokens[split].tolist())
            texts = text.split(END_OF_TEXT)
            words = sum(len(text.split()) for text in texts)
            n_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    return words, n_bytes


def evaluate(model: GPT, task: Task, batch_size: int, rt: Runtime) -> dict:
    """One row of eval.json."""
    started = time.perf_counter()
    sums = score(model, task, batch_size, rt)
    nll, n_scored, hits, last_nll = (math.fsum(column) for column in zip(*sums, strict=True))
    exp = lambda x: math.exp(x) if x < 700 else math.inf
    n_passages = len(task.windows) if task.stride is None else None
    return {
        "split": task.split,
        "stride": task.stride,
        "block_size": model.config.block_size,
        "tokens": int(n_scored),
        "words": task.words,
        "bytes": task.bytes,
        "loss": nll / n_scored,
        "perplexity": exp(nll / n_scored),
        "word_perplexity": exp(nll / task.words) if task.words else None,
        "bits_per_byte": nll / math.log(2) / task.bytes if task.bytes else None,
        "last_word_accuracy": hits / n_passages if n_passages else None,
        "last_word_perplexity": exp(last_nll / n_passages) if n_passages else None,
        "seconds": round(time.perf_counter() - started, 3),
    }


def strided(n_tokens: int, T: int, stride: int) -> list[Window]:
    """Windows of at most T inputs over n_tokens, `stride` apart, but never so far that a target is
    left out. The last window ends with the last target."""
    windows, scored = [], 0
    while scored < n_tokens - 1:
        first = max(0, scored - max(0, T - stride))
        last = min(first + T, n_tokens - 1)
        windows.append((first, last, scored - first))
        scored = last
    return windows


def passages(tokens: np.ndarray, tokenizer, T: int) -> tuple[list[Window], list[int]]:
    """A window of each passage's last T inputs, and the length in tokens of its last word."""
    ends = np.flatnonzero(tokens == getattr(tokenizer, "eot", -1)).tolist()
    windows, last_words, first = [], [], 0
    for end in [*ends, len(tokens)]:
        ids = tokens[first:end].tolist()
        word = tokenizer.decode(ids).split()[-1:]
        if len(ids) > 1 and word:
            n = 1
            while tokenizer.decode(ids[-n:]).split() != word:
                n += 1
            windows.append((max(first, end - 1 - T), end - 1, 0))
            last_words.append(min(n, len(ids) - 1, T))
        first = end + 1
    return windows, last_words


@torch.no_grad()
@full_precision()
def score(model: GPT, task: Task, batch_size: int, rt: Runtime) -> list[list[float]]:
    """Four sums for each batch of windows: -ln p, scored tokens, last words guessed, and the last
    words' -ln p. Ranks share the batches; every rank gets all sums, whatever their number."""
    model.eval()
    # The longest windows come first: if memory is too short, the first batch shows it
    lengths = [last - first for first, last, _ in task.windows]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    sums = torch.zeros(len(batches), 4, dtype=torch.float64)
    hide_bar = None if rt.is_main else True  # None: hidden unless stderr is a terminal
    for b in tqdm(rt.share(len(batches)), task.name, disable=hide_bar, leave=False):
        B, T = len(batches[b]), lengths[batches[b][0]]
        ids = torch.zeros(B, T + 1, dtype=torch.int64)
        counts, in_last_word = torch.zeros(2, B, T, dtype=torch.bool)
        for row, i in enumerate(batches[b]):
            (first, last, n_skipped), n = task.windows[i], lengths[i]
            ids[row, : n + 1] = torch.from_numpy(task.tokens[first : last + 1].astype(np.int64))
            counts[row, n_skipped:n] = True
            in_last_word[row, n - task.last_words[i] : n] = True
        x, y = rt.to_device(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        with rt.autocast():
            nll, hit = token_scores(model, x, y)
        nll, hit = nll.cpu().double(), hit.cpu()
        guessed = (hit | ~in_last_word).all(dim=1) & in_last_word.any(dim=1)
        of_batch = nll[counts].sum(), counts.sum(), guessed.sum(), nll[in_last_word].sum()
        sums[b] = torch.stack(of_batch).double()
    flat = rt.sum(sums.flatten())
    return [flat[i : i + 4] for i in range(0, len(flat), 4)]


def token_scores(model: GPT, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-ln p of each target, and whether it is the likeliest token: (B, T) x 2 -> (B, T) x 2.

    Logits are computed in float32: rounded to bfloat16, GPT-2's would be off by a quarter. With
    `full_precision` float32 is not TF32 either."""
    hidden = model.hidden(x, torch.arange(x.size(1), device=x.device)).flatten(0, 1)  # (B T, C)
    nll, hit, rows = [], [], max(1, MAX_LOGITS // model.config.vocab_size)
    with torch.autocast(x.device.type, enabled=False):
        for h, target in zip(hidden.split(rows), y.flatten().split(rows), strict=True):
            logits = F.linear(h.float(), model.lm_head.weight.float())  # (rows, V)
            nll.append(F.cross_entropy(logits, target, reduction="none"))
            hit.append(logits.argmax(dim=1) == target)
    return torch.cat(nll).view_as(y), torch.cat(hit).view_as(y)


def table(rows: dict[str, dict]) -> str:
    """The rows as text, with those columns of HEADINGS that any row has a value for."""
    columns = [c for c in HEADINGS if any(row[c] is not None for row in rows.values())]
    cells = [["dataset", "split", "tokens", *(HEADINGS[c] for c in columns)]]
    for name, row in rows.items():
        values = ("" if row[c] is None else f"{row[c]:.4g}" for c in columns[1:])
        cells.append([name, row["split"], f"{row['tokens']:,}", f"{row['loss']:.4f}", *values])
    return text_table(cells)


def write_rows(rows: dict[str, dict], about: dict, folder: Path) -> None:
    """Write folder/eval.json: `about` the model, and the rows, which join those of other data sets
    if the file is about the same model already. Raises UserError if it can't be written."""
    path = folder / "eval.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        earlier = json.loads(path.read_text("utf-8"))
        if {k: v for k, v in earlier.items() if k != "results"} == about:
            rows = {**earlier["results"], **rows}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(json.dumps({**about, "results": rows}, indent=1) + "\n")
    except OSError as error:
        reason = f"can't be written ({error.strerror})"
        raise UserError(f"{path} {reason}; choose another --out_dir, or make room") from error
