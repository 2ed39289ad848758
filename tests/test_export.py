"""export.py: transformers computes, tokenizes and writes what this project does, and back again."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Failed

import export
import sample
from data.tokenizer import CharTokenizer, GPT2Tokenizer
from engine import checkpoint as ckpt
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

CHARS = "\n !'.?abcdefghijklmnopqrstuvwxyzé€🙂"
CHAR = {"tokenizer": "char", "chars": CHARS}
ARGS = dict(block_size=16, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def gpt2_files(monkeypatch):
    """GPT-2's BPE files, without a network."""
    files = ROOT.parent / "shared" / "data" / "tiktoken"
    files = Path(os.environ.get("TIKTOKEN_CACHE_DIR", files))
    if not files.is_dir():
        pytest.skip("GPT-2's BPE files are not at hand")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(files))


@pytest.fixture
def saved(tmp_path):
    """Save a random model in tmp_path: saved(vocab_size=..., ...) -> the model."""

    def call(meta=CHAR, change=lambda model: None, **args):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**{**ARGS, "vocab_size": len(CHARS), **args})).eval()
        with torch.no_grad():
            for p in model.parameters():  # far from its initial values, biases too
                p.add_(torch.randn_like(p) * 0.1)
            change(model)
        checkpoint = {"model": model.state_dict(), "model_args": model.config.model_args()}
        ckpt.save({**checkpoint, "tokenizer": meta}, tmp_path)
        return model

    return call


@pytest.fixture
def exported(saved, run, tmp_path):
    """Save a random model and export it: exported(vocab_size=..., ...) -> the model, the folder."""

    def call(*args, folder="hf", **kwargs):
        model = saved(*args, **kwargs)
        merge = ["--merge"] if model.config.lora_rank else []
        run("export", "--out_dir=.", f"--to={folder}", *merge)
        return model, tmp_path / folder

    return call


