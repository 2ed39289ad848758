"""
Export a checkpoint as a folder that transformers loads: a model, its tokenizer, its model card.

    python export.py --out_dir=OUT --to=DIR
    python export.py --out_dir=OUT --to=DIR --checkpoint=best.pt
    python export.py --out_dir=OUT --to=DIR --merge     # if the run has LoRA adapters
    python export.py --out_dir=OUT --to=DIR --push=USER/NAME    # after  hf auth login

A GPT-2 with softmax becomes a GPT2LMHeadModel. Other attentions, norms and activations, which
transformers does not have, are written into DIR/modeling_pluggable.py. DIR/README.md says how to
load the model. train.py, sample.py and evaluate.py take the folder as --init_from=DIR, and never
run code from it.
"""

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import configurator
from configurator import ROOT, UserError
from data.tokenizer import END_OF_TEXT, GPT2_URL, GPT2Tokenizer
from engine.loading import load_trained
from engine.lora import fold_lora
from engine.pretrained import OWN_ARGS, SIZES, TRANSPOSED
from engine.publishing import check_repo, model_card, push
from engine.standalone import standalone
from model import GPTConfig

MODELING = "modeling_pluggable"  # module of engine/, and name of its copy in an exported folder
EMBEDDINGS = ("transformer.wte", "transformer.wpe")
AUTO_MAP = {
    "AutoConfig": f"{MODELING}.PluggableConfig",
    "AutoModelForCausalLM": f"{MODELING}.PluggableGPT",
}


@dataclass
class Config:
    out_dir: str = "out"  # Folder of the run
    checkpoint: str = "ckpt.pt"  # ckpt.pt: the last state of the run; best.pt: the best one
    data_dir: str | None = None  # Data sets, for nanoGPT's checkpoints; auto: data/
    to: str = ""  # Folder to write, which must be new or empty
    merge: bool = False  # Fold LoRA adapters into the weights: transformers' GPT-2 has none
    push: str | None = None  # Upload the folder to the Hugging Face hub, as USER/NAME


def own_args(config: GPTConfig) -> dict:
    """The values in which a model differs from transformers' GPT-2, which has no such keys."""
    return {key: value for key, value in config.model_args().items() if key in OWN_ARGS}


def to_hf(
    state: dict[str, Tensor],
    config: GPTConfig,
    vocab_size: int | None = None,
    eot: int | None = None,
) -> tuple[object, dict[str, Tensor]]:
    """(config, state dict) of the model of transformers that computes what GPT(config) does: a
    GPT2LMHeadModel, or a PluggableGPT if GPT-2 does not have all its parts. `state` is the GPT's
    state dict without adapters (see lora.fold_lora), whose memory the result shares where it can.
    Ids from `vocab_size` on, which only pad the vocabulary, are cut off, since transformers would
    draw them. `eot` is the id of the end of text, if there is one."""
    from engine.modeling_pluggable import GPT2Config, PluggableConfig

    vocab_size = vocab_size or config.vocab_size
    args = {key: getattr(config, key) for key in SIZES} | {"vocab_size": vocab_size}
    args |= own_args(config) | dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout
    )
    if own_args(config):
        args |= {"architectures": ["PluggableGPT"], "auto_map": AUTO_MAP}
    else:
        args |= {"architectures": ["GPT2LMHeadModel"]}
    hf_config = (PluggableConfig if own_args(config) else GPT2Config)(
        n_positions=config.block_size,
        activation_function={"none": "gelu", "tanh": "gelu_new"}[config.gelu],
        bos_token_id=eot,
        eos_token_id=eot,
        **args,
    )
    hf_state = {}
    for name, weight in state.items():
        if name == "lm_head.weight":  # tied
            continue
        if name == "transformer.wte.weight":
            weight = weight[:vocab_size]
        hf_state[name] = weight.t().contiguous() if name.endswith(TRANSPOSED) else weight
        has_bias = name.endswith(".weight") and not name.startswith(EMBEDDINGS)
        if config.norm == "rms":
            has_bias = has_bias and ".ln_" not in name
        if has_bias and not config.bias:
            hf_state[name.removesuffix("weight") + "bias"] = weight.new_zeros(len(weight))
    return hf_config, hf_state


