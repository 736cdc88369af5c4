"""Backends by name, kernels checked once, and document boundaries read once."""

from __future__ import annotations

import pytest
import torch

from resnet_bk.errors import BackendError, ShapeError
from resnet_bk.ops import dispatch
from resnet_bk.ops.dispatch import choose_backend, document_boundaries, verify_once


def test_auto_is_chunked_on_the_cpu_and_in_float64():
    assert choose_backend("auto", torch.zeros(1)) == "chunked"
    assert choose_backend("auto", torch.zeros(1, dtype=torch.float64)) == "chunked"


def test_a_name_runs_or_raises(monkeypatch):
    assert choose_backend("reference", torch.zeros(1)) == "reference"
    with pytest.raises(BackendError, match="'fast'; expected one of 'auto'"):
        choose_backend("fast", torch.zeros(1))
    with pytest.raises(BackendError, match="expected one of 'auto', 'reference', 'chunked'"):
        choose_backend("triton", torch.zeros(1), kernels=False)
    with pytest.raises(BackendError, match="float64"):
        choose_backend("triton", torch.zeros(1, dtype=torch.float64))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="the operands are on the CPU"):
        choose_backend("triton", torch.zeros(1))


def test_a_kernel_is_checked_once_and_a_wrong_one_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "_verified", set())
    calls = []

    def measure(error):
        calls.append(error)
        return {"y": (error, 1e-3)}

    for _ in range(2):
        verify_once("good", "small", lambda: measure(1e-4))
    assert calls == [1e-4]
    for error in (1e-2, float("nan")):
        with pytest.raises(BackendError, match=r"bad disagrees .*small.* y .* \(bound 1e-03\)"):
            verify_once("bad", "small", lambda error=error: measure(error))
    assert len(calls) == 3


def test_gradients_work_inside_a_check(monkeypatch):
    """Operators run below autograd, where the reference's gradients could not be taken."""
    monkeypatch.setattr(dispatch, "_verified", set())

    def measure():
        x = torch.ones(1, requires_grad=True)
        return {"gradient": (abs(torch.autograd.grad((3 * x).sum(), x)[0].item() - 3), 0.0)}

    with torch.no_grad():
        verify_once("graded", 0, measure)
    with torch.inference_mode():
        verify_once("graded", 1, measure)


def test_boundaries_are_read_once_and_again_after_a_write(monkeypatch):
    bounds = torch.tensor([0, 2, 5])
    assert document_boundaries(bounds, 1, 5) == [0, 2, 5]
    reads = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or self.numpy().tolist())
    assert document_boundaries(bounds, 1, 5) == [0, 2, 5] and not reads
    bounds[1] = 3
    assert document_boundaries(bounds, 1, 5) == [0, 3, 5] and len(reads) == 1
    with pytest.raises(ShapeError, match="increase strictly"):
        document_boundaries(bounds, 1, 6)
