"""The fixed potential of the position."""

from __future__ import annotations

import math

import pytest
import torch

from resnet_bk.layers.positional import PositionalPotential


def at(kind, count, last=None):
    return PositionalPotential(kind, 0.25)(torch.arange(count), count - 1 if last is None else last)


def test_has_bumps_at_prime_powers_only():
    values = at("prime_bump", 32)
    for place, value in enumerate(values.tolist()):
        n = place + 1
        prime = next((p for p in range(2, n + 1) if n % p == 0), None)
        power = prime is not None and prime ** round(math.log(n, prime)) == n
        expected = math.log(prime) / n**0.75 if power else 0.0
        assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["prime_bump", "shuffled", "random"])
def test_does_not_depend_on_how_much_is_asked_for(kind):
    one = PositionalPotential(kind, 0.25)
    first = one(torch.arange(5), 4)
    later = one(torch.arange(1000), 999)
    assert torch.equal(first, later[:5])
    assert torch.equal(later, at(kind, 1000, last=5000))


def test_controls_have_the_size_and_not_the_order():
    primes, shuffled, random = (at(kind, 1023) for kind in ("prime_bump", "shuffled", "random"))
    assert torch.equal(primes.sort().values, shuffled.sort().values)
    assert not torch.equal(primes, shuffled)
    assert random.norm() == pytest.approx(primes.norm().item(), rel=1e-5)
    assert (random < 0).any()
