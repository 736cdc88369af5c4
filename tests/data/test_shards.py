"""Token shards: contents, byte counts, and damage found by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from resnet_bk.data.files import Document
from resnet_bk.data.shards import TokenDataset, open_shard, write_shard
from resnet_bk.errors import DataError
from resnet_bk.tokenizer import Tokenizer

DOCUMENTS = [Document("one", "naïve text\n"), Document("empty", ""), Document("two", "more 数学")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some naïve text, more text"], 270)


@pytest.fixture
def folder(tmp_path, tokenizer: Tokenizer) -> Path:
    write_shard(tmp_path, "train", DOCUMENTS, tokenizer)
    return tmp_path


def test_documents_come_back_each_with_its_separator(folder: Path, tokenizer: Tokenizer) -> None:
    dataset = open_shard(folder, "train")
    assert dataset.num_documents == 2
    for number, document in enumerate((DOCUMENTS[0], DOCUMENTS[2])):
        assert dataset.document(number).tolist() == [*tokenizer.encode(document.text), tokenizer.end_of_text_id]
    assert np.concatenate([dataset.document(0), dataset.document(1)]).tolist() == dataset.tokens.tolist()
    assert len(dataset) == len(dataset.tokens) == dataset.document_offsets[-1]
    for number in (-1, 2):
        with pytest.raises(DataError, match="train has documents 0 to 1"):
            dataset.document(number)


def test_tokens_are_little_endian_and_read_only(folder: Path) -> None:
    dataset = open_shard(folder, "train")
    raw = (folder / "train.bin").read_bytes()
    assert [int.from_bytes(raw[i : i + 2], "little") for i in range(0, len(raw), 2)] == dataset.tokens.tolist()
    with pytest.raises(ValueError, match="read-only"):
        dataset.tokens[0] = 1


def test_text_bytes_are_those_of_the_text_in_any_partition(folder: Path, tokenizer: Tokenizer) -> None:
    dataset = open_shard(folder, "train")
    assert dataset.text_bytes == sum(len(document.text.encode()) for document in DOCUMENTS)
    for cut in range(len(dataset)):
        parts = tokenizer.text_bytes(dataset.tokens[:cut]) + tokenizer.text_bytes(dataset.tokens[cut:])
        assert parts == dataset.text_bytes


def test_a_spelt_out_separator_stands_for_no_text(tmp_path, tokenizer: Tokenizer) -> None:
    index = write_shard(tmp_path, "train", [Document("one", "ab<|endoftext|>cd")], tokenizer)
    assert index.text_bytes == 4
    assert open_shard(tmp_path, "train").tokens.tolist().count(tokenizer.end_of_text_id) == 2


def test_large_vocabularies_use_four_bytes(tmp_path) -> None:
    tokenizer = Tokenizer.words([f"w{number}" for number in range(70_000)])
    write_shard(tmp_path, "train", [Document("one", "w69999 w3\n")], tokenizer)
    dataset = open_shard(tmp_path, "train")
    assert dataset.tokens.dtype == np.uint32
    assert dataset.tokens.tolist() == [69_999, 3, 70_000]  # no separator: words have no end of text


def test_many_documents_are_written_in_batches(tmp_path, tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("resnet_bk.data.shards._BATCH_CHARACTERS", 10)
    documents = [Document(str(number), f"text {number}") for number in range(20)]
    index = write_shard(tmp_path, "train", documents, tokenizer)
    assert index.documents == 20
    dataset = open_shard(tmp_path, "train")
    assert [tokenizer.decode(dataset.document(number)) for number in range(20)] == [d.text for d in documents]


def test_a_split_without_text_is_refused(tmp_path, tokenizer: Tokenizer) -> None:
    for documents in ([], [Document("empty", "")]):
        with pytest.raises(DataError, match="The validation split holds no text"):
            write_shard(tmp_path, "validation", documents, tokenizer)


@pytest.mark.parametrize("name", ["train.bin", "train.documents.bin"])
def test_damaged_files_are_refused_by_name(name: str, folder: Path) -> None:
    file = folder / name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"{name} has {len(content) - 1} bytes; its index says {len(content)}"):
        open_shard(folder, "train")
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DataError, match=rf"{name} has changed since it was written"):
        open_shard(folder, "train")
    file.unlink()
    with pytest.raises(DataError, match=rf"{name} does not exist"):
        open_shard(folder, "train")


def test_damaged_indexes_are_refused_by_name(folder: Path) -> None:
    file = folder / "train.json"
    content = json.loads(file.read_text())
    for damaged, message in (
        ("{", "is not JSON"),
        ("[]", "is not of format 1"),
        (json.dumps({**content, "format_version": 2}), "is not of format 1"),
        (json.dumps({**content, "extra": 2}), "has missing or unknown fields"),
    ):
        file.write_text(damaged)
        with pytest.raises(DataError, match=rf"train\.json {message}"):
            open_shard(folder, "train")
    file.unlink()
    with pytest.raises(DataError, match=r"train\.json does not exist"):
        open_shard(folder, "train")


def test_ids_in_memory_are_a_dataset() -> None:
    dataset = TokenDataset.from_ids("noise", [3, 1, 2])
    assert dataset.document(0).tolist() == [3, 1, 2]
    assert dataset.sha256 != TokenDataset.from_ids("noise", [3, 1, 4]).sha256
