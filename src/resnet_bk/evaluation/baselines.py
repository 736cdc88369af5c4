"""Bits per byte that need no neural network: token frequencies, and a general-purpose compressor."""

from __future__ import annotations

import lzma
import math

import numpy as np

from resnet_bk.errors import DomainError

_CHUNK = 1 << 22


def token_counts(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Occurrences of every token id, int64 [vocab_size].

    Args:
        tokens: token ids [N]; a memory map is read piecewise.
        vocab_size: number of ids.

    Raises:
        DomainError: an id outside [0, vocab_size).
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _CHUNK):
        piece = np.asarray(tokens[start : start + _CHUNK])
        low, high = int(piece.min()), int(piece.max())
        if low < 0 or high >= vocab_size:
            raise DomainError(f"tokens contains id {low if low < 0 else high}; expected ids in [0, {vocab_size}).")
        counts += np.bincount(piece, minlength=vocab_size)
    return counts


def unigram_bits_per_byte(train_counts: np.ndarray, tokens: np.ndarray, *, text_bytes: int) -> float:
    """Bits per byte of `tokens` under the token frequencies of the training split, with add-one smoothing.

        p(v) = (train_counts[v] + 1) / (sum(train_counts) + vocab_size)

    A model that uses any context must do better.

    Args:
        train_counts: occurrences in the training split [vocab_size].
        tokens: validation token ids [N], the same that the model predicts.
        text_bytes: UTF-8 bytes that `tokens` stand for.
    """
    if len(tokens) == 0 or text_bytes < 1:
        raise DomainError(f"{len(tokens)} tokens of {text_bytes} bytes; expected at least one of each.")
    vocab_size = len(train_counts)
    bits = np.log2(train_counts.sum() + vocab_size) - np.log2(train_counts + 1.0)
    return math.fsum(token_counts(tokens, vocab_size) * bits) / text_bytes


def xz_bits_per_byte(text: bytes, *, primer: bytes = b"") -> float:
    """Bits per byte of `text` compressed by xz (LZMA2, preset 9 extreme).

    Args:
        text: the validation text, UTF-8.
        primer: text the compressor sees first, usually the training split; its own compressed size is subtracted.
            Beyond the 64 MiB dictionary only the primer's end helps.
    """
    if not text:
        raise DomainError("text is empty; expected at least one byte.")
    size = _xz_size(primer + text) - (_xz_size(primer) if primer else 0)
    return 8 * size / len(text)


def _xz_size(text: bytes) -> int:
    """Bytes of `text` compressed."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
