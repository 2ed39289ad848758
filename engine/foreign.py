"""Checkpoints that others wrote, nanoGPT or the old fork, in the form used here."""

import re
from pathlib import Path

import numpy as np
import torch

from configurator import UserError

# What a pickled numpy number consists of: plain data, which torch.load may be allowed to build
NUMPY_SCALARS = [
    (np.float64(0).__reduce__()[0], f"numpy.{module}.multiarray.scalar")
    for module in ("core", "_core")  # numpy 1 and 2
] + [np.dtype, *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd")]


def normalise(checkpoint: dict, path: Path) -> None:
    """Bring a checkpoint to the form that this project writes: model, model_args and numbers. The
    prefixes of torch.compile and DDP go, and so do the causal masks that old nanoGPTs kept. Numpy
    scalars become Python's numbers. Of the fork: `add_lora` goes where there is no adapter;
    adapters raise a UserError. Its LayerNorms have biases even with bias=False: biases that are all
    zero go; otherwise the model gets bias=True, and Linear layers zero biases. The logits are
    exactly the same then, but the optimizer's state no longer fits."""
    for part in (checkpoint, checkpoint["model_args"], checkpoint["config"]):
        part |= {k: v.item() for k, v in part.items() if isinstance(v, np.generic)}
    prefixes = re.compile(r"^((module|_orig_mod)\.)+")
    state = {prefixes.sub("", str(k)): v for k, v in checkpoint["model"].items()}
    is_mask = lambda name, t: name.endswith(".attn.bias") and getattr(t, "ndim", 0) == 4
    state = {name: t for name, t in state.items() if not is_mask(name, t)}  # (1, 1, T, T)
    args = {k: v for k, v in checkpoint["model_args"].items() if k != "add_lora"}
    if "lora_rank" not in args and any("lora" in name.lower() for name in state):
        problem = f"{path} has LoRA adapters beside its weights, which can't be read here"
        repair = "merge them into the weights with the code that trained them, and save it again"
        raise UserError(f"{problem}; {repair}")
    biases = [name for name in state if name.endswith(".bias")]
    of_fork = biases and all(re.search(r"\.ln_\w\.bias$", n) and is_plain(state[n]) for n in biases)
    if of_fork and args.get("bias") is False:
        if any(state[name].any() for name in biases):
            args["bias"] = True
            for name, t in list(state.items()):
                if re.search(r"\.c_\w+\.weight$", name) and is_plain(t) and t.dim() == 2:
                    state[name.replace("weight", "bias")] = t.new_zeros(()).expand(len(t))
        else:
            state = {name: t for name, t in state.items() if name not in biases}
    checkpoint |= {"model": state, "model_args": args}


def is_plain(t: object) -> bool:
    """True for an ordinary tensor of floating-point numbers on the CPU."""
    dense = isinstance(t, torch.Tensor) and t.layout is torch.strided
    return dense and t.device.type == "cpu" and t.is_floating_point()
