"""What semiseparable mixing promises around its numbers: causality, clean memory, compilers, refusals."""

from __future__ import annotations

import pytest
import torch
from semiseparable_cases import HEADS, STATE, VALUE, cast, gradients, mix, operands, part, run, with_gradients, worst

from resnet_bk.errors import BackendError, DomainError, ShapeError
from resnet_bk.ops.semiseparable import MixState, segments, semiseparable_step
from resnet_bk.ops.semiseparable.chunked import semiseparable_backward_op, semiseparable_op

BACKENDS = ["reference", "chunked"]
BOUNDS = torch.tensor([0, 1, 18, 34, 100])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_past_is_bit_identical_whatever_the_future(backend, dtype):
    case = cast(operands(2, 150), dtype)
    before, _ = mix(case, backend=backend)
    for place in (1, 63, 64, 100, 149):
        changed = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in case.items()}
        for name in ("query", "key", "value", "source"):
            changed[name][:, place:] += 1e3
        changed["log_decay"][:, place:] -= 1e3
        after, _ = mix(changed, backend=backend)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place:], before[:, place:])


@pytest.fixture
def poisoned(monkeypatch):
    """Every allocation that promises nothing about its contents holds NaN."""

    def fill(x):
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(segments, "_workspace", lambda name, shape, like, dtype: torch.full(shape, torch.nan).to(dtype))
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, original=original, **k: fill(original(*a, **k)))
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(3).isnan().all()


@pytest.mark.parametrize("absent", [(), ("source", "query_bias", "key_bias", "skip", "frequencies", "initial")])
@pytest.mark.parametrize("boundaries", [None, BOUNDS])
def test_every_element_read_was_written(monkeypatch, request, absent, boundaries):
    monkeypatch.setitem(segments._SEGMENT_BYTES, "cpu", 8 * HEADS * STATE * 48)
    case = operands(1, 100, rows=1 if boundaries is None else 4, absent=absent)
    clean = with_gradients(case, cu_seqlens=boundaries, chunk_size=16)
    request.getfixturevalue("poisoned")
    for name, x in with_gradients(case, cu_seqlens=boundaries, chunk_size=16).items():
        assert torch.equal(x, clean[name]), name


def test_autocast_narrows_nothing():
    case = cast(operands(2, 70), torch.float32)
    options = {name: case[name] for name in ("query_bias", "key_bias", "frequencies", "skip", "scale")}

    def outputs():
        now = (case[name][:, 0] for name in ("query", "key", "value", "log_decay"))
        step, _ = semiseparable_step(*now, case["initial"], source=case["source"][:, 0], **options)
        return step, *(run(case, backend=backend)[0] for backend in BACKENDS)

    expected = outputs()
    with torch.autocast("cpu", torch.bfloat16):
        for one, two in zip(expected, outputs(), strict=True):
            assert torch.equal(one, two)


def test_nothing_is_left_over_from_earlier_calls():
    """Working memory is kept between calls; results are not views of it and do not depend on what it held."""
    case = operands(2, 100)
    clean = with_gradients(case)
    kept = {name: x.clone() for name, x in clean.items()}
    larger = operands(3, 300, seed=1)
    larger["value"] = 1e200 * larger["value"]
    with_gradients(larger)
    again = with_gradients(case)
    for name, x in kept.items():
        assert torch.equal(clean[name], x), name
        assert torch.equal(again[name], x), name


def test_training_works_after_inference_mode_and_on_a_default_device():
    segments._local.__dict__.clear()
    case = operands(1, 100)
    with torch.inference_mode(), torch.device("meta"):
        run(case)
    assert max(worst(with_gradients(case), with_gradients(case, backend="reference")).values()) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_read_through_their_strides_and_never_written(backend):
    case = operands(2, 70)
    expected = with_gradients(case, backend=backend)
    strided = dict(case)
    for name in ("query", "key", "value", "log_decay", "source"):
        strided[name] = (
            torch.stack((case[name], case[name] + 1), -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]
        )
        assert not strided[name].is_contiguous()
    kept = {name: x.clone() for name, x in strided.items() if isinstance(x, torch.Tensor)}
    ours = with_gradients(strided, backend=backend)
    assert max(worst(ours, expected).values()) < 1e-14
    assert torch.equal(run(strided, backend=backend)[0], ours["y"])
    assert all(torch.equal(strided[name], x) for name, x in kept.items())


def test_the_state_owns_its_memory_and_earlier_states_stay_as_they_are():
    case = operands(1, 100)
    _, state = mix(part(case, 0, 70))
    kept = state.memory.clone()
    assert state.memory.untyped_storage().nbytes() == kept.nbytes
    mix(part(case, 70, 100, state))
    names = ("query", "key", "value", "log_decay")
    semiseparable_step(*(case[name][:, 70] for name in names), state)
    assert torch.equal(state.memory, kept)


