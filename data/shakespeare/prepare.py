"""
Tiny Shakespeare in GPT-2's tokens, for fine-tuning GPT-2: 1.1 MB of the plays, collected by Andrej
Karpathy for char-rnn; Shakespeare's text is in the public domain.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input input.txt            # offline, or another text

The split is nanoGPT's: 301,966 tokens for training, and the last tenth of the text, 36,059 tokens,
for validation.
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
    prepare_files(paths, args.out, "gpt2", source, **split)


if __name__ == "__main__":
    run(main)
