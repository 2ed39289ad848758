"""
Where a loss or a gradient stopped being finite: the first module of a forward or backward pass that
makes something infinite or NaN out of finite numbers.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from configurator import UserError
from data.dataset import dropout_seed
from engine import ranges
from model import GPT, parse_attn_type


def where_it_began(model: GPT, batches: Iterable[tuple[Tensor, Tensor]], rt) -> str | None:
    """One line on the first of `batches` (inputs and targets, (B, T) each) that is not finite.

    `model` is the plain one, neither compiled nor under DDP; its gradients are lost. For GKpoly-n
    the line says how far its scores x left the range where it follows exp. None if all is finite.
    """
    for name, weight in model.named_parameters():
        if not finite(weight):
            return f"it began in the weights {name}"
    for x, y in batches:
        if (name := origin(model, x, y, rt)) is not None:
            return f"it began in {name}{polynomial_range(model, x, rt)}"
    return None


def finite(*tensors: Tensor | None) -> bool:
    return all(t is None or not t.is_floating_point() or t.isfinite().all() for t in tensors)


def origin(model: GPT, x: Tensor, y: Tensor, rt) -> str | None:
    found = []

    def forward_hook(name):
        def look(module, inputs, output):
            outputs = output if isinstance(output, tuple) else (output,)
            if not found and finite(*filter(torch.is_tensor, inputs)) and not finite(*outputs):
                found.append(readable(name))

        return look

    def backward_hook(name):
        def look(module, grad_input, grad_output):
            if not found and finite(*grad_output) and not finite(*grad_input):
                found.append(f"the gradient of {readable(name)}")

        return look

    embeddings = ("transformer.w", "transformer.drop")  # a backward hook needs an input's gradient
    handles = []
    for name, module in model.named_modules():
        if name in ("", "transformer", "transformer.h") or name.startswith(embeddings):
            continue
        handles.append(module.register_forward_hook(forward_hook(name)))
        handles.append(module.register_full_backward_hook(backward_hook(name)))
    model.zero_grad()
    embedding = model.transformer.wte.weight
    frozen = not embedding.requires_grad
    embedding.requires_grad_(True)  # or the first layer's input would have no gradient to look at
    try:
        with rt.autocast():
            loss = model(x, y)[1]
        if not found and not finite(loss):
            found.append("the loss itself")
        if not found:
            loss.backward()
    finally:
        embedding.requires_grad_(not frozen)
        for handle in handles:
            handle.remove()
    for name, weight in model.named_parameters():
        if not found and not finite(weight.grad):
            found.append(f"the gradient of {readable(name)}")
    model.zero_grad()
    return found[0] if found else None


def readable(name: str) -> str:
    """'transformer.h.3.attn' -> 'attn of layer 3'."""
    match = re.fullmatch(r"transformer\.h\.(\d+)\.?(.*)", name)
    return f"{match[2] or 'the sum'} of layer {match[1]}" if match else name


def polynomial_range(model: GPT, x: Tensor, rt) -> str:
    """How far below -2^(n+1) the scores of GKpoly-n are, and in which layer; '' for others."""
    name = model.config.attn_type
    if (n := ranges.squarings(name)) is None:
        return ""
    lowest, end = [], ranges.range_end(n)

    def look(q, k):
        blocks = ranges.row_blocks(q, k, parse_attn_type(name))
        lowest.append(torch.stack([x[:, causal].min() for x, causal in blocks]).min().item())

    ranges.each_layer(model, x, rt, look)
    # Layers behind the first that left the range compute with its damage
    layer = next((i for i, value in enumerate(lowest) if not value >= end), None)
    if layer is None:
        return f"; all x are in the range of {name}, {end} to 0"
    return f"; x fell to {lowest[layer]:.4g} in layer {layer}, and {name} needs {end} or more"


def explain(model: GPT, load: Callable, step: int, config, rt) -> str:
    """'; ' and where the step was not finite, on the first rank that can say; '' if none can.

    `load(step, micro_step)` gives the batches of the step.
    """

    def batches() -> Iterator:
        for micro_step in rt.share(config.gradient_accumulation_steps):
            if config.dropout > 0:
                torch.manual_seed(dropout_seed(config.seed, step, micro_step))
            yield load(step, micro_step)

    origin = None
    with suppress(torch.OutOfMemoryError):
        origin = where_it_began(model, batches(), rt)
    return next((f"; {text}" for text in rt.gather(origin or "") if text), "")


def not_done(step: int, problem: str, saved: int | None, folder: Path, config) -> UserError:
    """The error for a step that is not finite; `saved` is the step of the newest checkpoint."""
    kept = "there is no checkpoint yet"
    if saved is not None:
        kept = f"the checkpoint in {os.path.relpath(folder)} is that of step {saved}"
    squarings = ", with more squarings n" if config.attn_type.startswith("GKpoly") else ""
    return UserError(
        f"step {step} was not done: {problem}. {kept}; start again with a lower "
        f"--learning_rate{squarings}, or go on from there with "
        "--skip_nonfinite=N, past N such steps"
    )
