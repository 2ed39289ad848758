"""data/command_line.py: what a prepare.py accepts, and one line of error for anything else."""

import sys
from fractions import Fraction
from pathlib import Path

import pytest

from configurator import UserError
from data.command_line import parse_args


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Parse command line options as a script in tmp_path does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()

    def call(*args, **settings):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *args])
        return parse_args(str(tmp_path / "prepare.py"), "The help.", **settings)

    return call


def test_options_have_defaults_and_files_may_be_given_at_once_or_one_by_one(parse, tmp_path):
    args = parse(num_proc=True, tokens=10)
    assert args.input == [] and args.out == tmp_path and args.num_proc >= 1 and args.tokens == 10
    once, one_by_one = parse("--input", "a.txt", "b.txt"), parse("--input=a.txt", "--input=b.txt")
    assert once == one_by_one and [path.name for path in once.input] == ["a.txt", "b.txt"]
    assert parse("--tokens=1e3", tokens=10).tokens == 1000
    assert parse("--out=~/x").out == Path.home() / "x"


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "--input"),
        (["--input", "no-such-file"], "no-such-file"),
        (["--input", "a.txt", "--ou", "x"], "--ou x"),
        (["--input", "a.txt", "--val", "no-such-file"], "no-such-file cannot be read"),
        (["--input", "a.txt", "--val", "a.txt"], "a.txt is in --input and in --val"),
        (["--input", "a.txt", "--val", "b.txt", "--val_share=.1"], "leave --val_share out"),
        (["--input", "a.txt", "--val_share", "0"], "--val_share: 0 is impossible"),
        (["--input", "a.txt", "--val_share", "1"], "must be above 0 and below 1"),
        (["--input", "a.txt", "--val_share", "1/0"], "--val_share"),
        (["--input", "a.txt", "--val_share", "nan"], "--val_share"),
        (["--input", "a.txt", "--num_proc", "0"], "at least 1"),
        (["--input", "a.txt", "--num_proc", "x"], "--num_proc"),
        (["--input", "a.txt", "--tokens", "inf"], "--tokens: inf is impossible"),
        (["--input", "a.txt", "--tokens", "many"], "--tokens"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_it(parse, args, message):
    with pytest.raises(UserError, match=message):
        parse(*args, input_required=True, num_proc=True, tokens=10)


def test_validation_is_a_share_or_files_of_the_users_own_text(parse):
    assert parse().val_share == parse("--input=a.txt").val_share == Fraction(1, 10)
    assert parse(val_share="0.0005").val_share == Fraction(1, 2000)
    assert parse("--input=a.txt", "--val_share=0.05").val_share == Fraction(1, 20)
    assert parse("--input=a.txt", "--val=b.txt").val == [Path("b.txt")]
    for option in ("--val=b.txt", "--val_share=0.5"):
        with pytest.raises(UserError, match="give it with --input FILE"):
            parse(option)
    with pytest.raises(UserError, match="--val"):
        parse("--input=a.txt", "--val=b.txt", val_share=None)


def test_three_files_of_a_corpus_are_its_splits(parse, tmp_path):
    (tmp_path / "c.txt").touch()
    files = ["--input", "a.txt", "b.txt", "c.txt"]
    assert len(parse(*files, corpus=True).input) == 3
    with pytest.raises(UserError, match="training, validation and test split"):
        parse(*files, "--val_share=0.2", corpus=True)
