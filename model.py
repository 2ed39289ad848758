"""
A GPT whose attention is pluggable. Read it from top to bottom:

    1. the attentions: each one a formula, and the registry that names them
    2. the model: GPT-2's blocks around the attention that was chosen
    3. what the scripts need besides: GPT-2's weights, an optimizer, the speed, generated text

Shapes: B batch, T sequence length, C embedding width, nh heads, hs = C / nh head size,
V vocabulary, L the fixed length by which pointwise attention is divided.

Departures from GPT-2: `attn_type`, `attn_decay`, `attn_normalize`, biases that can be left out,
LoRA adapters, and the options of engine/layers.py: `norm`, `mlp_act`, `position`, `qk_norm`.
State-dict names and shapes are nanoGPT's, so that checkpoints travel both ways.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Literal, NamedTuple, get_args, get_origin

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from engine import layers, lora, muon, peaks, pretrained
from engine.generation import stream
from kernels import blockwise, choice, cross_entropy, decay
from kernels.choice import Device, Implementation

# ---- Attention --------------------------------------------------------------
#
# y = A v, with A[i, j] = 0 for j > i. Softmax (SM) normalises each row of A. All others have one
# form: a score, a pointwise function of it, zeros above the diagonal, times v. An attn_decay
# weakens A by constants that depend on i - j (kernels/decay.py), and attn_normalize makes its rows
# sum to 1. With c = 1/sqrt(hs):
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


def relu_square(x: Tensor) -> Tensor:  # a lambda could not be pickled with an exported model
    return F.relu(x).square()


# A new attention takes one line here and nothing else. In a name that ends in `-n`, n stands for a
# whole number that the user chooses (GKpoly-8); f receives it as its keyword argument n.
POINTWISE = {
    "GK": Pointwise("distance", torch.exp),
    "GKpoly-n": Pointwise("distance", gaussian_poly),
    "PA_gelu": Pointwise("dot", F.gelu, by_length=True),
    "PA_relu": Pointwise("dot", F.relu, by_length=True),
    "PA_sigmoid": Pointwise("dot", torch.sigmoid, by_length=True),
    "PA_square": Pointwise("dot", torch.square, by_length=True),
    "PA_relu-square": Pointwise("dot", relu_square, by_length=True),
    "PA_silu": Pointwise("dot", F.silu, by_length=True),
    "PA_tanh": Pointwise("dot", torch.tanh, by_length=True),
    "PA_softplus": Pointwise("dot", F.softplus, by_length=True),
    "PA_identity": Pointwise("dot", torch.positive, by_length=True),
}
ATTN_TYPES = ("SM", *POINTWISE)
MAX_N = 16  # in float32, 1 + x / 2^n keeps 24 - n bits of x: beyond 16 squarings it is mostly noise
fixed = cache(partial)  # the same object for the same f and n, for the caches of others


def parse_attn_type(attn_type: str) -> Pointwise | None:
    """The registry entry that `attn_type` names, with n filled in; None for softmax. Raises
    ValueError, naming the valid types, for anything else."""
    if attn_type == "SM":
        return None
    name, n = blockwise.family(str(attn_type))  # GKpoly-8 -> GKpoly-n, 8
    variant = POINTWISE.get(name)
    if variant and not name.endswith("-n"):
        return variant
    if variant and 1 <= n <= MAX_N:
        return variant._replace(f=fixed(variant.f, n=n))
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


def apply_mask(x: Tensor, visible: Tensor | None) -> Tensor:
    """x (B, nh, t, T) with zeros where query i must not see key j. `visible`, bool (B, 1, t, T),
    says which keys each query sees. None is the causal mask, where the t queries belong to the last
    t of the T tokens."""
    if visible is not None:
        return x.masked_fill(~visible, 0)
    t, T = x.shape[-2:]
    return x.tril(T - t) if t > 1 else x


def pointwise_attention(
    q: Tensor, k: Tensor, v: Tensor, variant: Pointwise, divisor=1.0, dropout=0.0, visible=None,
    reach=None, sums=False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The plain formula, and the oracle of every faster path: (B, nh, T, hs) x 3 -> (B, nh, T, hs),
    and with `sums` the sums of A's rows too, (B, nh, T), in float32 at least. q may have fewer
    tokens than k and v: `apply_mask` says so, and what `visible` is. A decay has a `reach`, (nh,).
    Scores and weights are at least float32, whatever autocast asks for: a distance between
    half-precision vectors is a small difference of large numbers."""
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        x = scores(q.to(wide), k.to(wide), variant.score)
        # The mask comes after f, as zeros. The hidden scores are set to 0 too: an overflow of f
        # among them (GKpoly far out of range) would make the gradient 0 * inf = NaN.
        A = apply_mask(variant.f(apply_mask(x, visible)), visible) / divisor
        A = decay.apply(A, visible, reach)
        A = F.dropout(A, dropout) if dropout else A
        y = (A @ v.to(wide)).to(v.dtype)
        return (y, A.sum(-1)) if sums else y


