"""configurator.py: defaults < config files < --key=value, and every mistake in one line."""

import os
import re
from dataclasses import dataclass, fields
from typing import Literal

import pytest
from conftest import ROOT, Failed, subprocess_run

import bench
import compare
import export
import sample
import train
from configurator import CONFIG_DIR, UserError, help_text, parse
from engine import start

TYPES = ("int8", "int4")


@dataclass
class Config:
    # Section
    n_embd: int = 8  # width
    learning_rate: float = 0.1  # rate
    bias: bool = False  # biases
    out_dir: str = "out"  # folder
    top_k: int | None = 3  # likeliest
    dtype: Literal["float32", "bfloat16"] | None = None  # type, as {TYPES}


@pytest.mark.parametrize(
    "arg, key, value",
    [
        ("--n_embd=16", "n_embd", 16),
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--learning_rate=3e-4", "learning_rate", 3e-4),
        ("--bias=TRUE", "bias", True),
        ("--bias=false", "bias", False),
        ("--bias", "bias", True),
        ("--out_dir=a=b", "out_dir", "a=b"),
        ("--out_dir=7", "out_dir", "7"),
        ("--out_dir=", "out_dir", ""),
        ("--out_dir=~/run", "out_dir", os.path.expanduser("~/run")),
        ("--top_k=None", "top_k", None),
        ("--dtype=auto", "dtype", None),
        ("--dtype=float32", "dtype", "float32"),
    ],
)
def test_text_becomes_a_value_of_the_keys_type(arg, key, value):
    parsed = parse(Config, [arg])
    assert parsed == {key: value} and type(parsed[key]) is type(value)


@pytest.mark.parametrize(
    "arg, said",
    [
        ("--n_embed=16", "did you mean n_embd"),
        ("--zzz=1", "--help"),
        ("--n_embd=x", "n_embd must be int"),
        ("--n_embd=1.5", "n_embd must be int"),
        ("--n_embd=", "n_embd must be int"),
        ("--n_embd", "write --n_embd=VALUE"),
        ("--n_embd=-16", "must be at least 1"),
        ("--learning_rate=nan", "learning_rate must be float"),
        ("--learning_rate=-1", "must not be negative"),
        ("--bias=yes", "bias must be bool"),
        ("--dtype=float8", "dtype must be float32 or bfloat16 or None"),
        ("--n_embd=__import__('os')", "n_embd must be int"),
        ("-n_embd=3", "--key=value"),
        ("no_such_file", "train_11"),
    ],
)
def test_a_wrong_argument_is_answered_with_what_is_allowed(arg, said):
    with pytest.raises(UserError, match=re.escape(said)):
        parse(Config, [arg])


@pytest.mark.parametrize("line", ["n_embd = '7'", "learning_rate = '1e-3'", "bias = 'true'"])
def test_text_for_a_number_is_for_the_command_line_only(tmp_path, line):
    (tmp_path / "a.py").write_text(line + "\n")
    with pytest.raises(UserError, match="must be (int|float|bool)"):
        parse(Config, [str(tmp_path / "a.py")])


def test_the_later_one_wins(tmp_path):
    (tmp_path / "a.py").write_text("n_embd = 1\nlearning_rate = 2\n")
    (tmp_path / "b.py").write_text("import math\n_half = 4\nn_embd = 2 * _half\n")
    a, b = str(tmp_path / "a.py"), str(tmp_path / "b.py")
    assert parse(Config, [a, b]) == {"n_embd": 8, "learning_rate": 2.0}
    assert parse(Config, ["--n_embd=5", a])["n_embd"] == 1
    assert parse(Config, [a, "--n_embd=5"])["n_embd"] == 5


