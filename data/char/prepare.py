"""
Any text, character by character.

    python data/char/prepare.py --input my.txt                      # train with --dataset=char
    python data/char/prepare.py --input my.txt --out data/mytext    # train with --dataset=mytext
    python data/char/prepare.py --input a.jsonl --val b.jsonl

Without --val the last tenth of a text is the validation split, or every tenth document of JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data.command_line import parse_args
from data.writing import prepare_files


def main():
    args = parse_args(__file__, __doc__, input_required=True)
    prepare_files(args.input, args.out, "char", val=args.val, val_share=args.val_share)


if __name__ == "__main__":
    run(main)
