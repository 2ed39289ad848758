"""data/NAME/prepare.py: every script writes a whole data set, or nothing and one line of error."""

import importlib
import json
import shutil
import sys

import numpy as np
import pytest
import test_words
from conftest import ROOT, Failed, subprocess_run
from prepared import SHARED, contents, read_ids, read_meta, read_text, write_jsonl

from configurator import UserError
from data import downloads, words, writing
from data import text as text_files
from data.tokenizer import from_meta

SCRIPTS = sorted(path.parent.name for path in ROOT.glob("data/*/prepare.py"))


# ---- all scripts ----


def test_preparing_starts_fast_because_no_script_imports_torch(tmp_path):
    (tmp_path / "my.txt").write_text("to be or not to be\n" * 10)
    code = f"""import importlib, sys
for name in {SCRIPTS}:
    importlib.import_module(f"data.{{name}}.prepare")
sys.argv[1:] = ["--input", "{tmp_path}/my.txt", "--out", "{tmp_path}/out"]
importlib.import_module("data.char.prepare").main()
print(*(name for name in ("torch", "datasets", "tiktoken", "transformers") if name in sys.modules))
"""
    done = subprocess_run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "171 tokens" in done.stdout and done.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_of_every_script_has_its_commands_and_options(run, name):
    out = run(f"data.{name}.prepare", "--help")
    assert f"python data/{name}/prepare.py" in out and "--input FILE" in out and "--out DIR" in out
    assert ("--val_share X" in out) == (name != "lambada")


def test_char_makes_a_data_set_of_any_text(run, tmp_path):
    text = "Grüße, Welt!\n" * 10
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    out = run("data.char.prepare", "--input=my.txt", "--out=mytext")
    assert "117 tokens" in out and "13 tokens" in out and "mytext/val.bin" in out
    assert "".join(read_text(tmp_path / "mytext", split) for split in ("train", "val")) == text


def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(run, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(Failed, match="would be empty") as failed:
        run("data.char.prepare", "--input=empty.txt", "--out=out")
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1
    assert contents(tmp_path / "out") == {}


@pytest.mark.skipif(not SHARED.is_dir(), reason="tiny Shakespeare is not on this machine")
@pytest.mark.parametrize(
    "name, vocab_size, train, val",
    [("shakespeare_char", 65, 1003854, 111540), ("shakespeare", 50257, 301966, 36059)],
)
def test_tiny_shakespeare_gives_nanogpts_figures(
    run, tmp_path, gpt2_files, name, vocab_size, train, val
):
    run(f"data.{name}.prepare", f"--input={SHARED}/tinyshakespeare.txt", "--out=out")
    meta = read_meta(tmp_path / "out")
    figures = meta["vocab_size"], meta["train_tokens"], meta["val_tokens"]
    assert figures == (vocab_size, train, val)


# ---- data sets of the hub ----


@pytest.fixture
def prepare(monkeypatch, tmp_path, gpt2_files):
    """Call a script's main with a hub of the given tables, or of a folder; return what it loads."""
    import datasets

    load_dataset = datasets.load_dataset
    monkeypatch.setattr(downloads, "reachable", lambda url: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10**15))

    def call(name, *args, hub=None):
        loaded = []

        def load(*names, **options):
            loaded.append(names)
            if hub != tmp_path / "hub":
                return hub
            return load_dataset(str(hub), *names[1:], cache_dir=tmp_path / "cache", **options)

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(sys, "argv", ["prepare.py", f"--out={tmp_path}", "--num_proc=2", *args])
        importlib.import_module(f"data.{name}.prepare").main()
        return loaded

    return call


@pytest.mark.parametrize("name", ["openwebtext", "tinystories"])
def test_hub_documents_become_a_data_set(tmp_path, prepare, name):
    from datasets import Dataset as Table
    from datasets import DatasetDict

    texts = [f"page {i}" for i in range(2001)]
    tables = {"train": Table.from_dict({"text": texts, "url": texts})}
    if name == "tinystories":
        tables["validation"] = Table.from_dict({"text": ["page -1", "page -2"]})
    prepare(name, hub=DatasetDict(tables))
    meta = read_meta(tmp_path)
    assert meta["train_words"] + meta["val_words"] == 2 * (2003 if name == "tinystories" else 2001)
    texts_of = lambda split: read_text(tmp_path, split).split("<|endoftext|>")[:-1]
    train, val = texts_of("train"), texts_of("val")
    if name == "tinystories":
        assert (train, val) == (texts, ["page -1", "page -2"])
    else:  # 0.05% of the pages, drawn as nanoGPT draws them
        drawn = np.random.default_rng(2357).permutation(2001)
        assert (val, train) == tuple([texts[i] for i in part] for part in (drawn[:2], drawn[2:]))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", ["wikitext2", "wikitext103", "ptb"])
