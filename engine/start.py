"""
What a run begins with: settings, data and weights, for each value of init_from.

    scratch     new weights, for the vocabulary of the data set
    resume      the run in out_dir: its settings, weights, optimizer and step
    finetune    the settings and weights of the run in out_dir, with a folder of its own
    distill     the weights of a teacher, whose attention is to be replaced
    NAME        a GPT-2 of transformers: gpt2[-medium|-large|-xl], a folder or a hub name

The settings are those of train.Config, given here as `config`; `given` are the keys that the user
set. Settings of the run or teacher that weights come from take the place of train.py's defaults.
"""

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

import configurator
from configurator import UserError
from data.dataset import Dataset, Purpose
from data.meta import DATA_DIR, known_datasets
from data.tokenizer import meta_of_model
from engine import checkpoint as ckpt
from engine import layers, sharding
from engine.run_folder import holds_checkpoint, run_folder, saved_by_this_launch
from engine.runtime import Runtime
from kernels.choice import is_small
from model import GPT, GPTConfig, choose

# What resume takes from the checkpoint, and finetune and GPT-2 from the weights they start with
ARCHITECTURE = ("n_layer", "n_head", "n_embd", "bias", "block_size", "position")
# What a resumed run can't change, while a finetune may
KEPT = (
    "attn_type attn_decay attn_normalize pa_length_power norm mlp_act qk_norm lora_rank lora_alpha "
    "lora_targets"
).split()
# Of GPTConfig: a teacher has no dropout, and its adapters are part of its weights
AS_TEACHER = {"dropout": 0.0, "lora_rank": 0}
# What belongs to a launch rather than to the run: never read from a checkpoint's config
PER_LAUNCH = set(
    "out_dir save_dir init_from eval_only datasets eval_stride data_dir device dtype compile "
    "backend attn_impl allow_mismatch skip_nonfinite checkpoint_activations shard".split()
)
# What a resumed run must share with the run before, to end where that one would have ended
TRAJECTORY = (
    "seed dataset gradient_accumulation_steps batch_size dropout optimizer learning_rate "
    "weight_decay beta1 beta2 grad_clip decay_lr lr_schedule warmup_iters lr_decay_iters min_lr "
    "teacher distill_iters anneal_iters"
).split()
# Keys that do nothing without another key
NEEDS = {"lora_alpha": "lora_rank", "lora_targets": "lora_rank"}
NEEDS |= {"distill_iters": "teacher", "eval_stride": "datasets"}


@dataclass
class Start:
    """What a run begins with; the model and its teacher are on the device, equal on all ranks."""

    config: object  # its architecture is the model's, whatever the defaults were
    model: GPT  # the one to train, neither compiled nor under DDP
    source: Path | str  # path of the checkpoint that weights come from, or name of a GPT-2
    tokenizer_meta: dict | None  # describes the tokenizer of those weights, if that is known
    data: Dataset | None  # None if other data sets are to be evaluated
    fingerprint: dict | None  # SHA-256 of the data
    checkpoint: dict | None  # the one at `source`; without tensors on other ranks
    teacher: GPT | None  # that the model's attention is still to be matched with


