"""Where a loss or gradient stopped being finite: the first module that makes it so."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from configurator import UserError
from data.dataset import dropout_seed
from engine import ranges
from model import GPT


def where_it_began(model: GPT, batches: Iterable[tuple[Tensor, Tensor]], rt) -> str | None:
    """One line about the first of `batches` (inputs and targets, (B, T) each) whose loss or
    gradient is not finite; None if all are. `model` must be the plain model, not compiled nor under
    DDP; its gradients are lost."""
    for name, weight in model.named_parameters():
        if not finite([weight]):
            return f"it began in the weights {name}"
    for x, y in batches:
        if (name := first_origin(model, x, y, rt)) is not None:
            return f"it began in {name}{polynomial_range(model, x, rt)}"
    return None


def finite(values: Iterable) -> bool:
    """Whether all tensors among the values are finite."""
    return all(value.isfinite().all() for value in values if torch.is_tensor(value))


def first_origin(model: GPT, x: Tensor, y: Tensor, rt) -> str | None:
    """The first module, or weight's gradient, that is not finite though its inputs are."""
    origins = []  # in the order of computation

    def check(name, module, inputs, outputs):
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not origins and finite(inputs) and not finite(outputs):
            origins.append(name)

    def check_gradient(name, module, grad_input, grad_output):
        check(f"the gradient of {name}", module, grad_output, grad_input)

    handles = []
    for name, module in model.named_modules():
        # A backward hook needs an input's gradient, and containers compute nothing
        if not re.fullmatch(r"(transformer(\.(wte|wpe|drop|h))?)?", name):
            name = readable(name)
            handles.append(module.register_forward_hook(partial(check, name)))
            handles.append(module.register_full_backward_hook(partial(check_gradient, name)))
    model.zero_grad()
    embedding = model.transformer.wte.weight
    frozen = not embedding.requires_grad
    embedding.requires_grad_(True)  # else the first layer's input would have no gradient to check
    try:
        with rt.autocast():
            loss = model(x, y)[1]
        if not origins and not finite([loss]):
            origins.append("the loss itself")
        if not origins:
            loss.backward()
    finally:
        embedding.requires_grad_(not frozen)
        for handle in handles:
            handle.remove()
    for name, weight in model.named_parameters():
        if not finite([weight.grad]):
            origins.append(f"the gradient of {readable(name)}")
    model.zero_grad()
    return origins[0] if origins else None


def readable(name: str) -> str:
    """'transformer.h.3.attn' -> 'attn of layer 3'."""
    match = re.fullmatch(r"transformer\.h\.(\d+)\.?(.*)", name)
    return f"{match[2] or 'the sum'} of layer {match[1]}" if match else name


def polynomial_range(model: GPT, x: Tensor, rt) -> str:
    """How far the scores of GKpoly-n fall below its range, and in which layer; '' for others."""
    attn_type = model.config.attn_type
    if (n := ranges.squarings(attn_type)) is None:
        return ""

    def lowest_score(*qkr):
        blocks = ranges.row_blocks(*qkr, model.config)
        return torch.stack([x[:, causal].min() for x, causal, _ in blocks]).min().item()

    end = ranges.range_end(n)
    # The first layer, as those behind it compute with its damage
    for layer, lowest in enumerate(ranges.each_layer(model, x, rt, lowest_score)):
        if not lowest >= end:  # or NaN
            return f"; x fell to {lowest:.4g} in layer {layer}, and {attn_type} needs {end} or more"
    return f"; all x are in the range of {attn_type}, {end} to 0"


def explain(model: GPT, load: Callable, step: int, config, rt) -> str:
    """'; ' and where the step, whose batches load(step, micro_step) returns, was not finite, on the
    first rank that can say; '' if none can."""

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
        f"step {step} was not done: {problem}. {kept}; start again with a lower --learning_rate"
        f"{squarings}, or go on from there with --skip_nonfinite=N, past N such steps"
    )
