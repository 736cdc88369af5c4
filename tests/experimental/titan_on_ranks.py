"""`torchrun titan_on_ranks.py with FOLDER RANKS [OPTION...]`: torchtitan trains a toy model on so many CPU ranks.

FOLDER holds the model that it starts from (`assets`) and texts (`texts`). Losses and norms go to `with.json`, weights
drawn and trained to `drawn.pt` and `trained.pt`. `without` runs the same steps in one process and a plain loop, and
leaves `without.json` and `expected`; `refused` notes what is said to impossible jobs. torchtitan knows GPUs only, so
what it asks of one is answered here for the processor.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

torch._utils._get_available_device_type = lambda: "cpu"

from torchtitan import train  # noqa: E402
from torchtitan.components import metrics  # noqa: E402
from torchtitan.components.lr_scheduler import build_lr_schedulers  # noqa: E402
from torchtitan.components.optimizer import build_optimizers  # noqa: E402
from torchtitan.components.tokenizer import build_hf_tokenizer  # noqa: E402
from torchtitan.config import ConfigManager  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.hf_datasets.text_datasets import build_text_dataloader  # noqa: E402
from torchtitan.protocols.train_spec import register_train_spec  # noqa: E402
from torchtitan.tools.logging import init_logger  # noqa: E402

from resnet_bk import LanguageModel  # noqa: E402
from resnet_bk.errors import ConfigError  # noqa: E402
from resnet_bk.experimental.torchtitan import parallelize, read_weights, train_spec  # noqa: E402
from resnet_bk.training.distributed import whole  # noqa: E402

MEMORY = metrics.DeviceMemStats(0.0, 0.0, 0.0, 0.0, 0, 0)
STEPS = 4


def configuration(folder: Path, *options: str):
    """The job of a toy run, of the model that lies in `folder/assets`."""
    register_train_spec("toy", train_spec({"toy": LanguageModel.from_pretrained(folder / "assets").config}))
    settings = {
        "job.dump_folder": folder, "model.name": "toy", "model.flavor": "toy",
        "model.hf_assets_path": folder / "assets",
        "training.dataset_path": folder / "texts", "training.seq_len": 32, "training.local_batch_size": 2,
        "training.steps": STEPS, "training.mixed_precision_param": "float32", "optimizer.lr": 1e-2,
        "optimizer.implementation": "foreach", "lr_scheduler.warmup_steps": 2, "metrics.log_freq": 1,
        "activation_checkpoint.mode": "none", "checkpoint.interval": 100,
        "debug.seed": 7,
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    flags = ["--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.last_save_in_hf"]
    return ConfigManager().parse_args([*arguments, *flags, *options])


def train_with_torchtitan(folder: Path, job, ranks: int) -> list[list[float]]:
    """Mean loss and gradient norm of every step; rank 0 leaves the weights in `folder`."""
    metrics.build_device_memory_monitor = lambda: SimpleNamespace(
        device_name="cpu", get_peak_stats=lambda: MEMORY, reset_peak_stats=lambda: None
    )
    train.dist_utils.set_pg_timeouts = lambda **_: None
    trainer = train.Trainer(job)
    # Whole tensors on rank 0, of what was drawn and, below, of what was read back.
    drawn = {name: whole(tensor) for name, tensor in trainer.model_parts[0].state_dict().items()}
    rows: list[list[float]] = []
    trainer.metrics_processor.log = lambda step, mean, most, norm, **rest: rows.append([mean, norm])
    trainer.train()
    trainer.close()
    if torch.distributed.get_rank() == 0:
        torch.save(drawn, folder / "drawn.pt")
        config = trainer.model_args.config
        torch.save(read_weights(folder / "checkpoint" / f"step-{STEPS}", config).state_dict(), folder / "trained.pt")
    return rows


def train_without(folder: Path, job, ranks: int) -> list[list[float]]:
    """The same of a loop without torchtitan's trainer and without ranks, over the batches that `ranks` would read."""
    model = LanguageModel.from_pretrained(folder / "assets").train()
    tokenizer = build_hf_tokenizer(job)
    readers = [
        iter(build_text_dataloader(dp_world_size=ranks, dp_rank=rank, tokenizer=tokenizer, job_config=job))
        for rank in range(ranks)
    ]
    alone = ParallelDims(1, 1, 1, 1, 1, 1, 1, 1)
    optimizers = build_optimizers([model], job.optimizer, alone)
    schedule = build_lr_schedulers(optimizers, job.lr_scheduler, STEPS)
    rows = []
    for _ in range(STEPS):
        optimizers.zero_grad()
        batches = [next(reader) for reader in readers]
        ids = torch.cat([inputs["input"] for inputs, _ in batches])
        targets = torch.cat([labels for _, labels in batches])
        loss = model(ids, labels=torch.cat((ids[:, :1], targets), dim=1)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), job.training.max_norm)
        optimizers.step()
        schedule.step()
        rows.append([loss.item(), norm.item()])
    model.save_pretrained(folder / "expected")
    return rows


def refusals(folder: Path, job, ranks: int) -> list[str]:
    """What is said to jobs that ask for what is not there."""
    model = LanguageModel.from_pretrained(folder / "assets")
    alone = dict(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    jobs = [
        ({"tp": 2, "world_size": 2}, {}),
        ({"cp": 2, "world_size": 2}, {}),
        ({"dp_replicate": 2, "world_size": 2}, {}),
        ({}, {"compile": replace(job.compile, enable=True)}),
        ({}, {"activation_checkpoint": replace(job.activation_checkpoint, mode="selective")}),
    ]
    messages = []
    for degrees, changes in jobs:
        try:
            parallelize(model, ParallelDims(**{**alone, **degrees}), replace(job, **changes))
        except ConfigError as error:
            messages.append(str(error))
    return messages


if __name__ == "__main__":
    how, folder, ranks = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    job = configuration(folder, *sys.argv[4:])
    init_logger()
    rows = {"with": train_with_torchtitan, "without": train_without, "refused": refusals}[how](folder, job, ranks)
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / f"{how}.json").write_text(json.dumps(rows))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
