"""sample.py: texts of a checkpoint or of GPT-2, prompts that can't be used, where texts go."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Failed, subprocess_run

import sample
from model import GPT, GPTConfig

CHARS = "\n ,.abcdehmnostxyé"
RULER = "\n---------------\n"
SHORT = ["--num_samples=2", "--max_new_tokens=20", "--device=cpu", "--dtype=float32"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """--out_dir=OUT of a folder that holds ckpt.pt and best.pt, of two models, and nothing else."""
    folder = tmp_path_factory.mktemp("out")
    for seed, name in enumerate(("best.pt", "ckpt.pt")):
        torch.manual_seed(seed)
        args = dict(block_size=16, vocab_size=len(CHARS), n_layer=2, n_head=2, n_embd=16)
        model = GPT(GPTConfig(**args, attn_type="GK", dropout=0.5))
        with torch.no_grad():  # far from its initial values, so that its texts are lively
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.2)
        tokenizer = {"tokenizer": "char", "chars": CHARS}
        saved = {"model": model.state_dict(), "model_args": model.config.model_args()}
        torch.save({**saved, "tokenizer": tokenizer, "config": {}}, folder / name)
    return f"--out_dir={folder}"


def test_a_checkpoint_alone_is_enough(run, run_train, data_dir):
    run_train("--out_dir=run", "--attn_type=GK")
    for path in (data_dir / "abc").iterdir():
        path.unlink()
    samples = run("sample", "--out_dir=run", "--start=the", *SHORT).split(RULER)
    assert len(samples) == 3 and samples[2] == ""
    assert all(text.startswith("the") and len(text) == 23 for text in samples[:2])
    assert samples[0] != samples[1]


def test_the_seed_decides_and_greedy_needs_none(run, out):
    def text(*args):
        return run("sample", out, "--start=the", *SHORT, *args)

    assert text("--seed=1") == text("--seed=1") != text("--seed=2")
    greedy = text("--temperature=0", "--seed=1")
    assert greedy == text("--temperature=0", "--seed=2") == text("--top_k=1")
    assert text("--checkpoint=best.pt") != text()


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
        (["--out=nowhere/texts.txt"], "can't be written; try mkdir -p .*/nowhere"),
        (["--start=FILE:nothing.txt"], "nothing.txt"),
        (["--start=FILE:latin.txt"], "latin.txt is not UTF-8 text, from character 4 on"),
        (["--start=FILES:mixed/"], "mixed/b.txt is not UTF-8 text, from character 4 on"),
        (["--start=caf\udce9"], "is not UTF-8"),
        (["--temperature=-1"], "temperature"),
        (["--top_k=0"], "top_k"),
        (["--num_samples=0"], "num_samples"),
        (["--init_from=NOBODY/NOTHING"], "no weights for 'NOBODY/NOTHING'"),
        (["--checkpoint=../run/ckpt.pt"], "file name inside out_dir"),
    ],
)
def test_what_can_not_be_sampled_is_one_line(run, out, tmp_path, args, said):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("café", encoding="utf-8")
    for name in ("latin.txt", "mixed/b.txt"):
        (tmp_path / name).write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(Failed, match=said) as failed:
        run("sample", out, *SHORT, *args)
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1


def test_a_prompt_from_a_file_per_line_or_per_file_gives_what_each_gives_alone(run, out, tmp_path):
    def texts(start, *args):
        return run("sample", out, f"--start={start}", *SHORT, *args)

    prompts = ["the cat", "a", "the cat sat on\n"]
    (tmp_path / "files").mkdir()
    for i, prompt in enumerate(prompts):
        (tmp_path / "files" / f"{i}.txt").write_text(prompt)
    alone = [texts(prompt) for prompt in prompts]
    assert texts("FILE:files/2.txt") == alone[2]
    assert texts("FILES:files/") == texts("FILES:files/", "--sample_batch=1") == "".join(alone)
    (tmp_path / "lines.txt").write_text("the cat\n\na\n")
    assert texts("LINES:lines.txt") == "".join(alone[:2])


def test_texts_go_to_a_file(run, out, tmp_path):
    texts = run("sample", out, "--start=the", *SHORT)
    assert run("sample", out, "--start=the", "--out=a.txt", *SHORT) == ""
    assert (tmp_path / "a.txt").read_text("utf-8") == texts
    run("sample", out, "--start=the", "--out=a.jsonl", *SHORT)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["sample"] for row in rows] == [0, 1] and rows[0]["prompt"] == "the"
    assert "".join(row["text"] + RULER for row in rows) == texts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_the_batches_that_are_finished(run, out, tmp_path, monkeypatch, number):
    path, add_texts = tmp_path / "a.jsonl", sample.Output.add_texts
    path.write_text("earlier\n")
    args = [out, "--start=the", "--max_new_tokens=5", "--device=cpu", "--sample_batch=2"]

    def add_and_interrupt(self, texts):
        assert self.n_texts or path.read_text() == "earlier\n"  # until the first batch is there
        add_texts(self, texts)
        assert len(path.read_text().splitlines()) == self.n_texts
        if self.n_texts == 4:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch, pytest.raises(Failed) as failed:
        patch.setattr(sample.Output, "add_texts", add_and_interrupt)
        run("sample", *args, "--num_samples=1000", "--out=a.jsonl")
    assert failed.value.code == 128 + number
    assert failed.value.stderr == "stopped: 4 of 1000 texts are written\n"
    run("sample", *args, "--num_samples=4", "--out=b.jsonl")
    assert path.read_text() == (tmp_path / "b.jsonl").read_text()


def test_finished_texts_reach_a_pipe_before_the_process_ends(out):
    args = [out, "--num_samples=100000", "--sample_batch=1", "--max_new_tokens=5", "--device=cpu"]
    command = [sys.executable, str(ROOT / "sample.py"), *args]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        begin = process.stdout.read(5)
        process.terminate()
        rest, stderr = process.stdout.read(), process.stderr.read()
    assert process.returncode == 143 and stderr.startswith("stopped: ")
    texts = (begin + rest).split(RULER)
    assert texts.pop() == "" and all(len(text) == 6 for text in texts)
    assert stderr == f"stopped: {len(texts)} of 100000 texts are written\n"


def test_a_text_ends_before_the_stop(run, out):
    whole = run("sample", out, "--start=the", *SHORT).split(RULER)[0]
    stop = whole[10:12]
    texts = run("sample", out, "--start=the", f"--stop={stop}", *SHORT)
    assert texts.split(RULER)[0] == whole[: whole.index(stop, 3)]


def test_stdout_holds_the_text_alone(out):
    args = [out, "--start=" + "the cat " * 4, "--num_samples=1", "--max_new_tokens=40"]
    done = subprocess_run(ROOT / "sample.py", *args, "--device=cpu")
    assert done.stdout.startswith("the cat") and done.stdout.endswith(RULER)
    assert len(done.stdout.removesuffix(RULER)) == 32 + 40
    warning, speed = done.stderr.splitlines()
    assert "32 tokens: the model sees only the last 16" in warning
    assert "40 tokens" in speed and "tokens/s" in speed


def test_live_text_comes_in_whole_characters_and_ends_before_the_stop(capsys):
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", "replace")

    def shown(text, stop=None):  # piece by piece
        live = sample.Live(Bytes(), stop)
        parts = []
        for byte in text.encode():
            live.add(torch.tensor([byte]))
            parts.append(capsys.readouterr().out)
        live.show(text.split(stop or "\n")[0])
        return [part for part in [*parts, capsys.readouterr().out] if part]

    assert shown("aé€🙂b") == ["a", "é", "€", "🙂", "b"]
    assert "".join(shown("one END two", stop="END")) == "one "
    assert shown("an ENtry", stop="END") == ["a", "n", " ", "ENt", "r", "y"]
    assert "".join(shown("to the EN", stop="END")) == "to the EN"


def test_importing_the_scripts_prints_nothing_and_loads_no_optional_package():
    code = "import sys, sample, train, bench, evaluate, export; "
    code += "optional = {'transformers', 'wandb', 'datasets', 'tiktoken', 'tokenizers'}; "
    code += "assert not optional & sys.modules.keys()"
    done = subprocess_run("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_load_and_generate_serve_a_notebook(out):
    model, tokenizer = sample.load(out.removeprefix("--out_dir="))
    assert not model.training and model.config.dropout == 0
    (text,) = sample.generate(model, tokenizer, ["the "], max_new_tokens=5)
    assert text.startswith("the ") and len(text) == 9


def test_sampling_draws_from_the_model(out):
    """At temperature 1 the first drawn character follows the model's own distribution."""
    model, _ = sample.load(out.removeprefix("--out_dir="))
    idx = torch.zeros(4000, 1, dtype=torch.long)
    torch.manual_seed(0)
    drawn = model.generate(idx, 1)[:, 1]
    p = model(idx[:1])[0][0, -1].softmax(-1)
    frequency = torch.bincount(drawn, minlength=len(p)) / len(drawn)
    assert (frequency - p).abs().max() < 0.04
