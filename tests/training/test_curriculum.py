"""Stages follow each other at the right steps, also after a resume, and a run goes through them."""

from __future__ import annotations

import json

import pytest
import torch

from resnet_bk import Trainer, TrainingConfig
from resnet_bk.data.loader import TokenLoader
from resnet_bk.data.shards import TokenDataset
from resnet_bk.errors import CheckpointError, ConfigError, DataError
from resnet_bk.training.curriculum import CurriculumLoader, Stage, curriculum_stages, training_batches

TOKENS = TokenDataset.from_ids("train", (torch.arange(4000) * 7 % 13).tolist())


def shapes(loader, count: int) -> list[tuple[int, ...]]:
    return [tuple(next(loader).input_ids.shape) for _ in range(count)]


def test_stages_come_in_order_and_the_configuration_is_the_last(tiny) -> None:
    config = tiny.config(curriculum=[[2, 4, 8], [1, 8, 4]], gradient_accumulation_steps=2)
    assert curriculum_stages(config) == [Stage(2, 4, 8), Stage(1, 8, 4), Stage(None, 16, 2)]
    loader = training_batches(TOKENS, config)
    assert shapes(loader, 9) == [(8, 4)] * 4 + [(4, 8)] * 2 + [(2, 16)] * 3
    assert isinstance(training_batches(TOKENS, tiny.config()), TokenLoader)


def test_doubling_keeps_the_tokens_of_a_batch(tiny) -> None:
    config = tiny.config(curriculum_from=1024, sequence_length=131072, batch_size=1, steps=1400)
    stages = curriculum_stages(config)
    assert [stage.sequence_length for stage in stages] == [1024 * 2**k for k in range(8)]
    assert {stage.sequence_length * stage.batch_size for stage in stages} == {131072}
    assert [stage.steps for stage in stages] == [100] * 7 + [None]
    assert curriculum_stages(tiny.config(curriculum_from=16)) == [Stage(None, 16, 2)]
    # Rounded down, and never none.
    assert curriculum_stages(tiny.config(curriculum_from=6, sequence_length=20, batch_size=1))[1].batch_size == 1


def test_a_position_is_restored_in_any_stage(tiny) -> None:
    config = tiny.config(curriculum=[[2, 4, 8], [3, 8, 4]])
    for before in range(8):
        loader, other = training_batches(TOKENS, config), training_batches(TOKENS, config)
        for _ in range(before):
            next(loader)
        other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        for _ in range(4):
            assert torch.equal(next(loader).input_ids, next(other).input_ids)
    assert isinstance(other, CurriculumLoader) and other.stage == Stage(None, 16, 2)
    with pytest.raises(CheckpointError, match=r"not written with these 3 stages of training\.curriculum"):
        other.load_state_dict(training_batches(TOKENS, tiny.config()).state_dict())


def test_a_run_goes_through_its_stages_and_resumes_among_them(tiny, tmp_path) -> None:
    def run(folder: str, *parts: int) -> Trainer:
        for steps in parts:
            config = tiny.config(
                output_dir=str(tmp_path / folder), steps=steps, curriculum=[[2, 4, 8], [2, 8, 4]], resume=True,
                schedule="constant",
            )  # fmt: skip
            trainer = Trainer(tiny.model(), training_batches(TOKENS, config), config, progress=False)
            assert trainer.train().tokens == 32 * steps
        return trainer

    whole, parts = run("whole", 6), run("parts", 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True))


def test_bad_stages_are_named(tiny) -> None:
    for stage in ([1, 2], [0, 4, 1], [1, 1, 1], [1, 4, 0]):
        with pytest.raises(ConfigError, match=r"training\.curriculum holds"):
            TrainingConfig(curriculum=[stage])
    for start in (1, 2048, -4):
        with pytest.raises(ConfigError, match=r"training\.curriculum_from is"):
            TrainingConfig(curriculum_from=start)
    with pytest.raises(ConfigError, match="both set"):
        TrainingConfig(curriculum=[[1, 4, 1]], curriculum_from=4)
    with pytest.raises(DataError, match="fewer than"):
        training_batches(TOKENS, tiny.config(curriculum=[[1, 5000, 1]]))
