"""
What only a GPU can say, in one command of at most 25 minutes: are the kernels right, and how fast?

    python3 gpu_check.py                             # every stage; results in gpu_check.json
    python3 gpu_check.py --stages=attention,wide     # some stages; results of the others stay
    python3 gpu_check.py --rehearse                  # tiny shapes on a CPU: does this script work?

It needs torch, triton, numpy and pytest, but no network. Stages:

    machine     versions; the speed of a matrix product and of a copy
    compile     registers, spills and shared memory of the kernels, on all cores
    tests       pytest -m gpu, on all cores
    attention   forward and backward alone, beside torch's softmax kernels and what was expected
    step        a training step of GPT-2 124M, its loss computed whole or in chunks
    wide        one head of 768, by each implementation
    blocks      other block sizes for each kernel
    sampling    text drawn with torch.compile
    profile     where the time of a step goes; the table is in gpu_check.profile.txt
    resume      a run that is killed, resumed and evaluated

Each stage is a process of its own with a time limit, and each row is written when it is measured:
what fails or takes too long is recorded as such, and the rest goes on.
"""

import gc
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench
import configurator
from bench import BenchConfig
from configurator import UserError
from engine import flex, runtime
from engine.files import read_rows, text_table, whole_file
from kernels import choice, cross_entropy
from model import attention

ROOT = Path(__file__).parent


@dataclass
class Config:
    stages: str | None = None  # Stages to run, as in a,b,c; auto: all
    out: str = "gpu_check.json"  # File of the results
    rehearse: bool = False  # Tiny shapes on a CPU, kernels through Triton's interpreter
    stage: str | None = None  # Run this stage only, in this process and without a time limit


class Task(NamedTuple):
    """What a stage works with: the sizes of what is measured, the machine, the file of results."""

    matrix: int = 8192  # rows and columns of the matrix product
    copied: int = 2**30  # bytes
    cases: int | None = None  # kernels to compile, tests, block sizes; None: all
    repeats: int = 3  # of each measurement, of which the median counts
    tokens: int = 16384  # B T of attention alone, as in the published tables
    width: int = 2048  # nh hs
    head_sizes: tuple = (64, 128)
    lengths: tuple = (1024, 4096, 16384)
    batch_sizes: tuple = (12, 32, 64)
    wide: tuple = (8, 1, 1024, 768)  # B, nh, T, hs
    model: BenchConfig = BenchConfig(attn_type="GK", steps=5, max_new_tokens=200)
    run: str = "--n_layer=6 --n_head=6 --n_embd=384 --block_size=256"
    run_steps: int = 200
    text: tuple = ()  # for the run; Python's documentation if there is none
    rt: runtime.Runtime | None = None
    out: Path | None = None

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.rt.dtype)

    def shape(self, hs: int, T: int) -> tuple[int, int, int, int]:
        return self.tokens // T, self.width // hs, T, hs

    def seconds(self, run: Callable[[], object]) -> float:
        return median(bench.seconds_per_call(run, self.rt) for _ in range(self.repeats))


TINY = dict(n_layer=1, n_head=1, n_embd=16, block_size=32, vocab_size=11, batch_size=2)
REHEARSAL = Task(
    16, 64, 1, 1, 32, 32, (16,), (32,), (2,), (1, 1, 17, 272),
    BenchConfig(**TINY, attn_type="GK", warmup=0, steps=1, max_new_tokens=3),
    "--n_layer=1 --n_head=1 --n_embd=16 --block_size=32 --batch_size=4", 20,
    ("--input", str(ROOT / "README.md")),
)  # fmt: skip

# What a stage yields for each row: what it is about, and a function that measures the rest of it
Rows = Iterator[tuple[dict, Callable[[], dict]]]

# ---- The machine and the kernels --------------------------------------------


