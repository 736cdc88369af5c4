"""How the chunked form cuts time up, and what forward and backward both compute for one segment.

Time is cut into chunks (score matrices) and chunks are grouped into segments (working memory). One Python loop runs
over segments and reuses one set of buffers, so memory traffic stays near the cache and nothing of size
time x heads x state is ever allocated. Buffers are laid out [chunk, row of the batch, head, site, channel].

Frames: inside a segment keys and queries are rotated by their distance from the segment's first token. Only
differences of positions matter, so the memory is turned back once a segment and no angle ever grows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_bk.ops.dispatch import compute_dtype, planned_gpu
from resnet_bk.ops.semiseparable.rotation import phase_table, rotate, turn_into

# Bytes of one [segment, head, state] buffer. About ten buffers are alive in the backward pass: on a CPU they should
# stay near the cache of a core, on a GPU they should fill the device.
_SEGMENT_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}


@dataclass(frozen=True)
class Layout:
    """Sizes of one call and how it is cut up; times are multiples of `chunk`."""

    batch: int
    time: int
    heads: int
    state: int
    value: int
    chunk: int
    rows: int
    """Rows of the batch worked on together."""
    chunks: int
    """Chunks per segment."""

    @property
    def segments(self) -> int:
        """Segments per sequence."""
        return -(-self.time // (self.chunk * self.chunks))

    def blocks(self) -> Iterator[tuple[slice, int, int, int]]:
        """(rows, segment, first token, end token) of every segment; rows outermost, time in order."""
        step = self.chunk * self.chunks
        for first in range(0, self.batch, self.rows):
            for segment in range(self.segments):
                end = min(self.time, (segment + 1) * step)
                yield slice(first, min(self.batch, first + self.rows)), segment, segment * step, end


def segment_layout(
    value: Tensor, state: int, chunk: int, *, dtype: torch.dtype = torch.float32, packed: bool = False
) -> Layout:
    """How a call on `value` [batch, time, heads, channels] with keys of `state` channels is cut up."""
    batch, time, heads, width = value.shape
    device = "cuda" if planned_gpu() else value.device.type
    budget = _SEGMENT_BYTES.get(device, _SEGMENT_BYTES["cuda"])
    tokens = max(chunk, budget // (heads * state * dtype.itemsize))
    chunks = max(1, min(tokens, time) // chunk)
    rows = 1 if packed else max(1, min(batch, tokens // (chunks * chunk)))
    return Layout(batch, time, heads, state, width, chunk, rows, chunks)


@dataclass(frozen=True)
class Documents:
    """Packed documents, each padded to whole chunks: which chunk starts and which ends which one."""

    starting: dict[int, int]
    ending: dict[int, int]
    initial: Tensor


def documents_of(starts: Tensor | None, initial: Tensor, layout: Layout) -> Documents | None:
    """The documents whose first chunks are `starts`; None where nothing is packed."""
    if starts is None:
        return None
    first = starts.tolist()
    last = [*(start - 1 for start in first[1:]), layout.time // layout.chunk - 1]
    return Documents({c: row for row, c in enumerate(first)}, {c: row for row, c in enumerate(last)}, initial)


_local = threading.local()


def _workspace(name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised tensor of this shape; on a CPU one storage a name and thread, reused by every call.

    Fresh memory costs a page fault every 4 KiB, which took a fifth of the time of short calls. GPUs have a caching
    allocator. Nothing that leaves an operator may be a view of it.
    """
    if like.device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=like.device)
    if not hasattr(_local, "buffers"):
        _local.buffers = {}
    size = math.prod(shape)
    kept = _local.buffers.get((name, dtype))
    if kept is None or kept.numel() < size:
        # A storage born in inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            kept = _local.buffers[name, dtype] = torch.empty(size, dtype=dtype, device="cpu")
    return kept[:size].view(shape)


def flat(x: Tensor) -> Tensor:
    """[chunks, rows, heads, ...] as one batch of matrices."""
    return x.flatten(0, 2)


