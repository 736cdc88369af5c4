"""The first module that breaks is named, whichever it is; a step that a callback refuses changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from resnet_bk import Trainer
from resnet_bk.errors import DomainError, InstabilityError
from resnet_bk.training.callbacks import Callback
from resnet_bk.training.finite import first_nonfinite

CPU = torch.device("cpu")
BATCHES = [{"input_ids": torch.arange(16)[None] % 13, "labels": torch.arange(16)[None] % 13}]


def overflow(_module, _inputs, output):
    return output * math.inf


@pytest.mark.parametrize(
    "name", ["embedding", "blocks.0.mixer_norm", "blocks.0.mixer.in_proj", "blocks.1.feed_forward.out_proj", "norm"]
)
def test_the_first_module_that_breaks_is_named(tiny, name: str) -> None:
    model = tiny.model(dropout=0.1)
    before = torch.get_rng_state()
    assert first_nonfinite(model, BATCHES, CPU) is None
    model.get_submodule(name).register_forward_hook(overflow)
    hooks = {key: len(module._forward_hooks) for key, module in model.named_modules()}
    said = first_nonfinite(model, BATCHES, CPU)
    assert said is not None and said.endswith(f"the first module whose output is not finite is {name}")
    assert hooks == {key: len(module._forward_hooks) for key, module in model.named_modules()}
    assert torch.equal(before, torch.get_rng_state())


def test_parameters_come_before_modules_and_gradients_after(tiny) -> None:
    model = tiny.model()
    first, last = model.blocks[0].mixer.skip, model.blocks[1].mixer.skip
    for parameter in (first, last):
        parameter.grad = torch.full_like(parameter, math.nan)
    assert str(first_nonfinite(model, BATCHES, CPU)).endswith("gradient is not finite is blocks.1.mixer.skip")
    with torch.no_grad():
        last[0] = math.inf
    assert str(first_nonfinite(model, BATCHES, CPU)).endswith("value is not finite is blocks.1.mixer.skip")


def test_a_forward_pass_that_breaks_off_is_told_from_a_bad_batch(tiny) -> None:
    trainer = Trainer(tiny.model(), tiny.loader(), tiny.config(), progress=False)
    trainer.model.embedding.register_forward_hook(overflow)
    with pytest.raises(
        InstabilityError, match=r"Training step 1: the forward pass broke off; .* finite is embedding\."
    ):
        trainer.train()
    small = Trainer(tiny.model(vocab_size=5), tiny.loader(), tiny.config(), progress=False)
    with pytest.raises(DomainError, match="The tokenizer and the model have different vocabularies") as caught:
        small.train()
    assert not isinstance(caught.value, InstabilityError)


class Refuse(Callback):
    """Refuses step 3; goes on if it is told so."""

    def __init__(self, handles: bool) -> None:
        self.handles, self.seen, self.starts = handles, [], 0

    def on_step_start(self, trainer) -> None:
        self.starts += 1

    def on_gradients(self, trainer, loss, gradient_norm) -> None:
        assert math.isfinite(loss) and gradient_norm > 0
        if trainer.step == 2 and not self.seen:
            raise InstabilityError("refused")

    def on_instability(self, trainer, error) -> bool:
        self.seen.append((trainer.step, [p.detach().clone() for p in trainer.model.parameters()]))
        return self.handles


@pytest.mark.parametrize("handles", [True, False])
def test_a_refused_step_changes_nothing(tiny, handles: bool) -> None:
    reference = Trainer(tiny.model(), tiny.loader(), tiny.config(steps=2, schedule="constant"), progress=False)
    reference.train()
    refuse = Refuse(handles)
    config = tiny.config(schedule="constant", output_dir=tiny.config().output_dir + "refused")
    trainer = Trainer(tiny.model(), tiny.loader(), config, callbacks=[refuse], progress=False)
    if handles:
        assert trainer.train().step == 6
        assert refuse.starts == 7
    else:
        with pytest.raises(InstabilityError, match="refused"):
            trainer.train()
    step, parameters = refuse.seen[0]
    assert step == 2
    assert all(torch.equal(a, b) for a, b in zip(parameters, reference.model.parameters(), strict=True))
