"""
The Penn Treebank in GPT-2's tokens: a million words of the Wall Street Journal of 1989 (Marcus et
al. 1993), as Mikolov et al. (2010) prepared them: lower case, 10,000 words, no punctuation, N for
numbers and <unk> for other words. Licence: the Linguistic Data Consortium's, for research.

    python data/ptb/prepare.py
    python data/ptb/prepare.py --raw                                # keep " n't" and " 's" apart
    python data/ptb/prepare.py --input ptb.train.txt ptb.valid.txt ptb.test.txt

Needs about 15 MB in the Hugging Face cache (HF_HOME) and 3 MB in --out. The three splits are the
data set's own: 887,521, 70,390 and 78,669 words; the papers count the ends of lines as words too.
Three files of --input are the training, validation and test split, in that order. With any other
number of files, the last tenth, or every tenth document of JSON, is validation. Spaces within
words are removed (data/words.py), as in GPT-2's paper.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import run
from data.command_line import parse_args
from data.words import detokenize_ptb, prepare_corpus

MB = 10**6


def main():
    args = parse_args(__file__, __doc__, num_proc=True, corpus=True)
    prepare_corpus(
        args,
        "ptb-text-only/ptb_text_only",
        size=6 * MB,
        detokenize=detokenize_ptb,
        column="sentence",
        line=lambda row: f" {row} \n",  # as in Mikolov's files
        # The main branch holds a script, which `datasets` no longer runs; this one is Parquet
        revision="refs/convert/parquet",
    )


if __name__ == "__main__":
    run(main)
