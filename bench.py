"""
Speed: of a training step (the very step of train.py), of attention alone, and of sampling.

    python bench.py --attn_type=GK                                   # one configuration
    python bench.py config/train_11.py --real_data                   # on its own data
    python bench.py config/train_gpt2.py --batch_size=1 --profile    # where the time goes
    python bench.py --table=attention --out=bench.json               # one table
    python bench.py --table=all --out=bench.json                     # the four tables
    python bench.py --nanogpt=DIR --attn_type=SM                     # beside a clone of nanoGPT

Tables: `attention` times attention alone, each implementation of every attn_type against T; `types`
a training step for every attn_type; `lengths` the step against T, at a constant number of tokens;
`sampling` the drawing of text for every attn_type, one text and several at a time. The rows of a
table (of one T in `attention` and `lengths`) are measured in turn, round by round, so that their
ratios are reliable; then they are printed and written to --out. Times are medians. nanoGPT runs in
its own process, without this project's process settings.
"""

import ctypes
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

import torch

import configurator
from configurator import UserError
from data.dataset import Batches, Dataset, Purpose
from engine import flex, runtime, sharding
from engine.files import text_table, whole_file
from engine.nanogpt import NanoGPT
from engine.start import ARCHITECTURE, check, choose_implementation, model_overrides
from model import ATTN_TYPES, GPT, GPTConfig, attention, refusals
from train import Config, train_step

TURN = 0.1  # seconds for which one function is timed before it is another one's turn


@dataclass
class BenchConfig(Config):
    # Benchmark (the keys above are those of train.py; by default the model is GPT-2 124M)
    gradient_accumulation_steps: int = 1  # Micro-steps per step
    batch_size: int = 12  # Sequences per micro-step; on a CPU, the default is 1
    vocab_size: int = 50304  # Vocabulary of the random tokens; real data bring their own
    real_data: bool = False  # Train on batches of --dataset instead of random tokens
    warmup: int = 3  # Rounds of measurement that do not count
    steps: int = 10  # Rounds of measurement that count
    profile: bool = False  # Print one micro-step's costliest operations; write OUT_DIR/trace.json
    nanogpt: str | None = None  # Clone of nanoGPT to measure as well (its code is run)
    table: str = "step"  # step (this configuration), attention, types, lengths, sampling, or all
    max_new_tokens: int = 200  # Tokens of a text, in the table of sampling
    num_samples: int = 10  # Texts drawn at a time, in the table of sampling
    attn_types: str | None = None  # Attentions in the tables, e.g. SM,GK,PA_relu; auto: every one
    min_T: int = 256  # Shortest sequence in the tables; lengths go up by factors of 4
    max_T: int = 16384  # Longest sequence in the tables; on a CPU, the default is 4096
    out: str | None = None  # JSON file to write the tables to


# ---- Measuring --------------------------------------------------------------


def seconds_per_call(run: Callable[[], object], rt) -> float:
    """Median seconds of the calls that fit into a turn; on a GPU their mean, without Python's share
    (seconds_in_a_row). The first call, which finds threads asleep and another model's numbers in
    the cache, counts only if there is no other. Ranks make one call each: by their own clocks,
    their numbers would differ."""
    seconds = []
    while not seconds or (rt.world_size == 1 and sum(seconds) < TURN):
        if seconds and rt.device_type == "cuda":
            return seconds_in_a_row(run, min(50, math.ceil(TURN / seconds[0])))
        rt.synchronize()
        started = time.perf_counter()
        run()
        rt.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:] or seconds)


def seconds_in_a_row(run: Callable[[], object], n: int, cuda=torch.cuda) -> float:
    """Mean seconds that the GPU needs for each of n calls, 50 at most, between two events in its
    queue. First it sleeps, half a millisecond per call, while Python fills the queue: else calls
    would be as slow as Python, which needs 0.1 to 0.2 ms to start one."""
    begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
    cuda._sleep(n * 1_000_000)  # cycles, of about 2 GHz
    begin.record()
    for _ in range(n):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / n


def peak_memory(run: Callable[[], object], rt) -> float | None:
    """MiB that one call of `run` takes at most beyond those in use before it; None if unknown."""
    if rt.device_type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif rt.device_type == "cpu" and Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory, whose reuse would not count
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    else:
        return None
    before = rt.peak_memory()
    run()
    return rt.peak_memory() - before


