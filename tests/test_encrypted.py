"""engine/encrypted.py: ciphertexts give the polynomial's logits, and only the client reads them."""

import sys

import numpy as np
import pytest
from test_polynomial import random_model

from configurator import UserError
from engine import encrypted
from engine.encrypted import Client, Packing, Scheme, Server
from engine.plan import Shape, next_token
from engine.polynomial import fold

pytest.importorskip("tenseal", reason="tenseal is not installed")


def answer(folder, T, **args):
    """The decrypted logits of T random tokens, those of the polynomial, and the server.
    INSECURE: a ring of 4096 is too small for a modulus of this size, and fast."""
    model = random_model(**args)
    polynomial = fold(model)
    scheme = Scheme(Packing.of(polynomial, 4096), secure=False)
    x = polynomial.embed(np.random.default_rng(T).integers(0, model.config.vocab_size, T))
    client = Client(scheme)
    client.write_keys(folder)
    client.encrypt(x, polynomial.weights(T), folder, "prompt")
    server = Server(scheme, folder)
    server.encode_weights(polynomial)
    server.run(folder, "prompt", folder / "logits")
    V = model.config.vocab_size
    return client.decrypt(folder / "logits", V), polynomial.logits(x), server


@pytest.mark.parametrize("T", [1, 5, 16])
@pytest.mark.parametrize(
    "attn_type, mlp_act",
    [
        ("GKpoly-2", "quad"),
        ("GKpoly-2", "quartic"),
        ("PA_square", "quartic"),
        ("PA_identity", "quad"),
    ],
)
def test_encrypted_logits_are_the_polynomials_and_the_plan_counts_them(
    tmp_path, attn_type, mlp_act, T
):
    found, expected, server = answer(tmp_path, T, attn_type=attn_type, mlp_act=mlp_act)
    assert np.abs(found - expected).max() <= 1e-7 and np.abs(expected).max() > 0.1
    cost = next_token(Shape(1, 1, 32, 16, mlp_act), attn_type)
    assert server.count["rotations"] == cost.rotations
    assert server.count["plain products"] == cost.plain_products
    assert server.count["ciphertext products"] == cost.ciphertext_products
    assert server.packing.depth == cost.depth


def test_sizes_that_are_no_powers_of_two_and_missing_biases(tmp_path):
    args = dict(n_embd=24, block_size=11, vocab_size=20, bias=False, attn_decay="none")
    found, expected, _ = answer(tmp_path, 7, **args)
    assert np.abs(found - expected).max() <= 1e-7


def test_the_server_gets_nothing_that_decrypts(tmp_path):
    found, expected, server = answer(tmp_path, 5)
    sent = {path.name for path in tmp_path.iterdir()} - {"logits"}
    names = {"packing.json", "galois.key", "relin.key", "prompt.tokens", "prompt.values"}
    assert sent == names
    for name in sent:  # none of these files is a secret key
        with pytest.raises(UserError):
            server.scheme.load("SecretKey", tmp_path / name)
    # A key of the server's own decrypts to noise
    stranger = Client(server.scheme).decrypt(tmp_path / "logits", 30)
    assert np.abs(stranger - expected).max() > 1e3 * np.abs(expected).max()
    assert not any(isinstance(v, server.scheme.seal.SecretKey) for v in vars(server).values())


def test_every_length_is_the_same_number_of_ciphertexts(tmp_path):
    for T in (1, 16):
        (tmp_path / f"{T}").mkdir()
        answer(tmp_path / f"{T}", T)
    names = [sorted(p.name for p in (tmp_path / T).iterdir()) for T in ("1", "16")]
    assert names[0] == names[1]


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="32 x 512 is more than the 8192 slots.*--ring=32768"):
        Packing.of(fold(random_model(block_size=512)), 16384)
    with pytest.raises(UserError, match="vocab_size=40 is more than n_embd=32"):
        Packing.of(fold(random_model(vocab_size=40)), 16384)
    with pytest.raises(UserError, match="14 levels, of GKpoly-8.*--ring=32768"):
        Scheme(Packing.of(fold(random_model(attn_type="GKpoly-8")), 16384))


def test_without_tenseal_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(UserError, match="pip install 'tenseal>=0.3.17'"):
        encrypted.import_seal()