def terms_of(attn_normalize: int, variant: Pointwise | None, attn_decay: str) -> int:
    """How many terms `normalised_attention` takes. More than one converge only if the weights lie
    between 0 and 1, as those of GK and GKpoly-n do; softmax needs none."""
    if variant is None or attn_decay == "none":
        return 0
    return attn_normalize if variant.score == "distance" else min(attn_normalize, 1)


def normalised_attention(
    attend: Callable[..., Tensor], terms: int, q: Tensor, k: Tensor, v: Tensor, dropout, visible,
    reach: Tensor,
) -> Tensor:  # fmt: skip
    """A with rows of sum 1, by additions and products alone: 1 / a_i = sum_n (1 - a_i)^n, where a_i
    is the sum of row i. The first `terms` terms, a power of two, divide the weights; the mean m_i
    of v under the decay alone gets what is left of 1:

        y_i = sum_(n < terms) (1 - a_i)^n sum_j A[i, j] v_j + (1 - a_i)^terms m_i

    No weight is negative where 0 <= a_i <= 1, as for GK and GKpoly-n in its range. Dropout comes
    before the sums."""
    y, a = attend(q, k, v, dropout=dropout, visible=visible, reach=reach, sums=True)
    factor, rest = 1.0, 1 - a[..., None]  # (B, nh, T, 1)
    while terms > 1:  # 1 + r + r^2 + r^3 + ... = (1 + r)(1 + r^2)...
        factor, rest, terms = factor * (1 + rest), rest * rest, terms // 2
    return (factor * y + rest * decay.mean(v, q.size(2), visible, reach)).to(v.dtype)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout=0.0, visible=None, reach=None
) -> Tensor:
    """Softmax attention by torch's fused kernels, from and to the same shapes, reach as above."""
    t, T = q.size(2), k.size(2)
    visible = decay.bias(q, T, visible, reach)
    if visible is None and 1 < t < T:
        visible = torch.ones(t, T, dtype=torch.bool, device=q.device).tril(T - t)
    causal = visible is None and t > 1
    return F.scaled_dot_product_attention(q, k, v, visible, dropout, is_causal=causal)


def refusals(
    attn_type: str, head_size: int, dtype: torch.dtype, device: Device, dropout=0.0, small=True
) -> dict[str, str | None]:
    """For each implementation, the fastest first: one line on why it can't run, None if it can."""
    variant = parse_attn_type(attn_type)
    return choice.refusals(attn_type, variant, head_size, dtype, device, dropout, small)


def choose(
    impl: str, attn_type: str, head_size: int, dtype: torch.dtype, device: Device, dropout=0.0,
    small=True,
) -> str:  # fmt: skip
    """The implementation to run: `impl`, or for 'auto' the fastest that can run. Raises ValueError
    if `impl` can't."""
    return choice.pick(impl, refusals(attn_type, head_size, dtype, device, dropout, small))


# As torch.compiler.assume_constant_result does, but without importing the compiler for a second
choose._dynamo_marked_constant = True