def begin(config_class: type, given: dict, rt: Runtime) -> Start:
    """Everything that init_from and the other keys in `given` ask for. Raises UserError if it can't
    be had, or does not go together."""
    given = after_restart(config_class, given, rt)
    config, checkpoint, path = read_config(config_class, given, rt)
    steps = checkpoint.get("iter_num", 0) if config.init_from == "resume" else 0
    if rt.shard and (config.init_from == "distill" or steps < matching_steps(config)):
        problem = "shard=full can't match a teacher's attention"
        raise UserError(f"{problem}; use --shard=none for those steps, and then --init_from=resume")
    data = None if config.datasets else open_data(config, rt)
    if data and rt.world_size > 1:
        check_same_everywhere(data, rt)

    torch.manual_seed(config.seed)  # of new weights and of adapters
    match config.init_from:
        case "scratch":
            weights = from_scratch(config, data)
        case "resume":
            weights = from_run_to_resume(config, checkpoint, path)
        case "finetune":
            weights = from_run_to_finetune(config, given, checkpoint, path)
        case "distill":
            weights = from_teacher(config, checkpoint, path)
        case _:
            weights = from_gpt2(config, given)
    model, source, tokenizer_meta = weights
    if config.init_from != "scratch":
        match_architecture(model, given, source, resumes=config.init_from == "resume")
        if data:
            data.check_model(model.config.vocab_size, tokenizer_meta, source)
    rt.place(model)

    teacher = None
    if config.init_from == "distill":
        run_folder(config)  # refuses the folder of the teacher
        model, teacher = student_of(model, config, given).to(rt.device), model
    for key in (*ARCHITECTURE, *KEPT):
        setattr(config, key, getattr(model.config, key))
    config.distill_iters = matching_steps(config) if config.teacher else None
    check_effect(config, given, rt)
    if data:
        data.check_length(config.block_size)
    if data and config.init_from != "resume" and layers.norms_are_new(model):
        B, T = config.batch_size, model.config.block_size
        batch = data.batch("train", Purpose.TRAIN, config.seed, 0, 0, B, T)
        layers.calibrate(model, *rt.to_device(batch[0]), rt)
    trains = data and not config.eval_only
    fingerprint = rt.from_main(data.fingerprint) if trains else None
    if config.init_from == "resume" and trains:
        if not config.allow_mismatch:
            check_fingerprint(checkpoint, fingerprint, path, data.name)
        if checkpoint.get("iter_num", 0) < matching_steps(config):
            base = checkpoint.get("base")
            loaded = rt.from_main(lambda: ckpt.load_base(path.parent, base), ckpt.without_tensors)
            teacher = ckpt.build_model(loaded, path.with_name(ckpt.BASE))
            rt.place(teacher)
    if config.checkpoint_activations:
        sharding.checkpoint_activations(model)
    return Start(config, model, source, tokenizer_meta, data, fingerprint, checkpoint, teacher)


# ---- Settings ---------------------------------------------------------------


def after_restart(config_class: type, given: dict, rt: Runtime) -> dict:
    """`given`, or what resumes the run that torchrun has started again, whatever init_from was."""
    (restarts,) = rt.sum([float(rt.restarts)])  # nodes may have counted differently
    if not restarts:
        return given
    # The folder of a finetune may be named for the attn_type of the run that it starts from
    folder = run_folder(read_config(config_class, given, rt)[0])
    if not rt.from_main(lambda: saved_by_this_launch(folder, rt)):
        return given
    rt.print(f"restarted: going on with {os.path.relpath(folder)}")
    return {**given, "init_from": "resume", "out_dir": str(folder), "save_dir": None}


def read_config(config_class: type, given: dict, rt: Runtime) -> tuple:
    """The settings, checked, and the checkpoint that they go on from with its path, or None, None.
    On ranks other than the main one the checkpoint has no tensors."""
    config, checkpoint, path, folder = config_class(**given), None, None, None
    if config.init_from in ("resume", "finetune"):
        folder = Path(config.out_dir)
    elif config.init_from == "distill" and config.teacher is not None:
        teacher = Path(config.teacher)
        folder = rt.from_main(lambda: teacher if holds_checkpoint(teacher) else None)
    if folder is not None:
        checkpoint, path, warning = rt.from_main(
            lambda: ckpt.load_newest(folder),
            lambda found: (ckpt.without_tensors(found[0]), *found[1:]),
        )
        if warning:
            rt.print(warning)
        keys = {f.name for f in fields(config)} - PER_LAUNCH
        if config.init_from != "resume":
            keys -= {"teacher", "distill_iters", "anneal_iters"}
        saved = {}
        # model_args say what the weights are, config what the user wanted
        for key, value in {**checkpoint["config"], **checkpoint["model_args"]}.items():
            if key in keys:
                source = f"{key}={value!r} in the config of {path}"
                saved[key] = configurator.convert(config_class, key, value, source)
        config = config_class(**{**saved, **given})
    check(config)
    for key, other in NEEDS.items():
        if given.get(key) is not None and not getattr(config, other):
            raise UserError(f"{key}={given[key]} does nothing without --{other}; leave it out")
    if given.get("pa_length_power", 1.0) != 1.0 and config.attn_decay != "none":
        raise UserError("pa_length_power does nothing with --attn_decay; leave one of them out")
    if config.init_from == "resume" and not (config.allow_mismatch or config.eval_only):
        check_trajectory(config_class(**saved), config, path)
    return config, checkpoint, path


