"""Dropout of whole channels and whole words, for corpora that are small beside the model.

Sources: Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks", 2016;
Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language Models", 2017.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def locked_dropout(x: Float[Tensor, "batch time channels"], probability: float) -> Float[Tensor, "batch time channels"]:
    """`x` with channels set to 0 through the whole time axis, the others divided by 1 - `probability`."""
    if probability == 0:
        return x
    return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), probability)


def word_dropout(
    x: Float[Tensor, "batch time channels"], ids: Int[Tensor, "batch time"], vocabulary: int, probability: float
) -> Float[Tensor, "batch time channels"]:
    """Embeddings `x` of `ids` with some words set to 0 wherever they stand, the others divided by 1 - `probability`."""
    if probability == 0:
        return x
    return x * F.dropout(x.new_ones(vocabulary), probability)[ids.long()].unsqueeze(-1)
