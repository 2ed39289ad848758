"""
Checkpoints: a save that is whole or absent, a read that notices damage and runs nothing.

The format is nanoGPT's: torch.save of a dict with model (state dict), optimizer, model_args,
iter_num (updates done), best_val_loss and config, to which we add tokenizer, scaler, data
(fingerprints) and evaluated (the step evaluated last). train.py puts it together. The file is a zip
archive, whose comment holds the SHA-256 of everything before it; nanoGPT reads it all the same.

A folder holds ckpt.pt, the latest checkpoint; previous.pt, the one before; and best.pt, the one
with the lowest validation loss. Two names may mean the same bytes. Weights that a run must not
change (those under LoRA's adapters, or a teacher's) are kept once, in base.pt; each checkpoint says
by SHA-256 which file that is, and for people where it came from.
"""

import hashlib
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from configurator import UserError
from engine.files import whole_file
from engine.foreign import NUMPY_SCALARS, is_plain, normalise
from engine.layers import say_left_out
from engine.lora import fold_lora, init_adapters
from engine.sharding import is_sharded, part_like
from model import GPT, GPTConfig

LATEST, PREVIOUS, BEST, BASE = "ckpt.pt", "previous.pt", "best.pt", "base.pt"

# ---- Write ------------------------------------------------------------------


def save(checkpoint: dict, folder: Path, is_best: bool = False) -> None:
    """Write folder/ckpt.pt; the file that was there becomes previous.pt. The best is best.pt too.
    Raises OSError, for example for a full disk, and leaves the folder as it was."""
    path = folder / LATEST
    with whole_file(path, "wb") as file:
        write_sealed(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())  # before it gets a second name
        if path.exists():
            give_name(path, folder / PREVIOUS)
        if is_best:
            give_name(Path(file.name), folder / BEST)


def save_base(state: dict, model_args: dict, came_from: str, folder: Path) -> dict:
    """Write folder/base.pt, a model without its adapters; return what checkpoints say about it.
    Raises OSError as `save` does."""
    state = {k: v for k, v in state.items() if ".lora_" not in k}
    args = {k: v for k, v in model_args.items() if not k.startswith("lora_")}
    with whole_file(folder / BASE, "wb") as file:
        write_sealed({"model": state, "model_args": args}, file)
    return {"came_from": came_from, "sha256": digest(state)}


def digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the names and bytes of a state dict."""
    sha256 = hashlib.sha256()
    for name in sorted(state):
        sha256.update(name.encode())
        sha256.update(state[name].cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def give_name(path: Path, name: Path) -> None:
    """Let `name`, too, mean the bytes of `path`, from one moment to the next."""
    temporary = name.with_name(f"{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a disk without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, name)


class HashedFile:
    """A file to write to, and the SHA-256 of what was written."""

    def __init__(self, file):
        self.file, self.sha256, self.error, self.flush = file, hashlib.sha256(), None, file.flush

    def write(self, data) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch raises an error of its own instead, which hides the reason
            raise


class Saver:
    """The saves of one run, by its main process; all ranks call the methods, and get the same
    answers. A save that fails, for a full disk say, costs a line and is retried."""

    RETRY = 30.0  # seconds to wait before a save is tried again

    def __init__(self, folder: Path, say: Callable[[str], None], step: int | None, rt):
        self.folder, self.say, self.rt = folder, say, rt
        self.step = step  # of the newest checkpoint in the folder, None if there is none
        self.retry_at = math.inf  # when the last save is tried again, if it failed

    @property
    def failed(self) -> bool:
        """Whether the last save failed."""
        return self.retry_at < math.inf

    def save(self, checkpoint: dict, is_best: bool) -> bool:
        """Whether the save succeeded."""

        def problem() -> str | None:
            try:
                save(checkpoint, self.folder, is_best)
            except OSError as error:
                return str(error.strerror)

        step, reason = checkpoint["iter_num"], self.rt.from_main(problem)
        if reason:
            self.retry_at = time.monotonic() + self.RETRY
            kept = "there is none yet" if self.step is None else f"the last is of step {self.step}"
            problem = f"checkpoint of step {step} not saved ({reason}); {kept}"
            self.say(f"{problem}; next try in {self.RETRY:.0f} s")
            return False
        self.step, self.retry_at = step, math.inf
        return True

    def is_due_again(self) -> bool:
        """Whether it is time to retry a save that failed."""
        return self.failed and self.rt.from_main(lambda: time.monotonic() >= self.retry_at)


# A zip archive ends in the record END of 22 bytes, whose last two are the length of the comment
# that follows. torch leaves no comment; ours is TAG and 64 hexadecimal digits.
END, TAG = b"PK\x05\x06", b"sha256:"
SEAL = len(TAG) + 64


def write_sealed(checkpoint: dict, file) -> None:
    """torch.save, with the SHA-256 of the file as the comment of the archive."""
    hashed = HashedFile(file)
    try:
        torch.save(checkpoint, hashed)
    except RuntimeError:
        if hashed.error:
            raise hashed.error from None
        raise
    file.seek(-2, os.SEEK_END)
    file.write(SEAL.to_bytes(2, "little") + TAG + hashed.sha256.hexdigest().encode())


def check_seal(path: Path) -> None:
    """Raise ValueError if the file is not what was written. Files of other programs have none."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            raise ValueError("it does not begin as a checkpoint does")
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 22 - SEAL))
        end = file.read()
        if end[SEAL:].startswith(END) and end.endswith(b"\0\0"):
            return
        if not end.startswith(END) or end[20:22] != SEAL.to_bytes(2, "little"):
            raise ValueError("it does not end as a checkpoint does")
        file.seek(0)
        sha256, left = hashlib.sha256(), size - SEAL - 2
        while chunk := file.read(min(left, 2**24)):
            sha256.update(chunk)
            left -= len(chunk)
        sha256.update(b"\0\0")
        if end[22:] != TAG + sha256.hexdigest().encode():
            raise ValueError("its SHA-256 is not the one it was written with")


