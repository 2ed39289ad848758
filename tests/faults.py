"""
Fault injection: what can happen to a run, done to real processes of train.py, with counts.

    python tests/faults.py            # make faults: every row, about six minutes on 2 cores
    python tests/faults.py sigkill    # rows whose name begins so

A row is a function that yields (case, None or what went wrong). The reference of a digest is a run
of the same arguments that nobody disturbed.
"""

import contextlib
import hashlib
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # torchrun sets 1 where none is set

import torch  # noqa: E402
from conftest import write_dataset  # noqa: E402

from configurator import UserError  # noqa: E402
from engine import checkpoint as ckpt  # noqa: E402

TRAIN = [sys.executable, str(ROOT / "train.py")]
MODEL = "--n_layer=2 --n_head=2 --n_embd=48 --block_size=32 --batch_size=4 --attn_type=GK".split()
MODEL += "--dropout=0.1 --learning_rate=3e-3 --warmup_iters=5 --device=cpu --dtype=float32".split()
WORK = Path(tempfile.mkdtemp(prefix="faults-"))
BASE = [*MODEL, "--dataset=abc", f"--data_dir={WORK / 'data'}"]

# ----------------------------------------------------------------------------
# Processes


class Process:
    """One command line, whose output goes to files; its working directory is WORK."""

    def __init__(self, *command: str, **kwargs):
        self.out, self.err = (tempfile.TemporaryFile("w+", dir=WORK) for _ in range(2))
        self.process = subprocess.Popen(
            [str(c) for c in command], cwd=WORK, stdout=self.out, stderr=self.err, **kwargs
        )

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def running(self) -> bool:
        return self.process.poll() is None

    def end(self, timeout: float = 120) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read())
            file.close()
        return code, *texts


def train(*args: str) -> Process:
    return Process(*TRAIN, *BASE, *args)


def torchrun(*args: str, agent: tuple[str, ...] = ("--standalone", "--nproc_per_node=2")):
    return Process(*(sys.executable, "-m", "torch.distributed.run", *agent, TRAIN[1], *BASE, *args))


def finish(*args: str) -> str:
    """Run to the end; the stdout."""
    code, out, err = train(*args).end()
    if code != 0:
        raise AssertionError(f"exit code {code} of {args}: {err[-500:]}")
    return out


def finish_two_ranks(*args: str) -> None:
    code, _, err = torchrun(*args).end()
    if code != 0:
        raise AssertionError(f"exit code {code} of {args}: {err[-500:]}")


def wait_for(condition, process: Process, timeout: float = 60) -> bool:
    """True when condition() is; False if the process ends, or time is up, before."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return True
        if not process.running():
            return False
        time.sleep(0.001)
    return False


def last_step(out_dir: str) -> int:
    """Of the last whole row in log.csv; -1 without any."""
    try:
        lines = (WORK / out_dir / "log.csv").read_text().splitlines()
        return int(lines[-1].split(",")[0]) if len(lines) > 1 else -1
    except (OSError, ValueError):
        return -1


def stepped(out_dir: str, after: int, modulo_5: int | None = None) -> bool:
    """Whether the log is beyond step `after`, and at a step that leaves `modulo_5`."""
    step = last_step(out_dir)
    return step > after and modulo_5 in (None, step % 5)


def digest(out_dir: str) -> str:
    """SHA-256 of what a run ends with: weights, optimizer state, step and best loss."""
    checkpoint = ckpt.load(WORK / out_dir / ckpt.LATEST)
    sha256 = hashlib.sha256()
    sha256.update(repr((checkpoint["iter_num"], checkpoint["best_val_loss"])).encode())
    states = checkpoint["optimizer"]["state"].values()
    for t in [*checkpoint["model"].values(), *(s[k] for s in states for k in sorted(s))]:
        sha256.update(t.contiguous().numpy().tobytes())
    return sha256.hexdigest()


def same_digest(a: str, b: str) -> str | None:
    return None if digest(a) == digest(b) else f"the digests of {a} and {b} differ"


def nearly_same(a: str, b: str) -> str | None:
    """Runs on different numbers of ranks add in another order; AdamW makes the most of that."""
    a, b = (ckpt.load(WORK / run / ckpt.LATEST) for run in (a, b))
    gap = abs(a["best_val_loss"] - b["best_val_loss"])
    same = a["iter_num"] == b["iter_num"] and gap < 1e-5
    return None if same else f"steps {a['iter_num']}, {b['iter_num']}; losses {gap:.1e} apart"


def one_line(code: int, err: str, expected: str = "") -> str | None:
    """What is wrong with the answer to a mistake: it should be exit code 2 and one line."""
    lines = err.strip().splitlines()
    if code != 2 or len(lines) != 1 or not re.search(expected, err):
        return f"exit code {code}, {len(lines)} lines: {err[-300:]}"
    return None


def in_pairs(function, cases) -> list:
    """function(case) of each, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, cases))


