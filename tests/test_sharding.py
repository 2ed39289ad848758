"""engine/sharding.py: activations computed twice, and weights shared among ranks."""

import pytest
import torch
from conftest import EVERY_ATTN_TYPE, ROOT, Failed, subprocess_run
from conftest import log_rows as rows

from configurator import UserError
from engine import checkpoint as ckpt
from engine import sharding, start
from engine.runtime import Runtime
from engine.sharding import checkpoint_activations, part_like, weights, whole
from model import GPT, GPTConfig
from train import Config


def loss_and_gradients(attn_type: str, checkpointed: bool) -> tuple[torch.Tensor, list, int]:
    """Of one training step with dropout; and the bytes that forward kept for backward."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 11, 3, 2, 16, dropout=0.2, attn_type=attn_type))
    if checkpointed:
        checkpoint_activations(model)
    idx, kept = torch.randint(11, (2, 32)), []
    pack = lambda t: kept.append(t.nbytes) or t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(idx, idx)[1]
    loss.backward()
    return loss, [p.grad for p in model.parameters()], sum(kept)


@pytest.mark.parametrize("attn_type", EVERY_ATTN_TYPE)
def test_checkpointing_changes_no_bit_of_loss_and_gradients(attn_type):
    plain, checkpointed = (loss_and_gradients(attn_type, value) for value in (False, True))
    assert torch.equal(plain[0], checkpointed[0])
    assert all(map(torch.equal, plain[1], checkpointed[1]))
    assert checkpointed[2] < plain[2] / 3  # three blocks; what is left is around them


@pytest.mark.slow
def test_a_compiled_run_with_checkpointing_is_the_one_without(run_train, tmp_path):
    args = ["--compile=True", "--n_layer=1", "--dropout=0.1", "--attn_type=GK", "--max_iters=2"]
    for name, value in (("plain", False), ("checkpointed", True)):
        run_train(f"--out_dir={name}", f"--checkpoint_activations={value}", *args)
    a, b = (ckpt.load(tmp_path / d / "ckpt.pt")["model"] for d in ("plain", "checkpointed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_checkpoints_activations_if_it_is_asked_to(run_train, monkeypatch):
    models = []
    monkeypatch.setattr(sharding, "checkpoint_activations", models.append)
    run_train("--out_dir=plain", "--max_iters=0")
    assert not models
    run_train("--out_dir=checkpointed", "--max_iters=0", "--checkpoint_activations")
    assert [type(model) for model in models] == [GPT]


def train_on_ranks(n_ranks: int, cwd, *args: str):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    return subprocess_run(*torchrun, ROOT / "train.py", *args, "--device=cpu", cwd=cwd)


SHARDED = [
    pytest.param(2, ["--dropout=0.1", "--checkpoint_activations"], 2e-6, id="adamw"),
    pytest.param(
        2, ["--attn_decay=learned", "--norm=fixed"], 2e-6, id="own", marks=pytest.mark.slow
    ),
    pytest.param(2, ["--lora_rank=2", "--optimizer=muon"], 2e-4, id="lora-muon"),  # bfloat16 in it
    pytest.param(4, ["--attn_decay=fixed"], 2e-6, id="four", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("n_ranks, options, tolerance", SHARDED)
def test_a_sharded_run_is_the_whole_one_and_each_resumes_the_other(
    run, run_train, tmp_path, data_dir, n_ranks, options, tolerance
):
    """One rank, then sharded ranks, then one rank again; eval_iters=3 can't be shared evenly."""
    options = [*options, "--gradient_accumulation_steps=4", "--attn_type=GK", "--eval_iters=3"]
    options += [
        "--stats_interval=2",
        "--eval_interval=1",
        "--log_interval=1",
        "--lr_decay_iters=6",
        "--max_iters=6",
    ]
    run_train("--out_dir=whole", *options)
    run_train("--out_dir=parts", *options, "--max_iters=2")
    resume = ["--out_dir=parts", "--init_from=resume", f"--data_dir={data_dir}", "--device=cpu"]
    resume += ["--checkpoint_activations"] * ("--checkpoint_activations" in options)
    done = train_on_ranks(n_ranks, tmp_path, *resume, "--shard=full", "--max_iters=4")
    assert done.returncode == 0, done.stderr
    run("train", *resume, "--max_iters=6")
    close = {"rel": tolerance, "abs": 2e-6}
    for name in ("log.csv", "stats.csv"):
        both = (rows(tmp_path / folder, name) for folder in ("whole", "parts"))
        for one, other in zip(*both, strict=True):
            for key in one.keys() - {"seconds", "step_ms", "tokens_per_s", "peak_mib"}:
                if one[key]:
                    wide = {"rel": 100 * tolerance, "abs": 2e-5} if name == "stats.csv" else close
                    assert float(other[key]) == pytest.approx(float(one[key]), **wide), key
    a, b = (ckpt.load(tmp_path / folder / "ckpt.pt") for folder in ("whole", "parts"))
    assert list(a["model"]) == list(b["model"])
    for name in a["model"]:
        torch.testing.assert_close(a["model"][name], b["model"][name], rtol=1e-3, atol=1e-3)
    for i, state in a["optimizer"]["state"].items():
        assert {k: t.shape for k, t in state.items()} == {
            k: t.shape for k, t in b["optimizer"]["state"][i].items()
        }


def test_what_sharding_can_not_do_is_one_line(run_train, monkeypatch):
    with pytest.raises(Failed, match="leave it out for one rank"):
        run_train("--shard=full")
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = {"init_from": "distill", "teacher": "gpt2", "shard": "full"}
    with pytest.raises(UserError, match="can't match a teacher's attention; use --shard=none"):
        start.begin(Config, given, Runtime("cpu", "float32", False, shard=True))
    given = {"shard": "full", "eval_only": True, "init_from": "resume", "datasets": "abc"}
    with pytest.raises(UserError, match="and with --datasets"):
        start.check(Config(**given))


def test_without_sharding_a_state_dict_stays_what_it_is():
    model, rt = GPT(GPTConfig(8, 11, 1, 1, 8)), Runtime("cpu", "float32", False)
    state = weights(model, rt, lambda name: name.startswith("transformer.h"))
    assert list(state) == [n for n in model.state_dict() if n.startswith("transformer.h")]
    assert not any(t.requires_grad for t in state.values())
    nested = {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 1.0}]}
    assert whole(nested, rt) == nested
    full = torch.ones(3, 2)
    assert part_like(full, torch.nn.Parameter(torch.zeros(3, 2))) is full
