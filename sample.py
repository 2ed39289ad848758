"""
Text from a checkpoint, or from GPT-2.

    python sample.py --out_dir=OUT --start="To be" --num_samples=5 --max_new_tokens=100
    python sample.py --init_from=gpt2-xl --start=FILE:prompt.txt
    python sample.py --out_dir=OUT --start=LINES:prompts.txt --out=texts.jsonl   # a prompt per line
    python sample.py --out_dir=OUT --start=FILES:prompts/     # a prompt per file, in order of names
    python sample.py --out_dir=OUT --temperature=0            # greedy

A checkpoint carries its tokenizer, so that its folder is all that is needed. Texts go to stdout,
all else to stderr. In a notebook:

    from sample import load, generate
    model, tokenizer = load("OUT")
    texts = generate(model, tokenizer, ["To be"], num_samples=3)
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import configurator
from configurator import UserError
from data import tokenizer as tokenizers
from data.dataset import Purpose, random_bits
from data.meta import data_folder, read_meta
from engine import checkpoint as ckpt
from engine import runtime
from engine.generation import stream
from model import GPT


@dataclass
class Config:
    # Model
    init_from: str = "resume"  # resume (out_dir), gpt2[-medium|-large|-xl], a folder or hub name
    out_dir: str = "out"  # folder of the run
    checkpoint: str = "ckpt.pt"  # ckpt.pt is its last state, best.pt that of the lowest val loss

    # Text
    start: str = "\n"  # the prompt, or FILE:one.txt, LINES:prompts.txt, FILES:folder/
    num_samples: int = 10  # texts for each prompt
    max_new_tokens: int = 500  # per text
    temperature: float = 0.8  # 1: as the model says; below: more likely tokens; 0: the likeliest
    top_k: int | None = 200  # only among the k likeliest tokens; none: among all
    top_p: float = 1.0  # only among the likeliest tokens that together have this probability
    stop: str | None = None  # a text ends before this, if it comes to it
    seed: int = 1337  # sample i of a seed draws the same numbers, whatever is drawn beside it
    window_stride: int | None = None  # tokens forgotten at once beyond block_size; auto: a quarter
    sample_batch: int = 64  # texts drawn at the same time at most; fewer need less memory
    out: str | None = None  # file for the texts instead of stdout: .txt or .jsonl

    # System
    device: str | None = None  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: str | None = None  # float32, bfloat16 or float16; auto: by the device
    compile: bool = False  # torch.compile of the step of one token, with CUDA graphs on a GPU
    attn_impl: str = "auto"  # reference (the formula), blockwise or triton; auto: the fastest


# ----------------------------------------------------------------------------
# For notebooks too


def load(
    out_dir: str = "out", checkpoint: str = "ckpt.pt", init_from: str = "resume", **overrides
) -> tuple[GPT, object]:
    """The model, on the CPU and in eval mode, and its tokenizer.

    `overrides` are fields of GPTConfig such as attn_impl. Raises UserError if either can't be had.
    """
    overrides = {"dropout": 0.0, **overrides}
    if init_from != "resume":
        tokenizer = tokenizers.from_meta(tokenizers.meta_of_folder(init_from))  # it fails sooner
        try:
            model = GPT.from_pretrained(init_from, overrides).eval()
        except (OSError, ValueError) as error:
            allowed = "resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or hub name"
            raise UserError(f"{error}; init_from is {allowed}") from error
        return model, fitting(tokenizer, model, init_from)

    loaded, path, meta = read_run(out_dir, checkpoint)
    model = ckpt.build_model(loaded, path, **overrides).eval()
    return model, fitting(tokenizers.from_meta(meta), model, path)


def read_run(out_dir: str, checkpoint: str) -> tuple[dict, Path, dict]:
    """A checkpoint of a run, its path, and what describes its tokenizer."""
    if Path(checkpoint).name != checkpoint:
        raise UserError(f"checkpoint={checkpoint!r} must be a file name inside out_dir")
    path = Path(out_dir) / checkpoint
    loaded = ckpt.load(path)
    meta = loaded.get("tokenizer")
    if not meta:  # nanoGPT's checkpoints name their data set instead
        meta = read_meta(data_folder(str(loaded["config"].get("dataset", "openwebtext"))))
    return loaded, path, meta


def fitting(tokenizer, model: GPT, source: object):
    """`tokenizer`, unless it has ids that the model does not know: then a UserError."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{source} has a vocabulary of {model.config.vocab_size}, too few for its tokenizer's "
            f"{tokenizer.vocab_size}; put the meta.pkl or meta.json of its data set into data/NAME"
        )
    return tokenizer


