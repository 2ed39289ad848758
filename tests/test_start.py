"""engine/start.py: what each init_from begins with, and what it refuses."""

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Failed, subprocess_run, write_dataset

from configurator import UserError
from engine import checkpoint as ckpt
from engine import start
from train import Config


def test_resume_needs_nothing_but_the_folder(run, run_train, tmp_path, data_dir):
    run_train("--out_dir=run", "--max_iters=2", "--attn_type=PA_relu", "--learning_rate=0.125")
    more = ["--max_iters=3", "--lr_decay_iters=2", f"--data_dir={data_dir}"]
    run("train", "--init_from=resume", "--out_dir=run", *more)
    last = ckpt.load(tmp_path / "run" / "ckpt.pt")
    assert last["iter_num"] == 3 and last["config"]["learning_rate"] == 0.125
    assert last["model_args"]["attn_type"] == "PA_relu"


@pytest.mark.parametrize(
    "given", ["--attn_type=SM", "--n_layer=3", "--block_size=8", "--bias=True"]
)
def test_resume_with_another_model_is_refused(run, run_train, data_dir, given):
    run_train("--out_dir=run", "--attn_type=GK")
    with pytest.raises(Failed, match=given[2:].split("=")[0]) as failed:
        run("train", "--init_from=resume", "--out_dir=run", f"--data_dir={data_dir}", given)
    assert failed.value.code == 2
    assert ("finetune" in failed.value.stderr) == ("attn_type" in given)


@pytest.mark.parametrize(
    "given", [["--attn_decay=fixed", "--attn_normalize=4"], ["--pa_length_power=0.5"]]
)
def test_a_run_resumes_with_the_keys_that_meant_nothing_to_its_attention(run_train, given):
    run_train("--out_dir=run", "--attn_type=SM", *given)
    run_train("--out_dir=run", "--attn_type=SM", *given, "--init_from=resume")


def test_finetune_changes_the_attention_and_never_its_source(run, run_train, tmp_path, data_dir):
    run_train("--out_dir=run")
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    args = ["--init_from=finetune", "--out_dir=run", "--attn_type=GKpoly-8"]
    out = run("train", *args, f"--data_dir={data_dir}", "--max_iters=2")
    assert "run-finetune-GKpoly-8" in out
    tuned = ckpt.load(tmp_path / "run-finetune-GKpoly-8" / "ckpt.pt")
    assert tuned["model_args"]["attn_type"] == "GKpoly-8" and tuned["iter_num"] == 2
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    with pytest.raises(Failed, match="choose another"):
        run("train", *args, f"--data_dir={data_dir}", "--save_dir=run")


def test_finetune_starts_from_the_weights_with_a_fresh_optimizer(run_train, tmp_path):
    run_train("--out_dir=run")
    run_train("--init_from=finetune", "--out_dir=run", "--max_iters=0", "--save_dir=tuned")
    source, tuned = (ckpt.load(tmp_path / d / "ckpt.pt") for d in ("run", "tuned"))
    assert all(torch.equal(source["model"][k], tuned["model"][k]) for k in source["model"])
    assert tuned["optimizer"]["state"] == {}


def test_finetuning_to_pa_keeps_the_length_it_is_trained_with(run_train, tmp_path):
    run_train("--out_dir=run")
    run_train("--init_from=finetune", "--out_dir=run", "--attn_type=PA_relu", "--block_size=8")
    args = ckpt.load(tmp_path / "run-finetune-PA_relu" / "ckpt.pt")["model_args"]
    assert args["block_size"] == args["pa_length"] == 8


def test_training_starts_from_a_gpt2_folder(run, tmp_path, data_dir):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50257, n_positions=16, n_embd=8, n_layer=1, n_head=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    write_gpt2_dataset(data_dir / "bpe")
    args = ["--dataset=bpe", f"--data_dir={data_dir}", f"--init_from={tmp_path / 'hf'}"]
    args += ["--batch_size=2", "--gradient_accumulation_steps=1", "--eval_iters=1", "--max_iters=1"]
    run("train", *args, "--attn_type=PA_relu", "--block_size=8", "--out_dir=run")
    model_args = ckpt.load(tmp_path / "run" / "ckpt.pt")["model_args"]
    assert model_args["n_layer"] == 1 and model_args["bias"] is True
    assert model_args["pa_length"] == model_args["block_size"] == 8
    with pytest.raises(Failed, match="n_layer=1, not 2"):
        run("train", *args, "--block_size=8", "--n_layer=2")
    with pytest.raises(Failed, match="not tokenized"):
        run("train", *args, "--block_size=8", "--dataset=abc")


def write_gpt2_dataset(folder):
    folder.mkdir()
    for split in ("train", "val"):
        np.arange(200, dtype="<u2").tofile(folder / f"{split}.bin")


