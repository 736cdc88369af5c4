"""The mixer against the equations written out densely, for every combination of its options, and its streaming."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from resnet_bk.errors import ConfigError, DomainError
from resnet_bk.layers.mixer import Mixer
from resnet_bk.layers.positional import PositionalPotential
from resnet_bk.models.config import ModelConfig

SIZES = dict(vocab_size=11, d_model=12, num_layers=1, feed_forward_dim=8, head_dim=6, state_size=8)
COMBINATIONS = [
    dict(dynamics=dynamics, kernel=kernel, source=source, boundary=boundary, phase_coupling=coupling)
    for dynamics, kernel, source, boundary, coupling in product(
        ("exact", "semiclassical", "decay_only"),
        ("flux", "transmission", "green"),
        ("gated", "free", "unit"),
        ("lead", "wall"),
        (False, True),
    )
    # Only the exact scan has a boundary, and without a potential nothing scatters.
    if (dynamics == "exact" or boundary == "lead") and not (dynamics == "decay_only" and coupling)
]
COMBINATIONS += [
    dict(sites_per_token=sites, green_readout=readout, source=source, boundary=boundary)
    for sites, readout, source, boundary in product((1, 3), (False, True), ("gated", "free"), ("lead", "wall"))
    if sites > 1 or readout
]
COMBINATIONS += [
    dict(peierls_pairs=3, source="free"),
    dict(head_norm=False, source="free"),
    dict(head_norm=False, peierls_pairs=4, source="free", skip_start=0.3),
    dict(peierls_pairs=4, source="free", sites_per_token=3, green_readout=True),
    dict(peierls_pairs=1, source="free", kernel="transmission", phase_coupling=True),
    dict(rotary_fraction=1.0),
    dict(key_shift=False),
    dict(key_shift=False, rotary_fraction=1.0, peierls_pairs=3, source="free"),
    dict(rotary_fraction=0.0, peierls_pairs=3, source="free"),
]
COMBINATIONS += [
    dict(position_potential="prime_bump", boundary="wall"),
    dict(position_potential="shuffled", dynamics="semiclassical"),
    dict(position_potential="random", sites_per_token=3),
]
every_combination = pytest.mark.parametrize(
    "options", COMBINATIONS, ids=lambda options: "-".join(map(str, options.values()))
)


def build(options, *, dtype=torch.float64, seed=0):
    """A mixer whose parameters are all drawn at random, so that no option rests at a neutral start."""
    torch.manual_seed(seed)
    mixer = Mixer(ModelConfig(**SIZES, **options)).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return mixer


def tokens(batch, time, *, dtype=torch.float64):
    return torch.randn(batch, time, SIZES["d_model"], generator=torch.Generator().manual_seed(1), dtype=dtype)


def leaves(state):
    return [leaf for leaf in tree_leaves(tuple(state)) if leaf is not None]


def same(one, two):
    """Whether two states agree to rounding (measured 1e-13)."""
    pairs = list(zip(leaves(one), leaves(two), strict=True))
    return all((a - b).abs().max() < 1e-11 for a, b in pairs)


def row_of(state, row):
    """The state of one sequence or document."""
    return tree_map(lambda leaf: None if leaf is None else leaf[row : row + 1], tuple(state))


def decaying(alpha):
    """The root of m^2 - alpha m + 1 = 0 inside the unit circle."""
    root = torch.sqrt(alpha * alpha / 4 - 1)
    roots = torch.stack((alpha / 2 - root, alpha / 2 + root))
    return torch.where(roots[0].abs() < 1, roots[0], roots[1])


def sweep(alpha, first):
    """Half-line Green function by its definition, site by site."""
    sites, m = [], first
    for t in range(alpha.shape[1]):
        m = 1 / (alpha[:, t] - m)
        sites.append(m)
    return torch.stack(sites, 1)


def normed(x, config):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + config.norm_epsilon)


def written_out(mixer, u):
    """Output of the mixer from its equations: one dense time-by-time kernel a head."""
    c = mixer.config
    z, x, k, q, a, e, s, *turns = mixer.in_proj(u).split(mixer.sizes, -1)
    if c.key_shift:
        k = k + mixer.key_shift * F.pad(k, (0, 0, 1, 0))[:, :-1]
    k, q = (normed(part, c) for part in (k, q))
    k, q = k[:, :, None] + mixer.key_bias, q[:, :, None] + mixer.query_bias
    eta = F.softplus(e + mixer.absorption_bias) + c.absorption_floor
    if c.dynamics == "decay_only":
        modulus = torch.exp(-torch.asinh(eta / 2))
    else:
        a = a.unflatten(-1, (c.sites_per_token, -1))
        delta = mixer.potential_scale * a - mixer.energy
        if c.position_potential != "none":
            place = torch.arange(u.shape[1])
            fixed = PositionalPotential(c.position_potential, c.position_epsilon)(place, 4000)
            delta = delta + mixer.position_scale * fixed.to(u.dtype)[:, None, None]
        alpha = torch.complex(delta, -eta[:, :, None].expand_as(a)).flatten(1, 2)
        free = torch.complex(-mixer.energy + torch.zeros_like(alpha.real), alpha.imag)
        at_rest = torch.complex(-mixer.energy, -F.softplus(mixer.absorption_bias) - c.absorption_floor)
        first = decaying(at_rest).expand(u.shape[0], -1) * (c.boundary == "lead")
        m, m0 = (sweep(x, first) if c.dynamics == "exact" else decaying(x) for x in (alpha, free))
        modulus = m.abs()
    gate = modulus
    if c.dynamics == "exact":
        before = torch.cat((first[:, None], m[:, :-1]), 1).imag
        # Behind a wall nothing decays; one instead of zero keeps the square root's slope finite.
        flux = torch.where(before > 0, torch.sqrt(torch.where(before > 0, before, 1) / (before - alpha.imag)), 1)
        flux = flux.unflatten(1, (-1, c.sites_per_token)).prod(2)
        gate = flux if c.kernel == "flux" else modulus
        if c.sites_per_token == 1:
            weight = torch.sqrt(eta / (before + eta))
        else:
            weight = torch.sqrt(1 - flux.square())
    else:
        weight = torch.sqrt(1 - modulus.square())
    readout = torch.ones_like(eta)
    if c.kernel == "green":
        readout = torch.sqrt(2 * eta)
        weight = readout * modulus
    if c.source == "gated":
        weight = weight * torch.sigmoid(s + mixer.source_bias)
    if c.source == "free":
        weight = (weight if c.kernel == "green" else 1) * F.softplus(s + mixer.source_bias)
    place = torch.arange(u.shape[1], dtype=u.dtype)
    frequencies = c.rotary_base ** (-torch.arange(c.state_size // 2, dtype=u.dtype) / (c.state_size // 2))
    frequencies = frequencies[: round(c.rotary_fraction * frequencies.numel())]
    angle = place[:, None, None] * F.pad(frequencies, (0, c.state_size // 2 - frequencies.numel()))
    if c.phase_coupling:
        angle = angle + (mixer.phase_scale * (m0.angle() - m.angle()).cumsum(1))[..., None]
    if turns:
        step = F.softplus(s + mixer.source_bias)[..., None] * torch.pi * torch.tanh(turns[0])[:, :, None]
        angle = angle + F.pad(step.cumsum(1), (c.state_size // 2 - c.peierls_pairs, 0))
    q, k = (torch.complex(*part.chunk(2, -1)) * torch.exp(1j * angle) for part in (q, k))
    scores = torch.einsum("bihp,bjhp->bhij", q, k.conj()).real * c.state_size**-0.5
    token = torch.eye(u.shape[1], dtype=u.dtype)
    rows = [token[0].expand(scores.shape[0], c.num_heads, -1)]
    for i in range(1, u.shape[1]):
        rows.append(rows[-1] * gate[:, i, :, None] + token[i])
    kernel = torch.stack(rows, 2)
    x = x.unflatten(-1, (c.num_heads, c.head_dim))
    mixed = torch.einsum("bhij,bjhv->bihv", kernel * scores, weight[..., None] * x)
    y = readout[..., None] * mixed + mixer.skip[:, None] * x
    y = normed(y, c) if c.head_norm else y
    out = y.flatten(2) * mixer.norm_weight * F.silu(z)
    if c.green_readout:
        w = (m[:, c.sites_per_token - 1 :: c.sites_per_token] - 1j) / (
            m[:, c.sites_per_token - 1 :: c.sites_per_token] + 1j
        )
        out = torch.cat((out, w.real, w.imag), -1)
    return mixer.out_proj(out)


@every_combination
def test_is_its_equations(options):
    mixer, u = build(options), tokens(2, 40)
    ours, oracle = mixer(u)[0], written_out(mixer, u)
    assert (ours - oracle).abs().max() < 1e-11  # measured 1e-13
    names = [name for name, _ in mixer.named_parameters()]
    gradients = [torch.autograd.grad(out.square().sum(), list(mixer.parameters())) for out in (ours, oracle)]
    for name, one, two in zip(names, *gradients, strict=True):
        assert two.abs().max() > 0, name
        assert (one - two).abs().max() / two.abs().max().clamp(min=1) < 1e-9, name  # measured 8e-14


@every_combination
def test_split_decode_and_packed_are_one_run(options):
    mixer, u = build(options), tokens(2, 21)
    whole, end = mixer(u)

    for cut in (1, 16, 20):
        first, state = mixer(u[:, :cut])
        second, last = mixer(u[:, cut:], state)
        assert (torch.cat((first, second), 1) - whole).abs().max() < 1e-11  # measured 6e-14
        assert same(last, end)
    with torch.no_grad():
        outputs, state = [], None
        for t in range(21):
            out, state = mixer(u[:, t : t + 1], state)
            outputs.append(out)
    assert (torch.cat(outputs, 1) - whole).abs().max() < 1e-11  # measured 8e-14
    assert same(state, end)
    bounds = [0, 1, 6, 21]
    packed, after = mixer(u[:1], None, torch.tensor(bounds))
    again, last = mixer(u[:1], after, torch.tensor(bounds))
    for document, (left, right) in enumerate(pairwise(bounds)):
        alone, state = mixer(u[:1, left:right])
        assert (packed[:, left:right] - alone).abs().max() < 1e-11  # measured 2e-14
        assert same(row_of(after, document), state)
        alone, state = mixer(u[:1, left:right], state)
        assert (again[:, left:right] - alone).abs().max() < 1e-11  # measured 6e-14
        assert same(row_of(last, document), state)


@every_combination
def test_state_is_constant_in_size_and_owns_its_memory(options):
    mixer = build(options)
    sizes = []
    for time in (5, 500):
        parts = leaves(mixer(tokens(1, time))[1])
        assert all(leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in parts)
        sizes.append(sum(leaf.nbytes for leaf in parts))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("dynamics", ["exact", "semiclassical", "decay_only"])
def test_rows_of_the_default_kernel_have_norm_at_most_one(dynamics):
    """Theorem 8: with flux gate and unit source the squared weights of a token, lead included, add up to one."""
    mixer, time = build(dict(dynamics=dynamics, source="unit")), 60
    heads = mixer.config.num_heads
    raw = [3 * torch.randn(1, time, heads, dtype=torch.float64) for _ in range(2)]
    gates, _, _, _ = mixer.gates(raw[0], raw[1], raw[1], None, None)
    total = gates.log_decay.cumsum(1)[0].T
    weights = (total[:, :, None] - total[:, None]).tril().exp().tril() * gates.source[0].T[:, None]
    norms = weights.square().sum(-1) + (2 * total).exp()
    assert gates.log_decay.max() <= 0
    assert (norms - 1).abs().max() < 1e-12  # measured 1e-14


def test_the_start_is_quiet_and_absorptions_are_log_uniform():
    mixer = Mixer(ModelConfig(**{**SIZES, "d_model": 192}, source="free"))
    absorption = F.softplus(mixer.absorption_bias)
    assert torch.equal(mixer.potential_scale, torch.zeros(64))
    assert mixer.energy[0] == -1.5
    assert mixer.energy[-1] == 1.5
    assert 1e-3 <= absorption.min() < 1.2e-3
    assert 3.5 < absorption.max() <= 4.0
    quartiles = absorption.log10().sort().values[[16, 32, 48]]
    low, high = -3.0, math.log10(4)
    expected = low + (high - low) * torch.tensor([0.25, 0.5, 0.75])
    assert (quartiles - expected).abs().max() < 0.06


def test_a_free_source_starts_where_a_gated_one_does():
    """At rest: with the raw projections zero, both weights are half of sqrt(1 - a^2)."""
    zeros = torch.zeros(1, 50, 64, dtype=torch.float64)
    found = []
    for source in ("gated", "free"):
        mixer = Mixer(ModelConfig(**{**SIZES, "d_model": 192}, source=source, dynamics="decay_only")).double()
        found.append(mixer.gates(zeros[..., :0], zeros, zeros, None, None)[0].source)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("options", [{}, dict(phase_coupling=True), dict(kernel="green")])
def test_bfloat16_parameters_keep_gates_and_state_in_float32(options):
    mixer = build(options, dtype=torch.bfloat16)
    u = tokens(2, 40, dtype=torch.bfloat16)
    y, state = mixer(u)
    assert y.dtype == torch.bfloat16
    floating = [leaf for leaf in leaves(state) if leaf.is_floating_point()]
    assert all(leaf.dtype in (torch.float32, torch.float64) for leaf in floating)
    exact = mixer.double()(u.double())[0]
    assert (y.double() - exact).abs().max() / exact.abs().max() < 0.05  # measured 0.006


def test_nan_is_refused_where_it_enters_the_scan():
    mixer, u = build({}), tokens(1, 9)
    u[0, 4] = torch.nan
    with pytest.raises(DomainError, match=r"absorption is nan at \[batch, time, head\] = \[0, 4, 0\]"):
        mixer(u)


@pytest.mark.parametrize("values", [{"absorption_start": 5.0}, {"absorption_stop": 0.0}, {"absorption_stop": math.inf}])
def test_an_empty_range_of_absorptions_is_refused(values):
    with pytest.raises(ConfigError, match=r"model\.absorption_start"):
        ModelConfig(**SIZES, **values)


def test_absorptions_start_in_the_range_asked_for():
    mixer = Mixer(ModelConfig(**{**SIZES, "d_model": 192}, absorption_start=0.01, absorption_stop=0.1))
    absorption = F.softplus(mixer.absorption_bias)
    assert 0.01 <= absorption.min() < 0.011
    assert 0.09 < absorption.max() <= 0.1
