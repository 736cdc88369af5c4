"""`resnet-bk benchmark synthetic`: models of equal size on tasks that each ask for one ability."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resnet_bk.cli.arguments import model_config
from resnet_bk.cli.benchmark_options import add_ledger_options, arms_of, command_line, shape_parser
from resnet_bk.experiments.synthetic import TaskBudget

DESCRIPTION = (
    "Train models of equal size on synthetic tasks under one budget, each with the same sweep of learning rates and "
    "the same seeds. One ledger row a run; runs that have a row are not made again."
)


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk benchmark synthetic` with these arguments."""
    from resnet_bk.experiments.tasks import TASKS, make_task

    parser = shape_parser("synthetic", DESCRIPTION, arguments)
    parser.add_argument(
        "--tasks",
        type=str,
        default=",".join(TASKS),
        help="Names joined by commas, each with the fields that differ from the usual: recall:pairs=256:length=1024.",
    )
    parser.add_class_arguments(TaskBudget, "task")
    parser.add_argument("--rates", type=str, default="5e-4,2e-3,8e-3", help="Learning rates of the sweep.")
    parser.add_argument("--seeds", type=str, default="0,1,2", help="Seeds joined by commas; the first makes the sweep.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N.")
    parser.add_argument("--parallel", type=int, default=1, help="Runs at once; small models do not fill a GPU.")
    add_ledger_options(parser, label=False)
    options = parser.parse(arguments)

    from resnet_bk.experiments.compare import parse_numbers
    from resnet_bk.experiments.suite import QUESTION, synthetic_suite
    from resnet_bk.training.device import resolve_device

    synthetic_suite(
        arms_of(options, model_config(parser, options)),
        [make_task(text) for text in options.tasks.split(",") if text.strip()],
        budget=TaskBudget(**vars(options.task)),
        rates=parse_numbers(options.rates, "rates"),
        seeds=parse_numbers(options.seeds, "seeds", int),
        device=resolve_device(options.device),
        parallel=options.parallel,
        command=command_line("synthetic", arguments),
        question=options.question or QUESTION,
        seconds=float("inf") if options.budget is None else options.budget,
        benchmarks=Path(options.benchmarks),
        commit=options.commit,
    )
    return 0
