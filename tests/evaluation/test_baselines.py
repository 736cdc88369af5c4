from __future__ import annotations

import lzma
import math
import random

import numpy as np
import pytest

from resnet_bk.errors import DomainError
from resnet_bk.evaluation.baselines import token_counts, unigram_bits_per_byte, xz_bits_per_byte


def test_token_counts():
    tokens = np.array([0, 3, 3, 1], dtype=np.uint16)
    assert token_counts(tokens, 5).tolist() == [1, 1, 0, 2, 0]
    with pytest.raises(DomainError, match=r"id 3; expected ids in \[0, 3\)"):
        token_counts(tokens, 3)


def test_unigram_by_hand():
    """Counts 3, 1, 0 with one added to each: probabilities 4/7, 2/7, 1/7."""
    found = unigram_bits_per_byte(np.array([3, 1, 0]), np.array([0, 1, 2, 2]), text_bytes=10)
    expected = -(math.log2(4 / 7) + math.log2(2 / 7) + 2 * math.log2(1 / 7)) / 10
    assert found == pytest.approx(expected, rel=1e-14)


def test_unigram_of_a_uniform_source_is_its_entropy():
    tokens = np.tile(np.arange(8), 1000)
    assert unigram_bits_per_byte(token_counts(tokens, 8), tokens, text_bytes=len(tokens)) == pytest.approx(3.0)


def test_unigram_rejects_nothing_to_predict():
    with pytest.raises(DomainError, match="0 tokens of 10 bytes"):
        unigram_bits_per_byte(np.ones(3), np.array([], dtype=np.int64), text_bytes=10)


def test_xz_matches_the_compressor_and_bounds_random_bytes():
    text = b"for line in lines:\n    print(line)\n" * 40
    assert xz_bits_per_byte(text) == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    noise = random.Random(0).randbytes(4000)
    assert 8.0 <= xz_bits_per_byte(noise) < 8.3


def test_xz_primer_helps():
    generator = random.Random(1)
    text = generator.randbytes(2000)
    assert xz_bits_per_byte(text, primer=generator.randbytes(500) + text) < 0.5 < xz_bits_per_byte(text)


def test_xz_rejects_empty_text():
    with pytest.raises(DomainError, match="text is empty"):
        xz_bits_per_byte(b"")
