"""The short convolution's kernels against plain PyTorch in float64: natively on a GPU, in the interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch

from resnet_bk.errors import BackendError
from resnet_bk.ops import dispatch
from resnet_bk.ops.short_convolution import short_convolution

pytest.importorskip("triton", reason="the package triton is not installed")

from resnet_bk.ops.short_convolution import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter gets bfloat16 products wrong.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def _inputs(batch, time, channels, width, dtype):
    """Tokens as a slice of a wider projection, taps, bias, history and a cotangent."""
    generator = torch.Generator().manual_seed(time)
    shapes = (batch, time, channels + 8), (channels, width), (channels,), (batch, width - 1, channels)
    *inputs, grad = (
        torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in (*shapes, (batch, time, channels))
    )
    return inputs, grad


def _run(inputs, grad, backend, dtype=None):
    """Output and all gradients."""
    x, taps, bias, history = (part.detach().to(dtype or part.dtype).requires_grad_() for part in inputs)
    y, _ = short_convolution(x[..., 8:], taps, bias, history=history, backend=backend)
    return y, *torch.autograd.grad(y, (x, taps, bias, history), grad.to(y.dtype))


def _error(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "time", "channels", "width"),
    [(1, 1, 16, 4), (2, 2, 5, 4), (2, 31, 64, 4), (1, 32, 65, 4), (3, 33, 7, 2), (2, 70, 130, 4), (1, 29, 3, 3)],
)
def test_errs_no_more_than_plain_pytorch(batch, time, channels, width, dtype):
    inputs, grad = _inputs(batch, time, channels, width, dtype)
    truth = _run(inputs, grad, "reference", torch.float64)
    plain = _run(inputs, grad, "reference")
    for ours, theirs, exact in zip(_run(inputs, grad, "triton"), plain, truth, strict=True):
        assert ours.dtype == dtype
        # The floor is a rounding or two of float32.
        assert _error(ours, exact) <= 2 * _error(theirs, exact) + 2e-7


def test_packed_documents_are_the_same():
    (x, taps, bias, _), _ = _inputs(1, 40, 24, 4, torch.float32)
    bounds = torch.tensor([0, 1, 9, 40], device=DEVICE)
    for one, two in zip(
        *(short_convolution(x[..., 8:], taps, bias, cu_seqlens=bounds, backend=name) for name in ("triton", "chunked")),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_parameters_may_be_wider_than_activations():
    (x, taps, bias, history), grad = _inputs(2, 20, 12, 4, torch.float16)
    results = _run((x, taps.float(), bias.float(), history), grad, "triton")
    assert [part.dtype for part in results] == [torch.float16, torch.float16, *[torch.float32] * 2, torch.float16]


def test_the_past_is_bit_identical_whatever_the_future():
    (x, taps, bias, _), _ = _inputs(1, 70, 8, 4, torch.float32)
    before, _ = short_convolution(x[..., 8:], taps, bias, backend="triton")
    for place in (1, 32, 69):
        changed = x.clone()
        changed[:, place:] += 1e3
        after, _ = short_convolution(changed[..., 8:], taps, bias, backend="triton")
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])


def test_a_wrong_kernel_is_refused_on_first_use(monkeypatch):
    (x, taps, bias, _), _ = _inputs(1, 20, 8, 4, torch.float32)
    monkeypatch.setattr(dispatch, "_verified", set())
    right = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *operands: 1.001 * right(*operands))
    with pytest.raises(BackendError, match=r"short_convolution disagrees .* out 1.00e-03"):
        short_convolution(x[..., 8:], taps, bias, backend="triton")


def test_operators_are_registered_whole():
    (x, taps, bias, _), _ = _inputs(1, 9, 8, 2, torch.float32)
    operands = [part.requires_grad_() for part in (x[..., 8:].contiguous(), taps, bias)]
    torch.library.opcheck(kernels.short_convolution_triton, operands)
