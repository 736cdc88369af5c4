"""A fixed potential of the position alone: bumps at the primes, or a control of their size without their order."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resnet_bk.theory.potentials import control_potential, prime_bump_potential


class PositionalPotential:
    """Potential of the positions 0, 1, 2, ..., as far as they are asked for.

    Position p stands for the integer n = p + 1. Controls are drawn anew, from a seed of their own, for the integers of
    each [2^k, 2^(k+1)), so that the potential of a position does not depend on how many others were asked for.

    Args:
        kind: "prime_bump", "shuffled" (its values in random order) or "random" (Gaussians of the same norm).
        epsilon: exponent above 1/2 of the prime bumps, Lambda(n) / n^(1/2 + epsilon).
    """

    def __init__(self, kind: str, epsilon: float) -> None:
        self.kind, self.epsilon = kind, epsilon
        self._table = torch.zeros(0)

    def __call__(self, positions: Int[Tensor, " *shape"], last: int) -> Float[Tensor, " *shape"]:
        """Potential at `positions`, float32 on their device, in units of the hopping.

        Args:
            positions: int64, each in [0, last].
            last: a bound that the host knows, so that it need not wait for the device.

        Cost: a look-up; a sieve of 2 (last + 1) integers when positions go beyond all earlier ones.
        """
        if len(self._table) <= last or self._table.device != positions.device:
            self._table = self._values(max(last + 1, len(self._table))).to(positions.device)
        return self._table[positions]

    def _values(self, count: int) -> Tensor:
        """The potential of at least `count` positions, on the CPU."""
        blocks = []
        for octave in range((count + 1).bit_length()):
            values = prime_bump_potential(2**octave, self.epsilon, first=2**octave)
            if self.kind != "prime_bump":
                generator = torch.Generator().manual_seed(octave)
                values = control_potential(values, self.kind, generator=generator)  # type: ignore[arg-type]
            blocks.append(values)
        return torch.cat(blocks).float()