def test_ranks_with_different_data_are_refused(tmp_path):
    for rank in "01":
        write_dataset(tmp_path / f"data{rank}" / "abc", f"the cat sat on mat {rank}1.\n" * 40)
    (tmp_path / "other.py").write_text("import os\ndata_dir = 'data' + os.environ['RANK']\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    args = ["other.py", *TINY, "--dataset=abc", "--out_dir=run"]
    done = subprocess_run(*torchrun, ROOT / "train.py", *args, cwd=tmp_path)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert "error: data set abc is not the same on all nodes" in done.stderr


def test_the_micro_steps_must_be_shared_evenly(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="gradient_accumulation_steps=2"):
        start.check(Config(gradient_accumulation_steps=2))


def test_data_must_fit_the_checkpoint(run_train, data_dir):
    run_train("--out_dir=run")
    write_dataset(data_dir / "xyz", "xyz " * 100)
    with pytest.raises(Failed, match="not tokenized as"):
        run_train("--out_dir=run", "--init_from=finetune", "--dataset=xyz")


def test_data_shorter_than_a_sequence_are_refused_before_training(run_train, tmp_path):
    with pytest.raises(Failed, match="too short for block_size=1024"):
        run_train("--block_size=1024", "--out_dir=run")
    assert not (tmp_path / "run").exists()


def test_a_missing_checkpoint_is_one_line(run_train):
    for init_from in ("resume", "finetune"):
        with pytest.raises(Failed, match="no checkpoint nowhere") as failed:
            run_train(f"--init_from={init_from}", "--out_dir=nowhere")
        assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "given, answer",
    [
        ("--batch_size=8", "batch_size=4, not 8"),
        ("--seed=3", "seed=1337, not 3"),
        ("--learning_rate=0.5", "learning_rate=0.0006, not 0.5"),
        ("--max_iters=9", "pass --lr_decay_iters=4"),
        ("--dropout=0.5", "dropout=0, not 0.5"),
    ],
)
def test_a_resume_that_would_change_the_run_is_refused_unless_asked_for(run_train, given, answer):
    run_train("--out_dir=run")
    with pytest.raises(Failed, match=answer) as failed:
        run_train("--out_dir=run", "--init_from=resume", given)
    assert "--allow_mismatch=True" in failed.value.stderr
    run_train("--out_dir=run", "--init_from=resume", given, "--allow_mismatch=True")


def test_a_constant_learning_rate_can_be_resumed_for_longer(run_train, tmp_path):
    run_train("--out_dir=run", "--decay_lr=False")
    run_train("--out_dir=run", "--decay_lr=False", "--init_from=resume", "--max_iters=5")
    assert ckpt.load(tmp_path / "run" / "ckpt.pt")["iter_num"] == 5


def test_data_that_changed_since_are_noticed(run_train, tmp_path, data_dir):
    run_train("--out_dir=run")
    bin_file = data_dir / "abc" / "val.bin"
    data = bytearray(bin_file.read_bytes())
    data[10:12], data[20:22] = data[20:22], data[10:12]
    assert data != bin_file.read_bytes()
    bin_file.write_bytes(data)
    with pytest.raises(Failed, match="val.bin of data set abc is not what"):
        run_train("--out_dir=run", "--init_from=resume")
    run_train("--out_dir=run", "--init_from=resume", "--allow_mismatch=True")


@pytest.mark.parametrize(
    "given", ["lora_alpha=8", "distill_iters=2", "eval_stride=4", "attn_normalize=4"]
)
def test_what_would_do_nothing_is_refused(run_train, tmp_path, given):
    with pytest.raises(Failed, match=f"{given}.* does nothing without --") as failed:
        run_train("--out_dir=run", "--attn_type=GK", f"--{given}")
    assert failed.value.code == 2 and not (tmp_path / "run").exists()


def test_an_annealing_without_effect_or_end_is_remarked(run_train):
    quartic = ["--mlp_act=quartic", "--anneal_iters=3"]
    assert "anneal_iters=3: no effect" in run_train("--out_dir=a", "--anneal_iters=3")
    assert "anneal_iters=3: longer" in run_train("--out_dir=b", *quartic, "--max_iters=2")
    assert "anneal_iters=3:" not in run_train("--out_dir=c", *quartic, "--max_iters=3")


