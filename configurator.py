"""
Configuration of every script: defaults in the script < config files < --key=value.

    python train.py config/train_11.py --attn_type=SM --max_iters=500
    python train.py train_11 --eval_only            # bare name of a config; --key alone: true

A script declares its keys as a dataclass: name, type, default, and a trailing comment, which is
what `--help` shows. Config files are Python that assigns those keys; they are run, so trust them as
you trust the script. Values on the command line are data: they are parsed by the type of the key
and never evaluated. A later value overrides an earlier one. A mistake is a UserError: one line on
stderr, exit code 2.
"""

import difflib
import inspect
import math
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent
CONFIG_DIR = ROOT / "config"
# Keys that may hold a path, beside those that end in _dir
PATHS = "init_from teacher to out save prompts nanogpt base".split()


class UserError(Exception):
    """A mistake that the user can repair. Its text is one line: what was given, what is allowed,
    and the command that repairs it. Under torchrun one rank of each node prints it, the first to
    get there, unless the mistake is of `this_rank` alone."""

    def __init__(self, text: object, this_rank: bool = False):
        super().__init__(str(text))
        self.this_rank = this_rank

    def is_printed_here(self) -> bool:
        """Whether it is this process that prints, which it must do if it has asked."""
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # ATTEMPT/LOCAL_RANK/error.json
        if self.this_rank or error_file is None:
            return True
        try:
            (Path(error_file).parents[1] / "error_is_printed").touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return os.environ.get("LOCAL_RANK") == "0"
        return True


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`; a UserError becomes one line on stderr and exit code 2."""
    try:
        for arg in sys.argv[1:]:
            if arg.encode(errors="replace").decode() != arg:  # Python reads odd bytes as surrogates
                raise UserError(f"{arg!a} is not UTF-8; rename that file, or convert the text")
        main()
    except UserError as error:
        if error.is_printed_here():
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output has gone, as in `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.filename is None:  # it is no mistake in a path
            raise
        print(f"error: {error.filename} can't be used: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def parse(Config: type, argv: list[str]) -> dict:
    """The keys that `argv` sets, by config files or by --key=value, as {key: value of its type}.
    Prints the help and exits where `--help` is asked for. Raises UserError for an unknown key, a
    value of the wrong type or outside its rule, and a missing file."""
    if "--help" in argv or "-h" in argv:
        print(help_text(Config))
        sys.exit(0)
    values = {}
    for arg in argv:
        if not arg.startswith("-"):
            values.update(read_config_file(Config, arg))
            continue
        match = re.fullmatch(r"--([^=]+)(?:=(.*))?", arg, re.DOTALL)
        if match is None:
            raise UserError(f"{arg!r} is not understood; write --key=value, or see --help")
        key, text = match.groups()
        if text is None and typing.get_type_hints(Config).get(key, bool) is not bool:
            raise UserError(f"{arg} has no value; write {arg}=VALUE")
        values[key] = value_of_text(Config, key, "true" if text is None else text, arg)
    check_rules(values)
    return values


def read_config_file(Config: type, name: str) -> dict:
    """Run a config file, given by path or by its bare name in config/; return what it sets."""
    places = (Path(name), ROOT / name, CONFIG_DIR / f"{name}.py")
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        names = sorted(p.stem for p in CONFIG_DIR.glob("*.py"))
        raise UserError(f"no config file {name!r}, here or in config/: there is {', '.join(names)}")
    namespace = {"__file__": str(path)}
    try:
        exec(compile(path.read_text(encoding="utf-8"), path, "exec"), namespace)
    except (Exception, SystemExit) as error:  # whatever the user's Python raises is one line
        traceback = error.__traceback__.tb_next
        line = error.lineno if isinstance(error, SyntaxError) else traceback and traceback.tb_lineno
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    values = {}
    for key, value in namespace.items():
        if key.startswith("_") or isinstance(value, types.ModuleType) or callable(value):
            continue  # helpers of the file itself
        values[key] = convert(Config, key, value, f"{key} = {value!r} in {path}")
    if not values:
        raise UserError(f"{path} sets no key, so it is no config; those in config/ are examples")
    return values


def allowed_values(Config: type, key: str, source: str) -> list:
    """The types that `key` may have, and the strings: of `Literal["a", "b"] | None`, "a", "b" and
    NoneType. Raises UserError, which names `source`, for an unknown key."""
    hints = typing.get_type_hints(Config)
    if key not in hints:
        nearest = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
        advice = f"did you mean {nearest[0]}?" if nearest else "see --help for all keys"
        raise UserError(f"unknown key {key!r} ({source}); {advice}")
    is_union = typing.get_origin(hints[key]) in (types.UnionType, typing.Union)
    allowed = []
    for kind in typing.get_args(hints[key]) if is_union else (hints[key],):
        is_literal = typing.get_origin(kind) is typing.Literal
        allowed += typing.get_args(kind) if is_literal else [kind]
    return allowed


def value_of_text(Config: type, key: str, text: str, source: str) -> object:
    """The value of `key` that `text`, as of the command line, stands for. 'none' and 'auto' mean
    None for the keys that may be None. Raises UserError as `convert` does."""
    allowed, value = allowed_values(Config, key, source), text
    if type(None) in allowed and text.lower() in ("none", "auto"):
        return None
    with suppress(ValueError):
        if bool in allowed:
            value = {"true": True, "false": False}.get(text.strip().lower(), text)
        elif int in allowed:
            value = int(text)
        elif float in allowed:
            value = float(text)
    return convert(Config, key, value, source)


def convert(Config: type, key: str, value: object, source: str) -> object:
    """`value`, if `key` may have it; whole numbers become float where that is wanted. Raises
    UserError, which names `source`, for an unknown key and a value of another type."""
    allowed = allowed_values(Config, key, source)
    if float in allowed and type(value) is int:
        value = float(value)
    is_path = key.endswith("_dir") or key in PATHS
    if is_path and type(value) is str:
        value = os.path.expanduser(value)  # bash leaves the ~ of --key=~/folder alone
    is_number = type(value) is not float or math.isfinite(value)
    if type(value) in allowed and is_number or type(value) is str and value in allowed:
        return value
    names = [getattr(kind, "__name__", kind) for kind in allowed]
    raise UserError(f"{source}: {key} must be {' or '.join(names).replace('NoneType', 'None')}")


# What a number must satisfy, whichever script reads it
RULES = {
    "must be at least 1": (
        lambda v: v >= 1,
        "n_layer n_head n_embd block_size batch_size gradient_accumulation_steps eval_interval "
        "eval_iters log_interval num_samples max_new_tokens top_k steps vocab_size min_T max_T "
        "window_stride sample_batch eval_stride jobs n",
    ),
    "must not be negative": (
        lambda v: v >= 0,
        "max_iters warmup_iters lr_decay_iters learning_rate min_lr weight_decay grad_clip "
        "pa_length_power temperature seed warmup skip_nonfinite distill_iters lora_rank "
        "stats_interval anneal_iters",
    ),
    "must be below 8": (lambda v: v < 8, "pa_length_power"),
    "must be above 0 and at most 1": (lambda v: 0 < v <= 1, "top_p stats_tolerance"),
    "must be at least 0 and below 1": (lambda v: 0 <= v < 1, "dropout beta1 beta2"),
    "must be below 2^63": (lambda v: v < 2**63, "seed"),
}


def check_rules(values: dict) -> None:
    """Raise UserError for the first value that no script could use."""
    for rule, (holds, keys) in RULES.items():
        for key in keys.split():
            if values.get(key) is not None and not holds(values[key]):
                raise UserError(f"{key}={values[key]} is impossible: {key} {rule}")


def help_text(Config: type) -> str:
    """Every key of Config with its default, its comment and the choices of a Literal, under the
    comments of the sections. {NAMES} in a comment stands for the strings of that tuple in the
    module of Config."""
    lines = [inspect.cleandoc(sys.modules[Config.__module__].__doc__ or ""), ""]
    lines += ["Keys, set by a config file or as --key=value:"]
    width = max(80, shutil.get_terminal_size().columns)
    for cls in reversed(Config.__mro__[:-1]):
        names_in = lambda match, cls=cls: ", ".join(getattr(sys.modules[cls.__module__], match[1]))
        for line in inspect.getsource(cls).splitlines():
            if section := re.fullmatch(r"    # (.*)", line):
                lines += ["", section[1]]
            elif key := re.fullmatch(r"    (\w+): .+? = (.*?)  # (.*)", line):
                default = "auto" if key[2] == "None" else key[2]
                comment = re.sub(r"\{(\w+)\}", names_in, key[3])
                allowed = allowed_values(cls, key[1], line)
                if choices := [value for value in allowed if type(value) is str]:
                    comment += f"; one of {', '.join(choices)}"
                head = f"  --{key[1]}={default}".ljust(38)
                lines += textwrap.wrap(f"{head} {comment}", width, subsequent_indent=" " * 39)
    return "\n".join(lines)
