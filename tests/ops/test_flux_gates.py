"""The flux gates: composed from the resolvent's functions, and their kernels against that composition in float64."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import pytest
import torch
from resolvent_cases import gradients, shrink_programs, worst
from torch.nn import functional as F

from resnet_bk.errors import BackendError, DomainError, ShapeError
from resnet_bk.ops.resolvent import GreenState, causal_resolvent, decaying_root, flux_gate, flux_gates, previous_imag

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the package triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter knows no bfloat16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
KINDS = ["gated", "free", "unit"]
BOUNDS = [0, 1, 2, 9, 40, 41, 105]


@pytest.fixture(autouse=True)
def _sizes(monkeypatch):
    shrink_programs(monkeypatch)


class Case:
    """Raw operands as slices of one projection, parameters, an initial state and cotangents."""

    def __init__(self, batch, time, heads, kind="gated", *, start="lead", bounds=None, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=generator)

        self.kind, self.heads = kind, heads
        self.bounds = None if bounds is None else torch.tensor(bounds)
        rows = batch if bounds is None else len(bounds) - 1
        self.inputs = [draw(batch, time, 3 * heads + 5).to(dtype), draw(heads), draw(heads), draw(heads) - 3]
        self.inputs.append(None if kind == "unit" else draw(heads))
        if start == "state":
            self.inputs += [draw(rows, heads), draw(rows, heads).abs()]
        elif start == "wall":
            self.inputs += [torch.zeros(heads), torch.zeros(heads)]
        else:
            self.inputs += [None, None]
        self.grads = [draw(batch, time, heads), draw(batch, time, heads), draw(rows, heads), draw(rows, heads)]

    def outputs(self, inputs, backend):
        raw, scale, energy, bias, source_bias, real, imag = inputs
        a, e, s = (raw[..., k * self.heads : (k + 1) * self.heads] for k in range(3))
        gates, state = flux_gates(
            a,
            e,
            s[..., : self.heads * (self.kind != "unit")],
            potential_scale=scale,
            energy=energy,
            absorption_bias=bias,
            absorption_floor=1e-3,
            source_bias=source_bias,
            source_kind=self.kind,
            initial=None if real is None else GreenState(real, imag),
            cu_seqlens=None if self.bounds is None else self.bounds.to(raw.device),
            backend=backend,
        )
        return *gates, *state

    def leaves(self, dtype=None, device=DEVICE):
        return [
            x if x is None else x.detach().to(device, dtype or x.dtype, copy=True).requires_grad_() for x in self.inputs
        ]

    def run(self, backend, dtype=None, device=DEVICE):
        """The four outputs and every gradient."""
        inputs = self.leaves(dtype, device)
        out = self.outputs(inputs, backend)
        wanted = [x for x in inputs if x is not None]
        return *out, *torch.autograd.grad(out, wanted, [g.to(x) for g, x in zip(self.grads, out, strict=True)])


def error(ours, exact):
    exact = exact.to(ours.device)
    return ((ours.double() - exact).norm() / exact.norm()).item()


def assert_as_exact_as_pytorch(case, truth="reference"):
    """The kernels err at most twice as much as the same mathematics in PyTorch at the same dtype, plus a floor."""
    truth = case.run(truth, torch.float64, "cpu")
    results = zip(case.run("triton"), case.run("chunked"), truth, strict=True)
    for index, (ours, plain, exact) in enumerate(results):
        assert ours.dtype == plain.dtype
        # Measured 1.3 times on many heads. The floor is for tiny cases: a few numbers, or a sum that cancels.
        assert error(ours, exact) <= 2 * error(plain, exact) + 3e-6, index


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("kind", KINDS)
def test_composes_the_equations(kind, backend):
    case = Case(2, 20, 3, kind)
    inputs = case.leaves(torch.float64, "cpu")
    raw, scale, energy, bias, source_bias, _, _ = inputs
    a, e, s = raw[..., :9].split(3, -1)
    eta = F.softplus(e + bias) + 1e-3
    lead = GreenState(*decaying_root(-energy, F.softplus(bias) + 1e-3))
    m, state = causal_resolvent(scale * a - energy, eta, initial=lead, backend="reference")
    log_decay, weight = flux_gate(previous_imag(m[1], lead.imag, None), eta)
    if kind != "unit":
        weight = weight * (s + source_bias).sigmoid() if kind == "gated" else F.softplus(s + source_bias)
    for ours, written in zip(case.outputs(inputs, backend), (log_decay, weight, *state), strict=True):
        assert worst(ours, written) < 1e-14  # measured 0 and 4e-16


@pytest.mark.parametrize("start", ["lead", "state"])
def test_gradcheck(start):
    case = Case(1, 6, 2, start=start)
    inputs = case.leaves(torch.float64, "cpu")
    wanted = [x for x in inputs if x is not None]

    def function(*given):
        return case.outputs([*given, *[None] * (len(inputs) - len(given))], "chunked")

    assert torch.autograd.gradcheck(function, wanted)


def test_rows_of_the_kernel_have_unit_norm():
    log_decay, weight = Case(1, 80, 3, "unit").run("chunked", torch.float64, "cpu")[:2]
    squared = torch.zeros(1, 3, dtype=torch.float64)
    for t in range(80):
        squared = squared * torch.exp(2 * log_decay[:, t]) + weight[:, t].square()
        lead = torch.exp(2 * log_decay[:, : t + 1].sum(1))
        assert (squared + lead - 1).abs().max() < 1e-13  # measured 2e-15


@needs_triton
class TestKernels:
    @pytest.mark.parametrize("time", [1, 7, 63, 64, 65, 200])
    def test_every_length(self, time):
        assert_as_exact_as_pytorch(Case(1, time, 5, start="state", seed=time))

    @pytest.mark.parametrize(
        ("kind", "start"),
        [
            ("gated", "lead"),
            ("gated", "wall"),
            ("free", "lead"),
            ("free", "state"),
            ("unit", "wall"),
            ("unit", "state"),
        ],
    )
    def test_every_source_and_boundary(self, kind, start):
        assert_as_exact_as_pytorch(Case(2, 37, 3, kind, start=start))

    @pytest.mark.parametrize(("dtype", "start"), [(torch.float32, "lead"), *((dtype, "state") for dtype in DTYPES)])
    def test_packed_documents(self, dtype, start):
        assert_as_exact_as_pytorch(Case(1, 105, 3, start=start, bounds=BOUNDS, dtype=dtype))

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_narrow_projections(self, dtype):
        assert_as_exact_as_pytorch(Case(3, 33, 5, dtype=dtype))

    def test_packed_documents_are_separate_runs(self):
        case = Case(1, 105, 3, start="state", bounds=BOUNDS)
        inputs = case.leaves()
        packed = case.outputs(inputs, "triton")
        parts = []
        alone = Case(1, 105, 3)
        for row, (left, right) in enumerate(pairwise(BOUNDS)):
            given = [inputs[0][:, left:right], *inputs[1:5], inputs[5][row : row + 1], inputs[6][row : row + 1]]
            parts.append(alone.outputs(given, "triton"))
        columns = list(zip(*parts, strict=True))
        separate = (*(torch.cat(x, 1) for x in columns[:2]), *(torch.cat(x, 0) for x in columns[2:]))
        for one, two in zip(
            (*packed, *gradients(packed, inputs)), (*separate, *gradients(separate, inputs)), strict=True
        ):
            assert error(one, two.double()) < 2e-6

    def test_continues_from_its_state(self):
        case = Case(2, 50, 3, start="state")
        inputs = case.leaves()
        whole = case.outputs(inputs, "triton")
        first = case.outputs([inputs[0][:, :21], *inputs[1:]], "triton")
        second = case.outputs([inputs[0][:, 21:], *inputs[1:5], *first[2:]], "triton")
        parts = (*(torch.cat(x, 1) for x in zip(first[:2], second[:2], strict=True)), *second[2:])
        for one, two in zip((*whole, *gradients(whole, inputs)), (*parts, *gradients(parts, inputs)), strict=True):
            assert error(one, two.double()) < 2e-6

    def test_nan_stays_in_its_row(self):
        for case, inside in (
            (Case(3, 40, 3), (1, slice(None))),
            (Case(1, 105, 3, bounds=BOUNDS), (0, slice(9, 40))),
        ):
            inputs = case.leaves()
            with torch.no_grad():
                inputs[0][inside[0], 20, 1] = torch.nan  # the potential of head 1
            out = case.outputs(inputs, "triton")
            grad = torch.autograd.grad(out[0].sum() + out[1].sum(), inputs[0])[0]
            assert out[0][inside[0], 22, 1].isnan()
            assert grad[inside[0], 15, 1].isnan()
            for x in (out[0], grad):
                poisoned = x.isnan()
                poisoned[inside] = False
                assert not poisoned.any()

    def test_repeats_bit_by_bit_and_saves_nothing_without_gradients(self):
        from resnet_bk.ops.resolvent.kernels import flux_gates_op

        case = Case(2, 70, 3)
        for one, two in zip(case.run("triton"), case.run("triton"), strict=True):
            assert torch.equal(one, two)
        raw, *parameters = case.leaves()
        operands = [x.flatten(0, 1) for x in raw[..., :9].split(3, -1)]
        kept = flux_gates_op(*operands, *parameters, None, 2, 1e-3, "gated", True)
        lost = flux_gates_op(*operands, *parameters, None, 2, 1e-3, "gated", False)
        assert [x.numel() for x in kept[4:]] == [420, 420]
        assert [x.numel() for x in lost[4:]] == [0, 0]
        for one, two in zip(kept[:4], lost[:4], strict=True):
            assert torch.equal(one, two)

    @pytest.mark.parametrize(
        ("kind", "start", "bounds"),
        [
            ("gated", "lead", None),
            pytest.param("unit", "lead", None, marks=pytest.mark.slow),
            pytest.param("gated", "state", [0, 1, 20, 24], marks=pytest.mark.slow),
        ],
    )
    def test_operator_registration(self, kind, start, bounds):
        from resnet_bk.ops.resolvent.kernels import flux_gates_backward_op, flux_gates_op

        case = Case(1 if bounds else 2, 24 if bounds else 12, 2, kind, start=start, bounds=bounds)
        rows = 3 if bounds else 2
        raw, *parameters = case.leaves()
        operands = [x.flatten(0, 1) for x in raw[..., :6].split(2, -1)]
        if kind == "unit":
            operands[2] = None
        where = None if bounds is None else torch.tensor(bounds, device=DEVICE)
        arguments = (*operands, *parameters, where)
        torch.library.opcheck(flux_gates_op, (*arguments, rows, 1e-3, kind, True))
        out = [x.detach() for x in flux_gates_op(*arguments, rows, 1e-3, kind, True)]
        still = [x if x is None else x.detach() for x in arguments]
        torch.library.opcheck(flux_gates_backward_op, (*still, out[4], out[5], *out[:4], rows, 1e-3, kind))

    @pytest.mark.slow
    @pytest.mark.parametrize("start", ["lead", "state"])
    def test_compiles_as_one_graph_with_gradients(self, start):
        case = Case(2, 40, 3, start=start)
        inputs = case.leaves()
        expected = case.outputs(inputs, "triton")
        compiled = torch.compile(lambda given: case.outputs(given, "triton"), fullgraph=True)(inputs)
        wanted = [x for x in inputs if x is not None]
        pairs = zip((*expected, *gradients(expected, wanted)), (*compiled, *gradients(compiled, wanted)), strict=True)
        for one, two in pairs:
            assert error(one, two.double()) < 1e-6

    def test_a_wrong_kernel_is_refused(self, monkeypatch):
        from resnet_bk.ops import dispatch
        from resnet_bk.ops.resolvent import self_check

        right = self_check.adjoint

        def wrong(*arguments):
            d_potential, d_absorption, *rest = right(*arguments)
            return d_potential, 1.1 * d_absorption, *rest

        monkeypatch.setattr(dispatch, "_verified", set())
        monkeypatch.setattr(self_check, "adjoint", wrong)
        with pytest.raises(BackendError, match=r"flux_gates disagrees .* d_absorption 1\.00e-01 \(bound 1e-04\)"):
            Case(1, 5, 2).run("triton")


@needs_triton
@pytest.mark.gpu
class TestOnTheGPU:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("batch", "time", "heads"), [(1, 4096, 32), (3, 1000, 24), (64, 100, 5)])
    def test_large(self, batch, time, heads, kind, dtype):
        assert_as_exact_as_pytorch(Case(batch, time, heads, kind, dtype=dtype))

    @pytest.mark.parametrize("start", ["lead", "state"])
    def test_long(self, start):
        assert_as_exact_as_pytorch(Case(1, 100_000, 7, start=start, dtype=torch.bfloat16), "chunked")

    def test_many_documents(self):
        generator = torch.Generator().manual_seed(0)
        inner = torch.randperm(19_999, generator=generator)[:3000].sort().values + 1
        bounds = [0, *inner.tolist(), 20_000]
        assert_as_exact_as_pytorch(Case(1, 20_000, 24, start="state", bounds=bounds), "chunked")

    def test_a_million_tokens_are_a_streamed_run(self):
        case = Case(1, 2**20, 32, dtype=torch.bfloat16)
        inputs = [x if x is None else x.detach() for x in case.leaves()]
        whole = case.outputs(inputs, "triton")
        state, parts = [None, None], []
        for left in range(0, 2**20, 2**17):
            *gates, real, imag = case.outputs([inputs[0][:, left : left + 2**17], *inputs[1:5], *state], "triton")
            parts.append(gates)
            state = [real, imag]
        columns = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        for one, two in zip(whole, (*columns, *state), strict=True):
            assert error(one, two.double()) < 1e-5

    def test_projections_above_two_to_the_31_elements(self):
        tail, width = 3000, 2400
        case = Case(1, tail, 4, start="state")
        raw = torch.zeros(1, 2**31 // width + tail, width, dtype=torch.float32, device="cuda")
        assert raw.numel() > 2**31
        start = raw.shape[1] - tail
        raw[:, start:, :17] = case.inputs[0].cuda()
        rest = [x.cuda() for x in case.inputs[1:]]
        case.bounds = torch.tensor([0, start, start + tail])
        packed = [torch.cat((x, x)) for x in rest[-2:]]
        long = case.outputs([raw, *rest[:-2], *packed], "triton")
        case.bounds = None
        short = case.outputs([raw[:, start:].clone(), *rest], "triton")
        for one, two in zip(long[:2], short[:2], strict=True):
            assert error(one[:, start:], two.double()) < 1e-6
        for one, two in zip(long[2:], short[2:], strict=True):
            assert error(one[1:], two.double()) < 1e-6

    def test_captures_in_a_graph(self):
        case = Case(2, 300, 24, dtype=torch.bfloat16)
        inputs = [x if x is None else x.detach() for x in case.leaves()]
        expected = case.outputs(inputs, "auto")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = case.outputs(inputs, "auto")
        graph.replay()
        for one, two in zip(expected, captured, strict=True):
            assert torch.equal(one, two)


class TestBadInput:
    def call(self, **changes):
        case = dict(potential=torch.zeros(2, 5, 3), absorption=torch.zeros(2, 5, 3), source=torch.zeros(2, 5, 3))
        case |= {name: torch.zeros(3) for name in ("potential_scale", "energy", "absorption_bias", "source_bias")}
        case |= {"absorption_floor": 1e-3} | changes
        raw = [case.pop(name) for name in ("potential", "absorption", "source")]
        return flux_gates(*raw, **case)

    @pytest.mark.parametrize("name", ["absorption", "source", "energy", "source_bias"])
    def test_shapes(self, name):
        with pytest.raises(ShapeError, match=f"{name} must be"):
            self.call(**{name: torch.zeros(2)})

    def test_a_missing_source_bias(self):
        with pytest.raises(ShapeError, match=r"source_bias must be \[3\]; got None"):
            self.call(source_bias=None)
        assert self.call(source_bias=None, source=torch.zeros(2, 5, 0), source_kind="unit")

    def test_nothing(self):
        with pytest.raises(ShapeError, match="non-empty"):
            self.call(potential=torch.zeros(2, 0, 3))

    def test_options(self):
        with pytest.raises(DomainError, match="absorption_floor is 0"):
            self.call(absorption_floor=0.0)
        with pytest.raises(DomainError, match="source_kind is 'open'"):
            self.call(source_kind="open")
        with pytest.raises(BackendError, match="'quick'"):
            self.call(backend="quick")

    def test_initial(self):
        with pytest.raises(ShapeError, match=r"initial must be \[3\] or \[2, 3\]"):
            self.call(initial=GreenState(torch.zeros(4, 3), torch.zeros(4, 3)))
