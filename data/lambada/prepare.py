"""
LAMBADA in GPT-2's tokens: 5,153 passages of novels whose last word readers can guess from the whole
passage only (Paperno et al. 2016, arXiv:1606.06031), in the version that OpenAI evaluated GPT-2 on,
with the line breaks and punctuation of the books. Licence: MIT, and CC BY 4.0 for the original.

    python data/lambada/prepare.py
    python data/lambada/prepare.py --input passages.jsonl           # offline, or other passages

For evaluation only: every passage is in the test split and ends with END_OF_TEXT, and only its last
word is scored. Needs about 4 MB in the Hugging Face cache (HF_HOME) and 1 MB in --out. A text file
of --input has one passage per line.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data.command_line import parse_args
from data.downloads import hub_space, hub_texts, load_hub
from data.text import open_text, read_documents
from data.tokenizer import END_OF_TEXT, GPT2Tokenizer
from data.writing import check_disk, write_dataset

NAME = "EleutherAI/lambada_openai"
MB = 10**6


def main():
    args = parse_args(__file__, __doc__, num_proc=True, val_share=None)
    tokenizer = GPT2Tokenizer()
    if args.input:
        texts, source = passages(args.input), ", ".join(path.name for path in args.input)
    else:
        check_disk(hub_space(NAME, 4 * MB), (args.out, 1 * MB))
        # The main branch holds a script, which `datasets` no longer runs; this branch holds
        # Parquet files, in English (default) and in translations
        english = {"test": "default/test/*.parquet"}
        tables = load_hub(NAME, revision="refs/convert/parquet", data_files=english)
        texts, source = hub_texts(tables["test"]), NAME
    pieces = (("test", text + END_OF_TEXT) for text in texts)
    write_dataset(args.out, tokenizer, pieces, source, 2 * MB, args.num_proc, last_word=True)


def passages(paths: list[Path]) -> Iterator[str]:
    """The texts of JSON files, and the lines of others."""
    for path in paths:
        if (documents := read_documents(path)) is not None:
            yield from documents
        else:
            with open_text(path) as file:
                yield from (line.strip() for line in file if not line.isspace())


if __name__ == "__main__":
    run(main)
