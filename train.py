"""
Train a GPT with any attention, on one process or under torchrun.

    python train.py config/train_11.py                            # 1 layer, 1 head, Gaussian kernel
    python train.py config/train_11.py --attn_type=SM --seed=1    # any value overridden
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py --init_from=resume --out_dir=OUT              # go on with the run in OUT
    python train.py --init_from=finetune --out_dir=OUT --attn_type=GKpoly-8
    python train.py eval_gpt2                                     # evaluate only

On several nodes, run on each of them, with the address of the first:

    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=HOST --master_port=29500 \\
        train.py config/train_gpt2.py
"""

import csv
import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import checkpoint as ckpt
import configurator
import runtime
from configurator import UserError
from dataset import DATA_DIR, EVAL, TRAIN, Dataset, dropout_seed
from model import GPT, GPTConfig, choose, parse_attn_type


@dataclass
class Config:
    # Run
    out_dir: str = "out"  # folder of the run: checkpoints, log.csv, config.json
    save_dir: str | None = None  # where finetune writes; auto: OUT_DIR-finetune-ATTN_TYPE
    init_from: str = "scratch"  # scratch, resume, finetune, gpt2[-medium|-large|-xl], a folder
    eval_only: bool = False  # evaluate once, write nothing, stop
    eval_interval: int = 2000  # steps between evaluations, each of which saves a checkpoint
    eval_iters: int = 200  # batches per evaluation and split, the same ones every time
    log_interval: int = 1  # steps between rows of the log
    always_save_checkpoint: bool = True  # False: save only if val loss improved, and at the end
    seed: int = 1337  # of weights, batches and dropout
    wandb_log: bool = False  # log to Weights & Biases too
    wandb_project: str = "gpt-attention"  # its project
    wandb_run_name: str | None = None  # its run name; auto: the name of the run's folder

    # Data
    dataset: str = "pydocs"  # a name in data/, see data/*/prepare.py
    data_dir: str | None = None  # folder that holds the data sets; auto: data/ beside this file
    gradient_accumulation_steps: int = 5 * 8  # micro-steps per step, shared among the ranks
    batch_size: int = 12  # sequences per micro-step
    block_size: int = 1024  # context length T

    # Model
    attn_type: str = "SM"  # SM, GK, GKpoly-n or PA_f; see README.md
    attn_impl: str = "auto"  # reference (the formula), blockwise or triton; auto: the fastest
    pa_length_power: float = 1.0  # PA_f is divided by block_size to this power
    n_layer: int = 12  # blocks
    n_head: int = 12  # heads per block
    n_embd: int = 768  # embedding width C
    dropout: float = 0.0  # 0 for pretraining; 0.1 or more where data are few
    bias: bool = False  # biases in Linear and LayerNorm

    # Optimizer: AdamW, with cosine decay after a linear warm-up
    learning_rate: float = 6e-4  # its maximum
    max_iters: int = 600000  # steps, i.e. updates of the weights
    weight_decay: float = 1e-1  # of matrices and embeddings
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    decay_lr: bool = True  # False: learning_rate all along
    warmup_iters: int = 2000  # steps of warm-up
    lr_decay_iters: int | None = None  # step at which min_lr is reached; auto: max_iters
    min_lr: float | None = None  # auto: learning_rate / 10

    # System
    device: str | None = None  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: str | None = None  # float32, bfloat16 or float16; auto: by the device
    compile: bool | None = None  # torch.compile; auto: on cuda only
    backend: str | None = None  # of torch.distributed; auto: nccl on cuda, gloo elsewhere


# What resume takes from the checkpoint and finetune and gpt2 from the weights they start with
ARCHITECTURE = ("n_layer", "n_head", "n_embd", "bias", "block_size")
# What belongs to a launch rather than to the run: never read from a checkpoint's config
PER_LAUNCH = set(
    "out_dir save_dir init_from eval_only data_dir device dtype compile backend attn_impl".split()
)

# ----------------------------------------------------------------------------
# Set-up


