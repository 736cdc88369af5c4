"""The Mamba layers against their authors' package: scans and whole blocks, outputs and all gradients, on a GPU.

Truth is this library's form in float64. An equation that differs would be wrong by a tenth or more; the kernels round
their matrix products to bfloat16 or TF32.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util

import pytest
import torch

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk.layers.mamba2 import Mamba2
from resnet_bk.layers.mamba3 import Mamba3
from resnet_bk.ops.state_space import choose_scan_backend

MISSING = [name for name in ("mamba_ssm", "einops", "huggingface_hub") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(MISSING), reason=f"not importable: {', '.join(MISSING)}"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIME, CUT = 300, 130
SIZES = dict(vocab_size=64, d_model=128, num_layers=2, feed_forward_dim=64, head_dim=64, state_size=64)
LAYERS = {"mamba2": Mamba2, "mamba3": Mamba3}
# Names in the authors' block of what this library's layer calls otherwise.
NAMES = {
    "mamba2": {
        "step_bias": "dt_bias", "log_rate": "A_log", "skip": "D", "taps": "conv1d.weight", "taps_bias": "conv1d.bias",
        "norm_weight": "norm.weight",
    },
    "mamba3": {
        "step_bias": "dt_bias", "skip": "D", "write_norm": "B_norm.weight", "read_norm": "C_norm.weight",
        "write_bias": "B_bias", "read_bias": "C_bias",
    },
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", LAYERS)


def build(kind):
    """A layer in float32 whose parameters have left their start, and its twin in float64."""
    torch.manual_seed(0)
    layer = LAYERS[kind](ModelConfig(**SIZES))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    twin = LAYERS[kind](ModelConfig(**SIZES)).double()
    twin.load_state_dict(layer.state_dict())
    return layer.to(DEVICE), twin.to(DEVICE)


def theirs(kind, layer):
    """The authors' block with the parameters of `layer`, and its parameters under this library's names."""
    from mamba_ssm.modules import mamba2, mamba3

    block_class = {"mamba2": mamba2.Mamba2, "mamba3": mamba3.Mamba3}[kind]
    options = {"use_mem_eff_path": False} if kind == "mamba2" else {}
    block = block_class(SIZES["d_model"], d_state=64, expand=2, headdim=64, **options).to(DEVICE)
    there = dict(block.named_parameters())
    parameters = {name: there.pop(NAMES[kind].get(name, name)) for name, _ in layer.named_parameters()}
    assert not there, "a parameter of the published block has no counterpart"
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameters[name].copy_(parameter.view_as(parameters[name]))
    return block, parameters


def tokens():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, TIME, SIZES["d_model"], generator=generator).to(DEVICE)


def relative(found, exact):
    return ((found.double().view_as(exact) - exact).norm() / exact.norm()).item()


def compare(found, exact, parameters, exact_parameters, u, exact_u):
    """Outputs and the gradients of tokens and parameters, given both outputs."""
    weight = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    (found * weight).sum().backward()
    (exact * weight.double()).sum().backward()
    assert relative(found, exact) < 2e-2
    assert relative(u.grad, exact_u.grad) < 3e-2
    for name, parameter in parameters.items():
        assert relative(parameter.grad, exact_parameters[name].grad) < 5e-2, name


@every_kind
def test_the_block_is_the_published_one(kind):
    layer, twin = build(kind)
    block, parameters = theirs(kind, layer)
    u, exact_u = tokens().requires_grad_(), tokens().double().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=DEVICE == "cuda"):
        found = block(u)
    compare(found.float(), twin(exact_u)[0], parameters, dict(twin.named_parameters()), u, exact_u)


@every_kind
def test_the_layer_by_the_published_kernels_is_its_float64_form_cut_in_time(kind):
    layer, twin = build(kind)
    layer.backend = "published"
    u, exact_u = tokens().requires_grad_(), tokens().double().requires_grad_()
    # In float32: rounded projections to bfloat16 would add up in the angles, to 7 % of Mamba-3's memory.
    first, state = layer(u[:, :CUT])
    second, after = layer(u[:, CUT:], state)
    exact, exact_after = twin(exact_u)
    for place, (part, exact_part) in enumerate(zip(after, exact_after, strict=True)):
        if kind == "mamba3" and place == 1:  # angles are known up to full turns
            part, exact_part = part.cos(), exact_part.cos()
        assert relative(part, exact_part) < 3e-2, place
    found = torch.cat((first, second), 1).float()
    compare(found, exact, dict(layer.named_parameters()), dict(twin.named_parameters()), u, exact_u)


def test_mamba3_packs_documents_by_the_published_kernels():
    layer, twin = build("mamba3")
    layer.backend = "published"
    bounds = torch.tensor([0, 1, 65, 130, TIME], device=DEVICE)
    u, exact_u = tokens()[:1].requires_grad_(), tokens()[:1].double().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=DEVICE == "cuda"):
        found, after = layer(u, None, bounds)
    exact, exact_after = twin(exact_u, None, bounds)
    assert relative(after.memory, exact_after.memory) < 3e-2
    compare(found.float(), exact, dict(layer.named_parameters()), dict(twin.named_parameters()), u, exact_u)


@every_kind
@pytest.mark.skipif(DEVICE == "cpu", reason="torch.cuda.is_available() is False")
def test_a_model_in_bfloat16_runs_by_them_unless_told_otherwise(kind):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**SIZES | dict(mixer=kind))).to(DEVICE)
    assert choose_scan_backend("auto", torch.zeros(1, device=DEVICE, dtype=torch.bfloat16)) == "published"
    assert choose_scan_backend("auto", torch.zeros(1, device=DEVICE)) == "triton"
    ids = torch.randint(64, (2, TIME), device=DEVICE)
    losses = []
    for backend in ("auto", "triton"):
        for block in model.blocks:
            block.mixer.backend = backend
        model.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
            whole = model(ids).logits
            out = model(ids[:, :CUT])
            for place in range(CUT, CUT + 5):
                out = model(ids[:, place : place + 1], state=out.state)
                assert relative(out.logits[:, 0], whole[:, place].double()) < 3e-2
    assert abs(losses[0] - losses[1]) < 0.01
