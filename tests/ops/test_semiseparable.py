"""Semiseparable mixing against its dense matrix form: values, every gradient, streaming, packing, causality."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from semiseparable_cases import HEADS, STATE, cast, dense, mix, operands, part, run, with_gradients, worst

from resnet_bk.ops.semiseparable import MixState, chunked, segments, semiseparable_step

BACKENDS = ["reference", "chunked"]
LENGTHS = [1, 2, 63, 64, 65, 1000]
OPTIONS = ("source", "query_bias", "key_bias", "skip", "frequencies", "initial")


def segments_of(monkeypatch, tokens):
    """Make a segment of float64 operands hold this many tokens."""
    monkeypatch.setitem(segments._SEGMENT_BYTES, "cpu", 8 * HEADS * STATE * tokens)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 200])
def test_reference_is_the_dense_matrix(time, shared):
    case = operands(2, time, shared=shared, position=5)
    for ours, matrix in zip(run(case, backend="reference"), dense(case), strict=True):
        assert (ours - matrix).abs().max() < 1e-11  # measured 1e-13


@pytest.mark.parametrize("absent", [(), *((name,) for name in OPTIONS), OPTIONS])
def test_every_option_can_be_left_out(absent):
    case = operands(1, 40, absent=absent)
    expected = dict(zip(("y", "memory"), dense(case), strict=True))
    for backend in BACKENDS:
        ours = with_gradients(case, backend=backend, chunk_size=16)
        assert max(worst(ours, expected).values()) < 1e-12  # measured 2e-15
        if backend == "reference":
            reference = ours
    assert max(worst(ours, reference).values()) < 1e-12  # measured 2e-15


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("time", LENGTHS)
def test_chunked_equals_reference_with_every_gradient(time, shared):
    case = operands(2, time, shared=shared, position=5)
    reference = with_gradients(case, backend="reference")
    assert max(worst(with_gradients(case), reference).values()) < 1e-12  # measured 4e-14


@pytest.mark.parametrize("size", [1, 7, 48, 512])
def test_any_chunk_size(size):
    case = operands(2, 100)
    reference = with_gradients(case, backend="reference")
    assert max(worst(with_gradients(case, chunk_size=size), reference).values()) < 1e-12  # measured 2e-15


@pytest.mark.parametrize(
    ("batch", "time", "tokens", "chunks", "rows"),
    [(1, 150, 16, 1, 1), (3, 150, 16, 1, 1), (2, 150, 48, 3, 1), (5, 16, 32, 1, 2), (3, 150, 10**6, 10, 3)],
)
def test_segments_and_row_blocks_change_nothing(monkeypatch, batch, time, tokens, chunks, rows):
    """One chunk a segment, a few with a shorter last segment, rows in blocks with a shorter last block, all at once."""
    case = operands(batch, time)
    reference = with_gradients(case, backend="reference")
    segments_of(monkeypatch, tokens)
    layouts = []

    class Recorded(segments.Segments):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            layouts.append((self.layout.chunks, self.layout.rows))

    monkeypatch.setattr(chunked, "Segments", Recorded)
    assert max(worst(with_gradients(case, chunk_size=16), reference).values()) < 1e-12  # measured 5e-15
    assert layouts == [(chunks, rows)] * 2


@pytest.mark.parametrize(
    ("decay", "budget"),
    # Worst seen: 2e-15, 3e-15 and 2e-13; the last is the rounding of sums of log decays near 1e6.
    [(-0.02, 1e-12), (3.0, 1e-12), (1e4, 1e-11)],
)
def test_growth_and_strong_decay(decay, budget):
    case = operands(2, 300, decay=decay)
    reference = with_gradients(case, backend="reference")
    assert max(worst(with_gradients(case), reference).values()) < budget


@pytest.mark.parametrize(
    ("decay", "budget"),
    # Worst seen: 7e-7, 4e-7, 4e-6; the error grows with the sum of log decays over a chunk, here 150.
    [(0.3, 2e-6), (-0.02, 2e-6), (3.0, 1.2e-5)],
)
def test_float32_is_near_the_float64_reference(decay, budget):
    case = operands(2, 300, decay=decay)
    exact = with_gradients(case, backend="reference")
    ours = with_gradients(cast(case, torch.float32))
    assert ours["y"].dtype == torch.float32
    assert max(worst(ours, exact).values()) < budget


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_keeps_decays_and_memory_in_float32(backend):
    case = cast(operands(2, 100), torch.bfloat16)
    exact = dict(zip(("y", "memory"), run(cast(case, torch.float64), backend="reference"), strict=True))
    y, memory = run(case, backend=backend)
    assert (y.dtype, memory.dtype) == (torch.bfloat16, torch.float32)
    errors = worst({"y": y, "memory": memory}, exact)
    assert errors["memory"] < 1e-5  # measured 1e-7
    assert errors["y"] < 8e-3  # measured 2e-3, one rounding of the output


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(monkeypatch, backend, packed):
    segments_of(monkeypatch, 16)
    case = operands(1, 19, rows=3 if packed else 1, position=2)
    tensors = {name: x for name, x in case.items() if isinstance(x, torch.Tensor) and name != "frequencies"}
    boundaries = torch.tensor([0, 1, 17, 19]) if packed else None

    def function(memory, *leaves):
        replaced = dict(zip(tensors, leaves, strict=True))
        initial = MixState(memory, case["initial"].position)
        return run({**case, **replaced, "initial": initial}, cu_seqlens=boundaries, backend=backend, chunk_size=16)

    leaves = [x.requires_grad_() for x in (case["initial"].memory, *tensors.values())]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 16, 50, 63, 64, 99])
def test_split_anywhere_is_one_run(backend, cut):
    case = operands(2, 100, position=7)
    value = case["value"].requires_grad_()
    whole, end = mix(case, backend=backend)
    first, state = mix(part(case, 0, cut), backend=backend)
    second, last = mix(part(case, cut, 100, state), backend=backend)
    assert (torch.cat((first, second), 1) - whole).abs().max() < 1e-12  # measured 3e-14
    assert (last.memory - end.memory).abs().max() < 1e-12  # measured 2e-14
    assert last.position.tolist() == end.position.tolist() == [107, 107]
    gradients = [torch.autograd.grad(x.square().sum(), value)[0] for x in (end.memory, last.memory)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-11  # measured 2e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [1, 2, 100])
def test_packed_documents_are_separate_runs(monkeypatch, backend, chunks):
    bounds = [0, 1, 2, 18, 34, 90, 91, 150]
    segments_of(monkeypatch, 16 * chunks)
    case = operands(1, 150, rows=7)
    case["initial"] = MixState(case["initial"].memory, torch.tensor([0, 3, 77, 5, 0, 1, 2]))
    packed = with_gradients(case, cu_seqlens=torch.tensor(bounds), backend=backend, chunk_size=16)
    _, state = mix(case, cu_seqlens=torch.tensor(bounds), backend=backend, chunk_size=16)
    assert state.position.tolist() == [1, 4, 93, 21, 56, 2, 61]
    whole = {name: [] for name in packed}
    for document, (left, right) in enumerate(pairwise(bounds)):
        start = MixState(*(x[document : document + 1] for x in case["initial"]))
        y, end = mix(part(case, left, right, start), backend="reference")
        whole["y"].append(y)
        whole["memory"].append(end.memory)
    separate = {"y": torch.cat(whole["y"], 1), "memory": torch.cat(whole["memory"], 0)}
    assert max(worst(packed, separate).values()) < 1e-12  # measured 2e-15
    reference = with_gradients(case, cu_seqlens=torch.tensor(bounds), backend="reference")
    assert max(worst(packed, reference).values()) < 1e-12  # measured 2e-15


@pytest.mark.parametrize("shared", [True, False])
def test_steps_are_the_whole_sequence(shared):
    case = operands(2, 70, shared=shared, position=41)
    whole, end = mix(case)
    state, outputs = case["initial"], []
    options = {name: case[name] for name in ("query_bias", "key_bias", "frequencies", "skip", "scale")}
    for t in range(70):
        now = [case[name][:, t] for name in ("query", "key", "value", "log_decay")]
        y, state = semiseparable_step(*now, state, source=case["source"][:, t], **options)
        outputs.append(y)
    assert (torch.stack(outputs, 1) - whole).abs().max() < 1e-12  # measured 5e-14
    assert (state.memory - end.memory).abs().max() < 1e-12  # measured 3e-14
    assert state.position.tolist() == end.position.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", [2**24 + 1, 10**9 + 7])
def test_far_positions_are_as_exact_as_near_ones(backend, position):
    """Only distances enter: tokens that start anywhere, in two runs, give the outputs that they give at zero."""
    case = cast(operands(1, 150), torch.float32)

    def outputs(start):
        state = MixState(torch.zeros_like(case["initial"].memory), torch.tensor([start]))
        first, state = mix(part(case, 0, 70, state), backend=backend)
        second, state = mix(part(case, 70, 150, state), backend=backend)
        assert state.position.tolist() == [start + 150]
        return torch.cat((first, second), 1)

    near, far = outputs(0), outputs(position)
    assert (far - near).abs().max() / near.abs().max() < 2e-6  # measured 1e-7
