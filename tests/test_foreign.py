"""engine/foreign.py: checkpoints of nanoGPT and of the fork load, and mean what they meant."""

import numpy as np
import pytest
import torch
from test_checkpoint import ARGS, nanogpt_checkpoint, reloaded

from configurator import UserError
from engine import checkpoint as ckpt
from model import GPT, GPTConfig


class WithLayerNormBiases(GPT):
    """The fork's: bias=False is about Linear only."""

    def __init__(self, config, fill):
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.bias = torch.nn.Parameter(fill(module.weight.shape))


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("args", [{"bias": False}, {"bias": True}, {"vocab_size": 64}])
def test_a_checkpoint_of_nanogpt_loads(tmp_path, prefix, args):
    model, saved = nanogpt_checkpoint(prefix, **args)
    torch.save(saved, tmp_path / "ckpt.pt")
    loaded = ckpt.load(tmp_path / "ckpt.pt")
    again = ckpt.build_model(loaded, tmp_path / "ckpt.pt")
    idx = torch.randint(11, (2, 8))
    assert torch.equal(model(idx)[0], again(idx)[0])
    optimizer = again.configure_optimizers(0.2, 1e-3, (0.9, 0.95), "cpu")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert ckpt.restore(loaded, tmp_path, optimizer, scaler) == (7, 1.5)
    assert optimizer.param_groups[0]["weight_decay"] == 0.2  # options are the new run's
    state = optimizer.state_dict()["state"]
    for i, entry in saved["optimizer"]["state"].items():
        assert torch.equal(state[i]["exp_avg"], entry["exp_avg"])


@pytest.mark.parametrize("shape", [{"n_layer": 6}, {"n_layer": 1, "n_head": 1}, {"n_embd": 48}])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_the_masks_of_old_nanogpts_are_dropped(tmp_path, shape, dtype):
    model, saved = nanogpt_checkpoint("_orig_mod.", **shape)
    for i in range(model.config.n_layer):
        mask = torch.ones(8, 8, dtype=dtype).tril()[None, None]
        saved["model"][f"_orig_mod.transformer.h.{i}.attn.bias"] = mask
    assert same_logits(reloaded(saved, tmp_path), model)


def same_logits(one, other):
    idx = torch.randint(11, (2, 8))
    return torch.equal(one(idx, idx)[0], other(idx, idx)[0])


@pytest.mark.parametrize("attn_type", ["SM", "GK", "PA_relu"])
@pytest.mark.parametrize("fill", [torch.randn, torch.zeros])
def test_a_forks_layer_norm_biases_keep_the_logits(tmp_path, attn_type, fill):
    torch.manual_seed(0)
    model = WithLayerNormBiases(GPTConfig(**ARGS, attn_type=attn_type), fill)
    args = {**ARGS, "attn_type": attn_type, "add_lora": False}
    again = reloaded({"model": model.state_dict(), "model_args": args}, tmp_path)
    assert same_logits(again, model)
    assert again.config.bias is (fill is torch.randn) and again.config.attn_type == attn_type


def test_a_fork_that_could_have_added_adapters_loads_if_it_has_not(tmp_path):
    model, saved = nanogpt_checkpoint()
    saved["model_args"]["add_lora"] = True
    assert same_logits(reloaded(saved, tmp_path), model)
    saved["model"]["transformer.h.0.attn.c_attn.lora_A"] = torch.zeros(2, 16)
    with pytest.raises(UserError, match="LoRA adapters.* merge them"):
        reloaded(saved, tmp_path)


def test_numpy_numbers_in_a_checkpoint_become_pythons(tmp_path):
    _, saved = nanogpt_checkpoint()
    saved |= {"iter_num": np.int64(7), "best_val_loss": np.float32(1.5)}
    saved["model_args"]["vocab_size"] = np.int32(11)
    torch.save(saved, tmp_path / "ckpt.pt")
    loaded = ckpt.load(tmp_path / "ckpt.pt")
    numbers = loaded["iter_num"], loaded["best_val_loss"], loaded["model_args"]["vocab_size"]
    assert numbers == (7, 1.5, 11) and [type(n) for n in numbers] == [int, float, int]