# ----------------------------------------------------------------------------
# The rows


def sigkill():
    """SIGKILL at 20 moments, half of them inside a save"""
    args = ["--max_iters=700", "--eval_interval=1", "--eval_iters=1"]
    args += ["--gradient_accumulation_steps=2"]
    finish(*args, "--out_dir=kill-reference")
    temporary = WORK / "kill" / "ckpt.pt.tmp"
    draw, inside, more = random.Random(0), 0, []
    for i in range(20):
        process = train(*args, "--out_dir=kill", *more)
        wait_for(partial(saved_since, "kill", inode("kill")), process)
        time.sleep(draw.uniform(0, 0.3))
        if inside < (i + 1) // 2:  # catch it while the temporary file is there
            for _ in range(50):
                wait_for(temporary.exists, process, 5)
                process.kill(signal.SIGSTOP)
                time.sleep(0.002)
                if temporary.exists():
                    break
                process.kill(signal.SIGCONT)
        in_save = temporary.exists()
        process.kill(signal.SIGKILL)
        code, out, err = process.end()
        inside += in_save
        resumed = not more or "going on" in out or "step" in out
        yield f"kill {i}", None if code == -9 and resumed else f"exit code {code}: {err[-300:]}"
        more = ["--init_from=resume"]
    finish(*args, "--out_dir=kill", "--init_from=resume")
    yield "end", same_digest("kill", "kill-reference")
    yield "inside a save", None if inside >= 10 else f"only {inside} kills were inside a save"


def inode(out_dir: str) -> int | None:
    """Of ckpt.pt: another one after each save."""
    try:
        return os.stat(WORK / out_dir / ckpt.LATEST).st_ino
    except OSError:
        return None


def saved_since(out_dir: str, before: int | None) -> bool:
    return inode(out_dir) not in (None, before)


def interrupts():
    """SIGTERM and SIGINT in a step, an evaluation, a save"""
    args = ["--max_iters=60", "--eval_interval=5", "--eval_iters=30", "--log_interval=1"]
    args += ["--gradient_accumulation_steps=12"]
    finish(*args, "--out_dir=stop-reference")
    more = []
    temporary = WORK / "stop" / "ckpt.pt.tmp"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        for place in ("step", "evaluation", "save"):
            process = train(*args, "--out_dir=stop", *more)
            wait_for(partial(stepped, "stop", max(last_step("stop"), 0)), process)
            if place == "save":
                wait_for(temporary.exists, process)
            else:  # rows are written before the next step, and an evaluation's after it
                wait_for(partial(stepped, "stop", -1, 1 if place == "step" else 4), process)
                time.sleep(0.01 if place == "step" else 0.13)
            before = last_step("stop")
            process.kill(number)
            got, out, err = process.end()
            checkpoint = ckpt.load(WORK / "stop" / ckpt.LATEST)
            step, name = checkpoint["iter_num"], f"{signal.Signals(number).name} in {place}"
            if got != code or err or "go on with" not in out:
                yield name, f"exit code {got}: {err[-300:]}"
            elif step > before + 1 + (place == "evaluation"):
                yield name, f"signal after step {before}, saved after step {step}"
            elif place == "evaluation" and checkpoint["evaluated"] != step - 1:
                yield name, f"step {step - 1} was not being evaluated when the signal came"
            else:
                yield name, None
            more = ["--init_from=resume"]
    finish(*args, "--out_dir=stop", *more)
    yield "end", same_digest("stop", "stop-reference")