def export_again(monkeypatch, capsys, *args):
    """Export what lies in the current folder to `again`; returns the one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["export.py", "--out_dir=.", "--to=again", *args])
    capsys.readouterr()
    export.main()
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    return stderr


def assert_same(logits, expected, tolerance=1e-6):
    """The largest difference, as a share of the largest logit."""
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


def logits_of(model, vocab_size):
    """Logits (2, T, vocab_size) for the same ids every time."""
    torch.manual_seed(1)
    idx = torch.randint(vocab_size, (2, ARGS["block_size"]))
    with torch.no_grad():
        logits = model(idx, idx)[0] if isinstance(model, GPT) else model(idx).logits
    return logits[..., :vocab_size]


SHAPES = [
    {"bias": True},
    {"bias": False},
    {"gelu": "tanh"},
    {"vocab_size": 64},
    {"lora_rank": 4, "lora_targets": "c_attn,c_fc"},
    {"n_layer": 6, "dropout": 0.2, "bias": False, "vocab_size": 128},
]


@pytest.mark.parametrize("args", SHAPES)
def test_transformers_computes_the_same_logits_and_so_does_what_comes_back(exported, args):
    model, folder = exported(**args)
    expected = logits_of(model, len(CHARS))
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(hf, transformers.GPT2LMHeadModel) and not any(info.values()), info
    assert_same(logits_of(hf, len(CHARS)), expected)
    dropout = model.config.dropout
    assert hf.config.attn_pdrop == hf.config.resid_pdrop == hf.config.embd_pdrop == dropout
    assert hf.config.vocab_size == len(CHARS) and hf.config.eos_token_id is None
    again = GPT.from_pretrained(str(folder)).eval()
    assert_same(logits_of(again, len(CHARS)), expected)
    assert again.config.gelu == model.config.gelu and again.config.attn_type == "SM"


OTHERS = [
    {"attn_type": "GK"},
    {"attn_type": "PA_relu", "pa_length": 24, "pa_length_power": 0.5},
    {"attn_type": "SM", "attn_decay": "learned", "pa_length": 24},
    {"attn_type": "GKpoly-4", "attn_decay": "fixed", "norm": "fixed", "mlp_act": "quad"},
    {"norm": "rms", "mlp_act": "relu-square", "position": "rope", "qk_norm": True},
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("args", OTHERS, ids=str)
def test_a_model_that_is_no_gpt2_comes_back_as_it_was(exported, args, bias):
    model, folder = exported(**args, bias=bias, vocab_size=64)
    again = GPT.from_pretrained(str(folder)).eval()
    assert torch.equal(logits_of(again, len(CHARS)), logits_of(model, len(CHARS)))
    assert again.config.model_args() == model.config.model_args() | {"vocab_size": len(CHARS)} | (
        {"bias": True}
    )
    written = json.loads((folder / "config.json").read_text())
    assert {key: written[key] for key in args} == args


def test_code_in_a_folder_is_never_run_here(exported, monkeypatch):
    folder = exported(attn_type="GK", vocab_size=64)[1]
    (folder / "modeling_pluggable.py").write_text("raise SystemExit('this was run')")
    assert GPT.from_pretrained(str(folder)).config.attn_type == "GK"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "another"}))
    with pytest.raises(ValueError):
        GPT.from_pretrained(str(folder))


@pytest.mark.parametrize("wrong", [{"norm": "rms"}, {"n_layer": 1}, {"attn_decay": "none"}])
def test_weights_that_config_json_does_not_name_are_refused(exported, wrong):
    folder = exported(attn_type="GK", attn_decay="learned", vocab_size=64)[1]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | wrong))
    with pytest.raises(ValueError, match="has weights that its config.json does not name"):
        GPT.from_pretrained(str(folder))


@pytest.mark.parametrize("own", [{"attn_decay": "learned"}, {"norm": "rms"}, {"qk_norm": True}])
def test_a_gpt2_with_parts_that_none_has_is_refused(exported, own):
    folder = exported(vocab_size=64)[1]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(ValueError, match="write it again with export.py"):
        GPT.from_pretrained(str(folder))


def test_a_softmax_model_starts_with_the_reaches_of_fixed(exported):
    folder = exported(vocab_size=64)[1]
    new = GPT.from_pretrained(str(folder), {"attn_decay": "learned"}).transformer.h[0].attn
    torch.testing.assert_close(new.reach(), new.fixed_reach.float())


@pytest.mark.parametrize("bias", [True, False])
def test_greedy_text_is_the_same_in_transformers(exported, bias):
    model, folder = exported(bias=bias, vocab_size=64)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in ("the", "\n", "a b"):
        n = ARGS["block_size"] - len(prompt)
        ids = hf_tokenizer(prompt, return_tensors="pt")
        text = hf_tokenizer.decode(hf.generate(**ids, do_sample=False, max_new_tokens=n)[0])
        (ours,) = sample.generate(
            model, CharTokenizer(CHARS), [prompt], max_new_tokens=n, temperature=0
        )
        assert text == ours and len(text) == ARGS["block_size"]


def test_greedy_text_of_a_padded_gpt2_vocabulary_has_no_padding(exported, gpt2_files):
    def prefer_padding(model):  # two opposite directions: one of them is the likeliest
        model.transformer.wte.weight[50257:] *= 100
        model.transformer.wte.weight[50300:] = -model.transformer.wte.weight[50257:50261]

    model, folder = exported({"tokenizer": "gpt2"}, vocab_size=50304, change=prefer_padding)
    assert model(torch.tensor([[15496, 995]]))[0].argmax() >= 50257
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert hf.generation_config.eos_token_id == hf.generation_config.bos_token_id == 50256
    assert hf.config.vocab_size == 50257 == len(hf_tokenizer)
    ids = hf_tokenizer("Hello world", return_tensors="pt")
    text = hf_tokenizer.decode(hf.generate(**ids, do_sample=False, max_new_tokens=10)[0])
    (ours,) = sample.generate(
        model, GPT2Tokenizer(), ["Hello world"], max_new_tokens=10, temperature=0
    )
    assert text == ours and text.startswith("Hello world")


TEXTS = [
    "",
    "a",
    " two  spaces\n\nand lines .\n",
    "don't stop ! is it so ? i'm 's",
    "é€🙂 é\n",
    "\n\n\n   \n",
]


def test_the_character_tokenizer_is_the_same_in_transformers(exported):
    folder = exported()[1]
    ours, hf = CharTokenizer(CHARS), transformers.AutoTokenizer.from_pretrained(folder)
    assert len(hf) == ours.vocab_size
    for text in TEXTS:
        assert hf.encode(text) == ours.encode(text).tolist()
        assert hf.decode(hf.encode(text)) == text
        with pytest.raises(Exception, match="UNK"):  # ours refuses unknown characters too
            hf.encode(text + "Q")


def test_every_character_is_a_token_whatever_it_is(exported):
    chars = "".join(map(chr, [*range(0x250), 0x301, 0x200D, 0x2028, 0xFEFF, 0xFFFD, 0x10FFFF]))
    folder = exported({"tokenizer": "char", "chars": chars}, vocab_size=len(chars))[1]
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    assert hf.encode(chars) == list(range(len(chars)))
    assert hf.decode(range(len(chars))) == chars


def test_the_gpt2_tokenizer_is_the_same_in_transformers(exported, gpt2_files):
    folder = exported({"tokenizer": "gpt2"}, vocab_size=50257)[1]
    ours, hf = GPT2Tokenizer(), transformers.AutoTokenizer.from_pretrained(folder)
    for text in [
        *TEXTS,
        "def f(x):\n\treturn x  # 1234\n<|endoftext|>The end. \r\n",
        "日本語 ¡ \x00",
    ]:
        assert hf.encode(text) == ours.encode(text).tolist()
        assert hf.decode(hf.encode(text)) == text
    assert hf.eos_token_id == ours.eot and hf.model_max_length == ARGS["block_size"]


def test_the_folder_is_sampled_and_trained_as_what_it_was(exported, run, tmp_path, data_dir):
    meta = json.loads((data_dir / "abc" / "meta.json").read_text())
    chars = meta["chars"]
    model, _ = exported(
        {"tokenizer": "char", "chars": chars}, vocab_size=len(chars), attn_type="PA_relu"
    )
    args = ["--start=the", "--num_samples=1", "--max_new_tokens=30", "--device=cpu"]
    args += ["--dtype=float32", "--temperature=0"]
    assert run("sample", "--init_from=hf", *args) == run("sample", "--out_dir=.", *args)
    args = ["--init_from=hf", "--dataset=abc", f"--data_dir={data_dir}", "--max_iters=0"]
    args += ["--batch_size=2", "--gradient_accumulation_steps=1", "--eval_iters=1", "--device=cpu"]
    for more, expected in (
        ([], ("PA_relu", 16)),
        (["--block_size=8"], ("PA_relu", 16)),
        (["--attn_type=PA_gelu"], ("PA_gelu", 16)),
        (["--attn_type=SM"], ("SM", None)),
    ):
        run("train", *args, "--out_dir=run", *more)
        config = ckpt.config_of(ckpt.load(tmp_path / "run" / "ckpt.pt"), tmp_path)
        assert (config.attn_type, config.pa_length) == expected, more


def test_without_its_tokenizer_the_whole_vocabulary_is_exported(
    run, tmp_path, data_dir, monkeypatch, capsys
):
    (data_dir / "abc" / "meta.json").write_text('{"vocab_size": 20, "dtype": "uint16"}')
    model = GPT(GPTConfig(**ARGS, vocab_size=24))
    for dataset, folder in (("abc", data_dir), ("nowhere", data_dir), ("nowhere", None)):
        saved = {"model": model.state_dict(), "model_args": model.config.model_args()}
        torch.save({**saved, "config": {"dataset": dataset}}, tmp_path / "ckpt.pt")
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        monkeypatch.chdir(tmp_path)
        stderr = export_again(monkeypatch, capsys, *[f"--data_dir={folder}"] * bool(folder))
        assert "again has no tokenizer: the tokenizer of ckpt.pt is not known: it was" in stderr
        assert f"trained on data set {dataset}" in stderr
        files = {path.name for path in (tmp_path / "again").iterdir()}
        assert files == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
        assert GPT.from_pretrained(str(tmp_path / "again")).config.vocab_size == 24


def test_the_tokenizer_of_a_nanogpt_checkpoint_comes_from_data_dir(run, tmp_path, data_dir):
    meta = json.loads((data_dir / "abc" / "meta.json").read_text())
    model = GPT(GPTConfig(**ARGS, vocab_size=meta["vocab_size"]))
    saved = {"model": model.state_dict(), "model_args": model.config.model_args()}
    torch.save({**saved, "config": {"dataset": "abc"}}, tmp_path / "ckpt.pt")
    run("export", "--out_dir=.", "--to=hf", f"--data_dir={data_dir}")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert hf.decode(range(meta["vocab_size"])) == meta["chars"]


@pytest.mark.parametrize(
    "args, said",
    [
        ([], "--to=hf"),
        (["--to=full"], "full is not empty; choose a new folder"),
        (["--to=file"], "file can't be written .Not a directory"),
        (["--to=file/hf"], "hf can't be written .Not a directory"),
        (["--to=new", "--checkpoint=best.pt"], "no checkpoint best.pt"),
        (["--to=new", "--out_dir=nowhere"], "no checkpoint nowhere"),
        (["--to=new", "--checkpoint=../ckpt.pt"], "file name inside out_dir"),
    ],
)
def test_what_can_not_be_exported_is_one_line(saved, run, tmp_path, args, said):
    saved()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Failed, match=said) as failed:
        run("export", "--out_dir=.", *args)
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_adapters_are_folded_in_when_that_is_asked_for(saved, run):
    saved(lora_rank=2)
    with pytest.raises(Failed, match="ckpt.pt has adapters; pass --merge to fold them"):
        run("export", "--out_dir=.", "--to=other")


def test_a_full_disk_leaves_nothing_behind(saved, run, tmp_path):
    resource = pytest.importorskip("resource")
    saved()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(Failed, match="can't be written .*File too large") as failed:
            run("export", "--out_dir=.", "--to=new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1
    assert not list(tmp_path.glob("new*"))


def test_an_empty_folder_and_a_new_one_below_others_are_filled(exported, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "some/where/new"):
        names = {path.name for path in exported(folder=folder)[1].iterdir()}
        assert names == {"config.json", "generation_config.json", "model.safetensors"} | {
            "README.md",
            "tokenizer.json",
            "tokenizer_config.json",
        }


def test_to_hf_changes_nothing_of_what_it_is_given():
    model = GPT(GPTConfig(**ARGS, vocab_size=64))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    _, hf_state = export.to_hf(model.state_dict(), model.config, vocab_size=40)
    assert hf_state["transformer.wte.weight"].shape == (40, 32)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
