"""
A GPT whose attention is pluggable. Read it from top to bottom:

    1. the attentions: each one a formula, and the registry that names them
    2. the model: GPT-2's blocks around whichever attention was chosen
    3. what the training loop asks of it: pretrained weights, optimizer, MFU, sampling

Shapes: B batch, T sequence length, C embedding width, nh heads, hs = C / nh head size,
V vocabulary, L the fixed length by which pointwise attention is divided.

Departures from GPT-2: `attn_type`, biases that can be left out (`bias=False`), and nothing else.
State-dict names and shapes are nanoGPT's, so that checkpoints travel both ways.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from kernels import blockwise as kernels
from kernels import cross_entropy as loss

# ----------------------------------------------------------------------------
# Attention
#
# y = A v, with A[i, j] = 0 for j > i. Softmax (SM) normalises each row of A. All others have one
# form: a score, a pointwise function of it, zeros above the diagonal, times v. With c = 1/sqrt(hs):
#
#     score 'dot'        x[i, j] = c q_i . k_j
#     score 'distance'   x[i, j] = -c/2 |q_i - k_j|^2      (never positive)


class Pointwise(NamedTuple):
    """An attention without normalisation: A[i, j] = f(x[i, j]), divided by L where `by_length`."""

    score: str  # 'dot' or 'distance'
    f: Callable[..., Tensor]  # elementwise on a tensor of scores, any shape
    by_length: bool = False


def gaussian_poly(x: Tensor, n: int) -> Tensor:
    """(1 + x / 2^n)^(2^n), by n squarings: exp(x) as n grows, while -2^(n+1) <= x <= 0."""
    a = 1 + x / 2**n
    for _ in range(n):
        a = a * a
    return a


# One line here is all that a new attention takes. In a name that ends in `-n`, n is a whole number
# that the user chooses (GKpoly-8) and that f receives as its keyword argument n.
POINTWISE = {
    "GK": Pointwise("distance", torch.exp),
    "GKpoly-n": Pointwise("distance", gaussian_poly),
    "PA_gelu": Pointwise("dot", F.gelu, by_length=True),
    "PA_relu": Pointwise("dot", F.relu, by_length=True),
    "PA_sigmoid": Pointwise("dot", torch.sigmoid, by_length=True),
    "PA_square": Pointwise("dot", torch.square, by_length=True),
    "PA_relu-square": Pointwise("dot", lambda x: F.relu(x).square(), by_length=True),
    "PA_silu": Pointwise("dot", F.silu, by_length=True),
    "PA_tanh": Pointwise("dot", torch.tanh, by_length=True),
    "PA_softplus": Pointwise("dot", F.softplus, by_length=True),
    "PA_identity": Pointwise("dot", lambda x: x, by_length=True),
}
ATTN_TYPES = ("SM", *POINTWISE)
MAX_N = 16  # in float32, 1 + x / 2^n keeps 24 - n bits of x: beyond 16 squarings it is mostly noise


def parse_attn_type(attn_type: str) -> Pointwise | None:
    """The registry entry that `attn_type` names, with n filled in; None for softmax.

    Raises ValueError, naming the valid types, for anything else.
    """
    if attn_type == "SM":
        return None
    for name, variant in POINTWISE.items():
        if name.endswith("-n"):
            match = re.fullmatch(re.escape(name[:-1]) + r"(\d{1,2})", str(attn_type), re.ASCII)
            if match and 1 <= int(match[1]) <= MAX_N:
                return variant._replace(f=partial(variant.f, n=int(match[1])))
        elif attn_type == name:
            return variant
    raise ValueError(
        f"attn_type={attn_type!r} is not known; it is one of {', '.join(ATTN_TYPES)}, "
        f"with n a whole number from 1 to {MAX_N}"
    )


def scores(q: Tensor, k: Tensor, score: str) -> Tensor:
    """x[i, j] as defined above, for every i and j: (B, nh, T, hs) x 2 -> (B, nh, T, T)."""
    c = 1 / math.sqrt(q.size(-1))
    x = c * (q @ k.mT)
    if score == "distance":  # -c/2 |q - k|^2 = c q.k - c/2 |q|^2 - c/2 |k|^2
        x = x - c / 2 * q.square().sum(-1)[..., :, None] - c / 2 * k.square().sum(-1)[..., None, :]
    return x


def hide(x: Tensor, visible: Tensor | None) -> Tensor:
    """x (B, nh, t, T) with zeros where query i must not see key j.

    The t queries are the last t of T tokens, so the diagonal ends in the last corner; or `visible`,
    bool (B, 1, t, T), says what each may see.
    """
    if visible is not None:
        return x.masked_fill(~visible, 0)
    t, T = x.shape[-2:]
    return x.tril(T - t) if t > 1 else x


def pointwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variant: Pointwise,
    divisor: float,
    dropout: float = 0.0,
    visible: Tensor | None = None,
) -> Tensor:
    """The plain formula, and the oracle of every faster path: (B, nh, T, hs) x 3 -> (B, nh, T, hs).

    q may have fewer tokens than k and v, see `hide`. Scores and weights are at least float32,
    whatever autocast asks for: a distance between half-precision vectors is a small difference of
    large numbers.
    """
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        x = scores(q.to(wide), k.to(wide), variant.score)
        # The mask comes after f, as zeros. Scores that it hides are set to 0 as well: an overflow
        # among them (GKpoly far out of range) would come back as 0 * inf in the gradient.
        A = hide(variant.f(hide(x, visible)), visible) / divisor
        A = F.dropout(A, dropout) if dropout else A
        return (A @ v.to(wide)).to(v.dtype)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, visible: Tensor | None = None
) -> Tensor:
    """Causal softmax attention by torch's fused kernels: (B, nh, T, hs) x 3 -> (B, nh, T, hs).

    q may have fewer tokens than k and v, see `hide`.
    """
    t, T = q.size(2), k.size(2)
    if visible is None and 1 < t < T:
        visible = torch.ones(t, T, dtype=torch.bool, device=q.device).tril(T - t)
    causal = visible is None and t > 1
    return F.scaled_dot_product_attention(q, k, v, visible, dropout, is_causal=causal)


IMPLEMENTATIONS = ("auto", "reference", "blockwise", "triton")


def refusals(
    attn_type: str,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    dropout: float = 0.0,
) -> dict[str, str | None]:
    """Why each implementation can't run, the fastest first, in one line; None where it can."""
    if attn_type == "SM":
        return {"SDPA": None}  # torch chooses among its own fused kernels
    device = torch.device(device)
    fused = None if device.type in ("cpu", "cuda") else f"not tested on {device.type}"
    return {
        "triton": triton_refusal(attn_type, head_size, dtype, device, dropout),
        "blockwise": fused,
        "reference": None,
    }


