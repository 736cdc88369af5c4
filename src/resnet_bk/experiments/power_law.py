"""Power laws L = L0 + a N^(-b) through measured losses, with a confidence band from resampled runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resnet_bk.errors import DomainError

_LARGEST_EXPONENT = 2.0
_GRID = 400


@dataclass(frozen=True)
class PowerLaw:
    """L(N) = floor + coefficient * (N / scale)^(-exponent)."""

    floor: float
    """L0, nats per token, >= 0."""
    coefficient: float
    """Loss above the floor at N = scale, >= 0."""
    exponent: float
    """b, > 0."""
    scale: float
    """Geometric mean of the sizes that were fitted, so that floor and coefficient are of the losses' size."""

    def at(self, sizes: Sequence[float] | np.ndarray) -> np.ndarray:
        """Loss at each size, nats per token."""
        return self.floor + self.coefficient * (np.asarray(sizes, dtype=float) / self.scale) ** -self.exponent

    @property
    def a(self) -> float:
        """Coefficient of N^(-b) itself."""
        return self.coefficient * self.scale**self.exponent

    def __str__(self) -> str:
        return f"{self.floor:.3f} + {self.a:.4g} N^-{self.exponent:.3f}"


def fit_power_law(sizes: Sequence[float] | np.ndarray, losses: Sequence[float] | np.ndarray) -> PowerLaw:
    """The power law of least squared error with L0 >= 0, a >= 0 and 0 < b <= 2.

    For a fixed exponent the rest is linear, so only the exponent is searched: on a grid, then twice more around the
    best place.

    Args:
        sizes: parameters or operations of each run, > 0, at least three different ones.
        losses: nats per token, > 0.

    Raises:
        DomainError: fewer than three different sizes, or a value outside its domain.
    """
    x, y = np.asarray(sizes, dtype=float), np.asarray(losses, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or len(np.unique(x)) < 3:
        raise DomainError(
            f"{len(np.unique(x))} different sizes and {len(y)} losses; a power law needs a loss for each run and at "
            "least three different sizes."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise DomainError("Some size or loss is not a finite number > 0; leave such runs out.")
    scale = float(np.exp(np.log(x).mean()))
    low, high = _LARGEST_EXPONENT / 1000, _LARGEST_EXPONENT
    errors, floors, coefficients, exponents = _linear(x / scale, y, np.linspace(low, high, _GRID))
    for _ in range(2):
        best, step = int(errors.argmin()), (high - low) / (_GRID - 1)
        low, high = max(exponents[best] - step, 1e-6), min(exponents[best] + step, _LARGEST_EXPONENT)
        errors, floors, coefficients, exponents = _linear(x / scale, y, np.linspace(low, high, _GRID))
    best = int(errors.argmin())
    return PowerLaw(float(floors[best]), float(coefficients[best]), float(exponents[best]), scale)


def _linear(x: np.ndarray, y: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, ...]:
    """Squared error, floor and coefficient of the best fit with each exponent, and the exponents."""
    basis = x ** -exponents[:, None]
    centred = basis - basis.mean(axis=1, keepdims=True)
    coefficients = centred @ y / (centred**2).sum(axis=1)
    floors = y.mean() - coefficients * basis.mean(axis=1)
    # At the edge of the domain: no floor, or no slope.
    steep = floors < 0
    floors = np.where(steep, 0.0, floors)
    coefficients = np.where(steep, basis @ y / (basis**2).sum(axis=1), coefficients)
    rising = coefficients < 0
    floors = np.where(rising, y.mean(), floors)
    coefficients = np.where(rising, 0.0, coefficients)
    errors = ((floors[:, None] + coefficients[:, None] * basis - y) ** 2).sum(axis=1)
    return errors, floors, coefficients, exponents


def bootstrap_power_laws(
    sizes: Sequence[float] | np.ndarray, losses: Sequence[float] | np.ndarray, *, samples: int = 1000, seed: int = 0
) -> list[PowerLaw]:
    """Power laws through runs drawn with replacement; draws with fewer than three different sizes are drawn again.

    Args:
        sizes: as in `fit_power_law`.
        losses: likewise.
        samples: laws to return.
        seed: of the draws.
    """
    fit_power_law(sizes, losses)  # refuses what no draw could fit
    draw = np.random.default_rng(seed)
    x, y = np.asarray(sizes, dtype=float), np.asarray(losses, dtype=float)
    laws: list[PowerLaw] = []
    while len(laws) < samples:
        chosen = draw.integers(len(x), size=len(x))
        if len(np.unique(x[chosen])) >= 3:
            laws.append(fit_power_law(x[chosen], y[chosen]))
    return laws


def confidence_band(
    laws: Sequence[PowerLaw], sizes: Sequence[float] | np.ndarray, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper loss at each size between which the share `level` of `laws` lies."""
    tail = (1 - level) / 2
    values = np.stack([law.at(sizes) for law in laws])
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return low, high
