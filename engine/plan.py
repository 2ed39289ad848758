"""
What encrypted inference costs, counted without any encryption, for models from one layer to GPT-2.

A model of one layer and one head is counted exactly, as engine/encrypted.py computes it. Deeper
models, which that module can't compute, are estimated with the ASSUMPTIONS below.
"""

import math
from dataclasses import astuple, dataclass, replace

from engine.encrypted import BLOCKS, Packing, power_of_two
from engine.files import text_table

RING = 65536  # of models that need bootstrapping
LEVELS = 11  # that such a ring leaves after each bootstrap, with 128 bits of security

ASSUMPTIONS = f"""Assumptions
- norm=fixed whatever the model has, and mlp_act=quad unless it has quartic; a public decay costs
  nothing.
- One layer and one head: the next token of one prompt, as encrypt.py computes it.
- Otherwise: ring {RING}, all T queries in each layer, and the client, which holds the embeddings,
  computes the logits from the last hidden state. Channel c of token t is in slot c T + t. Scores
  are computed for one distance between query and key after the other, and are not packed more
  densely. A bootstrap restores {LEVELS} levels; they are placed where the fewest ciphertexts are
  alive. n counts in depth and in squarings of the scores, and not in rotations or plain products.
- exp in GK and SM is that of GKpoly-8. SM divides by 12 Goldschmidt steps, and has no maximum.
- Normalised is attn_normalize=8: five products for 1 + r + ... + r^7 and r^8, and one each with A v
  and the mean.
- gelu, sigmoid, silu, tanh and softplus are polynomials of degree 31: 5 levels, 11 products.
- relu is x (1 + sign x) / 2, with a sign of degree 15 x 15 x 27: 14 levels, 27 products
  (eprint.iacr.org/2020/834)."""


