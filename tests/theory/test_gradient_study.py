"""The exact gradient of the full diagonal against dense inverses and `ops`; what the approximations are not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.errors import DomainError, ShapeError
from resnet_bk.ops.resolvent import full_resolvent_diagonal
from resnet_bk.theory.gradient_study import blended_full_diagonal, gradient_cosine, relative_gradient_variance
from resnet_bk.theory.jacobi import absorbing_jacobi

CASES = 20  # per example of hypothesis, so that 1,000 media are checked


def medium(seed: int, sites: int, smallest: float = 1e-2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    detuning = torch.randn(2, sites, 3, generator=generator, dtype=torch.float64)
    absorption = smallest ** torch.rand(2, sites, 3, generator=generator, dtype=torch.float64)
    return [detuning.requires_grad_(), absorption.requires_grad_()]


def gradients(diagonal: torch.Tensor, inputs: list[torch.Tensor], cotangent: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(diagonal, inputs, cotangent))


@pytest.mark.parametrize("sites", [1, 2, 63, 64, 65, 512])
def test_value_and_exact_gradient_are_those_of_the_operator(sites: int) -> None:
    inputs = medium(sites, sites)
    diagonal = blended_full_diagonal(*inputs)
    expected = torch.complex(*full_resolvent_diagonal(*inputs, backend="reference"))
    cotangent = torch.randn_like(diagonal)
    torch.testing.assert_close(diagonal, expected, rtol=1e-12, atol=1e-12)
    for found, exact in zip(
        gradients(diagonal, inputs, cotangent), gradients(expected, inputs, cotangent), strict=True
    ):
        assert (found - exact).norm() < 1e-10 * exact.norm()  # measured 3e-14


@given(seed=st.integers(0, 2**31), sites=st.integers(1, 12), smallest=st.sampled_from([0.5, 1e-1, 1e-3]))
def test_every_gradient_is_its_formula_on_the_dense_inverse(seed: int, sites: int, smallest: float) -> None:
    for case in range(CASES // 5):  # six media each
        inputs = medium(seed + case, sites, smallest)
        cotangent = torch.randn(2, sites, 3, dtype=torch.complex128)
        blends: Any = (("exact", 0.0), ("diagonal", 0.0), ("exact", 1.0), ("exact", 0.3), ("diagonal", 0.7))
        found = {
            (base, weight): gradients(blended_full_diagonal(*inputs, base=base, grad_blend=weight), inputs, cotangent)
            for base, weight in blends
        }
        for row in range(2):
            for head in range(3):
                at = (row, slice(None), head)
                green = torch.linalg.inv(absorbing_jacobi(inputs[0][at], inputs[1][at]))
                g, own = cotangent[at], green.diagonal().conj()
                exact = -(green.conj().square() * g[:, None]).sum(0)
                diagonal, heuristic = -own.square() * g, -g / own.square()
                for key, expected in (
                    (("exact", 0.0), exact),
                    (("diagonal", 0.0), diagonal),
                    (("exact", 1.0), heuristic),
                    (("exact", 0.3), 0.7 * exact + 0.3 * heuristic),
                    (("diagonal", 0.7), 0.3 * diagonal + 0.7 * heuristic),
                ):
                    scale = 1e-9 * (1 + exact.abs().max() + heuristic.abs().max())
                    assert (found[key][0][at] - expected.real).abs().max() < scale
                    assert (found[key][1][at] + expected.imag).abs().max() < scale


def test_gradcheck_of_the_exact_gradient_only() -> None:
    inputs = medium(1, 5, 0.3)
    assert torch.autograd.gradcheck(blended_full_diagonal, inputs)
    approximations: list[Any] = [{"base": "diagonal"}, {"grad_blend": 0.3}]
    for options in approximations:
        assert not torch.autograd.gradcheck(
            lambda d, a, options=options: blended_full_diagonal(d, a, **options), inputs, raise_exception=False
        )


def test_a_second_derivative_is_refused() -> None:
    inputs = medium(1, 4)
    linear, square = (lambda g: g.real.sum()), (lambda g: g.real.square().sum())
    for loss, said in ((linear, "does not require grad"), (square, "once_differentiable")):
        (first,) = torch.autograd.grad(loss(blended_full_diagonal(*inputs)), inputs[:1], create_graph=True)
        with pytest.raises(RuntimeError, match=said):
            first.sum().backward()


def test_the_approximations_point_elsewhere() -> None:
    """Counter-examples: on a free line both point away from the gradient of the mean of Re G."""
    inputs = [torch.zeros(1, 40, 1, dtype=torch.float64, requires_grad=True), torch.full((1, 40, 1), 0.1).double()]

    def gradient(**options) -> list[torch.Tensor]:
        return list(torch.autograd.grad(blended_full_diagonal(*inputs, **options).real.mean(), inputs[:1]))

    exact = gradient()
    assert gradient_cosine(exact, exact) == pytest.approx(1)
    assert gradient_cosine(exact, gradient(base="diagonal")) < -0.2  # measured -0.25
    assert gradient_cosine(exact, gradient(grad_blend=1.0)) < 0.5


def test_cosine_and_variance_of_known_vectors() -> None:
    one, other = [torch.tensor([1.0, 0.0]), torch.tensor([0.0])], [torch.tensor([1.0, 0.0]), torch.tensor([1.0])]
    assert gradient_cosine(one, other) == pytest.approx(math.sqrt(0.5))
    # Mean (1, 0, 1/2); squared distances 1/4 each, over n - 1 = 1; squared mean 5/4.
    assert relative_gradient_variance([one, other]) == pytest.approx(0.4)
    assert relative_gradient_variance([one, one]) == 0


def test_single_precision_is_kept() -> None:
    diagonal = blended_full_diagonal(torch.zeros(1, 2, 1), torch.ones(1, 2, 1))
    assert diagonal.dtype == torch.complex64


def test_bad_input_is_named() -> None:
    good = torch.ones(1, 3, 2)
    with pytest.raises(DomainError, match=r"absorption at \[0, 0, 0\] is 0\.0"):
        blended_full_diagonal(good, 0 * good)
    with pytest.raises(DomainError, match=r"detuning at \[0, 0, 0\] is nan"):
        blended_full_diagonal(good * math.nan, good)
    with pytest.raises(ShapeError, match="absorption is"):
        blended_full_diagonal(good, good[:, :2])
    with pytest.raises(ShapeError, match="detuning is"):
        blended_full_diagonal(good[0], good[0])
    with pytest.raises(ShapeError, match="absorption is"):
        blended_full_diagonal(good, good.double())
    with pytest.raises(DomainError, match="base is 'none'"):
        blended_full_diagonal(good, good, base="none")  # pyright: ignore[reportArgumentType]
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(DomainError, match="grad_blend is"):
            blended_full_diagonal(good, good, grad_blend=weight)
    with pytest.raises(ShapeError, match="gradients are"):
        gradient_cosine([good], [])
    with pytest.raises(DomainError, match="product of the norms is 0"):
        gradient_cosine([good], [0 * good])
    with pytest.raises(ShapeError, match="samples are"):
        relative_gradient_variance([[good]])
    with pytest.raises(DomainError, match="squared norm"):
        relative_gradient_variance([[good], [-good]])