def second_signal():
    """A second SIGTERM ends a run at once, unless both come together"""
    args = ["--max_iters=9", "--gradient_accumulation_steps=20000", "--eval_iters=1"]
    process = train(*args, "--out_dir=twice")
    wait_for(lambda: last_step("twice") == 0, process)
    process.kill(signal.SIGTERM)
    time.sleep(0.1)
    process.kill(signal.SIGTERM)  # as schedulers and torchrun do
    time.sleep(2.5)
    was_running, started = process.running(), time.monotonic()
    process.kill(signal.SIGTERM)
    code, _, _ = process.end()
    if not was_running or code != 143 or time.monotonic() - started > 5:
        yield "twice", f"exit code {code}, running before the second: {was_running}"
    else:
        yield "twice", None


def disk_full():
    """No room on the disk (RLIMIT_FSIZE), for a while and to the end"""
    args = ["--max_iters=400", "--eval_interval=20", "--eval_iters=2"]
    args += ["--gradient_accumulation_steps=2"]
    finish(*args, "--out_dir=full-reference")
    process = train(*args, "--out_dir=full")
    wait_for(lambda: inode("full"), process)
    _, hard = resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (60_000, hard))
    time.sleep(0.1)
    process_step = last_step("full")
    wait_for(lambda: last_step("full") > process_step + 45, process)
    try:
        ckpt.load(WORK / "full" / ckpt.LATEST)
        yield "old checkpoint", None
    except UserError as error:
        yield "old checkpoint", str(error)
    resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    code, out, err = process.end()
    told = len(re.findall(r"checkpoint of step \d+ not saved \(File too large\)", out))
    ok = code == 0 and told >= 1 and not err
    yield "goes on", None if ok else f"exit code {code}, told {told} times: {err[-300:]}"
    yield "end", same_digest("full", "full-reference")

    process = train(*args, "--out_dir=full2")
    wait_for(lambda: last_step("full2") > 25, process)
    resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (60_000, hard))
    code, out, err = process.end()
    last_save = out.partition("best val loss")[0].splitlines()[-1]
    ok = code == 1 and not err and "not saved" in last_save
    yield "last save fails", None if ok else f"exit code {code}: {out[-300:]} {err[-300:]}"
    ckpt.load(WORK / "full2" / ckpt.LATEST)
    with open("/dev/full", "w") as full:
        process = subprocess.run([*TRAIN, *BASE, *args, "--out_dir=full3"], stdout=full, cwd=WORK)
    yield "stdout", same_digest("full3", "full-reference")


def damage():
    """A checkpoint cut short (20 times), with a flipped bit (20 times)"""
    args = ["--max_iters=4", "--eval_interval=2", "--eval_iters=1"]
    finish(*args, "--out_dir=damage", "--gradient_accumulation_steps=1")
    whole = (WORK / "damage" / ckpt.LATEST).read_bytes()
    draw = random.Random(0)
    cases = []
    for i in range(40):
        data = bytearray(whole)
        if i < 20:
            del data[draw.randrange(len(data)) :]
        else:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        folder = WORK / f"damage-{i}"
        folder.mkdir()
        (folder / ckpt.LATEST).write_bytes(data)
        shutil.copy(WORK / "damage" / ckpt.PREVIOUS, folder)
        cases.append(folder.name)

    def check(name):
        process = train(f"--out_dir={name}", "--init_from=resume", "--eval_only", "--eval_iters=1")
        code, out, err = process.end()
        told = re.search(r"(damaged|more than plain data).*going on from .*previous.pt", out)
        return None if code == 0 and told and "val loss" in out else f"{code}: {out} {err[-300:]}"

    yield from zip(cases, in_pairs(check, cases), strict=True)


