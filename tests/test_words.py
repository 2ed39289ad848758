"""data/words.py: detokenisers join what belongs together, and change nothing else."""

import re

import pytest

from data import words

WIKITEXT = {  # the original, and the ordinary text
    " = = Career = = \n": "== Career ==\n",
    " \n": "\n",
    " a guest @-@ starring role for 1 @,@ 000 @.@ 5 , ( or 5 % of £ 9 ) . \n": (
        "a guest-starring role for 1,000.5, (or 5% of £9).\n"
    ),
    ' " The Bill " , ( " Who ? " ) and " Herons . " \n': '"The Bill", ("Who?") and "Herons."\n',
    " the actor 's , it 'd , I don 't ; from 1914 – 18 – at 10 : 30 : \n": (
        "the actor's, it'd, I don't; from 1914–18 – at 10:30:\n"
    ),
    " the players ' cup ... <unk> 's , ' so ' / = x \n": (
        "the players ' cup ... <unk>'s, ' so ' / = x\n"
    ),
    "already, (plain) 'text'; it's \"so\".\n": "already, (plain) 'text'; it's \"so\".\n",
}
PTB = {
    " mr. <unk> is n't sure what they 'd do it 's early \n": (
        "mr. <unk> isn't sure what they'd do it's early\n"
    ),
    " the banks ' profit rose N N to us$ N million c$ N \n": (
        "the banks' profit rose N N to us$N million c$N\n"
    ),
    " the 'bank n'to $ NN # N \n": "the 'bank n'to $ NN #N\n",
}


@pytest.mark.parametrize(
    "detokenize, lines", [(words.detokenize_wikitext, WIKITEXT), (words.detokenize_ptb, PTB)]
)
def test_detokenisers_remove_the_spaces_that_do_not_belong(detokenize, lines):
    for line, expected in lines.items():
        assert detokenize(line) == expected
        assert "".join(expected.split()) == re.sub(r"\s|@(?=[-,.]@)|(?<=@[-,.])@", "", line)
    assert detokenize("".join(lines)) == "".join(lines.values())
