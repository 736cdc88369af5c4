"""A short run that may be killed at any time: `continue_run(FOLDER)` starts it, or continues it."""

from __future__ import annotations

import numpy as np
import torch

from resnet_bk import LanguageModel, ModelConfig, Trainer, TrainingConfig
from resnet_bk.data.loader import TokenLoader
from resnet_bk.data.shards import TokenDataset

STEPS = 80


def build(folder: str, **fields) -> Trainer:
    """The trainer of the run; dropout makes it depend on the state of the random generator."""
    torch.manual_seed(0)
    model = LanguageModel(
        ModelConfig(vocab_size=13, d_model=16, num_layers=2, feed_forward_dim=24, head_dim=8, state_size=4, dropout=0.1)
    )
    defaults = dict(
        output_dir=folder, steps=STEPS, sequence_length=16, batch_size=2, warmup_steps=10, log_every=1,
        evaluate_every=25, checkpoint_every=7, device="cpu", tensorboard=False, resume=True,
    )  # fmt: skip
    config = TrainingConfig(**{**defaults, **fields})
    tokens = np.random.default_rng(0).integers(0, 13, 1000)
    loader = TokenLoader(TokenDataset.from_ids("train", tokens), config.sequence_length, config.batch_size)
    return Trainer(model, loader, config, validation=torch.from_numpy(tokens[:100]), progress=False)


def continue_run(folder: str, fields: dict | None = None) -> None:
    """Run what is left of the run, in a process of its own."""
    torch.set_num_threads(1)
    build(folder, **(fields or {})).train()
