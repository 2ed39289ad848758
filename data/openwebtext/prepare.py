"""
OpenWebText in GPT-2's tokens: 8 million web pages that Reddit linked to, an open replica of GPT-2's
training data (Gokaslan and Cohen 2019). The packaging is CC0; the pages belong to their authors.

    python data/openwebtext/prepare.py --num_proc 8
    python data/openwebtext/prepare.py --input pages.jsonl          # offline, or another text

Needs about 65 GB in the Hugging Face cache (HF_HOME) and 18 GB in --out. The split is nanoGPT's:
0.05% of the pages, 4.4 million tokens, for validation, and 9 billion tokens for training. Of files
given with --input, 0.05% is validation too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data.command_line import parse_args
from data.downloads import hub_documents, hub_space, load_hub
from data.tokenizer import GPT2Tokenizer
from data.writing import check_disk, prepare_files, write_dataset

NAME = "Skylion007/openwebtext"
GB = 10**9


def main():
    args = parse_args(__file__, __doc__, num_proc=True, val_share="0.0005")
    if args.input:
        split = {"val": args.val, "val_share": args.val_share}
        prepare_files(args.input, args.out, "gpt2", num_proc=args.num_proc, **split)
        return
    tokenizer = GPT2Tokenizer()
    check_disk(hub_space(NAME, 65 * GB), (args.out, 18 * GB))
    # The main branch holds a script, which `datasets` no longer runs; this one holds Parquet files
    pages = load_hub(NAME, revision="refs/convert/parquet", num_proc=args.num_proc)
    pages = pages["train"].train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    documents = hub_documents(train=pages["train"], val=pages["test"])
    write_dataset(args.out, tokenizer, documents, NAME, 40 * GB, args.num_proc)


if __name__ == "__main__":
    run(main)
