"""
Tiny Shakespeare, character by character: 1.1 MB of the plays, collected by Andrej Karpathy for
char-rnn; Shakespeare's text is in the public domain.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input input.txt       # offline, or another text

The vocabulary and the split are nanoGPT's: 65 characters, 1,003,854 of them for training, and the
last tenth of the text, 111,540 characters, for validation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data.command_line import parse_args
from data.downloads import TINY_SHAKESPEARE, tiny_shakespeare
from data.writing import prepare_files


def main():
    args = parse_args(__file__, __doc__)
    source = None if args.input else TINY_SHAKESPEARE
    paths = args.input or [tiny_shakespeare(args.out)]
    split = {"val": args.val, "val_share": args.val_share}
    prepare_files(paths, args.out, "char", source, **split)


if __name__ == "__main__":
    run(main)
