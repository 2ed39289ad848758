"""
Anyone's text, character by character.

    python data/char/prepare.py --input my.txt                      # then train with --dataset=char
    python data/char/prepare.py --input my.txt --out data/mytext    # and here with --dataset=mytext

The text is UTF-8; its last tenth is validation. Of .jsonl every tenth document is, from the first.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data.common import parse_args, prepare_files


def main():
    args = parse_args(__file__, __doc__, input_required=True)
    prepare_files(args.input, args.out, "char")


if __name__ == "__main__":
    run(main)
