"""Causal attention: PyTorch's fused form against all scores written out, for windows, earlier keys and empty slots."""

from __future__ import annotations

import pytest
import torch

from resnet_bk.errors import BackendError, DomainError, ShapeError
from resnet_bk.ops.attention import causal_attention


def draw(time, past=0, rows=2, heads=3, channels=4):
    generator = torch.Generator().manual_seed(time)
    query = torch.randn(rows, time, heads, channels, generator=generator, dtype=torch.float64)
    key, value = (
        torch.randn(rows, past + time, heads, channels, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return [x.requires_grad_() for x in (query, key, value)]


def test_the_reference_is_softmax_over_what_a_query_sees():
    query, key, value = draw(5, past=3)
    y = causal_attention(query, key, value, window=4, empty=torch.tensor([0, 2]), backend="reference")
    for row, empty in enumerate((0, 2)):
        for i in range(5):
            seen = slice(max(empty, i), 3 + i + 1)  # place i + 3 and the three before it
            scores = torch.einsum("hc,jhc->hj", query[row, i], key[row, seen]) / 2
            expected = torch.einsum("hj,jhc->hc", scores.softmax(-1), value[row, seen])
            assert (y[row, i] - expected).abs().max() < 1e-14  # measured 4e-16


@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 600])
@pytest.mark.parametrize("past", [0, 1, 70])
@pytest.mark.parametrize("window", [0, 1, 5, 64, 66, 1000])
def test_fused_is_the_reference_with_its_gradients(time, past, window):
    inputs = draw(time, past)
    # Leading slots of the second row are empty where there are any.
    for empty in (None, torch.tensor([0, (past + 1) // 2])):
        outputs = [
            causal_attention(*inputs, window=window, empty=empty, backend=name) for name in ("reference", "auto")
        ]
        assert (outputs[0] - outputs[1]).abs().max() < 1e-13  # measured 2e-15
        gradients = [torch.autograd.grad(y.sin().sum(), inputs) for y in outputs]
        for one, two in zip(*gradients, strict=True):
            assert (one - two).abs().max() < 1e-12  # measured 2e-14


@pytest.mark.parametrize("window", [0, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_past_is_bit_identical_whatever_the_future(window, dtype):
    inputs = [x.detach().to(dtype) for x in draw(600)]
    before = causal_attention(*inputs, window=window)
    for place in (1, 63, 64, 511, 512, 599):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, place:] += 1e3
        after = causal_attention(*changed, window=window)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])


@pytest.mark.parametrize("window", [0, 3])
def test_gradients_are_right(window):
    inputs = draw(6, past=2, rows=1, heads=1, channels=2)
    assert torch.autograd.gradcheck(lambda *x: causal_attention(*x, window=window), inputs)


class TestBadInput:
    def test_more_queries_than_keys(self):
        query, key, value = draw(3)
        with pytest.raises(ShapeError, match="at least as many keys as queries"):
            causal_attention(query, key[:, 1:], value[:, 1:])

    def test_other_heads(self):
        query, key, value = draw(3)
        with pytest.raises(ShapeError, match="same rows, heads and channels"):
            causal_attention(query[:, :, :2], key, value)
        with pytest.raises(ShapeError, match="as many tokens as key"):
            causal_attention(query, key, value[:, 1:])

    def test_empty_of_another_shape(self):
        with pytest.raises(ShapeError, match=r"empty must be \[2\]; got \[3\]"):
            causal_attention(*draw(3), empty=torch.zeros(3))

    def test_a_negative_window(self):
        with pytest.raises(DomainError, match="window is -1"):
            causal_attention(*draw(3), window=-1)

    def test_an_unknown_backend(self):
        with pytest.raises(BackendError, match="expected one of 'auto', 'reference', 'fused'"):
            causal_attention(*draw(3), backend="flash")  # type: ignore[arg-type]
