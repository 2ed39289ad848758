"""
A trained GPT of one layer and one head as one small polynomial in float64, for encrypt.py.

With norm=fixed, mlp_act=quad or quartic, and GKpoly-n or PA_square, only additions and
multiplications are left. Whatever is linear is folded into the matrix that follows it. Let x_t (C,)
be the embedding of token t, and x that of the last token. The logits (V,) of the next token are

    d_t = query x + key x_t
    a_t = (1 - |d_t|^2)^(2^n)                      GKpoly-n
    a_t = (d_t . x_t)^(2^n)                        PA_identity (n = 0), PA_square (n = 1); key = 0
    z = sum over t of w_t a_t x_t                  w: the decay of the last row, or 1
    h = (hidden_last x + hidden_sum z)^2           elementwise, for mlp_act=quad
    h = ((hidden_last x + hidden_sum z)^2 + s)^2   likewise, for mlp_act=quartic; s is one number
    logits = logits_last x + logits_sum z + logits_hidden h

There are no biases: every norm subtracts the mean over the channels, so that the mean of x_t means
nothing to the model. `embed` sets it to 1, and a bias b becomes the matrix b 1^T / C.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray

from configurator import UserError
from engine.layers import Quad, Quartic
from engine.lora import fold_lora
from engine.ranges import squarings
from kernels import decay
from model import GPT, GPTConfig, parse_attn_type

SQUARINGS = {"PA_identity": 0, "PA_square": 1}  # beside GKpoly-n, the attentions that can be folded
TRAIN = "python train.py config/train_he.py  trains one that can"


@dataclass
class Polynomial:
    """The matrices of the formula above, and what the client needs: embeddings and decay."""

    config: GPTConfig
    tokens: ndarray  # (V, C), each row with mean 0
    positions: ndarray  # (block_size, C), each row with mean 1
    decay: ndarray  # (block_size, block_size); row T - 1 has the w of T tokens
    n: int  # number of squarings that turn a score into a weight
    shift: float | None  # s above; None for mlp_act=quad
    query: ndarray  # (C, C)
    key: ndarray  # (C, C)
    hidden_last: ndarray  # (4C, C)
    hidden_sum: ndarray  # (4C, C)
    logits_last: ndarray  # (V, C)
    logits_sum: ndarray  # (V, C)
    logits_hidden: ndarray  # (V, 4C)

    @property
    def by_distance(self) -> bool:
        """Whether scores are distances, as those of GKpoly-n, and not dot products."""
        return parse_attn_type(self.config.attn_type).score == "distance"

    def embed(self, ids: ndarray) -> ndarray:
        """x (T, C) of the token ids (T,). Raises UserError unless 0 < T <= block_size."""
        T, longest = len(ids), self.config.block_size
        if not 0 < T <= longest:
            given = "the prompt is empty" if T == 0 else f"the prompt has {T} tokens"
            raise UserError(f"{given}; it must have 1 to {longest} (block_size): change --start")
        return self.tokens[ids] + self.positions[:T]

    def weights(self, T: int) -> ndarray:
        """w (T,), by which the last of T tokens weighs the values of all."""
        return self.decay[T - 1, :T]

    def bases(self, x: ndarray) -> ndarray:
        """What is squared n times, (T,), of embedded tokens x (T, C): 1 - |d_t|^2 or d_t . x_t."""
        d = x[-1] @ self.query.T + x @ self.key.T
        return 1 - (d * d).sum(-1) if self.by_distance else (d * x).sum(-1)

    def logits(self, x: ndarray) -> ndarray:
        """The logits (V,) that follow the embedded tokens x (T, C)."""
        z = (self.weights(len(x)) * self.bases(x) ** (2**self.n)) @ x
        h = (self.hidden_last @ x[-1] + self.hidden_sum @ z) ** 2
        if self.shift is not None:
            h = (h + self.shift) ** 2
        return self.logits_last @ x[-1] + self.logits_sum @ z + self.logits_hidden @ h

    def check_range(self, x: ndarray) -> None:
        """Raise UserError if a score of the embedded prompt x is outside GKpoly-n's range."""
        lowest = self.bases(x).min()
        if self.by_distance and lowest < -1:  # 1 + score / 2^n, squared n times, then exceeds 1
            score, end = (lowest - 1) * 2**self.n, -(2 ** (self.n + 1))
            raise UserError(
                f"a score of this prompt is {score:.1f}, outside the range {end} to 0 of "
                f"{self.config.attn_type}; train with a larger n, e.g. python train.py "
                f"config/train_he.py --attn_type=GKpoly-{self.n + 1}"
            )


def decay_rows(model: GPT) -> ndarray:
    """The constants of attn_decay, float64 (block_size, block_size): row i has those by which token
    i weighs the tokens up to itself; 1 without a decay. Only this function knows their source."""
    T, reach = model.config.block_size, model.transformer.h[0].attn.reach()
    ones = torch.ones(1, 1, T, T, dtype=torch.float64)
    return decay.apply(ones, None, reach)[0, 0].detach().numpy()