def read_config(argv: list[str]) -> tuple[Config, dict, dict | None]:
    """The configuration, the part of it that the user gave, and the checkpoint it starts from.

    resume and finetune go on with the settings of the run in out_dir: its config takes the place
    of the defaults above, and the user's values override both.
    """
    given = configurator.parse(Config, argv)
    config, source = Config(**given), None
    if config.init_from in ("resume", "finetune"):
        source = ckpt.load(Path(config.out_dir) / ckpt.LATEST)
        keys = {f.name for f in fields(Config)} - PER_LAUNCH
        saved = {k: v for k, v in source["config"].items() if k in keys}
        where = f"in the config of {config.out_dir}/{ckpt.LATEST}"
        for k, v in saved.items():
            saved[k] = configurator.convert(Config, k, v, f"{k}={v!r} {where}")
        config = Config(**{**saved, **given})
    check(config)
    return config, given, source


def check(config: Config) -> None:
    """Raise UserError for values that can't go together."""
    configurator.check_rules(asdict(config))
    try:
        parse_attn_type(config.attn_type)
    except ValueError as error:
        raise UserError(error) from error
    if config.n_embd % config.n_head:
        raise UserError(f"n_embd={config.n_embd} must be divisible by n_head={config.n_head}")
    if config.save_dir is not None and config.init_from != "finetune":
        raise UserError("save_dir is for --init_from=finetune; other runs write to out_dir")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if not config.eval_only and config.gradient_accumulation_steps % world_size:
        raise UserError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} can't be shared "
            f"among {world_size} ranks; pass a multiple of {world_size}"
        )


def open_data(config: Config, rt: runtime.Runtime) -> Dataset:
    """The data set; the embedded one is prepared on the spot when it is missing."""
    folder = Path(config.data_dir or DATA_DIR) / config.dataset
    if config.dataset == "pydocs" and rt.is_main:
        if not (folder / "meta.json").exists():
            script = DATA_DIR / "pydocs" / "prepare.py"
            prepared = subprocess.run([sys.executable, script, "--out", folder])
            if prepared.returncode:
                raise UserError(f"data set pydocs could not be prepared; try  python {script}")
    rt.barrier()
    return Dataset(config.dataset, config.data_dir)


def build_model(config: Config, given: dict, source: dict | None, data: Dataset) -> GPT:
    """The model that init_from asks for, on the CPU, checked against what the user gave."""
    if config.init_from == "scratch":
        # GPT-2's vocabulary is padded to a multiple of 64, which is faster
        data.check_length(config.block_size)
        vocab_size = 50304 if data.tokenizer == {"tokenizer": "gpt2"} else data.vocab_size
        shape = {key: getattr(config, key) for key in ARCHITECTURE}
        torch.manual_seed(config.seed)
        return GPT(GPTConfig(vocab_size=vocab_size, **shape, **overrides_of(config)))

    if source is not None:
        path = Path(config.out_dir) / ckpt.LATEST
        overrides = overrides_of(config)
        saved = ckpt.config_of(source, path)
        if config.init_from == "resume":
            for key in ("attn_type", "pa_length_power"):
                if key in given and given[key] != getattr(saved, key):
                    raise UserError(
                        f"{path} was trained with {key}={getattr(saved, key)}; to go on from its "
                        f"weights with {key}={given[key]}, use --init_from=finetune"
                    )
                overrides[key] = getattr(saved, key)
        if saved.pa_length is None:
            overrides["pa_length"] = given.get("block_size")  # L is what PA will be trained with
        model = ckpt.build_model(source, path, **overrides)
        known_as = source.get("tokenizer")
    else:
        path = config.init_from
        try:
            overrides = {**overrides_of(config), "pa_length": given.get("block_size")}
            model = GPT.from_pretrained(config.init_from, overrides)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{error}; init_from is scratch, resume, finetune, gpt2, gpt2-medium, gpt2-large, "
                "gpt2-xl, or the folder or hub name of such a model"
            ) from error
        known_as = {"tokenizer": "gpt2"}

    for key in ARCHITECTURE:
        has, asked = getattr(model.config, key), given.get(key)
        crops = key == "block_size" and config.init_from != "resume" and asked and asked <= has
        if asked not in (None, has) and not crops:
            raise UserError(f"{path} has {key}={has}, not {asked}; leave --{key} out")
    if given.get("block_size", model.config.block_size) < model.config.block_size:
        model.crop_block_size(given["block_size"])
    if known_as and data.tokenizer and known_as != data.tokenizer:
        raise UserError(
            f"data set {data.name} is not tokenized as {path} was; prepare it with that tokenizer, "
            "or choose another --dataset"
        )
    if data.vocab_size > model.config.vocab_size:
        raise UserError(
            f"data set {data.name} has vocab_size={data.vocab_size}, but {path} was trained with "
            f"{model.config.vocab_size}; choose another --dataset"
        )
    return model


