"""
FineWeb-Edu in GPT-2's tokens: a sample of web pages that a classifier found educational (Penedo et
al. 2024, arXiv:2406.17557). Licence: ODC-By 1.0, and Common Crawl's terms of use.

    python data/fineweb_edu/prepare.py                              # 1 billion tokens
    python data/fineweb_edu/prepare.py --tokens 1e10                # all of the hub's sample-10BT
    python data/fineweb_edu/prepare.py --input pages.jsonl          # offline, or another text

The pages are streamed, up to the one that completes --tokens of training, so that nothing is kept
but the tokens: 2 GB in --out for each billion, of about 3 GB that are downloaded. Every 500th page
from the first is validation: that of fewer tokens is the beginning of that of more. --input is
taken whole; one part in 500 of it is validation.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data import common
from data.tokenizer import END_OF_TEXT, GPT2Tokenizer

NAME, SAMPLE = "HuggingFaceFW/fineweb-edu", "sample-10BT"
EVERY = 500


def main():
    args = common.parse_args(__file__, __doc__, num_proc=True, tokens=10**9)
    if args.input:
        common.prepare_files(args.input, args.out, "gpt2", every=EVERY, num_proc=args.num_proc)
        return
    tokenizer = GPT2Tokenizer()
    size = 5 * args.tokens  # characters
    common.check_disk((args.out, size // 2))
    pages = common.load_hub(NAME, SAMPLE, split="train", streaming=True)
    common.write_dataset(
        args.out,
        tokenizer,
        pieces(pages, args.tokens),
        f"{NAME} {SAMPLE}",
        size,
        args.num_proc,
    )


def pieces(pages: Iterable[dict], tokens: int) -> Iterator[tuple[str, str]]:
    """The pieces of the first pages, until `tokens` of training, as the pages tell their length.

    Raises UserError if the stream breaks off."""
    with common.hub_errors(NAME):
        for number, page in enumerate(pages):
            split = "train" if number % EVERY else "val"
            yield split, page["text"] + END_OF_TEXT
            if split == "train":
                tokens -= page["token_count"] + 1  # theirs counts GPT-2's tokens without the end
                if tokens <= 0:
                    return


if __name__ == "__main__":
    run(main)
