"""The resolvent of an absorbing Jacobi matrix, in O(N): the causal half-line form and the two-sided diagonal."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.ops.dispatch import Backend, choose_backend, compute_dtype, document_boundaries
from resnet_bk.ops.resolvent.chunked import causal_resolvent_op
from resnet_bk.ops.resolvent.gates import (
    decaying_root,
    flux_gate,
    previous_imag,
    scattering_phase,
    semiclassical_root,
)
from resnet_bk.ops.resolvent.reference import causal_resolvent_reference

__all__ = [
    "GreenState",
    "causal_resolvent",
    "decaying_root",
    "flux_gate",
    "flux_gates",
    "full_resolvent_diagonal",
    "previous_imag",
    "scattering_phase",
    "semiclassical_root",
]


Source = Literal["gated", "free", "unit"]


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
    check: bool = True,
) -> tuple[tuple[Float[Tensor, "batch time heads"], Float[Tensor, "batch time heads"]], GreenState]:
    r"""Half-line Green function of every leading block of an absorbing Jacobi matrix.

        m_t = 1 / (detuning_t - i absorption_t - m_{t-1}),   m_0 = 0 unless `initial` says otherwise

    Args:
        detuning: potential minus energy, real, in units of the hopping; |detuning| up to 1e15.
        absorption: imaginary part of the spectral parameter, > 0, same units.
        initial: m_0, [batch, heads] or [heads] each ([documents, heads] with `cu_seqlens`), imaginary part >= 0.
        cu_seqlens: boundaries 0 = b_0 < ... < b_documents = time of documents packed along time (batch 1); every
            document starts from its own m_0.
        backend: "reference" is the sequential sweep, "chunked" the three-pass form on any device, "triton" its kernels.
        check: look whether the values lie in the domain; whoever knows it saves a wait for the device.

    Returns:
        Real and imaginary part of m, float32 or wider, and the state that continues the sweep (one row a document
        with `cu_seqlens`).

    Raises:
        ShapeError: shapes differ or do not broadcast; boundaries that do not cover the tokens.
        DomainError: some absorption <= 0 or not finite, detuning not finite, Im m_0 < 0 (names the first index).
            Looking waits for the device, so nothing is looked at while compiling or capturing a CUDA graph.
        BackendError: an unknown backend, or one that cannot run here.

    Theorem: Im m_t > 0 and |m_t| <= 1/absorption_t; the adjoint is exact and O(N).
    Not claimed: m_t is not the diagonal of the full resolvent, which also depends on later sites.
    Cost: O(batch * time * heads) work and memory; chunked: about 3 sqrt(time) steps of the Python loops.
    Source: Schur complement; DERIVATION.md.
    """
    dtype = compute_dtype(detuning, absorption)
    chosen = choose_backend(backend, absorption if absorption.dtype == dtype else detuning)
    if detuning.dim() != 3 or detuning.shape != absorption.shape:
        raise ShapeError(
            "detuning and absorption must have one shape [batch, time, heads]; got "
            f"{list(detuning.shape)} and {list(absorption.shape)}."
        )
    batch, time, heads = detuning.shape
    if 0 in detuning.shape:
        raise ShapeError(f"detuning and absorption must not be empty; got {list(detuning.shape)}.")
    bounds = _boundaries(cu_seqlens, batch, time, needed=chosen != "triton")
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    delta, eta = detuning.to(dtype), absorption.to(dtype)
    if initial is None:
        initial = GreenState(delta.new_zeros(rows, heads), delta.new_zeros(rows, heads))
    lead = [part.contiguous() for part in _rows_of(initial, rows, heads, dtype)]
    if check and _may_wait(delta):
        _check_domain(detuning, absorption, lead)
    if chosen == "reference":
        real, imag = causal_resolvent_reference(delta, eta, lead[0], lead[1], bounds)
    elif chosen == "triton":
        from resnet_bk.ops.resolvent.kernels import causal_resolvent_op as op

        flat = op(delta.flatten(0, 1), eta.flatten(0, 1), lead[0], lead[1], cu_seqlens)
        real, imag = (part.view(batch, time, heads) for part in flat)
    elif time == 1:  # decoding: nothing to cut into chunks
        real, imag = _reciprocal(delta - lead[0][:, None], eta + lead[1][:, None])
    else:
        starts = None if bounds is None else torch.tensor(bounds[:-1], device=delta.device)
        real, imag = causal_resolvent_op(delta, eta, lead[0], lead[1], starts)
    if cu_seqlens is None:
        # Copies: a view would keep m of all sites alive for as long as the state.
        state = GreenState(real[:, -1].clone(), imag[:, -1].clone())
    else:
        last = cu_seqlens[1:].to(delta.device, torch.long) - 1
        state = GreenState(real[0, last], imag[0, last])
    return (real, imag), state


def flux_gates(
    potential: Float[Tensor, "batch time heads"],
    absorption: Float[Tensor, "batch time heads"],
    source: Float[Tensor, "batch time *heads"],
    *,
    potential_scale: Float[Tensor, " heads"],
    energy: Float[Tensor, " heads"],
    absorption_bias: Float[Tensor, " heads"],
    absorption_floor: float,
    source_bias: Float[Tensor, " heads"] | None = None,
    source_kind: Source = "gated",
    initial: GreenState | None = None,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    backend: Backend = "auto",
) -> tuple[tuple[Float[Tensor, "batch time heads"], Float[Tensor, "batch time heads"]], GreenState]:
    r"""Log decays and source weights of a medium that the tokens' raw projections describe: the mixer's gates.

        eta = softplus(absorption + absorption_bias) + absorption_floor,   delta = potential_scale potential - energy
        m_t = 1 / (delta_t - i eta_t - m_{t-1}),   log a_t = -1/2 log1p(eta_t / Im m_{t-1}),   b = sqrt(1 - a^2)
        weight = b sigmoid(source + source_bias) | softplus(source + source_bias) | b    for gated | free | unit

    Args:
        potential: raw, in any floating dtype; a strided view of a projection is read in place.
        absorption: raw.
        source: raw; not read, and possibly [batch, time, 0], if `source_kind` is "unit".
        potential_scale: one factor a head.
        energy: one a head, in units of the hopping.
        absorption_bias: added to the raw absorption.
        absorption_floor: smallest eta, in units of the hopping; > 0.
        source_bias: added to the raw source; None if `source_kind` is "unit".
        source_kind: the weight of a token on entry.
        initial: m_0, [batch, heads] or [heads] each ([documents, heads] with `cu_seqlens`); None is a matched lead,
            the decaying root at detuning -energy and absorption softplus(absorption_bias) + absorption_floor. A wall
            is zero.
        cu_seqlens: boundaries 0 = b_0 < ... < b_documents = time of documents packed along time (batch 1).
        backend: "triton" is one fused pass each way; "reference" and "chunked" compose the functions of this package.

    Returns:
        log a <= 0 and the weights, float32 or wider, and m after the last token of each row.

    Raises:
        ShapeError: shapes that do not fit; boundaries that do not cover the tokens.
        DomainError: absorption_floor <= 0, an unknown source_kind; but for "triton" also values outside the domain of
            `causal_resolvent`. The kernels do not look: eta > 0 whatever the input, and NaN in gives NaN out, in the
            row in question and in the gradients of the parameters.
        BackendError: an unknown backend, or one that cannot run here.

    Theorem: with weights b, rows of the kernel prod_{k=j+1..t} a_k b_j have unit l2 norm, for every input.
    Numerics: float32; the carry over chunks in float64 (DERIVATION.md).
    Source: docs/theory/theorems, theorems 1, 5, 6 and 8.
    """
    dtype = compute_dtype(potential, absorption)
    chosen = choose_backend(backend, absorption if absorption.dtype == dtype else potential)
    batch, time, heads = _check_gates(
        potential, absorption, source, potential_scale, energy, absorption_bias, source_bias, source_kind
    )
    if not absorption_floor > 0:
        raise DomainError(f"absorption_floor is {absorption_floor}; expected a number > 0.")
    if chosen == "triton":
        from resnet_bk.ops.resolvent.kernels import flux_gates_op

        _boundaries(cu_seqlens, batch, time, needed=False)
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        first = (None, None) if initial is None else _rows_of(initial, rows, heads, dtype)
        if source_kind == "unit":
            raw, source_bias = (potential, absorption), None
        else:
            raw = (potential, absorption, source)
        operands = [*(x.flatten(0, 1) for x in raw), *[None] * (3 - len(raw))]
        operands += [potential_scale, energy, absorption_bias, source_bias, *first]
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
        decay, weight, real, imag, _, _ = flux_gates_op(
            *operands, cu_seqlens, rows, absorption_floor, source_kind, save
        )  # fmt: skip
        return (decay.view(batch, time, heads), weight.view(batch, time, heads)), GreenState(real, imag)
    plain = "reference" if chosen == "reference" else "chunked"
    bias, level = absorption_bias.to(dtype), energy.to(dtype)
    eta = F.softplus(absorption.to(dtype) + bias) + absorption_floor
    delta = potential_scale.to(dtype) * potential.to(dtype) - level
    if initial is None:
        initial = GreenState(*decaying_root(-level, F.softplus(bias) + absorption_floor))
    (_, imag), state = causal_resolvent(delta, eta, initial=initial, cu_seqlens=cu_seqlens, backend=plain)
    log_decay, weight = flux_gate(previous_imag(imag, initial.imag, cu_seqlens), eta)
    if source_bias is not None and source_kind != "unit":
        gate = source.to(dtype) + source_bias.to(dtype)
        weight = weight * gate.sigmoid() if source_kind == "gated" else F.softplus(gate)
    return (log_decay, weight), state


def _check_gates(potential, absorption, source, scale, energy, bias, source_bias, kind) -> tuple[int, int, int]:
    """(batch, time, heads); raises naming the first operand that does not fit."""
    if kind not in ("gated", "free", "unit"):
        raise DomainError(f"source_kind is {kind!r}; expected 'gated', 'free' or 'unit'.")
    if potential.dim() != 3 or 0 in potential.shape:
        raise ShapeError(f"potential must be a non-empty [batch, time, heads]; got {list(potential.shape)}.")
    batch, time, heads = potential.shape
    expected = {
        "absorption": (absorption, (batch, time, heads)),
        "potential_scale": (scale, (heads,)),
        "energy": (energy, (heads,)),
        "absorption_bias": (bias, (heads,)),
    }
    if kind != "unit":
        expected |= {"source": (source, (batch, time, heads)), "source_bias": (source_bias, (heads,))}
    for name, (tensor, shape) in expected.items():
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            raise ShapeError(f"{name} must be {list(shape)}; got {found if found is None else list(found)}.")
    return batch, time, heads


def _may_wait(operand: Tensor) -> bool:
    """Whether a value may be looked at here: not while compiling, nor while a CUDA graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return not (operand.is_cuda and torch.cuda.is_current_stream_capturing())


