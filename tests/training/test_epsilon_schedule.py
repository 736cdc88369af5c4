"""The absorption floor follows the step, in every resolvent layer, and ends where the model's configuration has it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from resnet_bk import LanguageModel, Trainer
from resnet_bk.errors import ConfigError
from resnet_bk.training.callbacks import Callback
from resnet_bk.training.spectral import probe_media
from resnet_bk.training.stability.epsilon import EpsilonSchedule

PROBE = torch.arange(24).reshape(2, 12) % 13


class Floors(Callback):
    """The smallest absorption on a probe, after every step."""

    def __init__(self) -> None:
        self.floors: list[float] = []
        self.seen: list[float] = []

    def on_step_end(self, trainer) -> None:
        self.floors += {block.mixer.config.absorption_floor for block in trainer.model.blocks}
        self.seen.append(min(medium.absorption.min().item() for medium in probe_media(trainer.model, PROBE).values()))


def run(tiny, folder: str, steps: int = 8, **fields) -> tuple[Trainer, Floors]:
    floors = Floors()
    config = tiny.config(output_dir=folder, steps=steps, schedule="constant", **fields)
    callbacks = [EpsilonSchedule(0.1, share=0.5), floors]
    trainer = Trainer(tiny.model(), tiny.loader(), config, callbacks=callbacks, progress=False)
    trainer.train()
    return trainer, floors


def test_the_floor_falls_to_the_models_own_and_the_mixers_use_it(tiny, tmp_path) -> None:
    trainer, floors = run(tiny, str(tmp_path / "run"))
    assert floors.floors == pytest.approx(
        [0.1, 0.1 ** (2 / 3) * 0.001 ** (1 / 3), 0.1 ** (1 / 3) * 0.001 ** (2 / 3), *[0.001] * 5]
    )
    assert all(least >= floor for least, floor in zip(floors.seen, floors.floors, strict=True))
    assert floors.seen[0] > 0.1 and floors.seen[-1] < 0.1
    # What is saved is the model that was trained.
    loaded = LanguageModel.from_pretrained(trainer.output_dir / "step-000008")
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(PROBE).logits, trainer.model(PROBE).logits)


def test_a_resumed_run_has_the_floor_of_its_step(tiny, tmp_path) -> None:
    whole, expected = run(tiny, str(tmp_path / "whole"))
    floor = EpsilonSchedule(0.1, share=0.5).value_at
    assert expected.floors == [floor(step, 8, 1e-3) for step in range(8)]

    # The schedule is a share of the steps, so a resumed run keeps its floors if it keeps its steps.
    class StopAt(Callback):
        def on_step_end(self, trainer) -> None:
            if trainer.step == 2:
                trainer.stop()

    config = tiny.config(output_dir=str(tmp_path / "parts"), steps=8, schedule="constant", resume=True)
    first = Trainer(tiny.model(), tiny.loader(), config, callbacks=[EpsilonSchedule(0.1), StopAt()], progress=False)
    assert first.train().step == 2
    second, rest = run(tiny, str(tmp_path / "parts"), resume=True)
    assert rest.floors == expected.floors[2:]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))


@pytest.mark.parametrize("shape", ["linear", "cosine", "geometric"])
def test_every_shape_moves_one_way_between_its_ends(shape) -> None:
    schedule = EpsilonSchedule(0.2, share=1.0, shape=shape)
    floors = [schedule.value_at(step, 50, 1e-3) for step in range(50)]
    assert floors[0] == 0.2 and floors[-1] == 1e-3
    assert all(a > b for a, b in itertools.pairwise(floors))
    assert EpsilonSchedule(0.2, share=0.01).value_at(1, 50, 1e-3) == 1e-3


def test_bad_numbers_are_named(tiny) -> None:
    for start in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="start is"):
            EpsilonSchedule(start)
    with pytest.raises(ConfigError, match="field is 'epsilon'"):
        EpsilonSchedule(0.1, field="epsilon")
    config = tiny.config(output_dir=tiny.config().output_dir + "none")
    bare = EpsilonSchedule(0.5, field="position_epsilon")
    with pytest.raises(ConfigError, match=r"model\.position_potential is 'none', which has no exponent"):
        Trainer(tiny.model(), tiny.loader(), config, callbacks=[bare], progress=False).train()
    with pytest.raises(ConfigError, match="share is 0"):
        EpsilonSchedule(0.1, share=0)
    plain = tiny.model(mixer="attention", attention_head_dim=8)
    trainer = Trainer(plain, tiny.loader(), tiny.config(), callbacks=[EpsilonSchedule(0.1)], progress=False)
    with pytest.raises(ConfigError, match="no layer with a resolvent"):
        trainer.train()


def test_the_exponent_of_the_prime_bumps_moves_too(tiny) -> None:
    model = tiny.model(position_potential="prime_bump", position_epsilon=0.25)
    seen = []

    class Look(Callback):
        def on_step_end(self, trainer) -> None:
            seen.append(trainer.model.blocks[1].mixer._position_potential(torch.tensor([6]), 6).item())

    callbacks = [EpsilonSchedule(1.0, field="position_epsilon", share=1.0, shape="linear"), Look()]
    Trainer(model, tiny.loader(), tiny.config(steps=4), callbacks=callbacks, progress=False).train()
    # Position 6 is the prime 7.
    assert seen == pytest.approx([math.log(7) / 7 ** (0.5 + eps) for eps in (1.0, 0.75, 0.5, 0.25)], rel=1e-6)
