"""
Models that are too large for one GPU: activations computed twice, weights shared among ranks.

A sharded parameter is a DTensor: each rank holds some of its rows, and so it is with gradients and
the optimizer's state. torch's fully_shard gathers the weights of one block at a time, before its
forward and its backward pass. Between two calls of the model, every rank holds its part only.
"""

from collections.abc import Callable
from functools import cache, partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(model: nn.Module) -> None:
    """Let each block of a GPT keep only its input for the backward pass, which computes the rest
    again, with the same dropout: a third more FLOPs, and the same loss and gradients."""
    for block in model.transformer.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def shard(model: nn.Module, rt) -> None:
    """Share the parameters of a GPT, which is on the CPU, among the ranks. They become those of the
    main process; no more than one block and the embeddings are ever whole on the device."""
    from torch.distributed.device_mesh import init_device_mesh  # here: they take a second
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(rt.device_type, (rt.world_size,))
    for module in (*model.transformer.h, model):  # the last one without its blocks
        whole = [name for name, t in module.state_dict().items() if not is_sharded(t)]
        module.to(rt.device)
        state = module.state_dict()
        rt.broadcast([state[name] for name in whole])
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_sharded(t: object) -> bool:
    return hasattr(t, "full_tensor")


def held(t: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return t.to_local() if is_sharded(t) else t


def weights(model: nn.Module, rt, wanted: Callable[[str], bool] = lambda name: True) -> dict:
    """The state dict of a model, without the names that are not `wanted`; see `whole`."""
    state = model.state_dict(keep_vars=rt.shard)  # lm_head.weight is transformer.wte.weight itself
    return whole({name: t for name, t in state.items() if wanted(name)}, rt)


def whole(state: dict, rt) -> dict:
    """A state dict, nested or not, with whole tensors on the CPU in place of sharded ones. All
    ranks take part, but only the main process gets the tensors; the others get None."""

    @cache
    def gather(t: Tensor) -> Tensor | None:
        full = t.detach().full_tensor()
        return full.cpu() if rt.is_main else None

    def convert(value: object) -> object:
        if isinstance(value, dict):
            return {key: convert(v) for key, v in value.items()}
        return gather(value) if is_sharded(value) else value

    return convert(state)


def part_like(full: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of `full`, shared as the parameter is; all of it if that is not sharded, or
    of another shape."""
    if not is_sharded(parameter) or full.shape != parameter.shape:
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(full, mesh, placements, src_data_rank=None).clone()  # no view of it
