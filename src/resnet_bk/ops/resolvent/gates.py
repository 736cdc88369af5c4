"""Closed-form functions of the half-line Green function: leads, gates and scattering phases. Elementwise, no scan."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def semiclassical_root(
    detuning: Float[Tensor, "*shape"], absorption: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    r"""Log modulus and argument of the decaying root m of m^2 - (detuning - i absorption) m + 1 = 0.

    The reflectionless (WKB) approximation to the half-line Green function: m = exp(-arccosh(alpha / 2)).

    Args:
        detuning: potential minus energy, real, units of the hopping.
        absorption: > 0, same units.

    Returns:
        log|m| < 0 and arg m in (0, pi), in the inputs' precision.

    Theorem: |m| < 1; at detuning 0, log|m| = -asinh(absorption / 2).
    Source: docs/theory/theorems, theorem 5; Kahan's arccosh, whose square roots are taken without
        cancellation (detuning 1e4 is exact).
    """
    below = _principal_root(detuning / 2 - 1, absorption / 2)
    above = _principal_root(detuning / 2 + 1, absorption / 2)
    log_modulus = -torch.asinh(below[0] * above[0] + below[1] * above[1])
    return log_modulus, 2 * torch.atan2(below[1], above[0])


def _principal_root(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Real parts a and b > 0 with (a - i b)^2 = x - i y, for y > 0."""
    right = x >= 0
    # Not x.abs(): its derivative at a band edge (x = 0) is zero, which is not the root's.
    large = torch.sqrt((torch.hypot(x, y) + torch.where(right, x, -x)) / 2)
    small = y / (2 * large)
    return torch.where(right, large, small), torch.where(right, small, large)


def decaying_root(
    detuning: Float[Tensor, "*shape"], absorption: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    r"""Real and imaginary part of the decaying root m: the Green function of a half-line of equal sites (a lead).

    Theorem: |m| < 1 and Im m > 0. Exact to rounding of |m|; the imaginary part to rounding of itself.
    Source: m = 2 / w^2 with w = sqrt(alpha / 2 + 1) + sqrt(alpha / 2 - 1), a sum without cancellation.
    """
    half = detuning / 2
    # 1 / w = x + i y; both are positive, so no sine of an angle near pi loses the sign of Im m.
    x, y = (part.sum(0) for part in _principal_root(torch.stack((half - 1, half + 1)), absorption / 2))
    square = x * x + y * y
    x, y = x / square, y / square
    return 2 * (x - y) * (x + y), 4 * x * y


def flux_gate(
    previous_imag: Float[Tensor, "batch time heads"], absorption: Float[Tensor, "batch time heads"]
) -> tuple[Float[Tensor, "batch time heads"], Float[Tensor, "batch time heads"]]:
    r"""Log decay log a_t and weight b_t = sqrt(1 - a_t^2) of the flux-normalised transmission.

        a_t = |m_t| sqrt(u_{t-1} / u_t)

    Args:
        previous_imag: u_{t-1} = Im m_{t-1} >= 0, the imaginary part one site earlier.
        absorption: > 0.

    Returns:
        log a_t <= 0 and b_t in [0, 1]. Where u_{t-1} = 0 (a hard wall; nothing lies behind it) log a is 0 and b is 1.

    Theorem: rows of the kernel prod_{k=j+1..t} a_k b_j have unit l2 norm, for every input.
    Source: docs/theory/theorems, theorem 8: a_t^2 = u_{t-1} / (u_{t-1} + absorption_t).
    """
    wall = previous_imag == 0
    log_decay = -0.5 * torch.log1p(absorption / torch.where(wall, torch.inf, previous_imag))
    return log_decay, torch.rsqrt(1 + previous_imag / absorption)


def previous_imag(
    imag: Float[Tensor, "batch time heads"], first: Float[Tensor, "*rows heads"], cu_seqlens: Tensor | None
) -> Float[Tensor, "batch time heads"]:
    """Im m one site earlier; before a sequence or packed document starts it is that row of `first`, or `first`."""
    first = first.expand(imag.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1, -1)
    if cu_seqlens is None:
        return torch.cat((first[:, None], imag[:, :-1]), dim=1)
    shifted = torch.cat((imag[:, :1], imag[:, :-1]), dim=1)
    return shifted.index_copy(1, cu_seqlens[:-1].long(), first[None].to(imag.dtype))


def scattering_phase(m: tuple[Tensor, Tensor], free: tuple[Tensor, Tensor]) -> Float[Tensor, "batch time heads"]:
    """Scattering phase arg m0 - arg m per site, in (-pi, pi), of m against the potential-free `free` = m0.

    Both are pairs (real, imaginary part) with positive imaginary part, so no unwrapping is needed.
    Source: docs/theory/theorems, theorem 10.
    """
    return torch.atan2(free[1], free[0]) - torch.atan2(m[1], m[0])
