"""Predicted against measured peak memory of training steps, on this machine's GPU.

    python benchmarks/memory_plan.py                 # about three minutes on one H100
    python benchmarks/memory_plan.py --toy           # the script itself, tiny

Rows go to `benchmarks/results/memory-plan.jsonl`.
"""

from __future__ import annotations

import argparse
import time

import torch

from resnet_bk import LanguageModel, ModelConfig, RunConfig, TrainingConfig
from resnet_bk.evaluation.ledger import append_row
from resnet_bk.training.config import MemoryConfig
from resnet_bk.training.memory import apply_memory
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.plan import plan_memory

CASES = [
    ("base", "resolvent", 1, 131072, MemoryConfig()),
    ("base", "resolvent", 1, 131072, MemoryConfig(recompute="segment")),
    ("base", "resolvent", 1, 131072, MemoryConfig(recompute="block", offload_activations=True)),
    ("base", "resolvent", 16, 2048, MemoryConfig(recompute="none")),
    ("base", "resolvent", 16, 2048, MemoryConfig(recompute="block", optimizer="offload")),
    ("base", "attention", 16, 2048, MemoryConfig(recompute="none")),
    ("base", "attention", 64, 2048, MemoryConfig(recompute="block", segment_tokens=65536)),
    ("xl", "resolvent", 16, 2048, MemoryConfig(recompute="block", segment_tokens=32768)),
]
TOY = [("tiny", "resolvent", 1, 512, MemoryConfig(segment_tokens=128)), ("tiny", "attention", 2, 64, MemoryConfig())]


def measured_peak(config: RunConfig) -> int:
    """Bytes that torch's allocator held at the peak of the second step."""
    device = torch.device("cuda")
    with device:
        model = LanguageModel(config.model)
    apply_memory(model, config.memory)
    optimizer = build_optimizer(model, config.training, device, config.memory)
    shape = config.training.batch_size, config.training.sequence_length
    ids = torch.randint(config.model.vocab_size, shape, device=device)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    """Predict and, where there is a GPU, measure every case."""
    parser = argparse.ArgumentParser(description="Predicted against measured peak memory of training steps.")
    parser.add_argument("--toy", action="store_true", help="tiny steps, no rows")
    parser.add_argument("--no-row", action="store_true", help="print only, append nothing to the ledger")
    arguments = parser.parse_args()
    for preset, mixer, batch, length, memory in TOY if arguments.toy else CASES:
        start = time.perf_counter()
        training = TrainingConfig(batch_size=batch, sequence_length=length)
        config = RunConfig(model=ModelConfig.preset(preset, mixer=mixer), training=training, memory=memory)
        predicted = plan_memory(config)
        metrics = {
            "preset": preset,
            "mixer": mixer,
            "batch": batch,
            "length_tokens": length,
            "recompute": memory.recompute,
            "segment_tokens": memory.segment_tokens,
            "offload_activations": str(memory.offload_activations),
            "optimizer": memory.optimizer,
            "predicted_gigabytes": predicted.peak / 1e9,
            "phase": predicted.phase,
        }
        if torch.cuda.is_available():
            measured = measured_peak(config)
            metrics |= {"measured_gigabytes": measured / 1e9, "predicted_over_measured": predicted.peak / measured}
            torch.cuda.empty_cache()
        print(metrics, flush=True)
        if not (arguments.toy or arguments.no_row) and torch.cuda.is_available():
            append_row(
                "memory-plan",
                command="python benchmarks/memory_plan.py",
                config=config.model,
                seeds=[],
                metrics=metrics,
                wall_seconds=time.perf_counter() - start,
                tokens=batch * length,
                device=torch.device("cuda"),
            )


if __name__ == "__main__":
    main()
