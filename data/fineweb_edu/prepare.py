"""
FineWeb-Edu in GPT-2's tokens: a sample of web pages that a classifier found educational (Penedo et
al. 2024, arXiv:2406.17557). Licence: ODC-By 1.0, and Common Crawl's terms of use.

    python data/fineweb_edu/prepare.py                              # 1 billion tokens
    python data/fineweb_edu/prepare.py --tokens 1e10                # all of the hub's sample-10BT
    python data/fineweb_edu/prepare.py --input pages.jsonl          # offline, or another text

The pages are streamed until --tokens of training are complete, and only the tokens are stored: a
billion takes 2 GB in --out and about 3 GB of download. Pages 1, 501, 1001 and so on are the
validation split. Files of --input are used whole, one part in 500 for validation.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data.command_line import parse_args
from data.downloads import hub_errors, load_hub
from data.tokenizer import END_OF_TEXT, GPT2Tokenizer
from data.writing import check_disk, prepare_files, write_dataset

NAME, CONFIG = "HuggingFaceFW/fineweb-edu", "sample-10BT"
EVERY = 500


def main():
    args = parse_args(__file__, __doc__, num_proc=True, tokens=10**9, val_share="0.002")
    if args.input:
        split = {"val": args.val, "val_share": args.val_share}
        prepare_files(args.input, args.out, "gpt2", num_proc=args.num_proc, **split)
        return
    tokenizer = GPT2Tokenizer()
    size = 5 * args.tokens  # characters
    check_disk((args.out, size // 2))
    pages = load_hub(NAME, CONFIG, split="train", streaming=True)
    pieces = split_pages(pages, args.tokens)
    write_dataset(args.out, tokenizer, pieces, f"{NAME} {CONFIG}", size, args.num_proc)


def split_pages(pages: Iterable[dict], tokens: int) -> Iterator[tuple[str, str]]:
    """The pieces of the first pages, until training has `tokens` by the counts of the data set.

    Raises UserError if the stream breaks off.
    """
    with hub_errors(NAME):
        for number, page in enumerate(pages):
            split = "train" if number % EVERY else "val"
            yield split, page["text"] + END_OF_TEXT
            if split == "train":
                tokens -= page["token_count"] + 1  # token_count leaves END_OF_TEXT out
                if tokens <= 0:
                    return


if __name__ == "__main__":
    run(main)