@dataclass(frozen=True)
class Shape:
    """The size of a model."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    mlp_act: str = "quad"

    @property
    def hidden(self) -> int:
        """Squarings in the hidden layer."""
        return 2 if self.mlp_act == "quartic" else 1

    def __str__(self) -> str:
        return f"L{self.n_layer} H{self.n_head} C{self.n_embd} T{self.block_size}"


GPT2 = Shape(12, 12, 768, 1024)


@dataclass(frozen=True)
class Function:
    """The function from scores to weights, as a polynomial: its depth, its products of ciphertexts
    for each ciphertext of scores, and the depth and products of a division after A v."""

    depth: int
    products: int
    division_depth: int = 0
    division_products: int = 0


@dataclass(frozen=True)
class Cost:
    depth: int
    ciphertext_products: int
    plain_products: int
    rotations: int
    bootstraps: int = 0


SMOOTH, RELU = Function(5, 11), Function(14, 27)
FUNCTIONS = {
    "SM": Function(8, 8, division_depth=13, division_products=25),
    "GK": Function(8, 8),
    **{f"GKpoly-{n}": Function(n, n) for n in (2, 3, 4, 6, 8)},
    "GKpoly-6,normalised": Function(6, 6, division_depth=4, division_products=7),
    **dict.fromkeys("PA_gelu PA_sigmoid PA_silu PA_tanh PA_softplus".split(), SMOOTH),
    "PA_relu": RELU,
    "PA_relu-square": Function(RELU.depth + 1, RELU.products + 1),
    "PA_square": Function(1, 1),
    "PA_identity": Function(0, 0),
}


def next_token(shape: Shape, attn_type: str) -> Cost:
    """The cost of one prompt for a model of one layer and one head, by engine/encrypted.py."""
    f = FUNCTIONS[attn_type]
    C, T = (power_of_two(max(size, BLOCKS)) for size in (shape.n_embd, shape.block_size))
    baby = Packing(RING, C, T, f.depth, shape.hidden).baby
    matmul = baby - 1 + C // baby - 1  # rotations; three of them
    conjugations = 2 if attn_type.startswith("GK") else 3  # a dot product takes x_t by itself
    windows = math.log2(C) + math.log2(2 * T) + math.log2(BLOCKS)
    return Cost(
        depth=f.depth + f.division_depth + 5 + shape.hidden,
        ciphertext_products=f.products + f.division_products + 2 + shape.hidden,
        plain_products=6 * C,
        rotations=3 * matmul + conjugations + round(windows),
    )


def all_tokens(shape: Shape, attn_type: str) -> Cost:
    """An estimate of the cost of a whole context for a model of any size, with bootstrapping."""
    f, L, T = FUNCTIONS[attn_type], shape.n_layer, power_of_two(shape.block_size)
    slots = RING // 2
    channels = min(shape.n_embd, max(1, slots // T))  # in one ciphertext
    m = math.ceil(shape.n_embd / channels)  # ciphertexts of all tokens
    head = shape.n_embd // shape.n_head  # channels
    scores = math.ceil(m * channels / max(channels, head))  # ciphertexts, for one distance
    baby = 1 << power_of_two(channels).bit_length() // 2
    babies, giants = m * (baby - 1), m * (math.ceil(channels / baby) - 1)

    # Matrices: q, k, v; from x and z to the hidden layer; from z and the hidden layer to the output
    n_matrices, n_inputs, n_outputs = 3 + 2 * BLOCKS + 1 + BLOCKS, 3 + BLOCKS, 3 + BLOCKS + 1
    window = round(math.log2(power_of_two(min(channels, head))))
    division = f.division_products * m
    products = T * (2 * m + f.products * scores) + division + shape.hidden * BLOCKS * m
    rotations = n_inputs * babies + n_outputs * giants + T * (2 * m + window * scores)
    depth = f.depth + f.division_depth + 5 + shape.hidden
    # Ciphertexts alive after each level of a block, the last of which is the output
    alive = [4 * m] + (f.depth + 1) * [2 * m + scores * T] + [2 * m]
    alive += f.division_depth * [2 * m] + (1 + shape.hidden) * [(2 + BLOCKS) * m] + [m]
    assert len(alive) == depth
    return Cost(
        depth=L * depth,
        ciphertext_products=L * products,
        plain_products=L * (n_matrices * m * shape.n_embd + T * m),  # masks of the causal order
        rotations=L * rotations,
        bootstraps=fewest_bootstraps(L * alive),
    )


def fewest_bootstraps(alive: list[int]) -> int:
    """The fewest bootstraps for a computation after whose levels so many ciphertexts are `alive`,
    if no more than LEVELS levels lie between two bootstraps of all that are."""
    cost = [0]  # cost[i]: of the first i levels, with a bootstrap after the last of them
    for i, n in enumerate([*alive[:-1], 0], start=1):
        cost.append(n + min(cost[max(0, i - LEVELS) : i]))
    return cost[-1]


def table(shape: Shape) -> str:
    """The costs of every attention for a model of this size, as text."""
    count = next_token if shape.n_layer == shape.n_head == 1 else all_tokens
    same_cost = {}
    for name in FUNCTIONS:
        same_cost.setdefault(astuple(count(shape, name)), []).append(name)
    header = ["attn_type", "depth", "ct products", "plain products", "rotations", "bootstraps"]
    cells = [
        [" ".join(names), *(f"{n:,}" for n in cost)] for cost, names in sorted(same_cost.items())
    ]
    return text_table([header, *cells])


def plan(shape: Shape) -> str:
    """The tables of a model, of the same with two and four layers, and of GPT-2, as text."""
    deeper = [replace(shape, n_layer=n) for n in (2, 4) if n > shape.n_layer]
    shapes = [shape, *deeper, replace(GPT2, mlp_act=shape.mlp_act)]
    tables = [f"{s}\n{table(s)}" for s in dict.fromkeys(shapes)]
    return "\n\n".join([ASSUMPTIONS, *tables])
