"""Triton kernels of the semiseparable mixing; `kernels.py` launches them and DERIVATION.md explains them.

Tokens of all rows lie on one axis. Every row (sequence or packed document) is cut into segments and these into chunks
of C tokens; a program walks the chunks of one segment and head with the memory in registers. Queries and keys come
turned by their distance from the start of their chunk, so the memory is turned once a chunk and nothing depends on the
position but the frames of the first and last memory. Channel pairs (p, p + K / 2) are kept in two halves, so that a
turn exchanges no data between threads.
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

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
def _load_memory(memory, index, L: tl.constexpr, P: tl.constexpr):
    """Both halves [L, P] of matrix `index` of `memory`, float32."""
    offset = tl.arange(0, L)[:, None] * P + tl.arange(0, P)[None, :]
    base = memory + index.to(tl.int64) * (2 * L * P)
    return tl.load(base + offset).to(tl.float32), tl.load(base + L * P + offset).to(tl.float32)


@triton.jit
def _store_memory(memory, index, low, high, L: tl.constexpr, P: tl.constexpr):
    offset = tl.arange(0, L)[:, None] * P + tl.arange(0, P)[None, :]
    base = memory + index.to(tl.int64) * (2 * L * P)
    tl.store(base + offset, low.to(memory.dtype.element_ty))
    tl.store(base + L * P + offset, high.to(memory.dtype.element_ty))


@triton.jit
def _load_channels(x, table, inside, L: tl.constexpr, C: tl.constexpr, TABLE: tl.constexpr):
    """Both halves [C, L] of a chunk's per-head queries or keys: the shared ones plus the turned bias of the head."""
    place = tl.arange(0, C)[:, None] * (2 * L) + tl.arange(0, L)[None, :]
    low = tl.load(x + place, mask=inside[:, None], other=0.0)
    high = tl.load(x + L + place, mask=inside[:, None], other=0.0)
    if TABLE:
        low += tl.load(table + place)
        high += tl.load(table + L + place)
    return low, high


@triton.jit
def _load_tile(x, token, stride, inside, C: tl.constexpr, P: tl.constexpr):
    """Rows [C, P] of a chunk that starts at `token`."""
    place = tl.arange(0, C)[:, None] * stride + tl.arange(0, P)[None, :]
    return tl.load(x + token * stride + place, mask=inside[:, None], other=0.0)