def triton_refusal(attn_type, head_size, dtype, device, dropout) -> str | None:
    if device.type != "cuda":
        return f"the Triton kernels need a CUDA device, not {device.type}"
    if dropout > 0:
        return "the Triton kernels have no dropout"
    try:
        from kernels import triton_kernels
    except ImportError as error:
        return f"the Triton kernels can't be imported: {error}"
    return triton_kernels.supports(attn_type, head_size, dtype, device)


def choose(impl: str, attn_type: str, *where, dropout: float = 0.0) -> str:
    """The implementation that `impl` means `where` = (head_size, dtype, device). Raises ValueError
    if it can't run there."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attn_impl={impl!r} is none of {', '.join(IMPLEMENTATIONS)}")
    reasons = refusals(attn_type, *where, dropout)
    if impl == "auto" or attn_type == "SM":
        return next(name for name, reason in reasons.items() if reason is None)
    if reasons[impl]:
        raise ValueError(f"attn_impl={impl} can't run: {reasons[impl]}; auto takes the fastest")
    return impl


# What torch.compiler.assume_constant_result sets; to call it imports the compiler, for a second
choose._dynamo_marked_constant = True


def attention(
    attn_type: str, block_size: int, pa_length_power: float = 1.0, impl: str = "auto"
) -> Callable[..., Tensor]:
    """The causal attention that `attn_type` names, as a callable
    (q, k, v, dropout=0.0, visible=None) -> y, for the last two of which see `hide`.

    `block_size` is L, the length that the model was trained with: PA_f divides by
    L ** pa_length_power, never by the length of the present input, so that a row does not depend
    on what follows it. `impl` is 'reference' (the formula above), 'blockwise' or 'triton' (the same
    function in O(T) memory), or 'auto', the fastest of them that can run. Raises ValueError for an
    unknown attn_type, and when called where `impl` can't run.
    """
    variant = parse_attn_type(attn_type)
    if variant is None:
        return softmax_attention
    divisor = float(block_size) ** pa_length_power if variant.by_length else 1.0
    blockwise = kernels.blockwise(attn_type, variant, divisor)

    def attend(q, k, v, dropout=0.0, visible=None):
        if visible is not None or q.size(2) != k.size(2):  # a few queries, of tokens one by one
            return pointwise_attention(q, k, v, variant, divisor, dropout, visible)
        chosen = choose(impl, attn_type, q.size(-1), q.dtype, q.device, dropout=dropout)
        if chosen == "triton":
            from kernels import triton_kernels

            return triton_kernels.triton_attention(q, k, v, attn_type, divisor)
        if chosen == "blockwise":
            return blockwise(q, k, v, dropout)
        return pointwise_attention(q, k, v, variant, divisor, dropout)

    return attend


# ----------------------------------------------------------------------------
# The model


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as GPT-2 has it; False is a bit faster
    # From here on nanoGPT has no such key
    attn_type: str = "SM"
    pa_length: int | None = None  # L of PA_f; None: block_size. Cropping the model leaves it alone
    pa_length_power: float = 1.0
    gelu: str = "none"  # 'none' is the exact GELU of nanoGPT, 'tanh' the form of OpenAI's GPT-2
    lora_rank: int = 0  # of the adapters that are trained instead of the weights; 0: none
    lora_alpha: float = 16.0  # adapters are scaled by lora_alpha / lora_rank
    lora_targets: str = "attn.c_attn,attn.c_proj"  # layers that have one, see LoRALinear
    attn_impl: str = "auto"  # see attention(); it belongs to the machine, not to the model

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive whole number")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        for name, below in (("dropout", 1), ("pa_length_power", 8)):
            if type(value := getattr(self, name)) not in (int, float) or not 0 <= value < below:
                raise ValueError(f"{name}={value!r} is not a number from 0 to below {below}")
        L = self.pa_length
        if L is not None and not (type(L) is int and 1 <= L < 2**32):
            raise ValueError(f"pa_length={L!r} is not a positive whole number below 2^32")
        if self.gelu not in ("none", "tanh"):
            raise ValueError(f"gelu={self.gelu!r} is neither 'none' nor 'tanh'")
        if type(self.lora_rank) is not int or self.lora_rank < 0:
            raise ValueError(f"lora_rank={self.lora_rank!r} is not a whole number from 0 on")
        if type(self.lora_alpha) not in (int, float) or not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha={self.lora_alpha!r} is not a positive number")
        if self.lora_rank == 0:
            self.lora_alpha, self.lora_targets = GPTConfig.lora_alpha, GPTConfig.lora_targets
        for target in str(self.lora_targets).split(","):
            if not any(is_target(name, target) for name in LAYERS):
                known = ", ".join(LAYERS)
                raise ValueError(f"lora_targets={target!r} is none of {known}, nor the end of one")
        variant = parse_attn_type(self.attn_type)
        by_length = variant is not None and variant.by_length
        self.pa_length = (self.pa_length or self.block_size) if by_length else None
        if not by_length:
            self.pa_length_power = 1.0  # means nothing here, and nanoGPT does not know it

    def model_args(self) -> dict:
        """What a checkpoint keeps: nanoGPT's seven keys, and of ours those that are not default.

        So nanoGPT can load a softmax checkpoint: it knows no other keys.
        """
        nanogpt = {f.name for f in fields(self)[:7]}
        default = {f.name: f.default for f in fields(self)}
        args = {k: v for k, v in asdict(self).items() if k in nanogpt or v != default[k]}
        args.pop("attn_impl", None)
        return args


# What decides, beside GPT-2's own keys, which function the weights compute
ATTENTION_ARGS = ("attn_type", "pa_length", "pa_length_power")
# OpenAI's checkpoints keep these matrices as (in, out); nn.Linear wants (out, in)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, under nanoGPT's state-dict names."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # the matrices of a block


def is_target(name: str, target: str) -> bool:
    """Whether `target` is a layer's name, or the end of it after a dot."""
    return f".{name}".endswith(f".{target.strip()}")


