"""
Train a GPT with any attention, in one process or under torchrun.

    python train.py config/train_11.py                            # 1 layer, 1 head, Gaussian kernel
    python train.py config/train_11.py --attn_type=SM --seed=1    # any value overridden
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py --init_from=resume --out_dir=OUT              # go on with the run in OUT
    python train.py --init_from=finetune --out_dir=OUT --attn_type=GKpoly-8
    python train.py --init_from=distill --teacher=OUT --attn_type=GK    # match its attention first
    python train.py eval_gpt2                                     # evaluate only

On several nodes, run this on every node; HOST is the address of one node. If a rank dies, torchrun
restarts all, and the run goes on from its last checkpoint, whatever init_from says:

    torchrun --nnodes=2 --nproc_per_node=8 --max-restarts=3 --rdzv-backend=c10d \\
        --rdzv-endpoint=HOST:29500 --rdzv-id=NAME train.py config/train_gpt2.py

SIGTERM and Ctrl-C end the run after the current step or evaluation: it saves a checkpoint, and its
exit code is 143 or 130.
"""

import math
import os
import sys
import time
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass
from typing import Literal

import torch

import configurator
from data.dataset import EVAL_SEED, Batches, Dataset, Purpose, dropout_seed
from engine import checkpoint as ckpt
from engine import layers, ranges, run_folder, runtime, sharding, start
from engine.distill import Trainee
from engine.divergence import explain, not_done
from engine.runlog import RunLog, speed
from engine.scoring import run_evaluation
from model import ATTN_TYPES  # noqa: F401, for the help of attn_type


