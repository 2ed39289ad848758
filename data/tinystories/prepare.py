"""
TinyStories in GPT-2's tokens: 2 million stories in words that small children know, written by
GPT-3.5 and GPT-4 (Eldan and Li 2023, arXiv:2305.07759). Licence: CDLA-Sharing-1.0.

    python data/tinystories/prepare.py
    python data/tinystories/prepare.py --input stories.jsonl        # offline, or another text

Needs about 3 GB in the Hugging Face cache (HF_HOME) and 1 GB in --out. The validation split is the
data set's own; of files given with --input it is a tenth.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data.command_line import parse_args
from data.downloads import hub_documents, hub_space, load_hub
from data.tokenizer import GPT2Tokenizer
from data.writing import check_disk, prepare_files, write_dataset

NAME = "roneneldan/TinyStories"
GB = 10**9


def main():
    args = parse_args(__file__, __doc__, num_proc=True)
    if args.input:
        split = {"val": args.val, "val_share": args.val_share}
        prepare_files(args.input, args.out, "gpt2", num_proc=args.num_proc, **split)
        return
    tokenizer = GPT2Tokenizer()
    check_disk(hub_space(NAME, 3 * GB), (args.out, 1 * GB))
    stories = load_hub(NAME)
    documents = hub_documents(train=stories["train"], val=stories["validation"])
    write_dataset(args.out, tokenizer, documents, NAME, 2 * GB, args.num_proc)


if __name__ == "__main__":
    run(main)
