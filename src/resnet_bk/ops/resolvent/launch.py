"""How a call of the Triton kernels is cut into programs, and the three passes in either direction.

Operands are [tokens, heads], rows one after the other: `rows` sequences of equal length, or documents when
`cu_seqlens` is given. Gradients of per-head parameters are sums of one partial sum a slot, so they repeat bit by bit.
"""

# pyright: reportIndexIssue=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_bk.ops.resolvent import triton as passes

# Lanes of a program of the passes over sites: one warp, so that few slots still spread over all multiprocessors.
_LANES = 32
# The carry cuts the slots into so many groups, and one program walks all groups of so many heads.
_GROUPS = 64
_GROUP_HEADS = 2
# Maps that one lane composes at a time: two rounds for a thousand of them.
_FOLDED = 32
# Sites per slot, a multiple of a tile. Below the smallest, programs would mostly find out where they are.
_CHUNKS = (16, 32, 64, 128, 256)


def chunk_length(tokens: int) -> int:
    """Sites per slot, about sqrt(tokens / 32): few steps in a row, and slots enough to fill a GPU."""
    return next((chunk for chunk in _CHUNKS if 32 * chunk * chunk >= tokens), _CHUNKS[-1])


def _ceil(count: int, per: int) -> int:
    return -(-count // per)


@dataclass(frozen=True)
class Layout:
    """How one call is cut into slots."""

    tokens: int
    heads: int
    rows: int
    cu_seqlens: Tensor | None

    @property
    def chunk(self) -> int:
        """Sites per slot."""
        return chunk_length(self.tokens)

    @property
    def slots(self) -> int:
        """Slots of all rows; the kernels know which of a document's are empty without a table."""
        if self.cu_seqlens is None:
            return self.rows * _ceil(self.tokens // self.rows, self.chunk)
        return self.tokens // self.chunk + self.rows

    @property
    def carries(self) -> bool:
        """Whether some row may have more than one slot."""
        return self.cu_seqlens is not None or self.tokens // self.rows > self.chunk

    @property
    def grid(self) -> tuple[int]:
        """Programs of the passes over sites."""
        return (_ceil(self.slots * self.heads, _LANES),)

    def arguments(self) -> dict[str, Any]:
        """What the passes over sites need to find their place."""
        return {
            "cu_seqlens": self.cu_seqlens,
            "rows": self.rows,
            "row_length": self.tokens // self.rows,
            "search": (self.rows - 1).bit_length(),
            "chunk": self.chunk,
            "slots": self.slots,
            "heads": self.heads,
            "PACKED": self.cu_seqlens is not None,
            "LANES": _LANES,
            "num_warps": 1,
        }

    def carry(self, kernel, maps: Tensor, width: int) -> Tensor:
        """What the carry `kernel` finds at every slot [slots, width, heads], float64."""
        carried = maps.new_empty(self.slots, width, self.heads)
        group_maps = maps.new_empty(_GROUPS, *maps.shape[1:])
        kernel[(_ceil(self.heads, _GROUP_HEADS),)](
            carried, group_maps, maps, self.slots, self.heads, _ceil(self.slots, _GROUPS),
            GROUPS=_GROUPS, HEADS=_GROUP_HEADS, num_warps=4,
        )  # fmt: skip
        return carried


@dataclass(frozen=True)
class Medium:
    """Inputs of a sweep: raw projections with per-head parameters, or detuning and absorption (kind "plain")."""

    kind: str
    detuning: Tensor
    absorption: Tensor
    source: Tensor | None = None
    scale: Tensor | None = None
    energy: Tensor | None = None
    bias: Tensor | None = None
    source_bias: Tensor | None = None
    floor: float = 0.0
    initial_real: Tensor | None = None
    initial_imag: Tensor | None = None

    def arguments(self, *names: str) -> dict[str, Any]:
        """Keyword arguments of a kernel: what all take, and the named operands with their strides."""
        chosen: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name in {"detuning", "absorption", "source"}.intersection(names):
            chosen[f"{name}_stride"] = 0 if chosen[name] is None else chosen[name].stride(0)
        common = {name: getattr(self, name) for name in ("energy", "bias", "floor", "initial_real", "initial_imag")}
        stride = 0 if self.initial_real is None else self.initial_real.stride(0)
        return {**chosen, **common, "initial_stride": stride, "KIND": self.kind, "LEAD": self.initial_real is None}


def forward(medium: Medium, layout: Layout, save: bool) -> tuple[Tensor, ...]:
    """(log decay, weight, Re and Im of the last m of each row, Re and Im m); of the kind "plain" m only."""
    like, gated = medium.detuning, medium.kind != "plain"
    tokens, rows, none = (layout.tokens, layout.heads), (layout.rows, layout.heads), (0,)
    m = [like.new_empty(tokens if save else none, dtype=torch.float32) for _ in range(2)]
    gates = [like.new_empty(tokens, dtype=torch.float32) for _ in range(2)] if gated else [None, None]
    state = [like.new_empty(rows, dtype=torch.float32) for _ in range(2)] if gated else [None, None]
    carried, place = None, layout.arguments()
    with torch.cuda.device_of(like):
        if layout.carries:
            maps = like.new_empty((layout.slots, 8, layout.heads), dtype=torch.float64)
            passes.compose_kernel[layout.grid](
                maps, None, **medium.arguments("detuning", "absorption", "scale"), **place
            )
            carried = layout.carry(passes.carry_kernel, maps, 4)
        operands = medium.arguments("detuning", "absorption", "source", "scale", "source_bias")
        passes.apply_kernel[layout.grid](*gates, *m, *state, carried, **operands, **place, SAVE=save)
    return tuple(x for x in (*gates, *state, *m) if x is not None)


def compose(medium: Medium, layout: Layout) -> tuple[Tensor, Tensor]:
    """Moebius maps of the rows' sites [rows, 8, heads], and the logs of what their entries were divided by.

    First of every slot, then of groups of these, until one is left of a row: three launches for 65,536 sites, where
    products of tensors in a tree would keep the host busy for longer than the device.
    """
    maps = medium.detuning.new_empty((layout.slots, 8, layout.heads), dtype=torch.float64)
    log_scale = maps.new_empty(layout.slots, layout.heads)
    operands = medium.arguments("detuning", "absorption", "scale")
    with torch.cuda.device_of(maps):
        passes.compose_kernel[layout.grid](maps, log_scale, **operands, **layout.arguments())
        while (stretches := maps.shape[0] // layout.rows) > 1:
            groups = _ceil(stretches, _FOLDED)
            folded = maps.new_empty(layout.rows * groups, 8, layout.heads)
            folded_scale = maps.new_empty(layout.rows * groups, layout.heads)
            lanes = folded_scale.numel()
            passes.fold_kernel[(_ceil(lanes, _LANES),)](
                folded, folded_scale, maps, log_scale, stretches, groups, layout.heads, lanes,
                GROUP=_FOLDED, LANES=_LANES, num_warps=1,
            )  # fmt: skip
            maps, log_scale = folded, folded_scale
    return maps, log_scale


def adjoint(
    medium: Medium,
    layout: Layout,
    m: tuple[Tensor, Tensor],
    grads: Sequence[Tensor],
    grad_state: Sequence[Tensor | None] = (None, None),
) -> tuple[Any, ...]:
    """Gradients of detuning, absorption, source, [scale, energy, bias, source bias] and both parts of the initial m.

    `grads` are those of log decay and weight, or of m if the kind is "plain". The source's is None where there is no
    source; those of the initial m are empty where there is a lead.
    """
    like, gated = medium.detuning, medium.kind != "plain"
    raw = [
        None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in (medium.detuning, medium.absorption, medium.source)
    ]
    rows = 0 if medium.initial_real is None else layout.rows
    first = [like.new_empty((rows, layout.heads), dtype=torch.float32) for _ in range(2)]
    sums = like.new_empty((layout.slots if gated else 0, 4, layout.heads), dtype=torch.float32)
    carried, place = None, layout.arguments()
    given = (*m, *grads, *grad_state)
    with torch.cuda.device_of(like):
        if layout.carries:
            maps = like.new_empty((layout.slots, 4, layout.heads), dtype=torch.float64)
            operands = medium.arguments("absorption", "source", "source_bias")
            passes.adjoint_compose_kernel[layout.grid](maps, *given, **operands, **place)
            carried = layout.carry(passes.adjoint_carry_kernel, maps, 2)
        operands = medium.arguments("detuning", "absorption", "source", "scale", "source_bias")
        passes.adjoint_apply_kernel[layout.grid](*raw, sums, *first, carried, *given, **operands, **place)
    return (*raw, sums.sum(0, dtype=torch.float64).float(), *first)
