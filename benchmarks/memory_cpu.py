"""Peak resident memory of one training step on a CPU: forward, backward and AdamW at a given length, batch 1.

    python benchmarks/memory_cpu.py                      # the small preset at 131,072 tokens

Appends one row to `benchmarks/results/memory-cpu.jsonl`.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk.evaluation.ledger import append_row


def main() -> None:
    """Run one step and append its row."""
    parser = argparse.ArgumentParser(description="Peak resident memory of one training step on a CPU.")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--no-row", action="store_true", help="print only, append nothing to the ledger")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    config = ModelConfig.preset(arguments.preset)
    model = LanguageModel(config)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-3)
    input_ids = torch.randint(0, config.vocab_size, (1, arguments.tokens))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.perf_counter()
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    optimizer.step()
    metrics = {
        "preset": arguments.preset,
        "sequence_length_tokens": arguments.tokens,
        "step_seconds": time.perf_counter() - began,
        "resident_before_mib": before,
        "peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss_nats": loss.item(),
        "gradients_finite": str(all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)),
    }
    print(metrics)
    if not arguments.no_row:
        append_row(
            "memory-cpu",
            command=f"python benchmarks/memory_cpu.py --preset {arguments.preset} --tokens {arguments.tokens}",
            config=config,
            seeds=[0],
            metrics=metrics,
            wall_seconds=time.perf_counter() - start,
            model=model,
            tokens=arguments.tokens,
        )


if __name__ == "__main__":
    main()
