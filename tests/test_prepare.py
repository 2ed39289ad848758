"""data/: every prepare.py writes a whole data set, or nothing and one line."""

import hashlib
import http.server
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from configurator import UserError
from data import common, detokenize
from data.dataset import Dataset
from data.tokenizer import CharTokenizer, GPT2Tokenizer, from_meta

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
SCRIPTS = sorted(path.parent.name for path in ROOT.glob("data/*/prepare.py"))


@pytest.fixture
def gpt2_files(monkeypatch):
    if not (SHARED / "tiktoken").is_dir():
        pytest.skip("GPT-2's vocabulary is not on this machine")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))


def start(name, *args, **env):
    return subprocess.Popen(
        [sys.executable, ROOT / "data" / name / "prepare.py", *map(str, args)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_script(name, *args, **env):
    process = start(name, *args, **env)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_ids(folder, split):
    dtype = json.loads((folder / "meta.json").read_text())["dtype"]
    return np.fromfile(folder / f"{split}.bin", {"uint16": "<u2", "uint32": "<u4"}[dtype])


def read(folder):
    """meta.json, and the text of both splits."""
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = from_meta(meta)
    train, val = (tokenizer.decode(read_ids(folder, split)) for split in ("train", "val"))
    return meta, train, val


class OddTokenizer(CharTokenizer):
    """Gives the ids that it is told to."""

    def __init__(self, vocab_size, *ids):
        super().__init__("a")
        self.vocab_size, self.ids = vocab_size, ids

    def encode(self, text):
        return np.array(self.ids)


# ---- what is written ----


def test_meta_tells_what_the_files_hold(tmp_path):
    pieces = [("train", "abcabc\n"), ("val", "cab"), ("train", "b")]
    common.write_dataset(tmp_path, CharTokenizer("\nabc"), pieces, "a test")
    meta, train, val = read(tmp_path)
    assert (train, val) == ("abcabc\nb", "cab")
    digests = {s: hashlib.sha256((tmp_path / f"{s}.bin").read_bytes()) for s in ("train", "val")}
    assert meta == {
        "vocab_size": 4,
        "dtype": "uint16",
        "tokenizer": "char",
        "chars": "\nabc",
        "train_tokens": 8,
        "train_bytes": 8,
        "train_words": 2,
        "train_lines": 1,
        "train_sha256": digests["train"].hexdigest(),
        "val_tokens": 3,
        "val_bytes": 3,
        "val_words": 1,
        "val_lines": 0,
        "val_sha256": digests["val"].hexdigest(),
        "source": "a test",
    }
    assert sorted(contents(tmp_path)) == ["meta.json", "train.bin", "val.bin"]


def test_what_prepare_writes_dataset_reads(tmp_path):
    pieces = [("train", "abc"), ("val", "cab")]
    common.write_dataset(tmp_path / "mine", CharTokenizer("abc"), pieces, "a test")
    assert Dataset("mine", data_dir=tmp_path).tokens["val"].tolist() == [2, 0, 1]


@pytest.mark.parametrize("vocab_size, dtype", [(65536, "uint16"), (65537, "uint32")])
def test_ids_take_two_bytes_while_they_fit(tmp_path, vocab_size, dtype):
    tokenizer = OddTokenizer(vocab_size, 0, vocab_size - 1)
    common.write_dataset(tmp_path, tokenizer, [("train", "a"), ("val", "a")], "a test")
    assert json.loads((tmp_path / "meta.json").read_text())["dtype"] == dtype
    assert read_ids(tmp_path, "val").tolist() == [0, vocab_size - 1]


@pytest.mark.parametrize("bad", [-1, 10, 70000])
def test_an_id_outside_the_vocabulary_is_never_written(tmp_path, bad):
    with pytest.raises(UserError, match="allow 0 to 9"):
        common.write_dataset(tmp_path, OddTokenizer(10, 1, bad), [("train", "a")], "a test")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_split_is_an_error(tmp_path, split):
    with pytest.raises(UserError, match="would be empty"):
        common.write_dataset(tmp_path, CharTokenizer("a"), [(split, "aaa")], "a test")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("trouble", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [True, False])
def test_an_interrupted_preparation_leaves_what_was_there(tmp_path, monkeypatch, trouble, before):
    if before:
        pieces = [("train", "a"), ("val", "b"), ("test", "a")]
        common.write_dataset(tmp_path, CharTokenizer("ab"), pieces, "old")
    old = contents(tmp_path)

    def pieces():
        yield "train", "ccc"
        yield "val", "ccc"
        yield "test", "ccc"
        assert len(contents(tmp_path)) == len(old) + 3  # it is in the middle of writing
        raise trouble

    monkeypatch.setattr(common, "CHUNK", 1)
    with pytest.raises(trouble):
        common.write_dataset(tmp_path, CharTokenizer("c"), pieces(), "new")
    assert contents(tmp_path) == old
    assert len(list(tmp_path.iterdir())) == len(old)


def test_a_disk_without_room_is_noticed_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 0, 9))
    common.check_disk((tmp_path, 4), (tmp_path / "new", 5))
    with pytest.raises(UserError, match="are needed"):
        common.check_disk((tmp_path, 5), (tmp_path / "new", 5))
    with pytest.raises(UserError, match="are needed"):
        pieces = [("train", "a"), ("val", "a")]
        common.write_dataset(tmp_path / "new", CharTokenizer("a"), pieces, "a test", size=5)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another with --out"):
        common.write_dataset(tmp_path / "file" / "new", CharTokenizer("a"), [], "a test")