@dataclass
class Config:
    # Run
    out_dir: str = "out"  # Folder of the run: checkpoints, log.csv, config.json, pictures
    save_dir: str | None = None  # Folder of a finetune; auto: OUT_DIR-finetune-ATTN_TYPE
    init_from: str = "scratch"  # scratch, resume, finetune, distill, a GPT-2 name or a folder
    eval_only: bool = False  # Evaluate once and stop
    datasets: str | None = None  # With eval_only: data sets to score token by token, as in a,b,c
    eval_stride: int | None = None  # With datasets: tokens between windows; auto: block_size / 2
    eval_interval: int = 2000  # Steps between evaluations, each followed by a save
    eval_iters: int = 200  # Batches per evaluation and split, the same ones every time
    log_interval: int = 1  # Steps between rows of the log
    always_save_checkpoint: bool = True  # False saves only when val loss improves, and at the end
    seed: int = 1337  # Seed of weights, batches and dropout
    allow_mismatch: bool = False  # Resume even though data, schedule or batches changed
    skip_nonfinite: int = 0  # Steps with a non-finite loss or gradient to skip before stopping
    stats_interval: int = 0  # Steps between rows of stats.csv (range of scores); 0 writes none
    stats_tolerance: float = 1e-2  # Error against exp for which the log suggests n of GKpoly-n
    plot: bool = True  # Draw pictures in out_dir at the end of a run of 100 steps or more
    tensorboard_log: bool = False  # Log to OUT_DIR/tensorboard too
    wandb_log: bool = False  # Log to Weights & Biases too
    trackio_log: bool = False  # Log to Trackio too, which keeps its pages on this disk
    wandb_project: str = "gpt-attention"  # Project in Weights & Biases and in Trackio
    wandb_run_name: str | None = None  # Name of the run there; auto: the name of its folder

    # Data
    dataset: str = "pydocs"  # Name of a data set in data/, see data/*/prepare.py
    data_dir: str | None = None  # Folder that holds the data sets; auto: data/ beside train.py
    gradient_accumulation_steps: int = 5 * 8  # Micro-steps per step, shared among the ranks
    batch_size: int = 12  # Sequences per micro-step
    block_size: int = 1024  # Context length T in tokens

    # Model
    attn_type: str = "SM"  # Attention: one of {ATTN_TYPES}
    attn_impl: str = "auto"  # Implementation: reference, blockwise, triton; auto takes the fastest
    attn_decay: Literal["none", "fixed", "learned"] = "none"  # Fade of weights with distance
    attn_normalize: int = 0  # With a decay: weights sum to 1, by so many terms: 1, 2, 4 ... 32
    pa_length_power: float = 1.0  # PA_f divides by block_size to this power; not with attn_decay
    norm: Literal["layer", "rms", "fixed"] = "layer"  # fixed: divides by a constant, see layers.py
    mlp_act: Literal["gelu", "relu-square", "quad", "quartic"] = "gelu"  # See engine/layers.py
    position: Literal["learned", "rope"] = "learned"  # rope: queries and keys are rotated
    qk_norm: bool = False  # Queries and keys of one length, which is learned for each head
    n_layer: int = 12  # Number of blocks
    n_head: int = 12  # Heads per block
    n_embd: int = 768  # Embedding width C
    dropout: float = 0.0  # 0 suits pretraining; 0.1 or more where data are few
    bias: bool = False  # Biases in Linear and LayerNorm

    # Adapters (LoRA), trained instead of the weights, which are frozen
    lora_rank: int = 0  # Rank of the adapters; 0 trains all weights
    lora_alpha: float = 16.0  # Adapters are scaled by lora_alpha / lora_rank
    lora_targets: str = "attn.c_attn,attn.c_proj"  # Layers with adapters; mlp.c_fc, mlp.c_proj too

    # Conversion to norm=fixed, mlp_act=quad or quartic
    anneal_iters: int = 0  # Steps, after distill_iters, to gradually replace LayerNorm and GELU

    # Conversion (init_from=distill): match the teacher's attention, then train the whole model
    teacher: str | None = None  # Teacher: a run's folder, a GPT-2 name, or an exported folder
    distill_iters: int | None = None  # Steps of matching, before the rest; auto: max_iters / 2

    # Optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for block matrices; AdamW for the rest
    learning_rate: float = 6e-4  # Peak learning rate, reached after the warm-up
    max_iters: int = 600000  # Steps in all, that is, updates of the weights
    weight_decay: float = 1e-1  # Weight decay of matrices and embeddings
    beta1: float = 0.9  # AdamW's decay rate of the mean gradient
    beta2: float = 0.95  # AdamW's decay rate of the mean squared gradient
    grad_clip: float = 1.0  # Largest norm of the gradient; 0 turns clipping off
    decay_lr: bool = True  # False keeps the learning rate constant, without a warm-up
    lr_schedule: Literal["cosine", "wsd"] = "cosine"  # wsd decays over the last 20 % of steps only
    warmup_iters: int = 2000  # Steps of linear warm-up
    lr_decay_iters: int | None = None  # Step at which min_lr is reached; auto: max_iters
    min_lr: float | None = None  # Final learning rate; auto: learning_rate / 10

    # System
    device: str | None = None  # cpu, cuda, cuda:1 or mps; auto takes the best that there is
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # auto depends on the device
    compile: bool | None = None  # Use torch.compile; auto: on cuda only
    backend: Literal["nccl", "gloo"] | None = None  # Of torch.distributed; auto: nccl on cuda
    shard: Literal["none", "full"] = "none"  # full: ranks share weights, gradients, optimizer state
    checkpoint_activations: bool = False  # Compute each block twice, which saves most activations


PICTURES_FROM = 100  # steps: pictures take two seconds, too long for a shorter run

