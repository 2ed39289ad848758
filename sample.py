"""
Draw text from a trained model: a run's checkpoint, or GPT-2.

    python sample.py --out_dir=OUT --start="To be" --num_samples=5 --max_new_tokens=100
    python sample.py --init_from=gpt2-xl --start=FILE:prompt.txt
    python sample.py --out_dir=OUT --start=LINES:prompts.txt --out=texts.jsonl   # a prompt per line
    python sample.py --out_dir=OUT --start=FILES:prompts/     # a prompt per file, in order of names
    python sample.py --out_dir=OUT --temperature=0            # always the likeliest token

A checkpoint holds its tokenizer, so the folder of the run is all that is needed. Texts go to
stdout, and everything else to stderr. Ctrl-C loses only the batch that is being drawn: each one is
written when it is finished. In a notebook:

    from sample import load, generate
    model, tokenizer = load("OUT")
    texts = generate(model, tokenizer, ["To be"], num_samples=3)
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import configurator
from configurator import UserError
from data.dataset import Purpose, random_bits
from engine import runtime
from engine.files import whole_file
from engine.generation import stream
from engine.loading import check_utf8, encode_prompt, load
from engine.progress import tqdm
from model import GPT

RULER = "\n---------------"  # between texts
# The keys that are arguments of `generate`
DRAWING = "num_samples max_new_tokens temperature top_k top_p stop seed window_stride sample_batch"


@dataclass
class Config:
    # Model
    init_from: str = "resume"  # resume (the run in out_dir), gpt2[-medium|...], or a folder
    out_dir: str = "out"  # Folder of the run
    checkpoint: str = "ckpt.pt"  # ckpt.pt: the last state of the run; best.pt: the best one
    data_dir: str | None = None  # Data sets, for nanoGPT's checkpoints; auto: data/

    # Text
    start: str = "\n"  # Prompt, or FILE:one.txt, LINES:prompts.txt, FILES:folder/
    num_samples: int = 10  # Texts for each prompt
    max_new_tokens: int = 500  # Tokens drawn for each text
    temperature: float = 0.8  # 1 draws from the model's distribution; 0 takes the likeliest token
    top_k: int | None = 200  # Draw among the k likeliest tokens; none: among all
    top_p: float = 1.0  # Draw among the likeliest tokens that together have this probability
    stop: str | None = None  # A text ends before the first occurrence of this string
    seed: int = 1337  # Sample i depends on the seed and on i, not on what else is drawn
    window_stride: int | None = None  # Tokens dropped when block_size is full; auto: a quarter
    sample_batch: int = 64  # Texts drawn at the same time at most; fewer need less memory
    out: str | None = None  # File for the texts, .txt or .jsonl; auto: stdout

    # System
    device: str | None = None  # cpu, cuda, cuda:1 or mps; auto takes the best that there is
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # auto depends on the device
    compile: bool = False  # Use torch.compile for the step of one token
    attn_impl: str = "auto"  # Implementation: reference, blockwise, triton; auto takes the fastest


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
    on_tokens: Callable[[Tensor], None] | None = None,
    on_texts: Callable[[list[str]], None] | None = None,
) -> list[str]:
    """`num_samples` texts for each prompt, those of the first prompt first, each with its prompt.
    Sample i of a prompt depends on the seed and on i, not on what else is drawn: in one batch or
    one at a time, the text is the same. `on_tokens` is called with the ids (B,) of each step, and
    `on_texts` with the texts of each batch. Raises UserError for a prompt that can't be encoded."""
    device = next(model.parameters()).device
    encoded = [torch.as_tensor(encode_prompt(tokenizer, p), device=device) for p in prompts]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "compile": compile}
    # Ids beyond the tokenizer's vocabulary only pad the model's
    options |= {"vocab_size": tokenizer.vocab_size, "window_stride": window_stride}
    jobs = [(p, s) for p in range(len(prompts)) for s in range(num_samples)]
    texts = []
    for first in range(0, len(jobs), sample_batch):
        batch = jobs[first : first + sample_batch]
        of_batch = [encoded[p] for p, _ in batch]
        if batch[0][0] == batch[-1][0]:  # one prompt: computed once for all its samples
            of_batch = of_batch[:1]
        copies = len(batch) // len(of_batch)
        uniforms = torch.stack([uniform(seed, s, max_new_tokens) for _, s in batch], dim=1)
        options["uniforms"] = uniforms.to(device)
        drawn = []
        for ids in stream(model, of_batch, copies, max_new_tokens, **options):
            drawn.append(ids)
            if on_tokens:
                on_tokens(ids)
            if stop and len(drawn) % 16 == 0 and all(stop in t for t in decode(tokenizer, drawn)):
                break
        new = decode(tokenizer, drawn) if drawn else [""] * len(batch)
        new = [text.split(stop)[0] if stop else text for text in new]
        finished = [prompts[p] + text for (p, _), text in zip(batch, new, strict=True)]
        texts += finished
        if on_texts:
            on_texts(finished)
    return texts


def decode(tokenizer, drawn: list[Tensor]) -> list[str]:
    """The texts of B rows, from the ids (B,) of each step."""
    return [tokenizer.decode(row) for row in torch.stack(drawn, dim=1).tolist()]


def uniform(seed: int, sample: int, n: int) -> Tensor:
    """n random numbers in (0, 1], float32, that depend on nothing but the arguments."""
    bits = random_bits(seed, Purpose.SAMPLING, 0, sample, n) >> 40  # 24 of them
    return torch.from_numpy(((bits + 1) / 2**24).astype("float32"))