@pytest.mark.parametrize(
    "text", ["to be\u2003or  not\n\nto be", " to be", "to be ", "", "é\u00a0\x1c"]
)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_words_and_bytes_are_counted_across_pieces(tmp_path, monkeypatch, text, size):
    monkeypatch.setattr(common, "CHUNK", 1)
    pieces = [("train", text[i : i + size]) for i in range(0, len(text), size)]
    pieces = [("val", "a b"), *pieces, ("train", "end"), ("val", "c")]
    common.write_dataset(tmp_path, CharTokenizer("".join(sorted({*text, *"abcend "}))), pieces, "-")
    meta, train, _ = read(tmp_path)
    assert train == text + "end" and meta["train_bytes"] == len(train.encode())
    assert (meta["train_words"], meta["val_words"]) == (len(train.split()), 2)
    assert meta["train_lines"] == text.count("\n")


def test_end_of_text_is_a_token_and_neither_bytes_nor_a_word(tmp_path, gpt2_files):
    pieces = [("test", "to be<|endoftext|>"), ("test", "or\ud800<|endoftext|>not")]
    common.write_dataset(tmp_path, GPT2Tokenizer(), pieces, "a test", last_word=True)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["test_words"] == 4
    assert meta["test_bytes"] == len("to beor?not") and meta["test_tokens"] == 7


def test_end_of_text_is_text_where_it_is_not_a_token(tmp_path):
    pieces = [("test", "<|endoftext|>")]
    common.write_dataset(tmp_path, CharTokenizer("".join(sorted(set(pieces[0][1])))), pieces, "-")
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["test_tokens"] == meta["test_bytes"] == 13 and meta["test_words"] == 1


def test_words_are_those_before_detokenizing_and_bytes_those_after(tmp_path):
    pieces = [("test", " it 's \n"), ("test", " so \n")]
    tokenizer = CharTokenizer("\n 'iost")
    common.write_dataset(tmp_path, tokenizer, pieces, "a test", detokenize=detokenize.ptb)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert from_meta(meta).decode(read_ids(tmp_path, "test")) == "it's\nso\n"
    assert (meta["test_words"], meta["test_lines"], meta["test_bytes"]) == (3, 2, 8)


def test_a_data_set_may_have_a_third_split_or_nothing_else(tmp_path):
    tokenizer, pieces = CharTokenizer("ab"), [("test", "ab"), ("train", "a"), ("val", "b")]
    common.write_dataset(tmp_path / "three", tokenizer, pieces, "a test")
    assert Dataset("three", tmp_path, ("val", "test")).tokens["test"].tolist() == [0, 1]
    common.write_dataset(tmp_path / "one", tokenizer, pieces[:1], "a test")
    assert sorted(contents(tmp_path / "one")) == ["meta.json", "test.bin"]
    with pytest.raises(UserError, match="one is for evaluation only"):
        Dataset("one", tmp_path)
    with pytest.raises(UserError, match="val.bin would be empty"):
        common.write_dataset(tmp_path / "two", tokenizer, pieces[:2], "a test")


