"""Media, dense matrices and comparisons shared by the tests of the resolvent."""

from __future__ import annotations

import importlib.util

import torch

from resnet_bk.ops.resolvent import GreenState

BACKENDS = ["reference", "chunked"]


def medium(batch, time, heads, *, absorption=0.05, spread=1.5, seed=0, dtype=torch.float64):
    """Random detunings and absorptions; the absorption of a site lies in [1, 2] times `absorption`."""
    generator = torch.Generator().manual_seed(seed)
    detuning = spread * torch.randn(batch, time, heads, generator=generator, dtype=torch.float64)
    ratio = 1 + torch.rand(batch, time, heads, generator=generator, dtype=torch.float64)
    return detuning.to(dtype), (absorption * ratio).to(dtype)


def lead(rows, heads, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(rows, heads, generator=generator, dtype=torch.float64)
    return GreenState(real, torch.rand(rows, heads, generator=generator, dtype=torch.float64))


def pair(m):
    return torch.complex(m[0].double(), m[1].double())


def hamiltonian(detuning, absorption, left=0.0):
    """H - z of one head as a dense complex128 matrix; a lead m_0 on the left is -m_0 in its first entry."""
    ones = torch.ones(detuning.numel() - 1, dtype=torch.float64)
    dense = torch.diag(torch.complex(detuning, -absorption)) + torch.diag(ones, 1) + torch.diag(ones, -1)
    dense[0, 0] -= left
    return dense


def worst(ours, theirs):
    """Largest difference of two tensors over the largest magnitude."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def gradients(outputs, inputs):
    """Gradients of a fixed random functional of all outputs."""
    generator = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in outputs)
    return torch.autograd.grad(loss, inputs)


def shrink_programs(monkeypatch):
    """Sizes for the interpreter: few, wide and short programs, and several slots a group of the carry."""
    if importlib.util.find_spec("triton") and not torch.cuda.is_available():
        from resnet_bk.ops.resolvent import launch

        for name, size in {"_LANES": 64, "_GROUPS": 4, "_GROUP_HEADS": 4, "_CHUNKS": (8, 16)}.items():
            monkeypatch.setattr(launch, name, size)
