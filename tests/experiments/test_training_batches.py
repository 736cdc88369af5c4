from __future__ import annotations

import numpy as np
import pytest
import torch

from resnet_bk.data.shards import TokenDataset
from resnet_bk.errors import CheckpointError, ConfigError, DataError
from resnet_bk.experiments.batches import CONTEXTS, TrainingBatches


def make(corpus, context: str, *, seed: int = 0, rows: int = 3, length: int = 16) -> TrainingBatches:
    return TrainingBatches(corpus.train, sequence_length=length, batch_size=rows, context=context, seed=seed)


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_same_seed_gives_the_same_batches(corpus, context):
    first, again, other = make(corpus, context), make(corpus, context), make(corpus, context, seed=1)
    for _ in range(30):
        a, b = next(first), next(again)
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
        next(other)
    assert first.digest == again.digest != other.digest


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_resumed_stream_continues_exactly(corpus, context):
    whole, part, rest = (make(corpus, context) for _ in range(3))
    for _ in range(20):
        next(whole)
    for _ in range(7):
        next(part)
    rest.load_state_dict(part.state_dict())
    for _ in range(13):
        next(rest)
    assert rest.digest == whole.digest


def test_fresh_rows_are_text_with_the_next_token_as_target(corpus):
    batch = next(make(corpus, "fresh"))
    assert batch.inputs.shape == batch.targets.shape == (3, 16) and batch.restart
    tokens = np.asarray(corpus.train.tokens, dtype=np.int64)
    places = np.lib.stride_tricks.sliding_window_view(tokens, 17)
    for row, targets in zip(batch.inputs, batch.targets, strict=True):
        window = torch.cat([row, targets[-1:]]).numpy()
        assert (places == window).all(axis=1).any()
        assert torch.equal(row[1:], targets[:-1])


def test_carried_rows_go_on_where_the_batch_before_ended(corpus):
    batches = make(corpus, "carried")
    before, epochs = next(batches), 1
    assert before.restart
    for _ in range(200):
        batch = next(batches)
        epochs += batch.restart
        if not batch.restart:
            # The first input of a row is the last target of the same row.
            assert torch.equal(batch.inputs[:, 0], before.targets[:, -1])
        before = batch
    assert epochs > 2


def test_packed_documents_predict_nothing_across_a_boundary(corpus):
    offsets = set(corpus.train.document_offsets.tolist())
    tokens = np.asarray(corpus.train.tokens, dtype=np.int64)
    batches = make(corpus, "documents", rows=2, length=40)
    ignored = 0
    for _ in range(10):
        batch = next(batches)
        assert batch.cu_seqlens is not None and batch.inputs.shape == (1, 80)
        boundaries = batch.cu_seqlens.tolist()
        assert boundaries == sorted(set(boundaries)) and boundaries[0] == 0 and {40, 80} <= set(boundaries)
        for row in range(2):
            inputs, targets = batch.inputs[0, 40 * row : 40 * row + 40], batch.targets[0, 40 * row : 40 * row + 40]
            filled = torch.where(targets == -100, 0, targets)
            place = next(
                start
                for start in range(len(tokens) - 40)
                if np.array_equal(tokens[start : start + 40], inputs)
                and (targets == -100).any() == bool(offsets & set(range(start + 1, start + 41)))
                and all(tokens[start + 1 + k] == filled[k] for k in range(40) if targets[k] != -100)
            )
            expected = {k for k in range(40) if place + k + 1 in offsets}
            assert {k for k in range(40) if targets[k] == -100} == expected
            inside = {place + b - 40 * row for b in boundaries if 40 * row < b < 40 * row + 40}
            assert inside == {place + k + 1 for k in expected if k < 39}
            ignored += len(expected)
    assert ignored > 5


def test_what_cannot_be_batched_is_refused(corpus):
    with pytest.raises(ConfigError, match="expected one of fresh, carried, documents"):
        make(corpus, "carry")
    with pytest.raises(DataError, match="too few for 8 contiguous rows of 16"):
        TrainingBatches(
            TokenDataset.from_ids("short", range(100)), sequence_length=16, batch_size=8, context="carried", seed=0
        )
    with pytest.raises(CheckpointError, match="another way of starting"):
        make(corpus, "carried").load_state_dict(make(corpus, "fresh").state_dict())
