"""The causal resolvent's kernels against the float64 reference: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from resolvent_cases import gradients, lead, medium, pair, shrink_programs
from test_resolvent_precision import resonant

from resnet_bk.errors import BackendError, DomainError, ShapeError
from resnet_bk.ops.resolvent import GreenState, causal_resolvent
from resnet_bk.ops.resolvent.chunked import chunk_length

pytest.importorskip("triton", reason="the package triton is not installed")

from resnet_bk.ops.resolvent import launch
from resnet_bk.ops.resolvent.kernels import causal_resolvent_adjoint_op, causal_resolvent_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = [0, 1, 2, 9, 40, 41, 105]


@pytest.fixture(autouse=True)
def _sizes(monkeypatch):
    shrink_programs(monkeypatch)


def run(inputs, backend, *, dtype=torch.float32, bounds=None, device=DEVICE):
    """Re m, Im m, the state and all gradients, as float64 on the CPU."""
    inputs = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    initial = GreenState(*inputs[2:]) if len(inputs) > 2 else None
    where = None if bounds is None else torch.tensor(bounds, device=device)
    m, state = causal_resolvent(*inputs[:2], initial=initial, cu_seqlens=where, backend=backend)
    out = (*m, *state)
    return [x.detach().cpu().double() for x in (*out, *gradients([x.cpu() for x in out], inputs))]


def error(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


def assert_as_exact_as_pytorch(inputs, truth="reference", **options):
    inputs = [x.float() for x in inputs]
    truth = run(inputs, truth, dtype=torch.float64, device="cpu", **options)
    plain = run(inputs, "chunked", **options)
    for ours, theirs, exact in zip(run(inputs, "triton", **options), plain, truth, strict=True):
        # Measured 1.5 times, in the interpreter, which does not fuse additions. The floor is for a few numbers only.
        assert error(ours, exact) <= 2 * error(theirs, exact) + 2e-6


@pytest.mark.parametrize("time", [1, 7, 63, 64, 65, 200])
def test_every_length_with_every_gradient(time):
    assert_as_exact_as_pytorch((*medium(1, time, 5, seed=time), *lead(1, 5)))


def test_batches_and_walls():
    assert_as_exact_as_pytorch((*medium(3, 40, 3), *lead(3, 3)))
    assert_as_exact_as_pytorch(medium(3, 20, 5))


def test_packed_documents():
    assert_as_exact_as_pytorch((*medium(1, 105, 3), *lead(6, 3)), bounds=BOUNDS)


def test_constant_detuning_is_read_without_a_copy():
    detuning, absorption = (x.float().to(DEVICE) for x in medium(2, 40, 3))
    same = detuning[0, 0].expand_as(absorption)
    (real, imag), _ = causal_resolvent(same, absorption, backend="triton")
    (exact_real, exact_imag), _ = causal_resolvent(same.cpu().double(), absorption.cpu().double(), backend="reference")
    for ours, exact in ((real, exact_real), (imag, exact_imag)):
        assert error(ours.cpu().double(), exact) < 1e-6


@pytest.mark.parametrize(
    ("barrier", "eta", "site"), [(1.0, 1e-3, 0), (1.0, 1e-4, 0), (1.0, 1e-4, 1), (1e3, 1e-3, 0), (1e3, 1e-4, 1)]
)
def test_resonant_chunk_starts_are_as_exact_as_the_sequential_sweep(barrier, eta, site):
    time = 128
    # Every chunk of the kernels starts where one of the construction does.
    assert launch.chunk_length(2 * time) % chunk_length(time) == 0
    inputs = resonant(time, eta, site, barrier, batch=2, heads=16)
    truth = run(inputs, "reference", dtype=torch.float64, device="cpu")
    plain, ours = run(inputs, "reference"), run(inputs, "triton")
    assert ours[1].min() > 0

    def by_head(result):
        """Worst error of a head's m over time, root mean square over heads; error of the gradients."""
        m, exact = (pair(x[:2]) for x in (result, truth))
        relative = ((m - exact).abs() / exact.abs()).amax(1).square().mean().sqrt()
        gradient, exact = (torch.stack(x[4:]) for x in (result, truth))
        return relative, ((gradient - exact).norm(dim=(1, 3)) / exact.norm(dim=(1, 3))).mean()

    for kernel, sequential in zip(by_head(ours), by_head(plain), strict=True):
        assert kernel <= 2 * sequential + 1e-6


def test_products_of_huge_detunings_do_not_overflow():
    detuning, absorption = medium(1, 64, 2, spread=1.0)
    huge = torch.where(detuning.abs() < 0.5, detuning, 1e15 * detuning.sign())
    ours = run((huge, absorption), "triton")[:2]
    exact = run((huge, absorption), "reference", dtype=torch.float64, device="cpu")[:2]
    m, exact = pair(ours), pair(exact)
    assert ((m - exact).abs() / exact.abs()).max() < 2e-6  # measured 4e-7


