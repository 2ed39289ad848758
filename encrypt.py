"""
The next token of a prompt that the server can't read: CKKS, 128 bits of security, by TenSEAL.

    python encrypt.py --out_dir=OUT --start="The object"          # client, server and report
    python encrypt.py --out_dir=OUT --prompts=prompts.txt --n=20  # a prompt per line
    python encrypt.py --out_dir=OUT --plan                        # costs up to GPT-2, no TenSEAL
    python encrypt.py config/train_he.py --n_layer=2 --plan       # of a model not trained yet

Client and server as processes of their own; DIR/server is all that the server gets:

    python encrypt.py --out_dir=OUT --save=DIR --role=encrypt --start="The object"
    python encrypt.py --out_dir=OUT --save=DIR --role=serve
    python encrypt.py --out_dir=OUT --save=DIR --role=decrypt

The model must be a polynomial: `python train.py config/train_he.py` trains one.
"""

import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import configurator
from configurator import UserError
from engine import start
from engine.encrypted import Client, Packing, Scheme, Server
from engine.files import text_table
from engine.loading import encode_prompt, load_trained
from engine.plan import Shape, plan
from engine.polynomial import fold
from engine.progress import tqdm
from engine.runtime import resident
from train import Config as TrainConfig


@dataclass
class Config:
    out_dir: str = "out-he"  # Folder of the run
    checkpoint: str = "ckpt.pt"  # ckpt.pt: the last state of the run; best.pt: the best one
    data_dir: str | None = None  # Data sets, for nanoGPT's checkpoints; auto: data/
    start: str = "The object"  # Prompt, of at most block_size tokens
    prompts: str | None = None  # File with a prompt per line, in place of start
    n: int = 20  # Prompts to take from that file at most
    ring: Literal["16384", "32768"] = "16384"  # 32768 is slower and more exact
    save: str | None = None  # Folder for keys and ciphertexts; auto: a temporary one
    role: Literal["all", "encrypt", "serve", "decrypt"] = "all"  # What this process does
    plan: bool = False  # Print what encryption would cost, up to GPT-2, and encrypt nothing


@dataclass
class PlanConfig(TrainConfig):
    plan: bool = True  # With a config file of train.py: print what encryption would cost


class Stages:
    """Seconds and peak memory of each stage, where Linux tells the latter."""

    def __init__(self):
        self.rows = {}

    @contextmanager
    def __call__(self, name: str):
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        started = time.perf_counter()
        yield
        seconds, peak = self.rows.get(name, (0.0, 0.0))
        with suppress(OSError):
            peak = max(peak, resident("VmHWM"))
        self.rows[name] = seconds + time.perf_counter() - started, peak


