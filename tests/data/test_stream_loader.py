"""Batches that continue each other: what rows read, what they predict, and exact resumption inside a stream."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from resnet_bk.data.loader import IGNORED_LABEL, TokenLoader
from resnet_bk.data.shards import TokenDataset
from resnet_bk.data.streams import DocumentLoader, StreamLoader
from resnet_bk.errors import CheckpointError, ConfigError, DataError

DATASET = TokenDataset.from_ids("train", np.arange(1000))


def flags(batch) -> list[bool]:
    """Which rows continue."""
    assert batch.continues is not None and batch.continues.dtype == torch.bool
    return batch.continues.tolist()


def test_segments_of_a_stream_are_a_window_of_that_length() -> None:
    streams, windows = StreamLoader(DATASET, 16, 3, stream_length=64, seed=4), TokenLoader(DATASET, 64, 3, seed=4)
    for _ in range(9):  # into the second epoch
        batches = [next(streams) for _ in range(4)]
        expected = next(windows).input_ids
        assert torch.equal(torch.cat([batch.input_ids for batch in batches], 1), expected)
        assert [flags(batch) for batch in batches] == [[False] * 3] + [[True] * 3] * 3
        for number, batch in enumerate(batches):
            assert batch.input_ids.dtype == torch.int64 and batch.input_ids.shape == (3, 16)
            assert batch.labels is not None
            assert torch.equal(batch.labels, expected[:, 16 * number : 16 * number + 17])
    assert streams.epoch == windows.epoch > 0


def test_by_default_every_row_reads_an_equal_share() -> None:
    loader = StreamLoader(DATASET, 16, 3)
    batches = [next(loader) for _ in range(20)]
    assert [flags(batch) for batch in batches] == [[False] * 3] + [[True] * 3] * 19
    read = torch.cat([batch.input_ids for batch in batches], 1)
    assert torch.equal(read, read[:, :1] + torch.arange(320))
    assert flags(next(loader)) == [False] * 3


@pytest.mark.parametrize("consumed", [0, 1, 3, 4, 30])
def test_a_place_inside_a_stream_is_restored(consumed: int) -> None:
    def make() -> StreamLoader:
        return StreamLoader(DATASET, 16, 3, stream_length=64, seed=5)

    loader, resumed = make(), make()
    for _ in range(consumed):
        next(loader)
    next(resumed)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert resumed.state_dict() == loader.state_dict()
    for _ in range(50):
        left, right = next(loader), next(resumed)
        assert flags(left) == flags(right)
        assert left.labels is not None and right.labels is not None and torch.equal(left.labels, right.labels)


def test_places_of_other_streams_are_refused() -> None:
    state = StreamLoader(DATASET, 16, 3, stream_length=64).state_dict()
    for name, loader in {
        "sequence_length": StreamLoader(DATASET, 32, 3, stream_length=64),
        "stream_length": StreamLoader(DATASET, 16, 3, stream_length=32),
        "batch_size": StreamLoader(DATASET, 16, 2, stream_length=64),
    }.items():
        with pytest.raises(CheckpointError, match=f"loader's {name} is .*, but the checkpoint was written with"):
            loader.load_state_dict(state)
    for segment in (None, 4):
        with pytest.raises(CheckpointError, match=f"segment in the checkpoint is {segment}"):
            StreamLoader(DATASET, 16, 3, stream_length=64).load_state_dict({**state, "segment": segment})


def test_lengths_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.stream_length is 40; expected 0 or a multiple of the 16 tokens"):
        StreamLoader(DATASET, 16, 3, stream_length=40)
    with pytest.raises(DataError, match=r"has 1000 tokens, fewer than training\.stream_length = 1024; shorten the str"):
        StreamLoader(DATASET, 16, 3, stream_length=1024)
    for sizes, name in (((0, 3), "sequence_length"), ((16, 0), "batch_size")):
        with pytest.raises(ConfigError, match=rf"training\.{name} is 0"):
            StreamLoader(DATASET, *sizes)


LENGTHS = [1, 70, 16, 17, 300, 40, 96, 130, 2, 328]
DOCUMENTS = TokenDataset(
    "train", np.arange(1, 1001, dtype=np.uint16), np.concatenate([[0], np.cumsum(LENGTHS)]), 0, "digest"
)


def read_documents(loader: DocumentLoader, rows: int, batches: int) -> list[list[int]]:
    """The documents that rows came to the end of, as they were read and as they were predicted."""
    reading: list[tuple[list[int], list[int]]] = [([], []) for _ in range(rows)]
    complete = []
    for _ in range(batches):
        batch = next(loader)
        assert batch.labels is not None and batch.input_ids.shape == (rows, 16) and batch.labels.shape == (rows, 17)
        for row, continues in enumerate(flags(batch)):
            if not continues:
                complete.append(reading[row])
                reading[row] = [], []
            tokens, targets = reading[row]
            tokens += [token for token in batch.input_ids[row].tolist() if token]
            targets += [token for token in batch.labels[row, 1:].tolist() if token != IGNORED_LABEL]
    for tokens, targets in complete:
        assert tokens[1:] == targets
    return [tokens for tokens, _ in complete if tokens]


def test_rows_read_documents_whole_one_after_the_other() -> None:
    loader = DocumentLoader(DOCUMENTS, 16, 3, seed=1)
    found = read_documents(loader, 3, 120)
    whole = [DOCUMENTS.document(number).tolist() for number in range(10)]
    assert all(document in whole for document in found)
    # Every epoch has each document once; when seven are read, the other three are in hand.
    first = found[:7]
    assert len({tuple(document) for document in first}) == 7 and first != whole[:7]
    assert loader.epoch >= 2


@pytest.mark.parametrize("consumed", [0, 1, 3, 4, 50])
def test_places_inside_documents_are_restored(consumed: int) -> None:
    loader, resumed = DocumentLoader(DOCUMENTS, 16, 3, seed=5), DocumentLoader(DOCUMENTS, 16, 3, seed=5)
    for _ in range(consumed):
        next(loader)
    next(resumed)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    for _ in range(60):
        left, right = next(loader), next(resumed)
        assert flags(left) == flags(right)
        assert left.labels is not None and right.labels is not None
        assert torch.equal(left.input_ids, right.input_ids) and torch.equal(left.labels, right.labels)


def test_places_of_other_documents_are_refused() -> None:
    state = DocumentLoader(DOCUMENTS, 16, 3).state_dict()
    for name, loader in {
        "documents": DocumentLoader(dataclasses.replace(DOCUMENTS, document_offsets=np.array([0, 1000])), 16, 3),
        "batch_size": DocumentLoader(DOCUMENTS, 16, 2),
        "sequence_length": DocumentLoader(DOCUMENTS, 8, 3),
        "seed": DocumentLoader(DOCUMENTS, 16, 3, seed=1),
    }.items():
        with pytest.raises(CheckpointError, match=f"loader's {name} is .*, but the checkpoint was written with"):
            loader.load_state_dict(state)
    for change in ({"drawn": None}, {"rows": [[5, 4]] * 3}):
        with pytest.raises(CheckpointError, match="expected a number, and for each row"):
            DocumentLoader(DOCUMENTS, 16, 3).load_state_dict({**state, **change})
    for sizes, name in (((0, 3), "sequence_length"), ((16, 0), "batch_size")):
        with pytest.raises(ConfigError, match=rf"training\.{name} is 0"):
            DocumentLoader(DOCUMENTS, *sizes)
