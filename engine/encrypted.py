"""
The next token of an encrypted prompt: a client with the secret key, a server without it, and the
ciphertexts (CKKS, by SEAL through TenSEAL) between them. polynomial.py has the formula.

Packing. A ciphertext is a vector of ring / 2 complex numbers, its slots. Sums and products act
slot by slot; a rotation moves all slots by a constant. Channel c of token t is in slot c T + t, and
the C T slots repeat until the ciphertext is full, so that a rotation by a multiple of T turns the
channels in a circle. The imaginary part carries a second vector:

    tokens   x_t + i x                    x, that of the last token, is the same in all t
    values   w_t x_t, one channel later   even channels in the real part, odd ones in the imaginary

Re((W - i V)(x_t + i x)) = W x_t + V x: one product computes both. Likewise `values` lets a sum over
t, by rotations that don't stop at the end of a channel, end right in every slot: a window of 2 T
slots from slot c T + t on holds all of channel c + 1, and of its neighbours zeros.

Levels. Each product ends with a rescaling, which uses up one prime of the modulus: `Scheme` lists
the n + 6 of them, or n + 7 for mlp_act=quartic. Ciphertexts never go up again, as there is no
bootstrapping.
"""

import json
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray

from configurator import UserError
from engine.polynomial import Polynomial

HEADROOM = 12  # bits of the last modulus above the scale: logits stay below 2^11
MIN_SCALE = 28  # bits; with fewer, the noise of encryption drowns the logits
MAX_SCALE = 46  # bits; primes have at most 60, and the largest is HEADROOM + 2 larger than these
BLOCKS = 4  # of C channels, side by side in t = 0..3: the MLP's hidden layer


