"""The semiseparable mixing by Triton kernels: how a call is cut into programs, and the operator around them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from resnet_bk.ops.dispatch import verify_once

CHUNK = 64
BLOCK_CHUNKS = 8
"""Chunks between two kept memories; the backward pass redoes the memories in between."""


@dataclass(frozen=True)
class Plan:
    """Chunks and segments of rows that lie one behind the other on one axis of tokens."""

    chunks: Tensor
    """First token and one past the last of every chunk, int64 [chunks, 2]."""
    blocks: Tensor
    """First token and one past the last of every block of chunks, and the row it ends or -1, int64 [blocks, 3]."""
    segments: Tensor
    """One line a segment, int64; its columns are named in `triton.py`."""
    first_segment: Tensor
    """First segment of every row and one past the last, int64 [rows + 1]."""

    @property
    def rows(self) -> int:
        """Sequences or documents."""
        return self.first_segment.numel() - 1

    @property
    def split(self) -> bool:
        """Whether some row has several segments."""
        return self.segments.shape[0] > self.rows


def make_plan(bounds: list[int], heads: int, programs: int, device: torch.device) -> Plan:
    """Segments such that about `programs` pairs of one and a head are in flight, but no shorter than a block.

    Args:
        bounds: first token of every row and one past the last.
        heads: heads; each walks its own segments.
        programs: how many (segment, head) pairs the device keeps busy at once.
        device: where the tables go.
    """
    edges = torch.tensor(bounds)
    begins, ends = edges[:-1], edges[1:]
    counts = -(-(ends - begins) // CHUNK)
    wanted = max(1, programs // heads)
    longest = int(counts.max())
    if len(bounds) - 1 < wanted:
        longest = max(BLOCK_CHUNKS, -(-int(counts.sum()) // wanted))
    length = -(-longest // BLOCK_CHUNKS) * BLOCK_CHUNKS
    pieces = -(-counts // length)
    row = torch.repeat_interleave(torch.arange(len(begins)), pieces)
    first_segment = torch.cat((pieces.new_zeros(1), pieces.cumsum(0)))
    place = torch.arange(row.numel()) - first_segment[row]
    begin = begins[row] + place * length * CHUNK
    end = torch.minimum(begin + length * CHUNK, ends[row])
    per_segment = -(-(end - begin) // (CHUNK * BLOCK_CHUNKS))
    segments = torch.stack(
        (begin, end, row, begins[row], place == 0, end == ends[row], per_segment.cumsum(0) - per_segment), 1
    )
    chunk_begin, chunk_row = _cut(begins, ends, CHUNK)
    block_begin, block_row = _cut(begins, ends, CHUNK * BLOCK_CHUNKS)
    block_end = torch.minimum(block_begin + CHUNK * BLOCK_CHUNKS, ends[block_row])
    chunks = torch.stack((chunk_begin, torch.minimum(chunk_begin + CHUNK, ends[chunk_row])), 1)
    blocks = torch.stack((block_begin, block_end, torch.where(block_end == ends[block_row], block_row, -1)), 1)
    tables = (table.to(device, non_blocking=True) for table in (chunks, blocks, segments, first_segment))
    return Plan(*tables)


def _cut(begins: Tensor, ends: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """First token and row of every piece of at most `length` tokens."""
    counts = -(-(ends - begins) // length)
    row = torch.repeat_interleave(torch.arange(len(begins)), counts)
    return begins[row] + (torch.arange(row.numel()) - (counts.cumsum(0) - counts)[row]) * length, row


@lru_cache(maxsize=64)
def _uniform_plan(batch: int, time: int, heads: int, programs: int, device: torch.device) -> Plan:
    return make_plan([row * time for row in range(batch + 1)], heads, programs, device)


@lru_cache(maxsize=16)
def _programs(device: torch.device) -> int:
    """Programs of the forward kernel that a device holds at once: two a multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


