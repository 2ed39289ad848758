"""
Train a GPT with any attention, on one process or under torchrun.

    python train.py config/train_11.py                            # 1 layer, 1 head, Gaussian kernel
    python train.py config/train_11.py --attn_type=SM --seed=1    # any value overridden
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py --init_from=resume --out_dir=OUT              # go on with the run in OUT
    python train.py --init_from=finetune --out_dir=OUT --attn_type=GKpoly-8
    python train.py --init_from=distill --teacher=OUT --attn_type=GK    # match its attention first
    python train.py eval_gpt2                                     # evaluate only

On several nodes, run on each of them, with the address of one; a rank that dies is restarted, and
the run goes on from its last checkpoint, whatever init_from says:

    torchrun --nnodes=2 --nproc_per_node=8 --max-restarts=3 --rdzv-backend=c10d \\
        --rdzv-endpoint=HOST:29500 --rdzv-id=NAME train.py config/train_gpt2.py

SIGTERM and Ctrl-C save within a step and end the run with exit code 143 or 130.
"""

import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch

import configurator
import evaluate
from configurator import UserError
from data.dataset import EVAL_SEED, Dataset, Purpose, dropout_seed
from data.meta import DATA_DIR
from data.tokenizer import meta_of_folder
from engine import checkpoint as ckpt
from engine import ranges, runtime
from engine.distill import Matching
from engine.divergence import where_it_began
from engine.runlog import RunLog
from model import GPT, GPTConfig, choose


@dataclass
class Config:
    # Run
    out_dir: str = "out"  # folder of the run: checkpoints, log.csv, config.json, pictures
    save_dir: str | None = None  # where finetune writes; auto: OUT_DIR-finetune-ATTN_TYPE
    init_from: str = "scratch"  # scratch, resume, finetune, distill, gpt2[-medium|...], a folder
    eval_only: bool = False  # evaluate once and stop
    datasets: str | None = None  # then, on all of these, a,b,c, in place of eval_iters batches
    eval_stride: int | None = None  # tokens from window to window of theirs; auto: block_size / 2
    eval_interval: int = 2000  # steps between evaluations, each of which saves a checkpoint
    eval_iters: int = 200  # batches per evaluation and split, the same ones every time
    log_interval: int = 1  # steps between rows of the log
    always_save_checkpoint: bool = True  # False: save only if val loss improved, and at the end
    seed: int = 1337  # of weights, batches and dropout
    allow_mismatch: bool = False  # resume with other data, schedule or batches than the run had
    skip_nonfinite: int = 0  # steps with an infinite loss or gradient to pass over before stopping
    stats_interval: int = 0  # steps between rows of stats.csv: scores, weights; 0: none
    stats_tolerance: float = 1e-2  # error of GKpoly-n against exp for which the log's end finds n
    plot: bool = True  # pictures in out_dir at the end of a run of 100 steps or more
    tensorboard_log: bool = False  # log to OUT_DIR/tensorboard too
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

    # Adapters (LoRA): trained instead of the weights, which are frozen
    lora_rank: int = 0  # their rank; 0: none
    lora_alpha: float = 16.0  # they are scaled by lora_alpha / lora_rank
    lora_targets: str = "attn.c_attn,attn.c_proj"  # of these, mlp.c_fc and mlp.c_proj, any

    # Conversion (init_from=distill): first attention by attention, then end to end
    teacher: str | None = None  # folder of a run, gpt2[-medium|-large|-xl], a folder or hub name
    distill_iters: int | None = None  # steps of the first kind; auto: half of max_iters

    # Optimizer, with a linear warm-up
    optimizer: str = "adamw"  # adamw, or muon: that for the blocks' matrices, AdamW for the rest
    learning_rate: float = 6e-4  # its maximum
    max_iters: int = 600000  # steps, i.e. updates of the weights
    weight_decay: float = 1e-1  # of matrices and embeddings
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    decay_lr: bool = True  # False: learning_rate all along
    lr_schedule: str = "cosine"  # or wsd: constant, then a linear decay in the last fifth
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
# What a resumed run can't change, while a finetune may
KEPT = ("attn_type", "pa_length_power", "lora_rank", "lora_alpha", "lora_targets")
# Of GPTConfig: a teacher has no dropout, and its adapters are part of its weights
AS_TEACHER = {"dropout": 0.0, "lora_rank": 0}
# What belongs to a launch rather than to the run: never read from a checkpoint's config
PER_LAUNCH = set(
    "out_dir save_dir init_from eval_only datasets eval_stride data_dir device dtype compile "
    "backend attn_impl allow_mismatch skip_nonfinite".split()
)
# What a resumed run must share with the one before to end where that would have ended
TRAJECTORY = (
    "seed dataset gradient_accumulation_steps batch_size dropout optimizer learning_rate "
    "weight_decay beta1 beta2 grad_clip decay_lr lr_schedule warmup_iters lr_decay_iters min_lr "
    "teacher distill_iters"
).split()
# What does nothing without another key
NEEDS = {"lora_alpha": "lora_rank", "lora_targets": "lora_rank"}
NEEDS |= {"distill_iters": "teacher", "eval_stride": "datasets"}
DRAWN_FROM = 100  # steps: pictures take two seconds, which shorter runs should not