def generate(
    model: GPT,
    tokenizer,
    prompts: list[str],
    num_samples: int = 1,
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float = 1.0,
    stop: str | None = None,
    seed: int = 1337,
    window_stride: int | None = None,
    sample_batch: int = 64,
    compile: bool = False,
    on_tokens: Callable[[torch.Tensor], None] | None = None,
) -> list[str]:
    """`num_samples` texts for each prompt, prompts first, drawn on the model's device.

    Sample i of a prompt depends on the seed and on i, not on what else is drawn: in one batch or
    one at a time the text is the same. `on_tokens` is called with the ids (B,) of each step. Raises
    UserError for a prompt that the tokenizer can't encode.
    """
    device = next(model.parameters()).device
    encoded = [torch.as_tensor(encode(tokenizer, prompt), device=device) for prompt in prompts]
    jobs = [(p, s) for p in range(len(prompts)) for s in range(num_samples)]
    texts = []
    for first in range(0, len(jobs), sample_batch):
        batch = jobs[first : first + sample_batch]
        uniforms = torch.stack([uniform(seed, s, max_new_tokens) for _, s in batch], dim=1)
        whole = len({p for p, _ in batch}) == 1  # one prompt: computed once for all its samples
        rows = [encoded[batch[0][0]]] if whole else [encoded[p] for p, _ in batch]
        drawn = []
        for ids in stream(
            model,
            rows,
            len(batch) if whole else 1,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            tokenizer.vocab_size,  # ids from there on pad the model's vocabulary: they mean nothing
            window_stride,
            uniforms.to(device),
            compile,
        ):
            drawn.append(ids)
            if on_tokens:
                on_tokens(ids)
            if stop and len(drawn) % 16 == 0 and all(stop in t for t in decode(tokenizer, drawn)):
                break
        new = decode(tokenizer, drawn) if drawn else [""] * len(batch)
        new = [text.split(stop)[0] if stop else text for text in new]
        texts += [prompts[p] + text for (p, _), text in zip(batch, new, strict=True)]
    return texts


def decode(tokenizer, drawn: list[torch.Tensor]) -> list[str]:
    return [tokenizer.decode(row) for row in torch.stack(drawn, dim=1).tolist()]


def uniform(seed: int, sample: int, n: int) -> torch.Tensor:
    """n random numbers in (0, 1], float32, that depend on nothing but the arguments."""
    bits = random_bits(seed, Purpose.SAMPLING, 0, sample, n) >> 40  # 24 of them
    return torch.from_numpy(((bits + 1) / 2**24).astype("float32"))


def encode(tokenizer, prompt: str):
    """The ids of a prompt. An empty one is what a document begins with: GPT-2's end of text, or a
    newline. Raises UserError if the tokenizer knows neither."""
    if prompt:
        return tokenizer.encode(prompt)
    if hasattr(tokenizer, "eot"):
        return [tokenizer.eot]
    try:
        return tokenizer.encode("\n")
    except UserError as error:
        raise UserError(
            "the prompt is empty, and this tokenizer has no newline to begin with; pass some text, "
            'e.g. --start="The"'
        ) from error


# ----------------------------------------------------------------------------
# The script


