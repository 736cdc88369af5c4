r"""Weil's explicit formula for zeta, both sides computed for pairs of test functions.

    sum_gamma h(gamma)  =  h(i/2) + h(-i/2) - g(0) log pi + (1/2pi) Int h(t) Re psi(1/4 + it/2) dt
                           - 2 sum_n Lambda(n) n^{-1/2} g(log n),            g(u) = (1/2pi) Int h(t) e^{-itu} dt

gamma runs over the zeros 1/2 + i gamma of zeta, both signs; psi is the digamma function.

What it says about this project: the prime side is twice the sum of the unsmoothed prime-bump potential at epsilon = 0
against g(log n), so a linear functional of that potential equals a sum over zeros. What it does not say: that the zeros
are eigenvalues or resonances of the Jacobi matrix with that potential, that its spectrum has their statistics, that
all zeros are on the line (the formula holds wherever they are), or that a language model gains from the potential.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_bk.errors import DomainError, MissingDependencyError
from resnet_bk.theory.potentials import prime_bump_potential

_SMALLEST = 1e-18
_LONGEST = 14.1  # log of the largest prime power summed, about 1.3 million


class WeilPair(NamedTuple):
    """An even test function h and its Fourier transform g, both real on the line.

    Attributes:
        name: how reports call it.
        transform: h(t), float64 tensor to float64 tensor.
        at_half: h(i/2) = h(-i/2), from the closed form.
        kernel: g(u), float64 tensor to float64 tensor.
        height: h is below 1e-18 of its maximum, or integrated to a stated remainder, beyond it.
        reach: g(u) e^{u/2} is below 1e-18 of g(0) beyond it.
    """

    name: str
    transform: Callable[[Tensor], Tensor]
    at_half: float
    kernel: Callable[[Tensor], Tensor]
    height: float
    reach: float


class ExplicitFormula(NamedTuple):
    """Both sides of Weil's formula for one pair, and the terms of the right one.

    Attributes:
        spectral: sum of h over the zeros found, both signs.
        remainder: estimate of the sum over the zeros beyond them, by their mean density.
        pole: h(i/2) + h(-i/2).
        archimedean: the digamma integral less g(0) log pi.
        prime: -2 sum Lambda(n) n^{-1/2} g(log n).
    """

    spectral: float
    remainder: float
    pole: float
    archimedean: float
    prime: float

    @property
    def defect(self) -> float:
        """Left side less right side."""
        return self.spectral + self.remainder - self.pole - self.archimedean - self.prime


def gaussian_pair(width: float, centre: float = 0.0) -> WeilPair:
    r"""Returns the pair of `h(t) = exp(-(t - c)^2 / 2 w^2) + exp(-(t + c)^2 / 2 w^2)`, half of it for c = 0.

    Args:
        width: w > 0, in units of height.
        centre: c >= 0; near a zero it reads off that zero.

    Returns:
        `WeilPair` with `g(u) = w (2 / pi)^{1/2} e^{-w^2 u^2 / 2} cos(c u)`, half of it for c = 0.

    Raises:
        DomainError: a parameter that is not finite, a negative centre, or a width below 0.7, whose prime side is long.

    Source: Fourier transform of a Gaussian.
    """
    if not (math.isfinite(width) and width >= 0.7):
        raise DomainError(f"width is {width}; expected finite and >= 0.7: a narrower peak needs primes beyond e^14")
    if not (math.isfinite(centre) and centre >= 0):
        raise DomainError(f"centre is {centre}; expected finite and >= 0: the pair is even")
    copies = 1 if centre == 0 else 2

    def transform(t: Tensor) -> Tensor:
        peaks = torch.exp(-((t - centre) ** 2) / (2 * width**2)) + torch.exp(-((t + centre) ** 2) / (2 * width**2))
        return peaks * copies / 2

    def kernel(u: Tensor) -> Tensor:
        return copies * width / math.sqrt(2 * math.pi) * torch.exp(-((width * u) ** 2) / 2) * torch.cos(centre * u)

    # (i/2 - c)^2 = c^2 - 1/4 - ic; both peaks together are real.
    at_half = copies * math.exp((0.25 - centre**2) / (2 * width**2)) * math.cos(centre / (2 * width**2))
    spread = math.sqrt(-2 * math.log(_SMALLEST))
    # e^{u/2 - w^2 u^2 / 2} falls below the smallest number kept.
    reach = (0.5 + math.sqrt(0.25 - 2 * width**2 * math.log(_SMALLEST))) / width**2
    name = f"Gaussian, width {width:g}" + (f", centre {centre:g}" if centre else "")
    return WeilPair(name, transform, at_half, kernel, centre + spread * width, reach)


def sech_pair(width: float) -> WeilPair:
    r"""Returns the pair of `h(t) = 1 / cosh(t / w)`, with `g(u) = (w / 2) / cosh(pi w u / 2)`.

    Args:
        width: w, finite and at least 2.2 so that the prime side converges fast.

    Returns:
        `WeilPair`; h is analytic for |Im t| < pi w / 2, which has to exceed 1/2.

    Raises:
        DomainError: a width below 2.2 or not finite.

    Source: the hyperbolic secant is its own Fourier transform.
    """
    if not (math.isfinite(width) and width >= 2.2):
        raise DomainError(f"width is {width}; expected finite and >= 2.2: a narrower peak needs primes beyond e^14")

    def transform(t: Tensor) -> Tensor:
        return 1 / torch.cosh(t / width)

    def kernel(u: Tensor) -> Tensor:
        return width / 2 / torch.cosh(math.pi * width * u / 2)

    height = -width * math.log(_SMALLEST / 2)
    reach = -math.log(_SMALLEST) / (math.pi * width / 2 - 0.5)
    return WeilPair(f"sech, width {width:g}", transform, 1 / math.cos(0.5 / width), kernel, height, reach)


def spline_pair(support: float) -> WeilPair:
    r"""Returns the pair whose g is a cubic B-spline on [-c, c]: a finite prime side, `log n < c`.

        h(t) = sinc(c t / 4)^4,      g(u) = (4 / 3c) B(2u / c),      B(0) = 1, B(+-2) = 0

    Args:
        support: c in (0, 14.1], in units of log n.

    Returns:
        `WeilPair`; h falls off like t^{-4} only, so the sum over zeros needs its remainder.

    Raises:
        DomainError: a support out of range.

    Source: h is the fourth power of the transform of an interval.
    """
    if not 0 < support <= _LONGEST:
        raise DomainError(
            f"support is {support}; expected in (0, {_LONGEST}], the log of the largest prime power summed"
        )

    def transform(t: Tensor) -> Tensor:
        return torch.sinc(support * t / (4 * math.pi)) ** 4

    def kernel(u: Tensor) -> Tensor:
        x = (2 * u / support).abs()
        spline = torch.where(x < 1, 1 - 1.5 * x**2 + 0.75 * x**3, 0.25 * (2 - x).clamp(min=0) ** 3)
        return 4 / (3 * support) * spline

    at_half = (math.sinh(support / 8) / (support / 8)) ** 4
    return WeilPair(f"B-spline, support {support:g}", transform, at_half, kernel, 2e4, support)


@functools.cache
def zeta_zeros(count: int) -> tuple[float, ...]:
    """Returns the imaginary parts of the first zeros of zeta above the real axis, ascending.

    Args:
        count: how many, >= 1.

    Returns:
        `count` floats, each within 1e-12 of the zero.

    Raises:
        DomainError: a count below 1.
        MissingDependencyError: mpmath is not installed.

    Cost: about 30 ms a zero for the first hundred; kept for the process.
    Source: mpmath.zetazero.
    """
    if count < 1:
        raise DomainError(f"count is {count}; expected at least 1 zero")
    try:
        import mpmath
    except ImportError as error:
        raise MissingDependencyError("mpmath computes the zeros of zeta; install resnet-bk[theory]") from error
    return tuple(float(mpmath.zetazero(n).imag) for n in range(1, count + 1))


def digamma_real_part(t: Tensor) -> Tensor:
    """Returns `Re psi(1/4 + it/2)`, float64 in the shape of `t`, to 1e-13.

    Args:
        t: real, any shape.

    Returns:
        float64.

    Cost: O(1) an element.
    Source: recurrence to Re z > 12, then Stirling's series.
    """
    z = torch.complex(torch.full_like(t, 0.25, dtype=torch.float64), t.double() / 2)
    shift = torch.zeros_like(z)
    for k in range(12):
        shift = shift + 1 / (z + k)
    z = z + 12
    inverse = 1 / z.square()
    # -B_2k / 2k, k from 7 to 1.
    series = torch.zeros_like(z)
    for coefficient in (-1 / 12, 691 / 32760, -1 / 132, 1 / 240, -1 / 252, 1 / 120, -1 / 12):
        series = (series + coefficient) * inverse
    return (z.log() - 0.5 / z + series - shift).real


def explicit_formula(pair: WeilPair, zeros: tuple[float, ...]) -> ExplicitFormula:
    r"""Returns both sides of Weil's formula for one pair of test functions.

    Args:
        pair: test function and transform.
        zeros: imaginary parts of the first zeros above the real axis, ascending; see `zeta_zeros`.

    Returns:
        `ExplicitFormula`; its `defect` is zero up to quadrature and the zeros left out.

    Raises:
        DomainError: no zeros, or zeros that do not ascend.

    Theorem (Weil 1952): the defect is zero with all zeros, for h even and analytic in a strip wider than |Im t| <= 1/2
        with g(u) e^{|u|/2} integrable.
    Checked numerically with 60 zeros: defect at most 3e-15 for Gaussians and sech, and 7e-8 for splines, whose sum over
        the remaining zeros is an estimate.
    Cost: O(e^reach) for the primes, O(height) for the integral.
    Source: Iwaniec and Kowalski, Analytic Number Theory, theorem 5.12.
    """
    if not zeros or any(low >= high for low, high in itertools.pairwise(zeros)):
        raise DomainError("zeros must ascend and hold at least one; pass the result of zeta_zeros")
    gamma = torch.tensor(zeros, dtype=torch.float64)
    spectral = 2 * float(pair.transform(gamma).sum())
    # psi(1/4 + it/2) has its nearest pole at |Im t| = 1/2, so the trapezoid rule errs by e^{-2 pi / (2 * 0.04)}.
    t = torch.arange(0, pair.height, 0.04, dtype=torch.float64)
    values = pair.transform(t)
    integral = float(torch.trapezoid(values * digamma_real_part(t), t)) / math.pi
    at_zero = float(pair.kernel(torch.zeros(1, dtype=torch.float64)))
    archimedean = integral - at_zero * math.log(math.pi)
    sites = math.ceil(math.exp(pair.reach))
    potential = prime_bump_potential(sites, 0.0)
    position = torch.arange(1, sites + 1, dtype=torch.float64).log()
    prime = -2 * float(potential @ pair.kernel(position))
    return ExplicitFormula(spectral, _beyond(pair, zeros), 2 * pair.at_half, archimedean, prime)


def _beyond(pair: WeilPair, zeros: tuple[float, ...]) -> float:
    """The sum of h over the zeros above the last one, both signs, from their mean density log(t / 2 pi) / 2 pi."""
    start = _height_of(len(zeros))
    if start >= pair.height:
        return 0.0
    t = torch.arange(start, pair.height, 0.04, dtype=torch.float64)
    return 2 * float(torch.trapezoid(pair.transform(t) * (t / (2 * math.pi)).log() / (2 * math.pi), t))


def _height_of(count: int) -> float:
    """The height below which the mean counting function `(t / 2 pi) log(t / 2 pi e) + 7/8` finds `count` zeros."""
    low, high = 2 * math.pi, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        scaled = middle / (2 * math.pi)
        found = scaled * (math.log(scaled) - 1) + 7 / 8
        low, high = (middle, high) if found < count else (low, middle)
    return low
