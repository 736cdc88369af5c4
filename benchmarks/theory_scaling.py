"""Time of every O(N) routine of the theory at 10^5 and 10^6 sites: linear means a ratio near 10, 8 to 13 is expected.

    python benchmarks/theory_scaling.py                             # about five minutes on one thread
    python benchmarks/theory_scaling.py --sites 1000 --no-rows      # a rehearsal at 1,000 and 10,000
    python benchmarks/theory_scaling.py --only continuum            # the routines whose name contains this

Processor seconds (other processes on the machine do not count), the least of several runs, the two sizes in turn. One
row a routine in `benchmarks/results/theory-scaling.jsonl`; a result that is not finite is a row too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from resnet_bk.evaluation.ledger import append_row
from resnet_bk.theory import (
    continuum,
    density,
    gradient_study,
    hierarchical,
    jacobi,
    low_rank,
    potentials,
    precision,
    resonances,
    scattering,
    spectral_monitor,
)

EXPECTED = (8.0, 13.0)
RANK = 4
LEAF = 8
SLOW_SECONDS = 20.0  # a run that takes longer is not repeated


def routines(sites: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name, on one random medium of that many sites."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    potential = normal(sites, dtype=torch.float64)
    absorption = 0.05 + torch.rand(sites, generator=generator, dtype=torch.float64)
    line, energy = (potential, 0.3, absorption), torch.tensor([0.3], dtype=torch.float64)
    vectors = normal(sites, 1, dtype=torch.complex128)
    hopping = torch.ones(sites - 1, dtype=torch.complex128)
    factors = normal(sites, RANK, dtype=torch.complex128) / sites**0.5
    semiseparable = low_rank.Semiseparable(potential, hopping, factors, factors)
    tree = random_tree(sites, generator)
    grid = continuum.midpoint_grid(potential, 0.0, 0.1 * sites)
    z = 1.0 + 0.1j
    media = [part[None, :, None] for part in (potential, absorption)]
    m = jacobi.half_line_green(potential - 0.3, absorption)[None, :, None]
    found: dict[str, Callable[[], Any]] = {
        "half_line_green": partial(jacobi.half_line_green, potential, absorption),
        "full_green_diagonal": partial(jacobi.full_green_diagonal, potential, absorption),
        "free_root": partial(jacobi.free_root, potential, absorption),
        "density_of_states, one energy": partial(density.density_of_states, potential, energy, absorption),
        "surface_density_of_states, one energy": partial(
            density.surface_density_of_states, potential, energy, absorption
        ),
    }
    for function in (
        scattering.log_perturbation_determinant,
        scattering.birman_schwinger_trace,
        scattering.log_regularised_determinant,
        scattering.scattering_phase,
        scattering.spectral_shift,
        precision.hilbert_schmidt_norm,
    ):
        found[function.__name__] = partial(function, *line)
    found |= {
        "birman_schwinger_product": partial(precision.birman_schwinger_product, *line, vectors),
        "condition_estimate, one step": lambda: precision.condition_estimate(
            *line, generator=torch.Generator().manual_seed(0), steps=1
        ),
        "half_line_green_within, complex64": partial(
            precision.half_line_green_within, potential, absorption, budget=1e-2
        ),
        "half_line_green_within, promoted": partial(
            precision.half_line_green_within, potential, absorption, budget=1e-9
        ),
        "newton_correction": partial(resonances.newton_correction, potential, absorption, 0.3 - 0.1j),
        "log_continuum_determinant": partial(continuum.log_continuum_determinant, grid, z),
        "log_continuum_regularised_determinant": partial(continuum.log_continuum_regularised_determinant, grid, z),
        "continuum_hilbert_schmidt_bound": partial(continuum.continuum_hilbert_schmidt_bound, grid, z),
        "prime_bump_potential": partial(potentials.prime_bump_potential, sites, 0.5),
        "prime_bump_potential, smoothed": partial(potentials.prime_bump_potential, sites, 0.5, smoothing=2.0),
        "tridiagonal_resolvent": partial(low_rank.tridiagonal_resolvent, potential, hopping, absorption, vectors),
        "semiseparable_product": partial(low_rank.semiseparable_product, semiseparable, vectors),
        "semiseparable_resolvent": partial(low_rank.semiseparable_resolvent, semiseparable, absorption, vectors),
        "hierarchical_product": partial(hierarchical.hierarchical_product, tree, vectors),
        "hierarchical_resolvent": partial(hierarchical.hierarchical_resolvent, tree, absorption, vectors),
        "schatten_bound": partial(spectral_monitor.schatten_bound, *media),
        "medium_report": partial(spectral_monitor.medium_report, *media, m.real, m.imag),
        "clip_potential": partial(spectral_monitor.clip_potential, *media, 1.0),
        "blended_full_diagonal, with its gradient": partial(diagonal_and_gradient, *media),
    }
    return found


def random_tree(sites: int, generator: torch.Generator) -> hierarchical.Hierarchical:
    """A Hermitian hierarchical matrix from random parts; parts of the padding are masked."""
    leaves = 1 << (-(-sites // LEAF) - 1).bit_length()
    size = -(-sites // leaves)
    levels = leaves.bit_length() - 1
    normal = partial(torch.randn, dtype=torch.complex128, generator=generator)
    real = (torch.arange(leaves * size) < sites).unflatten(0, (leaves, size)).to(torch.complex128)
    raw = normal(leaves, size, size) * real[..., None] * real[:, None]
    blocks = (raw + raw.mH) / 2 + torch.diag_embed(1 - real)
    basis = normal(leaves, size, RANK) * real[..., None] / size**0.5
    moves = tuple(normal(leaves >> level, RANK, RANK) / RANK for level in range(levels - 1))
    pairs = []
    for level in range(levels):
        upper = normal(leaves >> (level + 1), RANK, RANK)
        pairs.append(torch.stack((upper, upper.mH), 1))
    return hierarchical.Hierarchical(sites, blocks, basis, basis, moves, moves, tuple(pairs))


def diagonal_and_gradient(detuning: Tensor, absorption: Tensor) -> tuple[Tensor, ...]:
    """The full diagonal and the exact gradient of the mean of its imaginary part."""
    inputs = detuning.clone().requires_grad_(), absorption.clone().requires_grad_()
    diagonal = gradient_study.blended_full_diagonal(*inputs)
    return diagonal.detach(), *torch.autograd.grad(diagonal.imag.mean(), inputs)


def is_finite(result: Any) -> bool:
    """Whether every number of a result is finite."""
    if isinstance(result, Tensor):
        return bool(torch.isfinite(result).all())
    if isinstance(result, tuple):
        return all(is_finite(part) for part in result)
    return bool(torch.isfinite(torch.tensor(result)))


def measure(small: Callable[[], Any], large: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Least processor seconds of both sizes, their ratio, and whether both results are finite."""
    best, finite = [float("inf")] * 2, True
    for _ in range(repeats):
        for place, run in enumerate((small, large)):
            began = time.process_time()
            result = run()
            best[place] = min(best[place], time.process_time() - began)
            finite = finite and is_finite(result)
        if best[1] > SLOW_SECONDS:
            break
    return {"seconds_small": best[0], "seconds_large": best[1], "ratio": best[1] / best[0], "finite": str(finite)}


