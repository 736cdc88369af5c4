"""Peak memory of a training step of adapters on four-bit weights, in a process whose memory may be capped.

    python benchmarks/adapter_memory.py                                  # 10b on a GPU, 2,048 tokens
    python benchmarks/adapter_memory.py --preset large --device cpu --cap-gigabytes 8 --tokens 512
    python benchmarks/adapter_memory.py --toy                            # the script itself, tiny, on a CPU

The weights are random: only their bytes count. One matrix at a time exists in float32. On a CPU the cap is one of the
address space (RLIMIT_AS) and the peak is that of resident memory; on a GPU both are those of PyTorch's allocator.
Appends one row to `benchmarks/results/adapter-memory.jsonl`.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch
from torch import nn

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk.evaluation.ledger import append_row
from resnet_bk.layers.lora import AdaptedLinear


def adapted_model(config: ModelConfig, device: torch.device, rank: int) -> LanguageModel:
    """A model of random packed matrices, of which no two exist unpacked at once."""
    with torch.device("meta"):
        model = LanguageModel(config)
    model.requires_grad_(False)
    for parent in list(model.blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                weight = torch.randn(child.weight.shape, device=device) * (3 * child.in_features) ** -0.5
                setattr(parent, name, AdaptedLinear(weight, rank=rank))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                values = 0.02 * torch.randn(parameter.shape, device=device)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    for module in model.modules():
        if not isinstance(module, LanguageModel) and not isinstance(module, nn.Linear | nn.Embedding | nn.Dropout):
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    return model


def main() -> None:
    """Build, run two steps, print and append the peak."""
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
    start, device, cap = time.perf_counter(), torch.device(arguments.device), int(arguments.cap_gigabytes * 1e9)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / torch.cuda.get_device_properties(0).total_memory))
    else:
        resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
    torch.manual_seed(0)
    config = ModelConfig.preset(arguments.preset)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = adapted_model(config, device, arguments.rank)
    model.recompute = "block"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")
    ids = torch.randint(config.vocab_size, (1, arguments.tokens), device=device)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    held = [*model.parameters(), *model.buffers()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    metrics = {
        "preset": arguments.preset,
        "device": device.type,
        "tokens_a_step": arguments.tokens,
        "rank": arguments.rank,
        "cap_gigabytes": arguments.cap_gigabytes,
        "packed_numbers": sum(2 * m.codes.numel() for m in model.modules() if isinstance(m, AdaptedLinear)),
        "trainable": sum(parameter.numel() for parameter in parameters),
        "model_gigabytes": sum(tensor.nbytes for tensor in held) / 1e9,
        "peak_gigabytes": (torch.cuda.max_memory_allocated() if device.type == "cuda" else peak - before) / 1e9,
        "loss_nats": loss.item(),
    }
    print(metrics)
    if not arguments.toy:
        append_row(
            "adapter-memory",
            command=f"python {' '.join(sys.argv)}",
            config=config,
            seeds=[0],
            metrics=metrics,
            wall_seconds=time.perf_counter() - start,
            tokens=2 * arguments.tokens,
        )


if __name__ == "__main__":
    main()
