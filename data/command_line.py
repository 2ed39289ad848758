"""The command line of every prepare.py."""

import argparse
import os
from fractions import Fraction
from pathlib import Path

from configurator import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse_args(
    script: str,
    doc: str,
    input_required: bool = False,
    val_share: str | None = "0.1",
    num_proc: bool = False,
    corpus: bool = False,
    tokens: int = 0,
) -> argparse.Namespace:
    """`input` (a list of paths), `out`, and the options that the script asks for.

    These are `val` (a list of paths) and `val_share` unless the default share is None; `num_proc`;
    for a `corpus` of words `raw`; and `tokens` with the given default. Raises UserError for an
    unknown option, a value that is not allowed, and a file that cannot be read.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=doc, formatter_class=formatter, allow_abbrev=False)
    path = lambda text: Path(os.path.expanduser(text))  # bash leaves the ~ of --out=~/folder alone
    files = {"type": path, "nargs": "+", "action": "extend", "default": [], "metavar": "FILE"}
    parser.add_argument(
        "--input",
        required=input_required,
        help='files to prepare: text, JSON lines or a JSON array with a "text" in each object',
        **files,
    )
    if val_share:
        text = "files for validation, so that all of --input is for training"
        parser.add_argument("--val", help=text, **files)
        parser.add_argument(
            "--val_share",
            type=_share,
            metavar="X",
            help=f"share of --input for validation, above 0 and below 1 (default: {val_share})",
        )
    parser.add_argument(
        "--out",
        type=path,
        default=Path(script).parent,
        metavar="DIR",
        help="folder for the .bin files and meta.json (default: %(default)s)",
    )
    if num_proc:
        parser.add_argument(
            "--num_proc",
            type=int,
            default=os.cpu_count(),
            metavar="N",
            help="number of threads and processes (default: %(default)s)",
        )
    if corpus:
        text = "keep the spaces between words and punctuation marks as they are in the corpus"
        parser.add_argument("--raw", action="store_true", help=text)
    if tokens:
        parser.add_argument(
            "--tokens",
            type=_positive,
            default=tokens,
            metavar="N",
            help="approximate number of training tokens, for example 1e8 (default: %(default)s)",
        )
    args = parser.parse_args()
    if val_share:
        _check_split(args, corpus)
        args.val_share = args.val_share or Fraction(val_share)
    for path in (*args.input, *getattr(args, "val", ())):
        if not (path.is_file() and os.access(path, os.R_OK)):
            raise UserError(f"{path} cannot be read; give a file of text or JSON")
    if num_proc and args.num_proc < 1:
        raise UserError(f"--num_proc {args.num_proc} is impossible; it must be at least 1")
    return args


def _check_split(args: argparse.Namespace, corpus: bool) -> None:
    if not (args.val or args.val_share):
        return
    if not args.input:
        raise UserError("--val and --val_share split your own text; give it with --input FILE")
    if args.val and args.val_share:
        raise UserError("--val FILE is the whole validation split; leave --val_share out")
    if corpus and len(args.input) == 3:
        raise UserError(
            "three files of --input are the training, validation and test split; leave --val and "
            "--val_share out, or join the files"
        )
    if both := {path.resolve() for path in args.input} & {path.resolve() for path in args.val}:
        raise UserError(f"{min(both)} is in --input and in --val; give it to one of them")


def _share(text: str) -> Fraction:
    if not 0 < (value := Fraction(str(float(text)))) < 1:
        raise argparse.ArgumentTypeError(f"{text} is impossible; it must be above 0 and below 1")
    return value


def _positive(text: str) -> int:
    if not 1 <= (value := float(text)) < 1e15:
        raise argparse.ArgumentTypeError(f"{text} is impossible; it must be from 1 to 1e15")
    return int(value)