def choose_impl(config: Config, rt: runtime.Runtime) -> str:
    """The implementation of the attention that will run. Raises UserError if it can't."""
    head_size, dtype = config.n_embd // config.n_head, getattr(torch, rt.dtype)
    try:
        return choose(
            *(config.attn_impl, config.attn_type, head_size, dtype, rt.device),
            dropout=config.dropout,
        )
    except ValueError as error:
        raise UserError(error) from error


def overrides_of(config: Config) -> dict:
    """The fields of GPTConfig that may differ from those of the weights a model starts with."""
    return {
        "attn_type": config.attn_type,
        "attn_impl": config.attn_impl,
        "pa_length_power": config.pa_length_power,
        "dropout": config.dropout,
    }


def prepare_folder(config: Config, rt: runtime.Runtime) -> Path:
    """The folder the run writes to. A run that is there already is moved aside, not overwritten."""
    source = folder = Path(config.out_dir).absolute()
    if config.init_from == "finetune":
        folder = source.with_name(f"{source.name}-finetune-{config.attn_type}")
        if config.save_dir is not None:
            folder = Path(config.save_dir).absolute()
        if source.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"save_dir={folder} holds the run to start from; choose another")
        rt.print(f"finetune of {config.out_dir}, written to {os.path.relpath(folder)}")
    if rt.is_main and config.init_from != "resume":
        move_aside(folder, rt)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder} can't be written ({error}); choose another folder"
            ) from error
    rt.barrier()
    return folder


def move_aside(folder: Path, rt: runtime.Runtime) -> None:
    """Rename a folder that holds a run to the first free of FOLDER.1, FOLDER.2, ..."""
    if (folder / ckpt.LATEST).exists() or (folder / "log.csv").exists():
        n = 1
        while (aside := folder.with_name(f"{folder.name}.{n}")).exists():
            n += 1
        folder.rename(aside)
        shown, where = os.path.relpath(folder), os.path.relpath(aside)
        rt.print(f"{shown} holds a run already: moved to {where}")


