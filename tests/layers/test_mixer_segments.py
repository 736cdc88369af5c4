"""The mixer on segments of a sequence that ranks share equals the mixer on the whole, gradients and states included."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from rank_threads import on_threads
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_bk import ops
from resnet_bk.errors import ShapeError
from resnet_bk.layers.mixer import Mixer
from resnet_bk.layers.mixer_state import MixerState
from resnet_bk.models.config import ModelConfig
from resnet_bk.ops.context import Segment
from resnet_bk.ops.dispatch import PlannedGPU, planning_for
from resnet_bk.ops.resolvent import GreenState
from resnet_bk.ops.semiseparable import MixState
from resnet_bk.training.allocation import without_memory

OPTIONS = [
    {},
    dict(boundary="wall"),
    dict(dynamics="decay_only"),
    dict(dynamics="semiclassical", phase_coupling=True),
    dict(phase_coupling=True, source="free"),
    dict(sites_per_token=3, green_readout=True),
    dict(peierls_pairs=3, source="free"),
    dict(peierls_pairs=2, phase_coupling=True, kernel="transmission", source="free"),
    dict(kernel="green", source="free", boundary="wall"),
    dict(position_potential="prime_bump"),
    dict(key_shift=False, rotary_fraction=1.0),
    dict(position_potential="shuffled", sites_per_token=3),
]
SPLITS = [[41, 41, 41], [1, 70, 2, 50], [64, 59], [123]]
every_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())) or "default"
)


def build(options, dtype=torch.float64):
    torch.manual_seed(0)
    sizes = dict(vocab_size=11, d_model=12, num_layers=1, feed_forward_dim=8, head_dim=6, state_size=8)
    config = ModelConfig(**(sizes | options))
    mixer = Mixer(config).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return mixer


def floats(state):
    """The state's floating tensors in order."""
    flat = [state.mix.memory]
    for part in state[1:]:
        flat.extend([] if part is None else part if isinstance(part, tuple) else [part])
    return flat


def with_floats(state, tensors):
    """The state with its floating tensors replaced."""
    left = iter(tensors)
    mix = MixState(next(left), state.mix.position)
    parts = []
    for part in state[1:]:
        parts.append(
            None if part is None else GreenState(next(left), next(left)) if isinstance(part, tuple) else next(left)
        )
    return MixerState(mix, *parts)


def start_of(mixer, batch=2, tokens=5):
    """A state before the sequence, whose tensors need gradients."""
    with torch.no_grad():
        _, state = mixer(torch.randn(batch, tokens, 12, dtype=mixer.skip.dtype))
    return with_floats(state, [part.clone().requires_grad_() for part in floats(state)])


def run(mixer, u, state, weights, group=None, lengths=None):
    """Output, final state and all gradients of a weighted sum of both; of the last rank's final state only."""
    if group is None:
        out, after = mixer(u, state)
    else:
        end = list(accumulate(lengths))[group.rank]
        part = slice(end - lengths[group.rank], end)
        segment = Segment.of(group, u[:, part, 0])
        u = u[:, part].detach().requires_grad_()
        out, after = mixer(u, state, None, segment)
        weights = (weights[0][:, part], *weights[1:])
    loss = (out * weights[0]).sum()
    if group is None or group.rank == group.size - 1:
        loss = loss + sum((part * w).sum() for part, w in zip(floats(after), weights[1:], strict=True))
    wanted = [*mixer.parameters(), *([] if state is None else floats(state))]
    grads = torch.autograd.grad(loss, [u, *wanted], allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for x, g in zip([u, *wanted], grads, strict=True)]
    return out.detach(), after, zeros[0], zeros[1:]


def problem(mixer, started, batch=2, time=123):
    torch.manual_seed(1)
    dtype = mixer.skip.dtype
    u = torch.randn(batch, time, mixer.config.d_model, dtype=dtype).requires_grad_()
    state = start_of(mixer, batch) if started else None
    with torch.no_grad():
        out, after = mixer(u, state)
    return u, state, (torch.randn_like(out), *(torch.randn_like(part) for part in floats(after)))


