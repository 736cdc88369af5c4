"""The theorems about the half-line Green function, each as a property of the operators' own outputs.

Sites are numbered from 1 and rows are later times; alpha_i = detuning_i - i eta_i, u_i = Im m_i, eta_i the absorption.
Measured worst cases are over 1,500 random examples.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from resolvent_cases import BACKENDS, hamiltonian

from resnet_bk.ops.resolvent import (
    GreenState,
    causal_resolvent,
    chunked,
    flux_gate,
    full_resolvent_diagonal,
    scattering_phase,
    semiclassical_root,
)

detunings = st.floats(-4, 4) | st.sampled_from([0.0, 2.0, -2.0, 1e3, -1e4]) | st.floats(-1e4, 1e4)
absorptions = st.floats(-3, 1).map(lambda exponent: 10.0**exponent)
sites = st.tuples(detunings, absorptions)
leads = st.tuples(st.floats(-10, 10), st.floats(0, 10))
media = st.lists(sites, min_size=1, max_size=30).map(lambda pairs: tensors(*zip(*pairs, strict=True)))
backends = st.sampled_from(BACKENDS)


def tensors(*rows):
    """Each sequence of numbers as one head's [1, time, 1] in float64."""
    return tuple(torch.tensor(row, dtype=torch.float64)[None, :, None] for row in rows)


def green(detuning, absorption, initial=None, **options):
    """Half-line Green function of one head as a complex vector [time]; `initial` is a pair of numbers."""
    if initial is not None:
        initial = GreenState(*(torch.tensor([[part]], dtype=torch.float64) for part in initial))
    m, _ = causal_resolvent(detuning, absorption, initial=initial, **options)
    return torch.complex(*m)[0, :, 0]


def products(factors):
    """Lower triangular f_(j+1) ... f_i, one on the diagonal; nothing is divided."""
    rows = torch.eye(factors.numel(), dtype=factors.dtype)
    for row in range(1, factors.numel()):
        rows[row, :row] = rows[row - 1, :row] * factors[row]
    return rows


def causal_kernel(m):
    """G_ij = (-1)^(i-j) m_i ... m_j."""
    return products(-m) * m


def full_kernel(detuning, absorption):
    """G_ij = (-1)^(i-j) G_ii m_(i-1) ... m_j of the whole block, from the operators alone."""
    diagonal = torch.complex(*full_resolvent_diagonal(detuning, absorption))[0, :, 0]
    lower = diagonal[:, None] * products(-green(detuning, absorption).roll(1))
    return lower + lower.tril(-1).T


@given(media, st.none() | leads, backends, st.sampled_from([torch.float32, torch.float64]))
def test_theorem_1_herglotz(medium, lead, backend, dtype):
    """u_i = |m_i|^2 (eta_i + u_(i-1)) > 0 and |m_i| <= 1 / eta_i."""
    detuning, eta = (x.to(dtype) for x in medium)
    m = green(detuning, eta, lead, backend=backend)
    eta, u = eta[0, :, 0], m.imag
    before = torch.cat((torch.tensor([0.0 if lead is None else lead[1]], dtype=dtype), u[:-1]))
    epsilon = torch.finfo(dtype).eps
    assert u.min() > 0
    assert (m.abs() * eta).max() <= 1 + 4 * epsilon  # measured 1 + 1 epsilon
    expected = m.abs().square() * (eta + before)
    assert ((u - expected).abs() / u).max() <= 8 * epsilon  # measured 3 epsilon


@given(media, leads)
def test_theorem_2_ward_identity_and_rows(medium, lead):
    """sum_(j<=i) eta_j |G_ij|^2 + prod_(k<=i) |m_k|^2 Im m_0 = u_i, so sum_j 4 eta_i eta_j |G_ij|^2 <= 4."""
    m, eta = green(*medium, lead), medium[1][0, :, 0]
    rows = causal_kernel(m).abs().square() @ eta
    reflected = m.abs().square().cumprod(0) * lead[1]
    assert ((rows + reflected - m.imag).abs() / m.imag).max() < 1e-13  # measured 4e-15
    assert (4 * eta * rows).max() <= 4 * (1 + 1e-14)