def check(config) -> None:
    """Raise UserError for values that are impossible, or impossible together."""
    configurator.check_rules(asdict(config))
    try:
        model_config(config)
    except ValueError as error:
        raise UserError(error) from error
    for key in ("out_dir", "save_dir", "teacher"):
        path = Path(getattr(config, key) or "")
        if path.is_file():
            problem = f"{key}={path} is a file, but a run is named by its folder"
            raise UserError(f"{problem}; pass --{key}={path.parent}")
    for key in ("out_dir", "save_dir"):
        folder = getattr(config, key)
        if folder is not None and Path.cwd().resolve().is_relative_to(os.path.realpath(folder)):
            problem = f"{key}={folder!r} is the current folder, or around it"
            raise UserError(f"{problem}; give a run one of its own")
    if config.datasets is not None and not (config.eval_only and config.init_from != "scratch"):
        command = f"python evaluate.py --out_dir=OUT --datasets={config.datasets}"
        raise UserError(f"datasets are for the evaluation of a trained model: {command}")
    if config.init_from == "distill" and config.teacher is None:
        raise UserError("init_from=distill needs a teacher: pass --teacher=OUT, or --teacher=gpt2")
    if config.teacher is not None and config.init_from not in ("distill", "resume"):
        raise UserError("teacher is for --init_from=distill")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if config.shard == "full" and (ranks == 1 or config.datasets):
        problem = "shard=full shares a model in training among the ranks of torchrun"
        raise UserError(f"{problem}; leave it out for one rank, and with --datasets")
    if config.save_dir is not None and config.init_from != "finetune":
        raise UserError("save_dir is for --init_from=finetune; other runs write to out_dir")
    # A run that nanoGPT has trained with a rising rate may go on with it
    rises = config.min_lr is not None and config.min_lr > config.learning_rate
    if rises and config.decay_lr and config.init_from != "resume":
        problem = f"min_lr={config.min_lr:g} is above learning_rate={config.learning_rate:g}"
        repair = "pass a lower one, or --min_lr=none for a tenth of the learning rate"
        raise UserError(f"{problem}; {repair}")
    steps = config.gradient_accumulation_steps
    if not config.eval_only and steps % ranks:
        problem = f"gradient_accumulation_steps={steps} can't be shared among {ranks} ranks"
        raise UserError(f"{problem}; pass a multiple of {ranks}")


def check_trajectory(old, new, path: Path) -> None:
    """Raise UserError if a resumed run would not go on as the run in `path` did."""
    before, after = asdict(old), asdict(new)
    before["lr_decay_iters"], before["min_lr"] = schedule(old)
    after["lr_decay_iters"], after["min_lr"] = schedule(new)
    changed = [key for key in TRAJECTORY if before[key] != after[key]]
    # What follows from another key is not what the user gave
    follows = {key for key in ("lr_decay_iters", "min_lr") if getattr(new, key) is None}
    given = [key for key in changed if key not in follows]
    repairs = []
    if given:
        text = lambda value: f"{value:g}" if type(value) is float else str(value)
        values = ", ".join(f"{key}={text(before[key])}, not {text(after[key])}" for key in given)
        repairs.append(f"{path} has {values}: leave out --{' --'.join(given)}")
    if "lr_decay_iters" in follows.intersection(changed):
        problem = f"--max_iters={new.max_iters} would move the end of the learning rate's decay"
        repairs.append(f"{problem}: pass --lr_decay_iters={before['lr_decay_iters']} to keep it")
    if repairs:
        raise UserError(f"{'; '.join(repairs)}; or pass --allow_mismatch=True")


# ---- Derived settings -------------------------------------------------------


def schedule(config) -> tuple[int, float]:
    """lr_decay_iters and min_lr, with the meaning of `auto` filled in."""
    if not config.decay_lr:
        return 0, config.learning_rate
    end = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    return end, config.learning_rate / 10 if config.min_lr is None else config.min_lr


def tokens_per_step(config) -> int:
    return config.gradient_accumulation_steps * config.batch_size * config.block_size


def matching_steps(config) -> int:
    """Number of steps that match the teacher's attention, before the whole model is trained."""
    if config.teacher is None:
        return 0
    return config.max_iters // 2 if config.distill_iters is None else config.distill_iters


