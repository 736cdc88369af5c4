"""`prepare_corpus`: a corpus tokenized once into the cache, and from then on mapped from there.

A prepared corpus is a folder of the cache: `tokenizer.json`, one shard a split, and `corpus.json`, which says what it
is. Its name ends in a hash of the corpus, the tokenizer and the configuration. It is written under a temporary name and
renamed when complete; one whose hashes no longer fit is prepared anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_bk.data.config import DataConfig
from resnet_bk.data.files import Document
from resnet_bk.data.shards import FORMAT_VERSION, TokenDataset, open_shard, write_shard
from resnet_bk.data.sources import Corpus, name_fraction, open_corpus
from resnet_bk.errors import ConfigError, DataError
from resnet_bk.tokenizer import END_OF_LINE, Tokenizer

TOKENIZER_SAMPLE_CHARACTERS = 16_000_000
"""Characters of the training split that a tokenizer is trained on, at most."""

_PIECE_CHARACTERS = 1 << 16
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus ready for training and evaluation.

    Bits per byte of a split are the summed loss of its tokens over ln 2 and over its text bytes. End-of-text tokens
    are predicted like any other, so their loss counts, but they stand for no byte of text; on word-level text a word
    counts with the space before it, and a line end as the two bytes it is in the files.
    """

    tokenizer: Tokenizer
    train: TokenDataset
    validation: TokenDataset
    test: TokenDataset | None
    """None where the corpus has no test split."""
    corpus_sha256: str
    """Of the names and texts of all documents as split and read; record it beside every result."""

    @property
    def text_bytes(self) -> dict[str, int]:
        """UTF-8 bytes of text in each split."""
        splits = (self.train, self.validation, self.test)
        return {split.name: split.text_bytes for split in splits if split is not None}


def prepare_corpus(config: DataConfig, vocab_size: int) -> PreparedCorpus:
    """The corpus of `config`, tokenized with its tokenizer, or with one trained on it to at most `vocab_size` ids.

    Raises:
        ConfigError: `config` names no corpus, or the tokenizer has more than `vocab_size` ids.
        DataError: the corpus or the tokenizer cannot be used, or the cache folder cannot be written.
        MissingDependencyError: the corpus needs an optional package.
    """
    corpus = open_corpus(config)
    tokenizer = None if config.tokenizer is None else Tokenizer.from_file(config.tokenizer)
    if tokenizer is not None:
        _check_size(tokenizer, vocab_size)
    identity = _identity(corpus, config, tokenizer, vocab_size)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    cache = cache_folder(config)
    folder = cache / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', config.name)}-{key[:20]}"
    if folder.is_dir():
        try:
            return _open(folder, vocab_size)
        except DataError as error:
            _log.warning("%s Preparing %s anew.", error, folder)
            shutil.rmtree(folder)
    temporary = _temporary_folder(cache, folder.name)
    try:
        _write(temporary, corpus, identity, tokenizer or _tokenizer_of(corpus, vocab_size), vocab_size)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process may have prepared the same corpus in the meantime; anything else is an error.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _open(folder, vocab_size)


def cache_folder(config: DataConfig) -> Path:
    """Where prepared corpora are kept: `data.cache_dir`, else `resnet-bk` in the user's cache folder."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet-bk"


def tokenizer_sample(documents: Iterable[Document], limit: int = TOKENIZER_SAMPLE_CHARACTERS) -> list[str]:
    """Pieces of `documents`, at most `limit` characters in all, spread over the whole corpus.

    Pieces are kept by the hash of their names, and whenever there are too many, the upper half of the hashes goes; so
    the sample depends on the documents alone.
    """
    kept: list[tuple[float, str]] = []
    characters, threshold = 0, 1.0
    for document in documents:
        for start in range(0, len(document.text), _PIECE_CHARACTERS):
            fraction = name_fraction(f"{document.name}@{start}")
            if fraction < threshold:
                kept.append((fraction, document.text[start : start + _PIECE_CHARACTERS]))
                characters += len(kept[-1][1])
            while characters > limit:
                threshold /= 2
                kept = [piece for piece in kept if piece[0] < threshold]
                characters = sum(len(text) for _, text in kept)
    return [text for _, text in kept]


def _identity(corpus: Corpus, config: DataConfig, tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Any]:
    """What decides every byte of the prepared corpus."""
    trained = None if corpus.word_level else [vocab_size, TOKENIZER_SAMPLE_CHARACTERS]
    settings = dataclasses.asdict(config)
    for name in ("path", "cache_dir", "tokenizer"):  # the contents count, wherever they lie
        del settings[name]
    return {
        "format_version": FORMAT_VERSION,
        "corpus": corpus.fingerprint,
        "config": settings,
        "tokenizer": trained if tokenizer is None else tokenizer.sha256,
    }


def _tokenizer_of(corpus: Corpus, vocab_size: int) -> Tokenizer:
    if not corpus.word_level:
        _log.info("Training a tokenizer of %d ids on %s.", vocab_size, corpus.name)
        return Tokenizer.train(tokenizer_sample(corpus.documents("train")), vocab_size)
    return Tokenizer.words(list(dict.fromkeys(_words(corpus.documents("train")))))


def _words(documents: Iterable[Document]) -> Iterator[str]:
    for document in documents:
        for line in document.text.split("\n"):
            yield from line.split()
            yield END_OF_LINE


def _write(folder: Path, corpus: Corpus, identity: dict[str, Any], tokenizer: Tokenizer, vocab_size: int) -> None:
    _check_size(tokenizer, vocab_size)
    tokenizer.save(folder)
    digest = hashlib.sha256()
    for split in corpus.readers:
        _log.info("Tokenizing the %s split of %s.", split, corpus.name)
        index = write_shard(folder, split, corpus.documents(split), tokenizer)
        digest.update(f"{split}\0{index.text_sha256}\0".encode())
    content = {**identity, "splits": list(corpus.readers), "corpus_sha256": digest.hexdigest()}
    (folder / "corpus.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _open(folder: Path, vocab_size: int) -> PreparedCorpus:
    tokenizer = Tokenizer.from_file(folder)
    _check_size(tokenizer, vocab_size)
    try:
        content = json.loads((folder / "corpus.json").read_bytes())
        splits, corpus_sha256 = content["splits"], content["corpus_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'corpus.json'} is missing or damaged ({error!r}).") from None
    shards = {split: open_shard(folder, split) for split in splits}
    return PreparedCorpus(tokenizer, shards["train"], shards["validation"], shards.get("test"), corpus_sha256)


def _check_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size is {vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids; "
            f"set model.vocab_size to {tokenizer.vocab_size} or more, or choose a smaller tokenizer."
        )


def _temporary_folder(cache: Path, name: str) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{name}.", dir=cache))
    except OSError as error:
        raise DataError(
            f"The cache folder {cache} cannot be written: {error.strerror}. Set data.cache_dir to another folder."
        ) from None