# ---- detokenizers ----

WIKITEXT = {  # as it comes, and as it is made
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


@pytest.mark.parametrize("function, lines", [("wikitext", WIKITEXT), ("ptb", PTB)])
def test_detokenizers_join_what_belongs_together(function, lines):
    function = getattr(detokenize, function)
    for line, wanted in lines.items():
        assert function(line) == wanted
        assert "".join(wanted.split()) == re.sub(r"\s|@(?=[-,.]@)|(?<=@[-,.])@", "", line)
    assert function("".join(lines)) == "".join(lines.values())


# ---- what is read ----


def test_the_last_tenth_of_a_text_is_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "CHUNK", 7)
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "my.txt").write_text(text)
    common.prepare_files([tmp_path / "my.txt"], tmp_path / "out", "char")
    meta, train, val = read(tmp_path / "out")
    cut = len(text) * 9 // 10
    assert (train, val) == (text[:cut], text[cut:])
    assert meta["chars"] == "".join(sorted(set(text))) and meta["source"] == "my.txt"


def test_every_tenth_document_of_jsonl_is_validation(tmp_path):
    lines = [json.dumps({"text": f"text {i}", "other": 1}) for i in range(12)]
    (tmp_path / "my.jsonl").write_text("\n".join(lines) + "\n\n")
    common.prepare_files([tmp_path / "my.jsonl"], tmp_path / "out", "char")
    _, train, val = read(tmp_path / "out")
    assert val == "text 0\n\ntext 10\n\n"
    assert train == "".join(f"text {i}\n\n" for i in range(12) if i % 10)


def test_several_texts_each_give_their_end_to_validation(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 10)
    (tmp_path / "b.txt").write_text("b" * 10)
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    common.prepare_files(paths, tmp_path / "out", "char")
    assert read(tmp_path / "out")[1:] == ("a" * 9 + "\n\n" + "b" * 9 + "\n\n", "a\n\nb\n\n")


def test_three_files_may_be_the_splits_themselves(tmp_path):
    paths = [tmp_path / f"{split}.txt" for split in "abc"]
    for path in paths:
        path.write_text(path.stem * 10)
    pieces = list(common.read_files(paths, end="", own_splits=True))
    assert {split: text for split, text in pieces if text} == {
        "train": "a" * 10,
        "val": "b" * 10,
        "test": "c" * 10,
    }
    assert {split for split, text in common.read_files(paths[:2], "", own_splits=True)} == {
        "train",
        "val",
    }


def test_byte_order_mark_and_carriage_returns_are_not_part_of_a_text(tmp_path):
    (tmp_path / "my.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    pieces = common.read_files([tmp_path / "my.txt"], end="")
    assert "".join(text for _, text in pieces) == "one\ntwo\n"


def test_a_text_without_line_breaks_is_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "CHUNK", 100)
    (tmp_path / "my.txt").write_text("x" * 5000)
    pieces = [text for _, text in common.read_files([tmp_path / "my.txt"], end="")]
    assert "".join(pieces) == "x" * 5000 and max(map(len, pieces)) <= 100


def test_reading_in_pieces_changes_no_gpt2_token(tmp_path, monkeypatch, gpt2_files):
    space = [" ", "\n", "\n\n", "\n\n\n", " \n", "\n ", " \n ", "\n\n ", "\u00a0\n ", "\t\n"]
    space += ["\n\u00a0", "\n\n<|endoftext|>\n"]
    rng = np.random.default_rng(0)
    words = rng.choice(["to", "be", "'s", "!", "7", "<"], 3000)
    text = "".join(f"{word}{rng.choice(space)}" for word in words)
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(common, "CHUNK", 60)
    tokenizer = GPT2Tokenizer()
    with common.open_text(tmp_path / "my.txt") as file:
        pieces = list(common.whole_lines(common.chunks(file)))
    assert len(pieces) > 100
    ids = np.concatenate([tokenizer.encode(piece) for piece in pieces])
    assert ids.tolist() == tokenizer.encode(text).tolist()