# ----------------------------------------------------------------------------
# Set-up


def read_config(given: dict, rt: runtime.Runtime) -> tuple[Config, dict | None, Path | None]:
    """The configuration, and the checkpoint it starts from with its path.

    resume and finetune go on with the settings of the run in out_dir, distill with those of the
    teacher's: its config takes the place of the defaults above, and what the user gave overrides
    both. Only the main process reads the checkpoint; the others get it without its tensors.
    """
    config = Config(**given)
    check(config)
    folder = Path(config.teacher if config.init_from == "distill" else config.out_dir)
    if config.init_from == "distill":
        if not rt.from_main(lambda: holds_checkpoint(folder)):
            return config, None, None
    elif config.init_from not in ("resume", "finetune"):
        return config, None, None
    loaded = []

    def read():
        source, path, trouble = ckpt.load_newest(folder)
        if trouble:
            rt.print(trouble)
        loaded.append(source)
        return {k: v for k, v in source.items() if k not in ("model", "optimizer")}, path

    source, path = rt.from_main(read)
    source = loaded[0] if loaded else source
    keys = {f.name for f in fields(Config)} - PER_LAUNCH
    if config.init_from != "resume":
        keys -= {"teacher", "distill_iters"}
    described = {**source["config"], **source["model_args"]}  # the latter are the truth
    saved = {k: v for k, v in described.items() if k in keys}
    for k, v in saved.items():
        saved[k] = configurator.convert(Config, k, v, f"{k}={v!r} in the config of {path}")
    config = Config(**{**saved, **given})
    check(config)
    if config.init_from == "resume" and not (config.allow_mismatch or config.eval_only):
        check_trajectory(Config(**saved), config, path)
    return config, source, path


def check_trajectory(old: Config, new: Config, path: Path) -> None:
    """Raise UserError if a resumed run would not go on as the run in `path` did."""
    before, after = (
        asdict(config) | dict(zip(("lr_decay_iters", "min_lr"), schedule(config), strict=True))
        for config in (old, new)
    )
    changed = [key for key in TRAJECTORY if before[key] != after[key]]
    if changed:
        values = ", ".join(f"{key}={before[key]}, not {after[key]}" for key in changed)
        repair = "leave out what changes it"
        if changed == ["lr_decay_iters"] and new.lr_decay_iters is None:
            repair = f"--max_iters moves it: pass --lr_decay_iters={before['lr_decay_iters']}"
        raise UserError(f"{path} has {values}; {repair}, or pass --allow_mismatch=True")


def check_data(source: dict, fingerprint: dict, path: Path, name: str) -> None:
    """Raise UserError if the data of the run in `path` have changed since."""
    changed = [s for s, sha in source["data"].items() if fingerprint.get(s) != sha]
    if changed:
        raise UserError(
            f"{changed[0]}.bin of data set {name} is not what {path} was trained on; put that file "
            "back, or pass --allow_mismatch=True"
        )


def check_same_everywhere(data: Dataset, rt: runtime.Runtime) -> None:
    """Raise UserError on all ranks unless each has the same files."""
    known, here = rt.from_main(data.fingerprint), None
    with suppress(UserError):
        here = known if rt.is_main else data.fingerprint()
    if any(rt.gather("" if here == known else "other")):
        raise UserError(f"data set {data.name} is not the same on all nodes; copy it from one")


