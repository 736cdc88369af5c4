"""Attention, Mamba-2 and Mamba-3 layers against their blocks' equations written out, token by token; their starts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from resnet_bk.layers.attention import Attention
from resnet_bk.layers.mamba2 import Mamba2
from resnet_bk.layers.mamba3 import Mamba3
from resnet_bk.models.config import ModelConfig

SIZES = dict(
    vocab_size=11, d_model=12, num_layers=1, feed_forward_dim=8, head_dim=6, state_size=8, attention_head_dim=6
)
LAYERS = {"attention": Attention, "mamba2": Mamba2, "mamba3": Mamba3}


def build(kind, *, dtype=torch.float64, **options):
    """A layer whose parameters are all drawn at random."""
    torch.manual_seed(0)
    layer = LAYERS[kind](ModelConfig(**SIZES, **options)).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return layer


def tokens(batch, time, *, dtype=torch.float64):
    return torch.randn(batch, time, SIZES["d_model"], generator=torch.Generator().manual_seed(1), dtype=dtype)


def rms(x, epsilon=1e-5):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon)


def attention_written_out(layer, u):
    heads, size = 2, 6
    q, k, v = layer.in_proj(u).unflatten(-1, (3, heads, size)).unbind(2)
    q, k = rms(q) * layer.query_norm, rms(k) * layer.key_norm
    angle = torch.arange(u.shape[1])[:, None] * 10000.0 ** (-torch.arange(3, dtype=u.dtype) / 3)
    turn = torch.exp(1j * angle)[:, None]
    q, k = (torch.complex(x[..., :3], x[..., 3:]) * turn for x in (q, k))
    scores = torch.einsum("bihc,bjhc->bhij", q, k.conj()).real / math.sqrt(size)
    distance = torch.arange(u.shape[1])[:, None] - torch.arange(u.shape[1])
    seen = (distance >= 0) & ((distance < layer.window) if layer.window else True)
    weights = torch.where(seen, scores.exp(), 0)
    weights = weights / weights.sum(-1, keepdim=True)
    return layer.out_proj(torch.einsum("bhij,bjhc->bihc", weights, v).flatten(2))


def mamba2_written_out(layer, u):
    z, mixed, step = layer.in_proj(u).split([24, 40, 4], -1)
    padded = torch.cat((torch.zeros_like(mixed[:, :3]), mixed), 1)
    mixed = sum(layer.taps[:, p] * padded[:, p : p + u.shape[1]] for p in range(4)) + layer.taps_bias
    x, b, c = F.silu(mixed).split([24, 8, 8], -1)
    x, step = x.unflatten(-1, (4, 6)), F.softplus(step + layer.step_bias)
    memory, outputs = u.new_zeros(u.shape[0], 4, 8, 6), []
    for t in range(u.shape[1]):
        d = step[:, t, :, None, None]
        memory = torch.exp(-d * layer.log_rate.exp()[:, None, None]) * memory
        memory = memory + d * b[:, t, None, :, None] * x[:, t, :, None]
        outputs.append((c[:, t, None, :, None] * memory).sum(2) + layer.skip[:, None] * x[:, t])
    y = torch.stack(outputs, 1).flatten(2) * F.silu(z)
    return layer.out_proj(rms(y) * layer.norm_weight)


def mamba3_written_out(layer, u):
    """The state as complex and real channels, which the rotation multiplies, instead of turning keys and queries."""
    z, x, b, c, d, a, trapezoid, turn = layer.in_proj(u).split([24, 24, 8, 8, 4, 4, 4, 2], -1)
    x, z = x.unflatten(-1, (4, 6)), z.unflatten(-1, (4, 6))
    b = (rms(b) * layer.write_norm)[:, :, None] + layer.write_bias
    c = (rms(c) * layer.read_norm)[:, :, None] + layer.read_bias
    step, share = F.softplus(d + layer.step_bias), trapezoid.sigmoid()
    rate = -F.softplus(a).clamp(min=1e-4)

    def channels(part):
        turning = torch.complex(part[..., 0:4:2], part[..., 1:4:2])
        return torch.cat((turning, part[..., 4:].to(turning.dtype)), -1)

    b, c = channels(b), channels(c)
    h, outputs, last = torch.zeros(u.shape[0], 4, 6, 6, dtype=b.dtype), [], 0
    for t in range(u.shape[1]):
        angle = math.pi * turn[:, t, None].tanh() * step[:, t, :, None]
        rotation = torch.cat((torch.exp(-1j * angle), torch.ones_like(c[:, t, :, 2:])), -1)[..., None]
        decay = (rate * step)[:, t].exp()[..., None, None] * rotation
        new = b[:, t, ..., None] * x[:, t, :, None]
        d, s = step[:, t, :, None, None], share[:, t, :, None, None]
        h = decay * (h + (1 - s) * d * last) + s * d * new
        last = new
        outputs.append((c[:, t].conj()[..., None] * h).sum(2).real + layer.skip[:, None] * x[:, t])
    return layer.out_proj((torch.stack(outputs, 1) * F.silu(z)).flatten(2))


CASES = {
    "attention": ("attention", {}, attention_written_out),
    "window": ("attention", dict(attention_window=5), attention_written_out),
    "mamba2": ("mamba2", {}, mamba2_written_out),
    "mamba3": ("mamba3", {}, mamba3_written_out),
}


@pytest.mark.parametrize(("kind", "options", "written_out"), CASES.values(), ids=CASES.keys())
def test_is_its_equations(kind, options, written_out):
    layer, u = build(kind, **options), tokens(2, 40)
    ours, oracle = layer(u)[0], written_out(layer, u)
    assert (ours - oracle).abs().max() < 1e-11  # measured 4e-14
    names = [name for name, _ in layer.named_parameters()]
    gradients = [torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in (ours, oracle)]
    for name, one, two in zip(names, *gradients, strict=True):
        assert two.abs().max() > 0, name
        assert (one - two).abs().max() / two.abs().max().clamp(min=1) < 1e-10, name  # measured 2e-13


def test_state_space_layers_keep_a_constant_state_that_owns_its_memory():
    for kind in ("mamba2", "mamba3"):
        sizes = []
        for time in (5, 500):
            parts = list(build(kind)(tokens(1, time))[1])
            assert all(leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in parts)
            sizes.append(sum(leaf.nbytes for leaf in parts))
        assert sizes[0] == sizes[1]


def test_attention_keeps_nothing_but_keys_and_values():
    for window, slots in ((0, 30), (8, 7), (1, 0), (100, 30)):
        state = build("attention", attention_window=window)(tokens(2, 30))[1]
        assert state.key.shape == state.value.shape == (2, slots, 2, 6)
        assert all(leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in state)
        assert state.position.tolist() == [30, 30]


def test_starts_are_those_of_the_published_blocks():
    torch.manual_seed(0)
    config = ModelConfig(**{**SIZES, "d_model": 1536})
    second, third = Mamba2(config), Mamba3(config)
    for layer in (second, third):
        steps = F.softplus(layer.step_bias.detach())
        assert 1e-3 <= steps.min() < 1.1e-3
        assert 0.09 < steps.max() <= 0.1001
        quartiles = steps.log10().quantile(torch.tensor([0.25, 0.5, 0.75]))
        assert (quartiles - torch.tensor([-2.5, -2.0, -1.5])).abs().max() < 0.15
        assert torch.equal(layer.skip, torch.ones(512))
    rates = second.log_rate.exp()
    assert 1 <= rates.min() < 1.2
    assert 15.8 < rates.max() <= 16
    assert abs(rates.mean() - 8.5) < 0.6
    for parameter in (second.taps, second.taps_bias):
        assert parameter.min().item() == pytest.approx(-0.5, abs=2e-3)
        assert parameter.max().item() == pytest.approx(0.5, abs=2e-3)
    assert torch.equal(second.norm_weight, torch.ones(3072))
    for parameter in (third.write_norm, third.read_norm, third.write_bias, third.read_bias):
        assert torch.equal(parameter, torch.ones_like(parameter))
