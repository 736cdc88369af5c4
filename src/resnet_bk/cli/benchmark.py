"""`resnet-bk benchmark`: comparisons whose every run is a row of the ledger."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from resnet_bk.errors import ConfigError

BENCHMARKS = {
    "compare": "train models of equal size on the same tokens and compare their perplexities",
    "synthetic": "train models of equal size on tasks that each ask for one ability",
    "long-context": "train on short sequences, read long texts, compare the loss by position",
    "scaling": "compare over a grid of widths and depths, with power laws through the losses",
    "flops": "count the operations of models of equal size, by part",
    "speed": "time models of equal size, forward and backward",
    "report": "write every table and figure anew from the ledger",
}
"""What can be measured -> what it does; each is the module `resnet_bk.cli.benchmark_<name>`."""


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk benchmark` with these arguments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name not in BENCHMARKS:
        from resnet_bk.models.config import unknown_key_message

        raise ConfigError(unknown_key_message(name, list(BENCHMARKS), what="benchmark"))
    return importlib.import_module(f"resnet_bk.cli.benchmark_{name.replace('-', '_')}").run(rest)


def _help() -> str:
    """The text of `resnet-bk benchmark --help`."""
    lines = ["usage: resnet-bk benchmark NAME [OPTIONS]", "", "Measure models; results go to benchmarks/results.", ""]
    lines += [f"  {name:<14}{summary}" for name, summary in BENCHMARKS.items()]
    return "\n".join([*lines, "", "`resnet-bk benchmark NAME --help` lists the options of one."])