def test_after_a_restart_by_torchrun_the_run_goes_on_whatever_init_from_was(
    run, run_train, tmp_path, monkeypatch, data_dir
):
    run_train("--out_dir=source", "--attn_type=PA_relu")  # which the finetune's folder is named for
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    tune = ["--init_from=finetune", "--out_dir=source", "--eval_interval=1"]
    tune += [f"--data_dir={data_dir}", "--lr_decay_iters=4", "--max_iters=4"]
    run("train", *tune, "--max_iters=2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    out = run("train", *tune)
    assert "restarted: going on with source-finetune-PA_relu" in out and "step 2:" not in out
    assert ckpt.load(tmp_path / "source-finetune-PA_relu" / "ckpt.pt")["iter_num"] == 4
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-2")  # another launch starts anew
    out = run("train", *tune)
    assert "moved to source-finetune-PA_relu.1" in out and "restarted" not in out


def test_a_changed_batch_and_a_longer_run_each_get_their_own_advice(run_train):
    """lr_decay_iters follows max_iters: it is not accused, but the way to keep it is told."""
    run_train("--out_dir=run")
    with pytest.raises(Failed, match="batch_size=4, not 8: leave out --batch_size;") as failed:
        run_train("--out_dir=run", "--init_from=resume", "--batch_size=8", "--max_iters=9")
    assert "pass --lr_decay_iters=4 to keep it" in failed.value.stderr
    assert "lr_decay_iters=4, not" not in failed.value.stderr
    with pytest.raises(Failed, match="learning_rate=0.0006, not 0.5: leave out") as failed:
        run_train("--out_dir=run", "--init_from=resume", "--learning_rate=0.5")
    assert "min_lr" not in failed.value.stderr


@pytest.mark.parametrize(
    "given, repair",
    [
        (["--init_from=resume", "--out_dir=run/ckpt.pt"], "pass --out_dir=run"),
        (["--init_from=run"], "pass --init_from=resume --out_dir=run"),
        (["--init_from=run/ckpt.pt"], "pass --init_from=resume --out_dir=run"),
        (["--init_from=run/previous.pt"], "pass --init_from=resume --out_dir=run"),
        (["--init_from=distill", "--teacher=run/ckpt.pt"], "pass --teacher=run"),
        (["--out_dir=run/ckpt.pt"], "pass --out_dir=run"),
    ],
)
def test_a_run_that_is_named_in_another_way_is_answered_with_the_right_one(
    run_train, given, repair
):
    run_train("--out_dir=run", "--max_iters=1")
    with pytest.raises(Failed, match=repair) as failed:
        run_train(*given)
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_mistake_reaches_the_terminal_whichever_rank_ends_first(tmp_path):
    (tmp_path / "late.py").write_text(
        "import os, time\ntime.sleep(1.5 * (os.environ['RANK'] == '0'))\n"
        "dataset, n_embd, n_head = 'abc', 30, 4\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess_run(*torchrun, ROOT / "train.py", "late.py", "--device=cpu", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: n_embd=30 is not divisible by n_head=4") == 1


NANOGPT_CONFIGS = {  # what each config file of nanoGPT's repository sets
    "train_gpt2": "wandb_log = True\nwandb_project = 'owt'\nwandb_run_name = 'gpt2-124M'\n"
    "batch_size = 12\nblock_size = 1024\ngradient_accumulation_steps = 5 * 8\n"
    "max_iters = 600000\nlr_decay_iters = 600000\neval_interval = 1000\neval_iters = 200\n"
    "log_interval = 10\nweight_decay = 1e-1\n",
    "eval_gpt2": "batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\n"
    "init_from = 'gpt2'\n",
    "finetune_shakespeare": "import time\nout_dir = 'out-shakespeare'\neval_interval = 5\n"
    "eval_iters = 40\nwandb_log = False\nwandb_project = 'shakespeare'\n"
    "wandb_run_name = 'ft-' + str(time.time())\ndataset = 'shakespeare'\ninit_from = 'gpt2-xl'\n"
    "always_save_checkpoint = False\nbatch_size = 1\ngradient_accumulation_steps = 32\n"
    "max_iters = 20\nlearning_rate = 3e-5\ndecay_lr = False\n",
    "train_shakespeare_char": "out_dir = 'out-shakespeare-char'\neval_interval = 250\n"
    "eval_iters = 200\nlog_interval = 10\nalways_save_checkpoint = False\nwandb_log = False\n"
    "wandb_project = 'shakespeare-char'\nwandb_run_name = 'mini-gpt'\n"
    "dataset = 'shakespeare_char'\ngradient_accumulation_steps = 1\nbatch_size = 64\n"
    "block_size = 256\nn_layer = 6\nn_head = 6\nn_embd = 384\ndropout = 0.2\n"
    "learning_rate = 1e-3\nmax_iters = 5000\nlr_decay_iters = 5000\nmin_lr = 1e-4\n"
    "beta2 = 0.99\nwarmup_iters = 100\n",
}


@pytest.mark.parametrize("name", NANOGPT_CONFIGS)
def test_the_config_files_of_nanogpt_train_or_ask_for_their_data_set(run, tmp_path, data_dir, name):
    (tmp_path / f"{name}.py").write_text(NANOGPT_CONFIGS[name])
    small = [*TINY, f"--data_dir={data_dir}", "--wandb_log=False", "--max_iters=1", "--out_dir=run"]
    small += ["--lr_decay_iters=1", "--init_from=scratch", "--eval_interval=1", "--eval_only=False"]
    if "dataset" not in NANOGPT_CONFIGS[name]:
        with pytest.raises(Failed, match="names no data set; pass --dataset=NAME: .*openwebtext"):
            run("train", f"{name}.py", *small)
    assert "step 1: train loss" in run("train", f"{name}.py", *small, "--dataset=abc")


def test_an_attention_that_takes_fewer_terms_says_so(run_train):
    given = ["--out_dir=run", "--attn_type=PA_relu", "--attn_decay=fixed", "--attn_normalize=8"]
    assert "attn_normalize=8: PA_relu takes 1" in run_train(*given)
    run_train(*given, "--init_from=resume")
