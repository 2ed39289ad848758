"""
Checkpoints: atomic and durable save, strict load that runs nothing.

The format is nanoGPT's: a dict of model (state dict), optimizer, model_args, iter_num (updates
done), best_val_loss and config, to which we add tokenizer and scaler. It is written to a temporary
name, flushed to the disk and renamed, so that under its own name a checkpoint is always whole.
"""

import math
import os
import pickle
import re
import shutil
from pathlib import Path

import torch

from configurator import UserError
from model import GPT, GPTConfig

LATEST, BEST = "ckpt.pt", "best.pt"


def save(checkpoint: dict, folder: Path, is_best: bool = False) -> None:
    """Write folder/ckpt.pt, and the same file as folder/best.pt if it is the best so far."""
    path = folder / LATEST
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    if is_best:  # a second name for the same bytes, which stay when ckpt.pt is replaced
        link = folder / (BEST + ".tmp")
        link.unlink(missing_ok=True)
        try:
            os.link(temporary, link)
        except OSError:  # a disk without hard links
            shutil.copyfile(temporary, link)
        os.replace(link, folder / BEST)
    os.replace(temporary, path)
    if os.name == "posix":
        directory = os.open(folder, os.O_RDONLY)
        os.fsync(directory)  # the renames too are on the disk now
        os.close(directory)


def load(path: Path) -> dict:
    """Read a checkpoint of this project or of nanoGPT onto the CPU.

    Its state dict comes back without the prefixes that torch.compile and DDP leave, checked against
    the shapes that model_args promise. Raises UserError if the file is missing, damaged, holds
    anything but plain data and tensors, or contradicts itself.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: train one first, or point --out_dir at its folder")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} holds more than plain data, and is not loaded: {reason}"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path} is damaged or not a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint: it has no model and model_args")

    checkpoint.setdefault("config", {})
    for key in ("model", "model_args", "config"):
        if not isinstance(checkpoint[key], dict):
            raise UserError(f"{path} is not a checkpoint: its {key} must be a dictionary")

    prefixes = re.compile(r"^((module|_orig_mod)\.)+")  # what DDP and torch.compile leave
    checkpoint["model"] = {prefixes.sub("", str(k)): v for k, v in checkpoint["model"].items()}
    check_state(checkpoint["model"], config_of(checkpoint, path), path)
    return checkpoint


def config_of(checkpoint: dict, path: Path, **overrides) -> GPTConfig:
    """The GPTConfig that a checkpoint's model_args and `overrides` describe."""
    try:
        return GPTConfig(**{**checkpoint["model_args"], **overrides})
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} describes a model that can't be built: {error}") from error


def check_state(state: dict, config: GPTConfig, path: Path) -> None:
    """Raise UserError unless names and shapes are those of GPT(config), of which none is built."""
    n_layer = len({name.split(".")[2] for name in state if name.startswith("transformer.h.")})
    if n_layer != config.n_layer:
        raise UserError(f"{path} has {n_layer} layers, but its model_args say {config.n_layer}")
    try:
        with torch.device("meta"):
            expected = GPT(config).state_dict()
    except RuntimeError as error:  # sizes beyond all storage
        raise UserError(f"{path} describes a model that can't be built: {error}") from error
    odd = sorted(expected.keys() ^ state.keys())
    if odd:
        raise UserError(f"{path} is of another architecture: {odd[0]} is missing or unknown")
    for name, tensor in expected.items():
        if not is_plain(state[name]) or state[name].shape != tensor.shape:
            got = tuple(getattr(state[name], "shape", ()))
            raise UserError(
                f"{path} is of another architecture: {name} is {got}, not {tuple(tensor.shape)}"
            )


def build_model(checkpoint: dict, path: Path, **overrides) -> GPT:
    """The model of a loaded checkpoint; `overrides` are GPTConfig fields such as attn_type."""
    model = GPT(config_of(checkpoint, path, **overrides))
    model.load_state_dict(checkpoint["model"])
    return model


def restore(
    checkpoint: dict, path: Path, optimizer: torch.optim.Optimizer, scaler
) -> tuple[int, float]:
    """Load the state, not the options, of optimizer and scaler; return iter_num, best_val_loss.

    Raises UserError unless there is a state of the right shape for every parameter: fused
    optimizers believe it without looking.
    """
    try:
        iter_num, best_val_loss = checkpoint["iter_num"], float(checkpoint["best_val_loss"])
        if type(iter_num) is not int or iter_num < 0 or math.isnan(best_val_loss):
            raise ValueError(f"iter_num={iter_num!r}, best_val_loss={best_val_loss}")
        saved = checkpoint["optimizer"]
        for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            group.update({k: v for k, v in own.items() if k != "params"})
            for index, p in zip(group["params"], own["params"], strict=True):
                check_moments(saved["state"].get(index, {}), p, iter_num)
        optimizer.load_state_dict(saved)
        if checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} has no state to resume from ({error}); use --init_from=finetune"
        ) from error
    return iter_num, best_val_loss


def check_moments(state: dict, p: torch.Tensor, iter_num: int) -> None:
    """Raise ValueError unless `state` is that of AdamW for parameter p."""
    if iter_num == 0 and not state:
        return
    for key, shape in (("exp_avg", p.shape), ("exp_avg_sq", p.shape), ("step", ())):
        t = torch.as_tensor(state[key])
        if not is_plain(t) or t.shape != torch.Size(shape):
            raise ValueError(f"{key} of the optimizer is {tuple(t.shape)}, not {tuple(shape)}")


def is_plain(t: object) -> bool:
    """True for an ordinary tensor of floating-point numbers."""
    dense = isinstance(t, torch.Tensor) and t.layout is torch.strided
    return dense and t.device.type == "cpu" and t.is_floating_point()