def arguments(case, starts, *, chunk=16, save=True):
    """Positional arguments of the custom operator."""
    time = 64
    query, key = (case[name][:, :time].unsqueeze(2) for name in ("query", "key"))
    tokens = [case[name][:, :time] for name in ("value", "log_decay", "source")]
    rest = [case[name] for name in ("query_bias", "key_bias", "frequencies", "skip")]
    leaves = [x.clone().requires_grad_(x is not rest[2]) for x in (query, key, *tokens, *rest)]
    return (*leaves, case["initial"].memory.clone().requires_grad_(), starts, case["scale"], chunk, save)


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 1, 3])])
def test_operator_registration(starts):
    case = operands(1, 64, rows=1 if starts is None else 3)
    inputs = arguments(case, starts)
    torch.library.opcheck(semiseparable_op, inputs)
    y, final, kept = (x.detach() for x in semiseparable_op(*inputs))
    backward = (*inputs[:11], kept, torch.ones_like(y), torch.ones_like(final), *inputs[11:13])
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in backward]
    torch.library.opcheck(semiseparable_backward_op, detached)


@pytest.mark.slow
@pytest.mark.parametrize("time", [64, 100])
def test_compiles_as_one_graph_with_gradients(time):
    case = operands(1, time)
    names = [name for name, x in case.items() if isinstance(x, torch.Tensor) and name != "frequencies"]
    leaves = [case[name].requires_grad_() for name in names] + [case["initial"].memory.requires_grad_()]

    def function(*leaves):
        replaced = dict(zip(names, leaves[:-1], strict=True))
        return run({**case, **replaced, "initial": MixState(leaves[-1], case["initial"].position)})

    expected = function(*leaves)
    compiled = torch.compile(function, fullgraph=True)(*leaves)
    pairs = zip((*expected, *gradients(expected, leaves)), (*compiled, *gradients(compiled, leaves)), strict=True)
    for one, two in pairs:
        assert (one - two).abs().max() < 1e-12  # measured 1e-14


@pytest.mark.slow
def test_exports():
    case = cast(operands(1, 70), torch.float32)
    names = ("query", "key", "value", "log_decay")

    class Mix(torch.nn.Module):
        def forward(self, *tokens):
            return run({**case, **dict(zip(names, tokens, strict=True))})

    inputs = tuple(case[name] for name in names)
    program = torch.export.export(Mix(), inputs)
    for one, two in zip(run(case), program.module()(*inputs), strict=True):
        torch.testing.assert_close(one, two)


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("query", (2, 9, STATE - 1)),
            ("query", (2, 8, STATE)),
            ("key", (2, 9, HEADS, STATE)),
            ("log_decay", (2, 9)),
            ("source", (2, 9, HEADS + 1)),
            ("query_bias", (STATE,)),
            ("key_bias", (HEADS, STATE + 1)),
            ("frequencies", (STATE,)),
            ("skip", (1,)),
        ],
    )
    def test_the_tensor_that_does_not_fit_is_named(self, name, shape):
        case = operands(2, 9)
        case[name] = torch.zeros(shape, dtype=torch.float64)
        # A wrong state size of the query shows at the first tensor that disagrees with it.
        with pytest.raises(ShapeError, match="key must be" if shape == (2, 9, STATE - 1) else f"{name} must be"):
            run(case)

    @pytest.mark.parametrize("shape", [(2, 9, HEADS), (2, 0, HEADS, VALUE)])
    def test_value(self, shape):
        with pytest.raises(ShapeError, match="value must be a non-empty"):
            run({**operands(2, 9), "value": torch.zeros(shape)})

    def test_an_odd_state_has_no_pairs(self):
        case = operands(2, 9, absent=("query_bias", "key_bias", "initial"))
        case |= {name: case[name][..., :7] for name in ("query", "key")} | {"frequencies": torch.zeros(3)}
        with pytest.raises(ShapeError, match="state size 7 must be even"):
            run(case)

    def test_initial(self):
        with pytest.raises(ShapeError, match=r"initial must hold memory \[2, 3, 8, 5\] and position \[2\]"):
            run(operands(2, 9, rows=3))
        with pytest.raises(ShapeError, match="initial must hold"):
            semiseparable_step(
                torch.ones(2, STATE), torch.ones(2, STATE), torch.ones(2, HEADS, VALUE), torch.zeros(2, HEADS),
                operands(3, 1)["initial"],
            )  # fmt: skip

    @pytest.mark.parametrize("bounds", [[0], [1, 9], [0, 8], [0, 4, 4, 9]])
    def test_boundaries(self, bounds):
        with pytest.raises(ShapeError, match="cu_seqlens must"):
            run(operands(1, 9), cu_seqlens=torch.tensor(bounds))

    @pytest.mark.parametrize("size", [0, -64])
    def test_chunk_size(self, size):
        with pytest.raises(DomainError, match=f"chunk_size is {size}"):
            run(operands(1, 9), chunk_size=size)

    def test_backend(self):
        with pytest.raises(BackendError, match="'quick'"):
            run(operands(1, 9), backend="quick")
