"""`resnet-bk benchmark compare`: a fair comparison of models on one corpus."""

from __future__ import annotations

from collections.abc import Sequence

from resnet_bk.cli.benchmark_options import comparison_options, training_parser

DESCRIPTION = (
    "Train models of equal size on the same batches, each with the same sweep of learning rates and the same seeds, "
    "and compare their perplexities over every token of validation and test. One ledger row a run; runs that have a "
    "row are not made again, so the same command continues."
)


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk benchmark compare` with these arguments."""
    parser, parsed_arguments = training_parser("compare", DESCRIPTION, arguments)
    parser.add_argument(
        "--dynamic-rates",
        type=str,
        default="",
        help="Also read the test split with updates from what was read: rates to choose from on validation.",
    )
    options = parser.parse(parsed_arguments)

    from resnet_bk.experiments.arms import make_arms
    from resnet_bk.experiments.compare import QUESTION, Comparison, compare, parse_numbers

    given = comparison_options("compare", parser, options, arguments, QUESTION)
    arms = make_arms(given.model, given.changes)
    rates = parse_numbers(options.dynamic_rates, "dynamic-rates")
    comparison = Comparison(arms, given.training, dynamic_rates=rates, **given.protocol)
    compare(comparison, given.source, **given.running)
    return 0
