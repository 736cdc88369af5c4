from __future__ import annotations

import pytest
import torch

from resnet_bk.errors import CheckpointError, ConfigError
from resnet_bk.training.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors

CPU = torch.device("cpu")


def stepped(tiny, model):
    optimizer = build_optimizer(model, tiny.config(), CPU)
    batch = next(tiny.loader())["input_ids"]
    model(batch, labels=batch).loss.backward()
    optimizer.step()
    return optimizer


def test_settings_come_from_the_configuration(tiny):
    config = tiny.config(learning_rate=0.3, beta1=0.5, beta2=0.6, weight_decay=0.7)
    optimizer = build_optimizer(tiny.model(), config, CPU)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.7}
    assert all(group["lr"] == 0.3 and group["betas"] == (0.5, 0.6) for group in optimizer.param_groups)


def test_every_parameter_must_be_in_one_group(tiny, monkeypatch):
    model = tiny.model()
    groups = model.parameter_groups(0.1)
    groups[1]["params"].pop()
    monkeypatch.setattr(model, "parameter_groups", lambda weight_decay: groups)
    with pytest.raises(ConfigError, match="every parameter exactly once"):
        build_optimizer(model, tiny.config(), CPU)


def test_state_goes_out_and_in_by_name(tiny):
    model = tiny.model()
    optimizer = stepped(tiny, model)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    assert set(tensors) == {
        f"{what}/{n}" for n, _ in model.named_parameters() for what in ("step", "exp_avg", "exp_avg_sq")
    }
    other = build_optimizer(model, tiny.config(), CPU)
    load_optimizer_tensors(model, other, tensors, without_state=[], file="f")
    restored = optimizer_tensors(model, other)
    assert all(
        torch.equal(restored[name], tensor) and restored[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: t.pop("exp_avg/norm.weight"), r"f lacks the tensor 'exp_avg/norm.weight'"),
        (lambda t: t.update({"exp_avg/extra": torch.zeros(1)}), r"f holds an unknown tensor 'exp_avg/extra'"),
        (
            lambda t: t.update({"exp_avg/norm.weight": torch.zeros(3)}),
            r"f: tensor 'exp_avg/norm.weight' has shape \[3\]",
        ),
        (lambda t: [t.pop(f"{w}/norm.weight") for w in ("step", "exp_avg", "exp_avg_sq")], r"f lacks the tensor"),
    ],
)
def test_damaged_state_is_named_and_not_loaded(tiny, damage, message):
    model = tiny.model()
    tensors = dict(optimizer_tensors(model, stepped(tiny, model)))
    damage(tensors)
    other = build_optimizer(model, tiny.config(), CPU)
    with pytest.raises(CheckpointError, match=message):
        load_optimizer_tensors(model, other, tensors, without_state=[], file="f")
    assert not other.state
