"""`resnet-bk plan`: peak memory of a training step before it runs, and which switch makes it fit."""

from __future__ import annotations

from collections.abc import Sequence

from resnet_bk.cli.arguments import run_config, run_parser
from resnet_bk.errors import ConfigError

DESCRIPTION = "Predict the peak memory of a training step, by part; with --gpu-memory, say which switch makes it fit."


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk plan` with these arguments: 1 if no switch makes the run fit."""
    parser = run_parser("plan", DESCRIPTION, arguments)
    parser.add_argument("--gpu-memory", type=str, default=None, help="What there is, such as 16GB or 79GiB.")
    parser.add_argument("--cpu", action="store_true", help="Plan for a CPU instead of a GPU.")
    parser.add_argument(
        "--no-kernels", action="store_true", help="Plan for a GPU older than compute capability 8.0 (T4, V100)."
    )
    parser.add_argument("--ranks", type=int, default=1, help="Processes that share the run; the plan is that of each.")
    parsed = parser.parse(arguments)
    ranks = parsed.pop("ranks")
    if ranks < 1:
        raise ConfigError(f"--ranks is {ranks}; expected a whole number >= 1.")
    limit, on_cpu, kernels = parsed.pop("gpu_memory"), parsed.pop("cpu"), not parsed.pop("no_kernels")
    config = run_config(parser, parsed)

    from resnet_bk.training.plan import parse_bytes, plan_memory, suggestions

    available = None if limit is None else parse_bytes(limit)
    device = "cpu" if on_cpu else "cuda"
    plan = plan_memory(config, device=device, kernels=kernels, ranks=ranks)
    print(plan.table())
    if available is None:
        return 0
    if plan.peak <= available:
        print(f"fits into {limit}: {(available - plan.peak) / 1e9:,.3f} GB to spare")
        return 0
    print(f"does not fit into {limit}: {(plan.peak - available) / 1e9:,.3f} GB too much; each line adds a switch:")
    for change, changed in suggestions(config, device=device, kernels=kernels, ranks=ranks):
        print(f"  {change:<68}{changed.peak / 1e9:>10,.3f} GB")
        if changed.peak <= available:
            print(f"fits into {limit} with these")
            return 0
    print("none of them is enough: the model is too large for this memory, or needs more devices")
    return 1