def bad_data():
    """Token files: empty, odd, short, id too large, zero tail, changed"""
    text = (WORK / "data" / "abc" / "train.bin").read_bytes()

    def variant(name: str, data: bytes, meta=True) -> list[str]:
        folder = WORK / "data" / name
        shutil.copytree(WORK / "data" / "abc", folder)
        (folder / "train.bin").write_bytes(data)
        if not meta:
            (folder / "meta.json").unlink()
        return [f"--dataset={name}", "--eval_iters=1", f"--out_dir=out-{name}"]

    meta = {"itos": dict(enumerate("abcdefgh ")), "stoi": {}, "vocab_size": 40}
    meta["itos"] = {i: chr(97 + i) for i in range(40)}
    cases = {
        "empty": (variant("empty", b""), "damaged: 0 bytes"),
        "odd": (variant("odd", text[:-1]), "damaged"),
        "short": (variant("short", text[:20], meta=False), "too short for block_size"),
        "large": (variant("large", b"\xff\xff" + text[2:]), "token id 65535"),
        "zeros": (variant("zeros", text + bytes(4096), meta=False), "ends in zeros"),
        "swapped": (variant("swapped", text[2:] + text[:2]), "SHA-256 differs"),
    }
    (WORK / "data" / "zeros" / "meta.pkl").write_bytes(pickle.dumps(meta))
    (WORK / "data" / "short" / "meta.pkl").write_bytes(pickle.dumps(meta))

    def check(case):
        args, expected = case
        code, _, err = train(*args, "--max_iters=2").end()
        return one_line(code, err, expected)

    yield from zip(cases, in_pairs(check, cases.values()), strict=True)
    args = variant("changed", text)
    args += ["--max_iters=2", "--gradient_accumulation_steps=1"]
    meta_file = WORK / "data" / "changed" / "meta.json"
    meta_file.write_text(re.sub(r', "\w+_sha256": "\w+"', "", meta_file.read_text()))
    finish(*args)
    (WORK / "data" / "changed" / "train.bin").write_bytes(text[2:] + text[:2])
    code, _, err = train(*args, "--init_from=resume").end()
    yield "changed", one_line(code, err, "train.bin of data set changed is not what")


def not_finite():
    """NaN or infinity in loss, gradient, weights; GKpoly out of range"""
    (WORK / "bad_gradient.py").write_text(
        "import torch, model\n"
        "class Bad(torch.autograd.Function):\n"
        "    forward = staticmethod(lambda ctx, x: x + 0)\n"
        "    backward = staticmethod(lambda ctx, g: g * float('nan'))\n"
        "def f(x):\n"
        "    f.calls += x.requires_grad\n"
        "    return Bad.apply(x) if f.calls > 9 else x + 0\n"
        "f.calls = 0\n"
        "model.POINTWISE['PA_bad'] = model.Pointwise('dot', f, by_length=True)\n"
        "attn_type = 'PA_bad'\n"
        "attn_impl = 'reference'\n"
    )
    # A run whose weights are damaged by something that kept the file whole, e.g. the memory
    common = ["--max_iters=9", "--eval_interval=1", "--eval_iters=1", "--warmup_iters=0"]
    common += ["--gradient_accumulation_steps=1", "--grad_clip=0"]
    finish(*common, "--out_dir=nan-weights", "--max_iters=4", "--lr_decay_iters=9")
    checkpoint = ckpt.load(WORK / "nan-weights" / ckpt.LATEST)
    checkpoint["model"]["transformer.h.1.mlp.c_fc.weight"][0, 0] = float("nan")
    ckpt.save(checkpoint, WORK / "nan-weights")
    poly = ["--attn_type=GKpoly-4", "--learning_rate=30"]
    cases = {
        "loss": (["--attn_type=SM", "--learning_rate=1e30"], "was not done"),
        "gradient": (["bad_gradient.py"], "began in the gradient of attn of layer 1"),
        "weights": (["--init_from=resume", "--lr_decay_iters=9"], "weights transformer.h.1.mlp"),
        "GKpoly": (poly, r"began in attn of layer \d; x fell to .*GKpoly-4 needs -32"),
    }

    def check(case):
        name, (args, expected) = case
        folder = f"nan-{name}"
        code, _, err = train(*common, *args, f"--out_dir={folder}").end()
        if problem := one_line(code, err, expected):
            return problem
        saved = ckpt.PREVIOUS if name == "weights" else ckpt.LATEST
        if not (WORK / folder / saved).exists() and "no checkpoint yet" in err:
            return None
        weights = torch.load(WORK / folder / saved, weights_only=True)["model"].values()
        return None if all(w.isfinite().all() for w in weights) else "the checkpoint is not finite"

    yield from zip(cases, in_pairs(check, cases.items()), strict=True)
    two = ["--gradient_accumulation_steps=2", "--eval_iters=2"]
    process = torchrun(*common, *two, "--learning_rate=1e30", "--out_dir=nan-ranks")
    code, _, err = process.end(60)
    ended = code == 1 and err.count("error: step") == 1
    yield "two ranks", None if ended else f"exit code {code}: {err[-500:]}"


