r"""Cheap bounds of the Schatten norms of batched media, the invariants of their Green functions, and spectral clipping.

    K = sign(V) |V|^{1/2} R |V|^{1/2},   R = (H - i Gamma - E)^{-1},   V = diag(v),   Gamma = diag(eta)
    ||K||_p <= || v / eta ||_p      for every 1 <= p <= infinity and Hermitian H

All functions work elementwise over [batch, time, heads] in the dtype they get: O(N), no scan, fit for a training hook.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError


class MediumReport(NamedTuple):
    """Extremes of one layer's media over batch, time and heads.

    Attributes:
        smallest_absorption: min eta, > 0, units of the hopping.
        largest_absorption: max eta, same units.
        largest_product: max |m| eta; at most 1 but for rounding.
        smallest_imaginary: min Im m; > 0.
        operator_bound: largest over sequences and heads of the bound of ||K|| (p = infinity).
        hilbert_schmidt_bound: the same for p = 2.
        trace_bound: the same for p = 1.
        violations: sites whose eta, Im m or |m| eta break the theorem by more than rounding, or are not finite.
    """

    smallest_absorption: float
    largest_absorption: float
    largest_product: float
    smallest_imaginary: float
    operator_bound: float
    hilbert_schmidt_bound: float
    trace_bound: float
    violations: int


class Clipping(NamedTuple):
    """A clipped potential and what that did.

    Attributes:
        potential: the projected potential, shape and dtype of the original.
        sites: how many sites moved.
        moved: l2 norm of the change over that of the potential, in [0, 1]; 0 for a zero potential.
    """

    potential: Tensor
    sites: int
    moved: float


def schatten_bound(potential: Tensor, absorption: Tensor, order: float = 2.0) -> Tensor:
    r"""Bound `|| v / eta ||_p` of the Schatten p-norm of the Birman-Schwinger operator, one a sequence and head.

    Args:
        potential: v, real [batch, time, heads], units of the hopping.
        absorption: eta, real [batch, time, heads], > 0, same units.
        order: p, in [1, infinity].

    Returns:
        real [batch, heads], dtype of the potential, without unit.

    Raises:
        ShapeError: shapes or dtypes that differ or are not real with three axes, or no element.
        DomainError: a value is not finite, some absorption is not positive, or an order below 1.

    Theorem: `Gamma^{1/2} R Gamma^{1/2}` is a contraction (with or without potential and lead), and Hoelder's inequality
        for the two factors `|v / eta|^{1/2}`.
    Cost: O(batch * time * heads).
    Source: docs/theory/theorems, theorems 2 and 13.
    """
    _check_medium(potential, absorption)
    if not order >= 1:
        raise DomainError(f"order is {order}; expected p in [1, infinity]: 2 for Hilbert-Schmidt")
    return torch.linalg.vector_norm(potential.detach() / absorption.detach(), ord=order, dim=1)


def medium_report(potential: Tensor, absorption: Tensor, real: Tensor, imag: Tensor) -> MediumReport:
    """Extremes of a layer's media, and how many sites break theorem 1; a fault is reported, not raised.

    Args:
        potential: v, real [batch, time, heads], units of the hopping.
        absorption: eta, same shape and units.
        real: Re m of the half-line Green function, same shape.
        imag: Im m, same shape.

    Returns:
        MediumReport; NaN where values are not finite, so that a hook can log the fault.

    Raises:
        ShapeError: shapes or dtypes that differ or are not real with three axes, or no element.

    Theorem 1: `Im m > 0` and `|m| eta <= 1`; eight roundings are granted.
    Cost: O(batch * time * heads).
    Source: docs/theory/theorems, theorem 1.
    """
    parts = {"potential": potential, "absorption": absorption, "real": real, "imag": imag}
    for name, part in parts.items():
        _check_shape(name, part, potential)
    v, eta, x, y = (part.detach() for part in parts.values())
    product = torch.hypot(x, y) * eta
    slack = 8 * torch.finfo(v.dtype).eps
    healthy = (eta > 0) & (y > 0) & (product <= 1 + slack) & torch.isfinite(v) & torch.isfinite(eta)
    ratio = v / eta
    norms = [torch.linalg.vector_norm(ratio, ord=order, dim=1).amax() for order in (math.inf, 2, 1)]
    values = torch.stack([eta.amin(), eta.amax(), product.amax(), y.amin(), *norms]).tolist()
    return MediumReport(*values, violations=int((~healthy).sum()))


def clip_potential(potential: Tensor, absorption: Tensor, limit: float, *, order: float = math.inf) -> Clipping:
    r"""Projection of a potential on `|| v / eta ||_p <= limit`, with its effect; opt-in, no model applies it.

    p = infinity clamps every site to `limit eta`, the nearest potential in l2. Other orders scale whole sequences, to
    a nearest potential in the norm `|| v / eta ||_p` itself.

    Args:
        potential: v, real [batch, time, heads], units of the hopping.
        absorption: eta, real [batch, time, heads], > 0, same units.
        limit: largest norm allowed, finite and > 0, without unit.
        order: p, in [1, infinity].

    Returns:
        Clipping; gradients take the factor of a scaled sequence for a constant.

    Raises:
        ShapeError, DomainError: as `schatten_bound`, or a limit that is not finite and positive.

    Theorem: afterwards `||K||_p <= limit` for every Hermitian H, but for rounding. Idempotent; no norm grows.
    Cost: O(batch * time * heads).
    Source: projection on a norm ball.
    """
    before = schatten_bound(potential, absorption, order)
    _check_limit(limit)
    if order == math.inf:
        clipped = torch.maximum(torch.minimum(potential, limit * absorption), -limit * absorption)
    else:
        clipped = potential * clip_factors(before, limit)[:, None]
    change = (clipped - potential).detach()
    whole = float(torch.linalg.vector_norm(potential.detach()))
    moved = float(torch.linalg.vector_norm(change)) / whole if whole else 0.0
    return Clipping(clipped, int((change != 0).sum()), moved)


def clip_factors(norms: Tensor, limit: float) -> Tensor:
    """Factors `min(1, limit / norm)` that bring norms of linear quantities within a limit.

    Args:
        norms: real, any shape, finite and >= 0.
        limit: finite and > 0.

    Returns:
        real in (0, 1], shape of `norms`.

    Raises:
        DomainError: a norm that is not finite or negative, a limit that is not finite and positive.

    Cost: O(1) per element.
    Source: radial projection.
    """
    _check_limit(limit)
    if not bool((torch.isfinite(norms) & (norms >= 0)).all()):
        raise DomainError("norms hold a value that is negative or not finite; expected norms: look upstream")
    return torch.where(norms > limit, limit / norms, torch.ones_like(norms))


def _check_limit(limit: float) -> None:
    if not (math.isfinite(limit) and limit > 0):
        raise DomainError(f"limit is {limit}; expected finite and > 0: leave clipping off for none")


def _check_medium(potential: Tensor, absorption: Tensor) -> None:
    for name, part in (("potential", potential), ("absorption", absorption)):
        _check_shape(name, part, potential)
        if not bool(torch.isfinite(part).all()):
            where = (~torch.isfinite(part)).nonzero()[0].tolist()
            raise DomainError(f"{name} at {where} is {part[tuple(where)].item()}; expected finite: look upstream")
    if not bool((absorption > 0).all()):
        where = (absorption <= 0).nonzero()[0].tolist()
        raise DomainError(f"absorption at {where} is {absorption[tuple(where)].item()}; expected > 0: add a floor")


def _check_shape(name: str, part: Tensor, like: Tensor) -> None:
    if part.dim() != 3 or part.numel() == 0 or not part.is_floating_point():
        raise ShapeError(f"{name} is {part.dtype} {list(part.shape)}; expected real [batch, time, heads], not empty")
    if part.shape != like.shape or part.dtype != like.dtype:
        raise ShapeError(
            f"{name} is {part.dtype} {list(part.shape)}; expected {like.dtype} {list(like.shape)}, as potential"
        )
