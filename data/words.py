"""
Corpora whose words and punctuation marks stand apart, turned into ordinary text.

GPT-2 was trained on ordinary text, and its paper (Radford et al. 2019) undoes such artefacts before
it evaluates. The detokenisers here take away spaces, and the @ signs of WikiText, and change
nothing else; they work line by line. Perplexity per word stays comparable, because words are
counted in the original text.
"""

import re
from collections.abc import Callable

from data.downloads import hub_space, hub_texts, load_hub
from data.meta import SPLITS
from data.text import whole_lines
from data.tokenizer import GPT2Tokenizer
from data.writing import check_disk, prepare_files, write_dataset

ENDS_OF_LINES = (r"(?m)^ +| +$", "")

# Left alone because they may be either: ' (quotation mark or genitive of a plural), dashes and
# slashes between words, the spaces of an ellipsis. In a line with an odd number of " some pairs may
# be wrong.
WIKITEXT = (
    ENDS_OF_LINES,
    (r" @([-,.])@ ", r"\1"),  # well @-@ known, 1 @,@ 000, 2 @.@ 5
    (r"(?<==) (?==)", ""),  # = = A heading = =
    (r"(?<=\d) ([:/–]) (?=\d)", r"\1"),  # 10 : 30, 1914 – 18
    (r" (?='(?:s|t|d|m|re|ve|ll)(?!\S))", ""),  # it 's, don 't
    (r" (?=[.,:;!?%)\]](?!\S))", ""),
    (r"(?<=[(\[$£€#]) ", ""),
    (r'(?<!\S)(\(*)" ([^"\n]*[^"\s]) "', r'\1"\2"'),  # each " with the next one of its line
)

# Words stay in lower case and without punctuation, numbers stay N, and rare words <unk>
PTB = (
    ENDS_OF_LINES,
    (r" (?=(?:n't|'(?:s|d|m|re|ve|ll)?)(?!\S))", ""),  # do n't, it 's, the banks ' money
    (r"(?<=[$#]) (?=N(?!\S))", ""),  # $ N
)


def detokenize_wikitext(text: str) -> str:
    return _substitute(WIKITEXT, text)


def detokenize_ptb(text: str) -> str:
    return _substitute(PTB, text)


def _substitute(rules: tuple, text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def prepare_corpus(
    args,
    name: str,
    *config: str,
    size: int,
    detokenize: Callable[[str], str],
    line: Callable[[str], str],
    column: str = "text",
    **options,
) -> None:
    """Make a data set in three splits of args.input, or of one column of hub data set `name`.

    `line` turns a row of the hub's table into a line of text; `options` are those of `load_hub`.
    `size` is the approximate number of characters of the corpus.
    """
    shared = {"num_proc": args.num_proc, "detokenize": None if args.raw else detokenize}
    if args.input:
        split = {"val": args.val, "val_share": args.val_share, "own_splits": True}
        prepare_files(args.input, args.out, "gpt2", **split, **shared)
        return
    tokenizer = GPT2Tokenizer()
    check_disk(hub_space(name, 2 * size, *config), (args.out, size // 2))
    tables = load_hub(name, *config, **options)
    pieces = (
        (split, text)
        for split, table in zip(SPLITS, ("train", "validation", "test"), strict=True)
        for text in whole_lines(map(line, hub_texts(tables[table], column)))
    )
    source = " ".join((name, *config))
    write_dataset(args.out, tokenizer, pieces, source, size, line_ends=True, **shared)
