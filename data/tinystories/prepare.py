"""
TinyStories in GPT-2's tokens: 2 million stories in the words of a small child, written by GPT-3.5
and GPT-4 (Eldan and Li 2023, arXiv:2305.07759). Licence: CDLA-Sharing-1.0.

    python data/tinystories/prepare.py
    python data/tinystories/prepare.py --input stories.jsonl        # offline, or another text

Needs about 3 GB in the Hugging Face cache (HF_HOME) and 1 GB in --out. Validation is the data set's
own; of --input it is a tenth.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data import common
from data.tokenizer import GPT2Tokenizer

NAME = "roneneldan/TinyStories"
GB = 10**9


def main():
    args = common.parse_args(__file__, __doc__, num_proc=True)
    if args.input:
        common.prepare_files(args.input, args.out, "gpt2", num_proc=args.num_proc)
        return
    tokenizer = GPT2Tokenizer()
    common.check_disk(common.hub_need(NAME, 3 * GB), (args.out, 1 * GB))
    stories = common.load_hub(NAME)
    documents = common.hub_documents(train=stories["train"], val=stories["validation"])
    common.write_dataset(args.out, tokenizer, documents, NAME, 2 * GB, args.num_proc)


if __name__ == "__main__":
    run(main)
