"""States that enter a segment of a sequence whose other segments lie on other ranks (context parallelism).

Every rank sums its segment up, the summaries are gathered, and each rank scans those before its own; see the docs page
"Context parallelism".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from resnet_bk.errors import ShapeError
from resnet_bk.ops.context.memory import segment_memory
from resnet_bk.ops.context.moebius import MoebiusMap, compose_sites
from resnet_bk.ops.dispatch import compute_dtype
from resnet_bk.ops.resolvent import GreenState, causal_resolvent
from resnet_bk.ops.semiseparable import MixState
from resnet_bk.ops.semiseparable.rotation import rotate_memory

__all__ = [
    "MoebiusMap",
    "Segment",
    "SequenceGroup",
    "compose_sites",
    "entering_green",
    "entering_last",
    "entering_memory",
    "entering_sum",
    "scan_affine",
    "scan_moebius",
    "segment_memory",
]


class SequenceGroup(Protocol):
    """The ranks that share a sequence, in the order of its segments, and how they exchange summaries."""

    @property
    def rank(self) -> int:
        """Place of this process's segment, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of segments."""
        ...

    def gather(self, part: Tensor) -> Tensor:
        """[size, *part.shape]: the `part` of every rank. A collective: every rank calls it, in the same order."""
        ...


@dataclass(frozen=True)
class Segment:
    """This process's part of a sequence that ranks share."""

    group: SequenceGroup
    lengths: tuple[int, ...]
    """Tokens of every rank's segment."""

    @property
    def offset(self) -> int:
        """Tokens of the sequence before this segment."""
        return sum(self.lengths[: self.group.rank])

    @classmethod
    def of(cls, group: SequenceGroup, input_ids: Tensor) -> Segment:
        """The segment `input_ids` [batch, time]; a collective.

        Raises:
            ShapeError: the ranks hold different numbers of sequences; raised on all of them.
        """
        shapes = group.gather(torch.tensor(input_ids.shape, device=input_ids.device)).tolist()
        if len({batch for batch, _ in shapes}) > 1:
            raise ShapeError(
                f"the ranks hold {[batch for batch, _ in shapes]} sequences; expected the same number on every rank, "
                "each with its segment of every sequence. Split a batch with `split_batch`."
            )
        return cls(group, tuple(time for _, time in shapes))


def scan_moebius(maps: Iterable[MoebiusMap], first: Tensor) -> list[Tensor]:
    """The Green function that enters every segment, and the one after the last; complex128, `first` enters the first.

    Cost: one division a segment.
    """
    entering = [first]
    for segment in maps:
        entering.append(segment(entering[-1]))
    return entering


def scan_affine(totals: Iterable[Tensor], factors: Iterable[Tensor], first: Tensor) -> list[Tensor]:
    """The state that enters every segment, and the one after the last, where a segment maps S to factor S + total."""
    entering = [first]
    for total, factor in zip(totals, factors, strict=True):
        entering.append(torch.addcmul(total, factor, entering[-1]))
    return entering


def entering_green(
    detuning: Float[Tensor, "batch time heads"],
    absorption: Float[Tensor, "batch time heads"],
    segment: Segment,
    *,
    first: GreenState,
) -> GreenState:
    """The half-line Green function [batch, heads] before this rank's first site.

    Args:
        detuning: of this rank's sites, as in `causal_resolvent`.
        absorption: the same.
        segment: where they lie.
        first: m_0 of the whole sequence, the same on every rank; its gradient is found on the first, zero elsewhere.

    Gradients: exact, and those of this rank's sites for what they do to later ranks. A collective in both directions.
    Cost: gathers 72 bytes a sequence and head forward, 16 backward. The backward pass sweeps the sites once more.
    Source: MATH theorems 6 and 7.
    """
    shape = detuning.shape[0], detuning.shape[2]
    dtype = compute_dtype(detuning, absorption)
    real, imag = (part.to(dtype).broadcast_to(shape) for part in first)
    return GreenState(*_EnteringGreen.apply(detuning, absorption, real, imag, segment.group))


class _EnteringGreen(torch.autograd.Function):
    """The adjoint of the exclusive scan of Moebius maps is an exclusive scan from the right of their derivatives."""

    @staticmethod
    def forward(ctx: Any, detuning, absorption, real, imag, group: SequenceGroup) -> tuple[Tensor, Tensor]:
        gathered = group.gather(compose_sites(detuning, absorption).pack())
        maps = [MoebiusMap.unpack(packed) for packed in gathered]
        entering = scan_moebius(maps, torch.complex(real.double(), imag.double()))
        m = entering[group.rank]
        m = m.real.to(real.dtype), m.imag.to(real.dtype)
        slopes = [segment.derivative(before) for segment, before in zip(maps, entering[:-1], strict=True)]
        ctx.save_for_backward(detuning, absorption, *m, torch.stack(slopes))
        ctx.group = group
        return m

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_real: Tensor, grad_imag: Tensor) -> tuple[Tensor | None, ...]:
        detuning, absorption, real, imag, slopes = ctx.saved_tensors
        group: SequenceGroup = ctx.group
        own = torch.stack((grad_real, grad_imag)).double()
        cotangents = [torch.complex(*pair) for pair in group.gather(own)]
        behind = torch.zeros_like(cotangents[0])
        for rank in range(group.size - 1, group.rank, -1):
            behind = cotangents[rank] + slopes[rank].conj() * behind
        with torch.enable_grad():
            sites = [part.detach().requires_grad_() for part in (detuning, absorption)]
            # The forward pass went through these sites; a look at their domain would wait for the device every time.
            _, last = causal_resolvent(*sites, initial=GreenState(real, imag), check=False)
            found = torch.autograd.grad(last, sites, [part.to(real.dtype) for part in (behind.real, behind.imag)])
        start = torch.zeros_like(behind)
        if group.rank == 0:
            start = cotangents[0] + slopes[0].conj() * behind
        return (*found, start.real.to(real.dtype), start.imag.to(real.dtype), None)