def test_corpora_of_the_papers_are_the_same_from_the_hub_and_from_files(
    tmp_path, monkeypatch, prepare, name, raw
):
    from datasets import Dataset as Table
    from datasets import DatasetDict

    monkeypatch.setattr(text_files, "CHUNK", 200)
    monkeypatch.setattr(writing, "BLOCK", 200)
    lines = (
        [*test_words.PTB]
        if name == "ptb"
        else [" \n", *test_words.WIKITEXT, " = New = \n", " \n", " \n"]
    )
    lines = {"train": lines * 9, "validation": lines * 2, "test": lines}
    column, row = ("sentence", str.strip) if name == "ptb" else ("text", lambda s: s.lstrip("\n"))
    rows = {s: ["" if t == " \n" else row(t) for t in ts] for s, ts in lines.items()}
    tables = DatasetDict({s: Table.from_dict({column: rows[s]}) for s in rows})
    paths = [tmp_path / f"{split}.txt" for split in lines]
    for path in paths:
        path.write_text("".join(lines[path.stem]), encoding="utf-8")
    args = ["--raw"] if raw else []
    asked = prepare(name, f"--out={tmp_path}/hub", *args, hub=tables)
    prepare(name, f"--out={tmp_path}/file", *args, "--input", *map(str, paths))
    assert asked[0][1:] == {"ptb": ()}.get(name, (f"wikitext-{name[8:]}-raw-v1",))

    meta = read_meta(tmp_path / "hub")
    train, test = (read_text(tmp_path / "hub", split) for split in ("train", "test"))
    original = "".join(lines["test"])
    detokenize = words.detokenize_ptb if name == "ptb" else words.detokenize_wikitext
    change = (lambda text: text) if raw else detokenize
    assert test == change(original) and train == change("".join(lines["train"]))
    assert read_ids(tmp_path / "hub", "test").tolist() == from_meta(meta).encode(test).tolist()
    assert meta["test_words"] == len(original.split()) and meta["line_ends"] is True
    assert meta["test_lines"] == len(lines["test"]) and meta["test_bytes"] == len(test.encode())
    assert {**read_meta(tmp_path / "file"), "source": meta["source"]} == meta


def test_lambada_is_for_evaluation_of_last_words(tmp_path, prepare):
    from datasets import Dataset as Table

    texts = ["“Yes,” he said.\nHe saw the dog", "so it was"]
    prepare("lambada", hub={"test": Table.from_dict({"text": texts})})
    assert sorted(contents(tmp_path)) == ["meta.json", "test.bin"]
    assert read_text(tmp_path, "test") == "".join(text + "<|endoftext|>" for text in texts)
    meta = read_meta(tmp_path)
    assert meta["last_word"] is True and meta["test_words"] == 10
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.txt").write_text("so it\n\nwas so \n")
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]
    prepare("lambada", "--input", *files)
    assert read_text(tmp_path, "test").split("<|endoftext|>") == [*texts, "so it", "was so", ""]


def web_pages(n, text="the page {} ends"):
    return [{"text": text.format(i), "token_count": 5 + (i > 9)} for i in range(n)]


@pytest.mark.parametrize("tokens, pages", [("1", 2), ("6", 2), ("7", 3), ("1e2", 17), ("1e9", 600)])
def test_fineweb_is_streamed_up_to_the_tokens_that_are_wanted(tmp_path, prepare, tokens, pages):
    read_pages = []
    stream = (read_pages.append(page) or page for page in web_pages(600))
    asked = prepare("fineweb_edu", "--tokens", tokens, hub=stream)
    assert asked == [("HuggingFaceFW/fineweb-edu", "sample-10BT")]
    assert len(read_pages) == pages
    texts = [page["text"] + "<|endoftext|>" for page in web_pages(pages)]
    assert read_text(tmp_path, "val") == texts[0] + "".join(texts[500:501])
    assert read_text(tmp_path, "train") == "".join(texts[1:500] + texts[501:])


def test_a_stream_that_breaks_off_is_one_line_and_leaves_nothing(tmp_path, prepare):
    def stream():
        yield from web_pages(5)
        raise ConnectionError("reset by peer")

    with pytest.raises(UserError, match="fineweb-edu cannot be read.*reset by peer.*--input FILE"):
        prepare("fineweb_edu", hub=stream())
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
def test_parquet_files_are_found_where_the_hub_has_them(
    tmp_path, prepare, name, column, config, path
):
    from datasets import Dataset as Table

    hub = tmp_path / "hub"
    splits = {"lambada": ["test"], "fineweb_edu": ["train"]}.get(
        name, ["train", "validation", "test"]
    )
    paths = {split: path.format(config=config, split=split) for split in splits}
    for split, place in paths.items():
        for folder, text in ((hub, f"{split} "), (hub / "other", "other ")):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            rows = {column: [text] * 2, "token_count": [2, 2]}
            Table.from_dict(rows).to_parquet(folder / place)
    if config:  # the hub's README says where each configuration has its files; JSON is YAML
        files = [{"split": split, "path": place} for split, place in paths.items()]
        configs = {"configs": [{"config_name": config, "data_files": files}]}
        (hub / "README.md").write_text(f"---\n{json.dumps(configs)}\n---\n")
    elif name == "ptb":  # there is no other folder on the hub
        shutil.rmtree(hub / "other")
    prepare(name, hub=hub)
    written = {
        path.stem: read_text(tmp_path, path.stem).replace("<|endoftext|>", " ").split()
        for path in tmp_path.glob("*.bin")
    }
    assert written == {
        "lambada": {"test": ["test"] * 2},
        "fineweb_edu": {"train": ["train"], "val": ["train"]},
    }.get(name, {"train": ["train"] * 2, "val": ["validation"] * 2, "test": ["test"] * 2})
