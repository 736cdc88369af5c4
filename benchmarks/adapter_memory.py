"""Measured and predicted peak memory of training adapters on four-bit weights, in a process whose memory is capped.

    python benchmarks/adapter_memory.py                                  # 10b in 16 GB on a GPU: two to four minutes
    python benchmarks/adapter_memory.py --preset large --device cpu --tokens 512
    python benchmarks/adapter_memory.py --toy                            # the script itself, tiny, on a CPU, no row

The weights are random: only their bytes count. They are drawn and packed one matrix at a time, so that no two exist in
float32. On a GPU cap and peak are those of PyTorch's allocator (the CUDA context lies outside), and the cap holds for
the building too; on a CPU the cap is one of the address space (RLIMIT_AS) and the peak that of resident memory. A run
that the cap ends is a row too.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from typing import Any

import torch
from torch import nn

from resnet_bk import LanguageModel, ModelConfig, RunConfig, TrainingConfig
from resnet_bk.evaluation.ledger import append_row
from resnet_bk.layers.lora import AdaptedLinear, adapt
from resnet_bk.models.config import AdapterConfig
from resnet_bk.models.resnet_bk import TokenMixer
from resnet_bk.training.config import MemoryConfig
from resnet_bk.training.memory import apply_memory
from resnet_bk.training.optimizer import build_optimizer
from resnet_bk.training.plan import plan_memory

STEPS = 3


def adapted_model(config: ModelConfig, adapters: AdapterConfig, device: torch.device) -> LanguageModel:
    """A model of random packed matrices, of which no two exist unpacked at once."""
    with torch.device("meta"):
        model = LanguageModel(config)
    adapt(model, rank=adapters.rank, alpha=adapters.alpha, group=adapters.group)
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.to_empty(device=device)
            module.reset_adapter()
            module.pack(torch.randn(module.out_features, module.in_features, device=device) / module.in_features**0.5)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            values = 0.02 * torch.randn(parameter.shape, device=device)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
        if isinstance(module, TokenMixer | nn.RMSNorm):
            module.reset_parameters()
    return model


class Peak:
    """Largest number of bytes since the start or the last `restart`, and the cap on them."""

    def __init__(self, device: torch.device, cap: int) -> None:
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
        else:
            resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def restart(self) -> None:
        """Forget the peak so far; of a CPU the operating system does not."""
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> int:
        """Allocated on a GPU; resident on a CPU, beyond what was resident at the start."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._before


def measure(config: RunConfig, device: torch.device, peak: Peak) -> dict[str, Any]:
    """What the model takes and what its steps take, in gigabytes."""
    model = adapted_model(config.model, config.adapters, device)
    held = [*model.parameters(), *model.buffers()]
    packed = [module.codes for module in model.modules() if isinstance(module, AdaptedLinear)]
    metrics: dict[str, Any] = {
        "packed_numbers": sum(2 * codes.numel() for codes in packed),
        "trained_numbers": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "model_gigabytes": sum(tensor.nbytes for tensor in held) / 1e9,
        "peak_gigabytes_building": peak.bytes() / 1e9,
    }
    apply_memory(model, config.memory)
    optimizer = build_optimizer(model, config.training, device, config.memory)
    ids = torch.randint(config.model.vocab_size, (1, config.training.sequence_length), device=device)
    losses, seconds, peaks = [], [], []
    for _ in range(STEPS):
        peak.restart()
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        peaks.append(peak.bytes() / 1e9)
    metrics |= {
        # The first step compiles and checks kernels, and has no moments yet; the plan is that of the others.
        "peak_gigabytes_first_step": peaks[0],
        "peak_gigabytes": max(peaks[1:]),
        "loss_nats_first": losses[0],
        "loss_nats_last": losses[-1],
        "seconds_last_step": seconds[-1],
    }
    if peak.on_gpu:
        metrics["reserved_gigabytes"] = torch.cuda.max_memory_reserved() / 1e9
    return metrics


def main() -> None:
    """Predict, build, run the steps, print and append the row."""
    parser = argparse.ArgumentParser(description="Peak memory of training adapters on four-bit weights.")
    parser.add_argument("--preset", default="10b")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--cap-gigabytes", type=float, default=16.0, help="more than this fails")
    parser.add_argument("--toy", action="store_true", help="tiny on a CPU, no row")
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.preset, arguments.device, arguments.tokens = "tiny", "cpu", 128
    start, device = time.perf_counter(), torch.device(arguments.device)
    config = RunConfig(
        model=ModelConfig.preset(arguments.preset),
        training=TrainingConfig(batch_size=1, sequence_length=arguments.tokens),
        memory=MemoryConfig(recompute="block"),
        adapters=AdapterConfig(base="random", rank=arguments.rank),
    )
    plan = plan_memory(config, device=arguments.device)
    metrics: dict[str, Any] = {
        "preset": arguments.preset,
        "device": device.type,
        "tokens_a_step": arguments.tokens,
        "rank": arguments.rank,
        "cap_gigabytes": arguments.cap_gigabytes,
        "predicted_gigabytes": plan.peak / 1e9,
    }
    torch.manual_seed(0)
    peak = Peak(device, int(arguments.cap_gigabytes * 1e9))
    try:
        metrics |= measure(config, device, peak)
        # Of a tiny model on a CPU the peak may lie before its steps, and then nothing was measured.
        measured = metrics["peak_gigabytes"]
        metrics["predicted_over_measured"] = plan.peak / 1e9 / measured if measured else None
    except torch.OutOfMemoryError as error:
        metrics["outcome"] = f"out of memory: {str(error).splitlines()[0]}"
    print(metrics)
    if not arguments.toy:
        append_row(
            "adapter-memory",
            command=f"python {' '.join(sys.argv)}",
            config=config,
            seeds=[0],
            metrics=metrics,
            wall_seconds=time.perf_counter() - start,
            tokens=STEPS * arguments.tokens,
            device=device,
        )


if __name__ == "__main__":
    main()
