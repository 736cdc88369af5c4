"""Training steps on several ranks against one: sequences dealt out (data parallel) and split (context parallel).

    torchrun --nproc-per-node 2 benchmarks/parallel_scaling.py --preset base --tokens 32768
    torchrun --nproc-per-node 2 benchmarks/parallel_scaling.py --toy --no-row      # a rehearsal on the CPU

Rank 0 first runs the steps alone. Efficiencies are shares of perfect scaling: `data` has one sequence a rank, `context`
splits one sequence over all ranks, `context_longer` splits one that is as many times longer as there are ranks. The
errors of loss and gradient norm of `context` against the step of rank 0 alone are in the same row of
`benchmarks/results/parallel-scaling.jsonl`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk.evaluation.ledger import append_row
from resnet_bk.training.batches import count_targets
from resnet_bk.training.config import DistributedConfig
from resnet_bk.training.distributed import Engine, share_out
from resnet_bk.training.ranks import Ranks, join_ranks

TOY = dict(d_model=32, num_layers=2, feed_forward_dim=48, head_dim=16, state_size=16, vocab_size=64)


def build(config: ModelConfig, ranks: Ranks) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(config).to(ranks.device)


def measure(step: Callable[[], tuple[float, float]], ranks: Ranks, steps: int) -> dict[str, float]:
    """Median seconds of a step, its loss and gradient norm, and the peak bytes of this rank's GPU."""
    loss, norm = step()  # compiles kernels, and is the one to compare: parameters are still those of the seed
    on_gpu = ranks.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()  # reads its loss, so it has ended
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else float("nan")
    return {"seconds": statistics.median(seconds), "loss": loss, "norm": norm, "peak_mib": peak}


def training_step(engine: Engine, batch: dict[str, Tensor]) -> Callable[[], tuple[float, float]]:
    """A function that takes one step on `batch` and returns its loss and gradient norm."""
    device = engine.ranks.device
    optimizer = torch.optim.AdamW(engine.model.parameter_groups(0.1), lr=1e-4, fused=True)
    (part,) = share_out([batch], engine.ranks, engine.context)
    weight = count_targets(part) / count_targets(batch)
    part = {name: tensor.to(device) for name, tensor in part.items()}

    def step() -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = engine.loss(part, weight)
        engine.backward(loss)
        total = engine.ranks.sum(loss.detach().double())
        norm = engine.gradient_norm()
        optimizer.step()
        return total.item(), norm.item()

    return step


def main() -> None:
    """Measure all arrangements and append their row."""
    parser = argparse.ArgumentParser(description="Scaling of training steps over ranks.")
    parser.add_argument("--preset", default="base")
    parser.add_argument("--tokens", type=int, default=32768, help="length of a sequence on one rank")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--toy", action="store_true", help="a tiny model, 512 tokens, on the CPU")
    parser.add_argument("--no-row", action="store_true", help="print only, append nothing to the ledger")
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.tokens, arguments.device = 512, "cpu"
    began = time.perf_counter()
    ranks = join_ranks(arguments.device)
    config = ModelConfig.preset("tiny", **TOY) if arguments.toy else ModelConfig.preset(arguments.preset)
    size, tokens = ranks.size, arguments.tokens
    ids = torch.randint(0, config.vocab_size, (size, size * tokens), generator=torch.Generator().manual_seed(1))

    def batch(rows: int, length: int) -> dict[str, Tensor]:
        part = ids[:rows, :length].contiguous()
        return {"input_ids": part, "labels": part}

    found = {}
    if ranks.is_main:
        model = build(config, ranks)
        # An engine of one process, so that nothing is sent.
        alone = Ranks(ranks.device)
        alone.rank, alone.size = 0, 1
        engine = Engine(model, DistributedConfig(), alone, seed=0)
        found["alone"] = measure(training_step(engine, batch(1, tokens)), ranks, arguments.steps)
        del engine, model
    ranks.any(False)  # the others wait here
    for name, context, work in (
        ("data", 1, batch(size, tokens)),
        ("context", size, batch(1, tokens)),
        ("context_longer", size, batch(1, size * tokens)),
    ):
        engine = Engine(build(config, ranks), DistributedConfig(context_parallel=context), ranks, seed=0)
        found[name] = measure(training_step(engine, work), ranks, arguments.steps)
        del engine
    if ranks.is_main:
        report(found, ranks, config, arguments, time.perf_counter() - began)


def report(found: dict[str, dict[str, float]], ranks: Ranks, config: ModelConfig, arguments, wall: float) -> None:
    """Print the metrics and append them to the ledger."""
    one, size = found["alone"], ranks.size
    metrics: dict[str, str | float] = {"ranks": size, "backend": str(dist.get_backend() if size > 1 else "none")}
    metrics |= {"preset": "toy" if arguments.toy else arguments.preset, "sequence_length_tokens": arguments.tokens}
    for name, result in found.items():
        metrics[f"{name}_step_seconds"] = result["seconds"]
        if ranks.device.type == "cuda":
            metrics[f"{name}_peak_mib"] = result["peak_mib"]
    metrics["data_efficiency"] = one["seconds"] / found["data"]["seconds"]
    metrics["context_efficiency"] = one["seconds"] / (size * found["context"]["seconds"])
    metrics["context_longer_efficiency"] = one["seconds"] / found["context_longer"]["seconds"]
    for key in ("loss", "norm"):
        metrics[f"context_{key}_relative_error"] = abs(found["context"][key] / one[key] - 1)
    print(metrics)
    if not arguments.no_row:
        options = "--toy" if arguments.toy else f"--preset {arguments.preset} --tokens {arguments.tokens}"
        append_row(
            "parallel-scaling",
            command=f"torchrun --nproc-per-node {size} benchmarks/parallel_scaling.py {options}",
            config=config,
            seeds=[0],
            metrics=metrics,
            wall_seconds=wall,
            tokens=arguments.tokens,
            device=ranks.device,
        )


if __name__ == "__main__":
    main()
