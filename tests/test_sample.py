"""sample.py: text from a checkpoint alone, from GPT-2's files, and prompts it can't use."""

import json

import pytest
import torch
from conftest import ROOT, Failed, subprocess_run

import sample
from configurator import UserError
from data.tokenizer import CharTokenizer
from engine import checkpoint as ckpt
from model import GPT, GPTConfig

SHORT = ["--num_samples=2", "--max_new_tokens=30", "--device=cpu", "--dtype=float32"]


@pytest.fixture
def trained(run_train, tmp_path):
    run_train("--out_dir=run", "--attn_type=GK")
    return tmp_path / "run"


def test_a_checkpoint_alone_is_enough(run, trained, data_dir):
    for path in (data_dir / "abc").iterdir():
        path.unlink()
    out = run("sample", "--out_dir=run", "--start=the", *SHORT)
    samples = out.split("\n---------------\n")
    assert len(samples) == 3 and samples[2] == ""
    assert all(text.startswith("the") and len(text) == 33 for text in samples[:2])
    assert samples[0] != samples[1]


def test_the_seed_decides_and_greedy_needs_none(run, trained):
    def text(*args):
        return run("sample", "--out_dir=run", "--start=the", *SHORT, *args)

    assert text("--seed=1") == text("--seed=1") != text("--seed=2")
    greedy = text("--temperature=0", "--seed=1")
    assert greedy == text("--temperature=0", "--seed=2") == text("--top_k=1")


def test_the_prompt_may_come_from_a_file(run, trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("the dog\n", encoding="utf-8")
    out = run("sample", "--out_dir=run", "--start=FILE:prompt.txt", *SHORT)
    assert out.startswith("the dog\n")


def test_the_best_state_can_be_sampled(run, trained):
    best, last = (
        run("sample", "--out_dir=run", "--start=a", f"--checkpoint={name}", *SHORT)
        for name in ("best.pt", "ckpt.pt")
    )
    assert best == last  # four steps in, the last is the best


def test_ids_that_the_tokenizer_can_not_decode_are_never_drawn():
    class Tokenizer:
        vocab_size = 3

        def encode(self, text):
            return [0]

        def decode(self, ids):
            return "".join("abc"[i] for i in ids)  # fails from 3 on

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8)).eval()
    texts = sample.generate(model, Tokenizer(), ["a"], num_samples=20, max_new_tokens=20)
    assert len(texts) == 20 and all(len(text) == 21 for text in texts)


def test_a_checkpoint_of_nanogpt_samples_with_the_meta_pkl_of_its_data(run, tmp_path, monkeypatch):
    import pickle

    from data import meta

    chars = "\nabcdefg"
    monkeypatch.setattr(meta, "DATA_DIR", tmp_path / "data")
    (tmp_path / "data" / "old").mkdir()
    old = {"vocab_size": 8, "itos": dict(enumerate(chars)), "stoi": {}}
    (tmp_path / "data" / "old" / "meta.pkl").write_bytes(pickle.dumps(old))
    args = dict(n_layer=1, n_head=2, n_embd=8, block_size=8, bias=False, vocab_size=8, dropout=0.2)
    state = {f"_orig_mod.{k}": v for k, v in GPT(GPTConfig(**args)).state_dict().items()}
    checkpoint = {"model": state, "model_args": args, "config": {"dataset": "old"}}
    (tmp_path / "out").mkdir()
    torch.save(checkpoint, tmp_path / "out" / "ckpt.pt")
    out = run("sample", *SHORT)
    assert len(out) == 2 * (31 + len("\n---------------\n")) and set(out) <= set(chars + "-")


def test_text_comes_from_a_gpt2_folder(run, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    files = ROOT.parent / "shared" / "data" / "tiktoken"
    if not files.is_dir():
        pytest.skip("GPT-2's BPE files are not at hand")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(files))
    config = transformers.GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    out = run("sample", "--init_from=hf", "--start=Hello world", *SHORT)
    assert out.startswith("Hello world") and out.count("---------------") == 2


@pytest.mark.parametrize(
    "args, said",
    [
        (["--out_dir=nowhere"], "no checkpoint nowhere"),
        (["--start=Q"], "'Q'"),
        (["--start=LINES:empty.txt"], "no prompt in it"),
        (["--start=FILES:nowhere/"], "no prompt in it"),
        (["--top_p=0"], "top_p"),
        (["--top_p=1.5"], "top_p"),
        (["--window_stride=0"], "window_stride"),
        (["--out=texts.csv"], "must end in .txt or .jsonl"),
        (["--start=FILE:nothing.txt"], "nothing.txt"),
        (["--start=FILE:latin.txt"], "UTF-8"),
        (["--temperature=-1"], "temperature"),
        (["--top_k=0"], "top_k"),
        (["--num_samples=0"], "num_samples"),
        (["--init_from=no-such-model"], "TIKTOKEN_CACHE_DIR|HF_HOME"),
        (["--checkpoint=../run/ckpt.pt"], "file name inside out_dir"),
    ],
)
def test_what_can_not_be_sampled_is_one_line(run, trained, tmp_path, args, said):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(Failed, match=said) as failed:
        run("sample", "--out_dir=run", *SHORT, *args)
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1


