"""Loaders: coverage, order, exact resumption, document boundaries."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.data.loader import PackedTokenLoader, TokenLoader, permuted_index
from resnet_bk.data.shards import TokenDataset
from resnet_bk.errors import CheckpointError, ConfigError, DataError

DATASET = TokenDataset.from_ids("train", np.arange(1000))


def _epochs(loader: TokenLoader, count: int) -> list[list[list[int]]]:
    """The windows of the first epochs, in order, drawn one by one."""
    epochs: list[list[list[int]]] = [[] for _ in range(count + 1)]
    while loader.epoch < count:
        window = next(loader).input_ids[0].tolist()
        epochs[loader.epoch].append(window)
    return epochs[:count]


@given(size=st.integers(1, 300), key=st.binary(min_size=1, max_size=32))
def test_permutation_visits_every_index_once(size: int, key: bytes) -> None:
    assert sorted(permuted_index(index, size, key) for index in range(size)) == list(range(size))


def test_permutation_looks_random() -> None:
    size = 10_000
    image = np.array([permuted_index(index, size, b"key") for index in range(size)])
    # Uniform permutations: correlation with the identity 0 +- 1 / sqrt(n), n / 2 +- sqrt(n / 12) ascents, 1 fixed.
    assert abs(np.corrcoef(image, np.arange(size))[0, 1]) < 5 / size**0.5
    assert abs((np.diff(image) > 0).sum() - size / 2) < 5 * (size / 12) ** 0.5
    assert (image == np.arange(size)).sum() < 10
    other = np.array([permuted_index(index, size, b"other") for index in range(size)])
    assert (image == other).sum() < 10


def test_permutation_reaches_beyond_32_bits() -> None:
    size = 10**13
    image = {permuted_index(index, size, b"key") for index in range(100)}
    assert len(image) == 100 and max(image) > 2**40


def test_every_epoch_tiles_the_tokens_in_another_order() -> None:
    first, second = _epochs(TokenLoader(DATASET, 7, 1), 2)
    for windows in (first, second):
        flat = sorted(token for window in windows for token in window)
        assert flat == list(range(flat[0], flat[0] + len(flat)))
        assert flat[0] < 7 and flat[-1] > 1000 - 1 - 7
        assert windows != sorted(windows)
    assert first != second
    assert first[0][0] % 7 != second[0][0] % 7, "epochs are cut at the same places"


def test_batches_are_int64_rows_of_the_same_windows_whatever_their_number() -> None:
    one, four = TokenLoader(DATASET, 16, 1, seed=3), TokenLoader(DATASET, 16, 4, seed=3)
    for _ in range(50):  # into the fourth epoch
        batch = next(four).input_ids
        assert batch.dtype == torch.int64 and batch.shape == (4, 16)
        assert torch.equal(batch, torch.cat([next(one).input_ids for _ in range(4)]))
    assert four.epoch == 3


def test_the_seed_decides_the_order() -> None:
    batches = [
        torch.stack([next(loader).input_ids for _ in range(5)])
        for loader in (TokenLoader(DATASET, 16, 2, seed=seed) for seed in (0, 0, 1))
    ]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


@pytest.mark.parametrize("consumed", [0, 1, 20, 100])
def test_a_loaded_state_continues_exactly(consumed: int) -> None:
    loader = TokenLoader(DATASET, 16, 3, seed=5)
    for _ in range(consumed):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = TokenLoader(DATASET, 16, 3, seed=5)
    next(resumed)
    resumed.load_state_dict(state)
    for _ in range(50):
        assert torch.equal(next(resumed).input_ids, next(loader).input_ids)
    assert resumed.state_dict() == loader.state_dict()


def test_a_state_of_other_data_or_settings_is_refused() -> None:
    state = TokenLoader(DATASET, 16, 2).state_dict()
    others = {
        "data_sha256": TokenLoader(TokenDataset.from_ids("train", np.arange(999)), 16, 2),
        "sequence_length": TokenLoader(DATASET, 8, 2),
        "seed": TokenLoader(DATASET, 16, 2, seed=1),
    }
    for name, loader in others.items():
        with pytest.raises(CheckpointError, match=f"loader's {name} is .*, but the checkpoint was written with"):
            loader.load_state_dict(state)
    with pytest.raises(CheckpointError, match="epoch None, window 0"):
        TokenLoader(DATASET, 16, 2).load_state_dict({**state, "epoch": None})


def test_one_window_is_enough_and_less_is_refused() -> None:
    assert torch.equal(next(TokenLoader(DATASET, 1000, 2)).input_ids, torch.arange(1000).expand(2, -1))
    with pytest.raises(DataError, match=r"train split has 1000 tokens, fewer than training\.sequence_length = 1001"):
        TokenLoader(DATASET, 1001, 1)
    with pytest.raises(ConfigError, match=r"training\.sequence_length is 0"):
        TokenLoader(DATASET, 0, 1)
    with pytest.raises(ConfigError, match=r"training\.batch_size is 0"):
        TokenLoader(DATASET, 1, 0)


def test_packed_batches_mark_every_document_start() -> None:
    starts = np.array([0, 1, 40, 41, 250, 512, 998, 1000])
    dataset = TokenDataset("train", np.arange(1000, dtype=np.uint16), starts, 0, "")
    packed, plain = PackedTokenLoader(dataset, 64, seed=2), TokenLoader(dataset, 64, 1, seed=2)
    seen = set()
    for _ in range(60):
        batch = next(packed)
        assert torch.equal(batch.input_ids, next(plain).input_ids)
        assert batch.cu_seqlens is not None
        cuts = batch.cu_seqlens.tolist()
        assert cuts[0] == 0 and cuts[-1] == 64 and cuts == sorted(set(cuts))
        first = int(batch.input_ids[0, 0])
        assert {first + cut for cut in cuts[1:-1]} == {start for start in starts if first < start < first + 64}
        seen |= {first + cut for cut in cuts[1:-1]}
    assert seen >= {40, 41, 250, 512}


def test_packed_loaders_resume_exactly() -> None:
    loader = PackedTokenLoader(DATASET, 64)
    for _ in range(20):
        next(loader)
    resumed = PackedTokenLoader(DATASET, 64)
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(next(resumed).input_ids, next(loader).input_ids)
