"""What the Triton kernels must agree with before their first result is used: the float64 reference, gradients too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_bk.ops.dispatch import verify_once
from resnet_bk.ops.resolvent import GreenState, causal_resolvent, flux_gates
from resnet_bk.ops.resolvent.launch import Layout, Medium, adjoint, compose, forward

# Relative root-mean-square error allowed, by the dtype of the result.
_BOUNDS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_TOKENS, _HEADS, _ROWS = 80, 3, 2
_PARAMETERS = ("potential_scale", "energy", "absorption_bias", "source_bias")


def verify_flux_gates(kind: str, dtype: torch.dtype, device: torch.device, lead: bool, packed: bool) -> None:
    """Check the gates' kernels on their first use with these options; raises `BackendError` if they are wrong."""

    def measure() -> dict[str, tuple[float, float]]:
        generator = torch.Generator().manual_seed(0)
        raw = [x.to(dtype) for x in _random(generator, *[(_TOKENS, _HEADS)] * 3)]
        parameters = _random(generator, *[(_HEADS,)] * 4)
        parameters[2] -= 3  # absorptions near 0.05
        first = _random(generator, *[(_ROWS, _HEADS)] * 2)
        first[1].abs_()
        grads = _random(generator, *[(_TOKENS, _HEADS)] * 2, *[(_ROWS, _HEADS)] * 2)
        bounds = torch.tensor([0, 37, _TOKENS]) if packed else None

        inputs = [x.double().requires_grad_() for x in (*raw, *parameters, *first)]
        (decay, weight), state = flux_gates(
            *(_batch(x, packed) for x in inputs[:3]),
            potential_scale=inputs[3],
            energy=inputs[4],
            absorption_bias=inputs[5],
            absorption_floor=1e-3,
            source_bias=inputs[6],
            source_kind=kind,  # pyright: ignore[reportArgumentType]
            initial=None if lead else GreenState(*inputs[7:]),
            cu_seqlens=bounds,
            backend="reference",
        )
        truth = (decay.flatten(0, 1), weight.flatten(0, 1), *state)
        exact = torch.autograd.grad(truth, inputs, [x.double() for x in grads], allow_unused=True)

        a, e, s, scale, energy, bias, source_bias = (x.to(device) for x in (*raw, *parameters))
        source = (None, None) if kind == "unit" else (s, source_bias)
        before = (None, None) if lead else (first[0].to(device), first[1].to(device))
        medium = Medium(kind, a, e, source[0], scale, energy, bias, source[1], 1e-3, before[0], before[1])
        layout = Layout(_TOKENS, _HEADS, _ROWS, None if bounds is None else bounds.to(device))
        *out, m_real, m_imag = forward(medium, layout, save=True)
        given = [x.to(device) for x in grads]
        *d_raw, d_parameters, d_real, d_imag = adjoint(medium, layout, (m_real, m_imag), given[:2], given[2:])

        names = ("log_decay", "weight", "state_real", "state_imag")
        names += ("d_potential", "d_absorption", "d_source", *(f"d_{name}" for name in _PARAMETERS))
        found = (*out, *d_raw, *d_parameters, d_real, d_imag)
        return _errors((*names, "d_initial_real", "d_initial_imag"), found, (*truth, *exact))

    verify_once("flux_gates", (device, dtype, kind, lead, packed), measure)


def verify_resolvent(device: torch.device, packed: bool) -> None:
    """Check the bare resolvent's kernels on their first use; raises `BackendError` if they are wrong."""

    def measure() -> dict[str, tuple[float, float]]:
        generator = torch.Generator().manual_seed(0)
        operands = _random(generator, *[(_TOKENS, _HEADS)] * 2, *[(_ROWS, _HEADS)] * 2)
        for part in (1, 3):
            operands[part].abs_().add_(0.05)
        grads = _random(generator, *[(_TOKENS, _HEADS)] * 2)
        bounds = torch.tensor([0, 37, _TOKENS]) if packed else None

        inputs = [x.double().requires_grad_() for x in operands]
        truth, _ = causal_resolvent(
            *(_batch(x, packed) for x in inputs[:2]),
            initial=GreenState(*inputs[2:]),
            cu_seqlens=bounds,
            backend="reference",
        )
        truth = [x.flatten(0, 1) for x in truth]
        exact = torch.autograd.grad(truth, inputs, [x.double() for x in grads])

        delta, eta, *first = (x.to(device) for x in operands)
        medium = Medium("plain", delta, eta, initial_real=first[0], initial_imag=first[1])
        layout = Layout(_TOKENS, _HEADS, _ROWS, None if bounds is None else bounds.to(device))
        m = forward(medium, layout, save=True)
        d_delta, d_eta, _, _, *d_first = adjoint(medium, layout, (m[0], m[1]), [x.to(device) for x in grads])
        names = ("m_real", "m_imag", "d_detuning", "d_absorption", "d_initial_real", "d_initial_imag")
        return _errors(names, (*m, d_delta, d_eta, *d_first), (*truth, *exact))

    verify_once("causal_resolvent", (device, packed), measure)


def verify_maps(device: torch.device) -> None:
    """Check the composed maps of rows of sites on their first use; raises `BackendError` if they are wrong."""

    def measure() -> dict[str, tuple[float, float]]:
        delta, eta = _random(torch.Generator().manual_seed(0), *[(_TOKENS, _HEADS)] * 2)
        eta.abs_().add_(0.05)
        sites, _ = causal_resolvent(
            _batch(delta.double(), False), _batch(eta.double(), False), backend="reference"
        )  # from a wall
        m = torch.complex(*sites)
        maps, log_scale = compose(
            Medium("plain", delta.to(device), eta.to(device)), Layout(_TOKENS, _HEADS, _ROWS, None)
        )
        parts = maps.cpu().unflatten(1, (4, 2))
        b, d = torch.complex(parts[:, :2, 0], parts[:, :2, 1]).unbind(1)  # (a m + b) / (c m + d) at m = 0
        slope = torch.exp(-2 * log_scale.cpu()) / d.square()
        pairs = {"m": (b / d, m[:, -1], 1e-10), "slope": (slope, m.square().prod(1), 1e-9)}
        return {name: (((x - y).norm() / y.norm()).item(), bound) for name, (x, y, bound) in pairs.items()}

    verify_once("moebius_maps", device, measure)


def _random(generator: torch.Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _batch(x: Tensor, packed: bool) -> Tensor:
    """The tokens as one row of packed documents, or as rows of equal length."""
    return x[None] if packed else x.unflatten(0, (_ROWS, -1))


def _errors(names: Sequence[str], found: Sequence[Tensor | None], exact: Sequence[Tensor | None]):
    """Relative root-mean-square error and its bound by name, of what exists."""
    return {
        name: (((one.detach().cpu().double() - two).norm() / two.norm()).item(), _BOUNDS[one.dtype])
        for name, one, two in zip(names, found, exact, strict=True)
        if one is not None and two is not None
    }
