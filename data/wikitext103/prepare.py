"""
WikiText-103 in GPT-2's tokens: 103 million words of Wikipedia's good and featured articles (Merity
et al. 2016, arXiv:1609.07843), the version without <unk>. Licence: CC BY-SA 3.0.

    python data/wikitext103/prepare.py
    python data/wikitext103/prepare.py --raw                          # keep " @-@ ", " ," and so on
    python data/wikitext103/prepare.py --input wiki.train.raw wiki.valid.raw wiki.test.raw

Needs about 1 GB in the Hugging Face cache (HF_HOME) and 0.3 GB in --out. The three splits are the
data set's own; validation and test are those of WikiText-2. Three files of --input are the
training, validation and test split, in that order. With any other number of files, the last tenth,
or every tenth document of JSON, is validation. Spaces around punctuation are removed
(data/words.py), as in GPT-2's paper.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data.command_line import parse_args
from data.words import detokenize_wikitext, prepare_corpus

MB = 10**6


def main():
    args = parse_args(__file__, __doc__, num_proc=True, corpus=True)
    prepare_corpus(
        args,
        "Salesforce/wikitext",
        "wikitext-103-raw-v1",
        size=550 * MB,
        detokenize=detokenize_wikitext,
        line=lambda row: row or " \n",  # empty lines on the hub have lost their end
    )


if __name__ == "__main__":
    run(main)