@given(media)
def test_theorem_2_unitarity_and_hardy(medium):
    """With A = Gamma^(1/2) G Gamma^(1/2), I + 2i A of the block is unitary; for the causal kernel ||2 A|| <= 4."""
    root = medium[1][0, :, 0].sqrt()
    weights = root[:, None] * root
    one = torch.eye(root.numel(), dtype=torch.complex128)
    scattering = one + 2j * weights * full_kernel(*medium)
    assert (scattering @ scattering.mH - one).abs().max() < 1e-10  # measured 2e-14
    causal = causal_kernel(green(*medium))
    assert torch.linalg.matrix_norm(2 * weights * causal, 2) <= 4 + 1e-12


@given(media)
def test_the_kernels_are_dense_inverses(medium):
    """G_ij = [(H_i - z)^-1]_ij in the causal kernel, [(H_N - z)^-1]_ij in the full one."""
    dense = hamiltonian(*(x[0, :, 0] for x in medium))
    causal = causal_kernel(green(*medium))
    for site in range(causal.shape[0]):
        inverse = torch.linalg.inv(dense[: site + 1, : site + 1])
        assert (causal[site, : site + 1] - inverse[site]).abs().max() < 1e-10  # measured 2e-13
    assert (full_kernel(*medium) - inverse).abs().max() < 1e-10  # measured 4e-13


@given(media)
def test_theorem_3_combes_thomas(medium):
    """|G_ij| <= (2 / eta) exp(-gamma |i-j|), gamma = asinh(eta / 4), eta = min eta_i: decay uniform in length."""
    eta = medium[1].min()
    gamma = torch.asinh(eta / 4)
    place = torch.arange(medium[1].numel(), dtype=torch.float64)
    bound = 2 / eta * torch.exp(-gamma * (place[:, None] - place).abs())
    for matrix in (causal_kernel(green(*medium)), full_kernel(*medium)):
        assert (matrix.abs() <= bound).all()
        assert matrix.abs().sum(1).max() <= 2 / eta / -torch.expm1(-gamma) * 2


@given(media, st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1)), min_size=30, max_size=30), st.floats(-6, 1))
def test_theorem_4_perturbation(medium, directions, exponent):
    """||G' - G|| <= max |alpha' - alpha| / (eta eta'): operator norm for the block, l2 norm of each causal row."""
    detuning, eta = medium
    by, more = tensors(*zip(*directions[: eta.numel()], strict=True))
    detuning2, eta2 = detuning + 10**exponent * by, eta + 10**exponent * more
    change = torch.complex(detuning2 - detuning, eta2 - eta).abs().max()
    bound = (change / (eta.min() * eta2.min())) * (1 + 1e-9) + 1e-9
    full = full_kernel(detuning2, eta2) - full_kernel(detuning, eta)
    causal = causal_kernel(green(detuning2, eta2)) - causal_kernel(green(detuning, eta))
    assert torch.linalg.matrix_norm(full, 2) <= bound
    assert causal.norm(dim=1).max() <= bound


@given(media)
def test_theorem_5_the_semiclassical_root_decays(medium):
    """The root of m^2 - alpha m + 1 = 0 with |m| < 1 exists at every site, also in float32."""
    for dtype in (torch.float32, torch.float64):
        log_modulus, angle = semiclassical_root(*(x.to(dtype) for x in medium))
        assert log_modulus.max() < 0
        assert angle.min() > 0


@given(media, leads, st.sampled_from([2, 4, 6, 16]))
def test_theorem_6_moebius_composition(medium, lead, length):
    """One step is the Moebius map of [[0, 1], [-1, alpha]]; any cut into chunks composes to the same sweep."""
    with mock.patch.object(chunked, "chunk_length", lambda time: length):
        m = green(*medium, lead, backend="chunked")
    exact = green(*medium, lead, backend="reference")
    budget = 1e-15 / medium[1].min() ** 2 + 1e-14
    assert ((m - exact).abs() / exact.abs()).max() < budget
    vector = torch.tensor([complex(*lead), 1], dtype=torch.complex128)
    for alpha in torch.complex(medium[0], -medium[1]).flatten():
        vector = torch.stack((vector[1], alpha * vector[1] - vector[0]))
        vector = vector / vector.abs().max()
    assert (vector[0] / vector[1] - m[-1]).abs() / m[-1].abs() < budget


