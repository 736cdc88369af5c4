"""`resnet-bk benchmark compare`: a fair comparison of models on one corpus."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from resnet_bk.cli.arguments import run_config
from resnet_bk.cli.benchmark_options import arms_of, command_line, source_of, training_parser

DESCRIPTION = (
    "Train models of equal size on the same batches, each with the same sweep of learning rates and the same seeds, "
    "and compare their perplexities over every token of validation and test. One ledger row a run; runs that have a "
    "row are not made again, so the same command continues."
)


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk benchmark compare` with these arguments."""
    parser, parsed_arguments = training_parser("compare", DESCRIPTION, arguments)
    parser.add_argument(
        "--rates",
        type=str,
        default=None,
        help="Learning rates of the sweep; by default half, once and twice training's.",
    )
    parser.add_argument("--seeds", type=str, default="0,1,2", help="Seeds joined by commas; the first makes the sweep.")
    parser.add_argument(
        "--context",
        type=Literal["fresh", "carried", "documents"],
        default="fresh",
        help="How training sequences begin: with an empty state, with that of the batch before, or with an empty "
        "state at every document too.",
    )
    parser.add_argument("--window", type=int, default=0, help="Tokens of evaluation windows; 0 = training length.")
    parser.add_argument(
        "--curve-points", type=int, default=8, help="Evaluations on the way, at 1, 1/2, 1/4, ... of it."
    )
    parser.add_argument("--sequence-length", type=int, default=None, help="The same as --training.sequence_length.")
    parser.add_argument("--parallel", type=int, default=1, help="Runs at once; small models do not fill a GPU.")
    parser.add_argument("--work", type=str, default="runs/compare", help="Folder for what a broken run continues from.")
    options = parser.parse(parsed_arguments)

    from resnet_bk.experiments.compare import QUESTION, Comparison, compare, default_rates, parse_numbers

    config = run_config(parser, options)
    training = config.training
    if options.sequence_length is not None:
        training = dataclasses.replace(training, sequence_length=options.sequence_length)
    source, corpus = source_of(options, config)
    rates = default_rates(training.learning_rate) if options.rates is None else parse_numbers(options.rates, "rates")
    comparison = Comparison(
        arms=arms_of(options, dataclasses.replace(config.model, vocab_size=corpus.vocab_size)),
        training=training,
        rates=rates,
        seeds=parse_numbers(options.seeds, "seeds", int),
        context=options.context,
        window=options.window,
        curve_points=options.curve_points,
        label=options.label,
    )
    compare(
        comparison,
        source,
        corpus=corpus,
        command=command_line("compare", arguments),
        question=options.question or QUESTION,
        benchmarks=Path(options.benchmarks),
        work_dir=Path(options.work),
        budget=options.budget,
        parallel=options.parallel,
        commit=options.commit,
    )
    return 0