def malicious():
    """ckpt.pt, meta.pkl, data set name, attn_type, config value that want to run code"""
    canary = WORK / "canary"

    class Malicious:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    finish("--max_iters=1", "--eval_iters=1", "--out_dir=evil", "--gradient_accumulation_steps=1")
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    loaded = ckpt.load(WORK / "evil" / ckpt.LATEST)
    folders = {}
    for name, change in {
        "pickle": {"model": Malicious()},
        "config value": {"config": {**loaded["config"], "learning_rate": code}},
        "config data set": {"config": {**loaded["config"], "dataset": "../../data/abc"}},
        "config key": {"config": {**loaded["config"], "dataset": f"$(touch {canary})"}},
        "attn_type": {"model_args": {**loaded["model_args"], "attn_type": code}},
    }.items():
        folders[name] = WORK / f"evil-{len(folders)}"
        folders[name].mkdir()
        torch.save({**loaded, **change}, folders[name] / ckpt.LATEST)
    shutil.copytree(WORK / "data" / "abc", WORK / "data" / "evil")
    (WORK / "data" / "evil" / "meta.json").unlink()
    (WORK / "data" / "evil" / "meta.pkl").write_bytes(pickle.dumps(Malicious()))
    plain = [a for a in BASE if not a.startswith(("--dataset", "--learning_rate"))]
    cases = {
        name: [*TRAIN, *plain, "--init_from=resume", f"--out_dir={folder}"]
        for name, folder in folders.items()
    }
    cases |= {
        "meta.pkl": [*TRAIN, *BASE, "--dataset=evil"],
        "data set": [*TRAIN, *BASE, f"--dataset=$(touch {canary})"],
        "data set path": [*TRAIN, *BASE, "--dataset=../data/abc"],
        "attention": [*TRAIN, *BASE, f"--attn_type={code}"],
        "value": [*TRAIN, *BASE, f"--max_iters={code}"],
        "sample": [sys.executable, ROOT / "sample.py", f"--out_dir={folders['pickle']}"],
    }

    def check(command):
        code, _, err = Process(*command).end()
        return "the canary is there" if canary.exists() else one_line(code, err)

    yield from zip(cases, in_pairs(check, cases.values()), strict=True)