@given(st.data(), media, st.sampled_from([2, 4, 16]))
def test_theorem_6_with_resets(data, medium, length):
    """A document start replaces the composed map by the constant m_0; documents of any lengths, cut anywhere."""
    time = medium[0].shape[1]
    inner = data.draw(st.sets(st.integers(1, time - 1)) if time > 1 else st.just(set()))
    bounds = [0, *sorted(inner), time]
    parts = data.draw(st.lists(leads, min_size=len(bounds) - 1, max_size=len(bounds) - 1))
    initial = GreenState(*torch.tensor(parts, dtype=torch.float64).T[..., None])
    with mock.patch.object(chunked, "chunk_length", lambda time: length):
        m, _ = causal_resolvent(*medium, initial=initial, cu_seqlens=torch.tensor(bounds))
    m = torch.complex(*m)[0, :, 0]
    for document, lead in enumerate(parts):
        own = slice(bounds[document], bounds[document + 1])
        exact = green(*(x[:, own] for x in medium), lead, backend="reference")
        assert ((m[own] - exact).abs() / exact.abs()).max() < 1e-15 / medium[1].min() ** 2 + 1e-14


@given(media, st.none() | leads, st.integers(0, 2**31), backends)
def test_theorem_7_adjoint(medium, lead, seed, backend):
    """lambda_i = g_i + c_(i+1) lambda_(i+1), dL/dalpha_i = -c_i lambda_i, dL/dm_0 = c_1 lambda_1, c_i = conj(m_i^2)."""
    start = torch.tensor([[[0.0], [0.0]] if lead is None else [[lead[0]], [lead[1]]]], dtype=torch.float64)[0]
    inputs = [x.requires_grad_() for x in (*medium, start[:1], start[1:])]
    (real, imag), _ = causal_resolvent(*inputs[:2], initial=GreenState(*inputs[2:]), backend=backend)
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(real.shape, generator=generator, dtype=torch.complex128)
    gradients = torch.autograd.grad((real * cotangent.real + imag * cotangent.imag).sum(), inputs)
    factor = torch.complex(real, imag)[0, :, 0].detach().conj().square()
    expected, running = [], torch.zeros((), dtype=torch.complex128)
    for site in reversed(range(factor.numel())):
        running = factor[site] * (cotangent[0, site, 0] + running)
        expected.append(-running)
    by_alpha = torch.stack(expected[::-1])
    ours = torch.complex(gradients[0], -gradients[1])[0, :, 0]
    budget = (1e-15 / medium[1].detach().min() ** 2 + 1e-14) * by_alpha.abs().max()
    assert (ours - by_alpha).abs().max() <= budget
    assert (torch.complex(gradients[2], gradients[3]) - running).abs().max() <= budget


@given(media, st.data())
def test_theorem_7_gradients_are_bounded(medium, data):
    """sum_j eta_j |dm_i / dalpha_j| = u_i without a lead."""
    detuning, eta = medium
    detuning.requires_grad_()
    (real, imag), _ = causal_resolvent(detuning, eta)
    site = data.draw(st.integers(0, eta.numel() - 1))
    parts = [torch.autograd.grad(x[0, site, 0], detuning, retain_graph=True)[0] for x in (real, imag)]
    total = (eta * torch.complex(*parts).abs()).sum()
    assert (total - imag[0, site, 0]).abs() / imag[0, site, 0] < 1e-12  # measured 2e-15


