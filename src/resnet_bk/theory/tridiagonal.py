"""The tridiagonal solve behind the resolvents: elimination without pivoting, O(N), with its exact adjoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class TridiagonalSolve(torch.autograd.Function):
    r"""x with `lower_{i-1} x_{i-1} + diagonal_i x_i + upper_i x_{i+1} = b_i`.

    Takes complex128 diagonal [n], lower and upper [n - 1], b [n, columns]; no pivot may vanish, which
    `Im diagonal < 0` ensures where `upper` is the conjugate of `lower`. The adjoint is one more solve:

        db = A^{-H} dx,   d diagonal_i = -db_i . conj(x_i)
        d lower_i = -db_{i+1} . conj(x_i),   d upper_i = -db_i . conj(x_{i+1})

    Cost: O(n columns) work in 2 n sequential steps.
    Source: Thomas algorithm.
    """

    @staticmethod
    def forward(ctx: Any, diagonal: Tensor, lower: Tensor, upper: Tensor, b: Tensor) -> Tensor:
        """The solution, complex128 [n, columns]."""
        below, above = lower.tolist(), upper.tolist()
        pivot, factors, pivots = 0j, [], []
        for i, alpha in enumerate(diagonal.tolist()):
            factor = below[i - 1] / pivot if i else 0j
            pivot = alpha - factor * above[i - 1] if i else alpha
            factors.append(factor)
            pivots.append(pivot)
        # Rows as arrays: one operation on all columns costs little more than one on a number.
        rows = list(b.detach().resolve_conj().cpu().numpy().copy())
        for i in range(1, len(rows)):
            rows[i] -= factors[i] * rows[i - 1]
        rows[-1] /= pivots[-1]
        for i in range(len(rows) - 2, -1, -1):
            rows[i] -= above[i] * rows[i + 1]
            rows[i] /= pivots[i]
        x = torch.from_numpy(np.stack(rows)).to(b.device)
        ctx.save_for_backward(diagonal, lower, upper, x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The adjoint of the docstring."""
        diagonal, lower, upper, x = ctx.saved_tensors
        b: Any = TridiagonalSolve.apply(diagonal.conj(), upper.conj(), lower.conj(), grads[0])
        conjugate = x.conj()
        return (
            -(b * conjugate).sum(1),
            -(b[1:] * conjugate[:-1]).sum(1),
            -(b[:-1] * conjugate[1:]).sum(1),
            b,
        )