def measured_here(run: Callable[[], object], rt) -> Callable:
    """What NanoGPT.measure is to nanoGPT's process: applies a measurement to `run` in this one."""
    return lambda measurement: measurement(run, rt)


def interleave(measures: list[Callable], config: BenchConfig) -> list[float]:
    """Median seconds of each run. They take turns: what slows the machine slows them all."""
    n_rounds = config.warmup + config.steps
    rounds = [[measure(seconds_per_call) for measure in measures] for _ in range(n_rounds)]
    return [median(seconds) for seconds in zip(*rounds[config.warmup :], strict=True)]


# ---- A training step --------------------------------------------------------


def new_model(config: BenchConfig, nanogpt=None) -> torch.nn.Module:
    """A model with random weights, of this project or of nanoGPT's module model.py."""
    torch.manual_seed(config.seed)
    shape = {key: getattr(config, key) for key in (*ARCHITECTURE, "vocab_size")}
    if nanogpt is None:
        return GPT(GPTConfig(**shape, **model_overrides(config)))
    return nanogpt.GPT(nanogpt.GPTConfig(**shape, dropout=config.dropout))


class TrainingStep:
    """The training step of train.py, with nanoGPT's model and optimizer where its module model.py
    is given; each call takes one step."""

    def __init__(self, config: BenchConfig, rt, nanogpt=None):
        self.config, self.rt, self.steps = config, rt, count()
        self.data = Dataset(config.dataset, config.data_dir) if config.real_data else None
        self.raw_model = new_model(config, nanogpt)
        rt.place(self.raw_model)
        if config.checkpoint_activations and nanogpt is None:
            sharding.checkpoint_activations(self.raw_model)
        kind = (config.optimizer,) if nanogpt is None else ()
        options = config.weight_decay, config.learning_rate, (config.beta1, config.beta2)
        self.optimizer = self.raw_model.configure_optimizers(*options, rt.device_type, *kind)
        if nanogpt is not None:
            without_keywords = lambda module, args, keywords: (args, {})  # not with_logits
            self.raw_model.register_forward_pre_hook(without_keywords, with_kwargs=True)
        self.model = rt.wrap(rt.compiled(self.raw_model))
        self.scaler = torch.amp.GradScaler(rt.device_type, enabled=rt.dtype == "float16")
        micro_steps = rt.share(config.gradient_accumulation_steps)
        self.batches = Batches(self.load, micro_steps, 0, sys.maxsize)

    def load(self, step: int, micro_step: int) -> list[torch.Tensor]:
        """Inputs and targets (B, T) on the device."""
        config, B, T = self.config, self.config.batch_size, self.config.block_size
        if self.data:
            batch = self.data.batch("train", Purpose.TRAIN, config.seed, step, micro_step, B, T)
            return self.rt.to_device(*batch)
        tokens = torch.randint(config.vocab_size, (B, T + 1))
        return self.rt.to_device(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def __call__(self) -> None:
        state = self.model, self.optimizer, self.scaler, self.batches
        train_step(*state, self.rt, self.config, next(self.steps))


def step_rows(configs: list[BenchConfig], rt) -> list[dict]:
    """A row for the training step of each configuration, nanoGPT's first."""
    config = configs[0]
    rows = [{"attn_type": c.attn_type, "impl": choose_implementation(c, rt)} for c in configs]
    steps = [TrainingStep(c, rt) for c in configs]
    measures = [measured_here(step, rt) for step in steps]
    if config.nanogpt:
        nanogpt = NanoGPT(TrainingStep, config)
        rows.insert(0, {"attn_type": "nanoGPT", "impl": "SDPA"})
        measures.insert(0, nanogpt.measure)
    times = interleave(measures, config)
    sequences, T = config.gradient_accumulation_steps * config.batch_size, config.block_size
    for row, measure, seconds in zip(rows, measures, times, strict=True):
        row |= {"T": T, "B": config.batch_size, "ms": 1000 * seconds}
        row["times_first"] = seconds / times[0]
        row["tokens_per_s"] = sequences * T / seconds
        row["mfu"] = steps[0].raw_model.estimate_mfu(sequences // rt.world_size, seconds, T)
        row["peak_MiB"] = measure(peak_memory)
    if config.nanogpt:
        nanogpt.close()
    return rows


def profile(config: BenchConfig, rt) -> None:
    """Run the counted steps, each of one micro-step per rank, under torch's profiler; print the
    costliest operations."""
    rt.print(f"profiling {config.steps} steps of one micro-step, after {config.warmup} to warm up")
    if rt.device_type == "cpu":  # on a GPU, the errors of the profiler must stay visible
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no "USDT:" lines
    step = TrainingStep(replace(config, gradient_accumulation_steps=rt.world_size), rt)
    for _ in range(config.warmup):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(config.steps):
            step()
        rt.synchronize()
    key = f"self_{'cuda' if rt.device_type == 'cuda' else 'cpu'}_time_total"
    rt.print(profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=40))
    if rt.is_main:
        trace = Path(config.out_dir) / "trace.json"
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        rt.print(f"timeline in {trace}; open it in https://ui.perfetto.dev")


# ---- The tables -------------------------------------------------------------


def lengths(config: BenchConfig) -> list[int]:
    if config.min_T > config.max_T:
        raise UserError(f"min_T={config.min_T} is above max_T={config.max_T}; pass a lower --min_T")
    return [T for T in (config.min_T * 4**i for i in range(20)) if T <= config.max_T]


def forward_backward(attend, q, k, v, dy) -> None:
    torch.autograd.grad(attend(q, k, v), (q, k, v), dy)


def attention_rows(config: BenchConfig, attn_types: list[str], T: int, rt) -> list[dict]:
    """Attention alone at one length: every implementation, beside torch's softmax (SDPA) and, on a
    GPU, its FlexAttention."""
    B, nh, hs = config.batch_size, config.n_head, config.n_embd // config.n_head
    dtype = getattr(torch, rt.dtype)
    qkv = torch.randn(B, T, 3, nh, hs, device=rt.device, dtype=dtype)
    q, k, v = (t.detach().requires_grad_() for t in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    dy = torch.randn(B, T, nh, hs, device=rt.device, dtype=dtype).transpose(1, 2)
    n_weights = B * nh * T * T  # the reference holds several matrices of this size
    rows, forwards, both_ways = [], [], []
    for attn_type in ["SM", *(t for t in attn_types if t != "SM")]:
        implementations = refusals(attn_type, hs, dtype, rt.device)
        if config.attn_decay == "none":
            implementations["FlexAttention"] = flex.refusal(attn_type, hs, rt.device)
        for impl, reason in implementations.items():
            if reason is not None or (impl == "reference" and n_weights > 2**27):
                continue
            if impl == "FlexAttention":
                attend = flex.attention(attn_type, T, rt.device)
            else:
                kind = {"attn_decay": config.attn_decay, "attn_normalize": config.attn_normalize}
                attend = attention(attn_type, T, config.pa_length_power, impl, **kind)
            rows.append({"attn_type": attn_type, "impl": impl, "T": T})
            forwards.append(measured_here(partial(torch.no_grad()(attend), q, k, v), rt))
            both_ways.append(measured_here(partial(forward_backward, attend, q, k, v, dy), rt))
    flops = 4 * n_weights * hs / 2  # two causal products; the backward has five
    times, times_both_ways = interleave(forwards, config), interleave(both_ways, config)
    for row, measure, fwd, both in zip(rows, both_ways, times, times_both_ways, strict=True):
        row |= {"fwd_ms": 1000 * fwd, "fwd_bwd_ms": 1000 * both}
        row |= {"fwd_TFLOPs": flops / fwd / 1e12, "fwd_bwd_TFLOPs": 3.5 * flops / both / 1e12}
        row |= {"times_SDPA": both / times_both_ways[0], "peak_MiB": measure(peak_memory)}
    return rows


Rows = Iterator[list[dict]]  # of a table, as they become known


def attention_table(config: BenchConfig, attn_types: list[str], rt) -> Rows:
    for T in lengths(config):
        yield attention_rows(config, attn_types, T, rt)


def types_table(config: BenchConfig, attn_types: list[str], rt) -> Rows:
    yield step_rows([replace(config, attn_type=t) for t in attn_types], rt)


def lengths_table(config: BenchConfig, attn_types: list[str], rt) -> Rows:
    tokens = config.batch_size * config.block_size
    for T in lengths(config):
        shape = replace(config, block_size=T, batch_size=max(1, tokens // T))
        yield from types_table(shape, attn_types, rt)


def sampling(config: BenchConfig, rt, nanogpt=None, n_samples: int = 1) -> Callable:
    """A function that draws n_samples texts at a time, from random weights and one token."""
    model = new_model(config, nanogpt)
    model.to(rt.device, getattr(torch, rt.dtype)).eval()
    options = {"compile": rt.compile} if nanogpt is None else {}
    prompt = torch.zeros(n_samples, 1, dtype=torch.long, device=rt.device)
    temperature, top_k = 0.8, 200
    return partial(model.generate, prompt, config.max_new_tokens, temperature, top_k, **options)


def sampling_table(config: BenchConfig, attn_types: list[str], rt) -> Rows:
    """One text and several at a time; nanoGPT's sample.py draws one after the other."""
    rows, measures = [], []
    if config.nanogpt:
        nanogpt = NanoGPT(sampling, config)
        rows.append({"attn_type": "nanoGPT", "samples": 1})
        measures.append(nanogpt.measure)
    for attn_type in attn_types:
        for n_samples in (1, config.num_samples):
            rows.append({"attn_type": attn_type, "samples": n_samples})
            run = sampling(replace(config, attn_type=attn_type), rt, n_samples=n_samples)
            measures.append(measured_here(run, rt))
    times = interleave(measures, config)
    if config.nanogpt:
        nanogpt.close()
    for row, seconds in zip(rows, times, strict=True):
        row["tokens_per_s"] = row["samples"] * config.max_new_tokens / seconds
        row["ms_per_step"] = 1000 * seconds / config.max_new_tokens
        row["times_first"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    yield rows


TABLES = {"attention": attention_table, "types": types_table}
TABLES |= {"lengths": lengths_table, "sampling": sampling_table}


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "n/a" if value is None else str(value)


def read_config() -> tuple[BenchConfig, list[str], set[str]]:
    """The configuration of the command line, the attentions that the tables compare, and the keys
    that were given."""
    given = configurator.parse(BenchConfig, sys.argv[1:])
    config = BenchConfig(**given)
    if config.table not in ("step", "all", *TABLES):
        raise UserError(f"table={config.table} is none of step, {', '.join(TABLES)}, all")
    every_one = ",".join(name.replace("-n", "-8") for name in ATTN_TYPES)
    attn_types = (every_one if config.attn_types is None else config.attn_types).split(",")
    for attn_type in (config.attn_type, *attn_types):
        check(replace(config, attn_type=attn_type))
    if config.nanogpt and not (Path(config.nanogpt) / "model.py").exists():
        raise UserError(f"nanogpt={config.nanogpt} is no clone of nanoGPT: it has no model.py")
    if config.nanogpt and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("nanogpt is measured beside a single process; start bench.py by python")
    if config.out and not Path(config.out).parent.is_dir():
        raise UserError(f"out={config.out} is in a folder that is not there; make the folder first")
    if config.real_data:
        data = Dataset(config.dataset, config.data_dir)
        data.check_length(config.block_size)
        config.vocab_size = data.vocab_size
    return config, attn_types, set(given)


def main() -> None:
    config, attn_types, given = read_config()
    machine = config.device, config.dtype, config.compile, config.backend, config.shard == "full"
    with runtime.session(*machine) as rt:
        if rt.device_type == "cpu":  # where a GPU's default sizes would take hours
            smaller = {"batch_size": 1, "max_T": max(4096, config.min_T)}
            config = replace(config, **{key: smaller[key] for key in smaller.keys() - given})
        if config.profile:
            profile(config, rt)
            return
        shape = f"L{config.n_layer} H{config.n_head} C{config.n_embd} V{config.vocab_size}"
        machine = f"{rt.device_name()}, {rt.precision}, compile {'on' if rt.compile else 'off'}"
        rt.print(machine)
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        results = {"machine": machine, **versions, "config": vars(config)}
        for name in TABLES if config.table == "all" else [config.table]:
            rt.print(f"\n{'training step' if name == 'step' else name}, {shape}")
            if name == "step":
                table = iter([step_rows([config], rt)])
            else:
                table = TABLES[name](replace(config, real_data=False), attn_types, rt)
            results[name] = []
            for rows in table:
                results[name] += rows
                if rt.is_main:
                    cells = [[cell(value) for value in row.values()] for row in rows]
                    print(text_table([list(rows[0]), *cells]), flush=True)
                if config.out and rt.is_main:  # at once: the next rows may take long, or fail
                    with whole_file(Path(config.out)) as file:
                        file.write(json.dumps(results, indent=1) + "\n")
            reason = flex.refusal("SM", config.n_embd // config.n_head, rt.device)
            if name == "attention" and reason:
                rt.print(f"left out: {reason}")


if __name__ == "__main__":
    configurator.run(main)
