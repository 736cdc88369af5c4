"""Keys that know the token before: against a loop over tokens, and their adjoint against autograd."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from resnet_bk.ops.key_shift import shift_keys, shift_keys_adjoint

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
def test_values_and_adjoint(packed, given):
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
    with torch.no_grad():
        gradient = weights[0].clone()
        d_shift, d_previous = shift_keys_adjoint(gradient, weights[1], key, shift, previous, bounds)
    torch.testing.assert_close((gradient, d_shift), (truth[0], truth[1]))
    if given:
        torch.testing.assert_close(d_previous, truth[2])


def test_narrow_keys_are_shifted_in_float32():
    key, shift, previous, _ = draw(False, True)
    narrow, last = shift_keys(key.bfloat16(), shift.bfloat16(), previous.bfloat16())
    exact, _ = shift_keys(key.bfloat16().double(), shift.bfloat16().double(), previous.bfloat16().double())
    assert (narrow.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(narrow, exact.bfloat16())