@triton.jit
def _load_log(running, token, size, inside, C: tl.constexpr):
    """Running log decays [C] of a chunk and the last of them."""
    base = running + token
    return tl.load(base + tl.arange(0, C), mask=inside, other=0.0), tl.load(base + size - 1)


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
    K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, TABLE: tl.constexpr, COPIES: tl.constexpr,
    ROTATE: tl.constexpr, SOURCE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Memory after a segment that starts empty (or, in reverse, its cotangent before it), and its total log decay."""
    L: tl.constexpr = K // 2
    head, segment = tl.program_id(0), tl.program_id(1)
    row = segments + segment * COLUMNS
    begin, end = tl.load(row + BEGIN), tl.load(row + END)
    if tl.load(row + (FIRST if REVERSE else LAST)) == 1:
        return  # nobody asks for it
    low = tl.zeros((L, P), tl.float32)
    high = tl.zeros((L, P), tl.float32)
    step = tl.arange(0, C)
    decayed = tl.zeros((), tl.float32)
    if ROTATE:
        cos, sin = _phases(tl.full((L,), C, tl.int32), tl.load(frequency + tl.arange(0, L)))
        cos, sin = cos[:, None], sin[:, None]
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
        a, b = _load_channels(channels + token * K, table, inside, L, C, TABLE)
        value = _load_tile(x, token, x_stride, inside, C, P)
        log, last = _load_log(running, token, size, inside, C)
        if REVERSE:
            weight = tl.exp2(log)
            if ROTATE:
                low, high = _turned(low, high, cos, sin)
        else:
            weight = tl.exp2(last - log)
            if SOURCE:
                weight *= tl.load(source + token + step, mask=inside, other=0.0)
        weighted = (value * weight[:, None]).to(a.dtype)
        decay = tl.exp2(last)
        low = tl.dot(tl.trans(a), weighted, low * decay, input_precision=PRECISION)
        high = tl.dot(tl.trans(b), weighted, high * decay, input_precision=PRECISION)
        if ROTATE and not REVERSE:
            low, high = _turned(low, high, cos, -sin)
        decayed += last
    _store_memory(contribution, segment * heads + head, low, high, L, P)
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
    offset = tl.arange(0, L)[:, None] * P + tl.program_id(2) * Q + tl.arange(0, Q)[None, :]
    low = tl.zeros((L, Q), tl.float32)
    high = tl.zeros((L, Q), tl.float32)
    if ROTATE:
        omega = tl.load(frequency + tl.arange(0, L))
    if BOUNDARY:
        base = boundary + (line * heads + head).to(tl.int64) * (K * P)
        low += tl.load(base + offset)
        high += tl.load(base + L * P + offset)
        if ROTATE:
            where = tl.load(position + line)
            if REVERSE:
                row = segments + (stop - 1) * COLUMNS
                where += tl.cdiv(tl.load(row + END) - tl.load(row + ROW_BEGIN), C) * C
            cos, sin = _phases(tl.zeros((L,), tl.int64) + where, omega)
            low, high = _turned(low, high, cos[:, None], -sin[:, None])
    for i in range(0, (stop - start).to(tl.int32)):
        segment = stop - 1 - i if REVERSE else start + i
        place = (segment * heads + head).to(tl.int64) * (K * P)
        tl.store(carried + place + offset, low)
        tl.store(carried + place + L * P + offset, high)
        if i + 1 < stop - start:
            row = segments + segment * COLUMNS
            decay = tl.exp2(tl.load(total + segment * heads + head))
            low, high = low * decay, high * decay
            if ROTATE:
                length = tl.cdiv(tl.load(row + END) - tl.load(row + BEGIN), C) * C
                cos, sin = _phases(tl.zeros((L,), tl.int64) + length, omega)
                low, high = _turned(low, high, cos[:, None], (sin if REVERSE else -sin)[:, None])
            low += tl.load(contribution + place + offset)
            high += tl.load(contribution + place + L * P + offset)


@triton.jit
def forward_kernel(
    query, key, query_table, key_table, x, running, source, frequency, skip, position, segments,
    start, y, final, kept,
    x_stride, tokens, heads,
    K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, TABLE: tl.constexpr,
    COPIES: tl.constexpr, ROTATE: tl.constexpr, SOURCE: tl.constexpr, SKIP: tl.constexpr, START: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs of one segment and head, the memory before every block of chunks and after the row."""
    L: tl.constexpr = K // 2
    head, segment = tl.program_id(0), tl.program_id(1)
    row = segments + segment * COLUMNS
    begin, end = tl.load(row + BEGIN), tl.load(row + END)
    step, channel = tl.arange(0, C), tl.arange(0, P)
    if START:
        low, high = _load_memory(start, segment * heads + head, L, P)
    else:
        low = tl.zeros((L, P), tl.float32)
        high = tl.zeros((L, P), tl.float32)
    if ROTATE:
        omega = tl.load(frequency + tl.arange(0, L))
        cos, sin = _phases(tl.full((L,), C, tl.int32), omega)
        cos, sin = cos[:, None], sin[:, None]
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
    kept_index = tl.load(row + BLOCK) * heads + head
    count = tl.cdiv(end - begin, C).to(tl.int32)
    for chunk in tl.range(0, count, num_stages=STAGES):
        if KEEP:
            if chunk % BLOCK_CHUNKS == 0:
                _store_memory(kept, kept_index + chunk // BLOCK_CHUNKS * heads, low, high, L, P)
        token = begin + chunk * C
        size = tl.minimum(end - token, C).to(tl.int32)
        inside = step < size
        k1, k2 = _load_channels(key + token * K, key_table, inside, L, C, TABLE)
        q1, q2 = _load_channels(query + token * K, query_table, inside, L, C, TABLE)
        value = _load_tile(x, token, x_stride, inside, C, P)
        log, last = _load_log(running, token, size, inside, C)
        incoming = value.to(tl.float32)
        if SOURCE:
            incoming *= tl.load(source + token + step, mask=inside, other=0.0)[:, None]

        scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
        causal = (step[:, None] >= step[None, :]) & inside[:, None]
        scores = tl.where(causal, scores * tl.exp2(log[:, None] - log[None, :]), 0.0).to(q1.dtype)
        out = tl.dot(q1, low.to(q1.dtype), input_precision=PRECISION)
        out = tl.dot(q2, high.to(q1.dtype), out, input_precision=PRECISION) * tl.exp2(log)[:, None]
        out = tl.dot(scores, incoming.to(q1.dtype), out, input_precision=PRECISION)
        if SKIP:
            out += direct * value.to(tl.float32)
        place = step[:, None] * (heads * P) + channel[None, :]
        tl.store(y + token * (heads * P) + place, out.to(y.dtype.element_ty), mask=inside[:, None])

        fading = (incoming * tl.exp2(last - log)[:, None]).to(q1.dtype)
        decay = tl.exp2(last)
        low = tl.dot(tl.trans(k1), fading, low * decay, input_precision=PRECISION)
        high = tl.dot(tl.trans(k2), fading, high * decay, input_precision=PRECISION)
        if ROTATE:
            low, high = _turned(low, high, cos, -sin)
    if tl.load(row + LAST) == 1:
        line = tl.load(row + ROW)
        if ROTATE:
            where = tl.load(position + line) + tl.cdiv(end - tl.load(row + ROW_BEGIN), C) * C
            c, s = _phases(tl.zeros((L,), tl.int64) + where, omega)
            low, high = _turned(low, high, c[:, None], s[:, None])
        _store_memory(final, line * heads + head, low, high, L, P)


@triton.jit
def backward_kernel(
    query, key, query_table, key_table, x, running, source, frequency, skip, position, segments,
    kept, after, scratch, grad_y,
    d_query, d_key, d_x, d_log, d_source, d_initial, d_query_bias, d_key_bias, d_skip,
    x_stride, grad_stride, d_x_stride, tokens, heads, scale,
    K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, TABLE: tl.constexpr,
    COPIES: tl.constexpr, ATOMIC: tl.constexpr, ROTATE: tl.constexpr, SOURCE: tl.constexpr, SKIP: tl.constexpr,
    AFTER: tl.constexpr, INITIAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment and head, last block of chunks first: memories again, then cotangents backwards."""
    L: tl.constexpr = K // 2
    head, segment = tl.program_id(0), tl.program_id(1)
    row = segments + segment * COLUMNS
    begin, end = tl.load(row + BEGIN), tl.load(row + END)
    step, half, channel = tl.arange(0, C), tl.arange(0, L), tl.arange(0, P)
    program = segment * heads + head
    if AFTER:
        d_low, d_high = _load_memory(after, program, L, P)
    else:
        d_low = tl.zeros((L, P), tl.float32)
        d_high = tl.zeros((L, P), tl.float32)
    if ROTATE:
        omega = tl.load(frequency + half)
        cos, sin = _phases(tl.full((L,), C, tl.int32), omega)
        cos, sin = cos[:, None], sin[:, None]
    if COPIES > 1:
        query += head.to(tl.int64) * tokens * K
        key += head.to(tl.int64) * tokens * K
    if not ATOMIC:
        d_query += head.to(tl.int64) * tokens * K
        d_key += head.to(tl.int64) * tokens * K
    query_table += head * C * K
    key_table += head * C * K
    running += head.to(tl.int64) * tokens
    source += head.to(tl.int64) * tokens
    d_log += head.to(tl.int64) * tokens
    d_source += head.to(tl.int64) * tokens
    x += head * P
    d_x += head * P
    grad_y += head * P
    if SKIP:
        direct = tl.load(skip + head).to(tl.float32)
        d_direct = tl.zeros((C,), tl.float32)
    if TABLE:
        dq_low = tl.zeros((C, L), tl.float32)
        dq_high = tl.zeros((C, L), tl.float32)
        dk_low = tl.zeros((C, L), tl.float32)
        dk_high = tl.zeros((C, L), tl.float32)
    kept_index = tl.load(row + BLOCK) * heads + head
    count = tl.cdiv(end - begin, C).to(tl.int32)
    blocks = tl.cdiv(count, BLOCK_CHUNKS)
    for b in range(0, blocks):
        block = blocks - 1 - b
        first = block * BLOCK_CHUNKS
        chunks = tl.minimum(BLOCK_CHUNKS, count - first)
        low, high = _load_memory(kept, kept_index + block * heads, L, P)
        tl.debug_barrier()  # the block before has been read
        for i in tl.range(0, chunks, num_stages=STAGES):
            _store_memory(scratch, program * BLOCK_CHUNKS + i, low, high, L, P)
            token = begin + (first + i) * C
            size = tl.minimum(end - token, C).to(tl.int32)
            inside = step < size
            k1, k2 = _load_channels(key + token * K, key_table, inside, L, C, TABLE)
            value = _load_tile(x, token, x_stride, inside, C, P)
            log, last = _load_log(running, token, size, inside, C)
            weight = tl.exp2(last - log)
            if SOURCE:
                weight *= tl.load(source + token + step, mask=inside, other=0.0)
            fading = (value * weight[:, None]).to(k1.dtype)
            decay = tl.exp2(last)
            low = tl.dot(tl.trans(k1), fading, low * decay, input_precision=PRECISION)
            high = tl.dot(tl.trans(k2), fading, high * decay, input_precision=PRECISION)
            if ROTATE:
                low, high = _turned(low, high, cos, -sin)
        # memory . cotangent after the block: what every log decay before it sees of all that follows.
        through = tl.sum(tl.sum(low * d_low + high * d_high, 1), 0)
        tl.debug_barrier()  # every memory is in place
        for i in tl.range(0, chunks, num_stages=STAGES):
            chunk = chunks - 1 - i
            token = begin + (first + chunk) * C
            size = tl.minimum(end - token, C).to(tl.int32)
            inside = step < size
            q1, q2 = _load_channels(query + token * K, query_table, inside, L, C, TABLE)
            k1, k2 = _load_channels(key + token * K, key_table, inside, L, C, TABLE)
            dtype = q1.dtype
            value = _load_tile(x, token, x_stride, inside, C, P)
            grad = _load_tile(grad_y, token, grad_stride, inside, C, P)
            log, last = _load_log(running, token, size, inside, C)
            memory = scratch + (program * BLOCK_CHUNKS + chunk).to(tl.int64) * (K * P)
            place = half[:, None] * P + channel[None, :]
            m1 = tl.load(memory + place)
            m2 = tl.load(memory + L * P + place)
            if ROTATE:
                d_low, d_high = _turned(d_low, d_high, cos, sin)
            incoming = value.to(tl.float32)
            if SOURCE:
                weight = tl.load(source + token + step, mask=inside, other=0.0)
                incoming *= weight[:, None]
            to_end = tl.exp2(last - log)
            fading = (incoming * to_end[:, None]).to(dtype)
            from_start = (grad * tl.exp2(log)[:, None]).to(dtype)
            causal = (step[:, None] >= step[None, :]) & inside[:, None]
            decay = tl.where(causal, tl.exp2(log[:, None] - log[None, :]), 0.0)
            d_scores = tl.dot(grad, tl.trans(incoming.to(dtype)), input_precision=PRECISION)
            d_scores = (d_scores * decay).to(dtype)

            dq1 = tl.dot(d_scores, k1, input_precision=PRECISION)
            dq1 = tl.dot(from_start, tl.trans(m1), dq1, input_precision=PRECISION)
            dq2 = tl.dot(d_scores, k2, input_precision=PRECISION)
            dq2 = tl.dot(from_start, tl.trans(m2), dq2, input_precision=PRECISION)
            read = tl.sum(q1.to(tl.float32) * dq1 + q2.to(tl.float32) * dq2, 1)
            target = token * K + (step[:, None] * K + half[None, :])
            if ATOMIC:
                tl.atomic_add(d_query + target, dq1, mask=inside[:, None], sem="relaxed")
                tl.atomic_add(d_query + target + L, dq2, mask=inside[:, None], sem="relaxed")
            else:
                tl.store(d_query + target, dq1, mask=inside[:, None])
                tl.store(d_query + target + L, dq2, mask=inside[:, None])

            dk1 = tl.dot(tl.trans(d_scores), q1, input_precision=PRECISION)
            dk1 = tl.dot(fading, tl.trans(d_low.to(dtype)), dk1, input_precision=PRECISION)
            dk2 = tl.dot(tl.trans(d_scores), q2, input_precision=PRECISION)
            dk2 = tl.dot(fading, tl.trans(d_high.to(dtype)), dk2, input_precision=PRECISION)
            if ATOMIC:
                tl.atomic_add(d_key + target, dk1, mask=inside[:, None], sem="relaxed")
                tl.atomic_add(d_key + target + L, dk2, mask=inside[:, None], sem="relaxed")
            else:
                tl.store(d_key + target, dk1, mask=inside[:, None])
                tl.store(d_key + target + L, dk2, mask=inside[:, None])
            if TABLE:
                dq_low += dq1
                dq_high += dq2
                dk_low += dk1
                dk_high += dk2

            scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
            scores = (scores * decay).to(dtype)
            d_incoming = tl.dot(k1, d_low.to(dtype), input_precision=PRECISION)
            d_incoming = tl.dot(k2, d_high.to(dtype), d_incoming, input_precision=PRECISION) * to_end[:, None]
            d_incoming = tl.dot(tl.trans(scores), grad, d_incoming, input_precision=PRECISION)
            written = tl.sum(value.to(tl.float32) * d_incoming, 1)
            if SOURCE:
                tl.store(d_source + token + step, written, mask=inside)
                written *= weight
                d_incoming *= weight[:, None]
            if SKIP:
                wide = grad.to(tl.float32)
                d_direct += tl.sum(wide * value.to(tl.float32), 1)
                d_incoming += direct * wide
            place = step[:, None] * d_x_stride + channel[None, :]
            tl.store(d_x + token * d_x_stride + place, d_incoming.to(d_x.dtype.element_ty), mask=inside[:, None])
            d_total = read - written + tl.where(step == size - 1, through, 0.0)
            tl.store(d_log + token + step, d_total, mask=inside)

            total = tl.exp2(last)
            d_low = tl.dot(tl.trans(q1), from_start, d_low * total, input_precision=PRECISION)
            d_high = tl.dot(tl.trans(q2), from_start, d_high * total, input_precision=PRECISION)
            through = tl.sum(tl.sum(m1.to(tl.float32) * d_low + m2.to(tl.float32) * d_high, 1), 0)
    if INITIAL:
        if tl.load(row + FIRST) == 1:
            line = tl.load(row + ROW)
            if ROTATE:
                c, s = _phases(tl.zeros((L,), tl.int64) + tl.load(position + line), omega)
                d_low, d_high = _turned(d_low, d_high, c[:, None], s[:, None])
            _store_memory(d_initial, line * heads + head, d_low, d_high, L, P)
    if SKIP:
        tl.store(d_skip + program, tl.sum(d_direct, 0))
    if TABLE:
        if ROTATE:
            c, s = _phases(step[:, None], tl.load(frequency + half)[None, :])
            dq_low, dq_high = _turned(dq_low, dq_high, c, -s)
            dk_low, dk_high = _turned(dk_low, dk_high, c, -s)
        tl.store(d_query_bias + program * K + half, tl.sum(dq_low, 0) * scale)
        tl.store(d_query_bias + program * K + L + half, tl.sum(dq_high, 0) * scale)
        tl.store(d_key_bias + program * K + half, tl.sum(dk_low, 0))
        tl.store(d_key_bias + program * K + L + half, tl.sum(dk_high, 0))


@triton.jit
def finish_kernel(
    query, key, d_query, d_key, d_log, d_source, frequency, chunks,
    query_out, key_out, decay_out, source_out,
    query_stride, key_stride, query_head_stride, key_head_stride,
    query_out_stride, key_out_stride, decay_stride, source_stride,
    tokens, scale, epsilon, heads,
    HEADS: tl.constexpr, COPIES: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """One chunk: gradients of raw queries and keys (turned back, through the norm), log decays and sources."""
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
    head = tl.arange(0, HEADS)
    valid = inside[:, None] & (head < heads)[None, :]
    place = head[None, :].to(tl.int64) * tokens + rows[:, None]
    running = tl.cumsum(tl.load(d_log + place, mask=valid, other=0.0), 0, reverse=True)
    tl.store(
        decay_out + rows[:, None] * decay_stride + head[None, :], running.to(decay_out.dtype.element_ty), mask=valid
    )
    if SOURCE:
        weight = tl.load(d_source + place, mask=valid, other=0.0)
        tl.store(
            source_out + rows[:, None] * source_stride + head[None, :], weight.to(source_out.dtype.element_ty), mask=valid
        )  # fmt: skip
