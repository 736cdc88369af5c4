"""Local files: what is read, and errors that locate the fault."""

from __future__ import annotations

import json
import lzma
import re
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from resnet_bk.data.files import Document, files_sha256, find_files, read_documents, read_text
from resnet_bk.errors import DataError, MissingDependencyError


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_file_is_one_document_as_it_is(tmp_path) -> None:
    file = _write(tmp_path / "a.txt", "\ufeffline\r\nnaïve\n")
    assert list(read_documents(file)) == [Document("a.txt", "line\r\nnaïve\n")]
    packed = _write(tmp_path / "b.txt.xz", lzma.compress("packed 数学".encode()))
    assert list(read_documents(packed, name="book")) == [Document("book", "packed 数学")]


def test_json_lines_are_documents(tmp_path) -> None:
    content = '{"text": "one", "id": 1}\n\n{"text": ""}\n{"text": "two\\nlines"}'
    expected = [Document("a.jsonl:1", "one"), Document("a.jsonl:4", "two\nlines")]
    assert list(read_documents(_write(tmp_path / "a.jsonl", content))) == expected
    packed = _write(tmp_path / "a.jsonl.xz", lzma.compress(content.encode()))
    assert list(read_documents(packed, name="a.jsonl")) == expected


def test_parquet_rows_are_documents(tmp_path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "body": ["one", "", "three"]}), file)
    documents = [Document("a.parquet:0", "one"), Document("a.parquet:2", "three")]
    assert list(read_documents(file, text_field="body")) == documents
    with pytest.raises(DataError, match=r"a\.parquet has no field 'text'; it has 'id', 'body'. Set data.text_field"):
        list(read_documents(file))
    with pytest.raises(DataError, match=r"a\.parquet, row 0: field 'id' holds a int; expected text"):
        list(read_documents(file, text_field="id"))


def test_the_first_bad_byte_is_named(tmp_path) -> None:
    bad = "café\n".encode() + b"ok \xff\n"
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8: byte 9 is 0xff"):
        read_text(_write(tmp_path / "a.txt", bad))
    rows = '{"text": "é"}\n'.encode()
    with pytest.raises(DataError, match=rf"a\.jsonl is not UTF-8: byte {len(rows) + 10} is 0xe9"):
        list(read_documents(_write(tmp_path / "a.jsonl", rows + b'{"text": "\xe9"}\n')))
    with pytest.raises(DataError, match=r"b\.txt\.xz is not UTF-8: byte 9 is 0xff"):
        read_text(_write(tmp_path / "b.txt.xz", lzma.compress(bad)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt is empty"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON: .* at column"),
        ("a.jsonl", '{"body": "x", "id": 3}\n', r"line 1 has no field 'text'; it has 'body', 'id'. Set data"),
        ("a.jsonl", "{}\n", r"line 1 has no field 'text'; it has none"),
        ("a.jsonl", '"x"\n', r"line 1 holds a str; expected an object with 'text'"),
        ("a.jsonl", '{"text": null}\n', r"line 1: field 'text' holds a NoneType; expected text"),
        ("a.jsonl", '{"text": "\\ud83d"}\n', r"line 1: field 'text' holds half a surrogate pair"),
        ("a.parquet", b"PAR1 nonsense PAR1", r"a\.parquet is not a readable parquet file"),
        ("a.txt.xz", b"not xz", r"a\.txt\.xz is not a readable \.xz file"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-20], r"a\.txt\.xz is not a readable \.xz file"),
        ("a.csv", "x", r"a\.csv has an unknown format; expected \.txt"),
    ],
)
def test_faults_are_located_on_one_line(name: str, content: str | bytes, message: str, tmp_path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(_write(tmp_path / name, content)))
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files_are_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"absent\.txt does not exist"):
        list(read_documents(tmp_path / "absent.txt"))
    with pytest.raises(DataError, match=r"absent does not exist; expected a text file or a folder"):
        find_files(tmp_path / "absent")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=r"folder\.txt cannot be read: Is a directory"):
        read_text(tmp_path / "folder.txt")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch) -> None:
    file = _write(tmp_path / "a.parquet", "x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'resnet-bk[data]'")):
        list(read_documents(file))


def test_folders_tell_the_split_by_name(tmp_path) -> None:
    names = [
        "b.txt",
        "a/deep/train.txt",
        "test_of_strength.txt",
        "train-00001-of-00002.jsonl",
        "train-00000-of-00002.jsonl",
        "valid.txt",
        "dev/x.txt",
        "validation/test.txt",
        "test.parquet",
        "README.md",
        ".hidden/c.txt",
        "empty.txt",
    ]
    for name in names:
        _write(tmp_path / name, "" if name == "empty.txt" else "x")
    splits = find_files(tmp_path).items()
    found = {split: [file.relative_to(tmp_path).as_posix() for file in files] for split, files in splits}
    assert found == {
        "train": [
            "a/deep/train.txt",
            "b.txt",
            "test_of_strength.txt",
            "train-00000-of-00002.jsonl",
            "train-00001-of-00002.jsonl",
        ],
        "validation": ["dev/x.txt", "valid.txt", "validation/test.txt"],
        "test": ["test.parquet"],
    }


def test_folders_without_training_text_are_refused(tmp_path) -> None:
    _write(tmp_path / "notes.md", "x")
    with pytest.raises(DataError, match=r"holds no text; expected \.txt"):
        find_files(tmp_path)
    _write(tmp_path / "test.txt", "x")
    with pytest.raises(DataError, match="holds only test files"):
        find_files(tmp_path)


def test_the_hash_of_files_follows_names_and_contents_only(tmp_path) -> None:
    hashes = set()
    for folder, name, content in (("p", "a", "x"), ("q", "a", "x"), ("r", "b", "x"), ("s", "a", "y")):
        file = _write(tmp_path / folder / f"{name}.txt", content)
        hashes.add(files_sha256([file], file.parent))
    assert len(hashes) == 3


def test_json_text_survives_unchanged(tmp_path) -> None:
    text = 'quotes " and \u2028 separators \x85 and tabs\t'
    file = _write(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n")
    assert [document.text for document in read_documents(file)] == [text]
