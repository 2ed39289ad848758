"""
The command line of every prepare.py.
"""

import argparse
import os
from pathlib import Path

from configurator import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse_args(
    script: str,
    doc: str,
    input_required: bool = False,
    num_proc: bool = False,
    raw: bool = False,
    tokens: int = 0,
) -> argparse.Namespace:
    """`input` (a list of paths), `out`, and the options that the script asks for.

    These are `num_proc`, `raw`, and `tokens` with the given default. Raises UserError for an
    unknown option, a value that is not allowed, and a file that cannot be read.
    """
    parser = _Parser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def option(name, metavar, help, **settings):
        parser.add_argument(f"--{name}", metavar=metavar, help=help, **settings)

    option(
        "input",
        "FILE",
        'one or more files to prepare: UTF-8 text, or .jsonl with a "text" in each line',
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        required=input_required,
    )
    option(
        "out",
        "DIR",
        "folder for the .bin files and meta.json (default: %(default)s)",
        type=Path,
        default=Path(script).parent,
    )
    if num_proc:
        option(
            "num_proc",
            "N",
            "number of threads and processes (default: %(default)s)",
            type=int,
            default=os.cpu_count(),
        )
    if raw:
        parser.add_argument(
            "--raw",
            action="store_true",
            help="keep the spaces between words and punctuation marks as they are in the corpus",
        )
    if tokens:
        option(
            "tokens",
            "N",
            "approximate number of training tokens, for example 1e8 (default: %(default)s)",
            type=_positive,
            default=tokens,
        )
    args = parser.parse_args()
    for path in args.input:
        if not (path.is_file() and os.access(path, os.R_OK)):
            raise UserError(f"--input {path} cannot be read; give a file of text, or .jsonl")
    if num_proc and args.num_proc < 1:
        raise UserError(f"--num_proc {args.num_proc} is impossible; it must be at least 1")
    return args


def _positive(text: str) -> int:
    if not 1 <= (value := float(text)) < 1e15:
        raise argparse.ArgumentTypeError(f"{text} is impossible; it must be from 1 to 1e15")
    return int(value)
