"""
Speed: of a training step (the very step of train.py), and of attention alone.

    python bench.py --attn_type=GK                                   # one configuration
    python bench.py config/train_11.py --real_data                   # on its own data
    python bench.py config/train_gpt2.py --attn_type=PA_relu --profile
    python bench.py --table=attention --out=bench.json               # one table, or
    python bench.py --table=all --out=bench.json                     # all four
    python bench.py --nanogpt=DIR --attn_type=SM                     # beside a clone of nanoGPT

The tables: `attention` is every attn_type alone, each implementation beside softmax, against T;
`types` a training step for every attn_type; `lengths` the step against T, at a constant number of
tokens; `sampling` text drawn for every attn_type, one text and several at a time. What stands in
one table was measured in turn, round by round: trust its ratios. Times are medians. nanoGPT has a
process of its own, as it has in life: what ours sets for all of its process is not for nanoGPT.
"""

import ctypes
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

import configurator
from configurator import UserError
from data.dataset import Dataset, Purpose
from engine import runtime
from engine.runtime import resident
from model import ATTN_TYPES, GPT, GPTConfig, attention, parse_attn_type, refusals
from train import ARCHITECTURE, Batches, Config, check, choose_impl, overrides_of, train_step

TABLES = ("attention", "types", "lengths", "sampling")
TURN = 0.1  # seconds
REST = 0.1  # seconds between two processes: OpenMP's threads look for work for a while


@dataclass
class BenchConfig(Config):
    # Benchmark: the keys of train.py, with GPT-2 124M as the default model, and
    gradient_accumulation_steps: int = 1  # micro-steps per step
    vocab_size: int = 50304  # of the synthetic data; real data bring their own
    real_data: bool = False  # batches of `dataset` instead of random tokens
    warmup: int = 3  # rounds that are not counted
    steps: int = 10  # rounds that are
    profile: bool = False  # print the costliest operations, and write trace.json to out_dir
    nanogpt: str | None = None  # a clone of nanoGPT, whose step is measured too (its code is run)
    table: str = "step"  # step (this configuration), attention, types, lengths, sampling, or all
    max_new_tokens: int = 200  # of a text, for the table of sampling
    num_samples: int = 10  # texts at a time, likewise
    attn_types: str | None = None  # for the tables, e.g. SM,GK,PA_relu; auto: all there are
    min_T: int = 256  # shortest sequence of the tables; they go up by factors of 4
    max_T: int = 16384  # longest
    out: str | None = None  # JSON file for the tables


# ----------------------------------------------------------------------------
# Measuring


def timed(run: Callable[[], object], rt) -> float:
    """Median seconds of the calls that fit into a turn. The first, which finds threads asleep and
    another model's numbers in the cache, counts only if it is the only one. Ranks that step
    together make one call each: by their own clocks they would make different numbers of them."""
    seconds = []
    while not seconds or (rt.world_size == 1 and sum(seconds) < TURN):
        rt.synchronize()
        started = time.perf_counter()
        run()
        rt.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:] or seconds)


def interleave(timers: list[Callable[[], float]], config: BenchConfig) -> list[float]:
    """Median seconds of each, taken in turn: what slows the machine slows them all."""
    rounds = [[timer() for timer in timers] for _ in range(config.warmup + config.steps)]
    return [median(seconds) for seconds in zip(*rounds[config.warmup :], strict=True)]


def peak_memory(run: Callable[[], object], rt) -> float | None:
    """MiB that one call of `run` takes at most on top of what was there; None if not known here."""
    if rt.device_type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if rt.device_type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # give back what was freed before, or it hides in reuse
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    before = resident("VmHWM")
    run()
    return resident("VmHWM") - before


class NanoGPT:
    """nanoGPT in a process of its own, which calls what `make`(config, rt, its model.py) returned
    whenever it is asked to."""

    def __init__(self, make: Callable, config: BenchConfig):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, make, config), daemon=True)
        self.process.start()
        theirs.close()

    def close(self) -> None:
        self.pipe.close()
        self.process.join()

    def ask(self, what: str) -> float | None:
        """'seconds' of one call, or its 'peak' memory."""
        time.sleep(REST)
        try:
            self.pipe.send(what)
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            told = f"nanoGPT's process ended with exit code {self.process.exitcode}"
            raise UserError(f"{told}; what it said, if anything, stands above") from error
        time.sleep(REST)
        return answer