def workers(out_dir: str) -> list[int]:
    """Process ids of the ranks of a run, rank 0 first."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, StopIteration):
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes().split(b"\0")
            ours = os.readlink(folder / "cwd") == str(WORK)
            if ours and f"--out_dir={out_dir}".encode() in command.split(b"\0"):
                found[next(int(v[5:]) for v in environment if v.startswith(b"RANK="))] = folder
    return [int(found[rank].name) for rank in sorted(found)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


DISTRIBUTED = ["--max_iters=60", "--eval_interval=5", "--eval_iters=4"]
DISTRIBUTED += ["--gradient_accumulation_steps=8", "--log_interval=1"]


def killed_rank():
    """Rank 1 of 2 killed under --max-restarts"""
    args = DISTRIBUTED
    finish_two_ranks(*args, "--out_dir=ranks-reference")
    agent = ("--standalone", "--nproc_per_node=2", "--max-restarts=2")
    process = torchrun(*args, "--out_dir=ranks", agent=agent)
    wait_for(lambda: last_step("ranks") >= 12, process)
    pids = workers("ranks")
    os.kill(pids[1], signal.SIGKILL)
    code, out, err = process.end()
    resumed = "restarted: going on with ranks" in out
    yield "restart", None if code == 0 and resumed else f"exit code {code}: {out} {err[-800:]}"
    yield "end", same_digest("ranks", "ranks-reference")
    yield "orphans", None if not workers("ranks") else "processes are left"


def world_sizes():
    """World size 1 -> 2 -> 1; SIGTERM to torchrun"""
    args = [*DISTRIBUTED, "--lr_decay_iters=60"]
    finish(*args, "--out_dir=world-reference")
    finish(*args, "--out_dir=world", "--max_iters=20")
    process = torchrun(*args, "--out_dir=world", "--max_iters=40", "--init_from=resume")
    code, _, err = process.end()
    yield "1 -> 2", None if code == 0 else f"exit code {code}: {err[-500:]}"
    finish(*args, "--out_dir=world", "--init_from=resume")
    yield "2 -> 1", nearly_same("world", "world-reference")
    process = torchrun(*args, "--out_dir=term")
    wait_for(lambda: last_step("term") >= 3, process)
    process.kill(signal.SIGTERM)
    process.end()
    step = ckpt.load(WORK / "term" / ckpt.LATEST)["iter_num"]
    yield "SIGTERM", None if step <= last_step("term") + 1 else f"saved at step {step}"
    finish(*args, "--out_dir=term", "--init_from=resume")
    yield "SIGTERM, then 1 rank", nearly_same("term", "world-reference")


def sharded():
    """Rank 1 of 2 killed under --shard=full; sharded -> 1 rank"""
    args = [*DISTRIBUTED, "--shard=full", "--checkpoint_activations"]
    finish_two_ranks(*args, "--out_dir=shard-reference")
    agent = ("--standalone", "--nproc_per_node=2", "--max-restarts=2")
    process = torchrun(*args, "--out_dir=shard", agent=agent)
    wait_for(lambda: last_step("shard") >= 12, process)
    os.kill(workers("shard")[1], signal.SIGKILL)
    code, out, err = process.end()
    resumed = "restarted: going on with shard" in out
    yield "restart", None if code == 0 and resumed else f"exit code {code}: {out} {err[-800:]}"
    yield "end", same_digest("shard", "shard-reference")
    process = torchrun(*args, "--out_dir=shard-term")
    wait_for(lambda: last_step("shard-term") >= 12, process)
    process.kill(signal.SIGTERM)
    process.end()
    step = ckpt.load(WORK / "shard-term" / ckpt.LATEST)["iter_num"]
    yield "SIGTERM", None if 12 <= step < 60 else f"saved at step {step}"
    finish(*DISTRIBUTED, "--out_dir=shard-term", "--init_from=resume")
    yield "SIGTERM, then 1 rank", nearly_same("shard-term", "shard-reference")
    yield "orphans", None if not workers("shard") else "processes are left"


def two_agents():
    """Two torchrun agents on localhost, one rank killed"""
    args = DISTRIBUTED
    if not (WORK / "ranks-reference").exists():
        finish_two_ranks(*args, "--out_dir=ranks-reference")
    agent = "--nnodes=2 --nproc_per_node=1 --max-restarts=2 --rdzv-backend=c10d --rdzv-id=faults"
    agent = (*agent.split(), f"--rdzv-endpoint=localhost:{free_port()}", "--local-addr=localhost")
    agents = [torchrun(*args, "--out_dir=agents", agent=agent) for _ in range(2)]
    wait_for(lambda: last_step("agents") >= 12, agents[0])
    os.kill(workers("agents")[1], signal.SIGKILL)
    ends = [process.end(200) for process in agents]
    codes = [code for code, _, _ in ends]
    told = "restarted: going on with agents" in ends[0][1] + ends[1][1]
    yield "exit codes", None if codes == [0, 0] and told else f"{codes}: {ends[0][2][-800:]}"
    yield "end", same_digest("agents", "ranks-reference")
    yield "orphans", None if not workers("agents") else "processes are left"


def fuzz():
    """1000 command lines and config files that hypothesis made up"""
    code, out, err = Process(sys.executable, __file__, "--fuzz", WORK).end(300)
    counts = re.search(r"(\d+) cases, (\d+) accepted", out)
    ok = code == 0 and counts and int(counts[1]) >= 1000
    yield from [("case", None)] * (int(counts[1]) - 1 if ok else 0)
    yield "all", None if ok else f"exit code {code}: {out[-500:]} {err[-1500:]}"


def fuzz_process(work: Path) -> None:
    """The process behind fuzz(): it imports train.py's modules once and forks for each case."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    import train as train_module

    os.chdir(work)
    keys = list(train_module.Config.__dataclass_fields__)
    sizes = set("n_layer n_head n_embd block_size batch_size eval_iters max_iters".split())
    sizes |= {"gradient_accumulation_steps"}
    unsafe = {"out_dir", "save_dir", "data_dir", "init_from", "wandb_log", "compile", "backend"}
    words = st.sampled_from("True false none auto 1 0 -1 2 1e3 0.5 nan inf SM GK GKpoly-2".split())
    small = st.integers(-2, 3).map(str)
    anything = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
    known = st.sampled_from(sorted(set(keys) - unsafe))
    value = {key: small | words if key in sizes else small | words | anything for key in keys}
    unknown = st.text("abcdefgh_", min_size=1, max_size=9)
    override = known.flatmap(lambda k: value[k].map(lambda v: f"--{k}={v}"))
    override |= st.tuples(unknown, words).map(lambda kv: f"--{kv[0]}={kv[1]}")
    override |= anything.filter(lambda text: text not in ("-h", "--help"))
    line = known.flatmap(lambda k: value[k].map(lambda v: f"{k} = {v!r}"))
    line |= st.tuples(unknown, words).map(lambda kv: f"{kv[0]} = {kv[1]!r}") | anything
    counts = {"cases": 0, "accepted": 0}
    base = [*MODEL, "--n_layer=1", "--n_embd=8", "--block_size=8", "--max_iters=1"]
    base += ["--gradient_accumulation_steps=1", "--eval_iters=1", f"--data_dir={work / 'data'}"]
    base += ["--dataset=abc", "--out_dir=fuzz"]

    @settings(
        max_examples=1000,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(override, max_size=3), st.lists(line, max_size=3))
    def check(overrides, lines):
        argv = [*base, *overrides]
        if lines:
            Path("fuzz.py").write_text("\n".join(lines), encoding="utf-8", newline="")
            argv.insert(len(base), "fuzz.py")
        shutil.rmtree("fuzz", ignore_errors=True)
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                signal.alarm(30)
                for number, name in ((1, "fuzz.out"), (2, "fuzz.err")):
                    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                sys.argv = [TRAIN[1], *argv]
                runpy.run_path(TRAIN[1], run_name="__main__")
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        err = Path("fuzz.err").read_text(encoding="utf-8", errors="replace")
        counts["cases"] += 1
        counts["accepted"] += code == 0
        given_keys = [re.match(r"--([^=]+)", a) for a in overrides]
        odd = [m[1] for m in given_keys if m and m[1] not in keys]
        assert code in (0, 2), f"{argv}: exit code {code}: {err}"
        assert code == 2 or not odd, f"{argv}: unknown keys were accepted"
        assert "Traceback" not in err, f"{argv}: {err}"
        assert code == 0 or len(err.strip("\n").split("\n")) == 1, f"{argv}: {err}"

    check()
    print(f"{counts['cases']} cases, {counts['accepted']} accepted")