def test_gpt2_documents_end_with_end_of_text(tmp_path, gpt2_files):
    lines = [json.dumps({"text": f"text {i}"}) for i in range(11)]
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    common.prepare_files([tmp_path / "my.jsonl"], tmp_path / "out", "gpt2", num_proc=2)
    meta, _, val = read(tmp_path / "out")
    assert val == "text 0<|endoftext|>text 10<|endoftext|>"
    assert read_ids(tmp_path / "out", "train").tolist().count(50256) == 9
    assert meta["vocab_size"] == 50257 and meta["tokenizer"] == "gpt2" and "chars" not in meta


# ---- downloads ----


class Server(http.server.BaseHTTPRequestHandler):
    PAGES = {
        "/good": (200, b"to be or not to be", 0),
        "/html": (200, b"\n<!DOCTYPE html><title>Sign in</title>", 0),
        "/broken": (200, b"to be", 13),  # promises 13 bytes more
        "/missing": (404, b"to be or not to be", 0),
    }

    def do_GET(self):
        status, body, promised = self.PAGES[self.path]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + promised))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_download_arrives_whole_and_is_kept(tmp_path, url):
    sha256 = hashlib.sha256(b"to be or not to be").hexdigest()
    path = common.download(f"{url}/good", tmp_path / "new" / "input.txt", 10, sha256)
    assert contents(tmp_path / "new") == {"input.txt": b"to be or not to be"}
    assert common.download("http://127.0.0.1:9/", path, 10, sha256) == path


@pytest.mark.parametrize(
    "page, min_bytes, sha256, told",
    [
        ("/html", 1, None, "is a web page"),
        ("/broken", 1, None, "broke off after 5 of 18 bytes"),
        ("/missing", 1, None, "404"),
        ("/good", 1000, None, "too short"),
        ("/good", 1, "0" * 64, "not the file that it was"),
    ],
)
def test_an_odd_download_leaves_nothing_and_names_input(
    tmp_path, url, page, min_bytes, sha256, told
):
    (tmp_path / "input.txt").write_text("older")
    with pytest.raises(UserError, match=f"{told}.*--input FILE"):
        common.download(f"{url}{page}", tmp_path / "input.txt", min_bytes, sha256)
    assert contents(tmp_path) == {"input.txt": b"older"}
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unreachable_server_is_one_line(tmp_path):
    with pytest.raises(UserError, match="can't be downloaded.*--input FILE"):
        common.download("http://127.0.0.1:9/input.txt", tmp_path / "input.txt")
    assert contents(tmp_path) == {}


def test_an_unreachable_hub_is_one_line_at_once(tmp_path):
    script = "from data.common import *; from configurator import run; run(lambda: load_hub('a/b'))"
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1  # the hub's retries tell more
    assert "a/b" in done.stderr and "--input FILE" in done.stderr


def run_with_hub(monkeypatch, name, tables, out, *args):
    """Run a script's main here, with a hub that has `tables`; return what it asked the hub for."""
    asked = []
    monkeypatch.setattr(common, "load_hub", lambda *a, **options: asked.append(a) or tables)
    monkeypatch.setattr(common, "check_disk", lambda *needs: None)
    monkeypatch.setattr(sys, "argv", ["prepare.py", f"--out={out}", "--num_proc=2", *args])
    importlib.import_module(f"data.{name}.prepare").main()
    return asked


@pytest.mark.parametrize("name", ["openwebtext", "tinystories"])
def test_hub_documents_become_a_data_set(tmp_path, monkeypatch, gpt2_files, name):
    from datasets import Dataset as Table
    from datasets import DatasetDict

    texts = [f"page {i}" for i in range(2001)]
    tables = {"train": Table.from_dict({"text": texts, "url": texts})}
    if name == "tinystories":
        tables["validation"] = Table.from_dict({"text": ["page -1", "page -2"]})
    run_with_hub(monkeypatch, name, DatasetDict(tables), tmp_path)
    meta, train, val = read(tmp_path)
    assert meta["train_words"] + meta["val_words"] == 2 * (2003 if name == "tinystories" else 2001)
    train, val = (re.findall(r"(page -?\d+)<\|endoftext\|>", text) for text in (train, val))
    if name == "tinystories":
        assert (train, val) == (texts, ["page -1", "page -2"])
    else:  # 0.05% of the pages, drawn as nanoGPT draws them
        drawn = np.random.default_rng(2357).permutation(2001)
        assert (val, train) == tuple([texts[i] for i in part] for part in (drawn[:2], drawn[2:]))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", ["wikitext2", "wikitext103", "ptb"])