def test_the_past_is_bit_identical_whatever_the_future():
    detuning, absorption = (x.float().to(DEVICE) for x in medium(1, 70, 3))
    before = pair(causal_resolvent(detuning, absorption, backend="triton")[0])
    for place in (1, 32, 69):
        changed = [x.clone() for x in (detuning, absorption)]
        for x in changed:
            x[:, place:] += 1e3
        after = pair(causal_resolvent(*changed, backend="triton")[0])
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place:], before[:, place:])


def test_scratch_memory_is_written_before_it_is_read():
    inputs = [x.float() for x in (*medium(1, 105, 3), *lead(6, 3))]
    expected = run(inputs, "triton", bounds=BOUNDS)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        assert torch.empty(1).isnan()
        poisoned = run(inputs, "triton", bounds=BOUNDS)
    finally:
        torch.use_deterministic_algorithms(before)
    for one, two in zip(expected, poisoned, strict=True):
        assert torch.equal(one, two)


def test_documents_have_room_and_at_most_one_slot_to_spare():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 200, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
        bounds = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
        layout = launch.Layout(int(bounds[-1]), 1, len(lengths), bounds)
        needed = -(-lengths // layout.chunk)
        # Where the kernels look for the first slot of every document.
        first = bounds // layout.chunk + torch.arange(len(bounds))
        assert ((first.diff() - needed == 0) | (first.diff() - needed == 1)).all()
        assert first[-1] == layout.slots


@pytest.mark.parametrize("bounds", [None, [0, 3, 4, 20]])
def test_operator_registration(bounds):
    rows = 2 if bounds is None else 3
    first = [x.float().to(DEVICE) for x in lead(rows, 3)]
    inputs = [x.float().to(DEVICE).flatten(0, 1) for x in medium(1, 20, 3)]
    inputs = [x.requires_grad_() for x in (*inputs, *first)]
    where = None if bounds is None else torch.tensor(bounds, device=DEVICE)
    torch.library.opcheck(causal_resolvent_op, (*inputs, where))
    m = [x.detach() for x in causal_resolvent_op(*inputs, where)]
    torch.library.opcheck(causal_resolvent_adjoint_op, (*m, *(x.detach() for x in first), *m, where))


class TestBadInput:
    def test_values_are_named(self):
        detuning, absorption = (x.float().to(DEVICE) for x in medium(2, 9, 3))
        absorption[1, 4, 2] = 0
        with pytest.raises(DomainError, match=r"absorption is 0\.0 at \[batch, time, head\] = \[1, 4, 2\]"):
            causal_resolvent(detuning, absorption, backend="triton")

    def test_boundaries(self):
        operands = [x.float().to(DEVICE) for x in medium(1, 9, 3)]
        with pytest.raises(ShapeError, match="increase strictly"):
            causal_resolvent(*operands, cu_seqlens=torch.tensor([0, 5, 5, 9], device=DEVICE), backend="triton")

    def test_float64(self):
        with pytest.raises(BackendError, match="float64"):
            causal_resolvent(*(x.to(DEVICE) for x in medium(1, 9, 3)), backend="triton")
        detuning, absorption = (x.to(DEVICE) for x in medium(1, 9, 3))
        with pytest.raises(BackendError, match="float64"):
            causal_resolvent(detuning.float(), absorption, backend="triton")


@pytest.mark.gpu
class TestOnTheGPU:
    @pytest.mark.parametrize(("batch", "time", "heads"), [(1, 4096, 32), (1, 100_000, 5), (64, 1000, 24)])
    def test_large(self, batch, time, heads):
        assert_as_exact_as_pytorch((*medium(batch, time, heads), *lead(batch, heads)), "chunked")

    @pytest.mark.parametrize("eta", [1e-3, 1e-4])
    def test_long_resonant_media(self, eta):
        inputs = resonant(4096, eta, 0, 1.0, batch=1, heads=16)
        truth = run(inputs, "reference", dtype=torch.float64, device="cpu")
        ours, plain = (run(inputs, backend) for backend in ("triton", "chunked"))
        # The state is 16 numbers of which one may stand on a resonance, so it is held to the error of the whole run.
        worst = max(error(two, exact) for two, exact in zip(plain, truth, strict=True))
        for one, exact in zip(ours, truth, strict=True):
            assert error(one, exact) <= 2 * worst + 1e-6

    def test_looks_at_values_once(self):
        detuning, absorption = (x.float().cuda() for x in medium(1, 64, 3))
        causal_resolvent(detuning, absorption)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchroniz") as caught:
                causal_resolvent(detuning, absorption)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(caught) == 1

    def test_compiles_as_one_graph_with_gradients(self):
        inputs = [x.float().cuda().requires_grad_() for x in (*medium(2, 4096, 24), *lead(2, 24))]

        def function(detuning, absorption, real, imag):
            m, state = causal_resolvent(detuning, absorption, initial=GreenState(real, imag))
            return *m, *state

        expected, compiled = function(*inputs), torch.compile(function, fullgraph=True)(*inputs)
        for one, two in zip(
            (*expected, *gradients(expected, inputs)), (*compiled, *gradients(compiled, inputs)), strict=True
        ):
            assert error(two.double(), one.double()) < 1e-6