def serve(pipe, make: Callable, config: BenchConfig) -> None:
    """The life of nanoGPT's process."""
    rt = runtime.start(config.device, config.dtype, config.compile, config.backend)
    spec = importlib.util.spec_from_file_location("nanogpt_model", f"{config.nanogpt}/model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    run = make(config, rt, module)
    answers = {"seconds": timed, "peak": peak_memory}
    with suppress(EOFError, KeyboardInterrupt):  # the end of ours
        while True:
            pipe.send(answers[pipe.recv()](run, rt))


# ----------------------------------------------------------------------------
# A training step


def make_step(config: BenchConfig, rt, peer=None) -> Callable:
    """The training step of train.py for one configuration, as a function of nothing.

    `peer` is nanoGPT's module model.py: its model and its optimizer then take the place of ours.
    """
    data = real_data(config)
    vocab_size = data.vocab_size if data else config.vocab_size
    B, T = config.batch_size, config.block_size
    torch.manual_seed(config.seed)
    shape = {key: getattr(config, key) for key in ARCHITECTURE} | {"vocab_size": vocab_size}
    with redirect_stdout(io.StringIO()):  # nanoGPT prints while it is built
        if peer is None:
            raw_model = GPT(GPTConfig(**shape, **overrides_of(config)))
        else:
            raw_model = peer.GPT(peer.GPTConfig(**shape, dropout=config.dropout))
        optimizer = raw_model.to(rt.device).configure_optimizers(
            config.weight_decay, config.learning_rate, (config.beta1, config.beta2), rt.device_type
        )
    model = rt.wrap(rt.compiled(raw_model if peer is None else WithLogits(raw_model)))
    scaler = torch.amp.GradScaler(rt.device_type, enabled=rt.dtype == "float16")
    step = iter(range(sys.maxsize))

    def load(step, micro_step):
        if data:
            key = "train", Purpose.TRAIN, config.seed, step, micro_step
            return rt.to_device(*data.batch(*key, B, T))
        tokens = torch.randint(vocab_size, (B, T + 1))
        return rt.to_device(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    micro_steps = rt.share(config.gradient_accumulation_steps)
    batches = Batches(load, micro_steps, 0, sys.maxsize)
    run = lambda: train_step(model, optimizer, scaler, batches, rt, config, next(step))
    run.model = raw_model
    return run


def real_data(config: BenchConfig) -> Dataset | None:
    """The data set of the command line, if it is asked for."""
    if not config.real_data:
        return None
    data = Dataset(config.dataset, config.data_dir)
    data.check_length(config.block_size)
    return data


class WithLogits(torch.nn.Module):
    """A model whose forward always returns its logits, as train_step calls it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y, with_logits):
        return self.model(x, y)


def step_rows(configs: list[BenchConfig], rt) -> list[dict]:
    """A row for the training step of each configuration, nanoGPT's before, measured in turn."""
    names = [(config.attn_type, choose_impl(config, rt)) for config in configs]
    runs = [make_step(config, rt) for config in configs]
    timers = [partial(timed, run, rt) for run in runs]
    peaks = [partial(peak_memory, run, rt) for run in runs]
    config = configs[0]
    if config.nanogpt:
        nanogpt = NanoGPT(make_step, config)
        names.insert(0, ("nanoGPT", "SDPA"))
        timers.insert(0, partial(nanogpt.ask, "seconds"))
        peaks.insert(0, partial(nanogpt.ask, "peak"))
    seconds = interleave(timers, config)
    sequences, T = config.gradient_accumulation_steps * config.batch_size, config.block_size
    rows = [
        {
            "attn_type": name,
            "impl": impl,
            "T": T,
            "B": config.batch_size,
            "ms": 1000 * time_,
            "times_first": time_ / seconds[0],
            "tokens_per_s": sequences * T / time_,
            "mfu": runs[0].model.estimate_mfu(sequences // rt.world_size, time_, T),
            "peak_MiB": peak(),
        }
        for (name, impl), time_, peak in zip(names, seconds, peaks, strict=True)
    ]
    if config.nanogpt:
        nanogpt.close()
    return rows


# ----------------------------------------------------------------------------
# The tables


def forward(attend, q, k, v) -> None:
    with torch.no_grad():
        attend(q, k, v)


def forward_backward(attend, q, k, v, dy) -> None:
    torch.autograd.grad(attend(q, k, v), (q, k, v), dy)


def attention_table(config: BenchConfig, attn_types: list[str], rt) -> list[dict]:
    """Attention alone, forward and forward + backward, every implementation beside SDPA softmax."""
    B, nh, hs = config.batch_size, config.n_head, config.n_embd // config.n_head
    rows = []
    for T in lengths(config):
        dtype = getattr(torch, rt.dtype)
        qkv = torch.randn(B, T, 3, nh, hs, device=rt.device, dtype=dtype)
        q, k, v = (t.detach().requires_grad_() for t in qkv.permute(2, 0, 3, 1, 4).unbind(0))
        dy = torch.randn(B, T, nh, hs, device=rt.device, dtype=dtype).transpose(1, 2)
        group, forwards, runs = [], [], []
        for attn_type in ["SM", *(t for t in attn_types if t != "SM")]:
            for impl, reason in refusals(attn_type, hs, dtype, rt.device).items():
                big = impl == "reference" and B * nh * T * T > 2**27
                if reason is not None or big:  # the formula takes several (B, nh, T, T)
                    continue
                attend = attention(attn_type, T, impl=impl)
                group.append({"attn_type": attn_type, "impl": impl, "T": T})
                forwards.append(partial(timed, partial(forward, attend, q, k, v), rt))
                runs.append(partial(forward_backward, attend, q, k, v, dy))
        flops = 4 * B * nh * hs * T * T / 2  # two causal products; the backward has five
        times = interleave(forwards, config)
        times_both = interleave([partial(timed, run, rt) for run in runs], config)
        for row, run, fwd, fwd_bwd in zip(group, runs, times, times_both, strict=True):
            row |= {"fwd_ms": 1000 * fwd, "fwd_bwd_ms": 1000 * fwd_bwd}
            row |= {
                "fwd_TFLOPs": flops / fwd / 1e12,
                "fwd_bwd_TFLOPs": 3.5 * flops / fwd_bwd / 1e12,
            }
            row |= {"times_SDPA": row["fwd_bwd_ms"] / group[0]["fwd_bwd_ms"]}
            row |= {"peak_MiB": peak_memory(run, rt)}
        rows += group
    return rows


def types_table(config: BenchConfig, attn_types: list[str], rt) -> list[dict]:
    return step_rows([replace(config, attn_type=t) for t in attn_types], rt)


def lengths_table(config: BenchConfig, attn_types: list[str], rt) -> list[dict]:
    tokens = config.batch_size * config.block_size
    rows = []
    for T in lengths(config):
        B = max(1, tokens // T)
        shape = replace(config, block_size=T, batch_size=B)
        rows += step_rows([replace(shape, attn_type=t) for t in attn_types], rt)
    return rows


def make_sampling(config: BenchConfig, rt, peer=None, samples: int = 1) -> Callable:
    """Text drawn from random weights after a prompt of one token, by `samples` rows at a time."""
    shape = {key: getattr(config, key) for key in ARCHITECTURE} | {"vocab_size": config.vocab_size}
    with redirect_stdout(io.StringIO()):
        if peer is None:
            model = GPT(GPTConfig(**shape, **overrides_of(config)))
        else:
            model = peer.GPT(peer.GPTConfig(**shape, dropout=0.0))
    model.to(rt.device, getattr(torch, rt.dtype)).eval()
    options = {"compile": rt.compile} if peer is None else {}
    prompt = torch.zeros(samples, 1, dtype=torch.long, device=rt.device)
    draw = partial(model.generate, prompt, config.max_new_tokens, 0.8, 200, **options)
    return torch.no_grad()(draw)


def sampling_table(config: BenchConfig, attn_types: list[str], rt) -> list[dict]:
    """One text, and several at a time; nanoGPT draws one after the other."""
    rows, timers = [], []
    if config.nanogpt:
        rows.append({"attn_type": "nanoGPT", "samples": 1})
        nanogpt = NanoGPT(make_sampling, config)
        timers.append(partial(nanogpt.ask, "seconds"))
    for attn_type in attn_types:
        for samples in (1, config.num_samples):
            rows.append({"attn_type": attn_type, "samples": samples})
            run = make_sampling(replace(config, attn_type=attn_type), rt, samples=samples)
            timers.append(partial(timed, run, rt))
    for row, seconds in zip(rows, interleave(timers, config), strict=True):
        tokens = row["samples"] * config.max_new_tokens
        row["tokens_per_s"] = tokens / seconds
        row["ms_per_step"] = 1000 * seconds / config.max_new_tokens
    if config.nanogpt:
        nanogpt.close()
    for row in rows:
        row["times_first"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    return rows


def lengths(config: BenchConfig) -> list[int]:
    return [T for T in (config.min_T * 4**i for i in range(20)) if T <= config.max_T]


def show(title: str, rows: list[dict]) -> None:
    """Print rows as one aligned table."""

    def cell(value):
        if value is None:
            return "n/a"
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        return str(value)

    table = [list(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"\n{title}")
    for line in table:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def profile(config: BenchConfig, rt) -> None:
    """Run the counted steps under torch's profiler; print the costliest operations."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    run = make_step(config, rt)
    for _ in range(config.warmup):
        run()
    activities = [ProfilerActivity.CPU]
    if rt.device_type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch_profile(activities=activities) as profiler:
        for _ in range(config.steps):
            run()
        rt.synchronize()
    by = "self_cuda_time_total" if rt.device_type == "cuda" else "self_cpu_time_total"
    rt.print(profiler.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=40))
    if rt.is_main:
        Path(config.out_dir).mkdir(parents=True, exist_ok=True)
        trace = Path(config.out_dir) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        rt.print(f"timeline in {trace}; open it in https://ui.perfetto.dev")


def main() -> None:
    config = BenchConfig(**configurator.parse(BenchConfig, sys.argv[1:]))
    check(config)
    if config.table not in ("step", "all", *TABLES):
        raise UserError(f"table={config.table} is none of step, {', '.join(TABLES)}, all")
    attn_types = [name.replace("-n", "-8") for name in ATTN_TYPES]
    if config.attn_types is not None:
        attn_types = config.attn_types.split(",")
    try:
        for attn_type in attn_types:
            parse_attn_type(attn_type)
    except ValueError as error:
        raise UserError(error) from error
    if config.nanogpt and not (Path(config.nanogpt) / "model.py").exists():
        raise UserError(f"nanogpt={config.nanogpt} is no clone of nanoGPT: it has no model.py")
    if config.nanogpt and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("nanogpt is measured in one process beside one of ours; leave out torchrun")
    rt = runtime.start(config.device, config.dtype, config.compile, config.backend)
    runtime.keep_freed_memory(rt.device_type)
    if config.profile:
        profile(config, rt)
        return

    data = real_data(config)
    vocab_size = data.vocab_size if data else config.vocab_size
    shape = f"L{config.n_layer} H{config.n_head} C{config.n_embd} V{vocab_size}"
    where = f"{rt.device_name()}, {rt.dtype}, compile {'on' if rt.compile else 'off'}"
    results = {"machine": where, "torch": torch.__version__, "python": platform.python_version()}
    results |= {"config": {**vars(config)}}
    rt.print(where)
    if config.table == "step":
        results["step"] = step_rows([config], rt)
        if rt.is_main:
            show(f"training step, {shape}", results["step"])
    makers = {"attention": attention_table, "types": types_table, "lengths": lengths_table}
    makers["sampling"] = sampling_table
    for name in TABLES if config.table == "all" else [config.table]:
        if name in makers:
            results[name] = makers[name](replace(config, real_data=False), attn_types, rt)
            if rt.is_main:
                show(f"{name}, {shape}", results[name])
        if config.out and rt.is_main:  # after every table: the next one may fail
            Path(config.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    rt.close()


if __name__ == "__main__":
    configurator.run(main)
