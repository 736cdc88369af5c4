from __future__ import annotations

import numpy as np
import pytest

from resnet_bk.data.shards import TokenDataset
from resnet_bk.errors import DataError
from resnet_bk.evaluation.perplexity import PositionBin
from resnet_bk.experiments.corpora import ExperimentCorpus
from resnet_bk.experiments.long_context import position_curves, position_table
from resnet_bk.experiments.positions import format_positions, long_texts, parse_positions, position_edges


def corpus_of(*lengths: int) -> ExperimentCorpus:
    tokens = np.arange(sum(lengths), dtype=np.uint32)
    split = TokenDataset("validation", tokens, np.cumsum([0, *lengths]), 0, "hash")
    return ExperimentCorpus("made", len(tokens), split, split, None, None)


def test_long_documents_are_read_from_their_beginnings():
    texts, what = long_texts(corpus_of(5, 30, 3, 20), 20, 8)
    assert [list(text) for text in texts] == [list(range(5, 25)), list(range(38, 58))]
    assert what == "2 documents, their first 20 tokens"
    assert len(long_texts(corpus_of(5, 30, 3, 20, 40), 20, 2)[0]) == 2


def test_short_documents_are_joined_and_called_so():
    texts, what = long_texts(corpus_of(5, 30, 3, 10), 20, 8)
    assert [list(text) for text in texts] == [list(range(20)), list(range(20, 40))]
    assert what == "2 concatenations of documents, 20 tokens each"
    with pytest.raises(DataError, match="the longest split has 48"):
        long_texts(corpus_of(5, 30, 3, 10), 49, 8)


@pytest.mark.parametrize(
    ("trained", "longest", "edges"),
    [(16, 64, [1, 2, 4, 8, 16, 32, 64]), (24, 100, [1, 3, 6, 12, 24, 48, 96, 100]), (4, 4, [1, 2, 4])],
)
def test_edges_double_around_the_training_length(trained, longest, edges):
    assert position_edges(trained, longest) == edges


def test_positions_survive_the_ledger():
    bins = [PositionBin(1, 2, 10, 2, 3.5, 0.25), PositionBin(2, 4, 10, 1, 3.0, None)]
    assert parse_positions(format_positions(bins)) == [(1, 2, 3.5, 0.25), (2, 4, 3.0, None)]


def row(arm: str, seed: int, losses: list[float], *, rate: float = 1e-3, error: float = 0.01) -> dict:
    edges = [1, 2, 4, 8, 16]
    words = (f"{a}:{b}:{loss}:{error}" for a, b, loss in zip(edges, edges[1:], losses, strict=False))
    metrics = {
        "arm": arm, "outcome": "done", "learning_rate": rate, "validation_loss": losses[1], "training_length": 4,
        "by_position": " ".join(words), "texts": "2 documents, their first 16 tokens",
    }  # fmt: skip
    return {"seeds": [seed], "metrics": metrics}


def test_curves_are_means_over_seeds_with_their_noise():
    falling = [row("a", seed, [5.0, 4.0, 3.5, 3.0 + 0.2 * seed]) for seed in (0, 1)]
    worse = row("a", 0, [9.0, 8.0, 7.0, 6.0], rate=2e-3)
    rising = [row("b", 0, [5.0, 4.0, 4.0, 6.0])]
    a, b = position_curves([*falling, worse, *rising])
    assert a.means == pytest.approx((5.0, 4.0, 3.5, 3.1)) and a.seeds == 2
    assert a.errors == pytest.approx((0.01, 0.01, 0.01, 0.2 / 2**0.5))
    assert a.beyond == pytest.approx(-0.9) and a.rises == []
    assert b.beyond == pytest.approx(2.0) and b.rises == [8]
    lines = position_table([a, b]).splitlines()
    assert lines[0] == "Loss by preceding tokens; trained at 4; 2 documents, their first 16 tokens."
    assert lines[2].split()[:2] == ["a", "2"] and "nowhere beyond noise" in lines[2]
    assert lines[3].endswith("from 8")
    assert position_table([]) == "No run has a loss by position."
