"""A run disturbed by one batch, on however many ranks there are: `torchrun recover_on_ranks.py FOLDER STRATEGY`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from resnet_bk import LanguageModel, ModelConfig, Trainer, TrainingConfig
from resnet_bk.data.loader import TokenLoader
from resnet_bk.data.shards import TokenDataset
from resnet_bk.training.config import DistributedConfig
from resnet_bk.training.stability.config import StabilityConfig
from resnet_bk.training.stability.monitor import StabilityMonitor
from resnet_bk.training.stability.recovery import AutoRecovery


class Disturbed(TokenLoader):
    """The batches of a `TokenLoader`, but for number 33, which no model can foresee."""

    drawn = 0

    def __next__(self):
        batch = super().__next__()
        self.drawn += 1
        return batch._replace(input_ids=batch.input_ids * 5 % 13) if self.drawn == 33 else batch

    def state_dict(self):
        return {**super().state_dict(), "drawn": self.drawn}

    def load_state_dict(self, state) -> None:
        super().load_state_dict(state)
        self.drawn = state["drawn"]


def run(folder: str | Path, strategy: str) -> Trainer:
    """The finished trainer."""
    with torch.device("meta"):
        model = LanguageModel(
            ModelConfig(vocab_size=13, d_model=16, num_layers=2, feed_forward_dim=24, head_dim=8, state_size=4)
        )
    config = TrainingConfig(
        output_dir=str(folder), steps=40, sequence_length=32, batch_size=4, warmup_steps=2, log_every=1,
        learning_rate=6e-2, checkpoint_every=0, device="cpu", tensorboard=False,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, 2, 8000).cumsum() % 13
    watch = StabilityMonitor(StabilityConfig(recovery=True, least_steps=8, every=10))
    trainer = Trainer(
        model, Disturbed(TokenDataset.from_ids("train", tokens), 32, 4), config,
        distributed=DistributedConfig(strategy="fsdp" if strategy == "fsdp" else "ddp"),
        callbacks=[watch, AutoRecovery(snapshot_every=10, calm_steps=5)], progress=False,
    )  # fmt: skip
    trainer.train()
    return trainer


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2])
