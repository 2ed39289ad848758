"""
Tiny Shakespeare in GPT-2's tokens, to fine-tune GPT-2 with: 1.1 MB of the plays, collected by
Andrej Karpathy for char-rnn; Shakespeare's text is in the public domain.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input input.txt            # offline, or another text

As nanoGPT's: 301,966 tokens of training, and the last tenth of the text, 36,059, validation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data.common import parse_args, prepare_tiny_shakespeare


def main():
    args = parse_args(__file__, __doc__)
    prepare_tiny_shakespeare(args.input, args.out, "gpt2")


if __name__ == "__main__":
    run(main)
