"""What a mixer carries from one token to the next."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from resnet_bk.ops.resolvent import GreenState
from resnet_bk.ops.semiseparable import MixState


class MixerState(NamedTuple):
    """Everything a mixer carries from one token to the next; one row a sequence, constant size."""

    mix: MixState
    green: GreenState | None = None
    """m of the last token; None where the dynamics has no scan."""
    free: GreenState | None = None
    """The potential-free m0 of the last token; only with phase coupling."""
    phase: Float[Tensor, "rows heads"] | None = None
    """Sum of scattering phases so far, float64 radians; only with phase coupling."""
    peierls: Float[Tensor, "rows heads*pairs"] | None = None
    """Sum of Peierls phases so far, float64 radians in [0, 2 pi); only with data-dependent ones."""
    key: Float[Tensor, "rows state"] | None = None
    """Key of the last token before any shift; only where keys know the token before."""


class InPlaceState(MixerState):
    """A `MixerState` that the next token overwrites; only of a mixer whose `fused_step` is true.

    The position is not advanced: whoever owns the states lets all layers share one tensor and advances that.
    """
