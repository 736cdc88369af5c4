"""Loss by position in texts longer than any that was trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from resnet_bk.data.shards import TokenDataset
from resnet_bk.errors import DataError
from resnet_bk.evaluation.perplexity import PositionBin
from resnet_bk.experiments.corpora import ExperimentCorpus


def long_texts(corpus: ExperimentCorpus, length: int, most: int) -> tuple[list[np.ndarray], str]:
    """At most `most` texts of `length` tokens that were not trained on, and what they are.

    The beginnings of documents that long, of validation and then of test; where there are fewer than two, the splits
    are read as one text each and cut into pieces, and the description says that these are concatenations.

    Args:
        corpus: where to look.
        length: tokens of a text; position `length - 1` is the last that is predicted.
        most: texts to take.

    Raises:
        DataError: even the longest split is shorter.
    """
    splits = list(corpus.splits.values())
    documents = list(itertools.islice(_documents(splits, length), most))
    if len(documents) >= 2:
        return documents, f"{len(documents)} documents, their first {length:,} tokens"
    pieces = [
        split.tokens[start : start + length] for split in splits for start in range(0, len(split) - length + 1, length)
    ][:most]
    if not pieces:
        longest = max(len(split) for split in splits)
        raise DataError(
            f"No held-out text of {corpus.name} has {length:,} tokens; the longest split has {longest:,}. Train at a "
            "shorter sequence_length or use longer texts."
        )
    return pieces, f"{len(pieces)} concatenations of documents, {length:,} tokens each"


def _documents(splits: Sequence[TokenDataset], length: int) -> Iterable[np.ndarray]:
    """Beginnings of documents with at least `length` tokens."""
    for split in splits:
        lengths = np.diff(split.document_offsets)
        for number in (lengths >= length).nonzero()[0]:
            yield split.document(int(number))[:length]


def position_edges(training_length: int, longest: int) -> list[int]:
    """Bin edges that double, so that `training_length` is one of them: ..., L/2, L, 2 L, ..., up to `longest`."""
    edges = [training_length]
    while edges[0] > 1:
        edges.insert(0, edges[0] // 2)
    while edges[-1] < longest:
        edges.append(min(2 * edges[-1], longest))
    return edges


def format_positions(bins: Iterable[PositionBin]) -> str:
    """Bins as one word each, `start:stop:loss:standard error`, for the ledger."""
    return " ".join(
        f"{part.start}:{part.stop}:{part.mean:.4f}:"
        + ("" if part.standard_error is None else f"{part.standard_error:.4f}")
        for part in bins
    )


def parse_positions(text: str) -> list[tuple[int, int, float, float | None]]:
    """The bins of `format_positions`."""
    parts = (word.split(":") for word in text.split())
    return [(int(a), int(b), float(mean), float(error) if error else None) for a, b, mean, error in parts]
