"""The mixer's core in one operator against its parts, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from resnet_bk.layers.mixer import Mixer
from resnet_bk.layers.mixer_state import MixerState
from resnet_bk.models.config import ModelConfig
from resnet_bk.ops.gated_norm import gated_norm
from resnet_bk.ops.mixer_core import mixer_core, mixer_core_op
from resnet_bk.ops.resolvent import GreenState
from resnet_bk.ops.semiseparable import MixState

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(source="gated", seed=0, **changes):
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=8, d_model=32, num_layers=1, head_dim=16, state_size=32, source=source, **changes)
    mixer = Mixer(config).to(DEVICE)
    with torch.no_grad():
        for parameter in (mixer.query_bias, mixer.key_bias, mixer.skip, mixer.norm_weight, mixer.potential_scale):
            parameter.add_(0.3 * torch.randn_like(parameter))
        if mixer.key_shift is not None:
            mixer.key_shift.add_(0.3 * torch.randn_like(mixer.key_shift))
    return mixer


def fused(mixer, projection, state, cu_seqlens):
    out, mix, green, key = mixer_core(
        projection,
        mixer.step_parameters,
        None if state is None else state.mix,
        None if state is None else state.green,
        previous=None if state is None else state.key,
        cu_seqlens=cu_seqlens,
        source=mixer.config.source,
        absorption_floor=mixer.config.absorption_floor,
        rotary_base=mixer.config.rotary_base,
        rotary_fraction=mixer.config.rotary_fraction,
        epsilon=mixer.config.norm_epsilon,
    )
    return out, mix, green, key


def apart(mixer, projection, state, cu_seqlens):
    """By the reference's operators, one after the other."""
    gate, *operands = projection.split(mixer.sizes, dim=-1)
    y, _, after = mixer.mix(*operands, state=state, cu_seqlens=cu_seqlens)
    return gated_norm(y, gate, mixer.norm_weight, epsilon=mixer.config.norm_epsilon), after.mix, after.green, after.key


def gradients(run, mixer, projection, state, cu_seqlens):
    """Outputs and all gradients by name, under a fixed random functional."""
    generator = torch.Generator().manual_seed(1)
    leaves = {"projection": projection.detach().clone().requires_grad_()}
    if state is not None:
        leaves |= {"memory": state.mix.memory.detach().clone().requires_grad_()}
        leaves |= {"real": state.green.real.detach().clone().requires_grad_()}
        leaves |= {"imag": state.green.imag.detach().clone().requires_grad_()}
        mix = MixState(leaves["memory"], state.mix.position)
        if state.key is not None:
            leaves |= {"key": state.key.detach().clone().requires_grad_()}
        state = MixerState(mix, GreenState(leaves["real"], leaves["imag"]), key=leaves.get("key"))
    out, mix, green, key = run(mixer, leaves["projection"], state, cu_seqlens)
    outputs = {"out": out, "after": mix.memory, "m": torch.stack(green)} | ({} if key is None else {"last key": key})
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(DEVICE)).sum()
        for x in outputs.values()
    )
    leaves |= {name: p for name, p in mixer.named_parameters() if name not in ("in_proj.weight", "out_proj.weight")}
    found = torch.autograd.grad(loss, list(leaves.values()))
    return outputs | {f"d {name}": grad for name, grad in zip(leaves, found, strict=True)}, mix.position


@pytest.mark.parametrize(
    "source, bounds, given, changes",
    [
        ("gated", None, False, {"key_shift": False}),
        ("gated", [0, 1, 66, 90], True, {"key_shift": False}),
        ("free", None, True, {"key_shift": False, "rotary_fraction": 1.0}),
        ("unit", [0, 1, 66, 90], False, {"key_shift": False}),
        ("gated", None, False, {}),
        ("gated", None, True, {"rotary_fraction": 1.0}),
        ("free", [0, 1, 66, 90], True, {}),
        ("unit", [0, 1, 66, 90], False, {}),
    ],
)
def test_equals_the_operators_apart(source, bounds, given, changes):
    mixer = build(source, **changes)
    batch, time = (2, 90) if bounds is None else (1, 90)
    rows = batch if bounds is None else len(bounds) - 1
    config, generator = mixer.config, torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    projection = draw(batch, time, sum(mixer.sizes)).to(DEVICE)
    memory = draw(rows, config.num_heads, config.state_size, config.head_dim).to(DEVICE)
    green = GreenState(draw(rows, config.num_heads).to(DEVICE), 0.1 + draw(rows, config.num_heads).abs().to(DEVICE))
    key = draw(rows, config.state_size).to(DEVICE) if config.key_shift else None
    state = MixerState(MixState(memory, torch.arange(rows, device=DEVICE) * 1000), green, key=key) if given else None
    packed = None if bounds is None else torch.tensor(bounds, device=DEVICE)
    truth, position = gradients(apart, mixer.double(), projection, state, packed)
    narrow = None
    if given:
        narrow = (MixState(memory.float(), state.mix.position), GreenState(*(part.float() for part in green)))
        narrow = MixerState(*narrow, key=None if key is None else key.float())
    found, counted = gradients(fused, mixer.float(), projection.float(), narrow, packed)
    assert torch.equal(position, counted)
    for name, expected in truth.items():
        error = (found[name].double() - expected).norm() / expected.norm()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("shift", [False, True])
def test_splits_continue(shift):
    mixer = build(key_shift=shift)
    projection = torch.randn(1, 100, sum(mixer.sizes), device=DEVICE)
    with torch.no_grad():
        whole, mix, green, _ = fused(mixer, projection, None, None)
        state, parts = None, []
        for begin, end in pairwise((0, 1, 64, 71, 100)):
            out, *after, key = fused(mixer, projection[:, begin:end], state, None)
            state = MixerState(*after, key=key)
            parts.append(out)
    assert (torch.cat(parts, 1) - whole).norm() < 1e-5 * whole.norm()
    assert (state.mix.memory - mix.memory).norm() < 1e-5 * mix.memory.norm()
    assert (torch.stack(state.green) - torch.stack(green)).norm() < 1e-5 * torch.stack(green).norm()


@pytest.mark.parametrize("shift", [False, True])
def test_registration(shift):
    mixer = build(key_shift=shift)
    projection = torch.randn(1, 20, sum(mixer.sizes), device=DEVICE, requires_grad=True)
    frequencies = torch.ones(mixer.config.state_size // 2, dtype=torch.float64, device=DEVICE)
    arguments = (projection, *mixer.step_parameters, frequencies, *[None] * 7, 1e-3, "gated", 1e-5, True)
    torch.library.opcheck(mixer_core_op, arguments, test_utils=("test_schema", "test_autograd_registration"))
    torch.library.opcheck(mixer_core_op, (*arguments[:-1], False), test_utils=("test_faketensor",))


@pytest.mark.gpu
def test_the_layer_takes_it_and_compiles():
    mixer = build()
    u = torch.randn(2, 200, 32, device="cuda", requires_grad=True)
    weight = torch.randn(2, 200, 32, device="cuda")
    names, leaves = zip(*mixer.named_parameters(), strict=True)
    expected = torch.autograd.grad((mixer(u)[0] * weight).sum(), (u, *leaves))
    compiled = torch.compile(lambda x: mixer(x)[0], fullgraph=True)
    found = torch.autograd.grad((compiled(u) * weight).sum(), (u, *leaves))
    for name, ours, theirs in zip(("u", *names), found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name
    with torch.autocast("cuda", torch.bfloat16):
        half = mixer(u)[0]
    full = mixer(u)[0]
    assert (half.float() - full).norm() < 3e-2 * full.norm()
