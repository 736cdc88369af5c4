"""The resolvent of an absorbing Jacobi matrix, in O(N): the causal half-line form and the two-sided diagonal."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.ops.dispatch import Backend, choose_backend, compute_dtype, document_boundaries
from resnet_bk.ops.resolvent.chunked import causal_resolvent_op
from resnet_bk.ops.resolvent.gates import decaying_root, flux_gate, scattering_phase, semiclassical_root
from resnet_bk.ops.resolvent.reference import causal_resolvent_reference

__all__ = [
    "GreenState",
    "causal_resolvent",
    "decaying_root",
    "flux_gate",
    "full_resolvent_diagonal",
    "scattering_phase",
    "semiclassical_root",
]


class GreenState(NamedTuple):
    """The half-line Green function at one site: all that later sites need to know of earlier ones."""

    real: Float[Tensor, "rows heads"]
    imag: Float[Tensor, "rows heads"]


def causal_resolvent(
    detuning: Float[Tensor, "batch time heads"],
    absorption: Float[Tensor, "batch time heads"],
    *,
    initial: GreenState | None = None,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    backend: Backend = "auto",
) -> tuple[tuple[Float[Tensor, "batch time heads"], Float[Tensor, "batch time heads"]], GreenState]:
    r"""Half-line Green function of every leading block of an absorbing Jacobi matrix.

        m_t = 1 / (detuning_t - i absorption_t - m_{t-1}),   m_0 = 0 unless `initial` says otherwise

    Args:
        detuning: potential minus energy, real, in units of the hopping; |detuning| up to 1e15.
        absorption: imaginary part of the spectral parameter, > 0, same units.
        initial: m_0, [batch, heads] or [heads] each ([documents, heads] with `cu_seqlens`), imaginary part >= 0.
        cu_seqlens: boundaries 0 = b_0 < ... < b_documents = time of documents packed along time (batch 1); every
            document starts from its own m_0.
        backend: "reference" is the sequential sweep, "chunked" the three-pass form on any device.

    Returns:
        Real and imaginary part of m, float32 or wider, and the state that continues the sweep (one row a document
        with `cu_seqlens`).

    Raises:
        ShapeError: shapes differ or do not broadcast; boundaries that do not cover the tokens.
        DomainError: some absorption <= 0 or not finite, detuning not finite, Im m_0 < 0 (names the first index).
        BackendError: an unknown backend.

    Theorem: Im m_t > 0 and |m_t| <= 1/absorption_t; the adjoint is exact and O(N).
    Not claimed: m_t is not the diagonal of the full resolvent, which also depends on later sites.
    Cost: O(batch * time * heads) work and memory; about 3 sqrt(time) steps of the Python loops.
    Source: Schur complement; DERIVATION.md.
    """
    chosen = choose_backend(backend, detuning, kernels=False)
    dtype = compute_dtype(detuning, absorption)
    if detuning.dim() != 3 or detuning.shape != absorption.shape:
        raise ShapeError(
            "detuning and absorption must have one shape [batch, time, heads]; got "
            f"{list(detuning.shape)} and {list(absorption.shape)}."
        )
    batch, time, heads = detuning.shape
    if 0 in detuning.shape:
        raise ShapeError(f"detuning and absorption must not be empty; got {list(detuning.shape)}.")
    bounds = None if cu_seqlens is None else document_boundaries(cu_seqlens, batch, time)
    rows = batch if bounds is None else len(bounds) - 1
    delta, eta = detuning.to(dtype), absorption.to(dtype)
    if initial is None:
        initial = GreenState(delta.new_zeros(rows, heads), delta.new_zeros(rows, heads))
    try:
        lead = [part.to(dtype).broadcast_to(rows, heads).contiguous() for part in initial]
    except RuntimeError as error:
        raise ShapeError(
            f"initial must be [{heads}] or [{rows}, {heads}] in both parts; got "
            f"{list(initial[0].shape)} and {list(initial[1].shape)}."
        ) from error
    if not torch.compiler.is_compiling():
        _check_domain(detuning, absorption, lead)
    if chosen == "reference":
        real, imag = causal_resolvent_reference(delta, eta, lead[0], lead[1], bounds)
    elif time == 1:  # decoding: nothing to cut into chunks
        real, imag = _reciprocal(delta - lead[0][:, None], eta + lead[1][:, None])
    else:
        starts = None if bounds is None else torch.tensor(bounds[:-1], device=delta.device)
        real, imag = causal_resolvent_op(delta, eta, lead[0], lead[1], starts)
    if bounds is None:
        # Copies: a view would keep m of all sites alive for as long as the state.
        state = GreenState(real[:, -1].clone(), imag[:, -1].clone())
    else:
        last = torch.tensor(bounds[1:], device=delta.device) - 1
        state = GreenState(real[0, last], imag[0, last])
    return (real, imag), state


def full_resolvent_diagonal(
    detuning: Float[Tensor, "batch sites heads"],
    absorption: Float[Tensor, "batch sites heads"],
    *,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "batch sites heads"], Float[Tensor, "batch sites heads"]]:
    r"""NOT causal: diagonal of the full resolvent, in which every site sees every later one.

        G_ii = 1 / (detuning_i - i absorption_i - m^left_{i-1} - m^right_{i+1})

    For bidirectional models, masked tasks and theory. A next-token model that uses it reads its own targets.

    Args:
        detuning: potential minus energy, real, in units of the hopping.
        absorption: imaginary part of the spectral parameter, > 0, same units.
        backend: as in `causal_resolvent`.

    Returns:
        Real and imaginary part of G_ii, float32 or wider. Gradients reach all sites: dG_ii/dv_j = -G_ij G_ji.

    Raises:
        ShapeError, DomainError, BackendError: as in `causal_resolvent`.

    Theorem: Im G_ii > 0 and |G_ii| <= 1 / min absorption.
    Cost: two causal sweeps.
    Source: MATH (4); DERIVATION.md.
    """
    (left_real, left_imag), _ = causal_resolvent(detuning, absorption, backend=backend)
    (right_real, right_imag), _ = causal_resolvent(detuning.flip(1), absorption.flip(1), backend=backend)
    zero = left_real.new_zeros(left_real.shape[0], 1, left_real.shape[2])
    before_real, before_imag = (torch.cat((zero, part[:, :-1]), 1) for part in (left_real, left_imag))
    after_real, after_imag = (torch.cat((part.flip(1)[:, 1:], zero), 1) for part in (right_real, right_imag))
    return _reciprocal(detuning - before_real - after_real, absorption + before_imag + after_imag)


def _reciprocal(real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of 1 / (real - i imag)."""
    square = real * real + imag * imag
    return real / square, imag / square


