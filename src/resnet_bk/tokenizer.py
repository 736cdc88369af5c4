"""`Tokenizer`: byte-level BPE and word-level tokenizers in the `tokenizer.json` format.

Byte-level BPE represents every string exactly: pre-tokens are those of GPT-2, each is written in 256 byte symbols, and
the learned merges join them. The word-level kind is the convention of WikiText: words between white space, one
`<eos>` for each line end. Both invert without loss on their own corpora, so the bytes behind every token are known.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from resnet_bk.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"

_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", END_OF_LINE)
_PIECE_TOKENS = 1 << 18
_PIECE_CHARACTERS = 1 << 16
# Long texts are encoded in pieces, because the time and memory of the engine grow faster than the text. A cut must be a
# place where every pre-tokenisation has a boundary: between ink and a line end for GPT-2, at any line end for words.
_GPT2_CUT = re.compile(r"(?<=\S)(?=\n)")
_WORDS_CUT = re.compile(r"(?<=\n)")


class Tokenizer:
    """Text to token ids and back. Build one with `train`, `words` or `from_file`."""

    def __init__(self, engine: tokenizers.Tokenizer) -> None:
        """Wrap a tokenizer of the `tokenizers` library; its padding and truncation settings are switched off."""
        engine.no_padding()
        engine.no_truncation()
        self._engine = engine
        self._cut = _cut_pattern(json.loads(engine.to_str()))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
        """A byte-level BPE tokenizer learned from `texts`; the same texts in the same order give the same tokenizer.

        Args:
            texts: documents, or pieces of them.
            vocab_size: most token ids to use, special tokens and the 256 bytes included; a small corpus yields fewer.
            special_tokens: tokens that no merge produces; they take the first ids.

        Raises:
            ConfigError: `vocab_size` has no room for the bytes and the special tokens.
            DataError: `texts` is empty.
        """
        needed = 256 + len(special_tokens)
        if vocab_size < needed:
            raise ConfigError(
                f"model.vocab_size is {vocab_size}; a byte-level tokenizer needs at least {needed} "
                f"(256 bytes and {len(special_tokens)} special tokens)."
            )
        characters = 0

        def counted() -> Iterator[str]:
            nonlocal characters
            for text in texts:
                characters += len(text)
                yield text

        engine = tokenizers.Tokenizer(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special_tokens),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        engine.train_from_iterator(counted(), trainer)
        if not characters:
            raise DataError("There is no text to train a tokenizer on; expected at least one non-empty document.")
        return cls(engine)

    @classmethod
    def words(cls, vocabulary: Sequence[str]) -> Tokenizer:
        """The word-level tokenizer of `vocabulary`, whose order gives the ids.

        White space separates words, each line end becomes `<eos>`, and words outside the vocabulary become `<unk>`;
        those two are appended where `vocabulary` lacks them. Decoding writes a space before every word and before every
        line end, as the WikiText files do.
        """
        ids = {word: index for index, word in enumerate(dict.fromkeys([*vocabulary, END_OF_LINE, UNKNOWN]))}
        engine = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
        engine.normalizer = normalizers.Replace("\n", f" {END_OF_LINE} ")
        engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        start = tokenizers.Regex("^")
        engine.decoder = decoders.Sequence([decoders.Replace(start, " "), decoders.Replace(END_OF_LINE, "\n")])
        return cls(engine)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer stored in a `tokenizer.json`, or in a folder with one or with `vocab.json` and `merges.txt`.

        Raises:
            DataError: nothing there, or not a tokenizer; the message names the file.
        """
        path = Path(path)
        if path.is_dir() and not (path / "tokenizer.json").is_file():
            vocabulary, merges = path / "vocab.json", path / "merges.txt"
            if not (vocabulary.is_file() and merges.is_file()):
                raise DataError(
                    f"{path} holds no tokenizer; expected tokenizer.json, or vocab.json together with merges.txt."
                )
            return cls(_engine(_gpt2_layout(_read_json(vocabulary), merges), vocabulary))
        file = path / "tokenizer.json" if path.is_dir() else path
        return cls(_engine(_read_json(file), file))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """The file written: `path` if it ends in .json, else `tokenizer.json` in the folder `path`."""
        path = Path(path)
        file = path if path.suffix == ".json" else path / "tokenizer.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(self._engine.to_str(pretty=True), encoding="utf-8")
        os.replace(temporary, file)
        return file

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with nothing added; special tokens spelt out in `text` become their ids.

        Raises:
            DataError: `text` is not a string of Unicode characters (lone surrogates have no UTF-8 form).
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text: `[encode(text) for text in texts]`, on all cores."""
        pieces = [self._pieces(text) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        try:
            encodings = iter(self._engine.encode_batch_fast(flat, add_special_tokens=False))
        except TypeError:
            fault = next(text for text in texts if not _is_unicode(text))
            raise DataError(
                f"Text {fault!r:.60} cannot be encoded; expected a str without lone surrogates (U+D800 to U+DFFF)."
            ) from None
        return [[token for _ in parts for token in next(encodings).ids] for parts in pieces]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that form no UTF-8 character appear as U+FFFD, ids without a token as nothing."""
        return self._engine.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def vocab_size(self) -> int:
        """Largest token id plus one."""
        return max(self._engine.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def end_of_text_id(self) -> int | None:
        """Id of the special token that ends a document; None where there is none (word-level `<eos>` ends a line)."""
        special = {token.content: index for index, token in self._added_tokens.items() if token.special}
        return next((special[name] for name in _END_OF_TEXT_NAMES if name in special), None)

    @cached_property
    def sha256(self) -> str:
        """Hash of the tokenizer's definition, in hexadecimal."""
        return hashlib.sha256(self._engine.to_str().encode()).hexdigest()

    @cached_property
    def byte_lengths(self) -> np.ndarray | None:
        """UTF-8 bytes that each token id decodes to, int64 `[vocab_size]`; special tokens count 0.

        None for a tokenizer that is neither byte-level nor word-level, since there a token's bytes depend on its place.
        """
        definition = json.loads(self._engine.to_str())
        byte_level = (definition["decoder"] or {}).get("type") == "ByteLevel"
        if not byte_level and definition["model"]["type"] != "WordLevel":
            return None
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._engine.get_vocab(with_added_tokens=True).items():
            added = self._added_tokens.get(index)
            if added is not None:
                lengths[index] = 0 if added.special else len(token.encode())
            elif byte_level:  # one symbol for each byte
                lengths[index] = len(token)
            else:
                lengths[index] = len(self._engine.decode([index]).encode())
        return lengths

    def text_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """UTF-8 bytes of the text behind `ids`, special tokens (end of text among them) counting 0.

        A memory map is read piece by piece.

        Raises:
            DataError: the bytes of single tokens are not known, see `byte_lengths`.
        """
        if self.byte_lengths is None:
            kind = json.loads(self._engine.to_str())["model"]["type"]
            raise DataError(
                f"Bytes per token are known for byte-level and word-level tokenizers only; this one is {kind}. "
                "Report perplexity, or use a byte-level tokenizer."
            )
        ids, lengths = np.asarray(ids), self.byte_lengths
        pieces = (ids[start : start + _PIECE_TOKENS] for start in range(0, len(ids), _PIECE_TOKENS))
        return sum(int(lengths[piece.astype(np.int64)].sum()) for piece in pieces)

    @cached_property
    def _added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        return self._engine.get_added_tokens_decoder()

    def _pieces(self, text: str) -> list[str]:
        if self._cut is None or not isinstance(text, str):
            return [text]
        pieces, start = [], 0
        while len(text) - start > _PIECE_CHARACTERS:
            cut = self._cut.search(text, start + _PIECE_CHARACTERS)
            if cut is None:
                break
            pieces.append(text[start : cut.start()])
            start = cut.start()
        return [*pieces, text[start:]]


class StreamDecoder:
    """Turns tokens into text as they arrive, holding back incomplete UTF-8 characters.

    The texts of all `push` calls and of `finish` join to `tokenizer.decode` of all the tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        """Start an empty stream."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # Decoders may treat the first token differently, so tokens already shown stay as context for the pending ones.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._pending.append(token)
        text = self._pending_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """The text still held back; an unfinished character appears as U+FFFD. The stream starts anew."""
        text = self._pending_text()
        self._context, self._pending = [], []
        return text

    def _pending_text(self) -> str:
        shown = self._tokenizer.decode(self._context, skip_special_tokens=self._skip_special_tokens)
        both = [*self._context, *self._pending]
        return self._tokenizer.decode(both, skip_special_tokens=self._skip_special_tokens)[len(shown) :]


def _is_unicode(text: object) -> bool:
    return isinstance(text, str) and not re.search("[\ud800-\udfff]", text)


def _cut_pattern(definition: dict[str, Any]) -> re.Pattern[str] | None:
    """Where a text may be cut without changing its tokens; None where that is not known."""
    if any(token["lstrip"] or token["rstrip"] for token in definition["added_tokens"]):
        return None
    before = definition["pre_tokenizer"] or {}
    if before.get("type") == "ByteLevel" and before["use_regex"] and not before["add_prefix_space"]:
        return _GPT2_CUT if definition["normalizer"] is None else None
    if before.get("type") == "WhitespaceSplit" and definition["model"]["type"] == "WordLevel":
        return _WORDS_CUT
    return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DataError(f"Tokenizer file {file} does not exist.") from None
    except OSError as error:
        raise DataError(f"Tokenizer file {file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"Tokenizer file {file} is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise DataError(f"Tokenizer file {file} holds a {type(content).__name__}; expected a JSON object.")
    return content


def _gpt2_layout(vocabulary: dict[str, Any], merges: Path) -> dict[str, Any]:
    """The `tokenizer.json` content of a GPT-2 style vocab.json and merges.txt."""
    try:
        lines = merges.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{merges} is not UTF-8: byte {error.start} cannot be decoded.") from None
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    skeleton = tokenizers.Tokenizer(models.BPE())
    skeleton.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    skeleton.decoder = decoders.ByteLevel()
    definition = json.loads(skeleton.to_str())
    definition["model"].update(vocab=vocabulary, merges=pairs)
    if END_OF_TEXT in vocabulary:
        plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
        definition["added_tokens"] = [dict(id=vocabulary[END_OF_TEXT], content=END_OF_TEXT, special=True, **plain)]
    return definition


def _engine(definition: dict[str, Any], file: Path) -> tokenizers.Tokenizer:
    """The engine of a `tokenizer.json` content; raises `DataError` naming `file`."""
    fault = _model_fault(definition.get("model"))
    if fault:
        raise DataError(f"{file} is not a usable tokenizer: {fault}.")
    try:
        return tokenizers.Tokenizer.from_buffer(json.dumps(definition).encode())
    except ValueError as error:
        raise DataError(f"{file} is not a usable tokenizer: {error}.") from None


def _model_fault(model: Any) -> str | None:
    """What the engine would not report cleanly: it aborts on some broken vocabularies instead of raising."""
    if not isinstance(model, dict):
        return "it has no 'model' section"
    vocabulary = model.get("vocab")
    if not vocabulary:
        return "its vocabulary is empty"
    if model.get("type") == "WordLevel" and model.get("unk_token") not in vocabulary:
        return f"its unknown token {model.get('unk_token')!r} is not in its vocabulary"
    if model.get("type") == "BPE":
        prefix = len(model.get("continuing_subword_prefix") or "")
        for number, merge in enumerate(model.get("merges") or []):
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if len(pair) != 2:
                return f"merge {number} is {merge!r}, not a pair"
            for part in (*pair, pair[0] + pair[1][prefix:]):
                if part not in vocabulary:
                    return f"merge {number} needs the token {part!r}, which is not in its vocabulary"
    return None
