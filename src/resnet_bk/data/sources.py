"""`open_corpus`: one iterator of documents a split, behind every corpus.

Splits. A corpus with splits of its own keeps them. Elsewhere the names decide: a document whose hash, as a number in
[0, 1), falls below the validation fraction f is validation, below 2 f it is test, else train; adding a document moves
no other. A local corpus too small for that (fewer than 10 / f documents, one long book for instance) is cut by position
instead: the last share f of its characters is test, the share f before it validation, each cut moved on to the next
line start.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from resnet_bk.data.config import DataConfig
from resnet_bk.data.files import Document, field_text, files_sha256, find_files, read_documents, read_text
from resnet_bk.errors import ConfigError, DataError, MissingDependencyError
from resnet_bk.models.config import unknown_key_message

Reader = Callable[[], Iterator[Document]]

PYTHON_STDLIB = "python-stdlib"
TEXT = "text"
_WIKITEXT_FILES = {"train": "wiki.train.tokens", "validation": "wiki.valid.tokens", "test": "wiki.test.tokens"}
_PTB_FILES = {"train": "ptb.train.txt", "validation": "ptb.valid.txt", "test": "ptb.test.txt"}
# Word-level corpora, one sentence or paragraph a line, by the names of their files.
WORD_LEVEL = {"wikitext-2": _WIKITEXT_FILES, "wikitext-103": _WIKITEXT_FILES, "ptb": _PTB_FILES}
# Names of corpora on the hub. Penn Treebank is there as a program only, which `datasets` no longer runs.
HUB = {
    "wikitext-2": "Salesforce/wikitext:wikitext-2-v1",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-v1",
    "c4": "allenai/c4:en",
    "pile": "monology/pile-uncopyrighted",
    "books": "emozilla/pg19",
    "tinystories": "roneneldan/TinyStories",
}

# Hundreds of gigabytes: nobody wants all of them by accident.
_ENDLESS = ("c4", "pile")
_FEWEST_HELD_OUT = 10
# Not the library's own prose or code: its tests, installed packages, tables of characters, build-time records. The
# topics are documents of their own.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "__pycache__")


@dataclass(frozen=True)
class Corpus:
    """Named splits of documents; reading a split twice gives the same documents in the same order."""

    name: str
    """Name of the corpus."""
    fingerprint: str
    """Hash that changes when the documents may have changed; of contents for local corpora, of the name on the hub."""
    readers: dict[str, Reader]
    """What starts reading each split; always "train" and "validation", and "test" unless the corpus has none."""
    word_level: bool = False
    """The text is already a sequence of words, to be counted as published (WikiText)."""

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of a split.

        Raises:
            DataError: the corpus has no such split, or, while reading, the fault and where it is.
        """
        if split not in self.readers:
            raise DataError(f"Corpus {self.name!r} has no split {split!r}; it has {', '.join(self.readers)}.")
        return self.readers[split]()


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config` names.

    Raises:
        ConfigError: an unknown name, or a path where none belongs or none where one does.
        DataError: files that cannot be used.
        MissingDependencyError: a hub corpus, and `datasets` is not installed.
    """
    known = [PYTHON_STDLIB, TEXT, *dict.fromkeys([*WORD_LEVEL, *HUB])]
    if config.name == TEXT:
        if config.path is None:
            raise ConfigError("data.path is missing; data.name 'text' needs the file or folder to read.")
        corpus = _text(config, Path(config.path).expanduser())
    elif config.name in WORD_LEVEL and config.path is not None:
        corpus = _word_level_folder(config.name, Path(config.path).expanduser())
    elif config.name in HUB and config.path is not None:
        corpus = _text(config, Path(config.path).expanduser())
    elif config.name in WORD_LEVEL and config.name not in HUB:
        raise ConfigError(
            f"data.path is missing; corpus {config.name!r} is read from a folder with "
            f"{', '.join(WORD_LEVEL[config.name].values())}."
        )
    elif config.path is not None:
        raise ConfigError(
            f"data.path is {config.path!r}, but data.name {config.name!r} reads no path; set data.name to 'text'."
        )
    elif config.name == PYTHON_STDLIB:
        fingerprint = hashlib.sha256()
        for document in _python_documents():
            fingerprint.update(f"{document.name}\0{document.text}\0".encode())
        readers = _by_name(_python_documents, config.validation_fraction)
        corpus = Corpus(config.name, fingerprint.hexdigest(), readers)
    elif config.name in _ENDLESS and config.max_bytes is None:
        raise ConfigError(f"data.max_bytes is missing; corpus {config.name!r} has hundreds of gigabytes.")
    elif "/" in config.name or config.name in HUB:
        corpus = _hub(config)
    else:
        message = unknown_key_message(config.name, known, what="corpus")
        raise ConfigError(f"data.name: {message} Hub datasets are named owner/name.")
    if config.max_bytes is None:
        return corpus
    limits = {"train": config.max_bytes}
    if config.name in _ENDLESS and config.path is None:
        held_out = max(1, int(config.max_bytes * config.validation_fraction))
        limits |= {split: held_out for split in corpus.readers if split != "train"}
    limited = {split: partial(_first_bytes, corpus.readers[split], limit) for split, limit in limits.items()}
    return Corpus(corpus.name, corpus.fingerprint, {**corpus.readers, **limited}, corpus.word_level)


def name_fraction(name: str) -> float:
    """A number in [0, 1) fixed by `name` alone, uniform over names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _text(config: DataConfig, path: Path) -> Corpus:
    files = find_files(path)
    root = path.parent if path.is_file() else path
    fingerprint = files_sha256([file for split in files.values() for file in split], root)

    def read(split: str) -> Iterator[Document]:
        for file in files[split]:
            name = file.relative_to(root).as_posix()
            yield from read_documents(file, name=name, text_field=config.text_field)

    readers: dict[str, Reader] = {split: partial(read, split) for split in files}
    if "validation" not in readers:
        fraction = config.validation_fraction
        needed = int(_FEWEST_HELD_OUT / fraction)
        enough = sum(1 for _ in itertools.islice(readers["train"](), needed)) == needed
        held_out = (_by_name if enough else _by_position)(readers["train"], fraction)
        readers = {**held_out, **{split: reader for split, reader in readers.items() if split != "train"}}
    return Corpus(config.name, fingerprint, readers)


def _word_level_folder(name: str, path: Path) -> Corpus:
    names, files = WORD_LEVEL[name], {}
    for split, plain in names.items():
        found = [file for file in (path / plain, path / f"{plain}.xz") if file.is_file()]
        if not found:
            raise DataError(f"{path / plain} does not exist, nor {plain}.xz beside it; corpus {name!r} needs it.")
        files[split] = found[0]

    def read(split: str) -> Iterator[Document]:
        text = read_text(files[split])
        if not text:
            raise DataError(f"{files[split]} is empty; expected text.")
        yield Document(names[split], text)

    fingerprint = files_sha256(files.values(), path)
    return Corpus(name, fingerprint, {split: partial(read, split) for split in files}, word_level=True)


def _python_documents() -> Iterator[Document]:
    """The language reference by topic, then the standard library's modules, of the running Python, in name order."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield Document(f"topics/{topic}", topics[topic])
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)
        )
        for file in sorted(files):
            path = Path(folder, file)
            if path.suffix != ".py" or path.is_symlink() or file.startswith(_SKIPPED_PREFIXES):
                continue
            with tokenize.open(path) as stream:
                text = stream.read()
            if text:
                yield Document(f"lib/{path.relative_to(root).as_posix()}", text)


def _hub(config: DataConfig) -> Corpus:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingDependencyError(
            f"data.name {config.name!r} is a hub dataset and needs `datasets`, which is not installed. "
            "Run: pip install 'resnet-bk[data]'"
        ) from None
    word_level = config.name in WORD_LEVEL
    name, _, configuration = HUB.get(config.name, config.name).partition(":")
    try:
        available = datasets.get_dataset_split_names(name, configuration or None)
    except (OSError, ValueError) as error:
        raise DataError(f"data.name {config.name!r} cannot be opened: {str(error).splitlines()[0]}") from None
    if "train" not in available:
        raise DataError(f"data.name {config.name!r} has no split 'train'; it has {', '.join(available)}.")

    def read(split: str) -> Iterator[Document]:
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        for number, row in enumerate(rows):
            text = field_text(row, config.text_field, f"{config.name}, split {split}, row {number}")
            if text:
                yield Document(f"{split}:{number}", text)

    def read_lines(split: str) -> Iterator[Document]:
        """One document, a line a row; the hub's copy lacks the space that blank lines hold in the files."""
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        lines = (field_text(row, config.text_field, f"{config.name}, split {split}") for row in rows)
        yield Document(_WIKITEXT_FILES[split], "".join(line.rstrip("\n") + "\n" if line else " \n" for line in lines))

    reader = read_lines if word_level else read
    readers: dict[str, Reader] = {
        split: partial(reader, split) for split in ("train", "validation", "test") if split in available
    }
    if "validation" not in readers:
        first = partial(_first_bytes, readers["train"], config.max_bytes) if config.max_bytes else readers["train"]
        readers = {**_by_name(first, config.validation_fraction), **{k: v for k, v in readers.items() if k == "test"}}
    fingerprint = hashlib.sha256(f"{name}:{configuration}".encode()).hexdigest()
    return Corpus(config.name, fingerprint, readers, word_level)


def _by_name(read: Reader, fraction: float) -> dict[str, Reader]:
    """Splits by the hash of each document's name."""

    def select(low: float, high: float) -> Iterator[Document]:
        return (document for document in read() if low <= name_fraction(document.name) < high)

    bounds = {"train": (2 * fraction, 1.0), "validation": (0.0, fraction), "test": (fraction, 2 * fraction)}
    return {split: partial(select, *pair) for split, pair in bounds.items()}


def _by_position(read: Reader, fraction: float) -> dict[str, Reader]:
    """Splits by position in the text of all documents."""

    def select(low: float, high: float) -> Iterator[Document]:
        total = sum(len(document.text) for document in read())
        position = 0
        for document in read():
            start, stop = (_next_line(document.text, int(total * share) - position) for share in (low, high))
            if start < stop:
                yield Document(document.name, document.text[start:stop])
            position += len(document.text)

    first, second = 1 - 2 * fraction, 1 - fraction
    bounds = {"train": (0.0, first), "validation": (first, second), "test": (second, 1.0)}
    return {split: partial(select, *pair) for split, pair in bounds.items()}


def _next_line(text: str, position: int) -> int:
    """The first line start at or after `position` within `text`; `position` itself where no line starts after it."""
    if position <= 0 or position >= len(text):
        return min(max(position, 0), len(text))
    return text.find("\n", position - 1) + 1 or position


def _first_bytes(read: Reader, limit: int) -> Iterator[Document]:
    """Documents up to `limit` UTF-8 bytes in all; the last one is cut at a character."""
    for document in read():
        data = document.text.encode()
        if len(data) >= limit:
            text = data[:limit].decode("utf-8", errors="ignore")
            if text:
                yield Document(document.name, text)
            return
        yield document
        limit -= len(data)
