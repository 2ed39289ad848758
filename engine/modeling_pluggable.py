"""
The GPT of model.py as a model of transformers: GPT-2's classes with another attention in them.

export.py writes this file into the folder of a model, together with the formulas that it imports
(see standalone.py). There it needs nothing but torch and transformers:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Caches and left-padded batches work as for GPT-2. Weights are float32 or float64, or 16 bits wide.
"""

from functools import partial

import torch.nn as nn
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import sdpa_mask

from engine import layers
from kernels import decay
from model import normalised_attention, parse_attn_type, pointwise_attention, softmax_attention


class PluggableConfig(GPT2Config):
    """GPT-2's config, and those fields of model.GPTConfig that GPT-2 does not have."""

    model_type = "pluggable_gpt"
    attn_type: str = "SM"
    attn_decay: str = "none"
    attn_normalize: int = 0
    pa_length: int | None = None
    pa_length_power: float = 1.0
    norm: str = "layer"
    mlp_act: str = "gelu"
    position: str = "learned"
    qk_norm: bool = False
    bias: bool = True

    # Whoever asks for another implementation, "eager" for one, would get softmax
    _attn_implementation = property(lambda self: ATTENTION, lambda self, asked: None)


def attend(
    attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float = 0.0, **_
) -> tuple[Tensor, None]:
    """The attention of a GPT2Attention: q (B, nh, t, hs), k and v (B, nh, T, hs) -> (B, t, nh, hs).
    `mask`, bool (B, 1, t, T), says which keys each query sees. Keys that no query sees are padding,
    and do not count as positions."""
    config = attn.config
    # A query that is padding itself sees no key. Nobody reads its output, but it must stay finite.
    visible = mask | ~mask.any(-1, keepdim=True)
    pos = mask[:, 0].any(-2).cumsum(-1) - 1  # (B, T), of the keys
    last = (pos[:, None] * visible[:, 0]).amax(-1)  # (B, t), of the last key that each query sees
    q, k = attn.qk.prepare(q, last), attn.qk.prepare(k, pos)
    L, reach = config.pa_length or config.n_positions, None
    if config.attn_decay == "fixed":
        reach = decay.fixed_reach(config.n_head, L)
    elif config.attn_decay == "learned":
        reach = attn.log_reach.exp().clamp(min=decay.SHORTEST_LEARNED)
    variant = attn.variant
    if variant is None:
        plain = softmax_attention
    else:
        by_length = variant.by_length and reach is None
        divisor = float(L) ** config.pa_length_power if by_length else 1.0
        plain = partial(pointwise_attention, variant=variant, divisor=divisor)
    options = {"dropout": dropout, "visible": visible, "reach": reach}
    if config.attn_normalize:
        y = normalised_attention(plain, config.attn_normalize, q, k, v, **options)
    else:
        y = plain(q, k, v, **options)
    return y.transpose(1, 2), None


def boolean_mask(*args, **options) -> Tensor:
    """The mask for `attend`, (B, 1, t, T): never left out, and never -inf."""
    return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})


# A name for this copy of this file alone, as a process may load several folders
ATTENTION = f"pluggable_{id(attend)}"
AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, boolean_mask)


class PluggableGPT(GPT2LMHeadModel):
    config_class = PluggableConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config: PluggableConfig):
        super().__init__(config)
        if config.position == "rope":
            self.transformer.wpe = layers.NoEmbedding()
        if config.norm != "layer":
            self.transformer.ln_f = layers.norm(config)
        for block in self.transformer.h:
            block.attn.qk = layers.QueriesAndKeys(config)
            block.attn.variant = parse_attn_type(config.attn_type)
            if config.attn_decay == "learned":
                reach = decay.fixed_reach(config.n_head, config.pa_length or config.n_positions)
                block.attn.log_reach = nn.Parameter(reach.log().to(block.attn.c_attn.weight))
            if config.norm != "layer":
                block.ln_1, block.ln_2 = layers.norm(config), layers.norm(config)
            if config.mlp_act != "gelu":
                block.mlp.act = layers.activation(config)
