"""
Speed of a training step: the very step of train.py, on synthetic or real data, timed or profiled.

    python bench.py --attn_type=GK
    python bench.py config/train_11.py --real_data=True
    python bench.py config/train_gpt2.py --attn_type=PA_relu --profile=True
"""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

import configurator
import runtime
from dataset import TRAIN, Dataset
from model import GPT, GPTConfig
from train import ARCHITECTURE, Config, check, overrides_of, train_step


@dataclass
class BenchConfig(Config):
    # Benchmark: the keys of train.py, with GPT-2 124M as the default model, and
    gradient_accumulation_steps: int = 1  # micro-steps per step
    vocab_size: int = 50304  # of the synthetic data; real data bring their own
    real_data: bool = False  # batches of `dataset` instead of random tokens
    warmup: int = 3  # steps that are not counted
    steps: int = 10  # steps that are
    profile: bool = False  # print the costliest operations, and write trace.json to out_dir


def peak_memory(rt: runtime.Runtime) -> float:
    """GiB: of the GPU's allocator since the start, or of the whole process on a CPU."""
    if rt.device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main() -> None:
    config = BenchConfig(**configurator.parse(BenchConfig, sys.argv[1:]))
    check(config)
    rt = runtime.start(config.device, config.dtype, config.compile, config.backend)
    data = Dataset(config.dataset, config.data_dir) if config.real_data else None
    vocab_size = data.vocab_size if data else config.vocab_size
    B, T = config.batch_size, config.block_size

    torch.manual_seed(config.seed)
    shape = {key: getattr(config, key) for key in ARCHITECTURE}
    raw_model = GPT(GPTConfig(vocab_size=vocab_size, **shape, **overrides_of(config)))
    model = rt.wrap(raw_model.to(rt.device))
    optimizer = raw_model.configure_optimizers(
        config.weight_decay, config.learning_rate, (config.beta1, config.beta2), rt.device_type
    )
    scaler = torch.amp.GradScaler(rt.device_type, enabled=rt.dtype == "float16")

    def get_batch(step, micro_step):
        if data:
            return rt.to_device(*data.batch("train", TRAIN, config.seed, step, micro_step, B, T))
        tokens = torch.randint(vocab_size, (B, T + 1))
        return rt.to_device(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def timed_step(step) -> float:
        started = time.perf_counter()
        train_step(model, optimizer, scaler, get_batch, rt, config, step).item()  # waits for it
        return time.perf_counter() - started

    for step in range(config.warmup):
        timed_step(step)
    if config.profile:
        profile(timed_step, config, rt)
        return
    seconds = median(timed_step(config.warmup + i) for i in range(config.steps))
    tokens = config.gradient_accumulation_steps * B * T
    mfu = raw_model.estimate_mfu(
        config.gradient_accumulation_steps * B // rt.world_size, seconds, T
    )
    rt.print(
        f"{config.attn_type}, L{config.n_layer} H{config.n_head} C{config.n_embd} T{T} B{B} "
        f"V{vocab_size}, {rt.device} {rt.dtype}: {1000 * seconds:.1f} ms/step (median of "
        f"{config.steps}), {tokens / seconds:,.0f} tokens/s, "
        f"mfu {'n/a' if mfu is None else f'{mfu:.1%}'}, peak memory {peak_memory(rt):.2f} GiB"
    )
    rt.close()


def profile(timed_step, config: BenchConfig, rt: runtime.Runtime) -> None:
    """Run the counted steps under torch's profiler; print the costliest operations."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    activities = [ProfilerActivity.CPU]
    if rt.device_type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch_profile(activities=activities) as profiler:
        for i in range(config.steps):
            timed_step(config.warmup + i)
    by = "self_cuda_time_total" if rt.device_type == "cuda" else "self_cpu_time_total"
    rt.print(profiler.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=40))
    if rt.is_main:
        Path(config.out_dir).mkdir(parents=True, exist_ok=True)
        trace = Path(config.out_dir) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        rt.print(f"timeline in {trace}; open it in https://ui.perfetto.dev")


if __name__ == "__main__":
    configurator.run(main)
