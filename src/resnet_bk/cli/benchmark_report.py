"""`resnet-bk benchmark report`: every table and figure, made anew from the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resnet_bk.cli.arguments import Parser
from resnet_bk.evaluation.ledger import BENCHMARKS

DESCRIPTION = "Write every table and figure anew from the rows of the ledger: REPORT.md, LEDGER.md and figures/."


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk benchmark report` with these arguments."""
    parser = Parser("benchmark report", description=DESCRIPTION)
    parser.add_argument("--benchmarks", type=str, default=str(BENCHMARKS), help="Folder of the ledger.")
    options = parser.parse(arguments)

    from resnet_bk.experiments.report import write_report

    report, ledger, *drawn = write_report(Path(options.benchmarks))
    print(f"{report}\n{ledger}\n{len(drawn)} files in {report.parent / 'figures'}")
    return 0
