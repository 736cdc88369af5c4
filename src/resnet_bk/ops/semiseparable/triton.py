"""Triton kernels of the semiseparable mixing; `kernels.py` launches them and DERIVATION.md explains them.

Tokens of all rows lie on one axis. Every row (sequence or packed document) is cut into segments and these into chunks
of C tokens; a program walks the chunks of one segment and head with the memory in registers. Queries and keys come
turned by their distance from the start of their chunk, so the memory is turned once a chunk and nothing depends on the
position but the frames of the first and last memory. Channel pairs (p, p + K / 2) are kept in two halves, so that a
turn exchanges no data between threads. One long file, because only a `triton.py` may import Triton.
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false

import triton
import triton.language as tl

# Columns of the segment table, int64.
BEGIN = tl.constexpr(0)  # first token
END = tl.constexpr(1)  # one past the last token
ROW = tl.constexpr(2)
ROW_BEGIN = tl.constexpr(3)
FIRST = tl.constexpr(4)  # 1 for the first segment of its row
LAST = tl.constexpr(5)
BLOCK = tl.constexpr(6)  # index of the segment's first kept memory
COLUMNS = tl.constexpr(7)


@triton.jit
def _phases(count, frequency):
    """Cosine and sine of frequency * count: product and reduction in float64."""
    angle = count.to(tl.float64) * frequency
    angle = (angle - tl.floor(angle * 0.15915494309189535) * 6.283185307179586).to(tl.float32)
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def _turned(low, high, cos, sin):
    """A pair of channels turned by the angle of (cos, sin); -sin turns it back."""
    return cos * low - sin * high, sin * low + cos * high


@triton.jit
def _within(rows, columns, LIMIT: tl.constexpr, TILE: tl.constexpr):
    """Mask of the tile's cells that exist: tiles narrower than 64 are padded to it."""
    mask = rows[:, None]
    if LIMIT < TILE:
        mask = mask & (columns < LIMIT)[None, :]
    return mask


