"""The half-line Green function by the plain sequential sweep, in the input's precision; gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_resolvent_reference(
    detuning: Tensor,
    absorption: Tensor,
    initial_real: Tensor,
    initial_imag: Tensor,
    bounds: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of m [batch, time, heads].

    `initial_*` is [batch, heads], or [documents, heads] when `bounds` gives the document boundaries.
    """
    alpha = torch.complex(detuning, -absorption)
    lead = torch.complex(initial_real, initial_imag)
    starts = {} if bounds is None else {start: lead[row : row + 1] for row, start in enumerate(bounds[:-1])}
    m = lead
    sites = []
    for t in range(alpha.shape[1]):
        m = 1 / (alpha[:, t] - starts.get(t, m))
        sites.append(m)
    stacked = torch.stack(sites, dim=1)
    return stacked.real, stacked.imag
