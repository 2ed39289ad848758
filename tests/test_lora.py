"""LoRA: only adapters are trained, and a run's folder is all that is needed to have them back."""

import pytest
import torch
from conftest import EVERY_ATTN_TYPE, Failed

from engine import checkpoint as ckpt
from engine.lora import fold_lora
from model import GPT, GPTConfig

LORA = ["--lora_rank=3", "--out_dir=run", "--attn_type=GK"]


def weights(folder, name=ckpt.LATEST):
    return ckpt.load(folder / name)["model"]


def adapted(attn_type="GK", **fields):
    """A model whose adapters do something."""
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=16, lora_rank=3)
    model = GPT(GPTConfig(**shape, attn_type=attn_type, **fields)).eval()
    for name, p in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def plain(model, state):
    config = GPTConfig(**{k: v for k, v in model.config.model_args().items() if "lora" not in k})
    other = GPT(config).eval()
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_adapters_folded_in_give_the_same_logits(attn_type):
    model = adapted(attn_type, lora_targets="c_attn,c_proj,c_fc", lora_alpha=5)
    idx = torch.randint(11, (2, 16))
    expected, got = model(idx, idx)[0], plain(model, fold_lora(model.state_dict(), model.config))
    torch.testing.assert_close(got(idx, idx)[0], expected, rtol=1e-5, atol=1e-6)


def test_new_adapters_change_nothing():
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
    one, idx = GPT(GPTConfig(**shape)), torch.randint(11, (2, 16))
    two = GPT(GPTConfig(**shape, lora_rank=3))
    two.load_state_dict(one.state_dict(), strict=False)
    assert torch.equal(one(idx, idx)[0], two(idx, idx)[0])


def test_targets_are_layers_or_the_ends_of_their_names():
    def adapters(targets):
        names = adapted(lora_targets=targets).state_dict()
        layers = (
            n.split(".", 3)[3] for n in names if n.startswith("transformer.h.0.") and "A" in n
        )
        return {layer.removesuffix(".lora_A") for layer in layers}

    assert adapters("attn.c_attn") == {"attn.c_attn"}
    assert adapters("c_proj, mlp.c_fc") == {"attn.c_proj", "mlp.c_proj", "mlp.c_fc"}
    with pytest.raises(ValueError, match="lora_targets='proj' is none of"):
        GPTConfig(lora_rank=1, lora_targets="proj")


def test_frozen_weights_do_not_move_by_a_bit(run_train, tmp_path):
    run_train("--out_dir=plain", "--attn_type=GK", "--max_iters=0")
    run_train(*LORA, "--weight_decay=0.5", "--learning_rate=0.1")
    before, after = weights(tmp_path / "plain"), weights(tmp_path / "run")
    adapters = {name for name in after if ".lora_" in name}
    assert after.keys() - adapters == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(after[name].any() for name in adapters)


def test_checkpoints_hold_the_adapters_and_say_what_they_belong_to(run_train, tmp_path):
    run_train(*LORA)
    raw = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert raw["model"] and all(".lora_" in name for name in raw["model"])
    assert raw["base"]["came_from"] == "scratch"
    base = torch.load(tmp_path / "run" / "base.pt", weights_only=True)
    assert ckpt.digest(base["model"]) == raw["base"]["sha256"]


@pytest.mark.parametrize(
    "compiled", ["--compile=False", pytest.param("--compile=True", marks=pytest.mark.slow)]
)
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(run_train, tmp_path, compiled):
    args = ["--attn_type=GK", "--lora_rank=3", "--dropout=0.1", "--lr_decay_iters=6", compiled]
    run_train(*args, "--out_dir=whole", "--max_iters=6")
    run_train(*args, "--out_dir=run", "--max_iters=3")
    run_train(
        "--out_dir=run", "--init_from=resume", "--max_iters=6", "--lr_decay_iters=6", compiled
    )
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name]), name
    with pytest.raises(Failed, match="was trained with lora_rank=3"):
        run_train("--out_dir=run", "--init_from=resume", "--lora_rank=4")


def test_adapters_upon_a_finished_run_and_a_folder_of_gpt2s(run_train, run, tmp_path, data_dir):
    from transformers import GPT2Config, GPT2LMHeadModel

    run_train("--out_dir=run", "--attn_type=SM")
    run_train(*LORA, "--init_from=finetune", "--save_dir=tuned")
    before, after = weights(tmp_path / "run"), weights(tmp_path / "tuned")
    assert all(torch.equal(before[name], after[name]) for name in before)

    shape = dict(vocab_size=97, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "hf")
    (data_dir / "abc" / "meta.json").write_text('{"vocab_size": 97, "dtype": "uint16"}')
    run_train(*LORA, "--out_dir=hf-run", f"--init_from={tmp_path / 'hf'}")
    base = ckpt.load(tmp_path / "hf-run" / "ckpt.pt")["base"]
    assert base["came_from"] == str(tmp_path / "hf")


def test_finetune_folds_adapters_in_and_begins_new_ones_or_none(run_train, tmp_path):
    run_train(*LORA, "--learning_rate=0.1")
    saved = ckpt.load(tmp_path / "run" / "ckpt.pt")
    folded = fold_lora(saved["model"], GPTConfig(**saved["model_args"]))
    run_train("--out_dir=run", "--init_from=finetune", "--save_dir=again", "--max_iters=0")
    again = weights(tmp_path / "again")
    assert all(torch.equal(folded[name], again[name]) for name in folded)
    assert not any(tensor.any() for name, tensor in again.items() if name.endswith("lora_B"))
    run_train(
        "--out_dir=run", "--init_from=finetune", "--save_dir=bare", "--max_iters=0", "--lora_rank=0"
    )
    assert folded.keys() == weights(tmp_path / "bare").keys()


def test_another_base_is_not_taken_for_the_one(run_train, run, tmp_path):
    run_train(*LORA)
    text = run("sample", "--out_dir=run", "--num_samples=1", "--max_new_tokens=5", "--start=t")
    assert len(text.split("\n---")[0]) == 6
    run_train(*LORA[:1], "--attn_type=GK", "--out_dir=other", "--seed=1")
    (tmp_path / "other" / "base.pt").replace(tmp_path / "run" / "base.pt")
    with pytest.raises(Failed, match="is not the one that this run began with, scratch"):
        run("sample", "--out_dir=run")
    (tmp_path / "run" / "base.pt").unlink()
    with pytest.raises(Failed, match=r"no checkpoint .*base\.pt"):
        run_train("--out_dir=run", "--init_from=resume")


def test_adapters_are_refused_in_one_line_where_they_can_not_be(run_train):
    for wrong in ("--lora_rank=-1", "--lora_alpha=0", "--lora_targets=head"):
        with pytest.raises(Failed, match=wrong[2:].split("=")[0]) as failed:
            run_train("--lora_rank=2", wrong)
        assert failed.value.code == 2