def test_corpora_of_the_papers_are_the_same_from_the_hub_and_from_files(
    tmp_path, monkeypatch, gpt2_files, name, raw
):
    from datasets import Dataset as Table
    from datasets import DatasetDict

    monkeypatch.setattr(common, "CHUNK", 200)
    lines = [*PTB] if name == "ptb" else [" \n", *WIKITEXT, " = New = \n", " \n", " \n"]
    lines = {"train": lines * 9, "validation": lines * 2, "test": lines}
    column, row = ("sentence", str.strip) if name == "ptb" else ("text", lambda s: s.lstrip("\n"))
    rows = {s: ["" if t == " \n" else row(t) for t in ts] for s, ts in lines.items()}
    tables = DatasetDict({s: Table.from_dict({column: rows[s]}) for s in rows})
    paths = [tmp_path / f"{split}.txt" for split in lines]
    for path in paths:
        path.write_text("".join(lines[path.stem]), encoding="utf-8")
    args = ["--raw"] if raw else []
    asked = run_with_hub(monkeypatch, name, tables, tmp_path / "hub", *args)
    run_with_hub(monkeypatch, name, None, tmp_path / "file", *args, "--input", *map(str, paths))
    assert asked[0][1:] == {"ptb": ()}.get(name, (f"wikitext-{name[8:]}-raw-v1",))

    meta, train, _ = read(tmp_path / "hub")
    test = from_meta(meta).decode(read_ids(tmp_path / "hub", "test"))
    original = "".join(lines["test"])
    change = (
        (lambda text: text) if raw else detokenize.ptb if name == "ptb" else detokenize.wikitext
    )
    assert test == change(original) and train == change("".join(lines["train"]))
    assert read_ids(tmp_path / "hub", "test").tolist() == from_meta(meta).encode(test).tolist()
    assert meta["test_words"] == len(original.split()) and meta["line_ends"] is True
    assert meta["test_lines"] == len(lines["test"]) and meta["test_bytes"] == len(test.encode())
    other = json.loads((tmp_path / "file" / "meta.json").read_text())
    assert {**other, "source": meta["source"]} == meta


def test_lambada_is_for_evaluation_of_last_words(tmp_path, monkeypatch, gpt2_files):
    from datasets import Dataset as Table

    texts = ["“Yes,” he said.\nHe saw the dog", "so it was"]
    run_with_hub(monkeypatch, "lambada", {"test": Table.from_dict({"text": texts})}, tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert sorted(contents(tmp_path)) == ["meta.json", "test.bin"]
    ids = read_ids(tmp_path, "test")
    assert from_meta(meta).decode(ids) == "".join(text + "<|endoftext|>" for text in texts)
    assert meta["last_word"] is True and meta["test_words"] == 10
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "b.txt").write_text("so it\n\nwas so \n")
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]
    run_with_hub(monkeypatch, "lambada", None, tmp_path / "more", "--input", *files)
    more = GPT2Tokenizer().decode(read_ids(tmp_path / "more", "test"))
    assert more.split("<|endoftext|>") == [*texts, "so it", "was so", ""]


def web_pages(n, text="the page {} ends"):
    return [{"text": text.format(i), "token_count": 5 + (i > 9)} for i in range(n)]


@pytest.mark.parametrize("tokens, pages", [("1", 2), ("6", 2), ("7", 3), ("1e2", 17), ("1e9", 600)])
def test_fineweb_is_streamed_up_to_the_tokens_that_are_wanted(
    tmp_path, monkeypatch, gpt2_files, tokens, pages
):
    read_pages = []
    stream = (read_pages.append(page) or page for page in web_pages(600))
    args = ["--tokens", tokens]
    asked = run_with_hub(monkeypatch, "fineweb_edu", stream, tmp_path, *args)
    assert asked == [("HuggingFaceFW/fineweb-edu", "sample-10BT")]
    meta, train, val = read(tmp_path)
    assert len(read_pages) == pages
    texts = [page["text"] + "<|endoftext|>" for page in web_pages(pages)]
    assert val == texts[0] + "".join(texts[500:501])
    assert train == "".join(texts[1:500] + texts[501:])


