"""Models of transformers' GPT-2 and of export.py: config and weights under this project's names."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.layers import OPTIONS
from engine.network import HUB, reachable

# The keys of config.json that the models of modeling_pluggable.py have, and GPT-2 does not
OWN_ARGS = ("attn_type", "attn_decay", "attn_normalize", "pa_length", "pa_length_power", *OPTIONS)
SIZES = ("vocab_size", "n_layer", "n_head", "n_embd")
# transformers keeps these matrices of GPT-2 as (in, out), while nn.Linear has (out, in)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
NOWHERE = (
    "there is no such folder, none are in the hub's cache (HF_HOME, by default "
    "~/.cache/huggingface), and they can't be downloaded"
)
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # its name -> ours


def read_gpt2(
    name: str, Config: Callable[..., Any], overrides: dict, pa_length: int | None
) -> tuple[Any, dict[str, Tensor]]:
    """A GPT-2 of the hub (its name) or of a local folder, as (Config(...), state dict); `Config` is
    GPTConfig. `overrides` are those of its arguments that take precedence over config.json, and
    `pa_length` counts if neither has one. Raises OSError if the model can be had nowhere,
    ValueError if it is damaged or not a GPT-2 as model.py has it."""
    if fixed := sorted(overrides.keys() & {*SIZES, "block_size", "bias"}):
        raise ValueError(f"{', '.join(fixed)} can't be overridden in {name}")
    is_folder = Path(name).is_dir()
    # Without the hub, its cache may have the model
    options = {"local_files_only": is_folder or not reachable(HUB)}
    if options["local_files_only"] and not (is_folder or is_cached(name)):
        raise OSError(f"no weights for {name!r}: {NOWHERE}")  # before transformers is imported
    from transformers import AutoConfig, GPT2LMHeadModel

    from engine.modeling_pluggable import PluggableConfig, PluggableGPT

    try:
        settings, _ = PluggableConfig.get_config_dict(name, **options)
        is_ours = settings.get("model_type") == PluggableConfig.model_type
        # The folder's own copy of modeling_pluggable.py is never run
        Kind = PluggableConfig if is_ours else AutoConfig
        hf_config = Kind.from_pretrained(name, **options, trust_remote_code=False)
        config = Config(**{"pa_length": pa_length, **config_args(hf_config, name), **overrides})
        kind = PluggableGPT if is_ours else GPT2LMHeadModel
        hf, info = kind.from_pretrained(name, **options, output_loading_info=True)
    except OSError as error:
        if is_folder:
            raise ValueError(f"{name!r} is not a whole model: {error}") from error
        raise OSError(f"no weights for {name!r}: {NOWHERE} ({type(error).__name__})") from error
    except ValueError:
        raise
    except Exception as error:  # of safetensors, torch or transformers, for damaged files
        raise ValueError(f"{name!r} can't be loaded: {error}") from error
    if info["missing_keys"] or info.get("mismatched_keys"):
        raise ValueError(f"{name!r} lacks weights that its config.json promises")
    if is_ours and info["unexpected_keys"]:
        raise ValueError(f"{name!r} has weights that its config.json does not name")
    state = hf.state_dict()
    if not torch.equal(state["lm_head.weight"], state["transformer.wte.weight"]):
        raise ValueError(
            f"{name!r} has an output layer of its own (lm_head.weight); only models whose output "
            "layer is the matrix of the token embeddings, as in GPT-2, fit"
        )
    return config, {k: w.t() if k.endswith(TRANSPOSED) else w for k, w in state.items()}


def is_cached(name: str) -> bool:
    """Whether the hub's cache on this machine has the config of model `name`."""
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # no name of a model
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    return False


def config_args(hf_config: Any, name: str) -> dict:
    """The arguments of GPTConfig that a config of transformers means. Raises ValueError for what
    model.py can't build."""
    if (kind := hf_config.model_type) not in ("gpt2", "pluggable_gpt"):
        raise ValueError(f"{name!r} is a {kind} model; only GPT-2's architecture fits")
    if (
        hf_config.activation_function not in GELU
        or hf_config.n_inner not in (None, 4 * hf_config.n_embd)
        or not hf_config.scale_attn_weights
        or hf_config.scale_attn_by_inverse_layer_idx
        or hf_config.layer_norm_epsilon != 1e-5
        or hf_config.add_cross_attention
    ):
        raise ValueError(f"{name!r} differs from GPT-2 in its config.json; model.py can't build it")
    own = {key: getattr(hf_config, key) for key in OWN_ARGS if hasattr(hf_config, key)}
    if kind == "gpt2" and (own.get("attn_decay") == "learned" or own.keys() & {*OPTIONS}):
        raise ValueError(f"{name!r} has parts that no GPT-2 has; write it again with export.py")
    if own.get("pa_length", 0) is None:
        del own["pa_length"]
    return {
        "block_size": hf_config.n_positions,
        "bias": True,
        "gelu": GELU[hf_config.activation_function],
        **{key: getattr(hf_config, key) for key in SIZES},
        **own,
    }
