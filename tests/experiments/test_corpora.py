from __future__ import annotations

import shutil

import numpy as np
import pytest

from resnet_bk.data.config import DataConfig
from resnet_bk.errors import ConfigError, DataError
from resnet_bk.experiments.corpora import CorpusSource, open_tokens
from resnet_bk.tokenizer import Tokenizer


def test_a_folder_of_shards_brings_its_bytes(token_folder, corpus):
    tokenizer = Tokenizer.from_file(token_folder)
    assert corpus.vocab_size == tokenizer.vocab_size
    assert list(corpus.splits) == ["validation", "test"]
    for split in (corpus.train, corpus.validation):
        assert corpus.text_bytes(split.tokens) == split.text_bytes > 0


def test_without_a_tokenizer_the_bytes_are_unknown(token_folder, tmp_path):
    folder = shutil.copytree(token_folder, tmp_path / "shards")
    (folder / "tokenizer.json").unlink()
    for name in ("test.json", "test.bin", "test.documents.bin"):
        (folder / name).unlink()
    corpus = open_tokens(folder)
    assert corpus.text_bytes(corpus.train.tokens) is None
    assert list(corpus.splits) == ["validation"]


def test_another_tokenizer_is_refused(token_folder, tmp_path):
    folder = shutil.copytree(token_folder, tmp_path / "shards")
    Tokenizer.train(["other text"], 260).save(folder)
    with pytest.raises(ConfigError, match="put their own tokenizer there"):
        open_tokens(folder)


def test_one_file_is_cut_into_splits(tmp_path):
    ids = np.arange(1000) % 7
    np.save(tmp_path / "ids.npy", ids)
    corpus = open_tokens(tmp_path / "ids.npy")
    assert corpus.name == "ids" and corpus.vocab_size == 7 and corpus.test is not None
    joined = np.concatenate([corpus.train.tokens, corpus.validation.tokens, corpus.test.tokens])
    assert np.array_equal(joined, ids)
    assert len(corpus.validation) == len(corpus.test) == 20


@pytest.mark.parametrize("content", [np.zeros((2, 900), dtype=np.int64), np.zeros(50, dtype=np.int64), np.zeros(999)])
def test_files_that_are_no_row_of_ids_are_refused(tmp_path, content):
    np.save(tmp_path / "ids.npy", content)
    with pytest.raises(DataError, match="expected one row of at least 100 integers"):
        open_tokens(tmp_path / "ids.npy")


def test_paths_that_hold_no_tokens_are_named(tmp_path):
    (tmp_path / "tokens.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match=r"tokens\.bin is neither"):
        open_tokens(tmp_path / "tokens.bin")
    (tmp_path / "ids.npy").write_bytes(b"abc")
    with pytest.raises(DataError, match=r"ids\.npy cannot be read"):
        open_tokens(tmp_path / "ids.npy")
    with pytest.raises(DataError, match="does not exist"):
        open_tokens(tmp_path)


def test_a_named_corpus_is_prepared(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "one.txt").write_text("\n".join(f"line number {n}" for n in range(400)))
    data = DataConfig(name="text", path=str(text), cache_dir=str(tmp_path / "cache"), validation_fraction=0.1)
    corpus = CorpusSource(data=data, vocab_size=270).open()
    assert corpus.vocab_size <= 270 and corpus.test is not None
    # What was prepared can be carried to a machine that cannot prepare it.
    (folder,) = (tmp_path / "cache").iterdir()
    carried = open_tokens(folder)
    assert (carried.name, carried.identity) == ("text", corpus.identity)
