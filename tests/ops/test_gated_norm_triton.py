"""The gated norm's kernels against the float64 reference: natively on a GPU, in Triton's interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch

from resnet_bk.errors import BackendError
from resnet_bk.ops import dispatch
from resnet_bk.ops.gated_norm import gated_norm

pytest.importorskip("triton", reason="the package triton is not installed")

from resnet_bk.ops.gated_norm import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter gets bfloat16 products wrong.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def _inputs(rows, heads, channels, dtype, *, device=DEVICE, extra=8):
    """y, gate as a slice of a wider projection, weight and a cotangent."""
    generator = torch.Generator().manual_seed(rows)
    inner = heads * channels
    y, projection, weight, grad = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((rows, heads, channels), (rows, inner + extra), (inner,), (rows, inner))
    )
    return y.requires_grad_(), projection.requires_grad_(), weight.requires_grad_(), grad


def _run(inputs, backend, dtype=None):
    """Output and gradients of y, gate and weight."""
    y, projection, weight, grad = (x.detach().to(dtype or x.dtype) for x in inputs)
    leaves = [y.requires_grad_(), projection.requires_grad_(), weight.requires_grad_()]
    out = gated_norm(y, projection[..., : weight.numel()], weight, epsilon=1e-3, backend=backend)
    return out, *torch.autograd.grad(out, leaves, grad)


def _error(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "channels"),
    [(1, 1, 64), (67, 3, 16), (65, 5, 32), (33, 2, 64), (40, 3, 128), (35, 3, 48), (7, 2, 6), (300, 1, 64)],
)
def test_errs_no_more_than_plain_pytorch(rows, heads, channels, dtype):
    inputs = _inputs(rows, heads, channels, dtype)
    truth = _run(inputs, "reference", torch.float64)
    plain = _run(inputs, "reference")
    for ours, theirs, exact in zip(_run(inputs, "triton"), plain, truth, strict=True):
        assert ours.dtype == dtype
        # The floor is a rounding or two of float32.
        assert _error(ours, exact) <= 2 * _error(theirs, exact) + 2e-7


def test_batches_that_do_not_lie_evenly_and_apart_heads():
    y, projection, weight, grad = _inputs(12, 3, 16, torch.float32)
    shaped = (y.view(3, 4, 3, 16)[:, :3], projection.view(3, 4, -1)[:, :3], weight, grad.view(3, 4, -1)[:, :3])
    turned = y.detach().transpose(1, 2).contiguous().transpose(1, 2), projection, weight, grad
    for inputs in (shaped, turned):
        for ours, exact in zip(_run(inputs, "triton"), _run(inputs, "reference"), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_gate_is_read_in_place():
    projection = torch.randn(6, 40, device=DEVICE)
    y, gate = torch.randn(6, 2, 16, device=DEVICE), projection[:, :32]
    assert all(
        one.data_ptr() == two.data_ptr() for one, two in zip(kernels._dense_heads(y, gate), (y, gate), strict=True)
    )


def test_parameters_may_be_wider_than_activations():
    y, projection, weight, grad = _inputs(20, 2, 32, torch.float16)
    inputs = (y, projection, weight.detach().float(), grad)
    results = _run(inputs, "triton")
    assert [x.dtype for x in results] == [torch.float16, torch.float16, torch.float16, torch.float32]
    for ours, exact in zip(results, _run(inputs, "reference", torch.float64), strict=True):
        assert _error(ours, exact) < 1e-3


def test_repeats_bit_by_bit():
    inputs = _inputs(300, 3, 32, torch.float32)
    for one, two in zip(_run(inputs, "triton"), _run(inputs, "triton"), strict=True):
        assert torch.equal(one, two)


def test_zero_rows_stay_finite_and_no_rows_are_no_rows():
    y, projection, weight, grad = _inputs(4, 2, 16, torch.float32)
    out, *gradients = _run((torch.zeros_like(y), projection, weight, grad), "triton")
    assert out.abs().max() == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    out, *gradients = _run((y[:0], projection[:0], weight, grad[:0]), "triton")
    assert out.shape == (0, 32)
    assert gradients[2].abs().max() == 0


def test_operator_registration():
    y, projection, weight, _ = _inputs(6, 2, 16, torch.float32)
    torch.library.opcheck(kernels.gated_norm_triton, (y, projection[:, :32], weight, 1e-5))


def test_a_wrong_kernel_is_refused(monkeypatch):
    right = kernels.backward

    def wrong(*arguments):
        d_y, d_gate, d_weight = right(*arguments)
        return d_y, 1.1 * d_gate, d_weight

    monkeypatch.setattr(dispatch, "_verified", set())
    monkeypatch.setattr(kernels, "backward", wrong)
    y, projection, weight, _ = _inputs(6, 2, 16, torch.float32)
    with pytest.raises(BackendError, match=r"gated_norm disagrees .* d_gate 1\.00e-01 \(bound 1e-05\)"):
        gated_norm(y, projection[:, :32], weight, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [32, 64, 128])
def test_large_gradients_on_the_gpu(dtype, channels):
    inputs = _inputs(20_011, 8, channels, dtype)
    truth, plain = _run(inputs, "reference", torch.float64), _run(inputs, "reference")
    for ours, theirs, exact in zip(_run(inputs, "auto"), plain, truth, strict=True):
        assert _error(ours, exact) <= 2 * _error(theirs, exact) + 2e-7


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    rows, heads, channels = 2**20 + 3, 32, 64
    tail = 1000
    inputs = _inputs(tail, heads, channels, torch.bfloat16, extra=0)
    y, gate, weight, grad = (x.detach() for x in inputs)
    whole = [torch.empty(rows, *x.shape[1:], dtype=x.dtype, device="cuda").normal_() for x in (y, gate)]
    whole[0][-tail:], whole[1][-tail:] = y, gate
    cotangent = torch.zeros_like(whole[1])
    cotangent[-tail:] = grad
    ours = [gated_norm(*whole, weight, epsilon=1e-3)]
    ours += kernels.gated_norm_triton_backward(cotangent, *whole, weight, 1e-3)
    for one, two in zip(ours, _run(inputs, "reference", torch.float64), strict=True):
        assert _error(one[-tail:] if len(one) == rows else one, two) < 1e-2
