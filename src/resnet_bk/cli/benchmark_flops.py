"""`resnet-bk benchmark flops`: operations of models of equal size, by part."""

from __future__ import annotations

from collections.abc import Sequence

from resnet_bk.cli.arguments import model_config
from resnet_bk.cli.benchmark_options import arms_of, shape_parser

DESCRIPTION = (
    "Count the operations of a training step, forward and backward, from the shapes alone: nothing is run, nothing is "
    "written to the ledger. A multiplication and an addition are two."
)


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk benchmark flops` with these arguments."""
    parser = shape_parser("flops", DESCRIPTION, arguments)
    parser.add_argument("--length", type=int, default=1024, help="Tokens of a sequence; attention depends on it.")
    parser.add_argument("--by-part", action="store_true", help="Also the parts of each model.")
    options = parser.parse(arguments)

    from resnet_bk.evaluation.flops import flops_table, model_flops

    arms = {arm.name: arm.model for arm in arms_of(options, model_config(parser, options))}
    print(flops_table(arms, time=options.length))
    if options.by_part:
        for name, config in arms.items():
            print(f"\n{name}\n\n{model_flops(config, time=options.length).table()}")
    return 0