@given(media, st.none() | leads, st.sampled_from([torch.float32, torch.float64]))
def test_theorem_8_flux_gate(medium, lead, dtype):
    """log a_i <= 0, and rows of prod_(k=j+1..i) a_k b_j with the lead's term prod_(k<=i) a_k have l2 norm one."""
    detuning, eta = (x.to(dtype) for x in medium)
    m = green(detuning, eta, lead)
    first = torch.tensor([0.0 if lead is None else lead[1]], dtype=dtype)
    before = torch.cat((first, m.imag[:-1]))
    log_decay, weight = flux_gate(before, eta[0, :, 0])
    assert log_decay.isfinite().all()
    assert log_decay.max() <= 0
    decay = log_decay.exp()
    rows = products(decay) * weight
    behind = decay.cumprod(0) if first > 0 else torch.zeros_like(decay)
    norm = rows.square().sum(1) + behind.square()
    assert (norm - 1).abs().max() < 64 * torch.finfo(dtype).eps  # measured 2 epsilon
    if first > 0:
        currents = m.abs() * torch.sqrt(before / m.imag)
        assert ((decay - currents).abs() / decay).max() < 64 * torch.finfo(dtype).eps  # measured 14 epsilon


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e4, 1e15])
@pytest.mark.parametrize("absorption", [1e-6, 1e-3, 1e3])
def test_theorem_8_holds_at_the_ends_of_float32(magnitude, absorption):
    """log a_i <= 0 and finite for every detuning and absorption in range."""
    signs = torch.tensor([1.0, -1.0, 0.0, 1.0, 1.0, 0.0, -1.0])[None, :, None]
    eta = torch.full_like(signs, absorption)
    (_, u), _ = causal_resolvent(magnitude * signs, eta)
    log_decay, weight = flux_gate(torch.cat((torch.ones(1, 1, 1), u[:, :-1]), 1), eta)
    assert log_decay.isfinite().all()
    assert log_decay.max() <= 0
    assert weight.min() >= 0
    assert weight.max() <= 1


@given(media)
def test_theorem_8_the_bare_transmission_is_bounded_by_the_absorption_only(medium):
    """prod_(k=j+1..i) |m_k| = |G_(i,j+1)| <= (eta_i eta_(j+1))^(-1/2), which may be far above one."""
    root = medium[1][0, :, 0].sqrt()
    assert (causal_kernel(green(*medium)).abs() * root[:, None] * root).max() <= 1 + 1e-12


def test_theorem_8_the_bare_transmission_does_grow():
    """A barrier's foot: delta = 1, then Re m_1. The flux gate has no such transient."""
    eta = 1e-4
    first = 1 / complex(1, -eta)
    detuning, absorption = tensors([1.0, first.real], [eta, eta])
    m = green(detuning, absorption)
    assert m.abs().prod() > 4e3  # measured 5e3


@given(st.lists(detunings, min_size=1, max_size=30), absorptions)
def test_theorem_10_scattering_phases_sum_to_the_spectral_shift(detuning, eta):
    """phi_k = arg m0_k - arg m_k in (-pi, pi); their sum is the phase of det(H_i - z) / det(H0_i - z), unwrapped.

    With one absorption, the continuous phase of a determinant is the sum of arg(lambda - i eta) in (-pi, 0) over its
    eigenvalues, and the difference is pi times Krein's spectral shift, smoothed over eta.
    """
    potential, absorption = tensors(detuning, [eta] * len(detuning))
    m, _ = causal_resolvent(potential, absorption)
    free, _ = causal_resolvent(torch.zeros_like(potential), absorption)
    phase = scattering_phase(m, free)[0, :, 0]
    assert phase.abs().max() < torch.pi
    blocks = [torch.linalg.eigvalsh(hamiltonian(x[0, :, 0], torch.zeros_like(x[0, :, 0])).real) for x in
              (potential, torch.zeros_like(potential))]  # fmt: skip
    shift = [torch.complex(levels, torch.full_like(levels, -eta)).angle().sum() for levels in blocks]
    assert (phase.sum() - (shift[0] - shift[1])).abs() < 1e-7  # measured 1e-9, the eigenvalues' error over eta
