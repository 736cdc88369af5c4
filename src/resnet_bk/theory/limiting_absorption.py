r"""Limiting absorption with a potential of finite support on the infinite line, and its curves.

H = S + S* + V on l2(Z),      <X>^{-s} (H - E - i eta)^{-1} <X>^{-s},      <X> = (1 + X^2)^{1/2},  s > 1/2
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.jacobi import free_root


def line_resolvent(potential: Tensor, energy: float, absorption: float) -> Tensor:
    r"""Returns the block of the infinite line's resolvent on the sites of the potential, free outside them.

        (H_block + V - m_free (e_1 e_1* + e_n e_n*) - E - i eta)^{-1}

    Args:
        potential: v, real [sites], units of the hopping; zero elsewhere on the line.
        energy: E, finite, same units.
        absorption: eta, finite and > 0, the same at every site.

    Returns:
        complex128 [sites, sites], symmetric.

    Raises:
        ShapeError: `potential` is not a real vector with at least one site.
        DomainError: a value is not finite, or the absorption is not positive.

    Theorem: exact: either half line outside enters through its own Green function, the free root. `Im` of it is
        positive definite and its norm at most 1 / eta.
    Cost: O(sites^3).
    Source: Schur complement; docs/theory/theorems, theorem 5.
    """
    if potential.ndim != 1 or len(potential) == 0 or not potential.is_floating_point():
        raise ShapeError(f"potential is {potential.dtype} {list(potential.shape)}; expected a real vector [sites]")
    if not bool(torch.isfinite(potential).all()):
        raise DomainError("potential holds a value that is not finite; expected finite: look where it was computed")
    if not math.isfinite(energy):
        raise DomainError(f"energy is {energy}; expected a finite number")
    one = torch.ones((), dtype=torch.float64)
    lead = complex(free_root(-energy * one, absorption * one))  # names a bad absorption
    sites = len(potential)
    potential = potential.detach().double()
    diagonal = torch.complex(potential - energy, torch.full_like(potential, -absorption))
    diagonal[0] -= lead
    diagonal[-1] -= lead
    hopping = torch.ones(sites - 1, dtype=torch.complex128)
    return torch.linalg.inv(torch.diag(diagonal) + torch.diag(hopping, 1) + torch.diag(hopping, -1))


def weighted_norm(potential: Tensor, energy: float, absorption: float, *, exponent: float = 1.0) -> float:
    r"""Returns `||<X>^{-s} (H - E - i eta)^{-1} <X>^{-s}||` on the sites of the potential, X counted from their middle.

    Args:
        potential: v, real [sites], units of the hopping; pad it with zeros to weigh more of the line.
        energy: E, |E| < 2, same units.
        absorption: eta, finite and > 0.
        exponent: s > 1/2.

    Returns:
        The norm, at most 1 / eta and at most that of the whole line.

    Raises:
        ShapeError: `potential` is not a real vector with at least one site.
        DomainError: an energy at or outside a band edge, an exponent of 1/2 or less, or a value that is not finite.

    Theorem: for a potential of finite support and fixed |E| < 2 it stays bounded as eta -> 0: such a potential has no
        eigenvalue inside the band.
    Not claimed: one bound for all potentials. A site between two barriers b holds a level near -2 / b for a time of
        order b^2, and the norm there is about b^2 / 2.
    Cost: O(sites^3).
    Source: docs/theory/theorems, theorem 12.
    """
    if not abs(energy) < 2:
        raise DomainError(
            f"energy is {energy}; expected |energy| < 2, because limiting absorption fails at the band edges"
        )
    if not (math.isfinite(exponent) and exponent > 0.5):
        raise DomainError(f"exponent is {exponent}; expected finite and > 1/2, without which no bound holds: use 1")
    resolvent = line_resolvent(potential, energy, absorption)
    position = torch.arange(len(potential), dtype=torch.float64) - (len(potential) - 1) / 2
    weight = (1 + position.square()).pow(-exponent / 2)
    return float(torch.linalg.matrix_norm(weight[:, None] * resolvent * weight, ord=2))


def absorption_curve(potential: Tensor, energy: float, absorptions: Tensor, *, exponent: float = 1.0) -> Tensor:
    """Returns `weighted_norm` at every absorption, float64 [points]: flat towards 0 inside the band.

    Args:
        potential: v, real [sites], units of the hopping.
        energy: E, |E| < 2, same units.
        absorptions: eta, real [points], > 0.
        exponent: s > 1/2.

    Returns:
        float64 [points].

    Raises:
        ShapeError, DomainError: as `weighted_norm`.

    Cost: O(points * sites^3).
    Source: docs/theory/theorems, theorem 12.
    """
    if absorptions.ndim != 1 or len(absorptions) == 0:
        raise ShapeError(f"absorptions has shape {list(absorptions.shape)}; expected [points], at least one")
    norms = [weighted_norm(potential, energy, eta, exponent=exponent) for eta in absorptions.tolist()]
    return torch.tensor(norms, dtype=torch.float64)