def saved_by_this_launch(folder: Path, rt: runtime.Runtime) -> bool:
    """Whether `folder` holds a checkpoint of this torchrun, made before it started us again."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["found"]
    except (OSError, ValueError, KeyError):
        return False
    return holds_checkpoint(folder) and found.get("launch") == rt.launch


def holds_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in (ckpt.LATEST, ckpt.PREVIOUS))


def check(config: Config) -> None:
    """Raise UserError for values that can't be, or can't go together."""
    configurator.check_rules(asdict(config))
    try:
        GPTConfig(**{key: getattr(config, key) for key in ARCHITECTURE}, **overrides_of(config))
    except ValueError as error:
        raise UserError(error) from error
    for key in ("out_dir", "save_dir"):
        folder = getattr(config, key)
        if folder is not None and Path.cwd().resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(
                f"{key}={folder!r} is the current folder, or around it; give a run one of its own"
            )
    if config.datasets is not None and not (config.eval_only and config.init_from != "scratch"):
        told = "datasets are for the evaluation of what was trained"
        raise UserError(f"{told}: python train.py EVAL --out_dir=OUT --datasets={config.datasets}")
    if (config.init_from == "distill") > (config.teacher is not None):
        raise UserError("init_from=distill needs a teacher: pass --teacher=OUT, or =gpt2")
    if config.teacher is not None and config.init_from not in ("distill", "resume"):
        raise UserError("teacher is for --init_from=distill")
    if config.save_dir is not None and config.init_from != "finetune":
        raise UserError("save_dir is for --init_from=finetune; other runs write to out_dir")
    begins = config.init_from != "resume"  # what was trained so, nanoGPT's say, may go on so
    if begins and config.decay_lr and (config.min_lr or 0) > config.learning_rate:
        told = f"min_lr={config.min_lr} is above learning_rate={config.learning_rate}"
        raise UserError(f"{told}; pass a lower one, or --min_lr=none for a tenth of it")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if not config.eval_only and config.gradient_accumulation_steps % world_size:
        raise UserError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} can't be shared "
            f"among {world_size} ranks; pass a multiple of {world_size}"
        )


def open_data(config: Config, rt: runtime.Runtime) -> Dataset:
    """The data set; the embedded one is prepared on the spot when it is missing."""
    folder = Path(config.data_dir or DATA_DIR) / config.dataset
    if config.dataset == "pydocs" and rt.local_rank == 0:
        if not (folder / "meta.json").exists():
            script = DATA_DIR / "pydocs" / "prepare.py"
            prepared = subprocess.run([sys.executable, script, "--out", folder])
            if prepared.returncode:
                raise UserError(f"data set pydocs could not be prepared; try  python {script}")
    rt.barrier()
    return Dataset(config.dataset, config.data_dir)


def new_model(config: Config, data: Dataset) -> GPT:
    """A model from scratch, for the data."""
    data.check_length(config.block_size)
    # GPT-2's vocabulary is padded to a multiple of 64, which is faster
    vocab_size = 50304 if data.tokenizer == {"tokenizer": "gpt2"} else data.vocab_size
    shape = {key: getattr(config, key) for key in ARCHITECTURE}
    torch.manual_seed(config.seed)
    return GPT(GPTConfig(vocab_size=vocab_size, **shape, **overrides_of(config)))


def load_model(
    config: Config, given: dict, source: dict | None, path: Path | None
) -> tuple[GPT, dict | None, object]:
    """The model that init_from names (of distill the teacher), on the CPU, checked against what the
    user gave; its tokenizer, if that is known, and where it came from.

    Where `source`, the checkpoint of `path`, came without tensors, the weights are anything yet.
    """
    if source is not None:
        overrides = overrides_of(config)
        saved = ckpt.config_of(source, path)
        if config.init_from == "resume":
            for key in KEPT:
                if key in given and given[key] != getattr(saved, key):
                    raise UserError(
                        f"{path} was trained with {key}={getattr(saved, key)}; to go on from its "
                        f"weights with {key}={given[key]}, use --init_from=finetune"
                    )
                del overrides[key]
        elif config.init_from == "distill":
            overrides = AS_TEACHER
        elif saved.pa_length is None:
            overrides["pa_length"] = given.get("block_size")  # L is what PA will be trained with
        torch.manual_seed(config.seed)
        model = ckpt.build_model(source, path, **overrides)
        known_as = source.get("tokenizer")
    else:
        path = config.init_from
        overrides = {k: v for k, v in overrides_of(config).items() if k in given}
        if config.init_from == "distill":
            path, overrides = config.teacher, AS_TEACHER
        try:
            torch.manual_seed(config.seed)  # of adapters
            model = GPT.from_pretrained(path, overrides, given.get("block_size"))
        except (OSError, ValueError) as error:
            if config.init_from == "distill":
                told = f"teacher={path} has no checkpoint and is no GPT-2 ({error})"
                raise UserError(f"{told}; train it first, or pass --teacher=gpt2") from error
            raise UserError(
                f"{error}; init_from is scratch, resume, finetune, distill, gpt2, gpt2-medium, "
                "gpt2-large, gpt2-xl, or the folder or hub name of such a model"
            ) from error
        known_as = meta_of_folder(path)

    for key in ARCHITECTURE:
        has, asked = getattr(model.config, key), given.get(key)
        crops = key == "block_size" and config.init_from != "resume" and asked and asked <= has
        if asked not in (None, has) and not crops:
            raise UserError(f"{path} has {key}={has}, not {asked}; leave --{key} out")
    if given.get("block_size", model.config.block_size) < model.config.block_size:
        model.crop_block_size(given["block_size"])
    return model, known_as, path


def student_of(teacher: GPT, config: Config, given: dict) -> GPT:
    """The teacher's weights, with the attention that the user wants."""
    start = {"model": teacher.state_dict(), "model_args": teacher.config.model_args()}
    overrides = {**overrides_of(config), "pa_length": given.get("block_size")}
    torch.manual_seed(config.seed)  # of adapters
    return ckpt.build_model(start, Path(config.teacher), **overrides)