ROWS = [
    sigkill,
    interrupts,
    second_signal,
    disk_full,
    damage,
    bad_data,
    not_finite,
    malicious,
    killed_rank,
    world_sizes,
    sharded,
    two_agents,
    fuzz,
]


def main() -> int:
    text = "the cat sat on the mat, and the dog sat too.\n" * 40
    write_dataset(WORK / "data" / "abc", text)
    add_sha256(WORK / "data" / "abc")
    failures = []
    print(f"{'fault':70} {'passed':>11} {'seconds':>8}")
    for row in ROWS:
        if len(sys.argv) > 1 and not row.__name__.startswith(tuple(sys.argv[1:])):
            continue
        started, results = time.monotonic(), []
        try:
            results += row()
        except Exception as error:
            results.append((row.__name__, f"{type(error).__name__}: {error}"))
        bad = [(case, problem) for case, problem in results if problem]
        failures += [f"{row.__name__}, {case}: {problem}" for case, problem in bad]
        score = f"{len(results) - len(bad)}/{len(results)}"
        print(f"{row.__doc__:70} {score:>11} {time.monotonic() - started:8.0f}", flush=True)
    print(*failures, sep="\n")
    shutil.rmtree(WORK, ignore_errors=True)
    return 1 if failures else 0


def add_sha256(folder: Path) -> None:
    """Let meta.json know the hashes, as prepare.py does."""
    meta = folder / "meta.json"
    text = meta.read_text().rstrip("}")
    for split in ("train", "val"):
        sha256 = hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()
        text += f', "{split}_sha256": "{sha256}"'
    meta.write_text(text + "}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fuzz"]:
        fuzz_process(Path(sys.argv[2]))
    else:
        sys.exit(main())