def attention(
    attn_type: str, block_size: int, pa_length_power=1.0, impl="auto", attn_decay="none",
    attn_normalize=0,
) -> Callable[..., Tensor]:  # fmt: skip
    """The causal attention `attn_type`, as a callable (q, k, v, dropout=0.0, visible=None,
    reach=None) -> y. PA_f divides by block_size ** pa_length_power, where `block_size` is L, the
    model's length in training and never that of the present input: no row depends on what follows
    it. The row sums of a decay replace that divisor; its `reach`, (nh,), may be given, and is else
    the fixed one for L. With a decay, `attn_normalize` gives rows the sum 1, see
    `normalised_attention`. Raises ValueError for an unknown attn_type, and when called if `impl`
    can't run."""
    variant, decays = parse_attn_type(attn_type), attn_decay != "none"
    terms = terms_of(attn_normalize, variant, attn_decay)
    divisor = 1.0
    if variant and variant.by_length and not decays:
        divisor = float(block_size) ** pa_length_power
    by_blocks = variant and blockwise.attention(attn_type, variant, divisor)

    def attend(q, k, v, dropout=0.0, visible=None, reach=None):
        if decays and reach is None:
            reach = decay.fixed_reach(q.size(1), block_size)
        if terms:
            return normalised_attention(plain, terms, q, k, v, dropout, visible, reach)
        return plain(q, k, v, dropout, visible, reach)

    def plain(q, k, v, dropout, visible, reach, sums=False):
        if variant is None:
            return softmax_attention(q, k, v, dropout, visible, reach)
        chosen = "reference"
        if visible is None and q.size(2) == k.size(2):  # else generation, with a key-value cache
            small = choice.is_small(*q.shape[:3])
            drops = 1.0 if dropout else 0.0  # a constant, even where torch.compile has a symbol
            chosen = choose(impl, attn_type, q.size(-1), q.dtype, q.device, drops, small)
        if chosen == "reference":
            return pointwise_attention(q, k, v, variant, divisor, dropout, visible, reach, sums)
        fast = by_blocks
        if chosen == "triton":
            fast = choice.triton_module(q.size(-1)).attention(attn_type, divisor)
        return fast(q, k, v, dropout, reach, sums)

    return attend


