"""
A trained model and its tokenizer: of a run, of GPT-2, or of a folder in transformers' format.
"""

from dataclasses import dataclass
from pathlib import Path

from configurator import UserError
from data.dataset import data_folder, read_meta
from data.tokenizer import CharTokenizer, GPT2Tokenizer, from_meta, meta_of_folder
from engine import checkpoint as ckpt
from model import GPT


@dataclass
class Trained:
    """A trained model, on the CPU and in eval mode, and what is known about its training."""

    model: GPT
    source: Path | str  # path of the checkpoint, or name or folder of a model for transformers
    tokenizer_meta: dict  # describes the tokenizer, if that is known: see tokenizer.from_meta
    dataset: str | None = None  # name of the data set that the run was trained on
    step: int | None = None  # updates that the run has done

    def tokenizer(self) -> CharTokenizer | GPT2Tokenizer:
        """Raises UserError if the tokenizer has ids that the model does not know, or is GPT-2's
        and not on this machine."""
        tokenizer, vocab_size = from_meta(self.tokenizer_meta), self.model.config.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{self.source} has a vocabulary of {vocab_size}, too few for its tokenizer's "
                f"{tokenizer.vocab_size}; put the meta.pkl or meta.json of its data set into "
                "data/NAME"
            )
        return tokenizer


def load_run(out_dir: str | Path, checkpoint: str = ckpt.LATEST, **overrides) -> Trained:
    """The model of a run's checkpoint; `overrides` are fields of GPTConfig such as attn_impl."""
    if Path(checkpoint).name != checkpoint:
        raise UserError(f"checkpoint={checkpoint!r} must be a file name inside out_dir")
    path = Path(out_dir) / checkpoint
    loaded = ckpt.load(path)
    dataset = str(loaded["config"].get("dataset", "openwebtext"))
    meta = loaded["tokenizer"] or read_meta(data_folder(dataset))  # nanoGPT saves no tokenizer
    model = ckpt.build_model(loaded, path, **overrides).eval()
    return Trained(model, path, meta, dataset, loaded.get("iter_num"))


def load_pretrained(name: str, **overrides) -> Trained:
    """GPT-2, or a model in transformers' format: see GPT.from_pretrained."""
    try:
        model = GPT.from_pretrained(name, overrides).eval()
    except (OSError, ValueError) as error:
        allowed = "resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or hub name"
        raise UserError(f"{error}; init_from is {allowed}") from error
    return Trained(model, name, meta_of_folder(name))


def load(
    out_dir: str | Path = "out",
    checkpoint: str = ckpt.LATEST,
    init_from: str = "resume",
    **overrides,
) -> tuple[GPT, CharTokenizer | GPT2Tokenizer]:
    """A model to draw text from, on the CPU and in eval mode, and its tokenizer.

    `init_from` is "resume" for the run in `out_dir`, or else what GPT.from_pretrained takes.
    `overrides` are fields of GPTConfig such as attn_impl. Raises UserError if either is missing.
    """
    overrides = {"dropout": 0.0, **overrides}
    if init_from == "resume":
        trained = load_run(out_dir, checkpoint, **overrides)
    else:
        from_meta(meta_of_folder(init_from))  # fails sooner than the weights are read
        trained = load_pretrained(init_from, **overrides)
    return trained.model, trained.tokenizer()


def encode_prompt(tokenizer: CharTokenizer | GPT2Tokenizer, prompt: str):
    """The ids of a prompt. An empty prompt stands for the beginning of a document: GPT-2's end of
    text, or a newline. Raises UserError for text that the tokenizer can't encode."""
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
