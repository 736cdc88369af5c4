"""The causal resolvent against dense inverses, in value, gradient, precision and streaming."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from resolvent_cases import BACKENDS, gradients, hamiltonian, lead, medium, pair, worst

from resnet_bk.errors import BackendError, DomainError, ShapeError
from resnet_bk.ops.resolvent import GreenState, causal_resolvent
from resnet_bk.ops.resolvent.chunked import causal_resolvent_adjoint_op, causal_resolvent_op, chunk_length

LENGTHS = [1, 2, 63, 64, 65, 200]


def dense_half_line(detuning, absorption, initial):
    """[(H_i - z)^-1]_ii of every leading block by matrix inversion."""
    batch, time, heads = detuning.shape
    m = torch.empty(batch, time, heads, dtype=torch.complex128)
    for row in range(batch):
        for head in range(heads):
            left = complex(initial.real[row, head], initial.imag[row, head])
            dense = hamiltonian(detuning[row, :, head], absorption[row, :, head], left)
            for site in range(time):
                m[row, site, head] = torch.linalg.inv(dense[: site + 1, : site + 1])[site, site]
    return m


def run(detuning, absorption, initial=None, **options):
    """Flat tuple (Re m, Im m, Re state, Im state)."""
    m, state = causal_resolvent(detuning, absorption, initial=initial, **options)
    return *m, *state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("boundary", ["wall", "lead"])
@pytest.mark.parametrize("time", LENGTHS)
def test_equals_the_inverse_of_every_leading_block(backend, boundary, time):
    detuning, absorption = medium(1, time, 2, seed=time)
    initial = lead(1, 2) if boundary == "lead" else None
    m, state = causal_resolvent(detuning, absorption, initial=initial, backend=backend)
    oracle = dense_half_line(detuning, absorption, initial or GreenState(*torch.zeros(2, 1, 2)))
    assert (pair(m) - oracle).abs().max() < 1e-10  # measured 1e-14
    assert torch.equal(pair(state), pair(m)[:, -1])


@pytest.mark.parametrize("time", [*LENGTHS, 1000])
def test_chunked_equals_reference_with_every_gradient(time):
    inputs = [x.requires_grad_() for x in (*medium(2, time, 3, seed=time), *lead(2, 3))]
    results = []
    for backend in BACKENDS:
        out = run(inputs[0], inputs[1], GreenState(*inputs[2:]), backend=backend)
        results.append((*out, *gradients(out, inputs)))
    for reference, chunked in zip(*results, strict=True):
        assert worst(chunked, reference) < 1e-12  # measured 3e-15


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [None, [0, 1, 5, 11]])
def test_gradcheck(backend, bounds):
    rows = 1 if bounds is None else 3
    inputs = [x.requires_grad_() for x in (*medium(1, 11, 2, absorption=0.5), *lead(rows, 2))]
    boundaries = None if bounds is None else torch.tensor(bounds)
    assert chunk_length(11) < 11

    def function(detuning, absorption, real, imag):
        return run(detuning, absorption, GreenState(real, imag), cu_seqlens=boundaries, backend=backend)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 17, 64, 69])
def test_split_anywhere_is_one_run(backend, cut):
    inputs = [x.requires_grad_() for x in (*medium(2, 70, 3), *lead(2, 3))]
    detuning, absorption, *start = inputs
    whole = run(detuning, absorption, GreenState(*start), backend=backend)
    first, state = causal_resolvent(detuning[:, :cut], absorption[:, :cut], initial=GreenState(*start), backend=backend)
    second, state = causal_resolvent(detuning[:, cut:], absorption[:, cut:], initial=state, backend=backend)
    parts = (*(torch.cat(halves, 1) for halves in zip(first, second, strict=True)), *state)
    for one, two in zip((*whole, *gradients(whole, inputs)), (*parts, *gradients(parts, inputs)), strict=True):
        assert worst(two, one) < 1e-13  # measured 1e-15


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_are_separate_runs(backend):
    bounds = [0, 1, 2, 9, 40, 41, 105]
    inputs = [x.requires_grad_() for x in (*medium(1, 105, 3), *lead(6, 3))]
    detuning, absorption, *start = inputs
    packed = run(detuning, absorption, GreenState(*start), cu_seqlens=torch.tensor(bounds), backend=backend)
    parts = []
    for document, (left, right) in enumerate(pairwise(bounds)):
        own = GreenState(*(part[document : document + 1] for part in start))
        parts.append(run(detuning[:, left:right], absorption[:, left:right], own, backend=backend))
    columns = list(zip(*parts, strict=True))
    separate = (*(torch.cat(column, 1) for column in columns[:2]), *(torch.cat(column, 0) for column in columns[2:]))
    pairs = zip((*separate, *gradients(separate, inputs)), (*packed, *gradients(packed, inputs)), strict=True)
    for one, two in pairs:
        assert worst(two, one) < 1e-13  # measured 2e-15


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_past_is_bit_identical_whatever_the_future(backend, dtype):
    detuning, absorption = medium(2, 200, 3, dtype=dtype)
    before = pair(causal_resolvent(detuning, absorption, backend=backend)[0])
    for place in (1, 63, 100, 199):
        changed = [x.clone() for x in (detuning, absorption)]
        for x in changed:
            x[:, place:] += 1e3
        after = pair(causal_resolvent(*changed, backend=backend)[0])
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place:], before[:, place:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_read_through_their_strides_and_never_written(backend):
    detuning, absorption = medium(2, 70, 6)
    expected = run(detuning, absorption, backend=backend)
    strided = [torch.stack((x, x + 1), -1).transpose(0, 2)[..., 0].transpose(0, 2) for x in (detuning, absorption)]
    kept = [x.clone() for x in strided]
    assert not strided[0].is_contiguous()
    for one, two in zip(expected, run(*strided, backend=backend), strict=True):
        assert torch.equal(one, two)
    assert all(torch.equal(x, copy) for x, copy in zip(strided, kept, strict=True))


def test_state_holds_no_more_than_one_site():
    for boundaries in (None, torch.tensor([0, 100])):
        _, state = causal_resolvent(*medium(1, 100, 3), cu_seqlens=boundaries)
        assert [part.untyped_storage().nbytes() for part in state] == [3 * 8, 3 * 8]


def test_narrow_inputs_are_computed_in_float32():
    detuning, absorption = (x.bfloat16() for x in medium(1, 70, 2))
    m, _ = causal_resolvent(detuning, absorption)
    assert m[0].dtype == torch.float32
    wide, _ = causal_resolvent(detuning.double(), absorption.double())
    assert worst(pair(m), pair(wide)) < 5e-6  # measured 1e-7


@pytest.mark.parametrize("boundaries", [None, torch.tensor([0, 3, 4, 20])])
def test_operator_registration(boundaries):
    starts = None if boundaries is None else boundaries[:-1]
    initial = lead(2 if starts is None else 3, 3)
    inputs = [x.requires_grad_() for x in (*medium(2 if starts is None else 1, 20, 3), *initial)]
    torch.library.opcheck(causal_resolvent_op, (*inputs, starts))
    m = [x.detach() for x in causal_resolvent_op(*inputs, starts)]
    torch.library.opcheck(causal_resolvent_adjoint_op, (*m, *m, starts))


@pytest.mark.slow
def test_compiles_as_one_graph_with_gradients():
    inputs = [x.requires_grad_() for x in (*medium(2, 70, 3), *lead(2, 3))]

    def function(detuning, absorption, real, imag):
        return run(detuning, absorption, GreenState(real, imag))

    expected = function(*inputs)
    compiled = torch.compile(function, fullgraph=True)(*inputs)
    for one, two in zip(
        (*expected, *gradients(expected, inputs)), (*compiled, *gradients(compiled, inputs)), strict=True
    ):
        assert worst(two, one) < 1e-14  # measured 0


@pytest.mark.slow
def test_exports():
    class Sweep(torch.nn.Module):
        def forward(self, detuning, absorption):
            return run(detuning, absorption)

    inputs = medium(2, 70, 3)
    program = torch.export.export(Sweep(), inputs)
    for one, two in zip(run(*inputs), program.module()(*inputs), strict=True):
        assert torch.equal(one, two)


class TestBadInput:
    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
    def test_absorption(self, value):
        detuning, absorption = medium(2, 9, 3)
        absorption[1, 4, 2] = value
        with pytest.raises(DomainError, match=r"absorption is .* at \[batch, time, head\] = \[1, 4, 2\]"):
            causal_resolvent(detuning, absorption)
        causal_resolvent(detuning, absorption, check=False)  # the caller's word is taken

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_detuning(self, value):
        detuning, absorption = medium(2, 9, 3)
        detuning[1, 4, 2] = value
        with pytest.raises(DomainError, match=r"detuning is .* at \[batch, time, head\] = \[1, 4, 2\]"):
            causal_resolvent(detuning, absorption)

    @pytest.mark.parametrize(("part", "value"), [(0, float("nan")), (1, -1e-9), (1, float("nan")), (1, float("inf"))])
    def test_initial(self, part, value):
        initial = lead(2, 3)
        initial[part][1, 2] = value
        with pytest.raises(DomainError, match=r"initial is .* at \[row, head\] = \[1, 2\]"):
            causal_resolvent(*medium(2, 9, 3), initial=initial)

    def test_shapes(self):
        detuning, absorption = medium(2, 9, 3)
        with pytest.raises(ShapeError, match=r"one shape \[batch, time, heads\]"):
            causal_resolvent(detuning, absorption[..., :2])
        with pytest.raises(ShapeError, match="must not be empty"):
            causal_resolvent(detuning[:, :0], absorption[:, :0])
        with pytest.raises(ShapeError, match=r"initial must be \[3\] or \[2, 3\]"):
            causal_resolvent(detuning, absorption, initial=lead(4, 3))

    @pytest.mark.parametrize("bounds", [[0], [1, 9], [0, 8], [0, 4, 4, 9], [0.0, 9.0], [[0, 9]]])
    def test_boundaries(self, bounds):
        with pytest.raises(ShapeError, match="cu_seqlens must"):
            causal_resolvent(*medium(1, 9, 3), cu_seqlens=torch.tensor(bounds))

    def test_boundaries_need_one_row(self):
        with pytest.raises(ShapeError, match="needs batch size 1; got batch size 2"):
            causal_resolvent(*medium(2, 9, 3), cu_seqlens=torch.tensor([0, 9]))

    def test_backend(self):
        with pytest.raises(BackendError, match="'quick'"):
            causal_resolvent(*medium(1, 9, 3), backend="quick")
