"""Packed matrices round as promised; adapters have the gradients of the dense formula; memory is that of the codes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.layers.lora import AdaptedLinear, adapt, pack_int4, unpack_int4


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_no_number_moves_by_more_than_half_a_step(size):
    weight = size * torch.randn(24, 128)
    weight[0, :32] = 0
    codes, scales = pack_int4(weight, 32)
    assert (codes.shape, codes.dtype, scales.shape) == ((24, 64), torch.uint8, (24, 4))
    moved = (unpack_int4(codes, scales, torch.float64) - weight).abs().unflatten(1, (4, 32))
    # A float16 scale is off by 2^-11 of itself at most (2^-25 below the normal ones), times the largest code.
    slack = 7 * (scales.double() * 2**-11 + 2**-25)
    assert bool((moved <= (scales.double() / 2 + slack)[..., None]).all())
    assert torch.equal(unpack_int4(codes, scales, torch.float32)[0, :32], torch.zeros(32))


def test_packing_what_was_unpacked_changes_nothing():
    codes, scales = pack_int4(torch.randn(8, 64), 16)
    again = pack_int4(unpack_int4(codes, scales, torch.float32), 16)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)


@pytest.mark.parametrize(
    ("weight", "group", "error"),
    [
        (torch.zeros(4, 10), 4, ShapeError),
        (torch.zeros(4), 2, ShapeError),
        (torch.zeros(4, 9), 3, DomainError),
        (torch.full((4, 8), torch.inf), 8, DomainError),
        (torch.full((4, 8), 1e9), 8, DomainError),
    ],
)
def test_what_cannot_be_packed_is_refused(weight, group, error):
    with pytest.raises(error):
        pack_int4(weight, group)


def test_outputs_and_gradients_are_those_of_the_dense_formula():
    torch.manual_seed(0)
    layer = AdaptedLinear(32, 12, rank=3, alpha=6.0, group=16)
    layer.pack(torch.randn(12, 32))
    layer.double()
    with torch.no_grad():
        layer.adapter_out.normal_()
    # double() widened the scales too; the matrix they stand for is the same.
    weight = unpack_int4(layer.codes, layer.scales, torch.float64)
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 5, 12, dtype=torch.float64)
    leaves = [x, layer.adapter_in, layer.adapter_out]
    found = torch.autograd.grad(layer(x), leaves, cotangent)
    dense = F.linear(x, weight + 2.0 * layer.adapter_out @ layer.adapter_in)
    torch.testing.assert_close(layer(x), dense, rtol=1e-12, atol=1e-12)
    for value, expected in zip(found, torch.autograd.grad(dense, leaves, cotangent), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)


def test_autocast_decides_the_dtype():
    layer = AdaptedLinear(32, 8, rank=2, group=16)
    layer.pack(torch.randn(8, 32))
    x = torch.randn(3, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_an_adapted_model_learns_with_its_matrices_untouched():
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=17, d_model=32, num_layers=2, feed_forward_dim=64, head_dim=8, state_size=16)
    model = LanguageModel(config)
    ids = torch.randint(17, (2, 48))
    dense = model(ids, labels=ids).loss.item()
    matrices = [m.weight.numel() for b in model.blocks for m in b.modules() if isinstance(m, torch.nn.Linear)]
    trainable = adapt(model, rank=4, group=16)
    adapted = [m for m in model.modules() if isinstance(m, AdaptedLinear)]
    assert len(adapted) == len(matrices) == 8
    assert trainable == sum(4 * (m.in_features + m.out_features) for m in adapted)
    packed = sum(m.codes.nbytes + m.scales.nbytes for m in adapted)
    assert packed == sum(count // 2 + count // 16 * 2 for count in matrices)

    start = model(ids, labels=ids).loss.item()
    assert abs(start - dense) < 0.05, "four bits hardly change an untrained model"
    codes = [m.codes.clone() for m in adapted]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < start - 0.1
    assert all(torch.equal(m.codes, before) for m, before in zip(adapted, codes, strict=True))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
def test_a_gpu_packs_and_multiplies_as_a_cpu_does():
    torch.manual_seed(0)
    layers = [AdaptedLinear(256, 128, rank=4, device=device) for device in ("cpu", "cuda")]
    weight, x = torch.randn(128, 256), torch.randn(3, 256)
    layers[1].load_state_dict(layers[0].state_dict())
    found = []
    for layer in layers:
        device = layer.codes.device
        layer.pack(weight.to(device))
        leaf = x.to(device, copy=True).requires_grad_()
        layer(leaf).square().sum().backward()
        found.append([layer.codes, layer.scales, leaf.grad, layer.adapter_out.grad])
    for on_cpu, on_gpu in zip(*found, strict=True):
        # Float32 sums of 256 products in another order.
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-3)
