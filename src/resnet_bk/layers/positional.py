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

    def of_tokens(
        self, tokens: Tensor, first: int = 0, before: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Float[Tensor, "rows time"]:
        """Potential of every token, one row for all sequences where they agree; documents count from their start.

        Args:
            tokens: [batch, time, ...], for its length and device.
            first: tokens of the sequences that other ranks hold before these.
            before: tokens read before these, int64 [rows]; None is 0.
            cu_seqlens: boundaries of packed documents.
        """
        time = tokens.shape[1]
        place = torch.arange(first, first + time, device=tokens.device)[None]
        most = 0 if before is None else int(before.max())
        if cu_seqlens is not None:
            bounds = cu_seqlens.long()
            start = -bounds[:-1] if before is None else before - bounds[:-1]
            place = place + torch.repeat_interleave(start, bounds.diff())[None]
        elif before is not None:
            place = place + before[:, None]
        return self(place, most + first + time - 1)

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