class Launch:
    """One call's operands as the kernels want them; forward and backward share its preparation."""

    def __init__(
        self,
        operands: tuple[Any, ...],
        position: Tensor | None,
        bounds: Tensor | None,
        scale: float,
        epsilon: float | None,
    ) -> None:
        """`operands` are the first nine of `semiseparable_triton_op`."""
        from resnet_bk.ops.semiseparable import triton as kernels

        self.kernels: Any = kernels
        query, key, value, log_decay, source, query_bias, key_bias, frequencies, skip = operands
        batch, time, heads, channels = value.shape
        self.heads, self.state, self.channels, self.tokens = heads, query.shape[-1], channels, batch * time
        device = value.device
        if bounds is None:
            self.plan = _uniform_plan(batch, time, heads, _programs(device), device)
        else:
            self.plan = make_plan(bounds.tolist(), heads, _programs(device), device)
        self.query, self.key, self.value = (flat(x) for x in (query, key, value))
        self.log_decay = flat(log_decay)
        self.source = None if source is None else flat(source)
        self.copies = query.shape[2]
        self.table = query_bias is not None or key_bias is not None
        zeros = value.new_zeros(heads, self.state) if self.table and None in (query_bias, key_bias) else None
        self.query_bias = _dense(zeros if query_bias is None else query_bias)
        self.key_bias = _dense(zeros if key_bias is None else key_bias)
        self.frequencies = None if frequencies is None else frequencies.double()
        self.skip = _dense(skip)
        self.position = position
        if frequencies is not None and position is None:
            self.position = torch.zeros(self.plan.rows, dtype=torch.long, device=device)
        self.scale, self.epsilon = scale, epsilon
        self.flags = {
            "K": self.state,
            "C": CHUNK,
            "COPIES": self.copies,
            "ROTATE": frequencies is not None,
            "SOURCE": source is not None,
        }
        self.mixing = self.flags | {
            "P": channels,
            # Triton 3.6 miscompiles narrower tiles on Hopper.
            "L": max(64, self.state // 2),
            "Q": max(64, channels),
            "TABLE": self.table,
            # Six products of bfloat16 parts are as exact as float32 ones; three of TF32 parts are not.
            # The interpreter knows only "ieee".
            "PRECISION": "tf32" if value.dtype != torch.float32 else "bf16x6" if value.is_cuda else "ieee",
        }
        self._prepare()

    def _prepare(self) -> None:
        value, dtype = self.value, self.value.dtype
        self.q, self.k = (value.new_empty(self.copies, self.tokens, self.state) for _ in range(2))
        self.running = value.new_empty(self.heads, self.tokens, dtype=torch.float32)
        self.weight = None if self.source is None else torch.empty_like(self.running)
        heads = self.heads if self.table else 0
        self.q_table, self.k_table = (value.new_empty(heads, CHUNK, self.state, dtype=dtype) for _ in range(2))
        chunks = self.plan.chunks.shape[0]
        self.kernels.prepare_kernel[(chunks + heads,)](
            self.query, self.key, self.log_decay, _or(self.source, self.log_decay), _or(self.query_bias, value),
            _or(self.key_bias, value), _or(self.frequencies, value), self.plan.chunks,
            self.q, self.k, self.running, _or(self.weight, self.running), self.q_table, self.k_table,
            self.query.stride(0), self.key.stride(0), self.query.stride(1), self.key.stride(1),
            self.log_decay.stride(0), 0 if self.source is None else self.source.stride(0),
            self.tokens, chunks, self.scale, self.epsilon or 0.0, self.heads,
            HEADS=_power_of_two(self.heads), NORM=self.epsilon is not None, **self.flags, num_warps=4,
        )  # fmt: skip

    def _carry(self, boundary: Tensor | None, x: Tensor, *, reverse: bool) -> Tensor | None:
        """Memory before (cotangent after) every segment [segments, heads, channels, state]; None is zero everywhere."""
        plan, value = self.plan, self.value
        if boundary is None and not plan.split:
            return None
        carried = self._memories(plan.segments.shape[0])
        contribution, total = carried, carried
        if plan.split:
            contribution = torch.empty_like(carried)
            total = carried.new_empty(carried.shape[:2])
            channels, table = (self.q, self.q_table) if reverse else (self.k, self.k_table)
            self.kernels.contribute_kernel[(self.heads, carried.shape[0])](
                channels, table, x, self.running, _or(self.weight, self.running), _or(self.frequencies, value),
                plan.segments, contribution, total, x.stride(0), self.tokens, self.heads,
                REVERSE=reverse, **(self.mixing | {"SOURCE": self.mixing["SOURCE"] and not reverse}),
                num_warps=4, num_stages=1,
            )  # fmt: skip
        lanes = min(16, self.channels)
        self.kernels.carry_kernel[(self.heads, plan.rows, self.channels // lanes)](
            carried if boundary is None else boundary.contiguous(), _or(self.position, plan.segments),
            contribution, total, _or(self.frequencies, value), plan.segments, plan.first_segment, carried, self.heads,
            K=self.state, P=self.channels, Q=lanes, C=CHUNK, BOUNDARY=boundary is not None,
            ROTATE=self.flags["ROTATE"], REVERSE=reverse, num_warps=4,
        )  # fmt: skip
        return carried

    def _mix(self, x, y, start, final, kept, *, d_source: Tensor | None = None, reverse: bool = False) -> None:
        """One pass over all segments: outputs y of values x, or in reverse gradients y of output gradients x."""
        plan, value, empty = self.plan, self.value, self.running
        self.kernels.mix_kernel[(self.heads, plan.segments.shape[0])](
            self.q, self.k, self.q_table, self.k_table, x, self.running, _or(self.weight, empty),
            _or(self.frequencies, empty), _or(self.skip, empty), _or(self.position, plan.segments), plan.segments,
            _or(start, empty), y, _or(final, empty), _or(kept, empty), value, _or(d_source, empty),
            x.stride(0), y.stride(0), value.stride(0), self.tokens, self.heads,
            BLOCK_CHUNKS=BLOCK_CHUNKS, SKIP=self.skip is not None, START=start is not None, KEEP=kept is not None,
            REVERSE=reverse, FINAL=final is not None, **self.mixing, num_warps=4, num_stages=1,
        )  # fmt: skip

    def forward(self, initial: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Output [tokens, heads, channels], final memory [rows, ...] and the kept memories (none unless `save`)."""
        plan, value = self.plan, self.value
        start = self._carry(initial, value, reverse=False)
        y = value.new_empty(self.tokens, self.heads, self.channels)
        final = value.new_empty(plan.rows, self.heads, self.state, self.channels, dtype=torch.float32)
        kept = self._memories(plan.blocks.shape[0] if save else 0)
        self._mix(value, y, start, final, kept if save else None)
        return y, final, kept

    def _memories(self, count: int) -> Tensor:
        """Uninitialised memories as the kernels keep them, value channels first."""
        return self.value.new_empty(count, self.heads, self.channels, self.state, dtype=torch.float32)

    def backward(
        self, final: Tensor, kept: Tensor, grad_y: Tensor, grad_final: Tensor | None, need_initial: bool,
        out: dict[str, Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Gradients by name; those of tokens are written into `out` [tokens, ...], whose rows may be strided."""
        plan, value = self.plan, self.value
        wide = {"dtype": torch.float32, "device": value.device}
        grad_y = flat(grad_y)
        blocks = plan.blocks.shape[0]
        after = self._memories(blocks)
        d_initial = torch.empty(plan.rows if need_initial else 0, self.heads, self.state, self.channels, **wide)
        read, written, met = (torch.empty_like(self.running) for _ in range(3))
        d_source = None if self.source is None else torch.empty_like(self.running)
        incoming = self._carry(grad_final, grad_y, reverse=True)
        first = d_initial if need_initial else None
        self._mix(grad_y, out["value"], incoming, first, after, d_source=d_source, reverse=True)
        asked, answered = (self.q, self.q_table), (self.k, self.k_table)
        d_q, d_q_table = self._channels(answered, asked, grad_y, value, kept, read, met)
        d_k, d_k_table = self._channels(asked, answered, value, grad_y, after, written, None)
        anchor = torch.empty(blocks, self.heads, **wide)
        self.kernels.anchor_kernel[(self.heads, blocks)](
            kept, after, final, _or(grad_final, final).contiguous(), plan.blocks, anchor, self.heads,
            SIZE=self.state * self.channels, BOUNDARY=grad_final is not None, num_warps=4,
        )  # fmt: skip
        self.kernels.finish_gates_kernel[(blocks,)](
            read, written, _or(d_source, read), anchor, plan.blocks, out["log_decay"], out.get("source", read),
            out["log_decay"].stride(0), out["source"].stride(0) if "source" in out else 0, self.tokens, self.heads,
            HEADS=_power_of_two(self.heads), C=CHUNK, SOURCE=self.source is not None, num_warps=4,
        )  # fmt: skip
        self.kernels.finish_channels_kernel[(plan.chunks.shape[0],)](
            self.query, self.key, d_q, d_k, _or(self.frequencies, value), plan.chunks, out["query"], out["key"],
            self.query.stride(0), self.key.stride(0), self.query.stride(1), self.key.stride(1),
            out["query"].stride(0), out["key"].stride(0), self.tokens, self.scale, self.epsilon or 0.0,
            COPIES=self.copies, K=self.state, C=CHUNK, NORM=self.epsilon is not None, ROTATE=self.flags["ROTATE"],
            num_warps=8,
        )  # fmt: skip
        heads = {"initial": d_initial}
        if self.table:
            heads |= {"query_bias": self._bias(d_q_table, self.scale), "key_bias": self._bias(d_k_table, 1.0)}
        if self.skip is not None:
            heads["skip"] = met.sum(1)
        return out | heads

    def _channels(self, channels, other, left, right, start, moved: Tensor, met: Tensor | None):
        """Gradient of queries as prepared [copies, tokens, state], or without `met` of keys; of their turned biases."""
        value, blocks = self.value, self.plan.blocks
        atomic = self.copies == 1 and not torch.are_deterministic_algorithms_enabled()
        make = torch.zeros if atomic else torch.empty
        wide = {"dtype": torch.float32, "device": value.device}
        gradient = make(1 if atomic else self.heads, self.tokens, self.state, **wide)
        tables = (1 if atomic else blocks.shape[0]) if self.table else 0
        d_table = make(tables, self.heads, CHUNK, self.state, **wide)
        self.kernels.channel_kernel[(self.heads, blocks.shape[0])](
            *channels, *other, left, right, self.running, _or(self.weight, self.running),
            _or(self.frequencies, value), blocks, start, gradient, d_table, moved, _or(met, moved),
            left.stride(0), right.stride(0), self.tokens, self.heads,
            BLOCK_CHUNKS=BLOCK_CHUNKS, ATOMIC=atomic, SKIP=self.skip is not None, REVERSE=met is None,
            **self.mixing, num_warps=4, num_stages=1,
        )  # fmt: skip
        return (gradient.sum(0, keepdim=True) if self.copies == 1 and not atomic else gradient), d_table

    def _bias(self, d_table: Tensor, scale: float) -> Tensor:
        """Gradient of a bias [heads, state] from that of its turned copies [tables, heads, CHUNK, state]."""
        bias = d_table.new_empty(self.heads, self.state)
        self.kernels.finish_bias_kernel[(self.heads,)](
            d_table, _or(self.frequencies, d_table), bias, d_table.shape[0], self.heads, scale,
            K=self.state, C=CHUNK, ROTATE=self.flags["ROTATE"], num_warps=4,
        )  # fmt: skip
        return bias


def flat(x: Tensor) -> Tensor:
    """[batch, time, ...] as [tokens, ...] with dense rows; a view wherever strides allow."""
    batch, time, *rest = x.shape
    dense, expected = True, 1
    for size, stride in zip(reversed(rest), reversed(x.stride()[2:]), strict=True):
        dense &= size == 1 or stride == expected
        expected *= size
    if not dense or (batch > 1 and x.stride(0) != time * x.stride(1)):
        x = x.contiguous()
    return x.as_strided((batch * time, *rest), x.stride()[1:])


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _or(x: Tensor | None, placeholder: Tensor) -> Tensor:
    """An absent operand's pointer is never read, but the launcher wants one of the right kind."""
    return placeholder if x is None else x


def _power_of_two(size: int) -> int:
    return max(1 << (size - 1).bit_length(), 1)


def has_tiles(state: int, channels: int) -> bool:
    """Whether the kernels have tiles for a state of [state, channels] a head."""
    return state in (32, 64, 128) and channels in (16, 32, 64, 128)


@torch.library.custom_op("resnet_bk::semiseparable_mix_triton", mutates_args=())
def semiseparable_triton_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    source: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    frequencies: Tensor | None,
    skip: Tensor | None,
    initial: Tensor | None,
    position: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    epsilon: float | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final memory and, if `save`, the memories kept for the backward pass.

    `query` and `key` are [batch, time, heads or 1, state]; `bounds` (on the CPU) are the boundaries of packed
    documents; memories are in the absolute frame and `position` counts the tokens before the first.
    """
    operands = (query, key, value, log_decay, source, query_bias, key_bias, frequencies, skip)
    if value.is_cuda:
        verify(operands, scale, epsilon)
    launch = Launch(operands, position, bounds, scale, epsilon)
    y, final, kept = launch.forward(initial, save)
    return y.view(value.shape), final, kept


@torch.library.custom_op("resnet_bk::semiseparable_mix_triton_backward", mutates_args=())
def semiseparable_triton_backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    source: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    frequencies: Tensor | None,
    skip: Tensor | None,
    initial: Tensor | None,
    position: Tensor | None,
    bounds: Tensor | None,
    final: Tensor,
    kept: Tensor,
    grad_y: Tensor,
    grad_final: Tensor | None,
    scale: float,
    epsilon: float | None,
) -> list[Tensor]:
    """Gradients of the first ten operands, in that order and less `frequencies`; empty where one is absent."""
    operands = (query, key, value, log_decay, source, query_bias, key_bias, frequencies, skip)
    launch = Launch(operands, position, bounds, scale, epsilon)
    tokens = {"query": query, "key": key, "value": value, "log_decay": log_decay, "source": source}
    out = {name: x.new_empty(launch.tokens, *x.shape[2:]) for name, x in tokens.items() if x is not None}
    grads = launch.backward(final, kept, grad_y, grad_final, initial is not None, out)
    heads = {"query_bias": query_bias, "key_bias": key_bias, "skip": skip, "initial": initial}
    return [
        value.new_empty(0) if like is None else grads[name].view(like.shape).to(like.dtype)
        for name, like in (tokens | heads).items()
    ]


@semiseparable_triton_op.register_fake
def _(query, key, value, log_decay, source, query_bias, key_bias, frequencies, skip, initial, position, bounds, *rest):
    # How many memories are kept is the operator's own affair: an unbacked size keeps it opaque to compilers.
    kept = torch.library.get_ctx().new_dynamic_size() if rest[-1] else 0
    rows = value.shape[0] if bounds is None else bounds.shape[0] - 1
    memory = (value.shape[2], query.shape[-1], value.shape[3])
    y = value.new_empty(value.shape)
    turned = (value.shape[2], value.shape[3], query.shape[-1])
    return y, y.new_empty(rows, *memory, dtype=torch.float32), y.new_empty(kept, *turned, dtype=torch.float32)


@semiseparable_triton_backward_op.register_fake
def _(
    query, key, value, log_decay, source, query_bias, key_bias, frequencies, skip, initial, position, bounds, final,
    kept, grad_y, grad_final, scale, epsilon,
):  # fmt: skip
    like = (query, key, value, log_decay, source, query_bias, key_bias, skip, initial)
    return [value.new_empty(0) if x is None else x.new_empty(x.shape) for x in like]


def _save(ctx, inputs, output) -> None:
    *tensors, scale, epsilon, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.epsilon = scale, epsilon


def _backward(ctx, grad_y, grad_final, _):
    *tensors, final, kept = ctx.saved_tensors
    grad_y = torch.zeros_like(tensors[2]) if grad_y is None else grad_y
    grads = semiseparable_triton_backward_op(*tensors, final, kept, grad_y, grad_final, ctx.scale, ctx.epsilon)
    present = [*tensors[:7], tensors[8], tensors[9]]
    found = [grad if like is not None else None for grad, like in zip(grads, present, strict=True)]
    return (*found[:7], None, *found[7:], None, None, None, None, None)


semiseparable_triton_op.register_autograd(_backward, setup_context=_save)

_BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def verify(operands: tuple[Any, ...], scale: float, epsilon: float | None) -> None:
    """Compare the kernels with the float64 reference once for every combination of sizes and options."""
    query, value = operands[0], operands[2]
    options = tuple(x is not None for x in operands[4:])
    shape_class = (value.device, value.dtype, query.shape[2] > 1, query.shape[-1], value.shape[-1], options, epsilon)
    verify_once("semiseparable_mix", shape_class, lambda: _errors(operands, scale, epsilon))


def _errors(operands: tuple[Any, ...], scale: float, epsilon: float | None) -> dict[str, tuple[float, float]]:
    """Relative errors of outputs and gradients on 600 random tokens in two packed documents, and their bounds."""
    from resnet_bk.ops.semiseparable.reference import semiseparable_reference

    query, _, value, *_ = operands
    generator = torch.Generator().manual_seed(0)
    time, heads, bounds = 600, 2, [0, 590, 600]
    copies, dtype = (heads if query.shape[2] > 1 else 1), value.dtype
    state, channels = query.shape[-1], value.shape[-1]
    shapes = {
        "query": (1, time, copies, state), "key": (1, time, copies, state), "value": (1, time, heads, channels),
        "log_decay": (1, time, heads), "source": (1, time, heads), "query_bias": (heads, state),
        "key_bias": (heads, state), "frequencies": None, "skip": (heads,),
    }  # fmt: skip

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(value.device)

    case: dict[str, Any] = {}
    for (name, shape), given in zip(shapes.items(), operands, strict=True):
        if given is None or shape is None:
            case[name] = given
        else:
            case[name] = draw(shape).to(torch.float32 if name in ("log_decay", "source") else dtype)
    case["log_decay"] = -0.05 * case["log_decay"].abs()
    initial, position = draw((2, heads, state, channels)).float(), torch.tensor([5, 0], device=value.device)
    grad_y, grad_final = draw(case["value"].shape).to(dtype), draw(initial.shape).float()
    launch = Launch(tuple(case.values()), position, torch.tensor(bounds), scale, epsilon)
    y, final, kept = launch.forward(initial, True)
    tokens = {name: case[name] for name in ("query", "key", "value", "log_decay", "source") if case[name] is not None}
    out = {name: x.new_empty(time, *x.shape[2:]) for name, x in tokens.items()}
    found = {"y": y, "memory": final} | launch.backward(final, kept, grad_y, grad_final, True, out)

    leaves = {
        name: x.double().requires_grad_() for name, x in (case | {"initial": initial}).items()
        if x is not None and name != "frequencies"
    }  # fmt: skip
    with torch.enable_grad():
        norm = (
            (lambda x: torch.nn.functional.rms_norm(x, (state,), eps=epsilon)) if epsilon is not None else (lambda x: x)
        )
        truth = semiseparable_reference(
            norm(leaves["query"]), norm(leaves["key"]), leaves["value"], leaves["log_decay"],
            *(leaves.get(name) for name in ("source", "query_bias", "key_bias", "skip")),
            frequencies=case["frequencies"], scale=scale, memory=leaves["initial"], position=position, bounds=bounds,
        )  # fmt: skip
        loss = (truth[0] * grad_y).sum() + (truth[1] * grad_final).sum()
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    expected |= {"y": truth[0], "memory": truth[1]}
    return {
        name: (((found[name].double().view(x.shape) - x).norm() / x.norm()).item(), _BOUNDS[dtype])
        for name, x in ((name, x.detach()) for name, x in expected.items())
    }