def read_prompts(start: str) -> list[str]:
    """The prompts that `start` is, or that the file or folder which it names holds."""
    kind, _, name = start.partition(":")
    if kind not in ("FILE", "LINES", "FILES"):
        return [start]
    path = Path(name)
    paths = sorted(p for p in path.glob("*") if p.is_file()) if kind == "FILES" else [path]
    try:
        texts = [p.read_text(encoding="utf-8") for p in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {path} can't be read as UTF-8 text: {error}") from error
    if kind == "LINES":
        texts = [line for line in texts[0].splitlines() if line]
    if not texts:
        raise UserError(f"start={start} has no prompt in it; give one per line, or one per file")
    return texts


class Live:
    """Shows text as it is drawn, in whole characters: a token may be a part of one."""

    def __init__(self, tokenizer, stop: str | None):
        self.tokenizer, self.stop = tokenizer, stop
        self.pending, self.held, self.ended = [], "", False

    def __call__(self, ids: torch.Tensor) -> None:
        self.pending.append(int(ids[0]))
        text = self.tokenizer.decode(self.pending)
        if text.endswith("\ufffd") and len(self.pending) < 4:
            return
        self.pending = []
        self.show(text)

    def show(self, text: str, last: bool = False) -> None:
        self.held += text
        if self.ended:
            return
        keep = 0  # characters that may be the beginning of the stop text
        if self.stop:
            before, found, _ = self.held.partition(self.stop)
            if found:
                self.held, self.ended = before, True
            elif not last:
                ends = (
                    n for n in range(len(self.stop) - 1, 0, -1) if self.held.endswith(self.stop[:n])
                )
                keep = next(ends, 0)
        end = len(self.held) - keep
        print(self.held[:end], end="", flush=True)
        self.held = self.held[end:]

    def end(self) -> None:
        self.show(self.tokenizer.decode(self.pending), last=True)


def write(texts: list[str], config: Config, prompts: list[str]) -> None:
    """To stdout, each text with a ruler below it, or to the file `out`."""
    if config.out is None:
        for text in texts:
            print(text)
            print("---------------")
        return
    rows = [
        {"prompt": prompts[i // config.num_samples], "sample": i % config.num_samples, "text": text}
        for i, text in enumerate(texts)
    ]
    try:
        with open(config.out, "w", encoding="utf-8") as file:
            for row in rows:
                jsonl = config.out.endswith(".jsonl")
                file.write((json.dumps(row) if jsonl else row["text"] + "\n" + 15 * "-") + "\n")
    except OSError as error:
        raise UserError(f"out={config.out} can't be written: {error.strerror}") from error


def main() -> None:
    config = Config(**configurator.parse(Config, sys.argv[1:]))
    configurator.check_rules(vars(config))
    if config.out is not None and not config.out.endswith((".txt", ".jsonl")):
        raise UserError(f"out={config.out} must end in .txt or .jsonl")
    prompts = read_prompts(config.start)
    rt = runtime.start(config.device, config.dtype, config.compile)
    model, tokenizer = load(
        config.out_dir, config.checkpoint, config.init_from, attn_impl=config.attn_impl
    )
    model.to(rt.device, getattr(torch, rt.dtype))  # the weights are cast once, not at each step
    block_size = model.config.block_size
    longest = max(len(encode(tokenizer, prompt)) for prompt in prompts)
    if longest > block_size:
        told = f"a prompt has {longest} tokens: only the last {block_size} (block_size) are seen"
        print(told, file=sys.stderr)
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character

    n_texts = len(prompts) * config.num_samples
    live, bar, on_tokens = None, None, None
    if n_texts == 1 and config.out is None and sys.stdout.isatty():
        on_tokens = live = Live(tokenizer, config.stop)
        print(prompts[0], end="", flush=True)
    elif sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(total=n_texts * config.max_new_tokens, unit="token", leave=False)
        on_tokens = lambda ids: bar.update(len(ids))  # noqa: E731

    drawn = 0

    def count(ids):
        nonlocal drawn
        drawn += len(ids)
        if on_tokens:
            on_tokens(ids)

    started = time.perf_counter()
    texts = generate(
        model,
        tokenizer,
        prompts,
        config.num_samples,
        config.max_new_tokens,
        config.temperature,
        config.top_k,
        config.top_p,
        config.stop,
        config.seed,
        config.window_stride,
        config.sample_batch,
        rt.compile,
        count,
    )
    rt.synchronize()
    seconds = time.perf_counter() - started
    if live:
        live.end()
        print("\n---------------")
    else:
        if bar:
            bar.close()
        write(texts, config, prompts)
    print(f"{drawn:,} tokens, {drawn / seconds:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    configurator.run(main)