@every_option
@pytest.mark.parametrize("started", [False, True], ids=["fresh", "continued"])
def test_segments_equal_the_whole(options, started):
    mixer = build(options)
    u, state, weights = problem(mixer, started)
    out, after, u_grad, grads = run(mixer, u, state, weights)
    for lengths in SPLITS:
        ranks = on_threads(len(lengths), lambda group, lengths=lengths: run(mixer, u, state, weights, group, lengths))
        close = dict(rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(torch.cat([rank[0] for rank in ranks], 1), out, **close)
        torch.testing.assert_close(torch.cat([rank[2] for rank in ranks], 1), u_grad, **close)
        for found, expected in zip(floats(ranks[-1][1]), floats(after), strict=True):
            torch.testing.assert_close(found, expected, **close)
        for expected, *found in zip(grads, *(rank[3] for rank in ranks), strict=True):
            torch.testing.assert_close(sum(found), expected, **close)
        before = 0 if state is None else state.mix.position
        for end, rank in zip(accumulate(lengths), ranks, strict=True):
            assert torch.equal(rank[1].mix.position, torch.tensor([end, end]) + before)


def test_float32_segments_are_as_exact_as_a_float32_whole():
    wide, narrow = build({}), build({}, torch.float32)
    narrow.load_state_dict(wide.state_dict())
    u, _, weights = problem(narrow, False, batch=1, time=1000)
    truth = run(wide, u.detach().double().requires_grad_(), None, [w.double() for w in weights])
    single = run(narrow, u, None, weights)
    lengths = [400, 30, 570]
    ranks = on_threads(3, lambda group: run(narrow, u, None, weights, group, lengths))
    for found, one, exact in zip(joined(ranks), joined([single]), joined([truth]), strict=True):
        scale = exact.abs().max()
        # Measured at most 1.6 times the error of the single run (1.6e-5).
        assert (found - exact).abs().max() <= 3 * (one - exact).abs().max() + 2e-6 * scale


def joined(ranks):
    """Output, gradient of the input and those of the parameters, of all ranks together."""
    gradients = [sum(found) for found in zip(*(rank[3] for rank in ranks), strict=True)]
    return [torch.cat([rank[0] for rank in ranks], 1), torch.cat([rank[2] for rank in ranks], 1), *gradients]


TILED = dict(d_model=32, head_dim=16, state_size=32)
"""Sizes that the kernels of the mixing know."""


def relative(found, exact):
    """Errors of tensors against exact ones, each relative to the exact one's norm."""
    pairs = zip(found, exact, strict=True)
    return [((x.double().cpu() - y.cpu()).norm() / y.norm().clamp_min(1e-30)).item() for x, y in pairs]


@pytest.mark.parametrize(
    "options", [{}, pytest.param(dict(source="free", boundary="wall"), marks=pytest.mark.slow)], ids=["default", "wall"]
)
def test_kernels_of_segments_equal_the_whole(options, monkeypatch):
    pytest.importorskip("triton", reason="the package triton is not installed")
    wide, narrow = build(TILED | options), build(TILED | options, torch.float32)
    narrow.load_state_dict(wide.state_dict())
    u, _, weights = problem(narrow, False, time=84)
    truth = run(wide, u.detach().double().requires_grad_(), None, [w.double() for w in weights])
    single = relative(joined([run(narrow, u, None, weights)]), joined([truth]))
    chosen = []

    def kernels(backend, operand, **_):
        chosen.append(operand.shape)
        return "triton" if backend == "auto" and operand.dtype == torch.float32 else backend

    # The interpreter is never chosen by itself.
    for module in (ops.resolvent, ops.semiseparable, ops.context.moebius):
        monkeypatch.setattr(module, "choose_backend", kernels)
    ranks = on_threads(3, lambda group: run(narrow, u, None, weights, group, [17, 1, 66]))
    assert len(chosen) >= 3 * 4  # gates, mixing, composition, its adjoint: on every rank
    for shared, alone in zip(relative(joined(ranks), joined([truth])), single, strict=True):
        # Measured at most 2.4 times, and 2e-5 for gradients that are small sums of large parts, as in the single run.
        assert shared <= 3 * alone + 2e-5
    assert max(relative(floats(ranks[-1][1]), floats(truth[1]))) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_on_a_gpu_are_as_exact_as_a_whole(dtype):
    sizes = dict(d_model=128, head_dim=64, state_size=128)
    wide, narrow = build(sizes), build(sizes, torch.float32).cuda()
    narrow.load_state_dict(wide.state_dict())
    u, _, weights = problem(wide, False, batch=2, time=3000)
    truth = run(wide, u, None, weights)
    u, *weights = (x.detach().float().cuda() for x in (u, *weights))

    def found(group=None, lengths=None):
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return run(narrow, u.requires_grad_(), None, weights, group, lengths)

    single = relative(joined([found()]), joined([truth]))
    for lengths in ([1600, 1400], [17, 2047, 936]):
        ranks = on_threads(len(lengths), lambda group, lengths=lengths: found(group, lengths))
        floor = 1e-4 if dtype == torch.float32 else 3e-2
        for shared, alone in zip(relative(joined(ranks), joined([truth])), single, strict=True):
            assert shared <= 2 * alone + floor


def test_without_gradients_one_token_a_rank():
    mixer = build(dict(peierls_pairs=2, source="free"))
    u, state, _ = problem(mixer, True, time=3)

    @torch.no_grad()
    def work(group):
        part = u[:, group.rank : group.rank + 1]
        return mixer(part, state, None, Segment.of(group, part[..., 0]))

    ranks = on_threads(3, work)
    out, after = mixer(u, state)
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks], 1), out, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(ranks[-1][1].mix.memory, after.mix.memory, rtol=1e-10, atol=1e-11)


