"""Level-spacing statistics of the prime-bump potential beside those of its controls, with error bars."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_bk.errors import DomainError
from resnet_bk.theory.potentials import (
    SpacingRatio,
    control_potential,
    jacobi_levels,
    prime_bump_potential,
    spacing_ratio,
)

CONTROLS = ("none", "random", "shuffled", "shuffled-odd")
"""Those of `control_potential`, and one that keeps what lies at even integers: beyond 2, primes are odd."""


def windowed_levels(
    kind: str,
    *,
    sites: int,
    windows: int,
    epsilon: float,
    strength: float,
    smoothing: float = 0.0,
    first: int = 2,
    seed: int = 0,
) -> Tensor:
    r"""Returns the levels of the Jacobi matrices with neighbouring windows of a potential on their diagonals.

    Args:
        kind: "prime-bump", or one of `CONTROLS`.
        sites: length of a window, >= 11.
        windows: how many, >= 1; window w starts at the integer `first + w sites`.
        epsilon: exponent above 1/2, finite and >= 0.
        strength: every window is scaled to this root mean square, > 0, units of the hopping, since bumps shrink with n.
        smoothing: half-width of a bump in sites.
        first: integer of the first site, >= 1.
        seed: of the controls.

    Returns:
        float64 [windows, sites], ascending, units of the hopping.

    Raises:
        DomainError: a parameter out of range, or a window without a bump, which cannot be scaled.

    Cost: O(windows * sites^3).
    Source: docs/theory/claims.
    """
    if kind not in ("prime-bump", *CONTROLS):
        raise DomainError(f"kind is {kind!r}; expected one of {('prime-bump', *CONTROLS)}")
    if sites < 11 or windows < 1:
        raise DomainError(f"sites and windows are {sites} and {windows}; expected at least 11 and 1")
    if not (math.isfinite(strength) and strength > 0):
        raise DomainError(f"strength is {strength}; expected finite and > 0: the hopping is 1")
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for window in range(windows):
        start = first + window * sites
        potential = prime_bump_potential(sites, epsilon, smoothing=smoothing, first=start)
        size = float(potential.norm()) / math.sqrt(sites)
        if size == 0:
            raise DomainError(f"the window of {sites} sites from {start} holds no prime power; lengthen it")
        potential *= strength / size
        if kind == "shuffled-odd":
            odd = slice(1 - start % 2, None, 2)
            potential[odd] = potential[odd][torch.randperm(len(potential[odd]), generator=generator)]
        elif kind in ("none", "random", "shuffled"):
            potential = control_potential(potential, kind, generator=generator)
        levels.append(jacobi_levels(potential))
    return torch.stack(levels)


def compare_spacings(
    *,
    sites: int,
    windows: int,
    epsilon: float,
    strength: float,
    smoothing: float = 0.0,
    first: int = 2,
    seed: int = 0,
) -> dict[str, SpacingRatio]:
    """Returns the mean spacing ratio of the prime-bump potential and of each control, with standard errors.

    Args:
        sites: length of a window, >= 11.
        windows: how many neighbouring windows are averaged, >= 1.
        epsilon: exponent above 1/2, finite and >= 0.
        strength: root mean square of every window, > 0, units of the hopping.
        smoothing: half-width of a bump in sites.
        first: integer of the first site, >= 1.
        seed: of the controls.

    Returns:
        "prime-bump" and every one of `CONTROLS` to `SpacingRatio`; the free line "none" repeats one spectrum, so its
        error is that of its levels only.

    Raises:
        DomainError: as `windowed_levels`.

    Measured: `theory-spacings` in the ledger. At strength 1 all but the free line are near independent levels (0.386).
        Far out the prime bumps lie below their shuffled control, in part because they leave out the even integers, and
        smoothing raises them above it, because it ties neighbouring sites together.
    Not claimed: the statistics of the zeros of zeta (0.60) for any of these. A Jacobi matrix with a disordered diagonal
        localises, and its levels become independent.
    Cost: O(windows * sites^3).
    Source: docs/theory/claims.
    """
    result = {}
    for kind in ("prime-bump", *CONTROLS):
        levels = windowed_levels(
            kind,
            sites=sites,
            windows=windows,
            epsilon=epsilon,
            strength=strength,
            smoothing=smoothing,
            first=first,
            seed=seed,
        )
        result[kind] = spacing_ratio(levels)
    return result
