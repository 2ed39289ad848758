"""
LAMBADA in GPT-2's tokens: 5,153 passages of novels whose last word a reader guesses only from the
whole of it (Paperno et al. 2016, arXiv:1606.06031), in the version that OpenAI evaluated GPT-2 on,
with the line breaks and punctuation of the books. Licence: MIT, and CC BY 4.0 for the original.

    python data/lambada/prepare.py
    python data/lambada/prepare.py --input passages.jsonl           # offline, or other passages

For evaluation only: all is the test split, each passage ended by END_OF_TEXT, and of each the last
word counts. Needs about 4 MB in the Hugging Face cache (HF_HOME) and 1 MB in --out. A text file of
--input has one passage a line.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data import common
from data.tokenizer import END_OF_TEXT, GPT2Tokenizer

NAME = "EleutherAI/lambada_openai"
MB = 10**6


def main():
    args = common.parse_args(__file__, __doc__, num_proc=True)
    tokenizer = GPT2Tokenizer()
    if args.input:
        texts, source = passages(args.input), ", ".join(path.name for path in args.input)
    else:
        common.check_disk(common.hub_need(NAME, 4 * MB), (args.out, 1 * MB))
        # The main branch holds a script, which `datasets` no longer runs; this one its
        # parquet, in English (default) and in translations
        english = {"test": "default/test/*.parquet"}
        tables = common.load_hub(NAME, revision="refs/convert/parquet", data_files=english)
        texts, source = common.hub_texts(tables["test"]), NAME
    pieces = (("test", text + END_OF_TEXT) for text in texts)
    facts = {"last_word": True}
    common.write_dataset(args.out, tokenizer, pieces, source, 2 * MB, args.num_proc, **facts)


def passages(paths: list[Path]) -> Iterator[str]:
    """The texts of .jsonl files, and the lines of others."""
    for path in paths:
        if path.suffix == ".jsonl":
            yield from common.read_jsonl(path)
        else:
            with common.open_text(path) as file:
                yield from (line.strip() for line in file if not line.isspace())


if __name__ == "__main__":
    run(main)
