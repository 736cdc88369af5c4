"""`resnet-bk benchmark scaling`: loss against size, over a grid of widths and depths."""

from __future__ import annotations

from collections.abc import Sequence

from resnet_bk.cli.benchmark_options import comparison_options, training_parser

DESCRIPTION = (
    "Compare models at every width and depth of a grid as `compare` does, and put power laws through their validation "
    "losses, against parameters and against operations, with confidence intervals from resampled runs."
)


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk benchmark scaling` with these arguments."""
    parser, parsed_arguments = training_parser("scaling", DESCRIPTION, arguments)
    parser.add_argument("--widths", type=str, default="64,128,256", help="Values of model.d_model, joined by commas.")
    parser.add_argument("--depths", type=str, default="2,4", help="Values of model.num_layers, joined by commas.")
    parser.add_argument(
        "--tokens-per-parameter",
        type=float,
        default=20.0,
        help="Sets the steps of each size, embeddings not counted; 0 trains all for training.steps.",
    )
    options = parser.parse(parsed_arguments)

    from resnet_bk.experiments.compare import parse_numbers
    from resnet_bk.experiments.scaling import QUESTION, comparison_at, grid, scale

    widths, depths = parse_numbers(options.widths, "widths", int), parse_numbers(options.depths, "depths", int)
    given = comparison_options("scaling", parser, options, arguments, QUESTION)
    comparison = comparison_at(given.changes, given.training, options.tokens_per_parameter, **given.protocol)
    scale(comparison, grid(given.model, widths, depths), given.source, **given.running)
    return 0