def check_effect(config, given: dict, rt: Runtime) -> None:
    """Raise UserError if the model has no use for attn_normalize. Print a line if it takes fewer
    terms, and on anneal_iters, which config files set, if it has no effect or no end. `config` has
    the keys of the model."""
    terms, uses = given.get("attn_normalize"), config.attn_normalize
    if terms and not uses and config.attn_type != "SM":  # softmax's rows sum to 1
        repair = "pass --attn_decay=fixed or learned, or --attn_normalize=0"
        raise UserError(f"attn_normalize={terms} does nothing without --attn_decay; {repair}")
    if terms and uses not in (0, terms):
        rt.print(
            f"attn_normalize={terms}: {config.attn_type} takes {uses}, as its sums may exceed 1"
        )
    if not config.anneal_iters or config.eval_only:
        return
    annealing = f"anneal_iters={config.anneal_iters}"
    if config.norm != "fixed" and config.mlp_act not in ("quad", "quartic"):
        rt.print(f"{annealing}: no effect without --norm=fixed, --mlp_act=quad or quartic")
    elif matching_steps(config) + config.anneal_iters > config.max_iters:
        remark = "longer than the run; until it is over, the loss of the polynomial itself is huge"
        rt.print(f"{annealing}: {remark}")


def model_overrides(config) -> dict:
    """The fields of GPTConfig that may differ from those of the weights a model starts with."""
    return {key: getattr(config, key) for key in (*KEPT, "attn_impl", "dropout")}


def model_config(config) -> GPTConfig:
    """The model that these settings ask for, without its vocabulary. Raises ValueError for values
    that no model can have."""
    architecture = {key: getattr(config, key) for key in ARCHITECTURE}
    return GPTConfig(**architecture, **model_overrides(config))


def choose_implementation(config, rt: Runtime) -> str:
    """The implementation of attention that will run. Raises UserError if attn_impl can't."""
    inputs = config.n_embd // config.n_head, getattr(torch, rt.dtype), rt.device, config.dropout
    small = is_small(config.batch_size, config.n_head, config.block_size)
    try:
        return choose(config.attn_impl, config.attn_type, *inputs, small)
    except ValueError as error:
        raise UserError(error) from error


# ---- Data -------------------------------------------------------------------


def check_dataset_is_named(argv: list[str], given: dict, config) -> None:
    """Raise UserError if a config file leaves the data set to a default. nanoGPT's config files
    count on its default, openwebtext. Here it is pydocs, for a first try without any file: to train
    on that by surprise would waste a run."""
    file = next((arg for arg in argv if not arg.startswith("-")), None)
    inherits = config.init_from in ("resume", "finetune", "distill")
    if file and "dataset" not in given and not inherits and not config.datasets:
        raise UserError(f"{file} names no data set; pass --dataset=NAME: {known_datasets()}")


def open_data(config, rt: Runtime) -> Dataset:
    """The data set; pydocs, which needs no network, is prepared here when it is missing."""
    folder, problem = Path(config.data_dir or DATA_DIR) / config.dataset, ""
    if config.dataset == "pydocs" and rt.local_rank == 0 and not (folder / "meta.json").exists():
        script = DATA_DIR / "pydocs" / "prepare.py"
        if subprocess.run([sys.executable, script, "--out", folder]).returncode:
            problem = f"data set pydocs could not be prepared; try  python {script}"
    if problem := max(rt.gather(problem)):
        raise UserError(problem)
    return Dataset(config.dataset, config.data_dir)


def check_same_everywhere(data: Dataset, rt: Runtime) -> None:
    """Raise UserError on all ranks unless each has the same files."""
    expected, own = rt.from_main(data.fingerprint), None
    with suppress(UserError):
        own = expected if rt.is_main else data.fingerprint()
    if any(rt.gather("" if own == expected else "differs")):
        raise UserError(f"data set {data.name} is not the same on all nodes; copy it from one")


def check_fingerprint(checkpoint: dict, fingerprint: dict, path: Path, name: str) -> None:
    """Raise UserError if the data of the run in `path` have changed since."""
    changed = [s for s, sha256 in checkpoint["data"].items() if fingerprint.get(s) != sha256]
    if changed:
        problem = f"{changed[0]}.bin of data set {name} is not what {path} was trained on"
        raise UserError(f"{problem}; put that file back, or pass --allow_mismatch=True")


# ---- Weights ----------------------------------------------------------------


class Weights(NamedTuple):
    """What a mode of init_from gives: a model on the CPU, and where its weights come from."""

    model: GPT
    source: Path | str  # path of the checkpoint, or name of a GPT-2
    tokenizer_meta: dict | None  # describes the tokenizer of those weights, if that is known