def read_prompts(start: str) -> list[str]:
    """The prompt `start`, or the prompts in the file or folder that it names."""
    kind, _, name = start.partition(":")
    if kind not in ("FILE", "LINES", "FILES"):
        return [start]
    paths, texts = [Path(os.path.expanduser(name))], []
    if kind == "FILES":
        paths = sorted(path for path in paths[0].glob("*") if path.is_file())
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8", errors="surrogateescape"))
        except OSError as error:
            raise UserError(f"prompt file {path} can't be read: {error.strerror}") from error
        check_utf8(texts[-1], f"prompt file {path}")
    if kind == "LINES":
        texts = [line for line in texts[0].splitlines() if line]
    if not texts:
        raise UserError(f"start={start} has no prompt in it; give one per line, or one per file")
    return texts


class Live:
    """Prints one text while its tokens are drawn, as far as later tokens can't change it."""

    def __init__(self, tokenizer, stop: str | None):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids, self.n_printed = [], 0

    def add(self, ids: Tensor) -> None:
        self.ids += ids.tolist()
        text, stop = self.tokenizer.decode(self.ids), self.stop or ""
        if stop and stop in text:
            text = text.split(stop)[0]
        else:
            text = text.rstrip("\ufffd")  # a token may hold some bytes of a character only
            begun = max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            text = text[: len(text) - begun]
        self.show(text)

    def show(self, text: str) -> None:
        """Print what is new in `text`, which begins with all that was printed."""
        print(text[self.n_printed :], end="", flush=True)
        self.n_printed = max(self.n_printed, len(text))


class Output:
    """Writes each batch of texts when it is finished. Meanwhile a bar counts the tokens, but a
    single text for a terminal appears there token by token."""

    def __init__(self, config: Config, prompts: list[str], tokenizer):
        self.config, self.prompts = config, prompts
        self.n_tokens, self.n_texts = 0, 0  # drawn, and written, so far
        self.total, self.live = len(prompts) * config.num_samples, None
        self.interrupt = runtime.Interrupt()
        if self.total == 1 and config.out is None and sys.stdout.isatty():
            self.live = Live(tokenizer, config.stop)
            print(prompts[0], end="", flush=True)
        hide_bar = True if self.live else None  # None: hidden unless stderr is a terminal
        n = self.total * config.max_new_tokens
        self.bar = tqdm(total=n, unit="token", leave=False, disable=hide_bar)

    def add_tokens(self, ids: Tensor) -> None:
        self.n_tokens += len(ids)
        self.bar.update(len(ids))
        if self.live:
            self.live.add(ids)
        if self.interrupt.signal:  # checked here, so that no batch is written in part
            raise KeyboardInterrupt

    def add_texts(self, texts: list[str]) -> None:
        self.bar.clear()
        if self.live:
            self.live.show(texts[0].removeprefix(self.prompts[0]))
            print(RULER)
        elif self.config.out is None:
            print("\n".join(text + RULER for text in texts), flush=True)
        else:
            self.write(texts)
        self.n_texts += len(texts)

    def write(self, texts: list[str]) -> None:
        """Write a batch to the file `out`, which the first one replaces."""
        path, n = Path(self.config.out), self.config.num_samples
        lines = [text + RULER for text in texts]
        if path.suffix == ".jsonl":
            lines = [
                json.dumps({"prompt": self.prompts[i // n], "sample": i % n, "text": text})
                for i, text in enumerate(texts, self.n_texts)
            ]
        try:
            joins = self.n_texts > 0
            with path.open("a", encoding="utf-8") if joins else whole_file(path.resolve()) as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:
            raise UserError(f"out={path} can't be written: {error.strerror}") from error


def main() -> None:
    config = Config(**configurator.parse(Config, sys.argv[1:]))
    if config.out is not None:
        if not config.out.endswith((".txt", ".jsonl")):
            raise UserError(f"out={config.out} must end in .txt or .jsonl")
        folder = Path(config.out).absolute().parent
        if not os.access(folder, os.W_OK):  # said before the work, not after it
            raise UserError(f"out={config.out} can't be written; try  mkdir -p {folder}")
    prompts = read_prompts(config.start)
    rt = runtime.start(config.device, config.dtype, config.compile)
    source = config.out_dir, config.checkpoint, config.init_from, config.data_dir
    model, tokenizer = load(*source, attn_impl=config.attn_impl)
    model.to(rt.device, getattr(torch, rt.dtype))  # the weights are cast once, not at each step
    runtime.limit_threads(model.get_num_params(), model.config.block_size)
    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
    if longest > model.config.block_size:
        seen = f"the model sees only the last {model.config.block_size} of them (block_size)"
        print(f"a prompt has {longest} tokens: {seen}", file=sys.stderr)
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    output = Output(config, prompts, tokenizer)
    started = time.perf_counter()
    with output.interrupt, suppress(KeyboardInterrupt), runtime.full_precision():
        options = {key: getattr(config, key) for key in DRAWING.split()}
        options |= {"on_tokens": output.add_tokens, "on_texts": output.add_texts}
        generate(model, tokenizer, prompts, compile=rt.compile, **options)
    output.bar.close()
    if output.interrupt.signal:
        if output.live:
            print()
        print(f"stopped: {output.n_texts} of {output.total} texts are written", file=sys.stderr)
        sys.exit(128 + output.interrupt.signal)
    rt.synchronize()
    speed = output.n_tokens / (time.perf_counter() - started)
    print(f"{output.n_tokens:,} tokens, {speed:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    configurator.run(main)