def tokenizer_files(tokenizer, block_size: int) -> dict[str, bytes]:
    """The contents by name of the files from which AutoTokenizer builds the same tokenizer. Texts
    of characters have no end. Their newline is named as the end of text, because the evaluation
    harness needs one, for example to begin a document with; config.json names none, so that
    `generate` does not stop there."""
    config = {"clean_up_tokenization_spaces": False, "model_max_length": block_size}
    if isinstance(tokenizer, GPT2Tokenizer):
        from tiktoken.load import read_file_cached

        config |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
        config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        # tiktoken checked their hashes when it built the tokenizer
        sources = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
        files = {name: read_file_cached(GPT2_URL + source) for name, source in sources.items()}
    else:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        strings = getattr(tokenizer, "chars", None) or tokenizer.strings
        longest_first = sorted(set(strings), key=len, reverse=True)
        hf = Tokenizer(models.WordLevel({string: i for i, string in enumerate(strings)}))
        pattern = "|".join([*map(re.escape, longest_first), r"[\s\S]"])
        hf.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
        hf.decoder = decoders.Fuse()  # joins the strings without spaces in between
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "meta": tokenizer.meta()}
        if [string for string in strings if "\n" in string] == ["\n"]:
            config["eos_token"] = "\n"
        files = {"tokenizer.json": hf.to_str(pretty=True).encode()}
    return files | {"tokenizer_config.json": json.dumps(config, indent=2).encode()}


def write_folder(
    to: Path, state: dict[str, Tensor], config: GPTConfig, tokenizer=None, card: str | None = None
) -> None:
    """Write GPT(config) with the weights `state` to the folder `to`, whole or not at all. Without a
    tokenizer the vocabulary keeps its padding. `card` is its README.md. Raises UserError if `to`
    can't be written, or exists and is not an empty folder."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    eot = getattr(tokenizer, "eot", None)
    hf_config, hf_state = to_hf(state, config, tokenizer and tokenizer.vocab_size, eot)
    generation = GenerationConfig(bos_token_id=eot, eos_token_id=eot)
    files = tokenizer_files(tokenizer, config.block_size) if tokenizer else {}
    if hf_config.model_type != "gpt2":
        try:
            files[f"{MODELING}.py"] = standalone(ROOT / "engine" / f"{MODELING}.py").encode()
        except ValueError as error:
            raise UserError(f"{MODELING}.py can't be written: {error}") from error
    if card:
        files["README.md"] = card.encode()
    files["config.json"] = hf_config.to_json_string().encode()
    files["generation_config.json"] = generation.to_json_string().encode()
    to = to.absolute()
    temporary = Path(f"{to}.{os.getpid()}.tmp")
    try:
        if to.exists() and any(to.iterdir()):
            raise UserError(f"to={to} is not empty; choose a new folder")
        temporary.mkdir(parents=True)
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        save_file(hf_state, temporary / "model.safetensors", {"format": "pt"})
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")  # was 0600
        if to.exists():
            to.rmdir()
        temporary.rename(to)
    except (OSError, SafetensorError) as error:
        reason = f"can't be written ({getattr(error, 'strerror', None) or error})"
        raise UserError(f"to={to} {reason}; choose another folder, or make room") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> None:
    config = Config(**configurator.parse(Config, sys.argv[1:]))
    if not config.to:
        raise UserError("to is not set; name a folder to write, e.g. --to=hf")
    if config.push:
        check_repo(config.push)
    trained = load_trained(config.out_dir, config.checkpoint, "resume", config.data_dir)
    model, path, tokenizer = trained.model, trained.source, None
    if model.config.lora_rank and not config.merge:
        raise UserError(f"{path} has adapters; pass --merge to fold them into the weights")
    if trained.tokenizer_meta:
        tokenizer = trained.tokenizer()
    else:
        print(f"{config.to} has no tokenizer: {trained.no_tokenizer}", file=sys.stderr)
    state, attn_type = fold_lora(model.state_dict(), model.config), model.config.attn_type
    name, has_code = config.push or config.to, bool(own_args(model.config))
    card = model_card(name, trained, Path(config.out_dir), has_code)
    write_folder(Path(config.to), state, model.config, tokenizer, card)
    if model.config.attn_decay != "none":
        attn_type += " with attn_decay"
    print(f"{path} ({attn_type}, {model.get_num_params():,} parameters) is in {config.to}")
    if config.push:
        print(f"and at {push(Path(config.to), config.push)}")


if __name__ == "__main__":
    configurator.run(main)