@triton.jit
def _memory_tile(K: tl.constexpr, P: tl.constexpr, L: tl.constexpr, Q: tl.constexpr):
    """Offsets and mask [Q, L] of the first half of the channels in a memory kept as [P, K]."""
    half, channel = tl.arange(0, L), tl.arange(0, Q)
    return channel[:, None] * K + half[None, :], _within(channel < P, half, K // 2, L)


@triton.jit
def _load_memory(memory, index, K: tl.constexpr, P: tl.constexpr, L: tl.constexpr, Q: tl.constexpr):
    """Both halves [Q, L] of matrix `index` of `memory`, which holds matrices [P, K]."""
    offset, mask = _memory_tile(K, P, L, Q)
    base = memory + index.to(tl.int64) * (K * P)
    return tl.load(base + offset, mask=mask, other=0.0), tl.load(base + K // 2 + offset, mask=mask, other=0.0)


@triton.jit
def _store_memory(memory, index, low, high, K: tl.constexpr, P: tl.constexpr, L: tl.constexpr, Q: tl.constexpr):
    offset, mask = _memory_tile(K, P, L, Q)
    base = memory + index.to(tl.int64) * (K * P)
    tl.store(base + offset, low, mask=mask)
    tl.store(base + K // 2 + offset, high, mask=mask)


@triton.jit
def _load_channels(x, table, inside, K: tl.constexpr, L: tl.constexpr, C: tl.constexpr, TABLE: tl.constexpr):
    """Both halves [C, L] of a chunk's per-head queries or keys: the shared ones plus the turned bias of the head."""
    step, half = tl.arange(0, C), tl.arange(0, L)
    place = step[:, None] * K + half[None, :]
    mask = _within(inside, half, K // 2, L)
    low = tl.load(x + place, mask=mask, other=0.0)
    high = tl.load(x + K // 2 + place, mask=mask, other=0.0)
    if TABLE:
        mask = _within(step < C, half, K // 2, L)
        low += tl.load(table + place, mask=mask, other=0.0)
        high += tl.load(table + K // 2 + place, mask=mask, other=0.0)
    return low, high


@triton.jit
def _load_tile(x, token, stride, inside, C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """Rows [C, Q] of a chunk that starts at `token`."""
    channel = tl.arange(0, Q)
    place = tl.arange(0, C)[:, None] * stride + channel[None, :]
    return tl.load(x + token * stride + place, mask=_within(inside, channel, P, Q), other=0.0)


@triton.jit
def _load_log(running, token, size, inside, C: tl.constexpr):
    """Running log decays [C] of a chunk and the last of them."""
    base = running + token
    return tl.load(base + tl.arange(0, C), mask=inside, other=0.0), tl.load(base + size - 1)


@triton.jit
def _chunk_phases(frequency, C: tl.constexpr, K: tl.constexpr, L: tl.constexpr):
    """Phases [1, L] of one chunk."""
    half = tl.arange(0, L)
    cos, sin = _phases(tl.full((L,), C, tl.int32), tl.load(frequency + half, mask=half < K // 2, other=0.0))
    return cos[None, :], sin[None, :]


@triton.jit
def _forward_decay(log, inside, C: tl.constexpr):
    """Decay [C, C] from column to row, zero for later columns."""
    step = tl.arange(0, C)
    past = (step[:, None] >= step[None, :]) & inside[:, None]
    return tl.where(past, tl.exp2(log[:, None] - log[None, :]), 0.0)


@triton.jit
def _backward_decay(log, inside, C: tl.constexpr):
    """Decay [C, C] from row to column, zero for earlier columns and those behind the last token."""
    step = tl.arange(0, C)
    future = (step[:, None] <= step[None, :]) & inside[None, :]
    return tl.where(future, tl.exp2(log[None, :] - log[:, None]), 0.0)


@triton.jit
def _prepare_table(bias, table, head, cos, sin, scale, K: tl.constexpr, C: tl.constexpr, ROTATE: tl.constexpr):
    """A head's bias times `scale`, turned by every distance [C, K] from the start of a chunk."""
    L: tl.constexpr = K // 2
    offset = tl.arange(0, L)
    low = tl.broadcast_to(tl.load(bias + head * K + offset)[None, :].to(tl.float32) * scale, (C, L))
    high = tl.broadcast_to(tl.load(bias + head * K + L + offset)[None, :].to(tl.float32) * scale, (C, L))
    if ROTATE:
        low, high = _turned(low, high, cos, sin)
    target = table + (head * C + tl.arange(0, C)[:, None]) * K + offset[None, :]
    tl.store(target, low.to(table.dtype.element_ty))
    tl.store(target + L, high.to(table.dtype.element_ty))


@triton.jit
def prepare_kernel(
    query, key, log_decay, source, query_bias, key_bias, frequency, chunks,
    query_out, key_out, running_out, source_out, query_table, key_table,
    query_stride, key_stride, query_head_stride, key_head_stride, decay_stride, source_stride,
    tokens, num_chunks, scale, epsilon, heads,
    HEADS: tl.constexpr, COPIES: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """One chunk: queries and keys normed and turned, running log decays (base 2); or one head: turned biases."""
    L: tl.constexpr = K // 2
    step = tl.arange(0, C)
    channel = tl.arange(0, L)
    omega = tl.load(frequency + channel) if ROTATE else tl.zeros((L,), tl.float64)
    cos, sin = _phases(step[:, None], omega[None, :])
    program = tl.program_id(0)
    if program < num_chunks:
        begin, end = tl.load(chunks + 2 * program), tl.load(chunks + 2 * program + 1)
        rows = begin + step
        inside = rows < end
        for copy in range(COPIES):
            for which in tl.static_range(2):
                x = query if which == 0 else key
                stride = query_stride if which == 0 else key_stride
                head_stride = query_head_stride if which == 0 else key_head_stride
                out = query_out if which == 0 else key_out
                base = x + rows[:, None] * stride + copy * head_stride + channel[None, :]
                low = tl.load(base, mask=inside[:, None], other=0.0).to(tl.float32)
                high = tl.load(base + L, mask=inside[:, None], other=0.0).to(tl.float32)
                if NORM:
                    size = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / K + epsilon)
                    low, high = low * size[:, None], high * size[:, None]
                if which == 0:
                    low, high = low * scale, high * scale
                if ROTATE:
                    low, high = _turned(low, high, cos, sin)
                place = out + (copy * tokens + rows[:, None]) * K + channel[None, :]
                tl.store(place, low.to(out.dtype.element_ty), mask=inside[:, None])
                tl.store(place + L, high.to(out.dtype.element_ty), mask=inside[:, None])
        head = tl.arange(0, HEADS)
        valid = inside[:, None] & (head < heads)[None, :]
        decay = tl.load(log_decay + rows[:, None] * decay_stride + head[None, :], mask=valid, other=0.0)
        running = tl.cumsum(decay.to(tl.float32), 0) * 1.4426950408889634
        place = head[None, :].to(tl.int64) * tokens + rows[:, None]
        tl.store(running_out + place, running, mask=valid)
        if SOURCE:
            weight = tl.load(source + rows[:, None] * source_stride + head[None, :], mask=valid, other=0.0)
            tl.store(source_out + place, weight.to(tl.float32), mask=valid)
    else:
        _prepare_table(query_bias, query_table, program - num_chunks, cos, sin, scale, K, C, ROTATE)
        _prepare_table(key_bias, key_table, program - num_chunks, cos, sin, 1.0, K, C, ROTATE)


@triton.jit
def contribute_kernel(
    channels, table, x, running, source, frequency, segments, contribution, total,
    x_stride, tokens, heads,
    K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, L: tl.constexpr, Q: tl.constexpr, TABLE: tl.constexpr,
    COPIES: tl.constexpr, ROTATE: tl.constexpr, SOURCE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Memory after a segment that starts empty (or, in reverse, its cotangent before it), and its total log decay."""
    head, segment = tl.program_id(0), tl.program_id(1)
    row = segments + segment * COLUMNS
    begin, end = tl.load(row + BEGIN), tl.load(row + END)
    if tl.load(row + (FIRST if REVERSE else LAST)) == 1:
        return  # nobody asks for it
    low = tl.zeros((Q, L), tl.float32)
    high = tl.zeros((Q, L), tl.float32)
    step = tl.arange(0, C)
    decayed = tl.zeros((), tl.float32)
    if ROTATE:
        cos, sin = _chunk_phases(frequency, C, K, L)
    if COPIES > 1:
        channels += head.to(tl.int64) * tokens * K
    table += head * C * K
    running += head.to(tl.int64) * tokens
    source += head.to(tl.int64) * tokens
    x += head * P
    count = tl.cdiv(end - begin, C).to(tl.int32)
    for i in range(0, count):
        chunk = count - 1 - i if REVERSE else i
        token = begin + chunk * C
        size = tl.minimum(end - token, C).to(tl.int32)
        inside = step < size
        c1, c2 = _load_channels(channels + token * K, table, inside, K, L, C, TABLE)
        value = _load_tile(x, token, x_stride, inside, C, P, Q)
        log, last = _load_log(running, token, size, inside, C)
        if REVERSE:
            weight = tl.exp2(log)
            if ROTATE:
                low, high = _turned(low, high, cos, sin)
        else:
            weight = tl.exp2(last - log)
            if SOURCE:
                weight *= tl.load(source + token + step, mask=inside, other=0.0)
        weighted = tl.trans((value * weight[:, None]).to(c1.dtype))
        decay = tl.exp2(last)
        low = tl.dot(weighted, c1, low * decay, input_precision=PRECISION)
        high = tl.dot(weighted, c2, high * decay, input_precision=PRECISION)
        if ROTATE and not REVERSE:
            low, high = _turned(low, high, cos, -sin)
        decayed += last
    _store_memory(contribution, segment * heads + head, low, high, K, P, L, Q)
    tl.store(total + segment * heads + head, decayed)


@triton.jit
def carry_kernel(
    boundary, position, contribution, total, frequency, segments, first_segment, carried,
    heads, K: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
    BOUNDARY: tl.constexpr, ROTATE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Memory before every segment of a row (or, in reverse, its cotangent after it), Q value channels at a time."""
    L: tl.constexpr = K // 2
    head, line = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(first_segment + line), tl.load(first_segment + line + 1)
    half, channel = tl.arange(0, L)[None, :], tl.program_id(2) * Q + tl.arange(0, Q)[:, None]
    offset = channel * K + half
    low = tl.zeros((Q, L), tl.float32)
    high = tl.zeros((Q, L), tl.float32)
    if ROTATE:
        omega = tl.load(frequency + tl.arange(0, L))
    if BOUNDARY:
        base = boundary + (line * heads + head).to(tl.int64) * (K * P)
        low += tl.load(base + half * P + channel)
        high += tl.load(base + (L + half) * P + channel)
        if ROTATE:
            where = tl.load(position + line)
            if REVERSE:
                row = segments + (stop - 1) * COLUMNS
                where += tl.cdiv(tl.load(row + END) - tl.load(row + ROW_BEGIN), C) * C
            cos, sin = _phases(tl.zeros((L,), tl.int64) + where, omega)
            low, high = _turned(low, high, cos[None, :], -sin[None, :])
    for i in range(0, (stop - start).to(tl.int32)):
        segment = stop - 1 - i if REVERSE else start + i
        place = (segment * heads + head).to(tl.int64) * (K * P)
        tl.store(carried + place + offset, low)
        tl.store(carried + place + L + offset, high)
        if i + 1 < stop - start:
            row = segments + segment * COLUMNS
            decay = tl.exp2(tl.load(total + segment * heads + head))
            low, high = low * decay, high * decay
            if ROTATE:
                length = tl.cdiv(tl.load(row + END) - tl.load(row + BEGIN), C) * C
                cos, sin = _phases(tl.zeros((L,), tl.int64) + length, omega)
                low, high = _turned(low, high, cos[None, :], (sin if REVERSE else -sin)[None, :])
            low += tl.load(contribution + place + offset)
            high += tl.load(contribution + place + L + offset)


@triton.jit
def mix_kernel(
    query, key, query_table, key_table, x, running, source, frequency, skip, position, segments,
    start, y, final, kept, value, d_source,
    x_stride, y_stride, value_stride, tokens, heads,
    K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, L: tl.constexpr, Q: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr, TABLE: tl.constexpr, COPIES: tl.constexpr, ROTATE: tl.constexpr,
    SOURCE: tl.constexpr, SKIP: tl.constexpr, START: tl.constexpr, KEEP: tl.constexpr, REVERSE: tl.constexpr,
    FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment and head: outputs, and the memory before every block of chunks and after the row.

    In reverse it is the gradient of the values: keys ask and queries answer, `x` is the gradient of the outputs and
    time runs backwards. The gradients of the sources come along in `d_source`.
    """
    head, segment = tl.program_id(0), tl.program_id(1)
    row = segments + segment * COLUMNS
    begin, end = tl.load(row + BEGIN), tl.load(row + END)
    step, channel = tl.arange(0, C), tl.arange(0, Q)
    if START:
        low, high = _load_memory(start, segment * heads + head, K, P, L, Q)
    else:
        low = tl.zeros((Q, L), tl.float32)
        high = tl.zeros((Q, L), tl.float32)
    if ROTATE:
        cos, sin = _chunk_phases(frequency, C, K, L)
    if COPIES > 1:
        query += head.to(tl.int64) * tokens * K
        key += head.to(tl.int64) * tokens * K
    query_table += head * C * K
    key_table += head * C * K
    running += head.to(tl.int64) * tokens
    source += head.to(tl.int64) * tokens
    x += head * P
    y += head * P
    if SKIP:
        direct = tl.load(skip + head).to(tl.float32)
    value += head * P
    d_source += head.to(tl.int64) * tokens
    kept_index = tl.load(row + BLOCK) * heads + head
    count = tl.cdiv(end - begin, C).to(tl.int32)
    for i in range(0, count):
        chunk = count - 1 - i if REVERSE else i
        if KEEP:
            # Before a block in the direction of the walk.
            if ((chunk + 1) % BLOCK_CHUNKS == 0 or i == 0) if REVERSE else (chunk % BLOCK_CHUNKS == 0):
                _store_memory(kept, kept_index + chunk // BLOCK_CHUNKS * heads, low, high, K, P, L, Q)
        token = begin + chunk * C
        size = tl.minimum(end - token, C).to(tl.int32)
        inside = step < size
        k1, k2 = _load_channels(key + token * K, key_table, inside, K, L, C, TABLE)
        q1, q2 = _load_channels(query + token * K, query_table, inside, K, L, C, TABLE)
        dtype = q1.dtype
        tile = _load_tile(x, token, x_stride, inside, C, P, Q)
        log, last = _load_log(running, token, size, inside, C)
        if SOURCE:
            weight = tl.load(source + token + step, mask=inside, other=0.0)
        decay = tl.exp2(last)
        if REVERSE:
            if ROTATE:
                low, high = _turned(low, high, cos, sin)
            scores = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
            scores = tl.dot(k2, tl.trans(q2), scores, input_precision=PRECISION)
            scores = (scores * _backward_decay(log, inside, C)).to(dtype)
            out = tl.dot(k1, tl.trans(low.to(dtype)), input_precision=PRECISION)
            out = tl.dot(k2, tl.trans(high.to(dtype)), out, input_precision=PRECISION)
            out = tl.dot(scores, tile, out * tl.exp2(last - log)[:, None], input_precision=PRECISION)
            weighted = tl.trans((tile * tl.exp2(log)[:, None]).to(dtype))
            low = tl.dot(weighted, q1, low * decay, input_precision=PRECISION)
            high = tl.dot(weighted, q2, high * decay, input_precision=PRECISION)
            if SOURCE:
                mine = _load_tile(value, token, value_stride, inside, C, P, Q).to(tl.float32)
                tl.store(d_source + token + step, tl.sum(mine * out, 1), mask=inside)
                out *= weight[:, None]
        else:
            incoming = tile.to(tl.float32)
            if SOURCE:
                incoming *= weight[:, None]
            scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
            scores = (scores * _forward_decay(log, inside, C)).to(dtype)
            out = tl.dot(q1, tl.trans(low.to(dtype)), input_precision=PRECISION)
            out = tl.dot(q2, tl.trans(high.to(dtype)), out, input_precision=PRECISION)
            out = tl.dot(scores, incoming.to(dtype), out * tl.exp2(log)[:, None], input_precision=PRECISION)
            weighted = tl.trans((incoming * tl.exp2(last - log)[:, None]).to(dtype))
            low = tl.dot(weighted, k1, low * decay, input_precision=PRECISION)
            high = tl.dot(weighted, k2, high * decay, input_precision=PRECISION)
            if ROTATE:
                low, high = _turned(low, high, cos, -sin)
        if SKIP:
            out += direct * tile.to(tl.float32)
        place = step[:, None] * y_stride + channel[None, :]
        tl.store(y + token * y_stride + place, out.to(y.dtype.element_ty), mask=_within(inside, channel, P, Q))
    if FINAL:
        if tl.load(row + (FIRST if REVERSE else LAST)) == 1:
            line = tl.load(row + ROW)
            half = tl.arange(0, L)
            if ROTATE:
                where = tl.load(position + line)
                if not REVERSE:
                    where += tl.cdiv(end - tl.load(row + ROW_BEGIN), C) * C
                omega = tl.load(frequency + half, mask=half < K // 2, other=0.0)
                c, s = _phases(tl.zeros((L,), tl.int64) + where, omega)
                low, high = _turned(low, high, c[None, :], s[None, :])
            base = final + (line * heads + head).to(tl.int64) * (K * P)
            place = half[None, :] * P + channel[:, None]
            mask = _within(channel < P, half, K // 2, L)
            tl.store(base + place, low, mask=mask)
            tl.store(base + K // 2 * P + place, high, mask=mask)


@triton.jit
def channel_kernel(
    channels, table, other, other_table, left, right, running, source, frequency, blocks,
    start, gradient, d_table, moved, met,
    left_stride, right_stride, tokens, heads,
    K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, L: tl.constexpr, Q: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr, TABLE: tl.constexpr, COPIES: tl.constexpr, ATOMIC: tl.constexpr,
    ROTATE: tl.constexpr, SOURCE: tl.constexpr, SKIP: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries (of keys, in reverse) and of their turned biases, for one block of chunks and head.

    Queries: `left` is the gradient of the outputs, `right` the values and `channels` the keys. In reverse: `left` the
    values, `right` the gradient of the outputs and `channels` the queries. `other` are the queries (keys) themselves,
    and `moved` receives their product with the gradient: what every token read (wrote). Both products contain a token's
    own share from the same rounded factors, so that it drops out of their difference however fast the head forgets.
    """
    head, block = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(blocks + 3 * block), tl.load(blocks + 3 * block + 1)
    step, half = tl.arange(0, C), tl.arange(0, L)
    low, high = _load_memory(start, block * heads + head, K, P, L, Q)
    if ROTATE:
        cos, sin = _chunk_phases(frequency, C, K, L)
    if COPIES > 1:
        channels += head.to(tl.int64) * tokens * K
        other += head.to(tl.int64) * tokens * K
    if not ATOMIC:
        gradient += head.to(tl.int64) * tokens * K
        d_table += block.to(tl.int64) * heads * C * K
    table += head * C * K
    other_table += head * C * K
    d_table += head * C * K
    running += head.to(tl.int64) * tokens
    source += head.to(tl.int64) * tokens
    moved += head.to(tl.int64) * tokens
    met += head.to(tl.int64) * tokens
    left += head * P
    right += head * P
    place = step[:, None] * K + half[None, :]
    if TABLE and not ATOMIC:
        table_low = tl.zeros((C, L), tl.float32)
        table_high = tl.zeros((C, L), tl.float32)
    whole = _within(step < C, half, K // 2, L)
    count = tl.cdiv(end - begin, C).to(tl.int32)
    for i in range(0, count):
        chunk = count - 1 - i if REVERSE else i
        token = begin + chunk * C
        size = tl.minimum(end - token, C).to(tl.int32)
        inside = step < size
        c1, c2 = _load_channels(channels + token * K, table, inside, K, L, C, TABLE)
        dtype = c1.dtype
        log, last = _load_log(running, token, size, inside, C)
        a = _load_tile(left, token, left_stride, inside, C, P, Q)
        b = _load_tile(right, token, right_stride, inside, C, P, Q)
        if SOURCE:
            weight = tl.load(source + token + step, mask=inside, other=0.0)
        if REVERSE:
            if ROTATE:
                low, high = _turned(low, high, cos, sin)
            if SOURCE:
                a = (a * weight[:, None]).to(dtype)
            scores = tl.dot(a, tl.trans(b), input_precision=PRECISION)
            scores = (scores * _backward_decay(log, inside, C)).to(dtype)
            reach = (a * tl.exp2(last - log)[:, None]).to(dtype)
            carry = tl.trans((b * tl.exp2(log)[:, None]).to(dtype))
        else:
            if SKIP:
                tl.store(met + token + step, tl.sum(a.to(tl.float32) * b.to(tl.float32), 1), mask=inside)
            if SOURCE:
                b = (b * weight[:, None]).to(dtype)
            scores = tl.dot(a, tl.trans(b), input_precision=PRECISION)
            scores = (scores * _forward_decay(log, inside, C)).to(dtype)
            reach = (a * tl.exp2(log)[:, None]).to(dtype)
            carry = tl.trans((b * tl.exp2(last - log)[:, None]).to(dtype))
        d1 = tl.dot(reach, low.to(dtype), input_precision=PRECISION)
        d1 = tl.dot(scores, c1, d1, input_precision=PRECISION)
        d2 = tl.dot(reach, high.to(dtype), input_precision=PRECISION)
        d2 = tl.dot(scores, c2, d2, input_precision=PRECISION)
        o1, o2 = _load_channels(other + token * K, other_table, inside, K, L, C, TABLE)
        tl.store(moved + token + step, tl.sum(o1.to(tl.float32) * d1 + o2.to(tl.float32) * d2, 1), mask=inside)
        mask = _within(inside, half, K // 2, L)
        if ATOMIC:
            tl.atomic_add(gradient + token * K + place, d1, mask=mask, sem="relaxed")
            tl.atomic_add(gradient + token * K + K // 2 + place, d2, mask=mask, sem="relaxed")
            if TABLE:
                tl.atomic_add(d_table + place, d1, mask=whole, sem="relaxed")
                tl.atomic_add(d_table + K // 2 + place, d2, mask=whole, sem="relaxed")
        else:
            tl.store(gradient + token * K + place, d1, mask=mask)
            tl.store(gradient + token * K + K // 2 + place, d2, mask=mask)
            if TABLE:
                table_low += d1
                table_high += d2
        decay = tl.exp2(last)
        low = tl.dot(carry, c1, low * decay, input_precision=PRECISION)
        high = tl.dot(carry, c2, high * decay, input_precision=PRECISION)
        if ROTATE and not REVERSE:
            low, high = _turned(low, high, cos, -sin)
    if TABLE and not ATOMIC:
        tl.store(d_table + place, table_low, mask=whole)
        tl.store(d_table + K // 2 + place, table_high, mask=whole)


@triton.jit
def anchor_kernel(kept, after, final, d_final, blocks, anchor, heads, SIZE: tl.constexpr, BOUNDARY: tl.constexpr):
    """Memory . cotangent at the end of every block and head: all that a decay before it sees of what follows."""
    head, block = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, SIZE)
    index = (block * heads + head).to(tl.int64)
    if tl.load(blocks + 3 * block + 2) >= 0:
        # The last block of a row: turning both by one angle does not change the product.
        met = 0.0
        if BOUNDARY:
            line = (tl.load(blocks + 3 * block + 2) * heads + head).to(tl.int64) * SIZE
            met = tl.sum(tl.load(final + line + place) * tl.load(d_final + line + place), 0)
    else:
        memory = tl.load(kept + (index + heads) * SIZE + place)
        met = tl.sum(memory * tl.load(after + index * SIZE + place), 0)
    tl.store(anchor + index, met)


@triton.jit
def finish_gates_kernel(
    read, written, d_source, anchor, blocks, decay_out, source_out,
    decay_stride, source_stride, tokens, heads,
    HEADS: tl.constexpr, C: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """Gradients of log decays and sources of one block: running sums from its end of what was read less written."""
    block = tl.program_id(0)
    begin, end = tl.load(blocks + 3 * block), tl.load(blocks + 3 * block + 1)
    step, head = tl.arange(0, C), tl.arange(0, HEADS)
    later = tl.load(anchor + block * heads + head, mask=head < heads, other=0.0)
    count = tl.cdiv(end - begin, C).to(tl.int32)
    for i in range(0, count):
        rows = begin + (count - 1 - i) * C + step
        valid = (rows < end)[:, None] & (head < heads)[None, :]
        place = head[None, :].to(tl.int64) * tokens + rows[:, None]
        if SOURCE:
            target = source_out + rows[:, None] * source_stride + head[None, :]
            weight = tl.load(d_source + place, mask=valid, other=0.0)
            tl.store(target, weight.to(source_out.dtype.element_ty), mask=valid)
        change = tl.load(read + place, mask=valid, other=0.0) - tl.load(written + place, mask=valid, other=0.0)
        running = tl.cumsum(change, 0, reverse=True) + later[None, :]
        later += tl.sum(change, 0)
        target = decay_out + rows[:, None] * decay_stride + head[None, :]
        tl.store(target, running.to(decay_out.dtype.element_ty), mask=valid)


@triton.jit
def finish_channels_kernel(
    query, key, d_query, d_key, frequency, chunks, query_out, key_out,
    query_stride, key_stride, query_head_stride, key_head_stride,
    query_out_stride, key_out_stride, tokens, scale, epsilon,
    COPIES: tl.constexpr, K: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """One chunk: gradients of raw queries and keys, turned back and through the norm."""
    L: tl.constexpr = K // 2
    step = tl.arange(0, C)
    channel = tl.arange(0, L)
    program = tl.program_id(0)
    begin, end = tl.load(chunks + 2 * program), tl.load(chunks + 2 * program + 1)
    rows = begin + step
    inside = rows < end
    if ROTATE:
        cos, sin = _phases(step[:, None], tl.load(frequency + channel)[None, :])
    for copy in range(COPIES):
        for which in tl.static_range(2):
            d = d_query if which == 0 else d_key
            out = query_out if which == 0 else key_out
            out_stride = query_out_stride if which == 0 else key_out_stride
            place = d + (copy * tokens + rows[:, None]) * K + channel[None, :]
            low = tl.load(place, mask=inside[:, None], other=0.0)
            high = tl.load(place + L, mask=inside[:, None], other=0.0)
            if ROTATE:
                low, high = _turned(low, high, cos, -sin)
            if which == 0:
                low, high = low * scale, high * scale
            if NORM:
                x = query if which == 0 else key
                stride = query_stride if which == 0 else key_stride
                head_stride = query_head_stride if which == 0 else key_head_stride
                base = x + rows[:, None] * stride + copy * head_stride + channel[None, :]
                x_low = tl.load(base, mask=inside[:, None], other=0.0).to(tl.float32)
                x_high = tl.load(base + L, mask=inside[:, None], other=0.0).to(tl.float32)
                size = tl.rsqrt((tl.sum(x_low * x_low, 1) + tl.sum(x_high * x_high, 1)) / K + epsilon)
                along = (tl.sum(x_low * low, 1) + tl.sum(x_high * high, 1)) * size * size / K
                low = (low - x_low * along[:, None]) * size[:, None]
                high = (high - x_high * along[:, None]) * size[:, None]
            target = out + rows[:, None] * out_stride + copy * K + channel[None, :]
            tl.store(target, low.to(out.dtype.element_ty), mask=inside[:, None])
            tl.store(target + L, high.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def finish_bias_kernel(
    d_table, frequency, bias_out, tables, heads, scale,
    K: tl.constexpr, C: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Gradient of one head's bias [K]: that of its turned copies, turned back and summed."""
    L: tl.constexpr = K // 2
    head = tl.program_id(0)
    step, half = tl.arange(0, C), tl.arange(0, L)
    place = step[:, None] * K + half[None, :]
    low = tl.zeros((C, L), tl.float32)
    high = tl.zeros((C, L), tl.float32)
    for table in range(0, tables):
        base = d_table + (table * heads + head).to(tl.int64) * (C * K)
        low += tl.load(base + place)
        high += tl.load(base + L + place)
    if ROTATE:
        cos, sin = _phases(step[:, None], tl.load(frequency + half)[None, :])
        low, high = _turned(low, high, cos, -sin)
    tl.store(bias_out + head * K + half, tl.sum(low, 0) * scale)
    tl.store(bias_out + head * K + L + half, tl.sum(high, 0) * scale)