class LoRALinear(nn.Linear):
    """y = x W^T + b + (alpha / rank) x A^T B^T, of which only A (rank, in) and B (out, rank) are
    trained (Hu et al. 2021, arXiv:2106.09685). B = 0 at first: the layer begins as it was."""

    def __init__(self, n_in, n_out, bias, rank, alpha):
        super().__init__(n_in, n_out, bias=bias)
        self.lora_A = nn.Parameter(torch.empty(rank, n_in))
        self.lora_B = nn.Parameter(torch.empty(n_out, rank))
        self.scale = alpha / rank

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def fold_lora(state: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The state dict of the same model without adapters: W + (alpha / rank) B A in place of W."""
    folded = {name: t for name, t in state.items() if ".lora_" not in name}
    for name in state:
        layer, _, kind = name.rpartition(".")
        if kind == "lora_A":
            BA = state[f"{layer}.lora_B"] @ state[name]
            folded[f"{layer}.weight"] = state[f"{layer}.weight"] + BA * (
                config.lora_alpha / config.lora_rank
            )
    return folded


def linear(config: GPTConfig, name: str, n_in: int, n_out: int) -> nn.Linear:
    """The layer `name` of LAYERS, with an adapter if it is to have one."""
    if config.lora_rank and any(is_target(name, t) for t in config.lora_targets.split(",")):
        return LoRALinear(n_in, n_out, config.bias, config.lora_rank, config.lora_alpha)
    return nn.Linear(n_in, n_out, bias=config.bias)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = linear(config, "attn.c_attn", config.n_embd, 3 * config.n_embd)
        self.c_proj = linear(config, "attn.c_proj", config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        L = config.pa_length or config.block_size
        self.attend = attention(config.attn_type, L, config.pa_length_power, config.attn_impl)

    def forward(self, x, past=None):
        B, T, C = x.size()
        q, k, v = (
            t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs), no copy
            for t in self.c_attn(x).split(C, dim=2)  # three of (B, T, C)
        )
        visible = None
        if past is not None:
            k, v, visible = past.extend(k, v)  # of all tokens so far
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q, k, v, dropout, visible)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = linear(config, "mlp.c_fc", config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate=config.gelu)
        self.c_proj = linear(config, "mlp.c_proj", 4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x, past=None):
        x = x + self.attn(self.ln_1(x), past)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=LayerNorm(config.n_embd, config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied, as in GPT-2
        self.init_weights()
        if config.lora_rank:
            self.init_lora()

    def init_lora(self):
        """Adapters that change nothing yet (as in the paper's code); all else is frozen."""
        for name, p in self.named_parameters():
            if name.endswith(".lora_A"):
                nn.init.kaiming_uniform_(p, a=math.sqrt(5))
            elif name.endswith(".lora_B"):
                nn.init.zeros_(p)
            p.requires_grad_(".lora_" in name)

    def init_weights(self):
        """GPT-2's: N(0, 0.02) for every matrix, zero biases; the projections that write to the
        residual stream are scaled by 1/sqrt(2 n_layer), as there are 2 n_layer of them."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual = name.endswith("c_proj")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, with_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (B, T) -> logits (B, T, V) and the mean cross-entropy in nats.

        Without `targets` (B, T; -1 is ignored) only the last position's logits are computed,
        (B, 1, V), and the loss is None. With targets but without `with_logits` the logits are None:
        a large vocabulary's loss is faster, or smaller, if nobody wants them. Raises ValueError if
        T > block_size.
        """
        B, T = idx.size()
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}")
        x = self.hidden(idx, torch.arange(T, device=idx.device))
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        x, targets = x.view(B * T, -1), targets.reshape(-1)
        if not with_logits and loss.pays(B * T * self.config.vocab_size, x.device):
            return None, loss.linear_cross_entropy(x, self.lm_head.weight, targets)
        logits = self.lm_head(x)  # (B T, V)
        cross_entropy = F.cross_entropy(logits, targets, ignore_index=-1)
        return logits.view(B, T, -1) if with_logits else None, cross_entropy

    def hidden(self, idx: Tensor, pos: Tensor, cache=None) -> Tensor:
        """What the last layer reads, (B, T, C), for ids (B, T) at positions (T,) or (B, T).

        With a `cache` (generation.KVCache) the tokens follow those that it holds, and join them.
        """
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C) + (T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if cache is None else cache.layer(i))
        return self.transformer.ln_f(x)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters. The position embeddings are left out by default; the token
        embeddings are not, since they are the output layer's weights too."""
        n_params = sum(p.numel() for p in self.parameters())
        return n_params - self.transformer.wpe.weight.numel() if non_embedding else n_params

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context, e.g. of GPT-2 from 1024. L of PA_f stays what it was."""
        if not 0 < block_size <= self.config.block_size:
            raise ValueError(
                f"block_size={block_size} is not in 1..{self.config.block_size}, the model's own"
            )
        self.config.block_size = block_size
        wpe = self.transformer.wpe.weight
        self.transformer.wpe.weight = nn.Parameter(wpe[:block_size], wpe.requires_grad)
        self.transformer.wpe.num_embeddings = block_size

    # ------------------------------------------------------------------------
    # What the scripts ask of it

    @classmethod
    def from_pretrained(
        cls, model_type: str, override_args: dict | None = None, pa_length: int | None = None
    ) -> "GPT":
        """GPT-2 weights from transformers: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or the hub name
        or local folder of any model of that architecture; export.py writes such folders.

        `override_args` may hold dropout and what nanoGPT has not, such as attn_type; what it leaves
        out is as in config.json, or else the default. `pa_length` is L if neither of them says it.
        Raises OSError if the weights can't be had, ValueError if the model is not a GPT-2 as this
        class has it.
        """
        from transformers import AutoConfig, GPT2LMHeadModel

        from engine.network import HUB, reachable

        override_args = override_args or {}
        unknown = override_args.keys() - {f.name for f in fields(GPTConfig)[7:]} - {"dropout"}
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))} can't be overridden in {model_type}")
        try:
            local = Path(model_type).is_dir() or not reachable(HUB)  # or else its cache will do
            hf_config = AutoConfig.from_pretrained(
                model_type, local_files_only=local, trust_remote_code=False
            )
            kept = {k: getattr(hf_config, k) for k in ATTENTION_ARGS if hasattr(hf_config, k)}
            args = {"pa_length": pa_length, **kept, **override_args}
            config = cls._config_from_hf(hf_config, model_type, args)
            hf, info = GPT2LMHeadModel.from_pretrained(
                model_type, local_files_only=local, output_loading_info=True
            )
            if info["missing_keys"] or info.get("mismatched_keys"):
                raise ValueError(f"{model_type!r} lacks weights that its config.json promises")
            state = hf.state_dict()
            if not torch.equal(state["lm_head.weight"], state["transformer.wte.weight"]):
                raise ValueError(
                    f"{model_type!r} has an output layer of its own (lm_head.weight); only models "
                    "that share it with the token embeddings, as GPT-2 does, fit"
                )
        except OSError as error:
            if Path(model_type).is_dir():
                raise ValueError(f"{model_type!r} is not a whole model: {error}") from error
            raise OSError(
                f"no weights for {model_type!r}: neither a folder here, nor in the hub's cache "
                "(HF_HOME, by default ~/.cache/huggingface), nor to be downloaded "
                f"({type(error).__name__})"
            ) from error

        except ValueError:
            raise
        except Exception as error:  # of safetensors, torch or transformers, for damaged files
            raise ValueError(f"{model_type!r} can't be loaded: {error}") from error

        model = cls(config)
        ours = model.state_dict()
        with torch.no_grad():
            for name, weight in ours.items():
                if ".lora_" in name:
                    continue  # new
                source = state[name]
                weight.copy_(source.t() if name.endswith(TRANSPOSED) else source)
        return model

    @staticmethod
    def _config_from_hf(hf, name: str, override_args: dict) -> GPTConfig:
        gelu = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
        if hf.model_type != "gpt2":
            raise ValueError(f"{name!r} is a {hf.model_type} model; only GPT-2's architecture fits")
        if (
            hf.activation_function not in gelu
            or hf.n_inner not in (None, 4 * hf.n_embd)
            or not hf.scale_attn_weights
            or hf.scale_attn_by_inverse_layer_idx
            or hf.layer_norm_epsilon != 1e-5
            or hf.add_cross_attention
        ):
            raise ValueError(
                f"{name!r} departs from GPT-2 (see its config.json) in a way not built here"
            )
        return GPTConfig(
            block_size=hf.n_positions,
            vocab_size=hf.vocab_size,
            n_layer=hf.n_layer,
            n_head=hf.n_head,
            n_embd=hf.n_embd,
            bias=True,
            gelu=gelu[hf.activation_function],
            **override_args,
        )

    def configure_optimizers(
        self,
        weight_decay: float,
        learning_rate: float,
        betas: tuple,
        device_type: str,
        optimizer: str = "adamw",
    ) -> torch.optim.Optimizer:
        """AdamW, fused where the device has it, or with optimizer='muon' muon.MuonAdamW. Matrices
        and embeddings decay; biases and LayerNorm gains don't."""
        params = [p for p in self.parameters() if p.requires_grad]
        in_blocks = set(self.transformer.h.parameters())
        matrices = [p for p in params if p.dim() == 2 and p in in_blocks]
        muons = matrices if optimizer == "muon" else []
        for_muon = set(muons)
        rest = [p for p in params if p not in for_muon]
        groups = [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        options = {"lr": learning_rate, "betas": betas, "fused": device_type in ("cuda", "cpu")}
        if optimizer == "muon":
            from engine.muon import MuonAdamW

            return MuonAdamW(muons, weight_decay, groups, **options)
        return torch.optim.AdamW(groups, **options)

    def estimate_mfu(
        self, fwdbwd_per_iter: int, dt: float, seq_len: int | None = None, peak: float | None = None
    ) -> float | None:
        """Model FLOPs utilisation: the share of `peak` (FLOP/s, default: this GPU's in bf16) that
        `fwdbwd_per_iter` sequences of `seq_len` tokens (default: block_size) in `dt` seconds use.

        None where the peak is not known. A token costs 6 N + 12 n_layer C T FLOPs, whatever the
        attention does (PaLM, appendix B, https://arxiv.org/abs/2204.02311); a frozen weight 2 less.
        """
        device = self.lm_head.weight.device
        peak = peak or peak_flops(
            torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        )
        if peak is None:
            return None
        T = seq_len or self.config.block_size
        frozen = sum(p.numel() for p in self.parameters() if not p.requires_grad)
        if not self.transformer.wpe.weight.requires_grad:
            frozen -= self.transformer.wpe.weight.numel()  # which N leaves out
        per_token = 6 * self.get_num_params() - 2 * frozen
        per_token += 12 * self.config.n_layer * self.config.n_embd * T
        return per_token * T * fwdbwd_per_iter / dt / peak

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        **options,
    ) -> Tensor:
        """Append `max_new_tokens` drawn tokens to idx: (B, T) -> (B, T + max_new_tokens).

        temperature 0 takes the likeliest token. For the other options see generation.stream, which
        does the work. Call `eval()` first.
        """
        from engine.generation import stream

        prompts = list(idx)
        drawn = stream(self, prompts, 1, max_new_tokens, temperature, top_k, **options)
        return torch.cat((idx, *(ids[:, None] for ids in drawn)), dim=1)


# Dense bf16 tensor-core peaks in TFLOP/s from the vendors' data sheets (fp16 for V100 and T4).
# The first name found in the device's name counts.
PEAK_TFLOPS = {
    "GB200": 2500,
    "B300": 2250,
    "B200": 2250,
    "H200 NVL": 835,
    "H200": 989,
    "GH200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A10G": 70,
    "A10": 125,
    "A40": 150,
    "RTX A6000": 155,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "T4": 65,
    "V100": 125,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
    "MI250X": 383,
}


def peak_flops(device_name: str) -> float | None:
    """bf16 FLOP/s that the data sheet of the GPU promises; None if it is not in the table."""
    for name, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return tflops * 1e12
    return None
