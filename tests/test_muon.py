"""Muon for the blocks' matrices, AdamW for the rest, as one optimizer."""

from copy import deepcopy

import pytest
import torch

from model import GPT, GPTConfig


def tiny(**fields):
    torch.manual_seed(0)
    return GPT(GPTConfig(16, 11, 2, 2, 16, **fields))


def optimizer_of(model):
    return model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu", "muon")


def train(model, optimizer, steps):
    for step in range(steps):
        x, y = torch.randint(11, (2, 4, 16), generator=torch.Generator().manual_seed(step))
        model(x, y)[1].backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("fields", [{}, {"bias": False}, {"lora_rank": 2}])
def test_every_trained_parameter_has_exactly_one_optimizer(fields):
    model = tiny(**fields)
    optimizer = optimizer_of(model)
    muon, adamw = (
        [p for g in part.param_groups for p in g["params"]] for part, *_ in optimizer.parts
    )
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(muon) + len(adamw) == len(trained)
    assert {id(p) for p in muon + adamw} == {id(p) for p in trained.values()}
    hidden = {id(p) for n, p in trained.items() if ".h." in n and p.dim() == 2}
    assert {id(p) for p in muon} == hidden and hidden


def test_it_does_what_the_two_do_apart():
    one, two = tiny(), tiny()
    matrices = [p for n, p in two.named_parameters() if ".h." in n and p.dim() == 2]
    ids = {id(p) for p in matrices}
    rest = [p for p in two.parameters() if id(p) not in ids]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.1}]
    groups += [{"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    muon = torch.optim.Muon(matrices, 1e-2, 0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    train(one, optimizer_of(one), 3)
    for step in range(3):
        x, y = torch.randint(11, (2, 4, 16), generator=torch.Generator().manual_seed(step))
        two(x, y)[1].backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_its_state_comes_back_and_is_the_one_it_works_on():
    one, two = tiny(), tiny()
    first, second = optimizer_of(one), optimizer_of(two)
    train(one, first, 2)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(deepcopy(first.state_dict()))
    assert second.param_groups[0] is second.parts[0][0].param_groups[0]
    second.param_groups[0]["lr"] = first.param_groups[0]["lr"] = 0.5
    train(one, first, 2)
    train(two, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
