"""data/tokenizer.py: text survives the round trip, and unknown text is one line of error."""

import json
import os

import numpy as np
import pytest
from conftest import subprocess_run

from configurator import UserError
from data.tokenizer import CharTokenizer, GPT2Tokenizer, StringTokenizer, from_meta, meta_of_model


@pytest.fixture
def gpt2(gpt2_files):
    return GPT2Tokenizer()


@pytest.mark.parametrize("text", ["", "a", "banana", "naïve \N{GRINNING FACE}\n\0\ttab"])
def test_characters_survive_the_round_trip(text):
    tokenizer = CharTokenizer("".join(sorted(set(text + "abn"))))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_the_id_of_a_character_is_its_place_in_chars():
    assert CharTokenizer("zyx").encode("xyzzy").tolist() == [2, 1, 0, 0, 1]


def test_unknown_characters_are_named_and_the_allowed_ones_shown_in_one_line():
    with pytest.raises(UserError) as error:
        CharTokenizer("\nabc").encode("a\tb\n€")
    message = str(error.value)
    assert r"'\t€'" in message and r"'\nabc'" in message and "\n" not in message


def test_a_large_alphabet_is_shown_shortened():
    with pytest.raises(UserError) as error:
        CharTokenizer("".join(map(chr, range(0x4E00, 0x6000)))).encode("a")
    assert len(str(error.value)) < 300


def test_an_id_beyond_the_vocabulary_is_not_decoded():
    with pytest.raises(IndexError):
        CharTokenizer("ab").decode([0, 2])


def test_characters_come_back_from_their_meta():
    tokenizer = from_meta(CharTokenizer("cab").meta())
    assert (tokenizer.chars, tokenizer.vocab_size) == ("cab", 3)


@pytest.mark.parametrize(
    "meta",
    [
        None,
        {"tokenizer": "bert"},
        {"tokenizer": "char"},
        {"tokenizer": "char", "chars": ""},
        {"tokenizer": "char", "chars": "abca"},
        {"tokenizer": "char", "chars": ["a", "b"]},
        {"tokenizer": "strings", "strings": []},
        {"tokenizer": "strings", "strings": ["a", 1]},
        {"tokenizer": "strings", "strings": "ab"},
    ],
)
def test_from_meta_accepts_only_known_descriptions(meta):
    with pytest.raises(UserError, match="no tokenizer is described"):
        from_meta(meta)


def test_a_description_without_a_tokenizer_is_an_error_that_says_so():
    for meta in ({}, {"vocab_size": 8, "dtype": "uint16"}):
        with pytest.raises(UserError, match="only token ids.*add the strings of the tokens"):
            from_meta(meta)


def test_strings_are_encoded_by_the_longest_match_and_decoded_by_joining():
    tokenizer = StringTokenizer(["the ", "cat ", "the cat", "t", "", "t", "he"])
    assert tokenizer.vocab_size == 7
    ids = tokenizer.encode("the catthe the the cat")
    assert ids.dtype == np.int64 and ids.tolist() == [2, 0, 0, 2]
    assert tokenizer.decode([0, 1, 4, 6, 5]) == "the cat het"
    assert tokenizer.encode("").tolist() == []
    again = from_meta(tokenizer.meta())
    assert isinstance(again, StringTokenizer) and again.strings == tokenizer.strings
    with pytest.raises(IndexError):
        tokenizer.decode([7])


def test_text_that_no_string_matches_is_one_line_that_names_the_place():
    with pytest.raises(UserError, match=r"from 'dog\\n' on.*its tokens are \['the ', 'cat '\]"):
        StringTokenizer(["the ", "cat "]).encode("the cat dog\n")


@pytest.mark.parametrize("text", ["", "Hello, world", "naïve \N{GRINNING FACE}\n\n  x\r\n"])
def test_gpt2_survives_the_round_trip(gpt2, text):
    ids = gpt2.encode(text)
    assert ids.dtype == np.int64 and gpt2.decode(ids) == text


def test_gpt2_ids_are_those_of_openai(gpt2):
    assert gpt2.encode("Hello world").tolist() == [15496, 995]


def test_gpt2_reads_end_of_text_as_one_token(gpt2):
    assert gpt2.encode("a<|endoftext|>b").tolist() == [64, gpt2.eot, 65]


def test_gpt2_takes_a_broken_character_of_the_command_line(gpt2):
    assert gpt2.decode(gpt2.encode("a\udcffb")) == "a?b"


def test_gpt2_comes_back_from_its_meta(gpt2):
    assert isinstance(from_meta(gpt2.meta()), GPT2Tokenizer)


def test_a_missing_gpt2_vocabulary_is_one_line_that_names_its_folder(tmp_path):
    imports = "from configurator import run; from data.tokenizer import GPT2Tokenizer"
    script = f"{imports}; run(GPT2Tokenizer)"
    nowhere = {"TIKTOKEN_CACHE_DIR": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    done = subprocess_run("-c", script, env={**os.environ, **nowhere})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"TIKTOKEN_CACHE_DIR is {tmp_path}" in done.stderr


def test_a_model_of_the_hub_has_its_own_tokenizer_too(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    of_model = tmp_path / "models--ada--small"
    (of_model / "refs").mkdir(parents=True)
    (of_model / "refs" / "main").write_text("123abc")
    (of_model / "snapshots" / "123abc").mkdir(parents=True)
    meta = {"tokenizer": "char", "chars": "ab"}
    config = of_model / "snapshots" / "123abc" / "tokenizer_config.json"
    config.write_text(json.dumps({"meta": meta}))
    assert meta_of_model("ada/small") == meta
    for other in ("ada/large", "gpt2", str(tmp_path)):
        assert meta_of_model(other) == {"tokenizer": "gpt2"}
