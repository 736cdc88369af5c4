r"""Decay of the causal kernel at the best rate for all media: theorem 3 with its weight chosen for every distance.

|G_ij| <= min over 0 <= g < asinh(eta / 2) of e^{-g |i-j|} / (eta - 2 sinh g),      eta = min eta_i
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_bk.errors import DomainError
from resnet_bk.theory.bounds import Bound
from resnet_bk.theory.jacobi import checked_sites, green_kernel, half_line_green


def decay_envelope(sites: int, absorption: float) -> Tensor:
    r"""Returns the bound of `|G_ij|` by distance d = 0, ..., sites - 1, for all media of at least this absorption.

        e^{-g d} / (eta - 2 sinh g),      e^g = max(1, (d eta + (d^2 eta^2 + 4 d^2 - 4)^{1/2}) / (2 d + 2))

    Args:
        sites: number of distances, >= 1.
        absorption: eta, the least absorption, finite and > 0, units of the hopping.

    Returns:
        float64 [sites], decreasing, 1 / eta at distance 0.

    Raises:
        DomainError: a parameter out of range.

    Theorem: nowhere above the bound with g = asinh(eta / 4) for all distances. Its rate tends to asinh(eta / 2), and no
        envelope of all media has a larger one, since the free line at zero detuning decays at exactly that rate.
    Cost: O(sites).
    Source: Combes and Thomas 1973; the stationary point in g of the bound for one weight.
    """
    if sites < 1:
        raise DomainError(f"sites is {sites}; expected at least 1 distance")
    if not 0 < absorption < float("inf"):
        raise DomainError(f"absorption is {absorption}; expected finite and > 0: without it nothing need decay")
    d = torch.arange(sites, dtype=torch.float64)
    root = ((d * absorption).square() + 4 * d.square() - 4).clamp(min=0).sqrt()
    growth = ((d * absorption + root) / (2 * d + 2)).clamp(min=1)
    # At distance 0 the formula's weight is none.
    growth[0] = 1
    return growth.pow(-d) / (absorption - (growth - 1 / growth))


def decay_bound(detuning: Tensor, absorption: Tensor) -> Bound:
    """`|G_ij|` of the causal kernel against `decay_envelope` at the distance `|i - j|`, per entry.

    Args:
        detuning: real [n], units of the hopping.
        absorption: real [n], > 0, same units.

    Returns:
        Bound of float64 [n, n]; above the diagonal the value is 0. Hard wall.

    Raises:
        ShapeError, DomainError: as `half_line_green`.

    Theorem 3, for the best weight at every distance: uniform in length and potential.
    Cost: O(n^2).
    Source: see `decay_envelope`.
    """
    detuning, absorption = checked_sites(detuning, absorption)
    value = green_kernel(half_line_green(detuning, absorption)).abs()
    position = torch.arange(len(value), device=value.device)
    envelope = decay_envelope(len(value), float(absorption.min())).to(value.device)
    return Bound.of(value, envelope[(position[:, None] - position).abs()])