class Segments:
    """Buffers, loads and the memory recursion of one segment at a time."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        source: Tensor | None,
        query_bias: Tensor | None,
        key_bias: Tensor | None,
        frequencies: Tensor | None,
        *,
        scale: float,
        chunk: int,
        packed: bool,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.log_decay, self.source, self.frequencies, self.scale = log_decay, source, frequencies, scale
        self.dtype = compute_dtype(value, log_decay)
        state = query.shape[-1]
        self.layout = segment_layout(value, state, chunk, dtype=self.dtype, packed=packed)
        chunks = self.layout.chunks
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}
        places = torch.arange(chunk * chunks, device=value.device)
        self.phases = None if frequencies is None else phase_table(places, frequencies, self.dtype)
        self.query_table = self._bias_table(query_bias, scale)
        self.key_table = self._bias_table(key_bias, 1.0)

    def _bias_table(self, bias: Tensor | None, scale: float) -> Tensor | None:
        """Rotated, scaled per-head bias [chunks, 1, heads, chunk, state] for every site of a segment."""
        if bias is None:
            return None
        bias = (scale * bias.to(self.dtype))[:, None]
        chunks, chunk = self.layout.chunks, self.layout.chunk
        phases = None
        if self.phases is not None:
            cos, sin = (part.view(chunks, 1, chunk, -1) for part in self.phases)
            phases = cos, sin
        return turn_into(bias.new_empty(chunks, bias.shape[0], chunk, bias.shape[-1]), bias, phases)[:, None]

    def buffer(self, name: str, *shape: int, extra: int = 0) -> Tensor:
        """Uninitialised [chunks + extra, rows, heads, *shape]; one storage a name, kept between calls."""
        return _workspace(name, (self.chunks + extra, self.count, self.layout.heads, *shape), self.value, self.dtype)

    def by_chunk(self, x: Tensor) -> Tensor:
        """View [chunks, rows, heads, chunk, ...] of the segment's part of x [batch, time, heads, ...]."""
        return x[self.rows, self.start : self.end].unflatten(1, (-1, self.layout.chunk)).movedim((1, 3), (0, 2))

    def load(self, rows: slice, start: int, end: int) -> None:
        """Make tokens start..end the current segment: rotate, weigh, and form decays and raw scores."""
        chunk, width = self.layout.chunk, self.layout.value
        self.rows, self.start, self.end = rows, start, end
        self.chunks, self.count = (end - start) // chunk, rows.stop - rows.start
        self.q = self._load_channels("query", self.query, self.query_table, self.scale)
        self.k = self._load_channels("key", self.key, self.key_table, 1.0)
        self.x = self.by_chunk(self.value)
        self.sourced = self.buffer("sourced", chunk, width)
        if self.source is None:
            self.sourced.copy_(self.x)
        else:
            self.weight = self.by_chunk(self.source)[..., None].to(self.dtype)
            torch.mul(self.x, self.weight, out=self.sourced)
        total = self.by_chunk(self.log_decay).to(self.dtype).cumsum(-1)
        self.from_start = total.exp()[..., None]
        self.to_end = (total[..., -1:] - total).exp()[..., None]
        self.across = self.from_start[..., -1:, :]
        self.decay = self.buffer("decay", chunk, chunk)
        # Zeroing the future after exp, not -inf before it: the vectorised exp is five times slower on infinities.
        torch.sub(total[..., :, None], total[..., None, :], out=self.decay).exp_().tril_()
        self.scores = self.buffer("scores", chunk, chunk)
        torch.bmm(flat(self.q), flat(self.k).mT, out=flat(self.scores))
        self.scores.mul_(self.decay)
        self.faded = torch.mul(self.sourced, self.to_end, out=self.buffer("faded", chunk, width))

    def _load_channels(self, name: str, x: Tensor, table: Tensor | None, scale: float) -> Tensor:
        """Rotated per-head queries or keys [chunks, rows, heads, chunk, state]."""
        part = x[self.rows, self.start : self.end].to(self.dtype)
        if scale != 1.0:
            part = part * scale
        if self.phases is not None:
            cos, sin = (phase[: self.end - self.start, None] for phase in self.phases)
            part = rotate(part, cos, sin)
        part = part.unflatten(1, (-1, self.layout.chunk)).permute(1, 0, 3, 2, 4)
        out = self.buffer(name, self.layout.chunk, self.layout.state)
        return out.copy_(part) if table is None else torch.add(part, table[: self.chunks], out=out)

    def unload_channels(self, grad: Tensor, out: Tensor, scale: float) -> None:
        """Write the gradient of unrotated queries or keys into `out` [batch, time, heads or 1, state]."""
        if out.shape[2] == 1:
            grad = grad.sum(2, keepdim=True)
        grad = grad.permute(1, 0, 3, 2, 4).flatten(1, 2)
        if self.phases is not None:
            cos, sin = (phase[: self.end - self.start, None] for phase in self.phases)
            grad = rotate(grad, cos, -sin)
        out[self.rows, self.start : self.end] = grad * scale

    def bias_gradient(self, table: Tensor, scale: float) -> Tensor:
        """Gradient of a per-head bias [heads, state] from that of its table [chunks, heads, chunk, state]."""
        if self.phases is not None:
            chunks, chunk = self.layout.chunks, self.layout.chunk
            cos, sin = (part.view(chunks, 1, chunk, -1) for part in self.phases)
            table = turn_into(torch.empty_like(table), table, (cos, -sin))
        return scale * table.sum((0, 2))

    def turn(self, memory: Tensor, sites: int) -> Tensor:
        """`memory` [rows, heads, state, value] with its key channels turned by `sites` positions."""
        if self.frequencies is None or sites == 0:
            return memory
        if sites not in self._turns:
            place = torch.tensor(sites, device=memory.device)
            cos, sin = phase_table(place, self.frequencies, memory.dtype)
            self._turns[sites] = cos[:, None], sin[:, None]
        return turn_into(torch.empty_like(memory), memory, self._turns[sites], dim=-2)

    def propagate(self, memory: Tensor, documents: Documents | None) -> tuple[Tensor, dict[int, Tensor]]:
        """Memory before and after every chunk, and after each chunk that ends a document (by chunk).

        The first is [chunks + 1, rows, heads, state, value]; where a document starts, its initial memory stands in
        the place of the end of the document before.
        """
        chain = self.buffer("memory", self.layout.state, self.layout.value, extra=1)
        chain[0] = memory  # before the rest is overwritten: `memory` may be the end of the last segment's chain
        torch.bmm(flat(self.k).mT, flat(self.faded), out=flat(chain[1:]))
        ends: dict[int, Tensor] = {}
        for c in range(self.chunks):
            place = self.start // self.layout.chunk + c
            if documents is not None and place in documents.starting:
                chain[c] = self.turn(documents.initial[documents.starting[place]][None], c * self.layout.chunk)
            chain[c + 1].addcmul_(chain[c], self.across[c])
            if documents is not None and place in documents.ending:
                ends[c] = chain[c + 1].clone()
        return chain, ends