def _boundaries(cu_seqlens: Tensor | None, batch: int, time: int, *, needed: bool) -> list[int] | None:
    """Document boundaries as integers; where they are not `needed`, they are only checked, if they may be looked at."""
    if cu_seqlens is None or not (needed or _may_wait(cu_seqlens)):
        return None
    return document_boundaries(cu_seqlens, batch, time)


def _rows_of(initial: GreenState, rows: int, heads: int, dtype: torch.dtype) -> list[Tensor]:
    """Both parts of m_0 as [rows, heads]."""
    try:
        return [part.to(dtype).broadcast_to(rows, heads) for part in initial]
    except RuntimeError as error:
        raise ShapeError(
            f"initial must be [{heads}] or [{rows}, {heads}] in both parts; got "
            f"{list(initial[0].shape)} and {list(initial[1].shape)}."
        ) from error


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
    Source: docs/mathematics, "The operator"; DERIVATION.md.
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
    # One reduction each, read together, and a search only when one of them fails; NaN fails every comparison.
    wide = initial[0].dtype
    limits = [part.to(wide) for x in (absorption, detuning, *initial) for part in x.detach().aminmax()]
    eta_low, eta_high, delta_low, delta_high, real_low, real_high, imag_low, imag_high = torch.stack(limits).tolist()
    if not (eta_low > 0 and eta_high < torch.inf):
        where = ~((absorption > 0) & absorption.isfinite())
        index = where.nonzero()[0].tolist()
        raise DomainError(
            f"absorption is {absorption[tuple(index)].item()} at [batch, time, head] = {index}; expected a finite "
            "number > 0. Add a floor (softplus(...) + 1e-3) or look for NaN upstream."
        )
    if not (delta_low > -torch.inf and delta_high < torch.inf):
        index = (~detuning.isfinite()).nonzero()[0].tolist()
        raise DomainError(
            f"detuning is {detuning[tuple(index)].item()} at [batch, time, head] = {index}; expected a finite number. "
            "Look for NaN or overflow upstream."
        )
    real, imag = initial
    if not (imag_low >= 0 and imag_high < torch.inf and real_low > -torch.inf and real_high < torch.inf):
        index = (~(real.isfinite() & imag.isfinite() & (imag >= 0))).nonzero()[0].tolist()
        row, head = index
        raise DomainError(
            f"initial is {real[row, head].item()} + {imag[row, head].item()}i at [row, head] = {index}; expected "
            "finite numbers with imaginary part >= 0: a state returned earlier, or `decaying_root`."
        )
