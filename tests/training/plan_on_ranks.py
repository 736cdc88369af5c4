"""Bytes that each rank holds and its peak in one step: `torchrun plan_on_ranks.py FILE CASE...`, a JSON line a case."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from resnet_bk import LanguageModel, ModelConfig, RunConfig, TrainingConfig
from resnet_bk.ops.semiseparable import segments
from resnet_bk.training.config import DistributedConfig, MemoryConfig
from resnet_bk.training.distributed import Engine, share_out
from resnet_bk.training.memory import apply_memory
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.ranks import join_ranks

FSDP = DistributedConfig(strategy="fsdp")
NONE = MemoryConfig(recompute="none")
# Wide enough for a block to weigh as much as what is computed with it.
MODEL = ModelConfig.preset("tiny", num_layers=6, d_model=256, feed_forward_dim=1024, vocab_size=1024)
TRAINING = TrainingConfig(batch_size=2, sequence_length=128, device="cpu")
CASES: dict[str, RunConfig] = {
    "ddp": RunConfig(MODEL, training=TRAINING, memory=NONE),
    "zero3": RunConfig(MODEL, training=TRAINING, distributed=FSDP, memory=NONE),
    "zero2": RunConfig(
        MODEL, training=TRAINING, distributed=dataclasses.replace(FSDP, reshard_after_forward=False), memory=NONE
    ),
    "block": RunConfig(MODEL, training=TRAINING, distributed=FSDP, memory=MemoryConfig(recompute="block")),
    "accumulation": RunConfig(
        MODEL, training=dataclasses.replace(TRAINING, gradient_accumulation_steps=3), distributed=FSDP, memory=NONE
    ),
    "bfloat16": RunConfig(
        MODEL, training=dataclasses.replace(TRAINING, precision="bfloat16"),
        distributed=dataclasses.replace(FSDP, gather_dtype="bfloat16"), memory=NONE,
    ),
    "offload": RunConfig(
        MODEL, training=TRAINING, distributed=dataclasses.replace(FSDP, cpu_offload=True), memory=NONE
    ),
    "ddp-block": RunConfig(MODEL, training=TRAINING, memory=MemoryConfig(recompute="block")),
}  # fmt: skip


def local_bytes(tensors: Any) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def peak_allocated(profiler: profile) -> int:
    """Most bytes that were allocated at once, by address.

    The profiler misses what Gloo's threads free, when theirs is the last reference; what is allocated anew at such an
    address tells of it.
    """
    events = [
        event.extra_fields
        for event in _flat(profiler.profiler.kineto_results.experimental_event_tree())
        if event.tag == _EventType.Allocation
    ]
    living: dict[int, int] = {}
    peak = 0
    for event in events:
        start, size = event.ptr, abs(event.alloc_size)
        if event.alloc_size < 0:
            living.pop(start, None)
            continue
        for other in [other for other, length in living.items() if other < start + size and start < other + length]:
            del living[other]
        living[start] = size
        peak = max(peak, sum(living.values()))
    return peak


def _flat(events: Any) -> list[Any]:
    """A tree of events, by time."""
    stack, found = list(events), []
    while stack:
        event = stack.pop()
        found.append(event)
        stack += event.children
    return sorted(found, key=lambda event: event.start_time_ns)


def measure(config: RunConfig) -> dict[str, int]:
    """Bytes of this rank's parameters, gradients and moments, and of everything at the peak of a later step."""
    ranks = join_ranks("cpu")
    with torch.device("meta"):
        model = LanguageModel(config.model)
    engine = Engine(model, config.distributed, ranks, seed=0)
    apply_memory(model, config.memory)
    optimizer = build_optimizer(model, config.training, torch.device("cpu"), config.memory)
    training = config.training
    shape = training.batch_size, training.sequence_length
    batches = [
        {"input_ids": ids, "labels": ids}
        for ids in torch.randint(config.model.vocab_size, (training.gradient_accumulation_steps, *shape))
    ]
    narrow = training.precision == "bfloat16"

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        parts = share_out(batches, ranks)
        for number, part in enumerate(parts, start=1):
            with engine.accumulating(last=number == len(parts)):
                with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                    loss, _ = engine.loss(part, 1.0)
                engine.backward(loss)
        engine.gradient_norm()
        optimizer.step()

    segments._local.__dict__.clear()
    step()
    found = {
        "weights": local_bytes(model.parameters()),
        "gradients": local_bytes(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": local_bytes(t for state in optimizer.state.values() for t in state.values() if t.dim()),
    }
    optimizer.zero_grad(set_to_none=True)
    held = found["weights"] + found["optimizer"]
    held += sum(buffer.nbytes for buffer in getattr(segments._local, "buffers", {}).values())
    if config.distributed.strategy == "ddp":
        held += found["gradients"]  # buckets
    peaks = []
    for _ in range(3):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        peaks.append(peak_allocated(profiler))
        optimizer.zero_grad(set_to_none=True)
    # What is freed late only adds.
    return {**found, "peak": held + min(peaks)}


if __name__ == "__main__":
    for name in sys.argv[2:]:
        measured = measure(CASES[name])
        if join_ranks("cpu").is_main:
            with open(sys.argv[1], "a") as file:
                file.write(json.dumps({"case": name, **measured}) + "\n")
