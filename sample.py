"""
Text from a checkpoint, or from GPT-2.

    python sample.py --out_dir=OUT --start="To be" --num_samples=5 --max_new_tokens=100
    python sample.py --init_from=gpt2-xl --start=FILE:prompt.txt
    python sample.py --out_dir=OUT --temperature=0              # greedy

A checkpoint carries its tokenizer, so that its folder is all that is needed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint as ckpt
import configurator
import runtime
import tokenizer as tokenizers
from configurator import UserError
from dataset import data_folder, read_meta
from model import GPT


@dataclass
class Config:
    # Model
    init_from: str = "resume"  # resume (out_dir), gpt2[-medium|-large|-xl], a folder or hub name
    out_dir: str = "out"  # folder of the run
    checkpoint: str = "ckpt.pt"  # ckpt.pt is its last state, best.pt that of the lowest val loss

    # Text
    start: str = "\n"  # the prompt, or FILE:prompt.txt
    num_samples: int = 10  # drawn in one batch
    max_new_tokens: int = 500  # per sample
    temperature: float = 0.8  # 1: as the model says; below: more likely tokens; 0: the likeliest
    top_k: int | None = 200  # only among the k likeliest tokens; none: among all
    seed: int = 1337  # the same seed draws the same text

    # System
    device: str | None = None  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: str | None = None  # float32, bfloat16 or float16; auto: by the device
    compile: bool = False  # torch.compile
    attn_impl: str = "auto"  # reference (the formula), blockwise or triton; auto: the fastest


def load(config: Config) -> tuple[GPT, object]:
    """The model, on the CPU and in eval mode, and its tokenizer. Raises UserError if either can't
    be had."""
    overrides = {"dropout": 0.0, "attn_impl": config.attn_impl}
    if config.init_from != "resume":
        tokenizer = tokenizers.from_meta({"tokenizer": "gpt2"})  # first: it fails sooner
        try:
            model = GPT.from_pretrained(config.init_from, overrides).eval()
        except (OSError, ValueError) as error:
            allowed = "resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or hub name"
            raise UserError(f"{error}; init_from is {allowed}") from error
        return model, fitting(tokenizer, model, config.init_from)

    if Path(config.checkpoint).name != config.checkpoint:
        raise UserError(f"checkpoint={config.checkpoint!r} must be a file name inside out_dir")
    path = Path(config.out_dir) / config.checkpoint
    checkpoint = ckpt.load(path)
    meta = checkpoint.get("tokenizer")
    if not meta:  # nanoGPT's checkpoints name their data set instead
        meta = read_meta(data_folder(str(checkpoint["config"].get("dataset", "openwebtext"))))
    model = ckpt.build_model(checkpoint, path, **overrides).eval()
    return model, fitting(tokenizers.from_meta(meta), model, path)


def fitting(tokenizer, model: GPT, source: object):
    """`tokenizer`, unless it has ids that the model does not know: then a UserError."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{source} has a vocabulary of {model.config.vocab_size}, too few for its tokenizer's "
            f"{tokenizer.vocab_size}; put the meta.pkl or meta.json of its data set into data/NAME"
        )
    return tokenizer


def read_prompt(start: str) -> str:
    """The text of `start`, or of the file that it names as FILE:path."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {path} can't be read as UTF-8 text: {error}") from error


def generate(
    model: GPT,
    tokenizer,
    prompt: str,
    num_samples: int = 1,
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int | None = 200,
) -> list[str]:
    """`num_samples` texts that begin with `prompt`, drawn in one batch on the model's device."""
    ids = tokenizer.encode(prompt)
    if len(ids) == 0:
        raise UserError('the prompt is empty; pass some text, e.g. --start="The"')
    device = next(model.parameters()).device
    idx = torch.as_tensor(ids, dtype=torch.long, device=device).expand(num_samples, -1)  # (B, T)
    # Ids from the tokenizer's size on pad the model's vocabulary: they stand for no text
    y = model.generate(idx, max_new_tokens, temperature, top_k, vocab_size=tokenizer.vocab_size)
    return [tokenizer.decode(row) for row in y.tolist()]


def main() -> None:
    config = Config(**configurator.parse(Config, sys.argv[1:]))
    prompt = read_prompt(config.start)
    rt = runtime.start(config.device, config.dtype, config.compile)
    model, tokenizer = load(config)
    model.to(rt.device)
    if rt.compile:
        model.compile()
    torch.manual_seed(config.seed)
    with rt.autocast():
        texts = generate(
            model,
            tokenizer,
            prompt,
            config.num_samples,
            config.max_new_tokens,
            config.temperature,
            config.top_k,
        )
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    for text in texts:
        print(text)
        print("---------------")


if __name__ == "__main__":
    configurator.run(main)