def test_a_stream_that_breaks_off_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, gpt2_files):
    def stream():
        yield from web_pages(5)
        raise ConnectionError("reset by peer")

    with pytest.raises(UserError, match="fineweb-edu can't be had.*reset by peer.*--input FILE"):
        run_with_hub(monkeypatch, "fineweb_edu", stream(), tmp_path / "out")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "name, column, config, path",
    [
        ("wikitext2", "text", "wikitext-2-raw-v1", "{config}/{split}-00000-of-00001.parquet"),
        ("wikitext103", "text", "wikitext-103-raw-v1", "{config}/{split}-00000-of-00002.parquet"),
        ("ptb", "sentence", None, "penn_treebank/{split}/0000.parquet"),
        ("lambada", "text", None, "default/{split}/0000.parquet"),
        ("fineweb_edu", "text", "sample-10BT", "sample/10BT/{split}.parquet"),
    ],
)
def test_parquet_that_lies_as_on_the_hub_is_found(
    tmp_path, monkeypatch, gpt2_files, name, column, config, path
):
    from datasets import Dataset as Table

    hub, load_hub = tmp_path / "hub", common.load_hub
    splits = {"lambada": ["test"], "fineweb_edu": ["train"]}.get(
        name, ["train", "validation", "test"]
    )
    paths = {split: path.format(config=config, split=split) for split in splits}
    for split, place in paths.items():
        for folder, text in ((hub, f"{split} "), (hub / "other", "other ")):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            rows = {column: [text] * 2, "token_count": [2, 2]}
            Table.from_dict(rows).to_parquet(folder / place)
    if config:  # the hub's README tells where each configuration has its files; JSON is YAML
        files = [{"split": split, "path": place} for split, place in paths.items()]
        configs = {"configs": [{"config_name": config, "data_files": files}]}
        (hub / "README.md").write_text(f"---\n{json.dumps(configs)}\n---\n")
    elif name == "ptb":  # has no other
        shutil.rmtree(hub / "other")
    cache = {"cache_dir": tmp_path / "cache"}
    local = lambda _, *args, **options: load_hub(str(hub), *args, **cache, **options)
    monkeypatch.setattr(common, "load_hub", local)
    monkeypatch.setattr(common, "check_disk", lambda *needs: None)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out", str(tmp_path / "out")])
    importlib.import_module(f"data.{name}.prepare").main()
    decode = GPT2Tokenizer().decode
    written = {
        path.stem: decode(read_ids(path.parent, path.stem)).replace("<|endoftext|>", " ").split()
        for path in (tmp_path / "out").glob("*.bin")
    }
    assert written == {
        "lambada": {"test": ["test"] * 2},
        "fineweb_edu": {"train": ["train"], "val": ["train"]},
    }.get(name, {"train": ["train"] * 2, "val": ["validation"] * 2, "test": ["test"] * 2})


def test_room_for_the_hubs_cache_is_needed_until_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert common.hub_need("owner/TinyTales", 5) == (tmp_path, 5)
    folder = tmp_path / "datasets" / "owner___tiny_tales" / "some-config" / "0.0.0"
    folder.mkdir(parents=True)
    (folder / "train.arrow").touch()
    assert common.hub_need("owner/TinyTales", 5, "some-config") == (tmp_path, 0)
    assert common.hub_need("owner/TinyTales", 5, "other-config") == (tmp_path, 5)


# ---- the scripts ----


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_tells_its_commands_and_takes_input(name):
    code, out, err = run_script(name, "--help")
    assert code == 0 and not err
    assert f"python data/{name}/prepare.py" in out and "--input FILE" in out and "--out DIR" in out