def from_scratch(config, data: Dataset) -> Weights:
    """New weights, for the vocabulary of the data."""
    data.check_length(config.block_size)
    # GPT-2's vocabulary is padded to a multiple of 64, which is faster
    vocab_size = 50304 if data.tokenizer == {"tokenizer": "gpt2"} else data.vocab_size
    shape = {key: getattr(config, key) for key in ARCHITECTURE}
    model = GPT(GPTConfig(vocab_size=vocab_size, **shape, **model_overrides(config)))
    return Weights(model, "scratch", data.tokenizer)


def from_run_to_resume(config, checkpoint: dict, path: Path) -> Weights:
    """The weights of a run, which stays the model that it is."""
    overrides = {"attn_impl": config.attn_impl, "dropout": config.dropout}
    return from_checkpoint(checkpoint, path, overrides)


def from_run_to_finetune(config, given: dict, checkpoint: dict, path: Path) -> Weights:
    """The weights of a run, perhaps with another attention or with adapters."""
    overrides = model_overrides(config)
    if ckpt.config_of(checkpoint, path).pa_length is None:
        overrides["pa_length"] = given.get("block_size")  # the length PA will be trained with
    return from_checkpoint(checkpoint, path, overrides)


def from_teacher(config, checkpoint: dict | None, path: Path | None) -> Weights:
    """The weights of the teacher, a run or else a GPT-2."""
    if checkpoint is not None:
        return from_checkpoint(checkpoint, path, AS_TEACHER)
    try:
        model = GPT.from_pretrained(config.teacher, AS_TEACHER)
    except (OSError, ValueError) as error:
        problem = f"teacher={config.teacher} has no checkpoint and is no GPT-2 ({error})"
        raise UserError(f"{problem}; train it first, or pass --teacher=gpt2") from error
    return Weights(model, config.teacher, meta_of_model(config.teacher))


def from_gpt2(config, given: dict) -> Weights:
    """The weights of a GPT-2 of transformers, or of a folder that export.py wrote."""
    name = config.init_from
    run = Path(name).parent if Path(name).suffix == ".pt" else Path(name)
    if holds_checkpoint(run):
        repair = f"pass --init_from=resume --out_dir={run}, or --init_from=finetune --out_dir={run}"
        raise UserError(f"init_from={name} is a run of train.py; {repair}")
    overrides = {key: value for key, value in model_overrides(config).items() if key in given}
    try:
        model = GPT.from_pretrained(name, overrides, given.get("block_size"))
    except (OSError, ValueError) as error:
        allowed = "scratch, resume, finetune, distill, gpt2, gpt2-medium, gpt2-large, gpt2-xl"
        problem = f"{error}; init_from is {allowed}, or the folder or hub name of such a model"
        raise UserError(problem) from error
    return Weights(model, name, meta_of_model(name))


def from_checkpoint(checkpoint: dict, path: Path, overrides: dict) -> Weights:
    model = ckpt.build_model(checkpoint, path, **overrides)
    return Weights(model, path, checkpoint.get("tokenizer"))


def student_of(teacher: GPT, config, given: dict) -> GPT:
    """The teacher's weights, with the attention that the user wants."""
    like_teacher = {"model": teacher.state_dict(), "model_args": teacher.config.model_args()}
    overrides = {**model_overrides(config), "pa_length": given.get("block_size")}
    torch.manual_seed(config.seed)  # of adapters
    return ckpt.build_model(like_teacher, Path(config.teacher), **overrides)


def match_architecture(model: GPT, given: dict, source: Path | str, resumes: bool) -> None:
    """Crop the model to a smaller block_size that the user gave, unless a run `resumes`. Raises
    UserError if the user gave anything else that the weights do not have."""
    if resumes:  # a run records no key that means nothing to its attention, as attn_normalize to SM
        asked = replace(model.config, **{key: given[key] for key in given if key in KEPT})
        given = given | {key: getattr(asked, key) for key in KEPT}
    for key in (*KEPT, *ARCHITECTURE) if resumes else ARCHITECTURE:
        has, wanted = getattr(model.config, key), given.get(key)
        if wanted in (None, has):
            continue
        if key != "block_size" or wanted > has or resumes:
            repair = f"leave --{key} out"
            if key in KEPT:
                repair += ", or use --init_from=finetune to start from its weights"
            raise UserError(f"{source} was trained with {key}={has}, not {wanted}; {repair}")
        model.crop_block_size(wanted)
