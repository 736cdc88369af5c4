"""How far below its bound each quantity of the theory stays: quantiles of value / bound over random media.

    python benchmarks/theory_slack.py                    # 2,000 media a bound, under a minute on one thread

Appends one row a bound to `benchmarks/results/theory-slack.jsonl`, and one for each potential's level spacings to
`benchmarks/results/theory-spacings.jsonl`. A ratio of 1 is a bound attained; above 1 + 1e-12 it would be violated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from resnet_bk.evaluation.ledger import BENCHMARKS, append_row
from resnet_bk.theory import bounds, bounds_decay, bounds_flux, bounds_schatten
from resnet_bk.theory.bounds import Bound
from resnet_bk.theory.jacobi import half_line_green
from resnet_bk.theory.spacings import compare_spacings

COMMAND = "python benchmarks/theory_slack.py"
QUANTILES = (0.01, 0.5, 0.99)
SPACINGS = (
    {"first": 2, "smoothing": 0.0},
    {"first": 10**9, "smoothing": 0.0},
    {"first": 2, "smoothing": 2.0},
)

Line = tuple[Tensor, Tensor, complex]


def media(count: int, seed: int) -> Iterator[Line]:
    """Lengths 1 to 32, detunings 0.03 to 30 wide, absorptions 1e-4 to 10; every second medium resonant, with a lead."""
    generator = torch.Generator().manual_seed(seed)
    for medium in range(count):
        sites = int(torch.randint(1, 33, (), generator=generator))
        scale, level, spread, real, imag = torch.rand(5, dtype=torch.float64, generator=generator).tolist()
        detuning = 10 ** (3 * scale - 1.5) * torch.randn(sites, dtype=torch.float64, generator=generator)
        exponent = 5 * level - 4 + spread * (torch.rand(sites, dtype=torch.float64, generator=generator) - 0.5)
        absorption = 10 ** exponent.clamp(-4, 1)
        if medium % 2:
            # Every second site is tuned to the pole of what lies before it.
            for i in range(1, sites, 2):
                detuning[i] = half_line_green(detuning[:i], absorption[:i])[-1].real
        yield detuning, absorption, complex(4 * real - 2, imag)


def two_media(bound: Callable[..., Bound]) -> Callable[[Line], Bound]:
    """The bound between a medium and one moved by up to 0.1 and a factor of up to 2."""

    def between(line: Line) -> Bound:
        detuning, absorption, _ = line
        generator = torch.Generator().manual_seed(len(detuning))
        noise = torch.rand(2, len(detuning), dtype=torch.float64, generator=generator)
        return bound(detuning, absorption, detuning + 0.1 * (2 * noise[0] - 1), absorption * 2 ** (2 * noise[1] - 1))

    return between


def with_lead(bound: Callable[..., Bound]) -> Callable[[Line], Bound]:
    return lambda line: bound(*line)


def behind_a_wall(bound: Callable[..., Bound]) -> Callable[[Line], Bound]:
    return lambda line: bound(line[0], line[1])


CASES: dict[str, tuple[str, Callable[[Line], Bound]]] = {
    "Herglotz": ("1", with_lead(bounds.herglotz_bound)),
    "Ward identity with a lead": ("2", with_lead(bounds.ward_bound)),
    "absorbed row": ("2", with_lead(bounds.absorbed_row_bound)),
    "Hardy": ("2", with_lead(bounds.hardy_bound)),
    "Combes-Thomas": ("3", behind_a_wall(bounds.combes_thomas_bound)),
    "decay envelope": ("3", behind_a_wall(bounds_decay.decay_bound)),
    "row sum": ("3", behind_a_wall(bounds.row_sum_bound)),
    "perturbation of the block": ("4", two_media(bounds.block_perturbation_bound)),
    "perturbation of causal rows": ("4", two_media(bounds.causal_perturbation_bound)),
    "gradient with a lead": ("7", with_lead(bounds_flux.gradient_bound)),
    "bare transmission": ("8", with_lead(bounds_flux.transmission_bound)),
    "Hilbert-Schmidt": ("13", behind_a_wall(bounds_schatten.hilbert_schmidt_bound)),
    "trace class": ("13", behind_a_wall(bounds_schatten.trace_class_bound)),
}


def ratios(case: Callable[[Line], Bound], count: int, seed: int) -> Tensor:
    """value / bound of every entry on or below the diagonal, of all media."""
    found = []
    for line in media(count, seed):
        value, bound, _ = case(line)
        ratio = value / bound
        found.append(ratio[torch.ones_like(ratio).tril() > 0] if ratio.ndim == 2 else ratio.flatten())
    return torch.cat(found)


def main() -> None:
    """Measure every bound and the spacings, and append their rows."""
    parser = argparse.ArgumentParser(description="Slack of the theory's bounds.")
    parser.add_argument("--media", type=int, default=2000, help="random media a bound")
    parser.add_argument("--windows", type=int, default=40, help="windows of 512 sites a potential")
    parser.add_argument("--only", choices=list(CASES), help="this bound and nothing else")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=BENCHMARKS, help="folder that holds results/")
    arguments = parser.parse_args()
    for name, (theorem, case) in CASES.items():
        if arguments.only not in (None, name):
            continue
        start = time.perf_counter()
        ratio = ratios(case, arguments.media, arguments.seed)
        low, median, high = (float(ratio.kthvalue(max(1, round(q * len(ratio)))).values) for q in QUANTILES)
        metrics = {
            "bound": name,
            "theorem": theorem,
            "media": arguments.media,
            "cases": len(ratio),
            "ratio_percentile_1": low,
            "ratio_median": median,
            "ratio_percentile_99": high,
            "ratio_largest": float(ratio.max()),
            "violations": int((ratio > 1 + 1e-12).sum()),
        }
        _append("theory-slack", metrics, arguments, time.perf_counter() - start)
    for options in SPACINGS if arguments.only is None else ():
        start = time.perf_counter()
        settings = {"sites": 512, "windows": arguments.windows, "epsilon": 0.1, "strength": 1.0}
        for kind, found in compare_spacings(**settings, **options, seed=arguments.seed).items():
            metrics = {
                "potential": kind,
                **settings,
                **options,
                "mean_ratio": found.mean,
                "standard_error": found.standard_error,
                "ratios": found.ratios,
            }
            _append("theory-spacings", metrics, arguments, time.perf_counter() - start)


def _append(question: str, metrics: dict, arguments: argparse.Namespace, seconds: float) -> None:
    print(metrics, flush=True)
    command = COMMAND if arguments.only is None else f"{COMMAND} --only '{arguments.only}'"
    config = {"media": arguments.media, "windows": arguments.windows, "seed": arguments.seed}
    append_row(
        question,
        command=command,
        config=config,
        seeds=[arguments.seed],
        metrics=metrics,
        wall_seconds=seconds,
        benchmarks=arguments.out,
    )


if __name__ == "__main__":
    main()
