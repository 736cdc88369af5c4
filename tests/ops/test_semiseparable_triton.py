"""The mixing kernels against float64: in Triton's interpreter where there is no GPU, natively where there is one."""

from __future__ import annotations

import pytest
import torch
from semiseparable_cases import cast, with_gradients

from resnet_bk.errors import BackendError
from resnet_bk.ops.semiseparable import MixState, kernels, rotary_frequencies, semiseparable_mix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
BUDGET = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
OPTIONS = ("source", "query_bias", "key_bias", "skip", "frequencies", "initial")


def case(batch, time, heads=2, state=32, value=16, *, shared=True, rows=None, absent=(), decay=0.05, position=7):
    generator = torch.Generator().manual_seed(time)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    channels = (batch, time, state) if shared else (batch, time, heads, state)
    rows = batch if rows is None else rows
    everything = {
        "query": draw(*channels),
        "key": draw(*channels),
        "value": draw(batch, time, heads, value),
        "log_decay": -decay * draw(batch, time, heads).abs(),
        "source": draw(batch, time, heads).abs(),
        "query_bias": draw(heads, state),
        "key_bias": draw(heads, state),
        "skip": draw(heads),
        "frequencies": rotary_frequencies(state, 100.0, device=DEVICE),
        "initial": MixState(draw(rows, heads, state, value), torch.full((rows,), position, device=DEVICE)),
        "scale": 0.35,
    }
    return {name: x for name, x in everything.items() if name not in absent}


def errors(made, dtype, **options):
    """Relative error of outputs, memory and every gradient against float64 on the same rounded operands."""
    rounded = cast(made, dtype)
    for name in ("log_decay", "source"):  # gates are float32 whatever the model's dtype
        if name in made:
            rounded[name] = made[name].float()
    if "initial" in made:
        rounded["initial"] = MixState(made["initial"].memory.float(), made["initial"].position)
    found = with_gradients(rounded, backend="triton", **options)
    truth = with_gradients(cast(rounded, torch.float64), backend="chunked", **options)
    assert found.keys() == truth.keys()
    return {name: ((found[name].double() - x).norm() / x.norm().clamp_min(1e-30)).item() for name, x in truth.items()}


def check(made, dtype, **options):
    for name, error in errors(made, dtype, **options).items():
        assert error < BUDGET[dtype], (name, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("time", [1, 63, 64, 65, 150])
def test_outputs_states_and_gradients(time, dtype):
    check(case(2, time), dtype, norm_epsilon=1e-5)


@pytest.mark.parametrize("absent", [OPTIONS, ("query_bias",), ("key_bias", "source"), ("frequencies", "skip")])
def test_options_may_be_absent(absent):
    check(case(1, 70, absent=absent), torch.float32)


@pytest.mark.parametrize("state, value", [(64, 32), (128, 64), (32, 128)])
def test_sizes(state, value):
    check(case(1, 66, heads=3, state=state, value=value), torch.float32, norm_epsilon=1e-5)


def test_queries_and_keys_per_head():
    check(case(1, 70, shared=False, absent=("query_bias", "key_bias")), torch.float32)


@pytest.mark.parametrize("programs", [2, 100])
def test_segments_change_nothing(monkeypatch, programs):
    """Two programs walk whole rows; a hundred cut them and carry memories between the pieces."""
    monkeypatch.setattr(kernels, "BLOCK_CHUNKS", 2)
    monkeypatch.setattr(kernels, "_programs", lambda device: programs)
    check(case(1, 500), torch.float32)


@pytest.mark.parametrize("bounds", [[0, 1, 64, 130, 300], [0, 299, 300]])
def test_packed_documents(monkeypatch, bounds):
    monkeypatch.setattr(kernels, "BLOCK_CHUNKS", 2)
    made = case(1, 300, rows=len(bounds) - 1)
    check(made, torch.float32, cu_seqlens=torch.tensor(bounds, device=DEVICE))


def test_a_document_is_bit_identical_whatever_its_neighbours(monkeypatch):
    made = cast(case(1, 200, rows=3), torch.float32)
    bounds = torch.tensor([0, 70, 140, 200], device=DEVICE)
    names = ("query", "key", "value", "log_decay")

    def mixed(fill):
        changed = {name: made[name].clone() for name in (*names, "source")}
        changed["value"][:, 140:] = fill
        rest = {name: x for name, x in (made | changed).items() if name not in names}
        return semiseparable_mix(*(changed[name] for name in names), **rest, cu_seqlens=bounds, backend="triton")[0]

    assert torch.equal(mixed(0.0)[:, :140], mixed(float("nan"))[:, :140])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [2.0, 10.0])
def test_strong_decay(decay, dtype):
    """A token's own share drops out of the decay's gradient, which is small against it."""
    found = errors(case(1, 130, decay=decay), dtype)
    assert found.pop("d log_decay") < max(BUDGET[dtype], 2e-5)
    assert max(found.values()) < max(BUDGET[dtype], 1e-5)


def test_a_decay_that_forgets_everything():
    made = case(1, 130, decay=1e4, absent=("initial",))
    rounded = {**cast(made, torch.float32), "log_decay": made["log_decay"].float()}
    found = with_gradients(rounded, backend="triton")
    assert all(x.isfinite().all() for x in found.values())
    assert found["d log_decay"].abs().max() < 1e-4 * found["d value"].abs().max()


@pytest.mark.parametrize("position", [2**24 + 1, 10**9 + 7])
def test_far_positions(position):
    check(case(1, 70, position=position), torch.float32)