# ----------------------------------------------------------------------------
# One step


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up from learning_rate / (warmup_iters + 1), then a cosine down to min_lr."""
    if not config.decay_lr:
        return config.learning_rate
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    min_lr = config.learning_rate / 10 if config.min_lr is None else config.min_lr
    end = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    if step >= end:
        return min_lr
    progress = (step - config.warmup_iters) / (end - config.warmup_iters)  # 0..1
    return min_lr + (config.learning_rate - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def train_step(model, optimizer, scaler, get_batch, rt, config, step: int) -> torch.Tensor:
    """One update of the weights. `get_batch(step, micro_step)` gives inputs and targets (B, T).

    Returns the mean loss over this rank's micro-steps, a scalar that stays on the device.
    """
    micro_steps = rt.share(config.gradient_accumulation_steps)
    total = 0.0
    for micro_step in micro_steps:
        x, y = get_batch(step, micro_step)
        if config.dropout > 0:
            torch.manual_seed(dropout_seed(config.seed, step, micro_step))
        syncs = rt.world_size == 1 or micro_step == micro_steps[-1]
        with nullcontext() if syncs else model.no_sync():  # DDP averages gradients once a step
            with rt.autocast():
                _, loss = model(x, y, with_logits=False)
            scaler.scale(loss / len(micro_steps)).backward()
        total += loss.detach()
    if config.grad_clip > 0:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total / len(micro_steps)


@torch.no_grad()
def evaluate(model, data: Dataset, rt, config: Config) -> dict:
    """Mean loss on eval_iters fixed batches of each split; every rank takes its share of them."""
    model.eval()
    T = model.config.block_size
    losses = {}
    for split in data.tokens:
        mine = []
        for i in rt.share(config.eval_iters):
            x, y = rt.to_device(*data.batch(split, EVAL, config.seed, i, 0, config.batch_size, T))
            with rt.autocast():
                mine.append(model(x, y, with_logits=False)[1])
        total = rt.sum(sum(torch.stack(mine).tolist()) if mine else 0.0)
        losses[split] = total / config.eval_iters
    model.train()
    return losses


# ----------------------------------------------------------------------------
# The log


class RunLog:
    """log.csv, the terminal and wandb. Only the main process writes; for others it does nothing.

    A row of log.csv: step (updates done), tokens seen, train_loss of that step's batches (mean over
    micro-steps and ranks), val_loss and eval_train_loss where an evaluation was due, lr, step_ms,
    tokens_per_s and mfu (share of the GPU's peak) since the row before, and the seconds spent in
    training steps so far.
    """

    COLUMNS = (
        "step tokens train_loss val_loss eval_train_loss lr step_ms tokens_per_s mfu seconds"
    ).split()

    def __init__(self, folder: Path, config: Config, rt, first_step: int):
        self.active, self.seconds, self.wandb = rt.is_main, 0.0, None
        if not self.active:
            return
        rows = []
        if first_step > 0 and (folder / "log.csv").exists():  # keep what the checkpoint knows of
            with open(folder / "log.csv", newline="") as file, suppress(KeyError, ValueError):
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= first_step]
                self.seconds = float(rows[-1]["seconds"] or 0.0) if rows else 0.0
        self.file = open(folder / "log.csv", "w", newline="")
        self.csv = csv.DictWriter(self.file, self.COLUMNS, extrasaction="ignore")
        self.csv.writeheader()
        self.csv.writerows(rows)
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=config.max_iters, initial=first_step, unit="step", leave=True)
        if config.wandb_log:
            import wandb

            name = config.wandb_run_name or folder.name
            try:
                self.wandb = wandb.init(
                    project=config.wandb_project, name=name, config=asdict(config)
                )
            except Exception as error:  # not logged in, offline, ...: no reason not to train
                self.say(f"wandb is off: {error}")

    def say(self, line: str) -> None:
        if self.active and self.bar is not None:
            self.bar.write(line)
        elif self.active:
            print(line, flush=True)

    def write(self, **row) -> None:
        """Add a row; seconds are counted up from its step_ms."""
        if not self.active:
            return
        row["seconds"] = self.seconds = self.seconds + row.pop("window_seconds", 0.0)
        self.csv.writerow({k: f"{v:.6g}" if type(v) is float else v for k, v in row.items()})
        self.file.flush()
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        if "train_loss" in row:
            self._progress(row)
        if "val_loss" in row:
            losses = f"train loss {row['eval_train_loss']:.4f}, val loss {row['val_loss']:.4f}"
            self.say(f"step {row['step']}: {losses}")

    def _progress(self, row: dict) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {row['train_loss']:.3f}, {row['tokens_per_s']:,.0f} tok/s", refresh=False
            )
            self.bar.update(row["step"] - self.bar.n)
            return
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
        print(
            f"step {row['step']}: loss {row['train_loss']:.4f}, {row['step_ms']:.1f} ms/step, "
            f"{row['tokens_per_s']:,.0f} tokens/s, mfu {mfu}",
            flush=True,
        )

    def close(self) -> None:
        if self.active:
            self.file.close()
            if self.bar is not None:
                self.bar.close()
            if self.wandb:
                self.wandb.finish()


# ----------------------------------------------------------------------------
# The run


def main() -> None:
    config, given, source = read_config(sys.argv[1:])
    rt = runtime.start(config.device, config.dtype, config.compile, config.backend)
    data = open_data(config, rt)
    raw_model = build_model(config, given, source, data).to(rt.device)
    # From here on config tells what is, e.g. the architecture that a checkpoint brought along
    for key in (*ARCHITECTURE, "attn_type", "pa_length_power"):
        setattr(config, key, getattr(raw_model.config, key))
    B, T = config.batch_size, config.block_size
    data.check_length(T)
    model = rt.wrap(raw_model)
    eval_model = model.module if rt.world_size > 1 else model  # no gradients for DDP to sync
    tokens_per_step = config.gradient_accumulation_steps * B * T
    impl = choose_impl(config, rt)
    rt.print(
        f"{config.attn_type} ({impl}) on {rt.device}, {rt.dtype}, "
        f"compile {'on' if rt.compile else 'off'}, {rt.world_size} rank(s); "
        f"{raw_model.get_num_params():,} parameters, {tokens_per_step:,} tokens per step, "
        f"data set {data.name}"
    )
    if config.eval_only:
        losses = evaluate(eval_model, data, rt, config)
        rt.print(f"eval: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        rt.close()
        return

    optimizer = raw_model.configure_optimizers(
        config.weight_decay, config.learning_rate, (config.beta1, config.beta2), rt.device_type
    )
    scaler = torch.amp.GradScaler(rt.device_type, enabled=rt.dtype == "float16")
    first_step, best_val_loss = 0, math.inf
    if config.init_from == "resume":
        path = Path(config.out_dir) / ckpt.LATEST
        first_step, best_val_loss = ckpt.restore(source, path, optimizer, scaler)
    del source

    folder = prepare_folder(config, rt)
    if rt.is_main:
        found = {"device": rt.device, "dtype": rt.dtype, "compile": rt.compile}
        found |= {"world_size": rt.world_size, "torch": torch.__version__}
        text = json.dumps({**asdict(config), "found": found}, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    log = RunLog(folder, config, rt, first_step)

    def get_batch(step, micro_step):
        return rt.to_device(*data.batch("train", TRAIN, config.seed, step, micro_step, B, T))

    def save(step, is_best):
        checkpoint = {
            "model": raw_model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "model_args": raw_model.config.model_args(),
            "iter_num": step,
            "best_val_loss": best_val_loss,
            "config": asdict(config),
            "tokenizer": data.tokenizer,
            "scaler": scaler.state_dict(),
        }
        ckpt.save(checkpoint, folder, is_best)

    if first_step == 0:
        losses = evaluate(eval_model, data, rt, config)
        log.write(step=0, tokens=0, val_loss=losses["val"], eval_train_loss=losses["train"])
        best_val_loss = losses["val"]
        if config.max_iters == 0 and rt.is_main:  # e.g. to keep what gpt2 starts from
            save(0, is_best=True)
    elif first_step >= config.max_iters:
        log.say(f"{first_step} steps are done already; pass a larger --max_iters to go on")

    logged_step, started = first_step, time.perf_counter()
    for step in range(first_step + 1, config.max_iters + 1):
        lr = learning_rate(step - 1, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = train_step(model, optimizer, scaler, get_batch, rt, config, step - 1)

        evaluates = step % config.eval_interval == 0 or step == config.max_iters
        if not evaluates and step % config.log_interval:
            continue
        train_loss = rt.sum(loss) / rt.world_size  # waits for the device, so the clock is right
        window = time.perf_counter() - started
        per_step = window / (step - logged_step)
        sequences = config.gradient_accumulation_steps * B // rt.world_size
        row = {
            "step": step,
            "tokens": step * tokens_per_step,
            "train_loss": train_loss,
            "lr": lr,
            "step_ms": 1000 * per_step,
            "tokens_per_s": tokens_per_step / per_step,
            "mfu": raw_model.estimate_mfu(sequences, per_step, T),
            "window_seconds": window,
        }
        if evaluates:
            losses = evaluate(eval_model, data, rt, config)
            row |= {"val_loss": losses["val"], "eval_train_loss": losses["train"]}
        log.write(**row)
        if not math.isfinite(train_loss + row.get("val_loss", 0.0)):
            raise UserError(
                f"the loss is no longer finite at step {step}; the checkpoint before it is kept in "
                f"{folder}: resume or start again with a lower --learning_rate"
                + (", or more squarings n" if config.attn_type.startswith("GKpoly") else "")
            )
        if evaluates and rt.is_main:
            improved = losses["val"] < best_val_loss
            best_val_loss = min(best_val_loss, losses["val"])
            if improved or config.always_save_checkpoint or step == config.max_iters:
                save(step, improved)
        logged_step, started = step, time.perf_counter()

    log.say(f"best val loss {best_val_loss:.4f}; the run is in {os.path.relpath(folder)}")
    log.close()
    rt.close()


if __name__ == "__main__":
    configurator.run(main)