def machine(task: Task) -> Rows:
    for name in ("torch", "triton", "numpy"):
        yield {"what": name}, lambda name=name: {"value": import_module(name).__version__}
    device = f"{task.rt.device_name()}, {task.rt.precision}, Python {platform.python_version()}"
    yield {"what": "device"}, lambda: {"value": device}
    rate = lambda work, run: {"value": work / task.seconds(run)}
    a, b = torch.randn(2, task.matrix, task.matrix, device=task.rt.device).to(task.dtype)
    multiply = partial(rate, 2e-12 * task.matrix**3, lambda: a @ b)
    yield {"what": f"{task.matrix}^3 product, TFLOP/s"}, multiply
    old, new = torch.zeros(2, task.copied, device=task.rt.device, dtype=torch.uint8)
    copy = partial(rate, 2e-9 * task.copied, lambda: new.copy_(old))
    yield {"what": "copy, GB/s read and written"}, copy


def assemble(kernel: str, name: str, hs: int, decays: bool) -> dict:
    """What one kernel takes on Hopper, as launched for bfloat16."""
    from kernels import triton_kernels, tuning

    q, k, v = torch.empty(1, 1024, 3, 12, hs, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    with tuning.for_hopper():
        blocks = triton_kernels.blocks_for(kernel, q, decays)
        compiled = tuning.compile_kernel(kernel, blocks, q, k, v, name, decays)
        return tuning.usage(compiled)._asdict()


def compile(task: Task) -> Rows:
    from kernels.triton_kernels import FORMS, KERNELS

    names = (name.replace("-n", "-8") for name in FORMS)
    cases = [*product(KERNELS, names, (64, 128, 256), (False, True))]
    cases = [case for case in cases if case[0] != "dq_learned" or case[3]][: task.cases]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(assemble, *case): case for case in cases}
        for job in as_completed(jobs):
            keys = "kernel", "attention", "hs", "decay"
            yield dict(zip(keys, jobs[job], strict=True)), job.result


