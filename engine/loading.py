"""A trained model and its tokenizer: of a run, a GPT-2, or a folder that export.py wrote."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError
from data.meta import DATA_DIR, data_folder, read_meta, tokenizer_of
from data.tokenizer import Tokenizer, from_meta, meta_of_model
from engine import checkpoint as ckpt
from model import GPT


@dataclass
class Trained:
    """A trained model, on the CPU and in eval mode, and what is known about its training."""

    model: GPT
    source: Path | str  # path of the checkpoint, or name or folder of a model for transformers
    tokenizer_meta: dict  # describes the tokenizer (see tokenizer.from_meta); {}: not known
    dataset: str | None = None  # name of the data set that the run was trained on
    step: int | None = None  # updates that the run has done
    best_val_loss: float = math.inf
    no_tokenizer: str = ""  # why the tokenizer is not known, and how to repair that

    def tokenizer(self) -> Tokenizer:
        """Raises UserError if the tokenizer is not known, has ids that the model does not know, or
        is GPT-2's and not on this machine."""
        if self.no_tokenizer:
            raise UserError(self.no_tokenizer)
        tokenizer, vocab_size = from_meta(self.tokenizer_meta), self.model.config.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{self.source} has a vocabulary of {vocab_size}, too few for its tokenizer's "
                f"{tokenizer.vocab_size}; of models in transformers' format, only GPT-2's "
                "tokenizer and those that export.py writes can be read"
            )
        return tokenizer


def load(
    out_dir: str | Path = "out",
    checkpoint: str = ckpt.LATEST,
    init_from: str = "resume",
    data_dir: str | Path | None = None,
    **overrides,
) -> tuple[GPT, Tokenizer]:
    """A model to draw text from, on the CPU and in eval mode, and its tokenizer; the arguments are
    those of load_trained. Raises UserError if either can't be had."""
    overrides = {"dropout": 0.0, **overrides}
    trained = load_trained(out_dir, checkpoint, init_from, data_dir, **overrides)
    return trained.model, trained.tokenizer()


def load_trained(
    out_dir: str | Path, checkpoint: str, init_from: str, data_dir: str | Path | None, **overrides
) -> Trained:
    """The model of a checkpoint in `out_dir`, or what GPT.from_pretrained makes of `init_from`.
    `data_dir` holds the data sets, which know the tokenizers of nanoGPT's checkpoints. `overrides`
    are fields of GPTConfig such as attn_impl."""
    if init_from != "resume":
        try:
            model = GPT.from_pretrained(init_from, overrides).eval()
        except (OSError, ValueError) as error:
            allowed = "resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or hub name"
            raise UserError(f"{error}; init_from is {allowed}") from error
        return Trained(model, init_from, meta_of_model(init_from))
    if Path(checkpoint).name != checkpoint:
        raise UserError(f"checkpoint={checkpoint!r} must be a file name inside out_dir")
    path = Path(out_dir) / checkpoint
    loaded = ckpt.load(path)
    dataset = str(loaded["config"].get("dataset", "openwebtext"))
    model = ckpt.build_model(loaded, path, **overrides).eval()
    meta, no_tokenizer = loaded["tokenizer"], ""
    if not meta:  # nanoGPT saves none
        try:
            meta = meta_of_dataset(dataset, data_dir, model.config.vocab_size)
        except UserError as error:
            no_tokenizer = f"the tokenizer of {path} is not known: {error}"
    best_val_loss = math.inf
    with suppress(TypeError, ValueError, RuntimeError):  # nanoGPT's is a tensor; it may be missing
        best_val_loss = float(loaded.get("best_val_loss"))
    step = loaded.get("iter_num")
    return Trained(model, path, meta, dataset, step, best_val_loss, no_tokenizer)


def meta_of_dataset(name: str, data_dir: str | Path | None, vocab_size: int) -> dict:
    """What describes the tokenizer of a data set, for a model that knows vocab_size ids."""
    folder = data_folder(name, data_dir)
    meta = read_meta(folder)
    if meta.get("tokenizer") and meta["vocab_size"] <= vocab_size:
        return tokenizer_of(meta)
    shown = os.path.relpath(folder)
    lacks, repair = f"no tokenizer of at most {vocab_size} ids", f"put its meta.pkl into {shown}"
    if meta.get("tokenizer") is None:
        lacks, repair = "only token ids", "add the strings of the tokens to its meta.pkl as itos"
    elif (DATA_DIR / name / "prepare.py").is_file():
        repair = f"run  python data/{name}/prepare.py" + (f" --out {shown}" if data_dir else "")
    raise UserError(
        f"it was trained on data set {name}, and {shown} has {lacks}; {repair}, or pass "
        f"--data_dir=FOLDER if there is a FOLDER/{name}/meta.pkl"
    )


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Sequence[int]:
    """The ids of a prompt. An empty prompt stands for the beginning of a document: GPT-2's end of
    text, or a newline. Raises UserError for text that the tokenizer can't encode."""
    check_utf8(prompt, "the prompt")
    if not prompt and hasattr(tokenizer, "eot"):
        return [tokenizer.eot]
    try:
        return tokenizer.encode(prompt or "\n")
    except UserError as error:
        if prompt:
            raise
        raise UserError(
            "the prompt is empty, and this tokenizer has no newline to begin with; pass some text, "
            'e.g. --start="The"'
        ) from error


def check_utf8(text: str, name: str) -> None:
    """Raise UserError if `text` has lone surrogates, in place of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text, from character {error.start + 1} on; convert it first, "
            "e.g. with  iconv -f latin1 -t utf-8 OLD.txt > NEW.txt"
        ) from error
