"""`resnet-bk benchmark speed`: how fast whole models run on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from resnet_bk.cli.arguments import model_config
from resnet_bk.cli.benchmark_options import add_ledger_options, arms_of, command_line, shape_parser

DESCRIPTION = (
    "Time whole models of equal size, forward alone and with the backward pass, in turn and on changing inputs. Keep "
    "the machine quiet meanwhile. Peak bytes are known on a GPU only."
)


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk benchmark speed` with these arguments."""
    parser = shape_parser("speed", DESCRIPTION, arguments)
    parser.add_argument("--lengths", type=str, default="512,2048,8192", help="Sequence lengths joined by commas.")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="Tokens of a batch, as far as a length allows.")
    parser.add_argument("--repeats", type=int, default=10, help="Timed runs of each model; their median counts.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N.")
    parser.add_argument(
        "--precision", type=Literal["auto", "float32", "bfloat16", "float16"], default="auto", help="Compute dtype."
    )
    add_ledger_options(parser)
    options = parser.parse(arguments)

    from resnet_bk.experiments.compare import parse_numbers
    from resnet_bk.experiments.speed import QUESTION, measure_speed, speed_cases

    measure_speed(
        arms_of(options, model_config(parser, options)),
        speed_cases(parse_numbers(options.lengths, "lengths", int), options.batch_tokens),
        command=command_line("speed", arguments),
        device=options.device,
        precision=options.precision,
        repeats=options.repeats,
        question=options.question or QUESTION,
        benchmarks=Path(options.benchmarks),
        label=options.label,
        budget=options.budget,
        commit=options.commit,
    )
    return 0
