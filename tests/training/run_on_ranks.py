"""Short runs on however many ranks there are: `torchrun run_on_ranks.py FOLDER NAME...`, each in FOLDER/NAME.

`NAME:steps=3` ends or continues the run at step 3; `NAME:stop=3` lets rank 1 alone ask for the end, and `NAME:kill=4`
kills rank 1 after step 4, the first time. `NAME:gpu=1` runs on a GPU a rank, in float32.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resnet_bk import LanguageModel, ModelConfig, Trainer, TrainingConfig
from resnet_bk.data.loader import PackedTokenLoader
from resnet_bk.data.shards import TokenDataset
from resnet_bk.training.callbacks import Callback
from resnet_bk.training.checkpoint import latest_checkpoint
from resnet_bk.training.config import DistributedConfig
from resnet_bk.training.curriculum import training_batches

FSDP = {"strategy": "fsdp"}
SCENARIOS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp-accumulation": {"training": {"gradient_accumulation_steps": 3}},
    "ddp-dealt": {"training": {"gradient_accumulation_steps": 2, "batch_size": 1}},
    "ddp-packed": {"training": {"gradient_accumulation_steps": 2}, "packed": True},
    # Parameters without a gradient, and segments that are recomputed in the backward pass.
    "ddp-unused": {"model": {"kernel": "green"}, "segment_tokens": 64},
    "ddp-float16": {"training": {"precision": "float16"}},
    "fsdp": {"distributed": FSDP},
    "fsdp-accumulation": {"distributed": FSDP, "training": {"gradient_accumulation_steps": 3}},
    "fsdp-packed": {"distributed": FSDP, "training": {"gradient_accumulation_steps": 4}, "packed": True},
    "fsdp-segments": {"distributed": FSDP, "segment_tokens": 64},
    "fsdp-unused": {"distributed": FSDP, "model": {"kernel": "green", "tie_embeddings": False}},
    "fsdp-zero2": {
        "distributed": {**FSDP, "reshard_after_forward": False}, "training": {"gradient_accumulation_steps": 3},
        "segment_tokens": 64,
    },
    "fsdp-offload": {"distributed": {**FSDP, "cpu_offload": True}},
    "fsdp-bfloat16": {
        "distributed": {**FSDP, "gather_dtype": "bfloat16", "reduce_dtype": "bfloat16"},
        "training": {"precision": "bfloat16"},
    },
    "fsdp-float16": {"distributed": FSDP, "training": {"precision": "float16"}},
    "ddp-context": {"distributed": {"context_parallel": 2}, "training": {"batch_size": 3}},
    "fsdp-context": {
        "distributed": {**FSDP, "context_parallel": 2}, "training": {"gradient_accumulation_steps": 3},
        "model": {"peierls_pairs": 1, "phase_coupling": True, "source": "free"}, "segment_tokens": 64,
    },
    "ddp-mamba2": {"model": {"mixer": "mamba2"}},
    "fsdp-mamba3": {"distributed": FSDP, "model": {"mixer": "mamba3"}},
    "fsdp-hybrid": {"distributed": FSDP, "model": {"attention_every": 2, "attention_head_dim": 8}},
    "ddp-carry": {"training": {"carry": "truncated", "gradient_accumulation_steps": 2}},
    "ddp-carry-exact": {
        "training": {"carry": "exact", "gradient_accumulation_steps": 2}, "model": {"mixer": "mamba3"}
    },
    "ddp-carry-context": {"training": {"carry": "truncated"}, "distributed": {"context_parallel": 2}},
    "ddp-documents": {"training": {"carry": "exact", "stream": "document", "gradient_accumulation_steps": 2}},
    "ddp-documents-context": {
        "training": {"carry": "truncated", "stream": "document"}, "distributed": {"context_parallel": 2}
    },
    "fsdp-carry": {
        "distributed": FSDP, "training": {"carry": "truncated"},
        "model": {"attention_every": 2, "attention_head_dim": 8, "attention_window": 9},
    },
    "fsdp-carry-exact": {
        "distributed": FSDP, "training": {"carry": "exact", "gradient_accumulation_steps": 3}, "segment_tokens": 64,
    },
}  # fmt: skip


class Accident(Callback):
    """Notes where each start of the run began; on rank 1, kills the process once, or asks for the end."""

    def __init__(self, kill: int = 0, stop: int = 0) -> None:
        self.kill, self.stop = kill, stop

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.ranks.is_main:
            with (trainer.output_dir / "starts").open("a") as file:
                file.write(f"{trainer.step}\n")

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.ranks.rank == 1 and trainer.step == self.stop:
            trainer.stop()
        if trainer.ranks.rank == 1 and trainer.step == self.kill and not trainer.ranks.restarted:
            while latest_checkpoint(trainer.output_dir) is None:
                time.sleep(0.01)  # it may be written in the background
            os.kill(os.getpid(), signal.SIGKILL)


def build(
    folder: str | Path, name: str, *, plain: bool = False, callbacks: tuple[Callback, ...] = (), **fields: Any
) -> Trainer:
    """The trainer of a scenario, or of the same run in a `plain` process; the model is drawn by the trainer."""
    scenario = {**SCENARIOS[name], **({"distributed": {}} if plain else {})}
    sizes = dict(vocab_size=13, d_model=16, num_layers=2, feed_forward_dim=24, head_dim=8, state_size=4)
    with torch.device("meta"):
        model = LanguageModel(ModelConfig(**{**sizes, **scenario.get("model", {})}))
    model.segment_tokens = scenario.get("segment_tokens", model.segment_tokens)
    defaults = dict(
        output_dir=str(Path(folder) / name), steps=6, sequence_length=96, batch_size=4, warmup_steps=2, log_every=1,
        learning_rate=2e-2, schedule="constant", gradient_clip_norm=0.1, evaluate_every=3, checkpoint_every=3,
        device="cpu", tensorboard=False,
    )  # fmt: skip
    config = TrainingConfig(**{**defaults, **scenario.get("training", {}), **fields})
    tokens = np.random.default_rng(0).integers(0, 2, 2000).cumsum() % 13
    data = TokenDataset.from_ids("train", tokens)
    data = dataclasses.replace(data, document_offsets=np.array([0, 150, 500, 530, 1100, 1400, 1660, 2000]))
    if "packed" in scenario:
        documents = dataclasses.replace(data, document_offsets=np.arange(0, 2001, 25))
        loader = PackedTokenLoader(documents, config.sequence_length)
    else:
        loader = training_batches(data, config)
    return Trainer(
        model, loader, config, distributed=DistributedConfig(**scenario.get("distributed", {})),
        validation=torch.from_numpy(tokens[:500]), callbacks=callbacks, progress=False,
    )  # fmt: skip


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        scenario, *pairs = argument.split(":")
        numbers = {key: int(value) for key, _, value in (pair.partition("=") for pair in pairs)}
        fields: dict[str, Any] = {"steps": numbers.pop("steps"), "resume": True} if "steps" in numbers else {}
        if numbers.pop("gpu", 0):
            fields |= {"device": "cuda", "precision": "float32"}
        build(sys.argv[1], scenario, callbacks=(Accident(**numbers),), **fields).train()
