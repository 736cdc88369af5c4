"""Corpora: what each yields, how it is split, and what is refused."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from resnet_bk.data.config import DataConfig
from resnet_bk.data.sources import Corpus, open_corpus
from resnet_bk.errors import ConfigError, DataError, MissingDependencyError

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return open_corpus(DataConfig())


def _texts(corpus: Corpus, split: str) -> list[str]:
    return [document.text for document in corpus.documents(split)]


def _joined(corpus: Corpus) -> str:
    return "".join(text for split in SPLITS for text in _texts(corpus, split))


def test_the_standard_library_is_text_without_tests_or_other_packages(stdlib: Corpus) -> None:
    names = [document.name for split in SPLITS for document in stdlib.documents(split)]
    assert len(names) == len(set(names)) > 500
    assert {"lib/abc.py", "lib/json/decoder.py", "topics/assert"} <= set(names)
    assert not [name for name in names if re.search("/tests?/|site-packages|pydoc_data|_sysconfigdata", name)]
    sizes = {split: sum(map(len, _texts(stdlib, split))) for split in SPLITS}
    assert sizes["train"] > 5_000_000
    assert min(sizes.values()) > 50_000


def test_the_standard_library_reads_the_same_twice(stdlib: Corpus) -> None:
    again = open_corpus(DataConfig())
    assert again.fingerprint == stdlib.fingerprint
    assert list(again.documents("validation")) == list(stdlib.documents("validation"))


def test_the_split_of_a_document_depends_on_its_name_alone(tmp_path) -> None:
    def split_of(count: int) -> dict[str, str]:
        (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "text {number}\\n"}}\n' for number in range(count)))
        corpus = open_corpus(DataConfig(name="text", path=str(tmp_path), validation_fraction=0.1))
        return {document.name: split for split in SPLITS for document in corpus.documents(split)}

    few, many = split_of(500), split_of(1000)
    assert len(few) == 500 and len(many) == 1000
    assert few.items() <= many.items()
    counts = {split: list(many.values()).count(split) for split in SPLITS}
    assert 60 < counts["validation"] < 140 and 60 < counts["test"] < 140


def test_one_long_file_is_cut_by_position_at_line_starts(tmp_path) -> None:
    lines = [f"line {number}\n" for number in range(1000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    corpus = open_corpus(DataConfig(name="text", path=str(tmp_path / "book.txt"), validation_fraction=0.1))
    assert _joined(corpus) == "".join(lines)
    total = len("".join(lines))
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        (text,) = _texts(corpus, split)
        assert text.startswith("line ") and text.endswith("\n")
        assert abs(len(text) - share * total) < 10


def test_few_files_are_cut_by_position_too(tmp_path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(str(number) * 100)
    corpus = open_corpus(DataConfig(name="text", path=str(tmp_path), validation_fraction=0.2))
    assert _texts(corpus, "train") == ["0" * 100, "1" * 80]
    assert _texts(corpus, "validation") == ["1" * 20, "2" * 40]
    assert _texts(corpus, "test") == ["2" * 60]


def test_splits_named_by_files_are_kept(tmp_path) -> None:
    for name in ("train.txt", "validation.txt"):
        (tmp_path / name).write_text(name)
    corpus = open_corpus(DataConfig(name="text", path=str(tmp_path)))
    assert (_texts(corpus, "train"), _texts(corpus, "validation")) == (["train.txt"], ["validation.txt"])
    with pytest.raises(DataError, match="has no split 'test'; it has train, validation"):
        corpus.documents("test")


def test_a_named_test_split_does_not_replace_validation(tmp_path) -> None:
    (tmp_path / "train.txt").write_text("abcde\n" * 100)
    (tmp_path / "test.txt").write_text("held out")
    corpus = open_corpus(DataConfig(name="text", path=str(tmp_path)))
    assert _texts(corpus, "test") == ["held out"]
    assert set("".join(_texts(corpus, "validation")).split()) == {"abcde"}


def test_max_bytes_cuts_training_text_at_a_character(tmp_path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "aéé"}\n{"text": "éé"}\n{"text": "c"}\n', encoding="utf-8")
    (tmp_path / "validation.txt").write_text("long validation text")
    expected = {1: ["a"], 2: ["a"], 5: ["aéé"], 6: ["aéé"], 8: ["aéé", "é"], 9: ["aéé", "éé"], 99: ["aéé", "éé", "c"]}
    for limit, texts in expected.items():
        corpus = open_corpus(DataConfig(name="text", path=str(tmp_path), max_bytes=limit))
        assert _texts(corpus, "train") == texts
        assert _texts(corpus, "validation") == ["long validation text"]


def test_local_text_is_recognised_when_it_changes(tmp_path) -> None:
    config = DataConfig(name="text", path=str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    first = open_corpus(config).fingerprint
    (tmp_path / "a.txt").write_text("two")
    assert open_corpus(config).fingerprint != first


def _wikitext(folder: Path) -> Path:
    for split in ("train", "valid", "test"):
        (folder / f"wiki.{split}.tokens").write_text(f" \n = {split} = \n \n")
    return folder


def test_wikitext_is_read_verbatim_from_a_folder(tmp_path) -> None:
    corpus = open_corpus(DataConfig(name="wikitext-2", path=str(_wikitext(tmp_path))))
    assert corpus.word_level
    assert _texts(corpus, "validation") == [" \n = valid = \n \n"]
    (tmp_path / "wiki.test.tokens").write_text("")
    with pytest.raises(DataError, match=r"wiki\.test\.tokens is empty"):
        _texts(corpus, "test")
    (tmp_path / "wiki.test.tokens").unlink()
    with pytest.raises(DataError, match=r"wiki\.test\.tokens does not exist, nor wiki\.test\.tokens\.xz"):
        open_corpus(DataConfig(name="wikitext-2", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(name="text"), r"data\.path is missing"),
        (DataConfig(path="somewhere"), r"data\.path is 'somewhere', but data\.name 'python-stdlib' reads no path"),
        (DataConfig(name="wikitext2"), r"data\.name: Unknown corpus 'wikitext2'; did you mean 'wikitext-2'\?"),
    ],
)
def test_names_and_paths_that_do_not_fit_are_refused(config: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_corpus(config)


def test_hub_corpora_without_datasets_name_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("owner/corpus", "wikitext-2"):
        with pytest.raises(MissingDependencyError, match=re.escape("pip install 'resnet-bk[data]'")):
            open_corpus(DataConfig(name=name))


@pytest.fixture
def hub(monkeypatch) -> dict[tuple[str, str | None], dict[str, list[dict[str, object]]]]:
    """A stand-in for the `datasets` package, serving what a test puts in."""
    served: dict[tuple[str, str | None], dict[str, list[dict[str, object]]]] = {}
    module = types.ModuleType("datasets")

    def get_dataset_split_names(name: str, configuration: str | None) -> list[str]:
        if (name, configuration) not in served:
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist\nand more lines")
        return list(served[name, configuration])

    def load_dataset(name: str, configuration: str | None, *, split: str, streaming: bool):
        assert streaming
        return iter(served[name, configuration][split])

    module.get_dataset_split_names = get_dataset_split_names  # type: ignore[attr-defined]
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return served


def test_hub_rows_are_documents(hub) -> None:
    rows = {split: [{"text": split}, {"text": ""}, {"text": "more"}] for split in ("train", "validation")}
    hub["owner/corpus", "en"] = rows
    corpus = open_corpus(DataConfig(name="owner/corpus:en"))
    assert [(d.name, d.text) for d in corpus.documents("train")] == [("train:0", "train"), ("train:2", "more")]
    assert list(corpus.readers) == ["train", "validation"]
    with pytest.raises(DataError, match=r"split train, row 0 has no field 'body'; it has 'text'"):
        _texts(open_corpus(DataConfig(name="owner/corpus:en", text_field="body")), "train")
    with pytest.raises(DataError, match=r"'owner/absent' cannot be opened: Dataset 'owner/absent' doesn't exist$"):
        open_corpus(DataConfig(name="owner/absent"))


def test_hub_corpora_of_one_split_are_split_within_max_bytes(hub) -> None:
    hub["owner/corpus", None] = {"train": [{"text": f"{number:04d}"} for number in range(2000)]}
    corpus = open_corpus(DataConfig(name="owner/corpus", validation_fraction=0.1, max_bytes=4000))
    assert sorted(text for split in SPLITS for text in _texts(corpus, split)) == [f"{n:04d}" for n in range(1000)]
    assert len(_texts(corpus, "validation")) > 50


def test_wikitext_from_the_hub_equals_the_files(hub, tmp_path) -> None:
    # The hub's rows are the files' lines, except that blank ones, " \n" there, are empty.
    names = {"train": "train", "validation": "valid", "test": "test"}
    hub["Salesforce/wikitext", "wikitext-2-v1"] = {
        split: [{"text": ""}, {"text": f" = {name} = \n"}, {"text": ""}] for split, name in names.items()
    }
    from_hub = open_corpus(DataConfig(name="wikitext-2"))
    from_files = open_corpus(DataConfig(name="wikitext-2", path=str(_wikitext(tmp_path))))
    for split in SPLITS:
        assert list(from_hub.documents(split)) == list(from_files.documents(split))


def test_ptb_is_read_verbatim_from_a_folder(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path is missing; corpus 'ptb' .* ptb\.train\.txt"):
        open_corpus(DataConfig(name="ptb"))
    for split in ("train", "valid", "test"):
        (tmp_path / f"ptb.{split}.txt").write_text(f" no it was n't {split} monday \n but N <unk> \n")
    corpus = open_corpus(DataConfig(name="ptb", path=str(tmp_path)))
    assert corpus.word_level
    assert _texts(corpus, "validation") == [" no it was n't valid monday \n but N <unk> \n"]
    (tmp_path / "ptb.test.txt").unlink()
    with pytest.raises(DataError, match=r"ptb\.test\.txt does not exist"):
        open_corpus(DataConfig(name="ptb", path=str(tmp_path)))


def test_named_corpora_come_from_the_hub_or_a_folder(hub, tmp_path) -> None:
    hub["roneneldan/TinyStories", None] = {split: [{"text": split}] for split in ("train", "validation")}
    assert _texts(open_corpus(DataConfig(name="tinystories")), "validation") == ["validation"]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "local"}\n')
    local = open_corpus(DataConfig(name="tinystories", path=str(tmp_path)))
    assert local.name == "tinystories" and _texts(local, "train") == ["local"]


def test_endless_corpora_are_read_in_part(hub) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_bytes is missing; corpus 'c4'"):
        open_corpus(DataConfig(name="c4"))
    hub["allenai/c4", "en"] = {split: [{"text": f"{n:04d}"} for n in range(900)] for split in ("train", "validation")}
    corpus = open_corpus(DataConfig(name="c4", max_bytes=2000, validation_fraction=0.1))
    assert (len(_texts(corpus, "train")), len(_texts(corpus, "validation"))) == (500, 50)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": ""}, r"data\.name is empty"),
        ({"validation_fraction": 0.5}, r"data\.validation_fraction is 0\.5; expected a number between 0 and 0\.5"),
        ({"max_bytes": 0}, r"data\.max_bytes is 0"),
    ],
)
def test_settings_outside_their_domain_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


def test_hub_corpora_without_training_text_are_refused(hub) -> None:
    hub["owner/corpus", None] = {"test": [{"text": "x"}]}
    with pytest.raises(DataError, match="has no split 'train'; it has test"):
        open_corpus(DataConfig(name="owner/corpus"))