# ---- Read -------------------------------------------------------------------


class Damaged(UserError):
    """A file that is not what was written."""


def load_newest(folder: Path) -> tuple[dict, Path, str | None]:
    """The newest whole checkpoint of a run, its path, and a line about a damaged one passed over.
    Raises UserError if there is none."""
    if folder.is_file():
        problem = f"{folder} is a file, but a run is named by its folder"
        raise UserError(f"{problem}; pass --out_dir={folder.parent}")
    path, older = folder / LATEST, folder / PREVIOUS
    if not os.path.isfile(older):
        return load(path), path, None
    trouble = f"{path} is missing"
    if os.path.isfile(path):
        try:
            return load(path), path, None
        except Damaged as error:
            trouble = str(error)
    return load(older), older, f"{trouble}; going on from {older}"


def load(path: Path) -> dict:
    """Read a checkpoint of this project or of nanoGPT onto the CPU, in this project's form (see
    `normalise`), its state dict checked against model_args. Raises UserError if the file is
    missing, can't be read, holds anything but plain data and tensors, or contradicts itself;
    Damaged if it is."""
    if path.parent.is_file():
        folder = path.parent.parent
        raise UserError(f"{path.parent} is a file, but a run is a folder; pass --out_dir={folder}")
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint {path}: train one first, or point --out_dir at its folder")
    try:
        check_seal(path)
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        problem = f"{path} holds more than plain data, and is not loaded: {reason}"
        raise UserError(problem) from error
    except MemoryError:
        raise
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise Damaged(f"{path} is damaged or not a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint: it has no model and model_args")

    checkpoint = {"config": {}, "data": {}, "tokenizer": {}, **checkpoint}
    for key in ("model", "model_args", "config", "data", "tokenizer"):
        if not isinstance(checkpoint[key], dict):
            raise UserError(f"{path} is not a checkpoint: its {key} must be a dictionary")
    normalise(checkpoint, path)
    if type(checkpoint.get("iter_num", 0)) is not int:
        raise UserError(f"{path} is not a checkpoint: its iter_num must be a whole number")
    config = config_of(checkpoint, path)
    if config.lora_rank and isinstance(checkpoint.get("base"), dict):
        checkpoint["model"] |= load_base(path.parent, checkpoint["base"])["model"]
    check_state(checkpoint["model"], config, path)
    return checkpoint


def without_tensors(checkpoint: dict) -> dict:
    """What ranks other than the main one get of a checkpoint; see `build_model` and `resume`."""
    return {key: value for key, value in checkpoint.items() if key not in ("model", "optimizer")}


def load_base(folder: Path, base: object) -> dict:
    """The checkpoint folder/base.pt, which must be the one that `base` describes."""
    loaded, base = load(folder / BASE), base if isinstance(base, dict) else {}
    if digest(loaded["model"]) != base.get("sha256"):
        problem = f"{folder / BASE} is not the one that this run began with"
        raise UserError(f"{problem}, {base.get('came_from')}; put that file back")
    return loaded


class WithoutRandomWeights(TorchFunctionMode):
    """Context in which a model is built without initialising weights that will be overwritten."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def config_of(checkpoint: dict, path: Path, **overrides) -> GPTConfig:
    """The GPTConfig that a checkpoint's model_args and `overrides` describe."""
    try:
        return GPTConfig(**{**checkpoint["model_args"], **overrides})
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} describes a model that can't be built: {error}") from error


