"""The tokens of a comparison: prepared from a corpus by name, or read from a folder or file that is already tokens."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resnet_bk.data.config import DataConfig
from resnet_bk.data.prepare import prepare_corpus
from resnet_bk.data.shards import TokenDataset, open_shard
from resnet_bk.data.sources import WORD_LEVEL
from resnet_bk.errors import ConfigError, DataError
from resnet_bk.tokenizer import Tokenizer

HELD_OUT = 0.02
"""Share of a single file of tokens that is validation, and as much again that is test."""

_MOST_WORDS = 1 << 24


@dataclass(frozen=True)
class ExperimentCorpus:
    """Token ids of the splits of one corpus, and what is needed to say how good a model of them is."""

    name: str
    vocab_size: int
    """Every id is below it; models of this corpus have so many."""
    train: TokenDataset
    validation: TokenDataset
    test: TokenDataset | None
    byte_lengths: np.ndarray | None
    """UTF-8 bytes that each id stands for, int64 `[vocab_size]`; None where that is not known."""

    def text_bytes(self, tokens: np.ndarray) -> int | None:
        """UTF-8 bytes that `tokens` stand for; None where that is not known."""
        if self.byte_lengths is None:
            return None
        return int(self.byte_lengths[np.asarray(tokens, dtype=np.int64)].sum()) or None

    @property
    def splits(self) -> dict[str, TokenDataset]:
        """The splits that are evaluated, by name."""
        return {split.name: split for split in (self.validation, self.test) if split is not None}

    @property
    def identity(self) -> dict[str, str]:
        """Name and hash of the tokens of every split: equal for the same data wherever they lie."""
        return {split.name: split.sha256 for split in (self.train, *self.splits.values())}


@dataclass(frozen=True)
class CorpusSource:
    """Where the tokens come from; small enough to send to another process, which then opens them itself."""

    tokens: str | None = None
    """Folder or file for `open_tokens`; None prepares `data`."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Corpus to prepare."""
    vocab_size: int = 4096
    """Ids of a tokenizer that is trained on the corpus; a word-level corpus has its own."""

    def open(self) -> ExperimentCorpus:
        """The corpus; raises as `open_tokens` and `prepare_corpus` do."""
        if self.tokens is not None:
            return open_tokens(self.tokens)
        words = self.data.name in WORD_LEVEL
        corpus = prepare_corpus(self.data, _MOST_WORDS if words else self.vocab_size)
        tokenizer = corpus.tokenizer
        return ExperimentCorpus(
            self.data.name, tokenizer.vocab_size, corpus.train, corpus.validation, corpus.test, tokenizer.byte_lengths
        )


def open_tokens(path: str | Path) -> ExperimentCorpus:
    """The corpus in a folder of token shards, or in one `.npy` file of token ids.

    A folder is what `prepare_corpus` leaves in its cache: `train`, `validation` and perhaps `test` shards, and a
    `tokenizer.json` for the bytes of each token, which may be missing. A file holds one row of integers; its last
    2 % are test, the 2 % before them validation.

    Raises:
        DataError: nothing there, or neither of the two; the message names the file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.suffix != ".npy":
        raise DataError(f"{path} is neither a folder of token shards nor a .npy file of token ids.")
    try:
        ids = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a .npy file ({str(error).splitlines()[0]}).") from None
    held_out = int(len(ids) * HELD_OUT) if ids.ndim == 1 else 0
    if not np.issubdtype(ids.dtype, np.integer) or held_out < 2:
        raise DataError(
            f"{path} holds {ids.dtype} {list(ids.shape)}; expected one row of at least {int(2 / HELD_OUT)} integers."
        )
    if ids.min() < 0:
        raise DataError(f"{path} holds the id {ids.min()}; expected ids >= 0.")
    cuts = {"train": (0, -2 * held_out), "validation": (-2 * held_out, -held_out), "test": (-held_out, len(ids))}
    parts = {name: TokenDataset.from_ids(name, ids[start:stop]) for name, (start, stop) in cuts.items()}
    return ExperimentCorpus(
        path.stem, int(ids.max()) + 1, parts["train"], parts["validation"], parts["test"], byte_lengths=None
    )


def _open_folder(folder: Path) -> ExperimentCorpus:
    train, validation = open_shard(folder, "train"), open_shard(folder, "validation")
    test = open_shard(folder, "test") if (folder / "test.json").is_file() else None
    vocab_size = json.loads((folder / "train.json").read_bytes())["vocab_size"]
    byte_lengths = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(folder)
        if tokenizer.vocab_size != vocab_size:
            raise ConfigError(
                f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} ids, but the shards beside it were made with "
                f"{vocab_size}; put their own tokenizer there, or none."
            )
        byte_lengths = tokenizer.byte_lengths
    return ExperimentCorpus(_corpus_name(folder), vocab_size, train, validation, test, byte_lengths)


def _corpus_name(folder: Path) -> str:
    """What the corpus was called when it was prepared; the folder's name where nothing says it."""
    try:
        return json.loads((folder / "corpus.json").read_bytes())["config"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return folder.name