def test_strided_views_are_read_in_place():
    made = cast(case(2, 70, heads=2, state=32, value=16), torch.float32)
    packed = torch.cat([made["value"].flatten(2), made["key"], made["query"]], -1)
    x, key, query = packed.split([32, 32, 32], -1)
    views = {**made, "value": x.unflatten(-1, (2, 16)), "key": key, "query": query}
    names = ("query", "key", "value", "log_decay")

    def mixed(operands):
        rest = {name: x for name, x in operands.items() if name not in names}
        return semiseparable_mix(*(operands[name] for name in names), **rest, backend="triton")

    for ours, theirs in zip(mixed(views), mixed(made), strict=True):
        for left, right in zip(ours, theirs, strict=True) if isinstance(ours, MixState) else [(ours, theirs)]:
            assert torch.equal(left, right)


def test_deterministic_gradients():
    made = cast(case(1, 130), torch.float32)
    atomic = with_gradients(made, backend="triton")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (with_gradients(made, backend="triton") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all((first[name] - x).norm() <= 3e-6 * x.norm() for name, x in atomic.items())


def test_sizes_without_tiles_are_refused_by_name_and_mixed_by_chunks_otherwise():
    made = cast(case(1, 20, state=48), torch.float32)
    names = ("query", "key", "value", "log_decay")
    rest = {name: x for name, x in made.items() if name not in names}
    with pytest.raises(BackendError, match="states of 32, 64 or 128"):
        semiseparable_mix(*(made[name] for name in names), **rest, backend="triton")
    assert semiseparable_mix(*(made[name] for name in names), **rest)[0].isfinite().all()


def test_registration():
    made = cast(case(1, 20), torch.float32)
    names = ("query", "key", "value", "log_decay", "source", "query_bias", "key_bias", "frequencies", "skip")
    tensors = [made[name].detach().requires_grad_(name != "frequencies") for name in names]
    state = made["initial"]
    arguments = (*tensors, state.memory.requires_grad_(), state.position, None, 0.35, 1e-5, False)
    torch.library.opcheck(
        kernels.semiseparable_triton_op,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_the_check_on_first_use_measures_and_refuses(monkeypatch):
    made = cast(case(1, 20), torch.float32)
    names = ("query", "key", "value", "log_decay", "source", "query_bias", "key_bias", "frequencies", "skip")
    operands = tuple(made[name].unsqueeze(2) if name in ("query", "key") else made[name] for name in names)
    figures = kernels._errors(operands, 0.35, 1e-5)
    assert set(figures) == {"y", "memory", "initial", *names} - {"frequencies"}
    assert all(error < 3e-6 for error, _ in figures.values())
    monkeypatch.setitem(kernels._BOUNDS, torch.float32, 1e-12)
    with pytest.raises(BackendError, match="disagrees with its reference"):
        kernels.verify_once("test of the check", 0, lambda: kernels._errors(operands, 0.35, 1e-5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state, value", [(64, 32), (128, 64), (128, 128)])
def test_long_rows(state, value, dtype):
    """`benchmarks/mixer_speed.py` checks every size before it times anything."""
    check(case(2, 4096, heads=4, state=state, value=value), dtype, norm_epsilon=1e-5)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """Offsets pass 2^31 in values and outputs; the last tokens must equal a run of their own."""
    heads, value, time = 32, 64, 2**20 + 2**12
    torch.manual_seed(0)
    query, key = (torch.randn(1, time, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(1, time, heads, value, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    log_decay = torch.full((1, time, heads), -0.05, device="cuda")
    with torch.no_grad():
        y, state = semiseparable_mix(query, key, x, log_decay, backend="triton")
        # What lies 2,048 tokens back has decayed by e^-102.
        tail = slice(time - 4096, None)
        end, after = semiseparable_mix(query[:, tail], key[:, tail], x[:, tail], log_decay[:, tail], backend="triton")
    assert (y[:, -2048:] - end[:, -2048:]).float().norm() < 1e-2 * end[:, -2048:].float().norm()
    assert (state.memory - after.memory).norm() < 1e-4 * after.memory.norm()


@pytest.mark.gpu
def test_a_million_tokens_streamed_equal_one_run():
    heads, time = 4, 2**20
    torch.manual_seed(0)
    query, key = (torch.randn(1, time, 64, device="cuda") for _ in range(2))
    x = torch.randn(1, time, heads, 32, device="cuda")
    log_decay = -0.01 * torch.rand(1, time, heads, device="cuda")
    options = {"frequencies": rotary_frequencies(64, 1e4, device="cuda"), "backend": "triton", "scale": 0.125}
    with torch.no_grad():
        whole, end = semiseparable_mix(query, key, x, log_decay, **options)
        state, parts = None, []
        for cut in range(0, time, 99_991):
            now = slice(cut, cut + 99_991)
            y, state = semiseparable_mix(
                query[:, now], key[:, now], x[:, now], log_decay[:, now], initial=state, **options
            )
            parts.append(y)
    streamed = torch.cat(parts, 1)
    assert (whole - streamed).norm() < 3e-6 * whole.norm()
    assert (end.memory - state.memory).norm() < 3e-6 * end.memory.norm()
    assert torch.equal(end.position, state.position)


@pytest.mark.gpu
def test_compiles_as_one_graph():
    made = cast(case(1, 200, state=64, value=32), torch.float32)
    names = ("query", "key", "value", "log_decay")
    rest = {name: x for name, x in made.items() if name not in (*names, "initial")}

    def mixed(*operands):
        return semiseparable_mix(*operands, **rest, backend="triton")[0].square().sum()

    leaves = [made[name].clone().requires_grad_() for name in names]
    expected = torch.autograd.grad(mixed(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(mixed, fullgraph=True)(*leaves), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