def check_state(state: dict, config: GPTConfig, path: Path) -> None:
    """Raise UserError unless names and shapes are those of GPT(config), which is not built."""
    n_layer = len({name.split(".")[2] for name in state if name.startswith("transformer.h.")})
    if n_layer != config.n_layer:
        raise UserError(f"{path} has {n_layer} layers, but its model_args say {config.n_layer}")
    try:
        with torch.device("meta"), WithoutRandomWeights():
            expected = GPT(config).state_dict()
    except RuntimeError as error:  # sizes beyond all storage
        raise UserError(f"{path} describes a model that can't be built: {error}") from error
    another = f"{path} is of another architecture"
    if odd := sorted(expected.keys() ^ state.keys()):
        raise UserError(f"{another}: {odd[0]} is missing or unknown")
    for name, tensor in expected.items():
        if not is_plain(state[name]) or state[name].shape != tensor.shape:
            shape = tuple(getattr(state[name], "shape", ()))
            raise UserError(f"{another}: {name} is {shape}, not {tuple(tensor.shape)}")
    if not torch.equal(state["lm_head.weight"], state["transformer.wte.weight"]):
        raise UserError(
            f"{another}: lm_head.weight and transformer.wte.weight, one matrix in GPT-2, differ"
        )


def build_model(checkpoint: dict, path: Path, **overrides) -> GPT:
    """The model of a loaded checkpoint; `overrides` are GPTConfig fields such as attn_type. If
    lora_rank is among them, even unchanged, trained adapters become part of the weights, and new
    ones begin. Without tensors, the checkpoint gives a model with uninitialised weights."""
    saved, renews = config_of(checkpoint, path), "lora_rank" in overrides
    with WithoutRandomWeights():
        model = GPT(config_of(checkpoint, path, **overrides))
    if "model" in checkpoint:
        state = fold_lora(checkpoint["model"], saved) if renews else checkpoint["model"]
        say_left_out(model.load_state_dict(state, strict=not renews).unexpected_keys, path)
    if renews and model.config.lora_rank:
        init_adapters(model)
    return model


def resume(
    checkpoint: dict, path: Path, optimizer: torch.optim.Optimizer, scaler, rt
) -> tuple[int, float, int]:
    """Give optimizer and scaler of every rank the state in the main process's checkpoint. Returns
    iter_num, best_val_loss and the step that was evaluated last, -1 if it is not iter_num."""
    step, best_val_loss = rt.from_main(lambda: restore(checkpoint, path, optimizer, scaler))
    if rt.world_size > 1:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = [optimizer.state.get(p, {}) for p in parameters]  # {} except on the main process
        shapes = [{key: (t.shape, t.dtype) for key, t in state.items()} for state in states]
        for p, keys in zip(parameters, rt.from_main(lambda: shapes), strict=True):
            for key in sorted(keys):
                shape, dtype = keys[key]
                whole = torch.empty(shape, dtype=dtype, device=p.device)
                if rt.is_main:
                    whole = optimizer.state[p][key].to(p.device)
                rt.broadcast([whole])
                optimizer.state[p][key] = part_like(whole, p)
        scaler.load_state_dict(rt.from_main(scaler.state_dict))
    return step, best_val_loss, step if checkpoint.get("evaluated", step) == step else -1


def restore(
    checkpoint: dict, path: Path, optimizer: torch.optim.Optimizer, scaler
) -> tuple[int, float]:
    """Load the state, not the options, of optimizer and scaler; return iter_num, best_val_loss.
    Raises UserError unless there is a state of the right shape for every parameter, which fused
    optimizers do not check. Before its first update an optimizer has none."""
    try:
        iter_num, best_val_loss = checkpoint["iter_num"], float(checkpoint["best_val_loss"])
        if type(iter_num) is not int or iter_num < 0 or math.isnan(best_val_loss):
            raise ValueError(f"iter_num={iter_num!r}, best_val_loss={best_val_loss}")
        saved, is_new = checkpoint["optimizer"], checkpoint.get("optimizer_is_new", iter_num == 0)
        for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            group.update({k: v for k, v in own.items() if k != "params"})
            is_muon = "ns_steps" in own
            keys = ["momentum_buffer"] if is_muon else ["exp_avg", "exp_avg_sq", "step"]
            for index, p in zip(group["params"], own["params"], strict=True):
                state = saved["state"].get(index, {})
                for key in keys if state or not is_new else ():
                    check_moment(key, torch.as_tensor(state[key]), p)
                if is_sharded(p) and state:  # whole, on the CPU, until `resume` shares it
                    moments = {key: torch.as_tensor(state[key]).to(p.dtype) for key in keys}
                    optimizer.state[p] = moments
        if not optimizer.state:
            optimizer.load_state_dict(saved)
        if checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        problem = f"{path} has no state to resume from ({error}); use --init_from=finetune"
        raise UserError(problem) from error
    return iter_num, best_val_loss


def check_moment(key: str, t: torch.Tensor, p: torch.Tensor) -> None:
    """Raise ValueError unless `t` can be what an optimizer keeps of parameter p as `key`."""
    shape = () if key == "step" else tuple(p.shape)
    if not is_plain(t) or tuple(t.shape) != shape:
        raise ValueError(f"{key} of the optimizer is {tuple(t.shape)}, not {shape}")