def import_seal():
    """SEAL's own interface. Raises UserError if TenSEAL is not installed."""
    try:
        from tenseal import sealapi
    except ImportError as error:
        raise UserError(
            "TenSEAL is not installed; install it with  pip install 'tenseal>=0.3.17', or see the "
            "costs without it by --plan"
        ) from error
    return sealapi


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Packing:
    """What client and server agree on, none of it secret."""

    ring: int  # degree of the ring; a ciphertext has half as many slots
    C: int  # channels, a power of two
    T: int  # tokens, a power of two; shorter prompts are filled up
    n: int  # squarings of a score
    hidden: int  # squarings in the hidden layer: 1 for mlp_act=quad, 2 for quartic

    @classmethod
    def of(cls, polynomial: Polynomial, ring: int) -> "Packing":
        """Raises UserError if the model does not fit into the slots."""
        config = polynomial.config
        C = power_of_two(max(config.n_embd, BLOCKS))
        T = power_of_two(max(config.block_size, BLOCKS))
        if config.vocab_size > C:
            raise UserError(
                f"vocab_size={config.vocab_size} is more than n_embd={config.n_embd}, and the "
                "logits would not fit; train on characters, or with a larger n_embd"
            )
        if C * T > ring // 2:
            raise UserError(
                f"n_embd x block_size = {C} x {T} is more than the {ring // 2} slots of "
                f"ring={ring}; pass --ring={2 * C * T}, or train a smaller model"
            )
        return cls(ring, C, T, polynomial.n, hidden=1 if polynomial.shift is None else 2)

    @property
    def depth(self) -> int:
        """Products in a row: see Scheme."""
        return self.n + 5 + self.hidden

    @property
    def baby(self) -> int:
        """Diagonals of a matrix whose rotations are shared; between such groups is a giant step."""
        return 1 << (self.C.bit_length() - 1) // 2

    @property
    def steps(self) -> list[int]:
        """The rotations of which the server has keys: by 1, 2, 4, ..., C T / 2 slots."""
        return [1 << i for i in range((self.C * self.T).bit_length() - 1)]

    def slots(self, x: ndarray) -> ndarray:
        """x (T or fewer, C or fewer) as the first C T slots; the rest is zero."""
        padded = np.zeros((self.C, self.T), x.dtype)
        padded[: x.shape[1], : x.shape[0]] = x.T
        return padded.reshape(-1)

    def diagonals(self, W: ndarray) -> list[ndarray | None]:
        """The C diagonals of W as slots, each turned back by the giant step that will follow; None
        for zeros. W (k, C or fewer, C or fewer) holds the matrices of tokens 0..k-1, and the others
        have none; k = 1 is one matrix for all tokens."""
        C, T = self.C, self.T
        full = np.zeros((len(W), C, C), W.dtype)
        full[:, : W.shape[1], : W.shape[2]] = W
        c = np.arange(C)
        result = []
        for d in range(C):
            diagonal = full[:, c, (c + d) % C]  # (k, C)
            by_token = np.repeat(diagonal, T, axis=0) if len(W) == 1 else diagonal
            turned = np.roll(self.slots(by_token), d // self.baby * self.baby * T)
            result.append(turned if turned.any() else None)
        return result


class Scheme:
    """CKKS with the parameters of a packing, without any key. Level l is that of a ciphertext after
    l rescalings, and scale[l] the factor by which its numbers are multiplied:

        level 0        query x + key x_t
              1        its square, or the product with x_t
              2..n+1   n squarings
              n+2      the product with w_t x_t
              n+3      hidden_last x + hidden_sum z
              n+4      its square, plus a shift for mlp_act=quartic
              n+5      the square of that, for quartic only
              last     the logits, which end up at level `depth`

    `secure=False` leaves out the check for 128 bits of security, for the sake of fast tests."""

    def __init__(self, packing: Packing, secure: bool = True):
        self.seal = seal = import_seal()
        self.packing, depth, ring = packing, packing.depth, packing.ring
        security = seal.SEC_LEVEL_TYPE.TC128
        limit = seal.CoeffModulus.MaxBitCount(ring, security) if secure else 60 * (depth + 2)
        bits = (limit - 2 * HEADROOM - 2) // (depth + 2)
        if bits < MIN_SCALE:
            raise UserError(
                f"{depth} levels, of GKpoly-{packing.n}, leave {bits} bits to each in ring={ring}, "
                f"and it takes {MIN_SCALE}; pass --ring={2 * ring}, or train with a smaller n"
            )
        self.bits = bits = min(bits, MAX_SCALE)
        self.modulus = [bits + HEADROOM, *[bits] * depth, bits + HEADROOM + 2]  # of these many bits
        parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(ring)
        parameters.set_coeff_modulus(seal.CoeffModulus.Create(ring, self.modulus))
        self.context = seal.SEALContext(parameters, True, security if secure else security.NONE)
        assert self.context.parameters_set(), self.context.parameters_error_message()
        self.encoder = seal.CKKSEncoder(self.context)

        self.ids, self.primes = [], []  # of each level; the prime is what a rescaling divides by
        data = self.context.first_context_data()
        while data is not None:
            self.ids.append(data.parms_id())
            self.primes.append(data.parms().coeff_modulus()[-1].value())
            data = data.next_context_data()
        self.scale = [2.0**bits]
        by_weights = (0, packing.n + 3, depth - 1)  # whose scale can be chosen to restore it
        for level in range(depth):
            squared = self.scale[level] ** 2 / self.primes[level]
            self.scale.append(2.0**bits if level in by_weights else squared)

    def encode(self, values: ndarray, level: int, scale: float):
        """A plaintext with `values` (C T,), real or complex, at `level`."""
        plaintext = self.seal.Plaintext()
        slots = np.tile(values, self.packing.ring // 2 // len(values)).tolist()
        self.encoder.encode(slots, self.ids[level], scale, plaintext)
        return plaintext

    def load(self, kind: str, path: Path):
        """A Ciphertext, GaloisKeys or whatever `kind` of SEAL's objects the file holds. Raises
        UserError for a file that is absent, damaged, or of other parameters."""
        loaded = getattr(self.seal, kind)()
        try:
            loaded.load(self.context, str(path))
        except (RuntimeError, ValueError) as error:
            problem = f"{path} can't be read as {kind} of this model ({error})"
            role = "serve" if path.suffix == ".logits" else "encrypt"
            raise UserError(f"{problem}; write it again with --role={role}") from error
        return loaded


class Client:
    """Holds the secret key: makes the server's keys, encrypts prompts, decrypts logits. Of the
    model, it knows the embeddings and the decay."""

    def __init__(self, scheme: Scheme, secret: Path | None = None):
        """With the secret key in the file `secret`, or else with a new one."""
        seal = scheme.seal
        self.scheme, context = scheme, scheme.context
        if secret:
            self.secret = scheme.load("SecretKey", secret)
            self.generator = seal.KeyGenerator(context, self.secret)
        else:
            self.generator = seal.KeyGenerator(context)
            self.secret = self.generator.secret_key()
        self.encryptor = seal.Encryptor(context, self.secret)
        self.decryptor = seal.Decryptor(context, self.secret)

    def write_keys(self, folder: Path) -> None:
        """Write what lets the server compute, but not decrypt: the packing, keys to rotate and
        conjugate, and one to bring products back to the size of their factors."""
        packing = self.scheme.packing
        (folder / "packing.json").write_text(json.dumps(asdict(packing)))
        # SEAL names a rotation by the Galois element 3^step; the last one is conjugation
        elements = [pow(3, step, 2 * packing.ring) for step in packing.steps]
        elements.append(2 * packing.ring - 1)
        self.generator.create_galois_keys(elements).save(str(folder / "galois.key"))
        self.generator.create_relin_keys().save(str(folder / "relin.key"))

    def encrypt(self, x: ndarray, w: ndarray, folder: Path, name: str) -> None:
        """Write the prompt with embeddings x (T, C) and decay w (T,) as NAME.tokens and
        NAME.values. Places after the end repeat the last token, and their w is 0: so no score is
        out of range, nothing is added to z, and the server can't see the length."""
        packing, scale = self.scheme.packing, self.scheme.scale
        filled = np.concatenate([x, np.tile(x[-1], (packing.T - len(x), 1))])
        tokens = packing.slots(filled + 1j * x[-1])
        weighted = packing.slots(w[:, None] * x).reshape(packing.C, packing.T).astype(complex)
        weighted[1::2] *= 1j
        values = np.roll(weighted, 1, axis=0).reshape(-1)
        # The server needs the values only after the scores: fewer primes, fewer bytes
        for kind, slots, level in (("tokens", tokens, 0), ("values", values, packing.n + 2)):
            plaintext = self.scheme.encode(slots, level, scale[level])
            ciphertext = self.encryptor.encrypt_symmetric(plaintext)
            ciphertext.save(str(folder / f"{name}.{kind}"))

    def decrypt(self, path: Path, V: int) -> ndarray:
        """The logits (V,) in the ciphertext of that file."""
        plaintext = self.scheme.seal.Plaintext()
        self.decryptor.decrypt(self.scheme.load("Ciphertext", path), plaintext)
        slots = np.array(self.scheme.encoder.decode_double(plaintext))
        return slots[: V * self.scheme.packing.T : self.scheme.packing.T]


class Server:
    """Holds the weights and the client's public keys, and computes on ciphertexts. `count` says how
    often it did what; `progress` is called after each product with a plaintext."""

    def __init__(self, scheme: Scheme, folder: Path, progress: Callable[[], object] = lambda: None):
        self.scheme, self.packing, self.progress = scheme, scheme.packing, progress
        self.evaluator = scheme.seal.Evaluator(scheme.context)
        self.galois = scheme.load("GaloisKeys", folder / "galois.key")
        self.relin = scheme.load("RelinKeys", folder / "relin.key")
        self.count = Counter()

    # ---- Arithmetic: every method but shift_by returns a new ciphertext

    def new(self):
        return self.scheme.seal.Ciphertext()

    def level(self, a) -> int:
        return self.packing.depth + 1 - a.coeff_modulus_size()

    def down(self, a, level: int):
        result = self.new()
        self.evaluator.mod_switch_to(a, self.scheme.ids[level], result)
        return result

    def rescale(self, a):
        result = self.new()
        self.evaluator.rescale_to_next(a, result)
        result.scale = self.scheme.scale[self.level(result)]  # but for rounding, it was that
        return result

    def rotate(self, a, step: int):
        self.count["rotations"] += 1
        result = self.new()
        self.evaluator.rotate_vector(a, step, self.galois, result)
        return result

    def add(self, a, b):
        result = self.new()
        self.evaluator.add(a, b, result)
        return result

    def shift_by(self, number: float, a) -> None:
        """Add a number to every slot of a, in place."""
        slots = np.full(self.packing.C * self.packing.T, number)
        self.evaluator.add_plain_inplace(a, self.scheme.encode(slots, self.level(a), a.scale))

    def twice_real(self, a):
        """a and its complex conjugate: twice the real part."""
        self.count["rotations"] += 1
        conjugate = self.new()
        self.evaluator.complex_conjugate(a, self.galois, conjugate)
        return self.add(a, conjugate)

    def multiply(self, a, b):
        self.count["ciphertext products"] += 1
        product = self.new()
        self.evaluator.multiply(a, b, product)
        self.evaluator.relinearize_inplace(product, self.relin)
        return self.rescale(product)

    def square(self, a):
        self.count["ciphertext products"] += 1
        product = self.new()
        self.evaluator.square(a, product)
        self.evaluator.relinearize_inplace(product, self.relin)
        return self.rescale(product)

    def window(self, a, first: int, end: int):
        """Sums over windows: of a and its rotations by multiples of `first` below `end`."""
        while first < end:
            a = self.add(a, self.rotate(a, first))
            first *= 2
        return a

    # ---- Products with matrices

    def encode(self, W: ndarray, level: int, scale: float | None = None) -> list:
        """The plaintexts of W's diagonals, see Packing, for a factor at `level` of that scale."""
        scale = scale or self.scheme.scale[level]
        target = self.scheme.scale[level + 1] * self.scheme.primes[level] / scale
        encode = lambda diagonal: self.scheme.encode(diagonal, level, target)
        return [None if d is None else encode(d) for d in self.packing.diagonals(W)]

    def babies(self, a) -> list:
        """a with its channels turned by 0, 1, ..., baby - 1."""
        result = [a]
        while len(result) < self.packing.baby:
            result.append(self.rotate(result[-1], self.packing.T))
        return result

    def matmul(self, *pairs: tuple[list, list]):
        """The sum of W x over pairs (babies of x, encoded W)."""
        total = None
        for first in reversed(range(0, self.packing.C, self.packing.baby)):
            if total is not None:
                total = self.rotate(total, self.packing.baby * self.packing.T)
            for babies, W in pairs:
                for a, diagonal in zip(babies, W[first : first + len(babies)], strict=True):
                    if diagonal is not None:
                        product = self.new()
                        self.evaluator.multiply_plain(a, diagonal, product)
                        self.count["plain products"] += 1
                        self.progress()
                        product.scale = total.scale if total else product.scale
                        total = self.add(total, product) if total else product
        return self.rescale(total)

    # ---- The model

    def encode_weights(self, polynomial: Polynomial) -> None:
        """Turn the model's matrices into plaintexts, once for all prompts."""
        p, n, C = polynomial, self.packing.n, polynomial.config.n_embd
        fresh, end = self.scheme.scale[0], self.packing.depth - 1
        self.by_distance, self.shift = p.by_distance, p.shift
        # Factors of 1/2 make up for twice_real, which a dot product meets in both of its factors
        half = 1 / 2 if p.by_distance else 1 / 4
        self.score = self.encode((p.key - 1j * p.query)[None] * half, 0)
        of_last = lambda W: -1j * W  # x is the imaginary part of `tokens`
        of_sum = lambda W: np.where(np.arange(C) % 2 == 0, W, -1j * W)  # see `values`
        blocks = lambda W: W.reshape(BLOCKS, C, C) / 2
        at_0 = lambda W: np.concatenate([W[None], np.zeros((BLOCKS - 1, *W.shape))])
        self.hidden_last = self.encode(of_last(blocks(p.hidden_last)), n + 3, fresh)
        self.hidden_sum = self.encode(of_sum(blocks(p.hidden_sum)), n + 3)
        by_block = p.logits_hidden.reshape(-1, BLOCKS, C).transpose(1, 0, 2)  # (4, V, C)
        self.logits_last = self.encode(at_0(of_last(p.logits_last)), end, fresh)
        self.logits_sum = self.encode(at_0(of_sum(p.logits_sum)), end, self.scheme.scale[n + 3])
        self.logits_hidden = self.encode(by_block, end)

    def run(
        self, folder: Path, name: str, out: Path,
        stage: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> None:  # fmt: skip
        """Read NAME.tokens and NAME.values from `folder`; write the encrypted logits to `out`."""
        tokens = self.scheme.load("Ciphertext", folder / f"{name}.tokens")
        values = self.scheme.load("Ciphertext", folder / f"{name}.values")
        n, C, T, end = self.packing.n, self.packing.C, self.packing.T, self.packing.depth - 1
        with stage("scores"):
            babies = self.babies(tokens)
            d = self.twice_real(self.matmul((babies, self.score)))
            if self.by_distance:
                a = self.window(self.square(d), T, C * T)  # |d_t|^2 in every channel
                self.evaluator.negate_inplace(a)
                self.shift_by(1.0, a)
            else:
                x = self.down(self.twice_real(tokens), 1)
                a = self.window(self.multiply(d, x), T, C * T)
        with stage("weights"):
            for _ in range(n):
                a = self.square(a)
        with stage("sum over tokens"):
            z = self.window(self.multiply(a, values), 1, 2 * T)
        with stage("MLP"):
            last = [self.down(a, n + 3) for a in babies]
            sums = self.babies(z)
            h = self.matmul((last, self.hidden_last), (sums, self.hidden_sum))
            h = self.square(self.twice_real(h))
            if self.shift is not None:
                self.shift_by(self.shift, h)
                h = self.square(h)
        with stage("logits"):
            last, sums = ([self.down(a, end) for a in babies] for babies in (last, sums))
            logits = self.matmul(
                (last, self.logits_last),
                (sums, self.logits_sum),
                (self.babies(h), self.logits_hidden),
            )
            logits = self.window(logits, 1, BLOCKS)
        logits.save(str(out))
