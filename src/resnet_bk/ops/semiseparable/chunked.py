"""Gated semiseparable mixing by chunks of matrix products, with a backward that recomputes; see DERIVATION.md."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_bk.ops.semiseparable.segments import Segments, documents_of, flat


@torch.library.custom_op("resnet_bk::semiseparable_mix", mutates_args=())
def semiseparable_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    source: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    frequencies: Tensor | None,
    skip: Tensor | None,
    initial: Tensor,
    starts: Tensor | None,
    scale: float,
    chunk: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final memory and, if `save`, the memory before every segment; time is a multiple of `chunk`.

    `query` and `key` are [batch, time, heads or 1, state]; `starts` are the chunks at which packed documents start.
    The frame of `initial` has its origin at the first token, that of the final memory one token past the last (of
    each document, padding included).
    """
    work = Segments(
        query, key, value, log_decay, source, query_bias, key_bias, frequencies,
        scale=scale, chunk=chunk, packed=starts is not None,
    )  # fmt: skip
    layout = work.layout
    documents = documents_of(starts, initial, layout)
    y = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    final = torch.empty_like(initial, memory_format=torch.contiguous_format)
    kept = initial.new_empty(layout.segments if save else 0, layout.batch, *initial.shape[1:])
    memory = initial
    for rows, segment, start, end in layout.blocks():
        if segment == 0:
            memory = initial[rows] if documents is None else torch.zeros_like(initial[:1])
        if save:
            kept[segment, rows] = memory
        work.load(rows, start, end)
        chain, ends = work.propagate(memory, documents)
        attended = work.buffer("attended", chunk, layout.value)
        torch.bmm(flat(work.scores), flat(work.sourced), out=flat(attended))
        recalled = work.faded  # free once the chain is built
        torch.bmm(flat(work.q), flat(chain[:-1]), out=flat(recalled))
        attended.addcmul_(recalled, work.from_start)
        if skip is None:
            work.by_chunk(y).copy_(attended)
        else:
            torch.addcmul(attended, work.x, skip[:, None, None], out=work.by_chunk(y))
        memory = work.turn(chain[-1], start - end)
        if documents is None:
            final[rows] = memory
            continue
        for c, after in ends.items():
            final[documents.ending[start // chunk + c]] = work.turn(after, -(c + 1) * chunk)[0]
    return y, final, kept


@torch.library.custom_op("resnet_bk::semiseparable_mix_backward", mutates_args=())
def semiseparable_backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    source: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    frequencies: Tensor | None,
    skip: Tensor | None,
    initial: Tensor,
    starts: Tensor | None,
    kept: Tensor,
    grad_y: Tensor,
    grad_final: Tensor,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, log_decay, source, both biases, skip and initial memory (empty where absent)."""
    work = Segments(
        query, key, value, log_decay, source, query_bias, key_bias, frequencies,
        scale=scale, chunk=chunk, packed=starts is not None,
    )  # fmt: skip
    layout = work.layout
    documents = documents_of(starts, initial, layout)
    d_query, d_key, d_value, d_log_decay, d_source = (_like(x, value) for x in (query, key, value, log_decay, source))
    d_initial = _like(initial, value)
    d_skip = value.new_zeros(0 if skip is None else layout.heads, dtype=work.dtype)
    table = (layout.chunks, layout.heads, chunk, layout.state)
    d_query_table = value.new_zeros(0 if query_bias is None else table, dtype=work.dtype)
    d_key_table = value.new_zeros(0 if key_bias is None else table, dtype=work.dtype)
    behind = grad_final
    for rows, segment, start, end in reversed(list(layout.blocks())):
        if end == layout.time:
            behind = grad_final[rows] if documents is None else torch.zeros_like(initial[:1])
        work.load(rows, start, end)
        chain, ends = work.propagate(kept[segment, rows], documents)
        grad = work.buffer("grad", chunk, layout.value)
        grad.copy_(work.by_chunk(grad_y))
        scratch = work.buffer("scratch", chunk, layout.value)
        if skip is not None:
            d_skip += torch.mul(grad, work.x, out=scratch).sum((0, 1, 3, 4))

        # Inside chunks: cotangents of scores and sourced values.
        d_scores = work.buffer("d_scores", chunk, chunk)
        torch.bmm(flat(grad), flat(work.sourced).mT, out=flat(d_scores))
        d_scores.mul_(work.decay)
        d_sourced = work.buffer("d_sourced", chunk, layout.value)
        torch.bmm(flat(work.scores).mT, flat(grad), out=flat(d_sourced))

        # Across chunks: the memory recursion run backwards.
        fading = torch.mul(grad, work.from_start, out=scratch)
        d_chain = work.buffer("d_memory", layout.state, layout.value, extra=1)
        d_chain[-1] = work.turn(behind, end - start)  # before the rest is overwritten: `behind` may be its first slot
        torch.bmm(flat(work.q).mT, flat(fading), out=flat(d_chain[:-1]))
        for c in reversed(range(work.chunks)):
            place = start // chunk + c
            if documents is not None and place in documents.ending:
                d_chain[c + 1] = work.turn(grad_final[documents.ending[place]][None], (c + 1) * chunk)
            if documents is not None and place in documents.starting:
                d_first = torch.addcmul(d_chain[c], d_chain[c + 1], work.across[c])
                d_initial[documents.starting[place]] = work.turn(d_first, -c * chunk)[0]
            else:
                d_chain[c].addcmul_(d_chain[c + 1], work.across[c])
        behind = d_chain[0]
        if segment == 0 and documents is None:
            d_initial[rows] = behind

        # Queries, keys and values see both.
        d_out = d_chain[1:]
        d_q, d_k = work.buffer("d_query", chunk, layout.state), work.buffer("d_key", chunk, layout.state)
        torch.bmm(flat(d_scores), flat(work.k), out=flat(d_q))
        flat(d_q).baddbmm_(flat(fading), flat(chain[:-1]).mT)
        torch.bmm(flat(d_scores).mT, flat(work.q), out=flat(d_k))
        flat(d_k).baddbmm_(flat(work.faded), flat(d_out).mT)
        torch.bmm(flat(work.k), flat(d_out), out=flat(scratch))
        d_sourced.addcmul_(scratch, work.to_end)

        # Every log decay scales what lies before it for what lies after it, so its gradient is a running sum of
        # query . d_query - value . d_value, closed by memory . d_memory at the end of the chunk.
        through = torch.mul(chain[1:], d_out, out=chain[1:]).sum((-1, -2))
        for c, after in ends.items():
            through[c] = (after * d_out[c]).sum((-1, -2))
        read = work.q.mul_(d_q).sum(-1)
        written = torch.mul(work.x, d_sourced, out=scratch).sum(-1)
        if source is not None:
            work.by_chunk(d_source).copy_(written)
            written *= work.weight[..., 0]
            d_sourced.mul_(work.weight)
        d_total = read - written
        d_total[..., -1] += through
        work.by_chunk(d_log_decay).copy_(d_total.flip(-1).cumsum(-1).flip(-1))

        if skip is None:
            work.by_chunk(d_value).copy_(d_sourced)
        else:
            torch.addcmul(d_sourced, grad, skip[:, None, None], out=work.by_chunk(d_value))
        work.unload_channels(d_q, d_query, scale)
        work.unload_channels(d_k, d_key, 1.0)
        if query_bias is not None:
            d_query_table[: work.chunks] += d_q[:, 0] if work.count == 1 else d_q.sum(1)
        if key_bias is not None:
            d_key_table[: work.chunks] += d_k[:, 0] if work.count == 1 else d_k.sum(1)
    d_query_bias = d_query_table if query_bias is None else work.bias_gradient(d_query_table, scale)
    d_key_bias = d_key_table if key_bias is None else work.bias_gradient(d_key_table, 1.0)
    return d_query, d_key, d_value, d_log_decay, d_source, d_query_bias, d_key_bias, d_skip, d_initial


def _like(x: Tensor | None, value: Tensor) -> Tensor:
    """Contiguous uninitialised tensor for the gradient of `x`; empty where there is none."""
    return value.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)


@semiseparable_op.register_fake
def _(
    query, key, value, log_decay, source, query_bias, key_bias, frequencies, skip, initial, starts, scale, chunk, save
):
    # The number of segments is the operator's own affair: an unbacked size keeps it opaque to compilers.
    segments = torch.library.get_ctx().new_dynamic_size() if save else 0
    kept = initial.new_empty(segments, value.shape[0], *initial.shape[1:])
    return value.new_empty(value.shape), initial.new_empty(initial.shape), kept


@semiseparable_backward_op.register_fake
def _(
    query, key, value, log_decay, source, query_bias, key_bias, frequencies, skip, initial, starts, kept, grad_y,
    grad_final, scale, chunk,
):  # fmt: skip
    wide = torch.promote_types(torch.promote_types(value.dtype, log_decay.dtype), torch.float32)
    present = (query, key, value, log_decay, source)
    bias = [x if x is None else x.to(wide) for x in (query_bias, key_bias, skip)]
    return tuple(_like(x, value) for x in (*present, *bias, initial))


def _save(ctx, inputs, output) -> None:
    *tensors, scale, chunk, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.chunk = scale, chunk


def _backward(ctx, grad_y, grad_final, _):
    *tensors, kept = ctx.saved_tensors
    value, initial = tensors[2], tensors[9]
    grad_y = torch.zeros_like(value) if grad_y is None else grad_y
    grad_final = torch.zeros_like(initial) if grad_final is None else grad_final
    grads = semiseparable_backward_op(*tensors, kept, grad_y, grad_final, ctx.scale, ctx.chunk)
    query, key, d_value, log_decay, source, query_bias, key_bias, skip, d_initial = (
        grad if like is None else grad.to(like.dtype)
        for grad, like in zip(grads, (*tensors[:7], tensors[8], tensors[9]), strict=True)
    )
    optional = [
        grad if like is not None else None
        for grad, like in zip((source, query_bias, key_bias), tensors[4:7], strict=True)
    ]
    d_skip = skip if tensors[8] is not None else None
    return (query, key, d_value, log_decay, *optional, None, d_skip, d_initial, None, None, None, None)


semiseparable_op.register_autograd(_backward, setup_context=_save)
