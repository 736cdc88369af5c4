"""Prepared corpora: contents, cache, repair, refusals; the published WikiText-2 counts."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from resnet_bk.data import prepare
from resnet_bk.data.config import DataConfig
from resnet_bk.data.files import Document
from resnet_bk.data.prepare import PreparedCorpus, cache_folder, prepare_corpus, tokenizer_sample
from resnet_bk.errors import ConfigError, DataError
from resnet_bk.tokenizer import Tokenizer

REAL_WIKITEXT = Path(os.environ.get("RESNET_BK_DATA", "")) / "wikitext-2"


@pytest.fixture
def config(tmp_path) -> DataConfig:
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("train", "validation", "test"):
        (folder / f"{name}.txt").write_text(f"some {name} text, naïve\n" * 20, encoding="utf-8")
    return DataConfig(name="text", path=str(folder), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def wikitext(tmp_path) -> DataConfig:
    folder = tmp_path / "wikitext"
    folder.mkdir()
    for name, text in (("train", " \n = a <unk> = \n \n a b , \n"), ("valid", " \n b b \n"), ("test", " a c \n")):
        (folder / f"wiki.{name}.tokens").write_text(text)
    return DataConfig(name="wikitext-2", path=str(folder), cache_dir=str(tmp_path / "cache"))


def _only_folder(config: DataConfig) -> Path:
    (folder,) = cache_folder(config).iterdir()
    return folder


def _tokens(corpus: PreparedCorpus) -> list[list[int]]:
    return [split.tokens.tolist() for split in (corpus.train, corpus.validation, corpus.test) if split is not None]


def test_text_is_tokenized_with_a_tokenizer_of_its_own(config: DataConfig) -> None:
    corpus = prepare_corpus(config, 280)
    assert 256 < corpus.tokenizer.vocab_size <= 280
    assert corpus.test is not None
    for name, split in (("train", corpus.train), ("validation", corpus.validation), ("test", corpus.test)):
        text = f"some {name} text, naïve\n" * 20
        assert corpus.tokenizer.decode(split.tokens) == text
        assert split.tokens[-1] == corpus.tokenizer.end_of_text_id
        assert split.text_bytes == corpus.text_bytes[name] == len(text.encode())


def test_a_second_call_maps_what_the_first_wrote(config: DataConfig, monkeypatch) -> None:
    first = prepare_corpus(config, 280)
    monkeypatch.setattr("resnet_bk.data.prepare.write_shard", None)
    again = prepare_corpus(config, 280)
    assert _tokens(again) == _tokens(first)
    assert again.tokenizer.sha256 == first.tokenizer.sha256
    assert again.corpus_sha256 == first.corpus_sha256
    assert not [path.name for path in cache_folder(config).iterdir() if path.name.startswith(".")]


def test_changed_text_or_settings_are_prepared_apart(config: DataConfig) -> None:
    hashes = [prepare_corpus(config, 280).corpus_sha256, prepare_corpus(config, 270).corpus_sha256]
    hashes.append(prepare_corpus(dataclasses.replace(config, max_bytes=100), 280).corpus_sha256)
    (Path(config.path or "") / "train.txt").write_text("other text")
    hashes.append(prepare_corpus(config, 280).corpus_sha256)
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    assert len(list(cache_folder(config).iterdir())) == 4


@pytest.mark.parametrize(
    "name", ["train.bin", "validation.documents.bin", "test.json", "tokenizer.json", "corpus.json"]
)
def test_a_damaged_cache_is_prepared_anew(name: str, config: DataConfig, caplog) -> None:
    expected = _tokens(prepare_corpus(config, 280))
    file = _only_folder(config) / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        assert _tokens(prepare_corpus(config, 280)) == expected
    assert name in caplog.text and "anew" in caplog.text
    assert file.read_bytes() == content


def test_a_failed_preparation_leaves_nothing_behind(config: DataConfig) -> None:
    (Path(config.path or "") / "validation.txt").write_bytes(b"good \xff")
    with pytest.raises(DataError, match=r"validation\.txt is not UTF-8: byte 5"):
        prepare_corpus(config, 280)
    assert list(cache_folder(config).iterdir()) == []


def test_a_corpus_that_another_process_prepared_meanwhile_is_used(config: DataConfig, monkeypatch) -> None:
    original = prepare._write

    def slow_write(folder: Path, *arguments: Any) -> None:
        original(folder, *arguments)
        monkeypatch.setattr(prepare, "_write", original)
        prepare_corpus(config, 280)

    monkeypatch.setattr(prepare, "_write", slow_write)
    assert prepare_corpus(config, 280).text_bytes["train"] > 0
    assert _only_folder(config).name.startswith("text-")


def test_a_given_tokenizer_is_used(config: DataConfig, tmp_path) -> None:
    tokenizer = Tokenizer.train(["some other text"], 262)
    tokenizer.save(tmp_path / "model")
    given = dataclasses.replace(config, tokenizer=str(tmp_path / "model"))
    corpus = prepare_corpus(given, 300)
    assert corpus.tokenizer.sha256 == tokenizer.sha256
    assert corpus.train.document(0).tolist()[:-1] == tokenizer.encode("some train text, naïve\n" * 20)
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 261, but the tokenizer has 262 ids"):
        prepare_corpus(given, 261)


def test_words_are_counted_as_published(wikitext: DataConfig) -> None:
    corpus = prepare_corpus(wikitext, 10)
    # In the order of the training text: <eos>, =, a, <unk>, b and the comma; c is not among them.
    assert _tokens(corpus) == [[0, 1, 2, 3, 1, 0, 0, 2, 4, 5, 0], [0, 4, 4, 0], [2, 3, 0]]
    assert corpus.text_bytes["train"] == len(" \n = a <unk> = \n \n a b , \n")
    assert corpus.tokenizer.vocab_size == 6
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 5, but the tokenizer has 6 ids"):
        prepare_corpus(wikitext, 5)


def test_words_can_be_read_as_plain_text_instead(wikitext: DataConfig, tmp_path) -> None:
    Tokenizer.train(["a b"], 257).save(tmp_path)
    corpus = prepare_corpus(dataclasses.replace(wikitext, tokenizer=str(tmp_path)), 257)
    assert corpus.tokenizer.decode(corpus.validation.tokens) == " \n b b \n"


@pytest.mark.skipif(not REAL_WIKITEXT.is_dir(), reason="no folder wikitext-2 in the folder named by RESNET_BK_DATA")
def test_wikitext_2_has_the_published_counts(tmp_path) -> None:
    config = DataConfig(name="wikitext-2", path=str(REAL_WIKITEXT), cache_dir=str(tmp_path))
    corpus = prepare_corpus(config, 33_278)
    assert corpus.test is not None
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (2_088_628, 217_646, 245_569)
    assert corpus.tokenizer.vocab_size == 33_278
    assert corpus.text_bytes == {"train": 10_797_148, "validation": 1_121_681, "test": 1_256_449}


def test_the_standard_library_is_prepared(tmp_path) -> None:
    config = DataConfig(max_bytes=200_000, cache_dir=str(tmp_path))
    corpus = prepare_corpus(config, 512)
    assert corpus.tokenizer.vocab_size == 512
    assert corpus.text_bytes["train"] == 200_000
    assert corpus.validation.num_documents > 5
    assert json.loads((_only_folder(config) / "corpus.json").read_text())["corpus_sha256"] == corpus.corpus_sha256


def test_the_tokenizer_sample_spreads_over_the_corpus() -> None:
    documents = [Document(str(number), f"{number:05d}" * 20) for number in range(1000)]
    sample = tokenizer_sample(documents, limit=20_000)
    assert 5_000 < sum(map(len, sample)) <= 20_000
    positions = [int(text[:5]) for text in sample]
    assert positions == sorted(positions) and 300 < sum(positions) / len(positions) < 700
    assert tokenizer_sample(documents, limit=10**6) == [document.text for document in documents]
    assert 0 < sum(map(len, tokenizer_sample([Document("long", "x" * 10**7)], limit=10**6))) <= 10**6


def test_an_unwritable_cache_folder_is_named(config: DataConfig, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cache folder .*file.* cannot be written: .*\. Set data\.cache_dir"):
        prepare_corpus(dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "cache")), 280)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(DataConfig()) == tmp_path / "resnet-bk"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(DataConfig()) == tmp_path / ".cache" / "resnet-bk"
