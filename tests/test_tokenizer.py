"""Tokenizers: exact round trips, determinism, foreign files, byte counts and streaming."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_bk.errors import ConfigError, DataError
from resnet_bk.tokenizer import StreamDecoder, Tokenizer

CORPUS = [
    "def resolvent(energy):\n    return 1 / (potential - energy)\n\n\n# naïve café 数学 🙂\n",
    "The resolvent of a tridiagonal operator is semiseparable; the resolvent decays.\n" * 5,
]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train(CORPUS, 300)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.words(["the", "<eos>", "lobster", "is", "<unk>", ","])


@given(text=UNICODE)
def test_bpe_is_lossless_on_any_text(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.text_bytes(ids) == len(text.encode())
    assert all(0 <= token < bpe.vocab_size for token in ids)


def test_bpe_learns_merges_and_reserves_the_separator(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 300
    assert bpe.end_of_text_id == 0
    assert len(bpe.encode(" resolvent")) < len(" resolvent") / 2
    assert bpe.encode("a<|endoftext|>b") == [*bpe.encode("a"), 0, *bpe.encode("b")]
    assert bpe.decode([*bpe.encode("a"), 0]) == "a"
    assert bpe.decode([*bpe.encode("a"), 0], skip_special_tokens=False) == "a<|endoftext|>"
    assert bpe.text_bytes([0]) == 0


def test_bytes_of_a_long_stream_are_counted_piece_by_piece(bpe: Tokenizer, tmp_path) -> None:
    path = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(bpe.vocab_size, size=3_000_001, dtype=np.uint16).tofile(path)
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    expected = np.bincount(tokens, minlength=bpe.vocab_size) @ bpe.byte_lengths
    tracemalloc.start()
    assert bpe.text_bytes(tokens) == expected
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_001 * 8 / 2


def test_same_texts_give_the_same_tokenizer_in_another_process(bpe: Tokenizer) -> None:
    code = (
        "import json, sys; from resnet_bk.tokenizer import Tokenizer;"
        "print(Tokenizer.train(json.loads(sys.argv[1]), 300).sha256)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(CORPUS)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"},
    )
    assert run.stdout.strip() == bpe.sha256


def test_long_texts_encode_as_if_uncut(bpe: Tokenizer) -> None:
    unit = "if x:\n\n    return  'naïve'\n \n\tit's 12 \r\n数学\n"
    text = unit * (200_000 // len(unit))
    assert len(bpe._pieces(text)) > 1
    assert bpe.encode(text) == bpe._engine.encode(text).ids
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode(bpe.encode("no line end " * 10_000)) == "no line end " * 10_000


def test_a_small_corpus_yields_fewer_tokens_than_allowed() -> None:
    assert Tokenizer.train(["ab ab ab"], 1000).vocab_size < 300


def test_training_errors_name_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size is 100; .* at least 257"):
        Tokenizer.train(["text"], 100)
    with pytest.raises(DataError, match="no text"):
        Tokenizer.train([], 300)


def test_save_and_load_keep_the_tokenizer(bpe: Tokenizer, words: Tokenizer, tmp_path) -> None:
    for tokenizer, text in ((bpe, CORPUS[0]), (words, " the lobster \n")):
        folder = tmp_path / tokenizer.sha256
        assert tokenizer.save(folder) == folder / "tokenizer.json"
        assert tokenizer.save(tmp_path / "other.json") == tmp_path / "other.json"
        for path in (folder, folder / "tokenizer.json", tmp_path / "other.json"):
            loaded = Tokenizer.from_file(path)
            assert loaded.sha256 == tokenizer.sha256
            assert loaded.encode(text) == tokenizer.encode(text)
            assert loaded.end_of_text_id == tokenizer.end_of_text_id
            every_id = np.arange(tokenizer.vocab_size)
            assert loaded.text_bytes(every_id) == tokenizer.text_bytes(every_id) > 0
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["other.json"]


def test_gpt2_style_folder(bpe: Tokenizer, tmp_path) -> None:
    model = json.loads(bpe._engine.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    loaded = Tokenizer.from_file(tmp_path)
    assert loaded.encode(CORPUS[0] + "<|endoftext|>") == bpe.encode(CORPUS[0] + "<|endoftext|>")
    assert (loaded.vocab_size, loaded.end_of_text_id) == (300, 0)
    (tmp_path / "merges.txt").write_bytes(b"a b\n\xff")
    with pytest.raises(DataError, match=r"merges\.txt is not UTF-8: byte 4"):
        Tokenizer.from_file(tmp_path)


def _tokenizer_json(**changes: object) -> str:
    definition = json.loads(Tokenizer.words(["a"])._engine.to_str())
    return json.dumps({**definition, **changes})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{nonsense", "is not JSON"),
        ("[1]", "holds a list"),
        ("{}", "no 'model' section"),
        (_tokenizer_json(model={"type": "Nothing", "vocab": {"a": 0}}), "not a usable tokenizer"),
        (_tokenizer_json(model={"type": "BPE", "vocab": {}, "merges": []}), "vocabulary is empty"),
        (_tokenizer_json(model={"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}), "token 'ab'"),
        (_tokenizer_json(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}), "not a pair"),
        (_tokenizer_json(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}), "unknown token '\\?'"),
    ],
)
def test_broken_files_are_refused_by_name(content: str, message: str, tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=f"tokenizer.json .*{message}"):
        Tokenizer.from_file(tmp_path)


def test_missing_files_are_refused_by_name(tmp_path) -> None:
    with pytest.raises(DataError, match=r"absent\.json does not exist"):
        Tokenizer.from_file(tmp_path / "absent.json")
    with pytest.raises(DataError, match=r"holds no tokenizer; expected tokenizer.json"):
        Tokenizer.from_file(tmp_path)


def test_text_that_is_not_unicode_is_refused(bpe: Tokenizer) -> None:
    with pytest.raises(DataError, match="lone surrogates"):
        bpe.encode("half a pair: \ud83d")


def test_words_follow_the_wikitext_convention(words: Tokenizer) -> None:
    text = " the lobster , \n \n is the \n"
    assert words.encode(text) == [0, 2, 5, 1, 1, 3, 0, 1]
    assert words.decode(words.encode(text)) == text
    assert words.text_bytes(words.encode(text)) == len(text.encode())
    assert words.encode("the crab") == [0, 4]
    assert words.vocab_size == 6
    assert words.end_of_text_id is None


def test_long_word_level_texts_encode_as_if_uncut(words: Tokenizer) -> None:
    text = " the lobster , is \n \n" * 10_000
    assert len(words._pieces(text)) > 1
    assert words.encode(text) == [0, 2, 5, 3, 1, 1] * 10_000


def test_words_adds_the_two_tokens_it_needs() -> None:
    tokenizer = Tokenizer.words(["a"])
    assert (tokenizer.vocab_size, tokenizer.encode("a\nz")) == (3, [0, 1, 2])


def test_bytes_per_token_are_refused_where_they_are_not_known(tmp_path) -> None:
    definition = _tokenizer_json(
        model={
            "type": "WordPiece",
            "vocab": {"a": 0, "##b": 1, "?": 2},
            "unk_token": "?",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )
    (tmp_path / "tokenizer.json").write_text(definition)
    tokenizer = Tokenizer.from_file(tmp_path)
    assert tokenizer.encode("ab") == [0, 1]
    assert tokenizer.byte_lengths is None
    with pytest.raises(DataError, match="this one is WordPiece"):
        tokenizer.text_bytes([0])


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_streamed_text_joins_to_the_decoded_text(bpe: Tokenizer, ids: list[int]) -> None:
    # Any ids, so also byte sequences that are not UTF-8.
    stream = StreamDecoder(bpe)
    assert "".join([*map(stream.push, ids), stream.finish()]) == bpe.decode(ids)


def test_streams_hold_back_incomplete_characters(bpe: Tokenizer) -> None:
    stream = StreamDecoder(bpe)
    ids = bpe.encode("é🚀!")
    shown = [stream.push(token) for token in ids]
    assert "".join(shown) == "é🚀!"
    assert "" in shown and not any("\ufffd" in text for text in shown)
    assert stream.finish() == ""
    stream.push(ids[0])
    assert stream.finish() == "\ufffd"


def test_streamed_words_match_the_decoded_text(words: Tokenizer) -> None:
    ids = words.encode(" the lobster \n is \n")
    stream = StreamDecoder(words)
    assert [stream.push(token) for token in ids] == [" the", " lobster", " \n", " is", " \n"]
