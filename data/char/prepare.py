"""
Any text, character by character.

    python data/char/prepare.py --input my.txt                      # train with --dataset=char
    python data/char/prepare.py --input my.txt --out data/mytext    # train with --dataset=mytext

The last tenth of a text is the validation split; of .jsonl it is every tenth document.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data.command_line import parse_args
from data.writing import prepare_files


def main():
    args = parse_args(__file__, __doc__, input_required=True)
    prepare_files(args.input, args.out, "char")


if __name__ == "__main__":
    run(main)