class Activation(NamedTuple):
    """The MLP's activation of u, as factor f + linear u + constant. Its only products of two
    unknowns are f = (scale u)^2 for mlp_act=quad and f = ((scale u)^2 + shift)^2 for quartic; the
    rest folds into the matrices around."""

    factor: float
    linear: float
    constant: float = 0.0
    scale: float = 1.0
    shift: float | None = None

    @classmethod
    def of(cls, act: Quad | Quartic) -> "Activation":
        if isinstance(act, Quad):
            return cls(act.a.item(), act.b.item())
        sign, root = math.copysign(1, act.FOURTH), math.sqrt(abs(act.FOURTH))
        shift = sign * act.SQUARE / (2 * root)  # sign (root u^2 + shift)^2 has these two terms
        return cls(sign, act.LINEAR, -sign * shift**2, math.sqrt(root), shift)


def check(config: GPTConfig) -> None:
    """Raise UserError, with the reason and what to train instead, unless `fold` can fold it."""
    can_be_folded = {
        "n_layer": [1],  # deeper: each layer but the last needs all T queries, see --plan
        "n_head": [1],
        "norm": ["fixed"],
        "mlp_act": ["quad", "quartic"],
        "position": ["learned"],
        "qk_norm": [False],
        "attn_normalize": [0],
    }
    for key, allowed in can_be_folded.items():
        if (value := getattr(config, key)) not in allowed:
            needed = " or ".join(map(str, allowed))
            raise UserError(f"{key}={value} can't be encrypted, only {key}={needed}; {TRAIN}")
    if config.attn_type not in SQUARINGS and squarings(config.attn_type) is None:
        allowed = "GKpoly-n, PA_square and PA_identity"
        raise UserError(f"{config.attn_type} is no polynomial, as {allowed} are; {TRAIN}")


def fold(model: GPT) -> Polynomial:
    """The polynomial that `model` computes, with adapters folded in. Raises UserError if the model
    has parts that are no polynomial, or more than one layer or head."""
    config = model.config
    check(config)
    state = fold_lora(model.state_dict(), config)
    C, hs = config.n_embd, config.n_embd // config.n_head
    mean = np.full(C, 1 / C)  # mean @ x is 1, so that outer(b, mean) @ x is b

    def weight(name: str) -> ndarray:
        return state[name].double().numpy()

    def bias(name: str, size: int) -> ndarray:
        return weight(f"{name}.bias") if f"{name}.bias" in state else np.zeros(size)

    def norm(name: str) -> tuple[ndarray, ndarray]:
        """A (C, C) and a (C,) of norm(x) = A x + a."""
        scale = weight(f"{name}.weight") / weight(f"{name}.std")
        return scale[:, None] * (np.eye(C) - 1 / C), bias(name, C)

    block = "transformer.h.0"
    A, a = norm(f"{block}.ln_1")
    Wqkv, bqkv = weight(f"{block}.attn.c_attn.weight"), bias(f"{block}.attn.c_attn", 3 * C)
    Wq, Wk, Wv = np.split(Wqkv @ A + np.outer(Wqkv @ a + bqkv, mean), 3)
    variant, n = parse_attn_type(config.attn_type), squarings(config.attn_type)
    if variant.score == "distance":  # 1 - |d|^2 = 1 + score / 2^n, with score = -c/2 |q - k|^2
        root = np.sqrt(hs**-0.5 / 2 ** (n + 1))
        query, key = root * Wq, -root * Wk
    else:  # d . x_t = c q . k_t / divisor^(1 / 2^n)
        n = SQUARINGS[config.attn_type]
        L = config.pa_length if config.attn_decay == "none" else 1
        divisor = float(L) ** config.pa_length_power
        query, key = hs**-0.5 * divisor ** -(0.5**n) * Wk.T @ Wq, np.zeros((C, C))

    # After attention, y = x + value z + bo
    Wo, bo = weight(f"{block}.attn.c_proj.weight"), bias(f"{block}.attn.c_proj", C)
    value = Wo @ Wv
    A, a = norm(f"{block}.ln_2")
    Wf, bf = weight(f"{block}.mlp.c_fc.weight"), bias(f"{block}.mlp.c_fc", 4 * C)
    hidden_last = Wf @ A + np.outer(Wf @ (A @ bo + a) + bf, mean)
    hidden_sum = Wf @ A @ value
    act = Activation.of(model.transformer.h[0].mlp.act)

    A, a = norm("transformer.ln_f")
    head = weight("lm_head.weight")
    Wp, bp = weight(f"{block}.mlp.c_proj.weight"), bias(f"{block}.mlp.c_proj", C)
    constant = bo + bp + act.constant * Wp.sum(1)
    hidden = head @ A @ Wp
    logits_last = head @ A + np.outer(head @ (A @ constant + a), mean)

    center = lambda rows: rows - rows.mean(1, keepdims=True)
    return Polynomial(
        config,
        tokens=center(weight("transformer.wte.weight")),
        positions=center(weight("transformer.wpe.weight")) + 1,
        decay=decay_rows(model),
        n=n,
        shift=act.shift,
        query=query,
        key=key,
        hidden_last=act.scale * hidden_last,
        hidden_sum=act.scale * hidden_sum,
        logits_last=logits_last + act.linear * hidden @ hidden_last,
        logits_sum=head @ A @ value + act.linear * hidden @ hidden_sum,
        logits_hidden=act.factor * hidden,
    )
