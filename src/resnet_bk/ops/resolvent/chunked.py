"""The half-line Green function in three passes over chunks, and its exact adjoint; see DERIVATION.md.

Every step of a Python loop works on one site of all chunks at once, so its cost is memory traffic. Complex tensors
stay inside the two custom operators: compilers see real inputs and outputs only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# float64 holds 2^1023 and one site multiplies a float32-valued product by less than 2^129, so seven sites are safe.
_SITES_PER_RESCALE = 7


def chunk_length(time: int) -> int:
    """Sites per chunk, an even power of two near sqrt(time / 2): balances steps inside chunks and across them."""
    return 2 ** max(2, round(math.log2(max(time, 1) / 2) / 2))


def _by_site(tensor: Tensor, length: int, fill: float) -> Tensor:
    """[batch, time, heads] as [length, batch * chunks, heads]: one row of all chunks a site, padded with `fill`."""
    batch, time, heads = tensor.shape
    chunks = -(-time // length)
    if chunks * length != time:
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, chunks * length - time), value=fill)
    return tensor.unflatten(1, (chunks, length)).permute(2, 0, 1, 3).reshape(length, batch * chunks, heads)


def _by_time(sites: Tensor, batch: int, time: int) -> Tensor:
    """The inverse of `_by_site`, padding dropped."""
    length, rows, heads = sites.shape
    full = sites.new_empty(batch, rows // batch, length, heads)
    full.copy_(sites.unflatten(1, (batch, -1)).permute(1, 2, 0, 3))
    return full.flatten(1, 2)[:, :time].contiguous()


def _starts_by_site(starts: Tensor | None, length: int) -> dict[int, tuple[Tensor, Tensor]]:
    """For each site of a chunk at which some document begins: the chunks where it does, and the documents."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for document, start in enumerate([] if starts is None else starts.tolist()):
        chunks, documents = found.setdefault(start % length, ([], []))
        chunks.append(start // length)
        documents.append(document)
    device = None if starts is None else starts.device
    return {
        site: (torch.tensor(chunks, device=device), torch.tensor(documents, device=device))
        for site, (chunks, documents) in found.items()
    }


def _carry(alpha: Tensor, lead: Tensor, batch: int, starts: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """Green function m at the site before every chunk [batch * chunks, heads], complex128, from composed Moebius maps.

    A chunk maps m to (a + m b) / (a' + m b'), where a and b solve p_(t+1) = alpha_t p_t - p_(t-1) from (p_0, p_1) =
    (0, 1) and (1, 0). Updating in place with alternating sign saves the negation; the sign cancels after an even
    number of sites.
    """
    length, rows, heads = alpha.shape
    before = alpha.new_zeros(2, rows, heads)
    after = torch.zeros_like(before)
    before[1] = 1
    after[0] = 1
    for t in range(length):
        if t in starts:
            # A document start forgets what came before: both solutions become the multiple of (m_0, 1) they start from.
            chunks, documents = starts[t]
            sign = -1.0 if t % 2 else 1.0
            before[0, chunks] = sign * lead[documents]
            before[1, chunks] = 0
            after[0, chunks] = 1
            after[1, chunks] = 0
        before.addcmul_(alpha[t], after, value=1 if t % 2 else -1)
        before, after = after, before
        if (t + 1) % _SITES_PER_RESCALE == 0:
            scale = torch.maximum(before.abs(), after.abs()).amax(dim=0).reciprocal_()
            before.mul_(scale)
            after.mul_(scale)
    before, after = before.view(2, batch, -1, heads), after.view(2, batch, -1, heads)
    carried = torch.empty_like(before[0])
    m = lead[:batch]
    for chunk in range(carried.shape[1]):
        carried[:, chunk] = m
        m = torch.addcmul(before[0, :, chunk], m, before[1, :, chunk]).div_(
            torch.addcmul(after[0, :, chunk], m, after[1, :, chunk])
        )
    return carried.view(rows, heads)


def _sweep(detuning: Tensor, absorption: Tensor, lead: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compose and carry in complex128, then apply (1) inside all chunks at once in the input's precision."""
    batch, time, _ = detuning.shape
    length = chunk_length(time)
    first = _starts_by_site(starts, length)
    delta = _by_site(detuning, length, 0.0)
    eta = _by_site(absorption, length, 1.0)
    alpha = torch.complex(delta.double(), -eta.double())
    m = _carry(alpha, lead, batch, first)
    # With s_t = (-1)^t, the pair (s_t Re m_t, Im m_t) obeys w_t = d / |d|^2, d = (s_t delta_t, eta_t) + w_(t-1).
    drive = torch.stack((delta, eta))
    drive[0, 1::2].neg_()
    w = torch.stack((-m.real, m.imag)).to(drive.dtype)
    lead_pair = torch.stack((lead.real, lead.imag)).to(drive.dtype)
    square = torch.empty_like(delta[0])
    for t in range(length):
        if t in first:
            chunks, documents = first[t]
            w = w.clone()
            w[0, chunks] = lead_pair[0, documents] * (1 if t % 2 else -1)
            w[1, chunks] = lead_pair[1, documents]
        d = drive[:, t].add_(w)
        torch.mul(d[0], d[0], out=square).addcmul_(d[1], d[1])
        w = d.div_(square)
    drive[0, 1::2].neg_()
    return _by_time(drive[0], batch, time), _by_time(drive[1], batch, time)


@torch.library.custom_op("resnet_bk::causal_resolvent", mutates_args=())
def causal_resolvent_op(
    detuning: Tensor, absorption: Tensor, initial_real: Tensor, initial_imag: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of m [batch, time, heads]; see `resnet_bk.ops.resolvent.causal_resolvent`."""
    lead = torch.complex(initial_real.double(), initial_imag.double())
    return _sweep(detuning, absorption, lead, starts)


@torch.library.custom_op("resnet_bk::causal_resolvent_adjoint", mutates_args=())
def causal_resolvent_adjoint_op(
    m_real: Tensor, m_imag: Tensor, grad_real: Tensor, grad_imag: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of detuning, absorption and both parts of the initial m, given those of m (theorem 7).

    With c_t = conj(m_t^2) the cotangents mu_t = c_t (g_t + mu_(t+1)) give dalpha_t = -mu_t and dm_0 = mu_1.
    """
    batch, time, _ = m_real.shape
    length = chunk_length(time)
    first = _starts_by_site(starts, length)
    real, imag = _by_site(m_real, length, 0.0), _by_site(m_imag, length, 0.0)
    conj = torch.complex(real, -imag)
    factor = conj * conj
    source = factor * torch.complex(_by_site(grad_real, length, 0.0), _by_site(grad_imag, length, 0.0))
    mu = _carry_back(source, factor, batch, first).to(source.dtype)
    for t in reversed(range(length)):
        mu = source[t].addcmul_(factor[t], mu)
        if t in first:
            mu = mu.clone()
            mu[first[t][0]] = 0  # nothing flows from a document's first site to the document before it
    detuning = _by_time(source.real, batch, time).neg_()
    absorption = _by_time(source.imag, batch, time)
    where = torch.zeros(1, dtype=torch.long, device=m_real.device) if starts is None else starts
    return detuning, absorption, -detuning[:, where].flatten(0, 1), absorption[:, where].flatten(0, 1).clone()


def _carry_back(source: Tensor, factor: Tensor, batch: int, starts: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """Cotangent mu at the site after every chunk [batch * chunks, heads], complex128."""
    length, rows, heads = source.shape
    source, factor = source.to(torch.complex128), factor.to(torch.complex128)
    # `total` becomes mu of the chunk's first site if mu behind the chunk is zero, `product` its factor on that mu.
    total = source.new_zeros(rows, heads)
    product = torch.ones_like(total)
    for t in reversed(range(length)):
        total = torch.addcmul(source[t], factor[t], total)
        product.mul_(factor[t])
        if t in starts:
            total[starts[t][0]] = 0
            product[starts[t][0]] = 0
    total, product = total.view(batch, -1, heads), product.view(batch, -1, heads)
    carried = torch.empty_like(total)
    mu = torch.zeros_like(total[:, 0])
    for chunk in reversed(range(total.shape[1])):
        carried[:, chunk] = mu
        mu = torch.addcmul(total[:, chunk], product[:, chunk], mu)
    return carried.view(rows, heads)


@causal_resolvent_op.register_fake
def _(detuning, absorption, initial_real, initial_imag, starts):
    return detuning.new_empty(detuning.shape), detuning.new_empty(detuning.shape)


@causal_resolvent_adjoint_op.register_fake
def _(m_real, m_imag, grad_real, grad_imag, starts):
    rows = m_real.shape[0] if starts is None else starts.shape[0]
    shape = (rows, m_real.shape[2])
    return (
        m_real.new_empty(m_real.shape),
        m_real.new_empty(m_real.shape),
        m_real.new_empty(shape),
        m_real.new_empty(shape),
    )


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output, inputs[4])


def _backward(ctx, grad_real: Tensor, grad_imag: Tensor):
    m_real, m_imag, starts = ctx.saved_tensors
    return (*causal_resolvent_adjoint_op(m_real, m_imag, grad_real, grad_imag, starts), None)


causal_resolvent_op.register_autograd(_backward, setup_context=_save)