def load_teacher(folder: Path, base: dict, rt: runtime.Runtime) -> GPT:
    """The teacher of the run in `folder`, from its base.pt, which the main process reads."""
    loaded = []

    def read():
        loaded.append(ckpt.load_base(folder, base))
        return {"model_args": loaded[0]["model_args"]}

    args = rt.from_main(read)
    teacher = ckpt.build_model(loaded[0] if loaded else args, folder / ckpt.BASE).to(rt.device)
    rt.broadcast(list(teacher.state_dict().values()))
    return teacher


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
    return {key: getattr(config, key) for key in (*KEPT, "attn_impl", "dropout")}


def run_folder(config: Config) -> Path:
    """The folder that the run writes to. A finetune has one of its own."""
    source = Path(config.out_dir).absolute()
    if config.init_from == "distill" and Path(config.teacher).resolve().is_relative_to(
        source.resolve()
    ):
        raise UserError(f"out_dir={config.out_dir} holds the teacher; choose another")
    if config.init_from != "finetune":
        return source
    folder = source.with_name(f"{source.name}-finetune-{config.attn_type}")
    if config.save_dir is not None:
        folder = Path(config.save_dir).absolute()
    if source.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"save_dir={folder} holds the run to start from; choose another")
    return folder


def prepare_folder(
    config: Config, source_path: Path | None, fingerprint: dict, rt: runtime.Runtime
) -> Path:
    """Make the folder of the run and write config.json. A run that is there already is moved aside,
    and so is the damaged checkpoint of a run that goes on from the one before."""
    folder = run_folder(config)
    if config.init_from == "finetune":
        rt.print(f"finetune of {config.out_dir}, written to {os.path.relpath(folder)}")

    def prepare():
        try:
            if config.init_from != "resume":
                move_aside(folder, rt)
            elif source_path.name != ckpt.LATEST and (latest := folder / ckpt.LATEST).exists():
                os.replace(latest, folder / f"{ckpt.LATEST}.damaged")
            folder.mkdir(parents=True, exist_ok=True)
            found = {"device": rt.device, "dtype": rt.dtype, "compile": rt.compile}
            found |= {"world_size": rt.world_size, "torch": torch.__version__, "launch": rt.launch}
            found |= {"device_name": rt.device_name(), "data": fingerprint, "commit": commit()}
            text = json.dumps({**asdict(config), "found": found}, indent=2)
            temporary = folder / "config.json.tmp"
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, folder / "config.json")
        except OSError as error:
            raise UserError(
                f"{folder} can't be written ({error.strerror}); choose another folder, or make room"
            ) from error

    rt.from_main(prepare)
    return folder


def commit() -> str | None:
    """The commit of this code, if git knows it."""
    with suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", configurator.ROOT, "describe", "--always", "--dirty"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return None


def write_base(model: GPT, config: Config, source_path: Path | None, folder: Path) -> dict:
    """Save the teacher, or what adapters are for; see checkpoint.save_base."""
    came_from = source_path or (config.teacher if config.teacher else config.init_from)
    try:
        return ckpt.save_base(model, str(came_from), folder)
    except OSError as error:
        told = f"{folder / ckpt.BASE} can't be written ({error.strerror}); make room"
        raise UserError(told) from error


def move_aside(folder: Path, rt: runtime.Runtime) -> None:
    """Rename a folder that holds a run to the first free of FOLDER.1, FOLDER.2, ..."""
    if holds_checkpoint(folder) or (folder / "log.csv").exists():
        n = 1
        while (aside := folder.with_name(f"{folder.name}.{n}")).exists():
            n += 1
        folder.rename(aside)
        shown, where = os.path.relpath(folder), os.path.relpath(aside)
        rt.print(f"{shown} holds a run already: moved to {where}")


def pictures(folder: Path) -> list[Path]:
    """Draw the run in `folder`; the pictures' paths. There are none without matplotlib."""
    with suppress(ImportError):
        import plot  # here, as matplotlib takes a second

        return plot.of_run(Path(os.path.relpath(folder)))
    return []


# ----------------------------------------------------------------------------
# One step


