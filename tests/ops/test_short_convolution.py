"""The short convolution against PyTorch's; cut, packed and causal."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from resnet_bk.errors import ShapeError
from resnet_bk.ops.short_convolution import short_convolution

CHANNELS = 5


def draw(time, batch=2, width=4):
    generator = torch.Generator().manual_seed(time)
    shapes = ((batch, time, CHANNELS), (CHANNELS, width), (CHANNELS,), (batch, width - 1, CHANNELS))
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("time", [1, 2, 3, 4, 64, 65])
@pytest.mark.parametrize("width", [2, 4])
def test_is_the_convolution_of_pytorch(time, width):
    x, taps, bias, history = draw(time, width=width)
    for before in (None, history):
        y, after = short_convolution(x, taps, bias, history=before)
        extended = torch.cat((torch.zeros_like(history) if before is None else before, x), 1)
        expected = F.silu(F.conv1d(extended.mT, taps[:, None], bias, groups=CHANNELS)).mT
        assert (y - expected).abs().max() < 1e-13  # measured 9e-16
        assert torch.equal(after, extended[:, time:])
        inputs = [x, taps, bias, *([] if before is None else [before])]
        for one, two in zip(*(torch.autograd.grad(out.sin().sum(), inputs) for out in (y, expected)), strict=True):
            assert (one - two).abs().max() < 1e-12  # measured 7e-15


def test_cut_anywhere_and_packed_are_one_run():
    x, taps, bias, history = draw(40)
    whole, end = short_convolution(x, taps, bias, history=history)
    for place in (1, 2, 3, 39):
        first, between = short_convolution(x[:, :place], taps, bias, history=history)
        second, last = short_convolution(x[:, place:], taps, bias, history=between)
        assert (torch.cat((first, second), 1) - whole).abs().max() < 1e-14  # measured 4e-16
        assert torch.equal(last, end)
    bounds = [0, 1, 3, 40]
    many = torch.randn(3, 3, CHANNELS, dtype=torch.float64)
    for before in (None, many):
        packed, ends = short_convolution(x[:1], taps, bias, history=before, cu_seqlens=torch.tensor(bounds))
        for document, (left, right) in enumerate(pairwise(bounds)):
            own = None if before is None else before[document : document + 1]
            alone, after = short_convolution(x[:1, left:right], taps, bias, history=own)
            assert (packed[:, left:right] - alone).abs().max() < 1e-14  # measured 4e-16
            assert torch.equal(ends[document : document + 1], after)


def test_the_past_is_bit_identical_whatever_the_future():
    x, taps, bias, _ = draw(30)
    before, _ = short_convolution(x, taps, bias)
    for place in (1, 4, 29):
        changed = x.detach().clone()
        changed[:, place:] += 1e3
        after, _ = short_convolution(changed, taps, bias)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])


def test_what_does_not_fit_is_refused():
    x, taps, bias, history = draw(9)
    with pytest.raises(ShapeError, match=r"taps \[5, width\] and bias \[5\]; got \[4, 4\] and \[5\]"):
        short_convolution(x, taps[1:], bias)
    with pytest.raises(ShapeError, match=r"history must be \[2, 3, 5\]; got \[2, 2, 5\]"):
        short_convolution(x, taps, bias, history=history[:, 1:])
