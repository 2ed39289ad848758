"""
A checkpoint as a folder that transformers loads: a GPT2LMHeadModel and its tokenizer.

    python export.py --out_dir=OUT --to=DIR
    python export.py --out_dir=OUT --to=DIR --checkpoint=best.pt
    python export.py --out_dir=OUT --to=DIR --merge     # of a run with adapters (LoRA)

    AutoModelForCausalLM.from_pretrained("DIR"), AutoTokenizer.from_pretrained("DIR")

transformers knows softmax alone. Of another attention config.json says attn_type, pa_length and
pa_length_power, which transformers ignores and this project reads: sample.py and train.py take the
folder, of any attention, as --init_from=DIR.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import configurator
from configurator import UserError
from data.tokenizer import END_OF_TEXT, GPT2_URL, GPT2Tokenizer, from_meta
from engine import checkpoint as ckpt
from engine.lora import fold_lora
from engine.pretrained import ATTENTION_ARGS, TRANSPOSED
from model import GPTConfig
from sample import fitting, read_run


@dataclass
class Config:
    out_dir: str = "out"  # folder of the run
    checkpoint: str = "ckpt.pt"  # ckpt.pt is its last state, best.pt that of the lowest val loss
    to: str = ""  # folder to write, which must be new or empty
    merge: bool = False  # fold LoRA's adapters into the weights: transformers' GPT-2 has none


def to_hf(
    state: dict[str, Tensor],
    config: GPTConfig,
    vocab_size: int | None = None,
    eot: int | None = None,
) -> tuple[object, dict[str, Tensor]]:
    """A GPT's state dict, its adapters folded in (see lora.fold_lora), and its config as those of
    a GPT2LMHeadModel: (GPT2Config, state dict).

    Ids from `vocab_size` on are cut off: they pad the vocabulary, and a greedy text of transformers
    would have them. `eot` is the id of the end of text, if there is one. Biases that the model does
    not have are zeros. `state` stays as it is; what needs no change shares its memory.
    """
    from transformers import GPT2Config

    vocab_size = vocab_size or config.vocab_size
    hf_config = GPT2Config(
        architectures=["GPT2LMHeadModel"],
        vocab_size=vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function={"none": "gelu", "tanh": "gelu_new"}[config.gelu],
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        bos_token_id=eot,
        eos_token_id=eot,
        **{k: v for k, v in config.model_args().items() if k in ATTENTION_ARGS},
    )
    hf_state = {}
    for name, weight in state.items():
        if name == "lm_head.weight":  # tied
            continue
        if name == "transformer.wte.weight":
            weight = weight[:vocab_size]
        hf_state[name] = weight.t().contiguous() if name.endswith(TRANSPOSED) else weight
        if not config.bias and not name.startswith(("transformer.wte", "transformer.wpe")):
            hf_state[name.removesuffix("weight") + "bias"] = weight.new_zeros(len(weight))
    return hf_config, hf_state


def tokenizer_files(tokenizer, block_size: int) -> dict[str, bytes]:
    """The files, by name, from which AutoTokenizer builds what encodes and decodes the same."""
    config = {"clean_up_tokenization_spaces": False, "model_max_length": block_size}
    if isinstance(tokenizer, GPT2Tokenizer):
        from tiktoken.load import read_file_cached

        config |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
        config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        # tiktoken has checked their hashes when it made the tokenizer
        files = {
            "vocab.json": read_file_cached(GPT2_URL + "encoder.json"),
            "merges.txt": read_file_cached(GPT2_URL + "vocab.bpe"),
        }
    else:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        hf = Tokenizer(models.WordLevel({char: i for i, char in enumerate(tokenizer.chars)}))
        hf.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        hf.decoder = decoders.Fuse()  # or else there would be spaces in between
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "meta": tokenizer.meta()}
        files = {"tokenizer.json": hf.to_str(pretty=True).encode()}
    return files | {"tokenizer_config.json": json.dumps(config, indent=2).encode()}


def write(to: Path, state: dict[str, Tensor], config: GPTConfig, tokenizer=None) -> None:
    """Write GPT(config) with the weights `state` to the folder `to`, whole or not at all.

    Without its tokenizer the vocabulary stays as it is. Raises UserError if `to` is there already
    and is not an empty folder, or can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    eot = getattr(tokenizer, "eot", None)
    hf_config, hf_state = to_hf(state, config, tokenizer and tokenizer.vocab_size, eot)
    generation = GenerationConfig(bos_token_id=eot, eos_token_id=eot)
    files = tokenizer_files(tokenizer, config.block_size) if tokenizer else {}
    files["config.json"] = hf_config.to_json_string().encode()
    files["generation_config.json"] = generation.to_json_string().encode()
    to = to.absolute()
    temporary = Path(f"{to}.{os.getpid()}.tmp")
    try:
        if to.exists() and any(to.iterdir()):
            raise UserError(f"to={to} is not empty; choose a new folder, or remove it first")
        temporary.mkdir(parents=True)
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        save_file(hf_state, temporary / "model.safetensors", {"format": "pt"})
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")  # it was 0600
        if to.exists():
            to.rmdir()
        temporary.rename(to)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"to={to} can't be written ({reason}); choose another folder, or make room"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> None:
    config = Config(**configurator.parse(Config, sys.argv[1:]))
    if not config.to:
        raise UserError("to is not set; name a folder to write, e.g. --to=hf")
    loaded, path, meta = read_run(config.out_dir, config.checkpoint)
    model = ckpt.build_model(loaded, path)
    if model.config.lora_rank and not config.merge:
        raise UserError(f"{path} has adapters; pass --merge to fold them into the weights")
    attn_type, to, tokenizer = model.config.attn_type, config.to, None
    if meta.get("tokenizer"):
        tokenizer = fitting(from_meta(meta), model, path)
    else:
        print(f"the tokenizer of {path} is not known: {to} has none", file=sys.stderr)
    write(Path(to), fold_lora(model.state_dict(), model.config), model.config, tokenizer)
    if attn_type != "SM":
        print(
            f"warning: transformers would compute softmax with these weights, not {attn_type}; "
            f"only this project reads its attn_type, e.g.  python sample.py --init_from={to}",
            file=sys.stderr,
        )
    print(f"{path} ({attn_type}, {model.get_num_params():,} parameters) is in {to}")


if __name__ == "__main__":
    configurator.run(main)