def schedule(config: Config) -> tuple[int, float]:
    """lr_decay_iters and min_lr, what `auto` means filled in."""
    if not config.decay_lr:
        return 0, config.learning_rate
    end = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    return end, config.learning_rate / 10 if config.min_lr is None else config.min_lr


def tokens_per_step(config: Config) -> int:
    return config.gradient_accumulation_steps * config.batch_size * config.block_size


def matching_steps(config: Config) -> int:
    """How many of the steps match the teacher's attention, before those end to end."""
    if config.teacher is None:
        return 0
    return config.max_iters // 2 if config.distill_iters is None else config.distill_iters


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up from learning_rate / (warmup_iters + 1), then a cosine down to min_lr; or wsd
    (warm-up, stable, decay): learning_rate, and a straight line in the last fifth."""
    end, min_lr = schedule(config)
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


def new_optimizer(model: GPT, config: Config, rt: runtime.Runtime) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    return model.configure_optimizers(
        config.weight_decay, config.learning_rate, betas, rt.device_type, config.optimizer
    )


class Batches:
    """The batches of this rank, one step after the other, each loaded while the device is busy.

    `load(step, micro_step)` gives inputs and targets (B, T) on the device. `next` is the batch to
    use now; `advance`, called when the device has been given work, loads the one after it.
    """

    def __init__(self, load: Callable, micro_steps: range, first_step: int, last_step: int):
        self.load = load
        self.order = ((s, m) for s in range(first_step, last_step) for m in micro_steps)
        self.advance()

    def advance(self) -> None:
        key = next(self.order, None)
        self.next = None if key is None else self.load(*key)


def train_step(
    model, optimizer, scaler, batches: Batches, rt, config: Config, step: int, interrupt=None
) -> tuple[float, float, bool, list[float]]:
    """One update of the weights, unless the loss or the gradient is not finite.

    Returns the loss, a mean over micro-steps and ranks, the norm of the gradient, whether the
    weights were updated, and how many ranks got SIGTERM and SIGINT.
    """
    micro_steps = rt.share(config.gradient_accumulation_steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Two halves, summed apart, make one process end bit for bit where two ranks would have
    half = len(micro_steps) // 2 if rt.world_size == 1 and len(micro_steps) % 2 == 0 else 0
    first_half = None
    total = 0.0
    for i, micro_step in enumerate(micro_steps):
        x, y = batches.next
        if config.dropout > 0:
            torch.manual_seed(dropout_seed(config.seed, step, micro_step))
        if i == half > 1:
            first_half = [p.grad for p in parameters]
            optimizer.zero_grad(set_to_none=True)
        syncs = rt.world_size == 1 or micro_step == micro_steps[-1]
        with nullcontext() if syncs else model.no_sync():  # DDP averages gradients once a step
            with rt.autocast():
                _, loss = model(x, y, with_logits=False)
            scaler.scale(loss / len(micro_steps)).backward()
        total += loss.detach()
        batches.advance()
    for p, grad in zip(parameters, first_half or (), strict=False):
        p.grad.add_(grad)

    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
    signals = interrupt.counts() if interrupt else [0.0, 0.0]
    state = torch.stack([total / len(micro_steps), norm.to(total.device)])
    loss, norm, *signals = rt.sum(torch.cat([state, state.new_tensor(signals)]))
    loss, norm = loss / rt.world_size, norm / rt.world_size
    # With float16 a gradient that overflows is no event: the scaler skips the step and scales less
    overflow = scaler.is_enabled() and scaler.get_scale() > 1
    updated = math.isfinite(loss) and (math.isfinite(norm) or overflow)
    if updated:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, updated, signals


@torch.no_grad()
def estimate_loss(
    model, data: Dataset, rt, config: Config, interrupt=None
) -> tuple[dict, list[float]]:
    """Mean loss on eval_iters batches of each split, the same for every seed, shared among the
    ranks, and how many of them got SIGTERM and SIGINT; then the losses are not whole."""
    model.eval()
    B, T = config.batch_size, model.config.block_size
    n = config.eval_iters
    losses = torch.zeros(len(data.tokens), n, dtype=torch.float64)
    for s, split in enumerate(data.tokens):
        for i in rt.share(n):
            if interrupt and interrupt.signal:
                break
            x, y = rt.to_device(*data.batch(split, Purpose.EVAL, EVAL_SEED, i, 0, B, T))
            with rt.autocast():
                losses[s, i] = model(x, y, with_logits=False)[1].item()
    model.train()
    signals = interrupt.counts() if interrupt else [0.0, 0.0]
    # Each rank has zeros where others have losses, so that sums are the same for any number of them
    *losses, terminate, interrupted = rt.sum([*losses.flatten().tolist(), *signals])
    means = {s: math.fsum(losses[i * n : (i + 1) * n]) / n for i, s in enumerate(data.tokens)}
    return means, [terminate, interrupted]


# ----------------------------------------------------------------------------
# The run


def main() -> None:
    given = configurator.parse(Config, sys.argv[1:])
    config = Config(**given)
    check(config)
    with ExitStack() as stack:
        rt = runtime.start(config.device, config.dtype, config.compile, config.backend)
        stack.callback(rt.close)
        runtime.keep_freed_memory(rt.device_type)
        try:
            code = train(given, rt)
        except UserError as error:
            traceback.clear_frames(error.__traceback__)  # DDP must end before its process group
            raise
        except (MemoryError, RuntimeError) as error:
            traceback.clear_frames(error.__traceback__)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            known = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if known or "can't allocate memory" in reason:
                repair = "halve --batch_size and double --gradient_accumulation_steps"
                raise UserError(f"out of memory ({reason}); {repair}", this_rank=True) from error
            if rt.world_size == 1 or not runtime.lost_rank(error):
                raise
            print(f"rank {rt.rank}: another rank is gone ({reason[:160]})", file=sys.stderr)
            code = 1
    if code:
        sys.exit(code)


def train(given: dict, rt: runtime.Runtime) -> int:
    """All that the user asked for; returns the exit code."""
    config, source, source_path = read_config(given, rt)
    (restarts,) = rt.sum([float(rt.restarts)])  # not every node must have counted the same
    if restarts and rt.from_main(lambda: saved_by_this_launch(run_folder(config), rt)):
        given = {**given, "init_from": "resume", "out_dir": str(run_folder(config))}
        given.pop("save_dir", None)
        config, source, source_path = read_config(given, rt)
        rt.print(f"restarted: going on with {os.path.relpath(config.out_dir)}")
    for key, other in NEEDS.items():
        if given.get(key) is not None and not getattr(config, other):
            raise UserError(f"{key}={given[key]} does nothing without --{other}; leave it out")
    data = None if config.datasets else open_data(config, rt)
    if data and rt.world_size > 1:
        check_same_everywhere(data, rt)
    if config.init_from == "scratch":
        raw_model = new_model(config, data)
    else:
        raw_model, known_as, where = load_model(config, given, source, source_path)
        if data:
            data.check_model(raw_model.config.vocab_size, known_as, where)
    teacher = raw_model if config.init_from == "distill" else None
    raw_model.to(rt.device)
    rt.broadcast(list(raw_model.state_dict().values()))
    if teacher:
        run_folder(config)  # refuses the teacher's
        raw_model = student_of(teacher, config, given).to(rt.device)
    # From here on config tells what is, e.g. the architecture that a checkpoint brought along
    for key in (*ARCHITECTURE, *KEPT):
        setattr(config, key, getattr(raw_model.config, key))
    config.distill_iters = matching_steps(config) if config.teacher else None
    if config.datasets:
        step = source.get("iter_num") if source else None
        return evaluate.run(raw_model, known_as, {"model": str(where), "step": step}, config, rt)

    data.check_length(config.block_size)
    impl = choose_impl(config, rt)
    rt.print(
        f"{config.attn_type} ({impl}) on {rt.device}, {rt.dtype}, "
        f"compile {'on' if rt.compile else 'off'}, {rt.world_size} rank(s); "
        f"{raw_model.get_num_params():,} parameters, {tokens_per_step(config):,} tokens per step, "
        f"data set {data.name}"
    )
    # Until here a signal ends the process, from here on it waits for the end of a step
    with runtime.Interrupt() as interrupt:
        if config.eval_only:
            losses, signals = estimate_loss(rt.compiled(raw_model), data, rt, config, interrupt)
            if not any(signals):
                rt.print(f"eval: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
            return exit_code(signals)
        run = Run(config, rt, data, raw_model, teacher, source, source_path, interrupt)
        source = teacher = None  # frees their memory, the teacher's when its time is over
        with closing(run.log):
            return run.to_the_end()


class Run:
    """A run: all that a checkpoint holds, and the loop that changes it.

    `step` counts the updates done, `evaluated` is the step that was evaluated last. `signals`, how
    many ranks got SIGTERM and SIGINT, ends it.
    """

    def __init__(self, config, rt, data, raw_model, teacher, source, source_path, interrupt):
        self.config, self.rt, self.data, self.raw_model = config, rt, data, raw_model
        self.interrupt, self.signals = interrupt, [0.0, 0.0]
        self.step, self.best_val_loss, self.evaluated = 0, math.inf, -1
        self.fingerprint, self.base = rt.from_main(data.fingerprint), None
        self.n_matching = matching_steps(config)
        if resumes := config.init_from == "resume":
            if not config.allow_mismatch:
                check_data(source, self.fingerprint, source_path, data.name)
            self.step, self.base = source.get("iter_num", 0), source.get("base")
            if self.step < self.n_matching:
                teacher = load_teacher(source_path.parent, self.base, rt)
        matches = self.step < self.n_matching
        self.matching = Matching(raw_model, teacher).to(rt.device) if matches else None
        self.optimizer = new_optimizer(raw_model, config, rt)
        self.scaler = torch.amp.GradScaler(rt.device_type, enabled=rt.dtype == "float16")
        if resumes:
            state = self.optimizer, self.scaler
            self.step, self.best_val_loss = rt.from_main(
                lambda: ckpt.restore(source, source_path, *state)
            )
            ckpt.share_state(*state, rt)
            self.evaluated = self.step if source.get("evaluated", self.step) == self.step else -1

        self.folder = prepare_folder(config, source_path, self.fingerprint, rt)
        if not resumes and (teacher or config.lora_rank):
            self.base = rt.from_main(
                lambda: write_base(teacher or raw_model, config, source_path, self.folder)
            )
        self.eval_model = rt.compiled(raw_model)  # not under DDP: there are no gradients to sync
        self.model = rt.wrap(rt.compiled(self.matching) if self.matching else self.eval_model)
        self.log = RunLog(self.folder, config, rt, self.step)
        self.saver = ckpt.Saver(self.folder, self.log.say, self.step if resumes else None)

    def to_the_end(self) -> int:
        """Train until max_iters or a signal. Returns the exit code."""
        config, log = self.config, self.log
        if self.step >= config.max_iters and self.step == self.evaluated:
            log.say(f"{self.step} steps are done already; pass a larger --max_iters to go on")
        batches = Batches(self.load, self.micro_steps(), self.step, config.max_iters)
        row, logged, seconds, skipped = {}, self.step, 0.0, 0
        while True:
            if self.matching and self.step >= self.n_matching:
                self.begin_end_to_end()
            self.evaluate_log_save(row)
            row = {}
            if any(self.signals) or self.step >= config.max_iters:
                break
            lr = learning_rate(self.step, config)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            started = time.perf_counter()
            loss, norm, updated, self.signals = train_step(
                *(self.model, self.optimizer, self.scaler, batches, self.rt, config, self.step),
                self.interrupt,
            )
            seconds += time.perf_counter() - started
            if not updated:
                skipped += 1
                self.skip(loss, norm, skipped)
            self.step += 1
            due = self.due(config.log_interval) or self.due(config.eval_interval)
            if due or any(self.signals):  # or else the seconds since the last row were lost
                row = {"distill_loss" if self.matching else "train_loss": loss, "grad_norm": norm}
                row |= {"lr": lr, **self.speed(seconds, self.step - logged)}
                logged, seconds = self.step, 0.0

        shown = os.path.relpath(self.folder)
        if any(self.signals):
            log.say(
                f"stopped at step {self.step}; go on with  --init_from=resume --out_dir={shown}"
            )
            return exit_code(self.signals)
        log.say(f"best val loss {self.best_val_loss:.4f}; the run is in {shown}")
        draws = config.plot and self.step >= DRAWN_FROM
        log.end(partial(pictures, self.folder) if draws else None)
        return 1 if self.saver.failed else 0

    def micro_steps(self) -> range:
        return self.rt.share(self.config.gradient_accumulation_steps)

    def load(self, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (B, T) on the device."""
        config = self.config
        key = "train", Purpose.TRAIN, config.seed, step, micro_step
        size = config.batch_size, config.block_size
        return self.rt.to_device(*self.data.batch(*key, *size))

    def due(self, interval: int) -> bool:
        """Whether what happens every `interval` steps happens now."""
        return self.step % interval == 0 or self.step in (self.n_matching, self.config.max_iters)

    def begin_end_to_end(self) -> None:
        """From here on the whole model is trained, no longer each attention by its teacher's."""
        self.matching.release()
        self.matching, self.model = None, self.rt.wrap(self.eval_model)
        self.optimizer = new_optimizer(self.raw_model, self.config, self.rt)

    def evaluate_log_save(self, row: dict) -> None:
        """Evaluate, log and save what the steps so far have come to, each if it is due; `row` is
        what the log is to say of the last."""
        config, step, log = self.config, self.step, self.log
        saves, is_best, before = self.saver.retries(), False, self.best_val_loss
        if self.due(config.eval_interval) and self.evaluated < step and not any(self.signals):
            losses, self.signals = estimate_loss(
                self.eval_model, self.data, self.rt, config, self.interrupt
            )
            if not any(self.signals):
                row |= {"val_loss": losses["val"], "eval_train_loss": losses["train"]}
                self.evaluated, self.best_val_loss = step, min(before, losses["val"])
                is_best = self.best_val_loss < before and (step > 0 or config.max_iters == 0)
                saves |= is_best or step == config.max_iters
                saves |= step > 0 and config.always_save_checkpoint
        if row:
            log.write(step=step, tokens=step * tokens_per_step(config), **row)
        if config.stats_interval and self.due(config.stats_interval) and not any(self.signals):
            log.write_stats(step, self.measure)
        if saves or any(self.signals) and self.saver.step != step:
            if not self.save(is_best) and is_best:
                self.best_val_loss = before  # best.pt is still the one of that loss

    def save(self, is_best: bool) -> bool:
        """Write a checkpoint; whether that succeeded."""
        if not all(
            w.isfinite().all() for w in self.raw_model.parameters()
        ):  # the same on all ranks
            raise self.diverged("the weights are not finite")
        if not self.rt.is_main:
            return True
        lora, state = self.config.lora_rank, self.raw_model.state_dict()
        checkpoint = {
            "model": {k: v for k, v in state.items() if not lora or ".lora_" in k},
            "optimizer": self.optimizer.state_dict(),
            "optimizer_is_new": not self.optimizer.state,
            "model_args": self.raw_model.config.model_args(),
            "iter_num": self.step,
            "best_val_loss": self.best_val_loss,
            "config": asdict(self.config),
            "tokenizer": self.data.tokenizer,
            "scaler": self.scaler.state_dict(),
            "data": self.fingerprint,
            "evaluated": self.evaluated,
            **({"base": self.base} if self.base else {}),
        }
        return self.saver.save(checkpoint, is_best)

    def speed(self, seconds: float, steps: int) -> dict:
        """What the log says of the last steps' time, and of memory."""
        config, per_step = self.config, seconds / steps
        sequences = config.gradient_accumulation_steps * config.batch_size // self.rt.world_size
        mfu = self.raw_model.estimate_mfu(sequences, per_step, config.block_size)
        return {
            "step_ms": 1000 * per_step,
            "tokens_per_s": tokens_per_step(config) / per_step,
            "mfu": None if self.matching else mfu,
            "window_seconds": seconds,
            "peak_mib": self.rt.peak_memory(),
        }

    def measure(self) -> list[dict]:
        """Rows of stats.csv, from the first validation sequences."""
        B, T = min(self.config.batch_size, 4), self.config.block_size
        x, _ = self.rt.to_device(*self.data.batch("val", Purpose.EVAL, EVAL_SEED, 0, 0, B, T))
        return ranges.measure(self.raw_model, x, self.rt)

    def skip(self, loss: float, norm: float, skipped: int) -> None:
        """Pass over a step whose loss or gradient is not finite, the skipped-th. Raises UserError
        if they are too many."""
        what = f"loss {loss:.4g} and gradient norm {norm:.4g}"
        if skipped > self.config.skip_nonfinite:
            found = [line for line in self.rt.gather(self.diagnosis()) if line]
            raise self.diverged(what + (f"; {found[0]}" if found else ""))
        limit = self.config.skip_nonfinite
        self.log.say(f"step {self.step + 1}: {what}: skipped, {skipped} of {limit}")

    def diagnosis(self) -> str:
        """Where this rank's micro-steps are not finite; '' if that can't be said: they are, there
        is no memory, or it was in a layer's matching."""

        def again():
            for m in self.micro_steps():
                if self.config.dropout > 0:
                    torch.manual_seed(dropout_seed(self.config.seed, self.step, m))
                yield self.load(self.step, m)

        found = None
        with suppress(torch.OutOfMemoryError):
            found = None if self.matching else where_it_began(self.raw_model, again(), self.rt)
        return found or ""

    def diverged(self, what: str) -> UserError:
        kept = "there is no checkpoint yet"
        if self.saver.step is not None:
            shown = os.path.relpath(self.folder)
            kept = f"the checkpoint in {shown} is that of step {self.saver.step}"
        more = ", with more squarings n" if self.config.attn_type.startswith("GKpoly") else ""
        return UserError(
            f"step {self.step + 1} was not done: {what}. {kept}; start again with a lower "
            f"--learning_rate{more}, or go on from there with --skip_nonfinite=N, past N such steps"
        )


def exit_code(signals: list[float]) -> int:
    """What a shell expects of a process that SIGTERM or SIGINT has ended; 0 for none."""
    terminate, interrupt = signals
    return 143 if terminate else 130 if interrupt else 0


if __name__ == "__main__":
    configurator.run(main)
