"""Prime-bump (von Mangoldt) potentials, their controls, and the spacing-ratio statistic of spectra."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError

ControlKind = Literal["none", "random", "shuffled"]

# Mean of min(s, s') / max(s, s'): exact for Poisson, numerical for large random matrices (Atas et al. 2013, table I).
POISSON_RATIO = 2.0 * math.log(2.0) - 1.0
GOE_RATIO = 0.5307
GUE_RATIO = 0.5996

SEGMENT = 1 << 20  # integers sieved at once: 1 MiB of flags, whatever the length asked for
LARGEST_INTEGER = 1 << 50  # beyond it float64 offsets n / q - 1 lose the bump's shape


class SpacingRatio(NamedTuple):
    """Mean spacing ratio of one or more spectra.

    Attributes:
        mean: average of all ratios, in [0, 1], without unit.
        standard_error: of the mean, from block averages (neighbouring ratios share a spacing and are correlated).
        ratios: how many ratios were averaged.
    """

    mean: float
    standard_error: float
    ratios: int


def _primes_up_to(last: int) -> Tensor:
    """Returns the primes <= last, int64, by the sieve of Eratosthenes."""
    prime = torch.ones(last + 1, dtype=torch.bool)
    prime[:2] = False
    for candidate in range(2, math.isqrt(last) + 1):
        if prime[candidate]:
            prime[candidate * candidate :: candidate] = False
    return prime.nonzero().flatten()


def von_mangoldt(first: int, last: int) -> Tensor:
    r"""Returns Lambda(n) for n = first, ..., last: log p where n = p^k with k >= 1, and 0 elsewhere.

    Args:
        first: smallest integer n, >= 1.
        last: largest integer n, >= first and <= 2^50.

    Returns:
        float64 [last - first + 1].

    Raises:
        DomainError: the range is empty or leaves [1, 2^50].

    Theorem: sum_{d | n} Lambda(d) = log n.
    Cost: O((last - first) log log last + sqrt(last)) work; memory: the result, one segment, the primes to sqrt(last).
    Source: segmented sieve of Eratosthenes.
    """
    if not 1 <= first <= last <= LARGEST_INTEGER:
        raise DomainError(
            f"[first, last] = [{first}, {last}]: expected 1 <= first <= last <= 2^50; choose a range inside"
        )
    base = _primes_up_to(math.isqrt(last)).tolist()
    result = torch.zeros(last - first + 1, dtype=torch.float64)
    for start in range(first, last + 1, SEGMENT):
        stop = min(start + SEGMENT, last + 1)
        prime = torch.ones(stop - start, dtype=torch.bool)
        if start == 1:
            prime[0] = False
        for p in base:
            if p * p >= stop:
                break
            prime[max(p * p, -(-start // p) * p) - start :: p] = False
        at = prime.nonzero().flatten()
        result[at + (start - first)] = (at + start).to(torch.float64).log()
    for p in base:
        power = p * p
        while power <= last:
            if power >= first:
                result[power - first] = math.log(p)
            power *= p
    return result


def _add_bumps(potential: Tensor, centre: Tensor, height: Tensor, first: int, smoothing: float) -> None:
    """Adds the smoothed bumps with the given centres (int64) and heights to `potential`, whose first site is `first`.

    A bump at q covers |n - q| < smoothing * e for q >= smoothing and up to q e^{smoothing / q} below that, so the few
    centres below `smoothing` are spread over all sites and the others over a fixed number of offsets.
    """
    sites = potential.shape[0]
    for q, amplitude in zip(centre[centre < smoothing].tolist(), height[centre < smoothing], strict=True):
        position = torch.arange(first, first + sites, dtype=torch.float64)
        distance = (q * (position / q).log() / smoothing).clamp(-1.0, 1.0)
        potential += amplitude * 0.5 * (1.0 + torch.cos(math.pi * distance))
    narrow = centre >= smoothing
    centre, height = centre[narrow], height[narrow]
    for offset in range(-math.ceil(smoothing), math.ceil((math.e - 1.0) * smoothing) + 1):
        target = centre + (offset - first)
        inside = (target >= 0) & (target < sites)
        q = centre[inside].to(torch.float64)
        distance = (q * torch.log1p(offset / q) / smoothing).clamp(-1.0, 1.0)
        # Centres differ, so targets differ at one offset: plain indexing adds each bump once.
        potential[target[inside]] += height[inside] * 0.5 * (1.0 + torch.cos(math.pi * distance))


def prime_bump_potential(sites: int, epsilon: float, *, smoothing: float = 0.0, first: int = 1) -> Tensor:
    r"""Returns the potential with a bump at every prime power, sampled at the integers n = first, first + 1, ...

        V(n) = sum_q Lambda(q) / q^{1/2 + epsilon} psi(q log(n / q) / smoothing),   q over the prime powers p^k

    with psi(t) = (1 + cos pi t) / 2 for |t| < 1 and 0 outside. The half-width of the bump at q is smoothing / q in
    log n, that is about `smoothing` sites; with smoothing = 0, or too small to reach a neighbour, V(n) is
    Lambda(n) / n^{1/2 + epsilon}.

    Args:
        sites: number of integers, >= 1.
        epsilon: exponent above 1/2, finite and >= 0.
        smoothing: half-width of a bump in sites, finite and >= 0.
        first: integer of the first site, >= 1; windows of one potential agree wherever they overlap.

    Returns:
        float64 [sites], >= 0, units of the hopping.

    Raises:
        DomainError: a parameter outside its domain, or a window beyond 2^50.

    Theorem: without smoothing 0 <= V(n) <= log(n) / n^{1/2 + epsilon}, zero unless n is a prime power.
    Not claimed: that this potential helps a model; compare it with `control_potential`.
    Cost: O(sites log log n + sqrt(n) + smoothing * sites) work.
    Source: explicit-formula bumps at k log p; a width fixed in log n would grow like n^{1/2 - epsilon} instead.
    """
    if sites < 1:
        raise DomainError(f"sites = {sites}: expected at least 1; ask for a positive length")
    if not (math.isfinite(epsilon) and epsilon >= 0.0):
        raise DomainError(f"epsilon = {epsilon}: expected a finite value >= 0; 0 is the critical exponent 1/2")
    if not (math.isfinite(smoothing) and smoothing >= 0.0):
        raise DomainError(f"smoothing = {smoothing}: expected a finite width >= 0 in sites; 0 leaves single-site bumps")
    if first < 1:
        raise DomainError(f"first = {first}: expected an integer >= 1; sites are the integers n with log n defined")
    if smoothing == 0.0:
        values = von_mangoldt(first, first + sites - 1)
        centre = torch.arange(first, first + sites, dtype=torch.float64)
        return values * centre.pow(-0.5 - epsilon)
    # q e^{-s/q} >= q - s, and q e^{s/q} <= q + (e - 1) s for q >= s: these bumps and those at q < s reach the window.
    reach = math.ceil(smoothing)
    low = max(1, first - math.ceil((math.e - 1.0) * smoothing))
    potential = torch.zeros(sites, dtype=torch.float64)
    last = first + sites - 1 + reach
    ranges = [(1, last)] if low <= reach else [(1, reach), (low, last)]
    for start, stop in ranges:
        values = von_mangoldt(start, stop)
        at = values.nonzero().flatten()
        centre = at + start
        height = values[at] * centre.to(torch.float64).pow(-0.5 - epsilon)
        _add_bumps(potential, centre, height, first, smoothing)
    return potential


def control_potential(potential: Tensor, kind: ControlKind, *, generator: torch.Generator) -> Tensor:
    """Returns a control for `potential`: what any potential of that size would do, without its arithmetic.

    Args:
        potential: float64 [sites], finite.
        kind: "none" (zeros), "random" (independent Gaussians scaled to the same l2 norm) or "shuffled" (the same values
            in random order).
        generator: seeded source of the randomness; "none" does not advance it.

    Returns:
        float64 [sites], units of `potential`.

    Raises:
        ShapeError: `potential` is not a float64 vector.
        DomainError: it is empty or not finite, or the kind is unknown.

    Theorem: "random" and "shuffled" have the l2 norm of `potential`; "shuffled" has its whole distribution of values.
    Cost: O(sites).
    Source: docs/theory/claims.
    """
    _check_potential(potential)
    if kind == "none":
        return torch.zeros_like(potential)
    if kind == "random":
        noise = torch.randn(potential.shape[0], dtype=torch.float64, generator=generator)
        return noise * (potential.norm() / noise.norm())
    if kind == "shuffled":
        return potential[torch.randperm(potential.shape[0], generator=generator)]
    raise DomainError(f"kind = {kind!r}: expected one of {get_args(ControlKind)}; choose one of these controls")


def jacobi_levels(potential: Tensor) -> Tensor:
    """Returns the eigenvalues of the Jacobi matrix tridiag(1, potential, 1) in ascending order.

    Args:
        potential: float64 [sites], finite, units of the hopping.

    Returns:
        float64 [sites], same units.

    Raises:
        ShapeError: `potential` is not a float64 vector.
        DomainError: it is empty or not finite.

    Theorem: the eigenvalues are simple and lie in [min potential - 2, max potential + 2].
    Cost: O(sites^3) work, O(sites^2) memory (dense).
    Source: Gershgorin; three-term recursion.
    """
    _check_potential(potential)
    hopping = torch.ones(potential.shape[0] - 1, dtype=torch.float64)
    return torch.linalg.eigvalsh(torch.diag(potential) + torch.diag(hopping, 1) + torch.diag(hopping, -1))


def spacing_ratio(levels: Tensor) -> SpacingRatio:
    r"""Returns the mean of r_n = min(s_n, s_{n+1}) / max(s_n, s_{n+1}) over the level spacings s_n, with an error bar.

    Args:
        levels: float64 [levels] or [samples, levels], finite, any order, at least 11 levels each. Energies in any unit:
            the ratio needs no unfolding.

    Returns:
        `SpacingRatio`: the standard error comes from averages over blocks of about sqrt(levels) ratios.

    Raises:
        ShapeError: not one or two axes, or not float64.
        DomainError: too few levels, non-finite levels, or three equal ones (the ratio 0 / 0).

    Theorem: independent levels give 2 ln 2 - 1 = 0.386. Measured by others: GOE 0.531, GUE 0.600.
    Not claimed: that a finite Jacobi matrix reaches any of these; a regular spectrum (free line) has r near 1.
    Cost: O(samples * levels log levels).
    Source: Oganesyan and Huse 2007; Atas, Bogomolny, Giraud and Roux 2013.
    """
    if levels.dtype != torch.float64 or levels.dim() not in (1, 2):
        raise ShapeError(
            f"levels: found {levels.dtype} {list(levels.shape)}, expected float64 [levels] or [samples, levels]; "
            "convert with .double() and stack the spectra"
        )
    if levels.shape[-1] < 11 or levels.shape[0] < 1:
        raise DomainError(
            f"levels: shape {list(levels.shape)}, expected at least 11 per spectrum; use a longer spectrum"
        )
    if not bool(torch.isfinite(levels).all()):
        raise DomainError("levels: found a value that is not finite; expected finite energies; remove the bad spectrum")
    spacing = torch.atleast_2d(levels).sort(dim=-1).values.diff(dim=-1)
    small = torch.minimum(spacing[:, 1:], spacing[:, :-1])
    large = torch.maximum(spacing[:, 1:], spacing[:, :-1])
    if bool((large == 0).any()):
        raise DomainError(
            "levels: found three equal levels, expected at most double ones; separate symmetry sectors first"
        )
    ratio = small / large
    length = math.isqrt(ratio.shape[1])
    blocks = ratio.shape[1] // length
    means = ratio[:, : blocks * length].reshape(-1, length).mean(dim=1)
    # Scaled to all ratios, the few behind the last whole block included.
    error = float(means.std()) * math.sqrt(length / ratio.numel())
    return SpacingRatio(float(ratio.mean()), error, ratio.numel())


def _check_potential(potential: Tensor) -> None:
    if potential.dtype != torch.float64 or potential.dim() != 1:
        raise ShapeError(
            f"potential: found {potential.dtype} {list(potential.shape)}, expected float64 [sites]; "
            "convert with .double() and pass one line at a time"
        )
    if potential.shape[0] == 0:
        raise DomainError("potential: found 0 sites, expected at least 1; pass a non-empty line")
    finite = torch.isfinite(potential)
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0, 0])
        raise DomainError(f"potential[{index}] = {float(potential[index])}: expected finite values; mend the input")
