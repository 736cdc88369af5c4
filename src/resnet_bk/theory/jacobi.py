r"""Absorbing Jacobi matrices and their Green functions, in float64 and complex128.

    alpha_i = delta_i - i eta_i,      H - i Gamma - E = tridiag(1, alpha, 1),      eta_i > 0

The routines that sweep run over Python numbers: linear in the number of sites, and no result carries a gradient.
"""

from __future__ import annotations

import cmath
import sys

import torch
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError

# Below it the reciprocal, which bounds |m|, is not a float64.
_SMALLEST_ABSORPTION = sys.float_info.min


def absorbing_jacobi(detuning: Tensor, absorption: Tensor) -> Tensor:
    """Dense `H - i Gamma - E`: diagonal `detuning - i absorption`, off-diagonals 1.

    Args:
        detuning: potential minus energy, real [n], units of the hopping.
        absorption: imaginary part of the spectral parameter, real [n], > 0, same units.

    Returns:
        complex128 [n, n], symmetric and not Hermitian.

    Raises:
        ShapeError: the arguments are not real vectors of one length >= 1.
        DomainError: a value is not finite, or some absorption is not positive.

    Cost: O(n^2) memory; the dense twin of the sweeps, for small n.
    Source: docs/mathematics, "The operator".
    """
    detuning, absorption = checked_sites(detuning, absorption)
    matrix = torch.diag(torch.complex(detuning, -absorption))
    neighbour = torch.ones(len(detuning) - 1, dtype=torch.complex128, device=detuning.device)
    return matrix + torch.diag(neighbour, 1) + torch.diag(neighbour, -1)


def half_line_green(detuning: Tensor, absorption: Tensor, lead: complex = 0j) -> Tensor:
    r"""Last diagonal entry of the resolvent of every leading block.

        m_i = [(H_i - i Gamma_i - E)^{-1}]_{ii} = 1 / (delta_i - i eta_i - m_{i-1}),      m_0 = lead

    Args:
        detuning: potential minus energy, real [n], units of the hopping.
        absorption: imaginary part of the spectral parameter, real [n], > 0, same units.
        lead: m_0, with Im m_0 >= 0; 0 is a hard wall.

    Returns:
        complex128 [n].

    Raises:
        ShapeError: the arguments are not real vectors of one length >= 1.
        DomainError: a value is not finite, some absorption is not positive, or Im lead < 0.

    Theorem 1: `Im m_i = |m_i|^2 (eta_i + Im m_{i-1}) > 0` and `|m_i| <= 1 / eta_i`.
    Cost: O(n) work in n sequential steps.
    Source: Schur complement; docs/mathematics, "The operator".
    """
    detuning, absorption = checked_sites(detuning, absorption)
    m = _sweep(torch.complex(detuning, -absorption).tolist(), checked_lead(lead))
    return torch.tensor(m, dtype=torch.complex128, device=detuning.device)


def green_kernel(m: Tensor) -> Tensor:
    r"""Dense causal Green kernel of a half-line Green function.

        G_ij = [(H_i - i Gamma_i - E)^{-1}]_{ij} = (-1)^{i-j} m_i m_{i-1} ... m_j      (j <= i),      0 above

    Args:
        m: half-line Green function, complex [n].

    Returns:
        complex128 [n, n], lower triangular.

    Raises:
        ShapeError: `m` is not a complex vector of length >= 1.
        DomainError: `m` holds a value that is not finite.

    Theorem 2 (hard wall): `sum_{j<=i} eta_j |G_ij|^2 = Im m_i`.
    Cost: O(n^2).
    Source: docs/mathematics, "The operator".
    """
    if m.ndim != 1 or len(m) == 0 or not m.is_complex():
        raise ShapeError(f"m is {m.dtype} {list(m.shape)}; expected complex [n], n >= 1: pass half_line_green's result")
    m = m.detach().to(torch.complex128)
    _check_finite("m", m)
    kernel = torch.zeros(len(m), len(m), dtype=torch.complex128, device=m.device)
    for i in range(len(m)):
        if i > 0:
            kernel[i, :i] = -m[i] * kernel[i - 1, :i]
        kernel[i, i] = m[i]
    return kernel


