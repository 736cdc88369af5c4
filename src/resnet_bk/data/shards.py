"""Token shards: documents as one memory-mapped array of token ids on disk.

A shard called `train` is three files in one folder:

- `train.bin`: the token ids of all documents, little-endian uint16 where the vocabulary has at most 65,536 ids, else
  uint32. Each document is followed by the tokenizer's end-of-text token, if it has one.
- `train.documents.bin`: little-endian int64 `[documents + 1]`, where each document starts in `train.bin` (its
  end-of-text token belongs to it), and at last the number of tokens.
- `train.json`: format version, dtype, counts, text bytes, and the SHA-256 of the tokenizer, the text and both files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from resnet_bk.data.files import Document
from resnet_bk.errors import DataError
from resnet_bk.tokenizer import Tokenizer

FORMAT_VERSION = 1
_BATCH_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class ShardIndex:
    """What a shard's `.json` file says."""

    format_version: int
    dtype: str
    """Of the token ids: `uint16` or `uint32`."""
    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of text that the tokens decode to; end-of-text tokens count 0."""
    vocab_size: int
    """Of the tokenizer; every id is below it."""
    tokenizer_sha256: str
    text_sha256: str
    """Of the documents' names and texts, in order."""
    tokens_sha256: str
    """Of `.bin`."""
    offsets_sha256: str
    """Of `.documents.bin`."""


@dataclass(frozen=True)
class TokenDataset:
    """The token ids of one split, memory-mapped by `open_shard` or held in memory by `from_ids`."""

    name: str
    tokens: np.ndarray
    """Ids of all documents in order, unsigned integers `[tokens]`, read-only."""
    document_offsets: np.ndarray
    """Where each document starts, and the end, int64 `[documents + 1]`."""
    text_bytes: int
    """UTF-8 bytes of text that all tokens decode to; end-of-text tokens count 0."""
    sha256: str
    """Of the token ids as stored."""

    @classmethod
    def from_ids(cls, name: str, ids: Sequence[int] | np.ndarray, *, text_bytes: int = 0) -> TokenDataset:
        """A dataset of one document in memory, for synthetic data and short texts."""
        tokens = np.array(ids, dtype="<u4")
        tokens.flags.writeable = False
        return cls(name, tokens, np.array([0, len(tokens)]), text_bytes, hashlib.sha256(tokens.tobytes()).hexdigest())

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents, each with at least one token."""
        return len(self.document_offsets) - 1

    def document(self, number: int) -> np.ndarray:
        """Token ids of one document, its end-of-text token included; raises `DataError` for a number out of range."""
        if not 0 <= number < self.num_documents:
            raise DataError(f"{self.name} has documents 0 to {self.num_documents - 1}; {number} was asked for.")
        return self.tokens[self.document_offsets[number] : self.document_offsets[number + 1]]


def write_shard(folder: Path, name: str, documents: Iterable[Document], tokenizer: Tokenizer) -> ShardIndex:
    """The index of the shard `name` written into `folder`, which must exist.

    `text_bytes` is counted from the tokens where the tokenizer tells the bytes of each, so that it is the sum over any
    partition of the tokens; otherwise from the documents.

    Raises:
        DataError: `documents` holds no text.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    separator = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
    text_digest, tokens_digest = hashlib.sha256(), hashlib.sha256()
    offsets, document_bytes, token_bytes = [0], 0, 0
    lengths = tokenizer.byte_lengths
    with (folder / f"{name}.bin").open("wb") as stream:
        for batch in _batches(documents):
            for document in batch:
                text_digest.update(f"{document.name}\0{document.text}\0".encode())
                document_bytes += len(document.text.encode())
            for ids in tokenizer.encode_batch([document.text for document in batch]):
                if ids:
                    array = np.array(ids + separator, dtype=dtype)
                    token_bytes += 0 if lengths is None else int(lengths[array].sum())
                    tokens_digest.update(array.tobytes())
                    stream.write(array.tobytes())
                    offsets.append(offsets[-1] + len(array))
    if len(offsets) == 1:
        raise DataError(f"The {name} split holds no text; expected at least one document.")
    offset_bytes = np.array(offsets, dtype="<i8").tobytes()
    (folder / f"{name}.documents.bin").write_bytes(offset_bytes)
    index = ShardIndex(
        format_version=FORMAT_VERSION,
        dtype="uint16" if dtype.itemsize == 2 else "uint32",
        tokens=offsets[-1],
        documents=len(offsets) - 1,
        text_bytes=document_bytes if lengths is None else token_bytes,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        text_sha256=text_digest.hexdigest(),
        tokens_sha256=tokens_digest.hexdigest(),
        offsets_sha256=hashlib.sha256(offset_bytes).hexdigest(),
    )
    (folder / f"{name}.json").write_text(json.dumps(asdict(index), indent=2) + "\n", encoding="utf-8")
    return index


def open_shard(folder: Path, name: str) -> TokenDataset:
    """The shard `name` in `folder`, mapped into memory after its hashes have been checked (one read of the files).

    Raises:
        DataError: a file is missing, truncated or changed; the message names it.
    """
    index = _read_index(folder / f"{name}.json")
    dtype = "<u2" if index.dtype == "uint16" else "<u4"
    tokens = _map(folder / f"{name}.bin", dtype, index.tokens, index.tokens_sha256)
    offsets = _map(folder / f"{name}.documents.bin", "<i8", index.documents + 1, index.offsets_sha256)
    return TokenDataset(name, tokens, offsets, index.text_bytes, index.tokens_sha256)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups large enough to keep the encoder's threads busy and small enough for memory."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _read_index(file: Path) -> ShardIndex:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DataError(f"Token shard index {file} does not exist; prepare the corpus again.") from None
    except ValueError:
        raise DataError(f"Token shard index {file} is not JSON; prepare the corpus again.") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise DataError(f"Token shard index {file} is not of format {FORMAT_VERSION}; prepare the corpus again.")
    if set(content) != {field.name for field in fields(ShardIndex)}:
        raise DataError(f"Token shard index {file} has missing or unknown fields; prepare the corpus again.")
    return ShardIndex(**content)


def _map(file: Path, dtype: str, length: int, sha256: str) -> np.ndarray:
    expected = length * np.dtype(dtype).itemsize
    if not file.is_file():
        raise DataError(f"Token shard {file} does not exist; prepare the corpus again.")
    if file.stat().st_size != expected:
        raise DataError(
            f"Token shard {file} has {file.stat().st_size} bytes; its index says {expected}. Prepare the corpus again."
        )
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
            raise DataError(f"Token shard {file} has changed since it was written; prepare the corpus again.")
    return np.memmap(file, dtype=dtype, mode="r", shape=(length,))
