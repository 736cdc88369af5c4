"""The gated norm against plain PyTorch, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from resnet_bk.errors import ShapeError
from resnet_bk.ops.gated_norm import chunked, gated_norm


def _inputs(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(s, generator=generator, dtype=dtype) for s in (shape, (*shape[:-2], shape[-2] * shape[-1]))]
    return [x.requires_grad_() for x in (*draw, torch.rand(shape[-2] * shape[-1], generator=generator, dtype=dtype))]


@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 20])
@pytest.mark.parametrize(
    ("dtype", "budget"),
    # Worst relative difference seen: 4e-16, 3e-7, 4e-3 (one bfloat16 rounding).
    [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)],
)
def test_equals_the_reference(monkeypatch, block_bytes, dtype, budget):
    monkeypatch.setitem(chunked._BLOCK_BYTES, "cpu", block_bytes)
    results = []
    for backend in ("reference", "chunked"):
        inputs = _inputs((2, 5, 3, 4), dtype)
        out = gated_norm(*inputs, epsilon=1e-3, backend=backend)
        assert out.dtype == dtype
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        results.append((out, *torch.autograd.grad((out.double() * weights).sum(), inputs)))
    for reference, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=budget * reference.abs().max().item())


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *x: gated_norm(*x), _inputs((3, 2, 4), torch.float64))


def test_operator_registration():
    y, gate, weight = _inputs((6, 2, 4), torch.float32)
    torch.library.opcheck(chunked.gated_norm_op, (y, gate, weight, 1e-5))


def test_zero_rows_stay_finite():
    y, gate, weight = _inputs((4, 2, 4), torch.float32)
    y = torch.zeros_like(y).requires_grad_()
    out = gated_norm(y, gate, weight)
    out.sum().backward()
    assert out.abs().max() == 0
    assert torch.isfinite(y.grad).all()


def test_wrong_shapes_are_named():
    y, gate, weight = _inputs((4, 2, 4), torch.float32)
    with pytest.raises(ShapeError, match=r"gate \[\*batch, heads \* channels\]"):
        gated_norm(y, gate[:, :-1], weight)