def full_green_diagonal(detuning: Tensor, absorption: Tensor) -> Tensor:
    r"""Diagonal of the resolvent of the whole block; NOT causal, every entry depends on later sites.

        G_ii = 1 / (delta_i - i eta_i - mL_{i-1} - mR_{i+1}),      mL, mR: half-line sweeps from either end, hard walls

    Args:
        detuning: potential minus energy, real [n], units of the hopping.
        absorption: imaginary part of the spectral parameter, real [n], > 0, same units.

    Returns:
        complex128 [n], with `Im G_ii > 0` and `|G_ii| <= 1 / eta_i`.

    Raises:
        ShapeError: the arguments are not real vectors of one length >= 1.
        DomainError: a value is not finite, or some absorption is not positive.

    Cost: O(n) work in 2 n sequential steps.
    Source: docs/mathematics, "The operator".
    """
    detuning, absorption = checked_sites(detuning, absorption)
    alpha = torch.complex(detuning, -absorption).tolist()
    before = [0j, *_sweep(alpha, 0j)[:-1]]
    after = [0j, *_sweep(alpha[::-1], 0j)[:-1]][::-1]
    diagonal = [1 / (a - left - right) for a, left, right in zip(alpha, before, after, strict=True)]
    return torch.tensor(diagonal, dtype=torch.complex128, device=detuning.device)


def free_root(detuning: Tensor, absorption: Tensor) -> Tensor:
    r"""Stationary half-line Green function of a constant medium: the root of modulus below 1.

        m^2 - alpha m + 1 = 0,      m = 1 / (alpha/2 + sqrt(alpha/2 - 1) sqrt(alpha/2 + 1))

    Both terms of the sum have imaginary parts of one sign and real parts of one sign, so nothing cancels.

    Args:
        detuning: potential minus energy, real, any shape, units of the hopping.
        absorption: imaginary part of the spectral parameter, > 0, the same shape and units.

    Returns:
        complex128 in the shape of the arguments, with `Im m > 0`.

    Raises:
        ShapeError: the arguments are not real tensors of one shape with at least one element.
        DomainError: a value is not finite, or some absorption is not positive.

    Theorem 5: `|m| < 1` (to rounding, where the exact 1 - |m| is below it); at detuning 0, `|m| = e^{-asinh(eta/2)}`.
    Cost: O(1) per element.
    Source: docs/theory/theorems, theorem 5.
    """
    _check_pair(detuning, absorption, "detuning")
    half = torch.complex(detuning.detach().double(), -absorption.detach().double()) / 2
    return (half + torch.sqrt(half - 1) * torch.sqrt(half + 1)).reciprocal()


def checked_sites(values: Tensor, absorption: Tensor, name: str = "detuning") -> tuple[Tensor, Tensor]:
    """Both arguments in float64 without gradient, after the checks that every function of sites shares.

    Args:
        values: real [n], finite.
        absorption: real [n], > 0 and finite.
        name: what the messages call `values`.

    Returns:
        `values` and `absorption`, float64 [n].

    Raises:
        ShapeError: the arguments are not real vectors of one length >= 1.
        DomainError: a value is not finite, or some absorption is not positive.
    """
    if values.ndim != 1:
        raise ShapeError(f"{name} has shape {list(values.shape)}; expected [n]: pass one sequence of sites at a time")
    _check_pair(values, absorption, name)
    return values.detach().double(), absorption.detach().double()


def checked_lead(lead: complex) -> complex:
    """The lead m_0 as a Python complex number.

    Args:
        lead: m_0, finite, with Im m_0 >= 0.

    Returns:
        `complex(lead)`.

    Raises:
        DomainError: the lead is not finite, or its imaginary part is negative.
    """
    lead = complex(lead)
    if not cmath.isfinite(lead) or lead.imag < 0:
        raise DomainError(f"lead is {lead}; expected finite with Im >= 0: 0 for a hard wall, free_root for a medium")
    return lead


def _sweep(alpha: list[complex], m: complex) -> list[complex]:
    result = []
    for a in alpha:
        m = 1 / (a - m)
        result.append(m)
    return result


def _check_pair(values: Tensor, absorption: Tensor, name: str) -> None:
    for field, tensor in ((name, values), ("absorption", absorption)):
        if not tensor.is_floating_point():
            raise ShapeError(f"{field} has dtype {tensor.dtype}; expected real floating point: convert it to float64")
        if tensor.numel() == 0:
            raise ShapeError(
                f"{field} has shape {list(tensor.shape)}; expected at least one site: drop empty sequences"
            )
    if values.shape != absorption.shape:
        raise ShapeError(
            f"absorption has shape {list(absorption.shape)}; expected {list(values.shape)}, that of {name}: expand it"
        )
    _check_finite(name, values)
    _check_finite("absorption", absorption)
    bad = absorption < _SMALLEST_ABSORPTION
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise DomainError(
            f"absorption at {first} is {absorption[first].item()}; expected >= {_SMALLEST_ABSORPTION}:"
            " at zero absorption the resolvent may not exist, so add a floor"
        )


def _check_finite(name: str, tensor: Tensor) -> None:
    bad = ~torch.isfinite(tensor)
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise DomainError(f"{name} at {first} is {tensor[first].item()}; expected finite: look where it was computed")