@pytest.mark.parametrize(
    "text, said",
    [
        ("n_embed = 3", "did you mean n_embd"),
        ("n_embd = '3x'", "n_embd must be int"),
        ("n_embd = True", "n_embd must be int"),
        ("bias = 1", "bias must be bool"),
        ("n_embd = [1]", "n_embd must be int"),
        ("n_embd = 1 +", "line 1: SyntaxError"),
        ("import sys\n\n\ndef main(): ...", "sets no key, so it is no config"),
        ("\nn_embd = undefined", "line 2: NameError"),
        ("n_embd = 3\nexit(0)", "line 2: SystemExit"),
    ],
)
def test_a_wrong_config_file_is_told_with_its_name(tmp_path, text, said):
    (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        parse(Config, [str(tmp_path / "wrong.py")])
    assert "wrong.py" in str(error.value)


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.glob("*.py")), ids=lambda p: p.stem)
def test_every_config_file_is_accepted_by_path_and_by_bare_name(path):
    Config = compare.CompareConfig if path.stem.startswith("compare_") else train.Config
    assert parse(Config, [str(path)]) == parse(Config, [path.stem]) != {}


SCRIPTS = [train, sample, bench, export, compare]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_has_a_line_for_every_key(script):
    Config = next(
        getattr(script, name)
        for name in ("BenchConfig", "CompareConfig", "Config")
        if hasattr(script, name)
    )
    text = help_text(Config)
    for field in fields(Config):
        assert re.search(rf"^  --{field.name}=\S.* \w", text, re.MULTILINE), field.name


def test_the_help_names_the_choices_of_a_key_and_the_values_of_a_registry():
    help = " ".join(help_text(Config).split())
    assert help.endswith("--dtype=auto type, as int8, int4; one of float32, bfloat16")


def test_every_key_is_read_somewhere():
    code = {p.name: p.read_text() for p in ROOT.glob("*.py")}
    code["train.py"] += "".join(p.read_text() for p in ROOT.glob("engine/*.py"))  # they get it too
    for script in (train, sample, export):
        for field in fields(script.Config):
            reads = len(re.findall(rf"config\.{field.name}\b", code[f"{script.__name__}.py"]))
            # or in a loop over the names
            reads += field.name in (*start.ARCHITECTURE, *start.KEPT, *sample.DRAWING.split())
            assert reads > 0, f"{script.__name__}.py never reads {field.name}"
    for name in BENCH_KEYS:
        assert re.search(rf"config\.{name}\b", code["bench.py"]), name


BENCH_KEYS = {f.name for f in fields(bench.BenchConfig)} - {f.name for f in fields(train.Config)}


@pytest.mark.parametrize("script", ["train.py", "sample.py", "bench.py", "export.py", "compare.py"])
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(script):
    done = subprocess_run(ROOT / script, "--no_such_key=1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown key") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["train", "bench", "compare", "sample", "encrypt", "evaluate"])
def test_a_path_that_no_system_takes_is_one_line(run, tmp_path, script):
    (tmp_path / "loop").symlink_to("loop")
    for path, said in [("x" * 300, "too long"), ("loop/x", "links|loop/x"), ("x\udcff", "UTF-8")]:
        with pytest.raises(Failed, match=said) as failed:
            run(script, f"--out_dir={path}", *["--profile"] * (script == "bench"))
        assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args, said",
    [
        (["--n_embd=30", "--n_head=4"], "n_embd=30 is not divisible by n_head=4"),
        (["--eval_interval=0"], "eval_interval must be at least 1"),
        (["--batch_size=-1"], "batch_size must be at least 1"),
        (["--attn_type=gk"], "GKpoly-n"),
        (["--attn_type=GKpoly"], "GKpoly-n"),
        (["--device=tpu"], "device=tpu"),
        (["--device=cuda:99"], "device=cuda:99"),
        (["--dropout=1"], "below 1"),
        (["--dataset=../abc"], "not a name"),
        (["--dataset=nothing"], "prepare.py"),
        (["--save_dir=x"], "finetune"),
        (["--attn_type=GK", "--attn_impl=triton"], "need a CUDA device"),
        (["--attn_impl=fast"], "reference, blockwise, triton"),
        (["--init_from=no-such-model"], "scratch, resume, finetune"),
    ],
)
def test_values_that_train_can_not_use(run_train, args, said):
    with pytest.raises(Failed, match=re.escape(said)) as failed:
        run_train(*args)
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1