def test_a_prompt_per_line_or_per_file_gives_what_each_gives_alone(run, trained, tmp_path):
    prompts = ["the cat", "a", "the dog sat on"]
    (tmp_path / "lines.txt").write_text("\n".join(prompts) + "\n")
    (tmp_path / "files").mkdir()
    for i, prompt in enumerate(prompts):
        (tmp_path / "files" / f"{i}.txt").write_text(prompt)
    alone = "".join(run("sample", "--out_dir=run", f"--start={p}", *SHORT) for p in prompts)
    assert alone == run("sample", "--out_dir=run", "--start=LINES:lines.txt", *SHORT)
    assert alone == run("sample", "--out_dir=run", "--start=FILES:files/", *SHORT)
    small = "--sample_batch=1"
    assert alone == run("sample", "--out_dir=run", "--start=LINES:lines.txt", *SHORT, small)


def test_texts_go_to_a_file(run, trained, tmp_path):
    out = run("sample", "--out_dir=run", "--start=the", *SHORT)
    assert run("sample", "--out_dir=run", "--start=the", "--out=a.txt", *SHORT) == ""
    assert (tmp_path / "a.txt").read_text() == out
    run("sample", "--out_dir=run", "--start=the", "--out=a.jsonl", *SHORT)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["sample"] for row in rows] == [0, 1] and rows[0]["prompt"] == "the"
    assert "".join(row["text"] + "\n---------------\n" for row in rows) == out


def test_a_text_ends_before_the_stop(run, trained):
    whole = run("sample", "--out_dir=run", "--start=the", *SHORT).split("\n-")[0]
    stop = whole[10:12]
    first = whole.index(stop, 3)
    out = run("sample", "--out_dir=run", "--start=the", f"--stop={stop}", *SHORT)
    assert out.split("\n-")[0] == whole[:first]


def test_stdout_holds_the_text_alone(trained, tmp_path):
    args = ["--out_dir", "--start=the", "--num_samples=1", "--max_new_tokens=40", "--device=cpu"]
    args[0] = f"--out_dir={trained}"
    done = subprocess_run(ROOT / "sample.py", *args)
    assert done.stdout.startswith("the") and done.stdout.endswith("\n---------------\n")
    assert len(done.stdout.removesuffix("\n---------------\n")) == 43
    assert "40 tokens" in done.stderr and "tokens/s" in done.stderr
    args[1] = "--start=" + "the cat " * 4
    told = subprocess_run(ROOT / "sample.py", *args).stderr
    assert told.count("32 tokens: only the last 16") == 1


def test_live_text_comes_in_whole_characters_and_ends_before_the_stop(capsys):
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", "replace")

    def shown(text, stop=None):
        live = sample.Live(Bytes(), stop)
        parts = []
        for byte in text.encode():
            live(torch.tensor([byte]))
            parts.append(capsys.readouterr().out)
        live.end()
        return [part for part in [*parts, capsys.readouterr().out] if part]

    assert shown("aé€🙂b") == ["a", "é", "€", "🙂", "b"]
    assert "".join(shown("one END two", stop="END")) == "one "
    assert shown("an ENtry", stop="END") == ["a", "n", " ", "ENt", "r", "y"]
    assert "".join(shown("to the EN", stop="END")) == "to the EN"


def test_an_empty_prompt_is_what_a_document_begins_with():
    newline, none = CharTokenizer("\nab"), CharTokenizer("ab")
    assert list(sample.encode(newline, "")) == [0]
    assert list(sample.encode(type("BPE", (), {"eot": 50256})(), "")) == [50256]
    with pytest.raises(UserError, match="empty"):
        sample.encode(none, "")


def test_gpt2_without_its_tokenizer_says_where_it_looks(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    import os

    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    env |= {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess_run(ROOT / "sample.py", f"--init_from={tmp_path / 'hf'}", env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "TIKTOKEN_CACHE_DIR" in done.stderr


def test_importing_the_scripts_prints_nothing_and_loads_no_optional_package():
    code = "import sys, sample, train, bench, export; "
    code += "optional = {'transformers', 'wandb', 'datasets', 'tiktoken', 'tokenizers'}; "
    code += "assert not optional & sys.modules.keys()"
    done = subprocess_run("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_load_and_generate_serve_a_notebook(trained):
    model, tokenizer = sample.load(trained)
    assert not model.training
    (text,) = sample.generate(model, tokenizer, ["the "], max_new_tokens=5)
    assert text.startswith("the ") and len(text) == 9


def test_sampling_draws_from_the_model(trained):
    """At temperature 1 the first drawn character follows the model's own distribution."""
    path = trained / "ckpt.pt"
    model = ckpt.build_model(ckpt.load(path), path, dropout=0.0).eval()
    idx = torch.zeros(4000, 1, dtype=torch.long)
    torch.manual_seed(0)
    drawn = model.generate(idx, 1)[:, 1]
    p = model(idx[:1])[0][0, -1].softmax(-1)
    frequency = torch.bincount(drawn, minlength=len(p)) / len(drawn)
    assert (frequency - p).abs().max() < 0.04