# ---- Learning rate ----------------------------------------------------------


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up from learning_rate / (warmup_iters + 1), then a cosine down to min_lr. With
    wsd (warm-up, stable, decay): constant, then linear decay over the last 20 % of the steps."""
    end, min_lr = start.schedule(config)
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= end:
        return min_lr
    if config.lr_schedule == "wsd":
        left = min(1.0, (end - step) / min(end / 5, end - config.warmup_iters))
        return min_lr + (config.learning_rate - min_lr) * left
    progress = (step - config.warmup_iters) / (end - config.warmup_iters)  # 0..1
    return min_lr + (config.learning_rate - min_lr) * (1 + math.cos(math.pi * progress)) / 2


# ---- One step ---------------------------------------------------------------


def train_step(
    model, optimizer, scaler, batches: Batches, rt: runtime.Runtime, config: Config, step: int
) -> tuple[float, float, bool]:
    """One update of the weights, unless the loss or the gradient is not finite. Returns the loss, a
    mean over micro-steps and ranks; the norm of the gradient before clipping; and whether the
    weights were updated."""
    micro_steps = rt.share(config.gradient_accumulation_steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = 0.0
    for micro_step in micro_steps:
        x, y = batches.next
        if config.dropout > 0:
            torch.manual_seed(dropout_seed(config.seed, step, micro_step))
        syncs = rt.world_size == 1 or rt.shard or micro_step == micro_steps[-1]
        with nullcontext() if syncs else model.no_sync():  # DDP averages gradients once a step
            with rt.autocast():
                _, loss = model(x, y, with_logits=False)
            scaler.scale(loss / len(micro_steps)).backward()
        total += loss.detach()
        batches.advance()

    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
    if rt.shard:  # ranks have clipped their parts of the gradient
        norm = norm.full_tensor()
    totals = rt.total(torch.stack([total / len(micro_steps), norm.to(total.device)]))
    numbers = rt.read(totals)  # as soon as the device has them
    on_device = decides_on_device(optimizer, rt)
    if on_device:  # the GPU does not wait until the host has seen the loss
        optimizer.found_inf = 1 - totals.isfinite().all().float()
        optimizer.step()
    loss, norm = (value / rt.world_size for value in numbers())
    # With float16 a gradient may overflow: the scaler skips the step and lowers its scale
    overflow = scaler.is_enabled() and scaler.get_scale() > 1
    updated = math.isfinite(loss) and (math.isfinite(norm) or overflow)
    if updated and not on_device:
        scaler.step(optimizer)
    layers.track(model, rt, updated)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, updated


def decides_on_device(optimizer, rt: runtime.Runtime) -> bool:
    """Whether the optimizer itself leaves out a step that is not finite, as its found_inf tells it:
    fused AdamW can, on a GPU. torch's Muon can't, sharded weights don't mix with that flag, and for
    float16 the scaler sets it."""
    fused = type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    return fused and rt.device_type == "cuda" and rt.dtype != "float16" and not rt.shard


@torch.no_grad()
def estimate_loss(model, data: Dataset, rt: runtime.Runtime, config: Config) -> dict[str, float]:
    """Mean loss of each split over eval_iters batches, which are shared among the ranks and are the
    same for every seed and every number of ranks."""
    model.eval()
    losses = {}
    for split in data.tokens:
        rounds = math.ceil(config.eval_iters / rt.world_size)  # by each rank, to gather weights
        of_batch = torch.zeros(rounds * rt.world_size, dtype=torch.float64)  # 0: of another rank
        for i in rt.share(len(of_batch)):
            B, T = config.batch_size, model.config.block_size
            x, y = rt.to_device(*data.batch(split, Purpose.EVAL, EVAL_SEED, i, 0, B, T))
            with rt.autocast():
                of_batch[i] = model(x, y, with_logits=False)[1].item()
        losses[split] = math.fsum(rt.sum(of_batch)[: config.eval_iters]) / config.eval_iters
    model.train()
    return losses


# ---- The loop ---------------------------------------------------------------


def train(given: dict, rt: runtime.Runtime, stack: ExitStack) -> int:
    """Do what the keys that the user set, `given`, ask for. Returns the exit code. `stack` closes
    what must be closed, such as the log, however the run ends."""
    run = start.begin(Config, given, rt)
    config, data = run.config, run.data
    if config.datasets:
        about = {"model": str(run.source), "step": (run.checkpoint or {}).get("iter_num")}
        return run_evaluation(run.model, run.tokenizer_meta, about, config, rt)
    runtime.limit_threads(run.model.get_num_params(), config.batch_size * config.block_size)
    rt.print(
        f"{config.attn_type} ({start.choose_implementation(config, rt)}) on {rt.device}, "
        f"{rt.precision}, compile {'on' if rt.compile else 'off'}, {rt.world_size} rank(s); "
        f"{run.model.get_num_params():,} parameters, {start.tokens_per_step(config):,} tokens per "
        f"step, data set {data.name}"
    )
    # So far a signal has ended the process; from here on it is noticed once a step
    interrupt = stack.enter_context(runtime.Interrupt())
    if not config.eval_only:
        return loop(run, rt, interrupt, stack)
    losses = estimate_loss(rt.compiled(run.model), data, rt, config)
    rt.print(f"eval: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
    return interrupt.poll(rt)


def loop(
    run: start.Start, rt: runtime.Runtime, interrupt: runtime.Interrupt, stack: ExitStack
) -> int:
    """Evaluate, log, save and step until max_iters or a signal. Returns the exit code."""
    config, data, model = run.config, run.data, run.model
    n_matching, resumes = start.matching_steps(config), config.init_from == "resume"
    trainee = Trainee(model, run.teacher, rt)
    optimizer = new_optimizer(model, config, rt)
    scaler = torch.amp.GradScaler(rt.device_type, enabled=rt.dtype == "float16")
    step, best_val_loss, evaluated = 0, math.inf, -1  # updates done; step of the last evaluation
    if resumes:
        state = ckpt.resume(run.checkpoint, run.source, optimizer, scaler, rt)
        step, best_val_loss, evaluated = state
    folder, base = run_folder.prepare(run, rt)
    run.checkpoint = run.teacher = None  # free their memory
    log = stack.enter_context(closing(RunLog(folder, config, rt, step)))
    saver = ckpt.Saver(folder, log.say, step if resumes else None, rt)

    def load(step: int, micro_step: int) -> list[torch.Tensor]:
        key = "train", Purpose.TRAIN, config.seed, step, micro_step
        return rt.to_device(*data.batch(*key, config.batch_size, config.block_size))

    def due(interval: int) -> bool:
        return step % interval == 0 or step in (n_matching, config.max_iters)

    batches = Batches(load, rt.share(config.gradient_accumulation_steps), step, config.max_iters)
    if step >= config.max_iters and step == evaluated:
        keep = f" and --lr_decay_iters={start.schedule(config)[0]}" if config.decay_lr else ""
        log.say(f"{step} steps are done already; pass a larger --max_iters{keep} to go on")
    row, seconds, logged, skipped = {}, 0.0, step, 0  # since the row of step `logged`
    while True:
        # The exit code that a signal to any rank asks for, or 0
        stop = interrupt.poll(rt, wait=False)
        if trainee.matching and step >= n_matching:
            trainee.train_whole_model()
            optimizer = new_optimizer(model, config, rt)

        # Evaluate
        losses, save, is_best, best_before = {}, saver.is_due_again(), False, best_val_loss
        if due(config.eval_interval) and evaluated < step and not stop:
            losses = estimate_loss(trainee.whole_model, data, rt, config)
            evaluated, best_val_loss = step, min(best_val_loss, losses["val"])
            is_best = best_val_loss < best_before and (step > 0 or config.max_iters == 0)
            save |= is_best or step == config.max_iters
            save |= step > 0 and config.always_save_checkpoint

        # Log
        if losses:
            row |= {"val_loss": losses["val"], "eval_train_loss": losses["train"]}
        if losses or row and (due(config.log_interval) or due(config.eval_interval) or stop):
            if step > logged:
                row |= speed(model, config, rt, seconds, step - logged, "distill_loss" in row)
            log.write(step=step, tokens=step * start.tokens_per_step(config), **row)
            row, seconds, logged = {}, 0.0, step
        if config.stats_interval and due(config.stats_interval) and not stop:
            log.write_stats(step, lambda: ranges.measure(model, first_sequences(run, rt), rt))

        # Save
        if save or stop and saver.step != step:
            finite = all(sharding.held(w).isfinite().all() for w in model.parameters())
            if any(rt.sum([float(not finite)])):
                raise not_done(step + 1, "the weights are not finite", saver.step, folder, config)
            # With adapters, the weights under them are in base.pt
            is_saved = lambda name: not config.lora_rank or ".lora_" in name
            checkpoint = {
                "model": sharding.weights(model, rt, is_saved),
                "optimizer": sharding.whole(optimizer.state_dict(), rt),
                "optimizer_is_new": not optimizer.state,
                "model_args": model.config.model_args(),
                "iter_num": step,
                "best_val_loss": best_val_loss,
                "config": asdict(config),
                "tokenizer": data.tokenizer,
                "scaler": scaler.state_dict(),
                "data": run.fingerprint,
                "evaluated": evaluated,
                **({"base": base} if base else {}),
            }
            if not saver.save(checkpoint, is_best) and is_best:
                best_val_loss = best_before  # best.pt is still the checkpoint of that loss
        if stop or step >= config.max_iters:
            break

        # Step
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        layers.anneal(model, max(0, step - n_matching), config.anneal_iters)
        began = time.perf_counter()
        result = train_step(trainee.model, optimizer, scaler, batches, rt, config, step)
        loss, norm, updated = result
        seconds += time.perf_counter() - began
        if not updated:
            skipped += 1
            problem = f"loss {loss:.4g} and gradient norm {norm:.4g}"
            if skipped > config.skip_nonfinite:
                if not trainee.matching and not rt.shard:
                    problem += explain(model, load, step, config, rt)
                raise not_done(step + 1, problem, saver.step, folder, config)
            log.say(f"step {step + 1}: {problem}: skipped, {skipped} of {config.skip_nonfinite}")
        step += 1
        name = "distill_loss" if trainee.matching else "train_loss"
        row = {name: loss, "grad_norm": norm, "lr": lr}

    stop = stop or interrupt.poll(rt)  # during the last evaluation
    if stop:
        resume = f"--init_from=resume --out_dir={os.path.relpath(folder)}"
        log.say(f"stopped at step {step}; go on with  {resume}")
        return stop
    kept = resumes or (folder / ckpt.BEST).exists()
    note = "" if kept else " (at step 0, so there is no best.pt)"
    log.say(f"best val loss {best_val_loss:.4f}{note}; the run is in {os.path.relpath(folder)}")
    log.end(draw=config.plot and step >= PICTURES_FROM)
    return 1 if saver.failed else 0


def new_optimizer(model, config: Config, rt: runtime.Runtime) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    return model.configure_optimizers(
        config.weight_decay, config.learning_rate, betas, rt.device_type, config.optimizer
    )


def first_sequences(run: start.Start, rt: runtime.Runtime) -> torch.Tensor:
    """Token ids (B, T) of the first validation sequences that are evaluated, four at most."""
    B, T = min(run.config.batch_size, 4), run.config.block_size
    return rt.to_device(*run.data.batch("val", Purpose.EVAL, EVAL_SEED, 0, 0, B, T))[0]


def main() -> None:
    given = configurator.parse(Config, sys.argv[1:])
    config = Config(**given)
    start.check_dataset_is_named(sys.argv[1:], given, config)
    machine = config.device, config.dtype, config.compile, config.backend, config.shard == "full"
    with runtime.session(*machine) as rt, ExitStack() as stack:
        code = train(given, rt, stack)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    configurator.run(main)
