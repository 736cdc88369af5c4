r"""Birman-Schwinger operator, perturbation determinants, scattering phases and scattering matrix on the lattice.

    H_0 = tridiag(1, 0, 1),   H = H_0 + V,   R_0 = (H_0 - i Gamma - E)^{-1},   V = diag(v),   Gamma = diag(eta)

Everything is float64 or complex128, and no result carries a gradient. A `lead` subtracts m_0 from the first
diagonal entry of both operators; 0 is a hard wall.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.theory.jacobi import absorbing_jacobi, checked_lead, checked_sites, half_line_green


def birman_schwinger(potential: Tensor, energy: float, absorption: Tensor, lead: complex = 0j) -> Tensor:
    r"""Dense Birman-Schwinger operator `K = sign(V) |V|^{1/2} R_0 |V|^{1/2}`.

    Args:
        potential: v, real [n], units of the hopping.
        energy: E, same units.
        absorption: eta, real [n], > 0, same units.
        lead: m_0, with Im m_0 >= 0.

    Returns:
        complex128 [n, n].

    Raises:
        ShapeError: potential and absorption are not real vectors of one length >= 1.
        DomainError: a value is not finite, some absorption is not positive, or Im lead < 0.

    Theorem 9: `det(I + K)` is the perturbation determinant, never 0 at a real energy.
    Cost: O(n^3).
    Source: docs/theory/theorems, theorem 9.
    """
    potential, free, absorption, lead = _checked(potential, energy, absorption, lead)
    matrix = absorbing_jacobi(free, absorption)
    matrix[0, 0] -= lead
    root = potential.abs().sqrt()
    weighted = torch.linalg.solve(matrix, torch.diag(root).to(torch.complex128))
    return (potential.sign() * root)[:, None] * weighted


def log_perturbation_determinant(potential: Tensor, energy: float, absorption: Tensor, lead: complex = 0j) -> Tensor:
    r"""Logarithm of `det(I + K_i)` for every leading block, on the branch that the sites add up.

        log det(I + K_i) = sum_{k<=i} (log m0_k - log m_k),      m0: the half-line Green function with v = 0

    Args:
        potential: v, real [n], units of the hopping.
        energy: E, same units.
        absorption: eta, real [n], > 0, same units.
        lead: m_0, with Im m_0 >= 0.

    Returns:
        complex128 [n]; its imaginary part is pi times `spectral_shift`, its exponential `perturbation_determinant`.

    Raises:
        ShapeError: potential and absorption are not real vectors of one length >= 1.
        DomainError: a value is not finite, some absorption is not positive, or Im lead < 0.

    Theorem 9. Every logarithm is the principal one: both arguments lie in (0, pi), so no branch is crossed.
    Cost: O(n) work in 2 n sequential steps.
    Source: docs/theory/theorems, theorem 9.
    """
    free_green, green = _both_sweeps(potential, energy, absorption, lead)
    return (free_green.log() - green.log()).cumsum(0)


def perturbation_determinant(potential: Tensor, energy: float, absorption: Tensor, lead: complex = 0j) -> Tensor:
    r"""Perturbation determinant `det(I + K_i) = prod_{k<=i} m0_k / m_k` of every leading block.

    Args:
        potential: v, real [n], units of the hopping.
        energy: E, same units.
        absorption: eta, real [n], > 0, same units.
        lead: m_0, with Im m_0 >= 0.

    Returns:
        complex128 [n].

    Raises:
        ShapeError: potential and absorption are not real vectors of one length >= 1.
        DomainError: a value is not finite, some absorption is not positive, Im lead < 0, or the product leaves the
            range of float64 (`log_perturbation_determinant` does not).

    Theorem 9.
    Cost: O(n) work in 2 n sequential steps.
    Source: docs/theory/theorems, theorem 9.
    """
    free_green, green = _both_sweeps(potential, energy, absorption, lead)
    determinant = (free_green / green).cumprod(0)
    lost = ~torch.isfinite(determinant) | (determinant.abs() < torch.finfo(torch.float64).tiny)
    if lost.any():
        site = int(lost.nonzero()[0])
        raise DomainError(
            f"perturbation determinant at ({site},) is {determinant[site].item()}; expected a normal float64:"
            " use log_perturbation_determinant"
        )
    return determinant


def dense_log_determinant(operator: Tensor) -> Tensor:
    """Principal logarithm of `det(I + K)` of one dense K: the dense twin of `log_perturbation_determinant`.

    Args:
        operator: K, complex [n, n].

    Returns:
        complex128 scalar, imaginary part in (-pi, pi]; the sum over sites may differ by a multiple of 2 pi i.

    Raises:
        ShapeError: K is not a complex square matrix with n >= 1.
        DomainError: K holds a value that is not finite.

    Cost: O(n^3).
    Source: docs/theory/theorems, theorem 9.
    """
    shape = list(operator.shape)
    if operator.ndim != 2 or shape[0] != shape[1] or shape[0] == 0 or not operator.is_complex():
        raise ShapeError(f"operator is {operator.dtype} {shape}; expected complex [n, n], n >= 1: see birman_schwinger")
    if not torch.isfinite(operator).all():
        raise DomainError("operator has an entry that is not finite; expected finite: look where it was computed")
    identity = torch.eye(shape[0], dtype=torch.complex128, device=operator.device)
    sign, log_modulus = torch.linalg.slogdet(identity + operator.detach())
    return torch.complex(log_modulus, sign.angle())


def birman_schwinger_trace(potential: Tensor, energy: float, absorption: Tensor, lead: complex = 0j) -> Tensor:
    r"""Trace of the Birman-Schwinger operator of every leading block.

        tr K_i = -sum_{k<=i} d_k / m0_k,      d_k = m0_k^2 (d_{k-1} - v_k),      d_0 = 0

    d is the derivative of m along V at V = 0, so the sum is the derivative of `log det(I + K_i)` there.

    Args:
        potential: v, real [n], units of the hopping.
        energy: E, same units.
        absorption: eta, real [n], > 0, same units.
        lead: m_0, with Im m_0 >= 0.

    Returns:
        complex128 [n].

    Raises:
        ShapeError: potential and absorption are not real vectors of one length >= 1.
        DomainError: a value is not finite, some absorption is not positive, or Im lead < 0.

    Theorem 9. Not the running sum of the diagonal of the whole block's K, which depends on later sites.
    Cost: O(n) work in 2 n sequential steps.
    Source: docs/theory/theorems, theorem 9.
    """
    potential, free, absorption, lead = _checked(potential, energy, absorption, lead)
    trace, d, traces = 0j, 0j, []
    for v, m in zip(potential.tolist(), half_line_green(free, absorption, lead).tolist(), strict=True):
        d = m * m * (d - v)
        trace -= d / m
        traces.append(trace)
    return torch.tensor(traces, dtype=torch.complex128, device=potential.device)


def log_regularised_determinant(potential: Tensor, energy: float, absorption: Tensor, lead: complex = 0j) -> Tensor:
    r"""Logarithm of the regularised determinant `det_2(I + K_i) = det(I + K_i) e^{-tr K_i}` of every leading block.

    Args:
        potential: v, real [n], units of the hopping.
        energy: E, same units.
        absorption: eta, real [n], > 0, same units.
        lead: m_0, with Im m_0 >= 0.

    Returns:
        complex128 [n]; of second order in a small potential.

    Raises:
        ShapeError: potential and absorption are not real vectors of one length >= 1.
        DomainError: a value is not finite, some absorption is not positive, or Im lead < 0.

    Theorem 9.
    Not claimed: relative accuracy for a tiny potential, where two rounded terms cancel.
    Cost: O(n) work in 3 n sequential steps.
    Source: docs/theory/theorems, theorem 9.
    """
    log_determinant = log_perturbation_determinant(potential, energy, absorption, lead)
    return log_determinant - birman_schwinger_trace(potential, energy, absorption, lead)


def scattering_phase(potential: Tensor, energy: float, absorption: Tensor, lead: complex = 0j) -> Tensor:
    r"""Scattering phase of every site, `phi_i = arg m0_i - arg m_i`; causal.

    Args:
        potential: v, real [n], units of the hopping.
        energy: E, same units.
        absorption: eta, real [n], > 0, same units.
        lead: m_0, with Im m_0 >= 0.

    Returns:
        float64 [n], radians.

    Raises:
        ShapeError: potential and absorption are not real vectors of one length >= 1.
        DomainError: a value is not finite, some absorption is not positive, or Im lead < 0.

    Theorem 10: phi lies in (-pi, pi) without unwrapping, because both arguments lie in (0, pi).
    Not claimed: phi is not the argument of the full diagonal `G_ii`.
    Cost: O(n) work in 2 n sequential steps.
    Source: docs/theory/theorems, theorem 10.
    """
    free_green, green = _both_sweeps(potential, energy, absorption, lead)
    return free_green.angle() - green.angle()


def spectral_shift(potential: Tensor, energy: float, absorption: Tensor, lead: complex = 0j) -> Tensor:
    r"""Krein's spectral shift of every leading block, smoothed over the absorption: `xi_i = sum_{k<=i} phi_k / pi`.

    Args:
        potential: v, real [n], units of the hopping.
        energy: E, same units.
        absorption: eta, real [n], > 0, same units.
        lead: m_0, with Im m_0 >= 0.

    Returns:
        float64 [n], in eigenvalues: with a wall and constant eta, the smoothed number of eigenvalues of H_0 below E
        less that of H.

    Raises:
        ShapeError: potential and absorption are not real vectors of one length >= 1.
        DomainError: a value is not finite, some absorption is not positive, or Im lead < 0.

    Theorem 10.
    Cost: O(n) work in 2 n sequential steps.
    Source: docs/theory/theorems, theorem 10.
    """
    return scattering_phase(potential, energy, absorption, lead).cumsum(0) / math.pi


def scattering_matrix(potential: Tensor, energy: float, absorption: Tensor) -> Tensor:
    r"""On-shell scattering matrix `S = I + 2i Gamma^{1/2} (H - i Gamma - E)^{-1} Gamma^{1/2}` of the whole block.

    NOT causal: it holds the full resolvent.

    Args:
        potential: v, real [n], units of the hopping.
        energy: E, same units.
        absorption: eta, real [n], > 0, same units: every site is a channel of strength eta.

    Returns:
        complex128 [n, n], symmetric.

    Raises:
        ShapeError: potential and absorption are not real vectors of one length >= 1.
        DomainError: a value is not finite, or some absorption is not positive.

    Theorem 2: S is unitary. Birman-Krein: `det S = e^{-2 pi i xi_n} det S_0` with xi the spectral shift.
    Cost: O(n^3).
    Source: docs/theory/theorems, theorem 2.
    """
    potential, free, absorption, _ = _checked(potential, energy, absorption, 0j)
    coupling = torch.diag(absorption.sqrt()).to(torch.complex128)
    block = coupling @ torch.linalg.solve(absorbing_jacobi(potential + free, absorption), coupling)
    return torch.eye(len(potential), dtype=torch.complex128, device=potential.device) + 2j * block


def _both_sweeps(potential: Tensor, energy: float, absorption: Tensor, lead: complex) -> tuple[Tensor, Tensor]:
    potential, free, absorption, lead = _checked(potential, energy, absorption, lead)
    return half_line_green(free, absorption, lead), half_line_green(potential + free, absorption, lead)


def _checked(
    potential: Tensor, energy: float, absorption: Tensor, lead: complex
) -> tuple[Tensor, Tensor, Tensor, complex]:
    """The potential, the free detuning -E of every site, the absorption and the lead."""
    potential, absorption = checked_sites(potential, absorption, "potential")
    energy = float(energy)
    if not math.isfinite(energy):
        raise DomainError(f"energy is {energy}; expected finite: take it from the band |E| < 2 or near it")
    return potential, torch.full_like(potential, -energy), absorption, checked_lead(lead)