def pytest(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test(name: str) -> dict:
    done = pytest(name)
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    if done.returncode:
        raise RuntimeError(next((line for line in lines if line.startswith("E  ")), lines[-1]))
    return {"outcome": "skipped" if "SKIPPED" in done.stdout else "passed"}


def tests(task: Task) -> Rows:
    is_for_gpus = lambda text: "mark.gpu" in text or "on_gpu" in text
    files = [p for p in (ROOT / "tests").glob("test_*.py") if is_for_gpus(p.read_text())]
    collected = pytest("--collect-only", *files)
    names = [line for line in collected.stdout.splitlines() if "::" in line][: task.cases]
    if not names:
        raise RuntimeError(f"no test was found: {(collected.stdout + collected.stderr)[-200:]}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {pool.submit(test, name): name for name in names}
        for job in as_completed(jobs):
            yield {"test": jobs[job]}, job.result


# ---- Attention --------------------------------------------------------------

# On an H100, in bfloat16, TFLOP/s at T = 1k, 4k, 16k: cuDNN's are published, the rest estimates
EXPECTED = {
    ("SM cuDNN", 64): [(288, 348), (363, 417), (388, 433)],
    ("GK", 64): [(190, None), (290, None), (330, None)],
    ("GKpoly-8", 64): [(170, None), (230, None), (250, None)],
    ("PA_relu", 64): [(200, 150), (330, 220), (380, 250)],
}


def inputs(task: Task, shape: tuple) -> list[torch.Tensor]:
    """q, k, v and dy (B, nh, T, hs), laid out as in a model."""
    B, nh, T, hs = shape
    qkv = torch.randn(B, T, 3, nh, hs, device=task.rt.device, dtype=task.dtype)
    q, k, v = (t.detach().requires_grad_() for t in qkv.permute(2, 0, 3, 1, 4))
    return [q, k, v, torch.randn_like(qkv[:, :, 0]).transpose(1, 2)]


def passes(attend: Callable, task: Task, shape: tuple) -> tuple[Callable, Callable]:
    """Functions for the forward pass and for the backward pass alone."""
    q, k, v, dy = inputs(task, shape)
    y = attend(q, k, v)
    backward = partial(torch.autograd.grad, y, (q, k, v), dy, retain_graph=True)
    return partial(torch.no_grad()(attend), q, k, v), backward


def attention_speed(make: Callable[[], Callable], task: Task, shape: tuple) -> dict:
    """Milliseconds, and TFLOP/s, where the two passes count as two and five causal products."""
    forward, backward = map(task.seconds, passes(make(), task, shape))
    B, nh, T, hs = shape
    return {
        "forward ms": 1000 * forward,
        "backward ms": 1000 * backward,
        "forward TFLOP/s": 2e-12 * B * nh * T * T * hs / forward,
        "backward TFLOP/s": 5e-12 * B * nh * T * T * hs / backward,
    }


def softmax(backend: SDPBackend, q, k, v) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_alone(task: Task) -> Rows:
    from kernels.triton_kernels import triton_attention

    kinds = {"SM flash": lambda T: partial(softmax, SDPBackend.FLASH_ATTENTION)}
    for name in ("GK", "GKpoly-8", "PA_relu", "PA_gelu"):
        kinds[name] = lambda T, name=name: partial(triton_attention, name=name, divisor=1.0)
    wrap = torch.compile if task.rt.compile else lambda attend: attend
    for terms in (0, 8):
        make = partial(attention, "GK", attn_decay="fixed", attn_normalize=terms)
        kinds[f"GK decay, {terms} terms"] = lambda T, make=make: wrap(make(T))
    if task.rt.device_type == "cuda":
        kinds["SM cuDNN"] = lambda T: partial(softmax, SDPBackend.CUDNN_ATTENTION)
        for name in ("SM", "GK"):  # last, as they take longest to compile
            kinds[f"{name} Flex"] = lambda T, name=name: flex.attention(name, T, task.rt.device)
    for kind, hs, (i, T) in product(kinds, task.head_sizes, enumerate(task.lengths)):
        expected = EXPECTED.get((kind, hs), [(None, None)] * 3)[i]
        labels = {"attention": kind, "hs": hs, "T": T}
        labels |= zip(("forward expected", "backward expected"), expected, strict=True)
        make = partial(kinds[kind], T)
        yield labels, partial(attention_speed, make, task, task.shape(hs, T))


def wide_head(task: Task) -> Rows:
    _, _, T, hs = task.wide

    def make(name: str, impl: str, compiled: bool) -> Callable:
        attend = attention(name, T, impl=impl)
        if impl == "triton":  # not by its name, which a CPU refuses
            kernels = choice.triton_module(hs).attention(name, float(T))
            attend = lambda q, k, v: kernels(q, k, v, 0.0, None, False)
        return torch.compile(attend) if compiled else attend

    for name, impl in product(("GK", "PA_relu"), ("triton", "reference", "blockwise")):
        for compiled in (False, True) if task.rt.compile else (False,):
            labels = {"attention": name, "impl": impl, "compiled": compiled}
            measure = partial(attention_speed, partial(make, name, impl, compiled), task, task.wide)
            yield labels, measure


# Rows or columns of a program itself and of its loop, num_warps, num_stages, maxnreg
CANDIDATES = [
    (128, 64, 8, 3, None), (128, 64, 8, 3, 128), (128, 64, 8, 2, None), (128, 32, 8, 3, None),
    (64, 64, 4, 3, None), (64, 64, 4, 2, 168), (64, 32, 4, 3, None),
]  # fmt: skip


def block_sizes(task: Task) -> Rows:
    """GK's forward, or the whole backward, with other blocks for one of its kernels. Those that
    serialise or spill are left out: all are compiled first, side by side."""
    from kernels import triton_kernels as kernels
    from kernels import tuning

    table = kernels.BLOCKS_FLOAT32 if task.dtype == torch.float32 else kernels.BLOCKS
    attend = partial(kernels.triton_attention, name="GK", divisor=1.0)

    def measure(key: tuple, blocks: tuple, shape: tuple) -> dict:
        shipped, table[key] = table[key], blocks
        try:
            forward, backward = passes(attend, task, shape)
            return {"ms": 1000 * task.seconds(forward if key[0] == "forward" else backward)}
        finally:
            table[key] = shipped

    T = task.lengths[len(task.lengths) // 2]
    for kernel, hs in product(("forward", "dq", "dkv"), task.head_sizes):
        key, shape = (kernel, max(64, hs)), task.shape(hs, T)
        candidates = [kernels.Blocks(*blocks) for blocks in CANDIDATES[: task.cases]]
        if kernel == "dkv":  # whose programs have columns
            candidates = [b._replace(BLOCK_M=b.BLOCK_N, BLOCK_N=b.BLOCK_M) for b in candidates]
        if task.rt.device_type == "cuda":
            qkv = inputs(task, shape)[:3]
            candidates = tuning.worth_timing(kernel, candidates, *qkv, "GK")
        for blocks in (shipped := table[key], *candidates):
            labels = {"kernel": kernel, "hs": hs, "T": T, "shipped": blocks is shipped}
            yield labels | {"blocks": str(tuple(blocks))}, partial(measure, key, blocks, shape)


# ---- The model --------------------------------------------------------------


def training_step(task: Task) -> Rows:
    def measure(config: BenchConfig, chunks: bool) -> dict:
        cross_entropy.is_better = lambda n_logits, device: chunks
        (row,) = bench.step_rows([config], task.rt)
        return {key: row[key] for key in ("impl", "ms", "tokens_per_s", "mfu", "peak_MiB")}

    for B in task.batch_sizes:
        for attn_type, chunks in (("GK", False), ("GK", True), ("SM", False)):
            config = replace(task.model, batch_size=B, attn_type=attn_type)
            labels = {"attention": attn_type, "B": B, "loss": "in chunks" if chunks else "whole"}
            yield labels, partial(measure, config, chunks)


def sampling(task: Task) -> Rows:
    def measure(config: BenchConfig, n: int) -> dict:
        run = bench.sampling(config, task.rt, n_samples=n)
        run()
        return {"tokens/s": n * config.max_new_tokens / task.seconds(run)}

    for n, attn_type in product((1, 16), ("GK", "SM")):
        config = replace(task.model, attn_type=attn_type)
        yield {"attention": attn_type, "texts": n}, partial(measure, config, n)


def profile(task: Task) -> Rows:
    def measure() -> dict:
        text, path = io.StringIO(), task.out.with_suffix(".profile.txt")
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(text):
            bench.profile(replace(task.model, out_dir=folder), task.rt)
        path.write_text(text.getvalue())
        return {"file": str(path), "lines": text.getvalue().count("\n")}

    yield {"what": "costliest operations"}, measure


def resume(task: Task) -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        out, half = Path(folder) / "out", task.run_steps // 2
        keys = [f"--data_dir={folder}", f"--out_dir={out}", f"--device={task.rt.device}"]
        train = [*keys, *task.run.split(), "--dataset=pydocs", "--attn_type=GK", "--plot=False"]
        train += ["--gradient_accumulation_steps=1", "--warmup_iters=2", "--decay_lr=False"]
        train += [f"--eval_interval={half}", "--eval_iters=5"]

        def last_row() -> dict[str, str]:
            with suppress(OSError, IndexError):
                return read_rows(out / "log.csv")[-1]
            return {"step": "0", "val_loss": ""}

        def run(script: str, *args: str, kill_after: int = sys.maxsize) -> dict:
            """Run a script, and kill it after so many steps; what its log says in the end."""
            process = subprocess.Popen([sys.executable, ROOT / script, *args])
            while process.poll() is None and int(last_row()["step"]) <= kill_after:
                time.sleep(0.05)
            process.kill()
            if process.wait() not in ((0,) if kill_after == sys.maxsize else (-signal.SIGKILL,)):
                raise RuntimeError(f"{script} ended with exit code {process.returncode}")
            return {key: last_row()[key] for key in ("step", "val_loss")}

        def evaluate() -> dict:
            last = run("evaluate.py", *keys)
            row = json.loads((out / "eval.json").read_text())["results"]["pydocs"]
            return {"step": last["step"], "val_loss": f"{row['loss']:.5f}"}

        prepare = "data/pydocs/prepare.py", "--out", f"{folder}/pydocs", *task.text
        for what, measure in {
            "prepared": partial(run, *prepare),
            "killed": partial(run, "train.py", *train, "--max_iters=1000000", kill_after=half),
            "resumed": partial(
                run, "train.py", *train, f"--max_iters={2 * half}", "--init_from=resume"
            ),
            "evaluated": evaluate,
        }.items():
            yield {"what": what}, measure


# In the order of their worth, with seconds, 25 minutes in all. A stage may also take the time that
# those before it have left, up to 8 minutes.
STAGES = {
    "machine": (machine, 60),
    "compile": (compile, 150),
    "tests": (tests, 270),
    "attention": (attention_alone, 240),
    "step": (training_step, 270),
    "wide": (wide_head, 90),
    "blocks": (block_sizes, 150),
    "sampling": (sampling, 90),
    "profile": (profile, 60),
    "resume": (resume, 120),
}
LONGEST = 480

# ---- One stage, and all of them ---------------------------------------------


def record(out: Path, stage: str, **results: object) -> dict:
    """Join results of a stage with those in the file; returns all of this stage's. Raises UserError
    if the file holds something else."""
    try:
        stages = json.loads(out.read_text()) if out.exists() else {}
    except ValueError as error:
        raise UserError(f"{out} holds no results; move it, or pass another --out") from error
    stages[stage] = stages.get(stage, {}) | results
    with whole_file(out) as file:
        file.write(json.dumps(stages, indent=1) + "\n")
    return stages[stage]


def run_stage(name: str, out: Path, rehearse: bool) -> None:
    """Measure a stage in this process; each row is written when it is known."""
    rt = runtime.start("cpu" if rehearse else "cuda", None, compile=not rehearse)
    task, rows = (REHEARSAL if rehearse else Task())._replace(rt=rt, out=out), []
    if rehearse:
        bench.TURN = 0.0  # a single call
    for labels, measure in STAGES[name][0](task):
        try:
            rows.append(labels | measure())
        except Exception as error:
            message = (str(error).strip().splitlines() or [repr(error)])[0]
            rows.append(labels | {"error": message[:300]})
        record(out, name, rows=rows)
        if not rehearse:
            gc.collect()
            torch.compiler.reset()  # else a function is compiled a few times only
            torch.cuda.empty_cache()


def supervise(name: str, config: Config, limit: float) -> dict:
    """Run a stage in a process of its own for at most `limit` seconds; returns its results."""
    out, started, environment = Path(config.out), time.perf_counter(), dict(os.environ)
    record(out, name, status="running", error=None, rows=[])
    command = [sys.executable, __file__, f"--stage={name}", f"--out={out}"]
    if config.rehearse:
        command.append("--rehearse")
        environment |= {"TRITON_INTERPRET": str(int(name != "compile")), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as log:
        files = {"stdout": log, "stderr": log, "env": environment}
        process = subprocess.Popen(command, start_new_session=True, **files)
        try:
            status = "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # and all that it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        lines = log.read().strip().splitlines() or [""]
    error = lines[-1][:300] if status == "failed" else None
    taken = round(time.perf_counter() - started, 1)
    return record(out, name, status=status, error=error, seconds=taken)


def table(name: str, results: dict) -> str:
    """The results of a stage as text."""
    error = f": {results['error']}" if results["error"] else ""
    title = f"\n{name}: {results['status']}{error} ({results['seconds']:.0f} s)"
    columns = list(dict.fromkeys(key for row in results["rows"] for key in row))
    text = lambda value: "" if value is None else bench.cell(value)
    cells = [[text(row.get(column)) for column in columns] for row in results["rows"]]
    return f"{title}\n{text_table([columns, *cells])}" if cells else title


def main() -> None:
    config = Config(**configurator.parse(Config, sys.argv[1:]))
    names = [config.stage] if config.stage else (config.stages or ",".join(STAGES)).split(",")
    for name in names:
        if name not in STAGES:
            raise UserError(f"{name} is no stage; there are {', '.join(STAGES)}")
    if not config.rehearse and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here; try  python gpu_check.py --rehearse")
    if config.stage:
        run_stage(config.stage, Path(config.out), config.rehearse)
        return
    started, allowed, failed = time.perf_counter(), 0, []
    for name in names:
        allowed += STAGES[name][1]
        results = supervise(name, config, min(LONGEST, started + allowed - time.perf_counter()))
        print(table(name, results), flush=True)
        if results["status"] != "done" or any("error" in row for row in results["rows"]):
            failed.append(name)
    print(
        f"\nresults in {config.out}; " + (f"look at {', '.join(failed)}" if failed else "all well")
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    configurator.run(main)
