"""Sequences cut into segments: maps and memories of the segments, combined, are those of the whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from resnet_bk.ops import context
from resnet_bk.ops.context import compose_sites, memory, moebius, scan_affine, scan_moebius, segment_memory
from resnet_bk.ops.resolvent import GreenState, causal_resolvent
from resnet_bk.ops.semiseparable import rotary_frequencies, semiseparable_mix
from resnet_bk.ops.semiseparable.rotation import rotate_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 2, 3, 63, 64, 65, 1000]


def medium(time, *, spread=1.0, eta=1e-3, batch=2, heads=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    detuning = spread * torch.randn(batch, time, heads, dtype=torch.float64, generator=generator)
    absorption = eta * (0.5 + torch.rand(batch, time, heads, dtype=torch.float64, generator=generator))
    first = torch.complex(*torch.rand(2, batch, heads, dtype=torch.float64, generator=generator))
    return detuning, absorption, first


def swept(detuning, absorption, m):
    """m after every site, one site at a time."""
    sites = []
    for delta, eta in zip(detuning.unbind(1), absorption.unbind(1), strict=True):
        m = 1 / (torch.complex(delta, -eta) - m)
        sites.append(m)
    return torch.stack(sites, 1)


def cuts(time, segments):
    """Boundaries of unequal segments, none empty."""
    return sorted({0, time, *(time * part**2 // segments**2 for part in range(1, segments))})


@pytest.mark.parametrize("time", LENGTHS)
def test_composed_map_is_the_sweep(time):
    detuning, absorption, first = medium(time)
    whole = compose_sites(detuning, absorption)
    sites = swept(detuning, absorption, first)
    # Measured 7e-15 and 3e-13.
    torch.testing.assert_close(whole(first), sites[:, -1], rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.derivative(first), sites.square().prod(1), rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("time, spread", [(1, 1.0), (15, 1.0), (17, 30.0), (64, 1e-3), (130, 1.0)])
def test_kernel_composes_the_same_map(time, spread):
    pytest.importorskip("triton", reason="the package triton is not installed")
    detuning, absorption, first = medium(time, spread=spread)
    sites = detuning.float().to(DEVICE), absorption.float().to(DEVICE)
    whole = compose_sites(*sites, backend="chunked")
    found = compose_sites(*sites, backend="triton")
    first = first.to(DEVICE)
    # Measured 2e-14 and 1e-13.
    torch.testing.assert_close(found(first), whole(first), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.derivative(first), whole.derivative(first), rtol=1e-11, atol=1e-300)


def test_packed_map_is_the_map():
    detuning, absorption, first = medium(70)
    whole = compose_sites(detuning, absorption)
    sent = moebius.MoebiusMap.unpack(whole.pack())
    assert whole.pack().dtype == torch.float64 and whole.pack().shape == (9, 2, 3)
    assert torch.equal(sent(first), whole(first)) and torch.equal(sent.derivative(first), whole.derivative(first))


@pytest.mark.parametrize("spread", [1e-3, 30.0, 1e15])
def test_no_medium_overflows(spread):
    detuning, absorption, first = medium(1000, spread=spread)
    whole = compose_sites(detuning.float(), absorption.float())
    sites = swept(detuning.float().double(), absorption.float().double(), first)
    torch.testing.assert_close(whole(first), sites[:, -1], rtol=1e-12, atol=0)  # measured 3e-15
    assert whole.derivative(first).isfinite().all()


@pytest.mark.parametrize("segments", [2, 3, 8])
def test_scanned_maps_enter_where_the_sweep_is(segments, monkeypatch):
    monkeypatch.setattr(moebius, "_BLOCK_SITES", 50)
    detuning, absorption, first = medium(333)
    bounds = cuts(333, segments)
    maps = [compose_sites(detuning[:, a:b], absorption[:, a:b]) for a, b in pairwise(bounds)]
    sites = swept(detuning, absorption, first)
    expected = [first, *(sites[:, b - 1] for b in bounds[1:])]
    for found, at_border in zip(scan_moebius(maps, first), expected, strict=True):
        torch.testing.assert_close(found, at_border, rtol=1e-11, atol=0)
    # Read as operators do: the last segment, entered so, ends where the whole does.
    entering = scan_moebius(maps, first)[-2]
    start = bounds[-2]
    _, last = causal_resolvent(
        detuning[:, start:], absorption[:, start:], initial=GreenState(entering.real, entering.imag)
    )
    torch.testing.assert_close(torch.complex(*last), sites[:, -1], rtol=1e-11, atol=0)


def test_composing_in_float64_survives_a_resonance():
    # Segments that start with a barrier and then its resonance, which maps in float32 would amplify to 5e-6.
    detuning, absorption, first = medium(400, eta=1e-4)
    for start in (100, 200, 300):
        before = swept(detuning[:, :start], absorption[:, :start], first)[:, -1]
        detuning[:, start] = 1.0 + before.real
        after = 1 / (torch.complex(detuning[:, start], -absorption[:, start]) - before)
        detuning[:, start + 1] = after.real
    delta, eta = detuning.float(), absorption.float()
    maps = [compose_sites(delta[:, a : a + 100], eta[:, a : a + 100]) for a in range(0, 400, 100)]
    sites = swept(delta.double(), eta.double(), first)
    for found, t in zip(scan_moebius(maps, first)[1:], (99, 199, 299, 399), strict=True):
        assert (found.imag > 0).all()
        torch.testing.assert_close(found, sites[:, t], rtol=1e-11, atol=0)  # measured 4e-14


def tokens(time, *, shared=True, dtype=torch.float64, batch=2, heads=3, state=4, width=5):
    torch.manual_seed(time)
    keys = (batch, time, state) if shared else (batch, time, heads, state)
    key, value = torch.randn(keys, dtype=dtype), torch.randn(batch, time, heads, width, dtype=dtype)
    log_decay = -0.2 * torch.rand(batch, time, heads, dtype=dtype)
    source, bias = torch.rand(batch, time, heads, dtype=dtype), torch.randn(heads, state, dtype=dtype)
    return key, value, log_decay, source, bias


def weights(log_decay, source):
    total = log_decay.cumsum(1)
    return (total[:, -1:] - total).exp() * source


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("time", [1, 65, 200])
def test_memory_of_a_segment_is_that_of_the_mixing(time, turned, biased, shared, monkeypatch):
    monkeypatch.setattr(memory, "_BLOCK_TOKENS", 64)
    key, value, log_decay, source, bias = tokens(time, shared=shared)
    frequencies = rotary_frequencies(4, 100.0) if turned else None
    options = dict(key_bias=bias if biased else None, frequencies=frequencies, norm_epsilon=1e-5)
    found = segment_memory(key, value, weights(log_decay, source), **options)
    _, expected = semiseparable_mix(key, key, value, log_decay, source=source, **options, backend="reference")
    torch.testing.assert_close(found, expected.memory, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_a_memory(shared, monkeypatch):
    monkeypatch.setattr(memory, "_BLOCK_TOKENS", 3)
    key, value, log_decay, source, bias = tokens(7, shared=shared, batch=1, heads=2)
    inputs = [x.requires_grad_() for x in (key, value, weights(log_decay, source).detach(), bias)]
    frequencies = rotary_frequencies(4, 100.0)
    assert torch.autograd.gradcheck(
        lambda k, x, w, b: segment_memory(k, x, w, key_bias=b, frequencies=frequencies, norm_epsilon=1e-5), inputs
    )


@pytest.mark.parametrize("segments", [2, 5])
def test_scanned_memories_enter_where_the_mixing_is(segments):
    key, value, log_decay, source, bias = tokens(150)
    frequencies = rotary_frequencies(4, 100.0)
    first = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    bounds = cuts(150, segments)
    totals, factors = [], []
    for a, b in pairwise(bounds):
        weight = weights(log_decay[:, a:b], source[:, a:b])
        part = segment_memory(key[:, a:b], value[:, a:b], weight, key_bias=bias, frequencies=frequencies)
        totals.append(rotate_memory(part, torch.tensor([a, a]), frequencies))
        factors.append(log_decay[:, a:b].sum(1).exp()[..., None, None])
    entering = scan_affine(totals, factors, first)
    for found, b in zip(entering[1:], bounds[1:], strict=True):
        initial = context.MixState(first, torch.zeros(2, dtype=torch.long))
        _, expected = semiseparable_mix(
            key[:, :b], key[:, :b], value[:, :b], log_decay[:, :b], source=source[:, :b], key_bias=bias,
            frequencies=frequencies, initial=initial, backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(found, expected.memory, rtol=1e-12, atol=1e-12)


def test_low_precision_tokens_are_summed_in_float32():
    key, value, log_decay, source, bias = tokens(300, dtype=torch.bfloat16)
    weight = weights(log_decay.float(), source.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = segment_memory(key, value, weight, key_bias=bias)
    keys = key.double()[:, :, None] + bias.double()
    expected = torch.einsum("bthk,bth,bthp->bhkp", keys, weight.double(), value.double())
    assert found.dtype == torch.float32
    # Measured 7e-8 of the largest; products in bfloat16 would be wrong by 4e-3.
    assert (found - expected).abs().max() < 5e-7 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("time", [70, 16384, 40001])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_memory_and_gradients_on_a_gpu(time, dtype, bound):
    key, value, log_decay, source, bias = tokens(time, state=64, width=32)
    weight, frequencies = weights(log_decay, source), rotary_frequencies(64, 100.0)
    key, value = key.to(dtype), value.to(dtype)
    cotangent = torch.randn(2, 3, 64, 32, dtype=torch.float64)

    def found(device, wide, inputs):
        inputs = [x.detach().to(device).requires_grad_() for x in inputs]
        k, x, w, b = inputs
        memory = segment_memory(k, x, w, key_bias=b, frequencies=frequencies.to(device), norm_epsilon=1e-5)
        assert memory.dtype == wide
        return [memory, *torch.autograd.grad(memory, inputs, cotangent.to(device, wide))]

    narrow = found("cuda", torch.float32, (key, value, weight.float(), bias.float()))
    exact = found("cpu", torch.float64, (key.double(), value.double(), weight, bias))
    for name, one, truth in zip(("memory", "key", "value", "weight", "bias"), narrow, exact, strict=True):
        assert (one.double().cpu() - truth).norm() < bound * truth.norm(), name
