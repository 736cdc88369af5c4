r"""Theorems 7 and 8: the gradient of the half-line Green function, the flux gate and the bare transmission.

Throughout `alpha_i = delta_i - i eta_i`, m is the half-line Green function, `u_i = Im m_i` and G the causal kernel.
Dense and meant for study: memory is quadratic in the sites.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_bk.theory.bounds import Bound
from resnet_bk.theory.jacobi import checked_lead, green_kernel, half_line_green


def gradient_bound(detuning: Tensor, absorption: Tensor, lead: complex = 0j) -> Bound:
    """`sum_j eta_j |dm_i / d alpha_j|` against `u_i`, per site.

    Args:
        detuning: real [n], units of the hopping.
        absorption: real [n], > 0, same units.
        lead: m_0 with Im m_0 >= 0; 0 is a hard wall.

    Returns:
        Bound of float64 [n], an equality behind a hard wall.

    Raises:
        ShapeError, DomainError: as `half_line_green`.

    Theorem 7: `dm_i / d alpha_j = -m_i^2 ... m_j^2 = -G_ij^2`, so this is the Ward identity.
    Cost: O(n^2).
    Source: docs/theory/theorems, theorem 7.
    """
    m = half_line_green(detuning, absorption, lead)
    derivative = -green_kernel(m).square()
    return Bound.of(derivative.abs() @ absorption.detach().double(), m.imag)


def flux_kernel(detuning: Tensor, absorption: Tensor, lead: complex = 0j) -> Tensor:
    """Rows of the flux-normalised kernel with the lead's term first, float64 [n, n + 1].

        a_i = sqrt(u_{i-1} / (u_{i-1} + eta_i)),  b_i = sqrt(1 - a_i^2),  entry (i, j) = prod_{k=j+1..i} a_k . b_j

    Args:
        detuning: real [n], units of the hopping.
        absorption: real [n], > 0, same units.
        lead: m_0 with Im m_0 >= 0; 0 is a hard wall.

    Returns:
        Column 0 is the lead's `prod_{k<=i} a_k`, column j the source at site j (1-based), zero for j > i.

    Raises:
        ShapeError, DomainError: as `half_line_green`.

    Theorem 8: every row has l2 norm 1, and `a_i = |m_i| sqrt(u_{i-1} / u_i)`.
    Cost: O(n^2).
    Source: docs/theory/theorems, theorem 8.
    """
    u = half_line_green(detuning, absorption, lead).imag
    before = torch.cat([u.new_tensor([checked_lead(lead).imag]), u[:-1]])
    eta = absorption.detach().double()
    gate, source = (before / (before + eta)).sqrt(), (eta / (before + eta)).sqrt()
    kernel = u.new_zeros(len(u), len(u) + 1)
    row = u.new_zeros(len(u) + 1)
    row[0] = 1
    for i in range(len(u)):
        row = row * gate[i]
        row[i + 1] = source[i]
        kernel[i] = row
    return kernel


def transmission_bound(detuning: Tensor, absorption: Tensor, lead: complex = 0j) -> Bound:
    """The bare transmission `prod_{k=j+1..i} |m_k|` against `(eta_i eta_{j+1})^{-1/2}`, per pair j < i.

    Args:
        detuning: real [n], units of the hopping.
        absorption: real [n], > 0, same units.
        lead: m_0 with Im m_0 >= 0; 0 is a hard wall.

    Returns:
        Bound of float64 [n, n], entry (i, l) for l = j + 1; above the diagonal the value is 0.

    Raises:
        ShapeError, DomainError: as `half_line_green`.

    Theorem 8: it is `|G_{i,j+1}|`, and one term of the Ward identity is at most `u_i <= 1 / eta_i`.
    Not claimed: a transmission at most 1; adversarial potentials attain 1e4 at eta 1e-4.
    Cost: O(n^2).
    Source: docs/theory/theorems, theorem 8.
    """
    value = green_kernel(half_line_green(detuning, absorption, lead)).abs()
    root = absorption.detach().double().rsqrt()
    return Bound.of(value, root[:, None] * root)
