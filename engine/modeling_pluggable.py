"""
The GPT of model.py as a model of transformers: GPT-2's classes with another attention in them.

export.py writes this file into the folder of a model, together with the formulas that it imports
(see standalone.py). There it needs nothing but torch and transformers:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Caches and left-padded batches work as for GPT-2. Weights are float32 or float64, or 16 bits wide.
"""

import torch
import torch.nn as nn
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import sdpa_mask

from engine import layers
from kernels import decay
from model import parse_attn_type, pointwise_attention, softmax_attention


class PluggableConfig(GPT2Config):
    """GPT-2's config, and those fields of model.GPTConfig that GPT-2 does not have."""

    model_type = "pluggable_gpt"
    attn_type: str = "SM"
    attn_decay: str = "none"
    pa_length: int | None = None
    pa_length_power: float = 1.0
    norm: str = "layer"
    mlp_act: str = "gelu"
    position: str = "learned"
    qk_norm: bool = False
    bias: bool = True


def attend(
    attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float = 0.0, **_
) -> tuple[Tensor, None]:
    """The attention of a GPT2Attention: q (B, nh, t, hs), k and v (B, nh, T, hs) -> (B, t, nh, hs).
    `mask`, bool (B, 1, t, T), says which keys each query sees. Keys to the left of the first one
    that a query sees are padding, and do not count as positions."""
    config = attn.config
    # A query that is padding itself sees no key. Nobody reads its output, but it must stay finite.
    visible = mask | ~mask.any(-1, keepdim=True)
    first = visible[:, 0, -1].int().argmax(-1, keepdim=True)  # (B, 1)
    q = attn.qk.prepare(q, visible[:, 0].sum(-1) - 1)
    k = attn.qk.prepare(k, torch.arange(k.size(2), device=k.device) - first)
    L, reach = config.pa_length or config.n_positions, None
    if config.attn_decay == "fixed":
        reach = decay.fixed_reach(config.n_head, L)
    elif config.attn_decay == "learned":
        reach = attn.log_reach.exp().clamp(min=decay.SHORTEST_LEARNED)
    variant = parse_attn_type(config.attn_type)
    if variant is None:
        y = softmax_attention(q, k, v, dropout, visible, reach)
    else:
        divisor = 1.0
        if variant.by_length and reach is None:
            divisor = float(L) ** config.pa_length_power
        y = pointwise_attention(q, k, v, variant, divisor, dropout, visible, reach)
    return y.transpose(1, 2), None


def boolean_mask(*args, **options) -> Tensor:
    """The mask for `attend`, (B, 1, t, T): never left out, and never -inf."""
    return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})


AttentionInterface.register(PluggableConfig.model_type, attend)
AttentionMaskInterface.register(PluggableConfig.model_type, boolean_mask)


class PluggableGPT(GPT2LMHeadModel):
    config_class = PluggableConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config: PluggableConfig):
        config._attn_implementation = PluggableConfig.model_type
        super().__init__(config)
        if config.position == "rope":
            self.transformer.wpe = layers.NoEmbedding()
        if config.norm != "layer":
            self.transformer.ln_f = layers.norm(config)
        for block in self.transformer.h:
            block.attn.qk = layers.QueriesAndKeys(config)
            if config.attn_decay == "learned":
                block.attn.log_reach = nn.Parameter(torch.zeros(config.n_head))
            if config.norm != "layer":
                block.ln_1, block.ln_2 = layers.norm(config), layers.norm(config)
            if config.mlp_act != "gelu":
                block.mlp.act = layers.activation(config)