@pytest.mark.parametrize(
    "name, args, told",
    [
        ("char", [], "--input"),
        ("char", ["--input", "no-such-file"], "no-such-file"),
        ("char", ["--input", "latin1.txt"], "is not UTF-8"),
        ("char", ["--input", "empty.txt"], "would be empty"),
        ("char", ["--input", "bad.jsonl"], "bad.jsonl, line 2"),
        ("char", ["--input", "good.txt", "--ou", "x"], "--ou x"),
        ("openwebtext", ["--num_proc", "0"], "at least 1"),
        ("tinystories", ["--num_proc", "x"], "--num_proc"),
        ("fineweb_edu", ["--tokens", "inf"], "--tokens: inf is impossible"),
        ("fineweb_edu", ["--tokens", "many"], "--tokens"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, name, args, told):
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text("to be or not to be")
    Path("latin1.txt").write_bytes(b"caf\xe9 " * 10)
    Path("empty.txt").touch()
    Path("bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    code, _, err = run_script(name, *args, "--out", "out")
    assert code == 2 and err.count("\n") == 1 and told in err
    assert not Path("out").exists() or contents(Path("out")) == {}


def test_char_makes_a_data_set_of_anyones_text(tmp_path):
    text = "Grüße, Welt!\n" * 10
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    code, out, err = run_script("char", f"--input={tmp_path}/my.txt", f"--out={tmp_path}/mytext")
    assert (code, err) == (0, "")
    assert "117 tokens" in out and "13 tokens" in out and f"{tmp_path}/mytext/val.bin" in out
    _, train, val = read(tmp_path / "mytext")
    assert train + val == text


@pytest.mark.skipif(not SHARED.is_dir(), reason="tiny Shakespeare is not on this machine")
@pytest.mark.parametrize(
    "name, vocab_size, train, val",
    [("shakespeare_char", 65, 1003854, 111540), ("shakespeare", 50257, 301966, 36059)],
)
def test_tiny_shakespeare_gives_nanogpts_figures(
    tmp_path, gpt2_files, name, vocab_size, train, val
):
    code, _, err = run_script(name, "--input", SHARED / "tinyshakespeare.txt", "--out", tmp_path)
    assert (code, err) == (0, "")
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert (meta["vocab_size"], meta["train_tokens"], meta["val_tokens"]) == (
        vocab_size,
        train,
        val,
    )


# ---- pydocs ----


@pytest.fixture(scope="module")
def pydocs(tmp_path_factory):
    """Two runs of pydocs, with different orders of Python's sets."""
    folders = [tmp_path_factory.mktemp("pydocs") for _ in range(2)]
    runs = [start("pydocs", "--out", f, PYTHONHASHSEED=str(i)) for i, f in enumerate(folders)]
    for process in runs:
        assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)
    return folders


def test_pydocs_is_the_same_in_every_run(pydocs):
    assert contents(pydocs[0]) == contents(pydocs[1])


def test_pydocs_is_two_megabytes_of_printable_ascii(pydocs):
    meta, train, val = read(pydocs[0])
    assert meta["vocab_size"] <= 96 and set(meta["chars"]) <= {"\n", *map(chr, range(32, 127))}
    assert len(train) + len(val) > 1_500_000 and 0.05 < len(val) / len(train) < 0.2
    assert "Return" in train and "Return" in val


def test_pydocs_shares_no_document_between_its_splits(tmp_path, monkeypatch):
    from data.pydocs import prepare

    topics = [f"topic {i // 2} " + "x" * 10_000 for i in range(200)]  # each one twice
    monkeypatch.setattr(prepare, "reference_topics", lambda: topics)
    monkeypatch.setattr(prepare, "docstrings", lambda folder: ["", " ", "“ASCII”", "naïve"])
    prepare.prepare(tmp_path)
    _, train, val = read(tmp_path)
    train, val = (text.removesuffix("\n\n").split("\n\n") for text in (train, val))
    assert sorted(train + val) == sorted({*topics, '"ASCII"'}) and len(val) == 11


def test_pydocs_of_a_stripped_python_is_an_error(tmp_path, monkeypatch):
    from data.pydocs import prepare

    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="--input FILE"):
        prepare.prepare(tmp_path)


def test_docstrings_are_parsed_and_never_run(tmp_path):
    from data.pydocs import prepare

    code = '''
"""Module."""
raise SystemExit
class A:
    """Class."""
    async def f():
        """F.

        Indented."""
'''
    (tmp_path / "a.py").write_text(code)
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text('"""Not prose."""')
    found = [text for text in prepare.docstrings(tmp_path) if text]
    assert found == ["Module.", "Class.", "F.\n\nIndented."]