# ---- The model --------------------------------------------------------------


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as GPT-2 has it; False is a bit faster
    # nanoGPT has none of the keys below
    attn_type: str = "SM"
    attn_decay: Literal["none", "fixed", "learned"] = "none"  # see kernels/decay.py
    attn_normalize: int = 0  # terms, with a decay: rows of A sum to 1, see normalised_attention
    pa_length: int | None = None  # L of PA_f and the decay; None: block_size. Cropping keeps it
    pa_length_power: float = 1.0
    gelu: Literal["none", "tanh"] = "none"  # exact as in nanoGPT, or the form of OpenAI's GPT-2
    norm: Literal["layer", "rms", "fixed"] = "layer"  # for this and the next three, see layers.py
    mlp_act: Literal["gelu", "relu-square", "quad", "quartic"] = "gelu"
    position: Literal["learned", "rope"] = "learned"
    qk_norm: bool = False
    lora_rank: int = 0  # of the adapters that are trained instead of the weights; 0: no adapters
    lora_alpha: float = 16.0  # adapters are scaled by lora_alpha / lora_rank
    lora_targets: str = "attn.c_attn,attn.c_proj"  # the layers with adapters, see lora.LAYERS
    attn_impl: Implementation = "auto"  # a choice for this machine, no part of the model

    def __post_init__(self):
        def require(names: str, holds: Callable[[object], bool], what: str) -> None:
            for name in names.split():
                if not holds(value := getattr(self, name)):
                    raise ValueError(f"{name}={value!r} is not {what}")

        whole = lambda v: type(v) is int
        number = lambda v: type(v) in (int, float)
        sizes = "block_size vocab_size n_layer n_head n_embd"
        require(sizes, lambda v: whole(v) and v > 0, "a positive whole number")
        require("n_embd", lambda v: v % self.n_head == 0, f"divisible by n_head={self.n_head}")
        require("dropout", lambda v: number(v) and 0 <= v < 1, "a number from 0 to below 1")
        length = lambda v: v is None or whole(v) and 0 < v < 2**32
        require("pa_length", length, "a positive whole number below 2^32")
        require("pa_length_power", lambda v: number(v) and 0 <= v < 8, "a number from 0 to below 8")
        for field in fields(self):
            if get_origin(field.type) is Literal:
                allowed = get_args(field.type)
                require(field.name, allowed.__contains__, f"one of {', '.join(allowed)}")
        require("qk_norm", lambda v: type(v) is bool, "True or False")
        terms = (0, 1, 2, 4, 8, 16, 32)
        which = f"one of {', '.join(map(str, terms))}"
        require("attn_normalize", lambda v: whole(v) and v in terms, which)
        if self.position == "rope":
            even = lambda v: v // self.n_head % 2 == 0
            require("n_embd", even, f"an even multiple of n_head={self.n_head}, as rope needs")
        lora.check(self)
        variant = parse_attn_type(self.attn_type)
        by_length, decays = variant and variant.by_length, self.attn_decay != "none"
        self.pa_length = (self.pa_length or self.block_size) if by_length or decays else None
        if decays or not by_length:  # it means nothing, and nanoGPT does not know it
            self.pa_length_power = GPTConfig.pa_length_power
        self.attn_normalize = terms_of(self.attn_normalize, variant, self.attn_decay)
        if self.attn_normalize > 1:  # the rows that dropout leaves sum to 1 / (1 - dropout) at most
            require("dropout", lambda v: v <= 0.5, "at most 0.5, as attn_normalize needs")

    def model_args(self) -> dict:
        """What a checkpoint keeps: nanoGPT's seven keys, and of ours those that are not default, so
        that nanoGPT can load a softmax checkpoint."""
        nanogpt = fields(self)[:7]
        kept = [f for f in fields(self) if f in nanogpt or getattr(self, f.name) != f.default]
        return {f.name: getattr(self, f.name) for f in kept if f.name != "attn_impl"}


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = lora.linear(config, "attn.c_attn", config.n_embd, 3 * config.n_embd)
        self.c_proj = lora.linear(config, "attn.c_proj", config.n_embd, config.n_embd)
        self.qk = layers.QueriesAndKeys(config)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        L = config.pa_length or config.block_size
        args = config.pa_length_power, config.attn_impl, config.attn_decay, config.attn_normalize
        self.attend = attention(config.attn_type, L, *args)
        fixed = decay.fixed_reach(self.n_head, L) if config.attn_decay != "none" else None
        self.fixed_reach, self.log_reach = fixed, None
        if config.attn_decay == "learned":
            self.log_reach = nn.Parameter(fixed.log().float())

    def reach(self) -> Tensor | None:
        """How far each head sees, (nh,) in tokens; None without a decay."""
        if self.log_reach is None:
            return self.fixed_reach
        return self.log_reach.exp().clamp(min=decay.SHORTEST_LEARNED)

    def forward(self, x, pos, extend=None):
        B, T, C = x.size()
        q, k, v = (
            t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs), no copy
            for t in self.c_attn(x).split(C, dim=2)  # three of (B, T, C)
        )
        q, k = self.qk(q, k, pos)
        visible = None
        if extend is not None:
            k, v, visible = extend(k, v)  # of all tokens so far
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q, k, v, dropout, visible, self.reach())  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = lora.linear(config, "mlp.c_fc", config.n_embd, 4 * config.n_embd)
        self.act = layers.activation(config)
        self.c_proj = lora.linear(config, "mlp.c_proj", 4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = layers.norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = layers.norm(config)
        self.mlp = MLP(config)

    def forward(self, x, pos, extend=None):
        x = x + self.attn(self.ln_1(x), pos, extend)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        modules = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": layers.position_embedding(config),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            "ln_f": layers.norm(config),
        }
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied, as in GPT-2
        self.init_weights()
        if config.lora_rank:
            lora.init_adapters(self)

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
        """Token ids (B, T) -> logits (B, T, V) and the mean cross-entropy in nats. Without
        `targets` (B, T; -1 is ignored) the loss is None, and the logits are those of the last
        position alone, (B, 1, V). With targets but without `with_logits` the logits are None, which
        saves time or memory if V is large. Raises ValueError if T > block_size."""
        B, T = idx.size()
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}")
        x = self.hidden(idx, torch.arange(T, device=idx.device))
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        x, targets = x.view(B * T, -1), targets.reshape(-1)
        if not with_logits and cross_entropy.is_better(B * T * self.config.vocab_size, x.device):
            return None, cross_entropy.linear_cross_entropy(x, self.lm_head.weight, targets)
        logits = self.lm_head(x)  # (B T, V)
        loss = F.cross_entropy(logits, targets, ignore_index=-1)
        return logits.view(B, T, -1) if with_logits else None, loss

    def hidden(self, idx: Tensor, pos: Tensor, cache=None) -> Tensor:
        """The output layer's input, (B, T, C), for ids (B, T) at positions (T,) or (B, T). With a
        `cache` (generation.KVCache) the tokens follow those in it, and are added to it."""
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C) + (T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, pos, None if cache is None else partial(cache.extend, i))
        return self.transformer.ln_f(x)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters. The position embeddings are left out by default; the token
        embeddings are not, since they are the output layer's weights too."""
        positions = set(self.transformer.wpe.parameters()) if non_embedding else ()
        return sum(p.numel() for p in self.parameters() if p not in positions)

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context, e.g. of GPT-2 from 1024. L of PA_f stays what it was."""
        if not 0 < block_size <= (own := self.config.block_size):
            raise ValueError(f"block_size={block_size} is not in 1..{own}, the model's own")
        self.config.block_size = block_size
        for wpe in self.transformer.wpe.parameters():  # none with rope
            self.transformer.wpe.weight = nn.Parameter(wpe[:block_size], wpe.requires_grad)
            self.transformer.wpe.num_embeddings = block_size

    # ------------------------------------------------------------------------
    # What the scripts need besides

    @classmethod
    def from_pretrained(
        cls, model_type: str, override_args: dict | None = None, pa_length: int | None = None
    ) -> "GPT":
        """GPT-2 weights from transformers: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or the hub name
        or local folder of any model of that architecture; export.py writes such folders.

        `override_args` may hold dropout and what nanoGPT has no key for, such as attn_type. Other
        values are those of config.json, or else the defaults; that of L is `pa_length`. Raises
        OSError if the weights can't be had, ValueError if the model is no GPT-2 as this class is.
        """
        config, state = pretrained.read_gpt2(model_type, GPTConfig, override_args or {}, pa_length)
        model = cls(config)
        missing, left_out = model.load_state_dict(state, strict=False)
        assert all(".lora_" in n or n.endswith(layers.OWN_WEIGHTS) for n in missing), missing
        layers.say_left_out(left_out, model_type)
        return model

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple, device_type: str,
        optimizer: str = "adamw",
    ) -> torch.optim.Optimizer:  # fmt: skip
        """AdamW, fused where the device has it, or with optimizer='muon' Muon for the blocks'
        matrices and AdamW for the rest. Only matrices and embeddings decay."""
        options = {"lr": learning_rate, "betas": betas, "fused": device_type in ("cuda", "cpu")}
        trained = [p for p in self.parameters() if p.requires_grad]
        if optimizer == "muon":
            blocks = set(self.transformer.h.parameters())
            return muon.MuonAdamW(trained, blocks, weight_decay, **options)
        return torch.optim.AdamW(muon.decay_groups(trained, weight_decay), **options)

    def estimate_mfu(
        self, fwdbwd_per_iter: int, dt: float, seq_len: int | None = None, peak: float | None = None
    ) -> float | None:
        """Model FLOPs utilisation: the share of `peak` (FLOP/s, by default this GPU's in bf16) that
        `fwdbwd_per_iter` sequences of `seq_len` tokens (by default block_size) in `dt` seconds use.
        None if the peak is not known."""
        peak = peak or peaks.device_peak(self.lm_head.weight.device)
        T = seq_len or self.config.block_size
        return peak and peaks.flops_per_token(self, T) * T * fwdbwd_per_iter / dt / peak

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, *args, **options) -> Tensor:
        """Append `max_new_tokens` drawn tokens to idx: (B, T) -> (B, T + max_new_tokens). The other
        arguments are those of generation.stream, from temperature on. Call `eval()` first."""
        drawn = stream(self, list(idx), 1, max_new_tokens, *args, **options)
        return torch.cat((idx, *(ids[:, None] for ids in drawn)), dim=1)
