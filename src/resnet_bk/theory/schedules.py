r"""Schedules of the exponent epsilon of the prime-bump potential, and in which Schatten class each epsilon lies.

V_eps(n) = Lambda(n) / n^{1/2 + eps}:      sum |V_eps| = -zeta'/zeta(1/2 + eps) < infinity  iff  eps > 1/2,
sum V_eps^2 < infinity                          iff  eps > 0
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from resnet_bk.errors import DomainError
from resnet_bk.theory.potentials import von_mangoldt

Shape = Literal["linear", "cosine", "geometric"]


class SummedNorms(NamedTuple):
    """l1 and squared l2 norm of the unsmoothed potential on the sites 1 to n, for n at powers of two.

    Attributes:
        sites: n, int64 [points].
        absolute: `sum_{k<=n} |V(k)|`, float64 [points].
        square: `sum_{k<=n} V(k)^2`, float64 [points].
    """

    sites: Tensor
    absolute: Tensor
    square: Tensor


def epsilon_at(progress: float, *, start: float = 1.0, end: float = 0.25, shape: Shape = "cosine") -> float:
    r"""Returns epsilon at a share `progress` of the run, moving monotonically from `start` to `end`.

        linear: start + (end - start) p,    cosine: with (1 - cos pi p) / 2 for p,    geometric: start^{1-p} end^p

    Args:
        progress: p in [0, 1].
        start: epsilon at 0, >= 0; above 1/2 the potential is summable and the operator trace class.
        end: epsilon at 1, >= 0; above 0 the operator is Hilbert-Schmidt, at 0 neither bound holds for all lengths.
        shape: how it moves; "cosine" starts and ends at rest.

    Returns:
        epsilon, between `start` and `end`, equal to them at the ends.

    Raises:
        DomainError: a progress outside [0, 1], an exponent that is negative or not finite, an unknown shape, or a
            geometric schedule to or from 0.

    Heuristic: that sharpening the potential slowly helps. Nothing here measures that it does.
    Source: continuation in the exponent; docs/theory/claims.
    """
    if not 0 <= progress <= 1:
        raise DomainError(f"progress is {progress}; expected a share of the run in [0, 1]: divide step by steps")
    for name, value in (("start", start), ("end", end)):
        if not (math.isfinite(value) and value >= 0):
            raise DomainError(f"{name} is {value}; expected a finite epsilon >= 0; 0 is the critical exponent 1/2")
    if shape not in get_args(Shape):
        raise DomainError(f"shape is {shape!r}; expected one of {get_args(Shape)}")
    if progress in (0, 1):
        return float(end if progress else start)
    if shape == "geometric":
        if min(start, end) == 0:
            raise DomainError("a geometric schedule never reaches 0; choose shape 'cosine' or an end above 0")
        return math.exp((1 - progress) * math.log(start) + progress * math.log(end))
    share = progress if shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * share


def summed_norms(sites: int, epsilon: float) -> SummedNorms:
    r"""Returns the l1 and squared l2 norms of the unsmoothed prime-bump potential, summed to growing lengths.

    Args:
        sites: longest length, >= 2.
        epsilon: exponent above 1/2, finite and >= 0.

    Returns:
        `SummedNorms` at n = 2, 4, 8, ... up to `sites`.

    Raises:
        DomainError: too few sites, or an exponent that is negative or not finite.

    Theorem: as n grows the first tends to `-zeta'/zeta(1/2 + eps)` for eps > 1/2 and grows like
        `n^{1/2 - eps} / (1/2 - eps)` below; the second has a limit for every eps > 0 and grows like `log(n)^2 / 2` at
        eps = 0.
    Cost: O(sites log log sites).
    Source: the prime number theorem by summation by parts.
    """
    if sites < 2:
        raise DomainError(f"sites is {sites}; expected at least 2, the first prime")
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise DomainError(f"epsilon is {epsilon}; expected finite and >= 0; 0 is the critical exponent 1/2")
    values = von_mangoldt(1, sites) * torch.arange(1, sites + 1, dtype=torch.float64).pow(-0.5 - epsilon)
    at = 2 ** torch.arange(1, sites.bit_length(), dtype=torch.int64)
    return SummedNorms(at, values.cumsum(0)[at - 1], values.square().cumsum(0)[at - 1])
