"""Keys that know the token before: against a loop over tokens; the kernels against plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from resnet_bk.ops.key_shift import shift_keys
from resnet_bk.ops.key_shift import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

BOUNDS = [0, 1, 5, 9]


def draw(packed, given, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    batch, rows = (1, len(BOUNDS) - 1) if packed else (2, 2)
    key = torch.randn(batch, 9, 4, generator=generator, dtype=dtype)
    shift, previous = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((4,), (rows, 4)))
    return key, shift, previous if given else None, torch.tensor(BOUNDS) if packed else None


def by_tokens(key, shift, previous, cu_seqlens):
    """One row after the other, one token after the other."""
    bounds = cu_seqlens.tolist() if cu_seqlens is not None else None
    texts = list(key) if bounds is None else [key[0, a:b] for a, b in pairwise(bounds)]
    out, last = [], []
    for row, text in enumerate(texts):
        before = torch.zeros_like(shift) if previous is None else previous[row]
        for token in text:
            out.append(token + shift * before)
            before = token
        last.append(before)
    return torch.stack(out).view_as(key), torch.stack(last)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients(packed, given):
    key, shift, previous, bounds = draw(packed, given)
    leaves = [part.requires_grad_() for part in (key, shift, previous) if part is not None]
    found, expected = shift_keys(key, shift, previous, bounds), by_tokens(key, shift, previous, bounds)
    torch.testing.assert_close(found, expected)
    weights = [torch.randn(part.shape, dtype=part.dtype) for part in found]
    ours, truth = (
        torch.autograd.grad(sum((part * w).sum() for part, w in zip(outputs, weights, strict=True)), leaves)
        for outputs in (found, expected)
    )
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_last", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("bounds", [None, [0, 1, 32, 33, 70, 96]])
def test_kernels(bounds, given, grad_last, dtype):
    # 32 tokens are a tile: documents and rows end inside of tiles and at their edges. Keys are sections of wider rows.
    generator = torch.Generator().manual_seed(1)
    batch, time, state = (3, 40, 24) if bounds is None else (1, 96, 24)
    rows = batch if bounds is None else len(bounds) - 1

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    wide = draw(batch * time, state + 8).to(dtype)
    key, shift, previous = wide[:, 8:], draw(state), draw(rows, state).to(dtype).float() if given else None
    grad, d_last = draw(batch * time, state).to(dtype), draw(rows, state) if grad_last else None
    packed = None if bounds is None else torch.tensor(bounds, device=DEVICE)
    leaves = [x.double().requires_grad_() for x in (key, shift, previous) if x is not None]
    exact = shift_keys(leaves[0].view(batch, time, state), *leaves[1:], cu_seqlens=packed)
    loss = (exact[0].view_as(grad) * grad).sum() + (0 if d_last is None else (exact[1] * d_last).sum())
    truth = [exact[0].view_as(grad), exact[1], *torch.autograd.grad(loss, leaves)]
    into = torch.full_like(wide, 7.0)
    found = [*kernels.forward(key, shift, previous, time, packed), into[:, 8:]]
    found += kernels.backward(grad, d_last, key, shift, previous, time, packed, into[:, 8:])
    assert torch.equal(into[:, :8], torch.full_like(into[:, :8], 7.0))
    assert found[-1].numel() == (rows * state if given else 0)
    for ours, expected in zip(found, truth, strict=False):
        assert (ours.double() - expected).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * expected.norm()


def test_the_check_on_first_use():
    kernels.verify(torch.empty(1, 24, dtype=torch.bfloat16, device=DEVICE), torch.empty(24, device=DEVICE))


def test_narrow_keys_are_shifted_in_float32():
    key, shift, previous, _ = draw(False, True)
    narrow, last = shift_keys(key.bfloat16(), shift.bfloat16(), previous.bfloat16())
    exact, _ = shift_keys(key.bfloat16().double(), shift.bfloat16().double(), previous.bfloat16().double())
    assert (narrow.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(narrow, exact.bfloat16())
