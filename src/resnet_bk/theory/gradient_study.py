r"""Diagonal of the full resolvent with a choice of gradient: exact, or one of two approximations kept for study.

    alpha_i = detuning_i - i absorption_i,      G_ii = [(tridiag(1, alpha, 1))^{-1}]_ii      (NOT causal)
    exact       d alpha_j = -sum_i conj(G_ij)^2 g_i
    diagonal    d alpha_j = -conj(G_jj)^2 g_j           (forgets that every site moves every diagonal entry)
    heuristic   d alpha_j = -conj(G_jj)^-2 g_j          (a formula of an early prototype, no gradient of anything)

g is the cotangent of G as torch defines it, d/dRe + i d/dIm.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from resnet_bk.errors import DomainError, ShapeError

GradientBase = Literal["exact", "diagonal"]


def blended_full_diagonal(
    detuning: Tensor, absorption: Tensor, *, base: GradientBase = "exact", grad_blend: float = 0.0
) -> Tensor:
    """Diagonal of the full resolvent, with the gradient `(1 - grad_blend) base + grad_blend heuristic`; NOT causal.

    Args:
        detuning: potential minus energy, real [batch, sites, heads], float32 or float64, units of the hopping.
        absorption: > 0, the same shape, dtype and units.
        base: "exact", the true gradient, or "diagonal", only the terms i = j of it.
        grad_blend: weight of the heuristic, in [0, 1].

    Returns:
        complex64 or complex128 [batch, sites, heads]; the value does not depend on `base` and `grad_blend`.

    Raises:
        ShapeError: the arguments are not real tensors of one non-empty shape with three axes and one dtype.
        DomainError: a value is not finite, some absorption is not positive, an unknown base, a weight outside [0, 1].

    Theorem: with the defaults the gradient is exact: `dG_ii / d alpha_j = -G_ij^2` for all j. First derivatives only.
    Heuristic: everything else. Measured: gradient-study rows of the ledger.
    Cost: O(batch * sites * heads) work in 2 sites sequential steps, forward and backward.
    Source: docs/mathematics, "The operator", and docs/theory/theorems, theorem 7.
    """
    if base not in get_args(GradientBase):
        raise DomainError(f"base is {base!r}; expected one of {get_args(GradientBase)}: choose one of them")
    if not 0 <= grad_blend <= 1:
        raise DomainError(f"grad_blend is {grad_blend}; expected a weight in [0, 1]: 0 is the base alone")
    _check_medium(detuning, absorption)
    result: Any = _BlendedDiagonal.apply(detuning, absorption, base, grad_blend)
    return result


def gradient_cosine(first: list[Tensor], second: list[Tensor]) -> float:
    """Cosine of the angle between two lists of gradients taken as one vector each.

    Args:
        first: real tensors, at least one, not all zero.
        second: tensors of the same shapes, not all zero.

    Returns:
        float in [-1, 1].

    Raises:
        ShapeError: no tensors, or shapes that differ.
        DomainError: a value is not finite, or all values of one list are zero.

    Cost: linear in the numbers of elements.
    Source: definition.
    """
    if not first or [x.shape for x in first] != [x.shape for x in second]:
        raise ShapeError("gradients are empty or differ in shape; expected those of the same parameters, in one order")
    u, v = (torch.cat([x.detach().double().flatten() for x in part]) for part in (first, second))
    norms = float(u.norm() * v.norm())
    if not (math.isfinite(norms) and norms > 0):
        raise DomainError(f"product of the norms is {norms}; expected finite and > 0: a zero gradient has no direction")
    return max(-1.0, min(1.0, float(u @ v) / norms))


def relative_gradient_variance(samples: list[list[Tensor]]) -> float:
    """Variance of a gradient over batches against the squared norm of its mean, `sum_k |g_k - g|^2 / ((n - 1) |g|^2)`.

    Args:
        samples: for each of n >= 2 batches, the gradients of the same parameters.

    Returns:
        float >= 0, without unit: the noise over the signal of one batch.

    Raises:
        ShapeError: fewer than two batches, no tensors, or shapes that differ.
        DomainError: a value is not finite, or the mean is zero.

    Cost: linear in the numbers of elements.
    Source: definition.
    """
    shapes = [[x.shape for x in sample] for sample in samples]
    if len(samples) < 2 or not shapes[0] or any(shape != shapes[0] for shape in shapes):
        raise ShapeError("samples are fewer than two, empty or differ in shape; expected one list a batch")
    rows = torch.stack([torch.cat([x.detach().double().flatten() for x in sample]) for sample in samples])
    mean = rows.mean(0)
    signal, noise = float(mean.square().sum()), float((rows - mean).square().sum()) / (len(samples) - 1)
    if not (math.isfinite(signal + noise) and signal > 0):
        raise DomainError(f"squared norm of the mean gradient is {signal}; expected finite, > 0: take other batches")
    return noise / signal


class _BlendedDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, detuning: Tensor, absorption: Tensor, base: GradientBase, grad_blend: float) -> Tensor:
        alpha = torch.complex(detuning, -absorption)
        left, right = _sweep(alpha), _sweep(alpha.flip(1)).flip(1)
        zero = torch.zeros_like(alpha[:, :1])
        before, after = torch.cat((zero, left[:, :-1]), 1), torch.cat((right[:, 1:], zero), 1)
        diagonal = (alpha - before - after).reciprocal()
        ctx.save_for_backward(left, right, diagonal)
        ctx.base, ctx.grad_blend = base, grad_blend
        return diagonal

    @staticmethod
    @once_differentiable  # the saved sweeps are neither inputs nor outputs: a second derivative would miss them
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        left, right, diagonal = ctx.saved_tensors
        square = diagonal.conj().square()
        total = torch.zeros_like(diagonal)
        if ctx.grad_blend < 1:
            own = square * grads[0]
            if ctx.base == "exact":
                # G_ij = G_ii times the m between them up to sign; squares chain over the sites in between.
                from_right = _chain(own.flip(1), left.conj().square().flip(1)).flip(1)
                own = own + from_right + _chain(own, right.conj().square())
            total = (1 - ctx.grad_blend) * own
        if ctx.grad_blend > 0:
            total = total + ctx.grad_blend * grads[0] / square
        return -total.real, total.imag, None, None


def _sweep(alpha: Tensor) -> Tensor:
    """Half-line Green function along axis 1, hard wall."""
    m = torch.zeros_like(alpha[:, 0])
    found = []
    for site in alpha.unbind(1):
        m = (site - m).reciprocal()
        found.append(m)
    return torch.stack(found, 1)


def _chain(own: Tensor, factor: Tensor) -> Tensor:
    """What arrives from earlier sites along axis 1: `s_j = factor_j (own_{j-1} + s_{j-1})`, s_1 = 0."""
    running = torch.zeros_like(own[:, 0])
    found = [running]
    for source, multiplier in zip(own.unbind(1)[:-1], factor.unbind(1)[1:], strict=True):
        running = multiplier * (source + running)
        found.append(running)
    return torch.stack(found, 1)


def _check_medium(detuning: Tensor, absorption: Tensor) -> None:
    for name, part in (("detuning", detuning), ("absorption", absorption)):
        if part.dim() != 3 or part.numel() == 0 or part.dtype not in (torch.float32, torch.float64):
            raise ShapeError(
                f"{name} is {part.dtype} {list(part.shape)}; expected real [batch, sites, heads], not empty"
            )
        if not torch.isfinite(part).all():
            where = (~torch.isfinite(part)).nonzero()[0].tolist()
            raise DomainError(f"{name} at {where} is {part[tuple(where)].item()}; expected finite: look upstream")
    if detuning.shape != absorption.shape or detuning.dtype != absorption.dtype:
        raise ShapeError(
            f"absorption is {absorption.dtype} {list(absorption.shape)}; expected {detuning.dtype} "
            f"{list(detuning.shape)}, those of detuning: expand and convert it"
        )
    if not (absorption > 0).all():
        where = (absorption <= 0).nonzero()[0].tolist()
        raise DomainError(f"absorption at {where} is {absorption[tuple(where)].item()}; expected > 0: add a floor")