def read_prompts(config: Config) -> list[str]:
    if config.prompts is None:
        return [config.start]
    try:
        lines = Path(config.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={config.prompts} can't be read ({error})") from error
    if not (lines := [line for line in lines if line][: config.n]):
        raise UserError(f"prompts={config.prompts} has no prompt; write one per line")
    return lines


def encrypt(config: Config, tokenizer, polynomial, root: Path, stage) -> list[np.ndarray]:
    """The client's first part: new keys, and every prompt as two ciphertexts. Returns the embedded
    prompts."""
    embedded = []
    for prompt in read_prompts(config):
        ids = np.asarray(encode_prompt(tokenizer, prompt) if prompt else [], dtype=np.int64)
        embedded.append(polynomial.embed(ids))
        polynomial.check_range(embedded[-1])
    scheme = Scheme(Packing.of(polynomial, int(config.ring)))
    for folder in ("client", "server", "answers"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for old in (root / folder).glob("[0-9]*.*"):  # of other keys
            old.unlink()
    with stage("keys"):
        client = Client(scheme)
        client.write_keys(root / "server")
        secret = root / "client" / "secret.key"
        os.close(os.open(secret, os.O_CREAT | os.O_WRONLY, 0o600))
        client.secret.save(str(secret))
    with stage("encrypt"):
        for i, x in enumerate(embedded):
            client.encrypt(x, polynomial.weights(len(x)), root / "server", f"{i:03d}")
    return embedded


def read_packing(polynomial, root: Path) -> Packing:
    """What was agreed on. Raises UserError if nothing was, or if it is of another model."""
    try:
        packing = Packing(**json.loads((root / "server" / "packing.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{root} holds no encrypted prompt; run --role=encrypt first") from error
    if packing != Packing.of(polynomial, packing.ring):
        raise UserError(f"{root} was written for another model; run --role=encrypt again")
    return packing


def serve(polynomial, root: Path, stage) -> Server:
    """The server: reads root/server, which holds no secret, and writes root/answers."""
    scheme = Scheme(read_packing(polynomial, root))
    names = sorted(path.stem for path in (root / "server").glob("*.tokens"))
    with tqdm(total=6 * scheme.packing.C * len(names), leave=False, disable=None) as bar:
        with stage("read keys"):
            server = Server(scheme, root / "server", bar.update)
        with stage("encode weights"):
            server.encode_weights(polynomial)
        for name in names:
            server.count.clear()
            server.run(root / "server", name, root / "answers" / f"{name}.logits", stage)
    return server


def decrypt(polynomial, root: Path, stage) -> list[np.ndarray]:
    """The client's second part: the logits of every prompt."""
    scheme = Scheme(read_packing(polynomial, root))
    client = Client(scheme, root / "client" / "secret.key")
    if not (paths := sorted((root / "answers").glob("*.logits"))):
        raise UserError(f"{root} has no answer yet; run --role=serve first")
    with stage("decrypt"):
        return [client.decrypt(path, polynomial.config.vocab_size) for path in paths]


def top(logits: np.ndarray, tokenizer, k: int = 5) -> str:
    best = np.argsort(-logits[: tokenizer.vocab_size])[:k]
    return "  ".join(f"{tokenizer.decode([i])!r} {logits[i]:.4f}" for i in best)


def megabytes(paths) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 1e6:.2f} MB"


def report(polynomial, tokenizer, embedded, logits, server, root: Path) -> None:
    """Plain against decrypted, and the costs of the last prompt."""
    errors, differing = [], 0
    for x, decrypted in zip(embedded, logits, strict=True):
        plain = polynomial.logits(x)
        errors.append(np.abs(plain - decrypted).max())
        second, best = np.sort(plain)[-2:]
        if plain.argmax() != decrypted.argmax():
            differing += 1
            print(f"the best token differs; the two best are {best - second:.2g} apart")
        print(f"plain      {top(plain, tokenizer)}\ndecrypted  {top(decrypted, tokenizer)}")
    scheme, folder = server.scheme, root / "server"
    print(f"largest logit error {max(errors):.1e}; {differing} of {len(logits)} best tokens differ")
    ring = f"ring {scheme.packing.ring}, modulus of {sum(scheme.modulus)} bits"
    print(f"{ring}, depth {scheme.packing.depth}, scale 2^{scheme.bits}")
    print("per prompt: " + ", ".join(f"{n} {what}" for what, n in server.count.items()))
    up = megabytes([*folder.glob("000.*")])
    down = megabytes([root / "answers" / "000.logits"])
    print(f"keys {megabytes(folder.glob('*.key'))} once; a prompt {up} up, {down} down")


def print_plan(config: object) -> None:
    """The costs of a model, whose sizes are those of `config`, up to GPT-2."""
    print(plan(Shape(*(getattr(config, key) for key in Shape.__dataclass_fields__))))


def main() -> None:
    argv = sys.argv[1:]
    file = next((arg for arg in argv if not arg.startswith("-")), None)
    if file and "--plan" in argv:
        config = PlanConfig(**configurator.parse(PlanConfig, argv))
        start.check(config)
        return print_plan(config)
    if file:
        repair = f"train it with  python train.py {file},  then pass --out_dir=OUT in its place"
        raise UserError(f"{file}: only --plan reads a config file, and needs no training; {repair}")
    config = Config(**configurator.parse(Config, argv))
    if config.role != "all" and config.save is None and not config.plan:
        raise UserError(f"--role={config.role} needs a folder for keys; add --save=DIR")
    trained = load_trained(config.out_dir, config.checkpoint, "resume", config.data_dir)
    if config.plan:
        return print_plan(trained.model.config)
    polynomial, tokenizer, stage = fold(trained.model), trained.tokenizer(), Stages()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(config.save or temporary)
        if config.role in ("all", "encrypt"):
            embedded = encrypt(config, tokenizer, polynomial, root, stage)
        if config.role in ("all", "serve"):
            server = serve(polynomial, root, stage)
        if config.role in ("all", "decrypt"):
            logits = decrypt(polynomial, root, stage)
        if config.role == "all":
            report(polynomial, tokenizer, embedded, logits, server, root)
        elif config.role == "decrypt":
            print("\n".join(top(row, tokenizer) for row in logits))
    rows = [(name, f"{s:.2f}", f"{peak:.0f}") for name, (s, peak) in stage.rows.items()]
    print(text_table([("stage", "seconds, all prompts", "peak MiB"), *rows]))


if __name__ == "__main__":
    configurator.run(main)
