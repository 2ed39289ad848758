"""
Detokenizers: corpora whose words and punctuation stand apart, as text that a person would write.

GPT-2 was trained on ordinary text, and its paper (Radford et al. 2019) undoes such artefacts before
it evaluates. These take away spaces, and WikiText's @ signs, and nothing else; they look at a line
at a time. Perplexity per word stays comparable: words are counted in the text as it was.
"""

import re

ENDS_OF_LINES = (r"(?m)^ +| +$", "")

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
# It leaves alone what may be either: ' (quotes or a plural's genitive), dashes and slashes between
# words, and the spaces of an ellipsis. Of a line with an odd number of " some pairs may be wrong.

PTB = (
    ENDS_OF_LINES,
    (r" (?=(?:n't|'(?:s|d|m|re|ve|ll)?)(?!\S))", ""),  # do n't, it 's, the banks ' money
    (r"(?<=[$#]) (?=N(?!\S))", ""),  # $ N
)
# Words stay in lower case and without punctuation, numbers stay N, and rare words <unk>.


def wikitext(text: str) -> str:
    return _substitute(WIKITEXT, text)


def ptb(text: str) -> str:
    return _substitute(PTB, text)


def _substitute(table, text: str) -> str:
    for pattern, replacement in table:
        text = re.sub(pattern, replacement, text)
    return text
