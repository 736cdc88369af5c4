r"""Theorems 1 to 4, the bounds of the half-line Green function, each as value, bound and slack.

Throughout `alpha_i = delta_i - i eta_i`, m is the half-line Green function, `u_i = Im m_i` and G the causal kernel;
"block" is the whole matrix `H - i Gamma - E`. Dense and meant for study: memory is quadratic in the sites.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_bk.errors import ShapeError
from resnet_bk.theory.jacobi import absorbing_jacobi, checked_sites, green_kernel, half_line_green


class Bound(NamedTuple):
    """A value, an upper bound of its modulus and their difference, float64 tensors of one shape."""

    value: Tensor
    bound: Tensor
    slack: Tensor

    @classmethod
    def of(cls, value: Tensor, bound: Tensor) -> Bound:
        """The bound with its slack, `bound - value`."""
        return cls(value, bound, bound - value)


def herglotz_bound(detuning: Tensor, absorption: Tensor, lead: complex = 0j) -> Bound:
    """`|m_i|` against `1 / eta_i`, per site.

    Args:
        detuning: potential minus energy, real [n], units of the hopping.
        absorption: real [n], > 0, same units.
        lead: m_0 with Im m_0 >= 0; 0 is a hard wall.

    Returns:
        Bound of float64 [n].

    Raises:
        ShapeError, DomainError: as `half_line_green`.

    Theorem 1: `u_i = |m_i|^2 (eta_i + u_{i-1}) > 0`, hence the bound.
    Cost: O(n) in n steps.
    Source: docs/theory/theorems, theorem 1.
    """
    m = half_line_green(detuning, absorption, lead)
    return Bound.of(m.abs(), absorption.detach().double().reciprocal())


def ward_bound(detuning: Tensor, absorption: Tensor, lead: complex = 0j) -> Bound:
    """`sum_{j<=i} eta_j |G_ij|^2` against `u_i`, per row.

    Args:
        detuning: real [n], units of the hopping.
        absorption: real [n], > 0, same units.
        lead: m_0 with Im m_0 >= 0; 0 is a hard wall.

    Returns:
        Bound of float64 [n]; the slack is exactly the flux through the lead, `prod_{k<=i} |m_k|^2 Im m_0`.

    Raises:
        ShapeError, DomainError: as `half_line_green`.

    Theorem 2: equality behind a hard wall.
    Cost: O(n^2).
    Source: docs/theory/theorems, theorem 2.
    """
    m = half_line_green(detuning, absorption, lead)
    return Bound.of(green_kernel(m).abs().square() @ absorption.detach().double(), m.imag)


def absorbed_row_bound(detuning: Tensor, absorption: Tensor, lead: complex = 0j) -> Bound:
    """`sum_{j<=i} 4 eta_i eta_j |G_ij|^2` against 4, per row.

    Args:
        detuning: real [n], units of the hopping.
        absorption: real [n], > 0, same units.
        lead: m_0 with Im m_0 >= 0; 0 is a hard wall.

    Returns:
        Bound of float64 [n].

    Raises:
        ShapeError, DomainError: as `half_line_green`.

    Theorem 2: the Ward identity and `u_i <= 1 / eta_i`.
    Cost: O(n^2).
    Source: docs/theory/theorems, theorem 2.
    """
    row = ward_bound(detuning, absorption, lead).value
    return Bound.of(4 * absorption.detach().double() * row, torch.full_like(row, 4))


def unitarity_defect(detuning: Tensor, absorption: Tensor) -> Tensor:
    """`||S* S - 1||` in operator norm, float64 scalar, zero to rounding.

        S = 1 + 2 i Gamma^{1/2} (H - i Gamma - E)^{-1} Gamma^{1/2}

    Args:
        detuning: real [n], units of the hopping.
        absorption: real [n], > 0, same units.

    Returns:
        The defect of the block's scattering matrix.

    Raises:
        ShapeError, DomainError: as `absorbing_jacobi`.

    Theorem 2: S is unitary.
    Cost: O(n^3).
    Source: docs/theory/theorems, theorem 2.
    """
    root = checked_sites(detuning, absorption)[1].sqrt()
    resolvent = torch.linalg.inv(absorbing_jacobi(detuning, absorption))
    one = torch.eye(len(root), dtype=torch.complex128, device=root.device)
    scattering = one + 2j * root[:, None] * resolvent * root
    return torch.linalg.matrix_norm(scattering.mH @ scattering - one, ord=2)


def hardy_bound(detuning: Tensor, absorption: Tensor, lead: complex = 0j) -> Bound:
    """`||2 Gamma^{1/2} L Gamma^{1/2}||_2` of the causal kernel L against 4, scalars.

    Args:
        detuning: real [n], units of the hopping.
        absorption: real [n], > 0, same units.
        lead: m_0 with Im m_0 >= 0; 0 is a hard wall.

    Returns:
        Bound of float64 scalars.

    Raises:
        ShapeError, DomainError: as `half_line_green`.

    Theorem 2: a weighted Hardy inequality.
    Cost: O(n^3).
    Source: docs/theory/theorems, theorem 2.
    """
    kernel = green_kernel(half_line_green(detuning, absorption, lead))
    root = absorption.detach().double().sqrt()
    norm = torch.linalg.matrix_norm(2 * root[:, None] * kernel * root, ord=2)
    return Bound.of(norm, torch.full_like(norm, 4))


def combes_thomas_bound(detuning: Tensor, absorption: Tensor) -> Bound:
    """`|G_ij|` against `(2 / eta) e^{-gamma |i-j|}`, eta = min eta_i and gamma = asinh(eta / 4), per entry.

    Args:
        detuning: real [n], units of the hopping.
        absorption: real [n], > 0, same units.

    Returns:
        Bound of float64 [n, n]; above the diagonal the value is 0. Hard wall.

    Raises:
        ShapeError, DomainError: as `half_line_green`.

    Theorem 3: uniform in length and potential.
    Cost: O(n^2).
    Source: docs/theory/theorems, theorem 3.
    """
    value = green_kernel(half_line_green(detuning, absorption)).abs()
    least = float(absorption.detach().double().min())
    position = torch.arange(len(value), dtype=torch.float64, device=value.device)
    return Bound.of(value, 2 / least * torch.exp(-math.asinh(least / 4) * (position[:, None] - position).abs()))


def row_sum_bound(detuning: Tensor, absorption: Tensor) -> Bound:
    """`sum_j |G_ij|` against `(2 / eta) / (1 - e^{-gamma})`, eta = min eta_i and gamma = asinh(eta / 4), per row.

    Args:
        detuning: real [n], units of the hopping.
        absorption: real [n], > 0, same units.

    Returns:
        Bound of float64 [n], the bound independent of n. Hard wall.

    Raises:
        ShapeError, DomainError: as `half_line_green`.

    Theorem 3: the geometric sum of `combes_thomas_bound`.
    Cost: O(n^2).
    Source: docs/theory/theorems, theorem 3.
    """
    value = green_kernel(half_line_green(detuning, absorption)).abs().sum(-1)
    least = float(absorption.detach().double().min())
    return Bound.of(value, torch.full_like(value, -2 / (least * math.expm1(-math.asinh(least / 4)))))


def block_perturbation_bound(
    detuning: Tensor, absorption: Tensor, other_detuning: Tensor, other_absorption: Tensor
) -> Bound:
    """`||G(alpha') - G(alpha)||` of the block against `max |alpha' - alpha| / (eta eta')`, scalars. NOT causal.

    Args:
        detuning: real [n], units of the hopping.
        absorption: real [n], > 0, same units.
        other_detuning: the perturbed detuning, real [n].
        other_absorption: the perturbed absorption, real [n], > 0.

    Returns:
        Bound of float64 scalars, in operator norm; eta and eta' are the least absorptions.

    Raises:
        ShapeError, DomainError: as `absorbing_jacobi`, or the two media differ in length.

    Theorem 4: the resolvent identity.
    Cost: O(n^3).
    Source: docs/theory/theorems, theorem 4.
    """
    bound = _perturbation(detuning, absorption, other_detuning, other_absorption)
    first = torch.linalg.inv(absorbing_jacobi(detuning, absorption))
    second = torch.linalg.inv(absorbing_jacobi(other_detuning, other_absorption))
    return Bound.of(torch.linalg.matrix_norm(second - first, ord=2), bound)


def causal_perturbation_bound(
    detuning: Tensor, absorption: Tensor, other_detuning: Tensor, other_absorption: Tensor
) -> Bound:
    """The l2 norm of each row of `L(alpha') - L(alpha)` against `max |alpha' - alpha| / (eta eta')`, per row.

    Args:
        detuning: real [n], units of the hopping.
        absorption: real [n], > 0, same units.
        other_detuning: the perturbed detuning, real [n].
        other_absorption: the perturbed absorption, real [n], > 0.

    Returns:
        Bound of float64 [n]; L is the causal kernel behind a hard wall, eta and eta' the least absorptions.

    Raises:
        ShapeError, DomainError: as `half_line_green`, or the two media differ in length.

    Theorem 4: row i of L is a row of the i-th leading block's resolvent.
    Not claimed: the same constant for the operator norm of L (ratios to 1.95 occur).
    Cost: O(n^2).
    Source: docs/theory/theorems, theorem 4.
    """
    bound = _perturbation(detuning, absorption, other_detuning, other_absorption)
    first = green_kernel(half_line_green(detuning, absorption))
    second = green_kernel(half_line_green(other_detuning, other_absorption))
    value = torch.linalg.vector_norm(second - first, dim=-1)
    return Bound.of(value, bound.expand_as(value))


def _perturbation(detuning: Tensor, absorption: Tensor, other_detuning: Tensor, other_absorption: Tensor) -> Tensor:
    """`max |alpha' - alpha| / (min eta min eta')`, after the checks, float64 scalar."""
    first = checked_sites(detuning, absorption)
    second = checked_sites(other_detuning, other_absorption, "other_detuning")
    if first[0].shape != second[0].shape:
        raise ShapeError(
            f"other_detuning has shape {list(other_detuning.shape)}; expected {list(detuning.shape)}, that of detuning:"
            " compare media of one length"
        )
    change = torch.complex(second[0] - first[0], second[1] - first[1]).abs().max()
    return change / (first[1].min() * second[1].min())
