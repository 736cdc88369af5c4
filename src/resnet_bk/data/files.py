"""Documents from local files: .txt, .jsonl (either may be .xz) and .parquet, with errors that locate the fault."""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from resnet_bk.errors import DataError, MissingDependencyError

_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Document:
    """One text, and a name that is unique in its corpus."""

    name: str
    text: str


def find_files(path: Path) -> dict[str, list[Path]]:
    """Text files at `path` by split, in order of their names.

    One file is all "train". In a folder, the split is told by the first folder below it or else by the file's name:
    `validation.jsonl`, `train-00003-of-00010.parquet`, `test/a.txt`. Any other name means "train". Files of other
    formats, hidden ones and empty ones are passed over.

    Raises:
        DataError: nothing there, or no file with text.
    """
    if path.is_file():
        if _format(path) is None:
            raise DataError(f"{path} has an unknown format; expected .txt, .jsonl, .txt.xz, .jsonl.xz or .parquet.")
        return {"train": [path]}
    if not path.is_dir():
        raise DataError(f"{path} does not exist; expected a text file or a folder of them.")
    splits: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not hidden and file.is_file() and _format(file) is not None and file.stat().st_size:
            splits.setdefault(_split_of(relative), []).append(file)
    if not splits:
        raise DataError(f"{path} holds no text; expected .txt, .jsonl, .txt.xz, .jsonl.xz or .parquet files.")
    if "train" not in splits:
        raise DataError(f"{path} holds only {' and '.join(splits)} files; expected files of the train split too.")
    return splits


def read_documents(file: Path, *, name: str | None = None, text_field: str = "text") -> Iterator[Document]:
    """The documents of a file: one in a .txt, one a line in a .jsonl, one a row in a .parquet; empty ones are left out.

    Args:
        file: the file to read.
        name: what its documents are called, the line or row number appended; the file's own name by default.
        text_field: JSON key or column that holds the text.

    Raises:
        DataError: unreadable or empty file, bytes that are not UTF-8, a line that is not JSON, or no such field.
        MissingDependencyError: a .parquet file, and pyarrow is not installed.
    """
    name = file.name if name is None else name
    read = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(_format(file) or "")
    if read is None:
        raise DataError(f"{file} has an unknown format; expected .txt, .jsonl, .txt.xz, .jsonl.xz or .parquet.")
    with _faults_of(file):
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty; expected text.")
        yield from (document for document in read(file, name, text_field) if document.text)


def read_text(file: Path) -> str:
    """The whole text of a UTF-8 file, .xz unpacked, its line ends untouched and a byte-order mark removed."""
    with _faults_of(file), _open(file) as stream:
        return _decode(stream.read(), file, 0)


def files_sha256(files: Iterable[Path], root: Path) -> str:
    """Hash of the names relative to `root` and the contents of `files`, in hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        with _faults_of(file), file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(root).as_posix()}\0{content}\0".encode())
    return digest.hexdigest()


def field_text(row: dict[str, Any], text_field: str, where: str) -> str:
    """The text in `row`; raises `DataError` saying `where` if the field is missing or holds something else."""
    if text_field not in row:
        raise DataError(
            f"{where} has no field {text_field!r}; it has {', '.join(map(repr, row)) or 'none'}. Set data.text_field."
        )
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} holds a {type(text).__name__}; expected text.")
    if re.search("[\ud800-\udfff]", text):
        raise DataError(f"{where}: field {text_field!r} holds half a surrogate pair; expected Unicode text.")
    return text


def _format(file: Path) -> str | None:
    name = file.name.lower()
    known = (".txt", ".jsonl") if name.endswith(".xz") else (".txt", ".jsonl", ".parquet")
    return next((suffix for suffix in known if name.removesuffix(".xz").endswith(suffix)), None)


def _split_of(relative: Path) -> str:
    stem = relative.name.split(".")[0] if len(relative.parts) == 1 else relative.parts[0]
    return _SPLIT_NAMES.get(re.sub(r"-\d.*$", "", stem).lower(), "train")


def _read_txt(file: Path, name: str, text_field: str) -> Iterator[Document]:
    yield Document(name, read_text(file))


def _read_jsonl(file: Path, name: str, text_field: str) -> Iterator[Document]:
    position = 0
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{file}, line {number}"
            text = _decode(line, file, position)
            position += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from None
            if not isinstance(row, dict):
                raise DataError(f"{where} holds a {type(row).__name__}; expected an object with {text_field!r}.")
            yield Document(f"{name}:{number}", field_text(row, text_field, where))


def _read_parquet(file: Path, name: str, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingDependencyError(
            f"{file} needs pyarrow, which is not installed. Run: pip install 'resnet-bk[data]'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                field_text(dict.fromkeys(names), text_field, str(file))
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    where = f"{file}, row {number}"
                    yield Document(f"{name}:{number}", field_text({text_field: text}, text_field, where))
                    number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a readable parquet file: {_first_line(error)}.") from None


def _open(file: Path) -> BufferedIOBase:
    return lzma.open(file) if file.suffix.lower() == ".xz" else file.open("rb")


def _decode(data: bytes, file: Path, position: int) -> str:
    """`data` as text; `position` is where it starts in the (unpacked) file."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: byte {position + error.start} is 0x{data[error.start]:02x} ({error.reason}). "
            "Convert the file to UTF-8."
        ) from None
    return text.removeprefix("\ufeff") if position == 0 else text


@contextmanager
def _faults_of(file: Path) -> Iterator[None]:
    """Turns what the operating system and the decompressor report about `file` into `DataError`."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{file} does not exist.") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or _first_line(error)}.") from None
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{file} is not a readable .xz file: {_first_line(error)}.") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