def _check_domain(detuning: Tensor, absorption: Tensor, initial: list[Tensor]) -> None:
    """Raise `DomainError` at the first site outside the operator's domain."""
    # Two reductions each, and a search only when one of them fails; NaN fails every comparison.
    if not (absorption.min() > 0 and absorption.max() < torch.inf):
        where = ~((absorption > 0) & absorption.isfinite())
        index = where.nonzero()[0].tolist()
        raise DomainError(
            f"absorption is {absorption[tuple(index)].item()} at [batch, time, head] = {index}; expected a finite "
            "number > 0. Add a floor (softplus(...) + 1e-3) or look for NaN upstream."
        )
    if not (detuning.min() > -torch.inf and detuning.max() < torch.inf):
        index = (~detuning.isfinite()).nonzero()[0].tolist()
        raise DomainError(
            f"detuning is {detuning[tuple(index)].item()} at [batch, time, head] = {index}; expected a finite number. "
            "Look for NaN or overflow upstream."
        )
    real, imag = initial
    if not (imag.min() >= 0 and imag.max() < torch.inf and real.isfinite().all()):
        index = (~(real.isfinite() & imag.isfinite() & (imag >= 0))).nonzero()[0].tolist()
        row, head = index
        raise DomainError(
            f"initial is {real[row, head].item()} + {imag[row, head].item()}i at [row, head] = {index}; expected "
            "finite numbers with imaginary part >= 0: a state returned earlier, or `decaying_root`."
        )
