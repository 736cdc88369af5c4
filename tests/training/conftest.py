"""Parts of a trainer, small enough that a training step takes milliseconds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from training_cases import RandomLoader, tiny_model

from resnet_bk import TrainingConfig


@pytest.fixture
def tiny(tmp_path):
    """Makers of the parts of a trainer: `model(**fields)`, `loader(**sizes)`, `config(**fields)`."""
    defaults = dict(
        output_dir=str(tmp_path / "run"), steps=6, sequence_length=16, batch_size=2, warmup_steps=2, log_every=1,
        evaluate_every=0, checkpoint_every=0, device="cpu", tensorboard=False,
    )  # fmt: skip
    return SimpleNamespace(
        model=tiny_model,
        loader=RandomLoader,
        config=lambda **fields: TrainingConfig(**{**defaults, **fields}),
        validation=RandomLoader(batch=1, time=200, seed=99).__next__()["input_ids"][0],
    )