def entering_sum(
    total: Float[Tensor, "rows channels"], segment: Segment, *, first: Float[Tensor, "rows channels"] | None
) -> Float[Tensor, "rows channels"]:
    """`first` (None is zero) plus the `total` of every rank before this one; for phases, which add up.

    Gradients as in `entering_green`. Cost: gathers two numbers a row and channel forward, one backward.
    """
    first = torch.zeros_like(total) if first is None else first.to(total.dtype)
    nothing = torch.zeros_like(total)
    entering = _EnteringAffine.apply(total[..., None, None], nothing, first[..., None, None], segment.group)
    return entering[..., 0, 0]  # type: ignore[index]


def entering_last(
    last: Float[Tensor, "rows channels"], segment: Segment, *, first: Float[Tensor, "rows channels"] | None
) -> Float[Tensor, "rows channels"]:
    """What the rank before this one calls `last`; on the first rank `first`, None is zero. For what stands before.

    Gradients and cost as in `entering_sum`.
    """
    first = torch.zeros_like(last) if first is None else first.to(last.dtype)
    nothing_stays = torch.full_like(last, -torch.inf)
    entering = _EnteringAffine.apply(last[..., None, None], nothing_stays, first[..., None, None], segment.group)
    return entering[..., 0, 0]  # type: ignore[index]


def entering_memory(
    key: Float[Tensor, "batch time *heads state"],
    value: Float[Tensor, "batch time heads value"],
    log_decay: Float[Tensor, "batch time heads"],
    segment: Segment,
    *,
    source: Float[Tensor, "batch time heads"] | None = None,
    key_bias: Float[Tensor, "heads state"] | None = None,
    frequencies: Float[Tensor, " half_state"] | None = None,
    norm_epsilon: float | None = None,
    first: MixState | None = None,
) -> MixState:
    """The state of `semiseparable_mix` before this rank's first token, and that token's position.

    Arguments are those of `semiseparable_mix`, of this rank's tokens; `first` is the state before the whole sequence,
    the same on every rank, None an empty one. Its gradient is found on the first rank, zero elsewhere.

    Gradients: exact, and those of this rank's tokens for what they do to later ranks. A collective in both directions.
    Cost: gathers state * value + 1 numbers a sequence and head forward, state * value backward; `segment_memory`.
    """
    dtype = compute_dtype(value, log_decay)
    # Differences of sums over a whole segment: in float64, which costs nothing beside the channels.
    # Time comes last, because a GPU sums along other dimensions one token after the other.
    total = log_decay.double().transpose(1, 2).contiguous().cumsum(2)
    weight = (total[..., -1:] - total).exp().to(dtype).transpose(1, 2)
    if source is not None:
        weight = weight * source.to(dtype)
    memory = segment_memory(key, value, weight, key_bias=key_bias, frequencies=frequencies, norm_epsilon=norm_epsilon)
    if first is None:
        first = MixState(torch.zeros_like(memory), torch.zeros(value.shape[0], dtype=torch.long, device=value.device))
    start = first.position + segment.offset
    memory = rotate_memory(memory, start, frequencies)
    entering = _EnteringAffine.apply(memory, total[..., -1].to(dtype), first.memory.to(dtype), segment.group)
    return MixState(entering, start)  # type: ignore[arg-type]


class _EnteringAffine(torch.autograd.Function):
    """Exclusive scan of S -> exp(log_factor) S + total; totals [rows, heads, state, value], factors [rows, heads]."""

    @staticmethod
    def forward(ctx: Any, total, log_factor, first, group: SequenceGroup) -> Tensor:
        gathered = group.gather(torch.cat((total.flatten(2), log_factor[..., None]), dim=-1))
        factors = gathered[..., -1:, None].exp()
        totals = gathered[..., :-1].unflatten(-1, total.shape[2:])
        entering = scan_affine(totals[: group.rank], factors[: group.rank], first)[-1].clone()
        ctx.save_for_backward(entering, factors)
        ctx.group = group
        return entering

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        entering, factors = ctx.saved_tensors
        group: SequenceGroup = ctx.group
        later = slice(group.rank + 1, None)
        cotangents = group.gather(grad.contiguous())
        behind = scan_affine(cotangents[later].flip(0), factors[later].flip(0), torch.zeros_like(grad))[-1]
        log_factor = (factors[group.rank] * entering * behind).sum((-2, -1))
        start = grad + factors[0] * behind if group.rank == 0 else torch.zeros_like(grad)
        return behind, log_factor, start, None