def main() -> None:
    """Time every routine and append its row."""
    parser = argparse.ArgumentParser(
        description="Time of every O(N) routine of the theory against the number of sites."
    )
    parser.add_argument("--sites", type=int, default=100_000, help="the smaller size; the larger is ten times that")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="time only routines whose name contains this")
    parser.add_argument("--no-rows", action="store_true", help="print only, append nothing to the ledger")
    arguments = parser.parse_args()
    small, large = (routines(sites) for sites in (arguments.sites, 10 * arguments.sites))
    command = f"python benchmarks/theory_scaling.py --sites {arguments.sites} --repeats {arguments.repeats}"
    if arguments.only:
        command += f" --only {arguments.only}"
    for name in small:
        if arguments.only not in name:
            continue
        began = time.perf_counter()
        metrics = {
            "routine": name,
            "sites_small": arguments.sites,
            "sites_large": 10 * arguments.sites,
            **measure(small[name], large[name], arguments.repeats),
        }
        metrics["outcome"] = "linear" if EXPECTED[0] <= metrics["ratio"] <= EXPECTED[1] else "outside 8 to 13"
        print(
            f"{name:42} {metrics['seconds_small']:9.4f} {metrics['seconds_large']:9.4f} {metrics['ratio']:7.2f} "
            f"finite {metrics['finite']}, {metrics['outcome']}",
            flush=True,
        )
        if not arguments.no_rows:
            append_row(
                "theory-scaling",
                command=command,
                config={"rank": RANK, "leaf": LEAF, "repeats": arguments.repeats, "sites": arguments.sites},
                seeds=[0],
                metrics=metrics,
                wall_seconds=time.perf_counter() - began,
            )


if __name__ == "__main__":
    main()