def test_what_is_sent():
    """The volume that the documentation states, for the default mixer: bytes a sequence and head."""
    mixer = build({}, torch.float32)
    u, _, weights = problem(mixer, False)

    def work(group):
        run(mixer, u, None, weights, group, [61, 62])
        return group.gathered

    heads, state, value = 4, 8, 6
    for sent in on_threads(2, work):
        shape, *summaries = [part.nbytes for part in sent]
        assert shape == 16
        moebius, memory, key = 2 * heads * 72, 2 * heads * (state * value + 1) * 4, 2 * state * 8
        assert summaries == [moebius, key, memory, memory - 2 * heads * 4, key // 2, 2 * heads * 16]


def test_ranks_with_different_batches_are_named():
    def work(group):
        Segment.of(group, torch.zeros(2 + group.rank, 7))

    with pytest.raises(ShapeError, match=r"\[2, 3\] sequences"):
        on_threads(2, work)


class Alike:
    """Two ranks with equal parts, of which this is the second."""

    rank, size = 1, 2

    def gather(self, part):
        return torch.stack((part.detach(), part.detach()))


class Issued(TorchDispatchMode):
    """Counts what the host issues, without elements to work on."""

    def __init__(self):
        super().__init__()
        self.waits, self.operations = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        self.operations += func is not torch.ops.prim.device.default
        return func(*args, **(kwargs or {}))


def test_a_layer_on_gpus_never_waits_for_the_device_and_keeps_its_host_free():
    with planning_for(PlannedGPU(True)), without_memory(), Issued() as issued:
        mixer = Mixer(ModelConfig.preset("base"))
        u = torch.empty(1, 65536, 768, requires_grad=True)
        mixer(u, segment=Segment(Alike(), (65536, 65536)))[0].sum().backward()
    assert issued.waits == 0
    assert issued.operations < 900  # measured 793; 1,029 with maps composed pair by pair
