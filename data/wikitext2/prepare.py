"""
WikiText-2 in GPT-2's tokens: 2 million words of Wikipedia's good and featured articles (Merity et
al. 2016, arXiv:1609.07843), the version without <unk>. Licence: CC BY-SA 3.0.

    python data/wikitext2/prepare.py
    python data/wikitext2/prepare.py --raw                          # " @-@ ", " ," and so on stay
    python data/wikitext2/prepare.py --input wiki.train.raw wiki.valid.raw wiki.test.raw

Needs about 30 MB in the Hugging Face cache (HF_HOME) and 7 MB in --out. The three splits are the
data set's own. Three files of --input are the training, validation and test split, in that order;
of any other number the last tenth, or every tenth document of .jsonl, is validation. Spaces around
punctuation are taken away (data/detokenize.py), as in GPT-2's paper.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data import common, detokenize

MB = 10**6


def main():
    args = common.parse_args(__file__, __doc__, num_proc=True, raw=True)
    common.prepare_corpus(
        args,
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        size=13 * MB,
        detokenize=detokenize.wikitext,
        line=lambda row: row or " \n",  # the hub's version of an empty line has lost its end
    )


if __name__ == "__main__":
    run(main)
