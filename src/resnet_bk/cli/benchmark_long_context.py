"""`resnet-bk benchmark long-context`: trained on short sequences, read on long texts."""

from __future__ import annotations

from collections.abc import Sequence

from resnet_bk.cli.benchmark_options import comparison_options, training_parser
from resnet_bk.errors import ConfigError

DESCRIPTION = (
    "Compare models as `compare` does, and after training measure the loss by position on texts of many times the "
    "training length, read piece by piece with the state carried. One ledger row a run."
)


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk benchmark long-context` with these arguments."""
    parser, parsed_arguments = training_parser("long-context", DESCRIPTION, arguments)
    parser.add_argument("--times", type=int, default=64, help="Length of the texts over the training length.")
    parser.add_argument("--texts", type=int, default=16, help="Texts to read at most.")
    options = parser.parse(parsed_arguments)
    for name in ("times", "texts"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; expected a whole number >= 1.")

    from resnet_bk.experiments.arms import make_arms
    from resnet_bk.experiments.compare import Comparison, compare
    from resnet_bk.experiments.long_context import QUESTION, position_curves, position_table

    given = comparison_options("long-context", parser, options, arguments, QUESTION)
    comparison = Comparison(
        make_arms(given.model, given.changes),
        given.training,
        **given.protocol,
        text_length=options.times * given.training.sequence_length,
        texts=options.texts,
    )
    rows = compare(comparison, given.source, **given.running)
    print(position_table(position_curves(rows)))
    return 0
