"""`DataConfig`: which corpus, which tokenizer, where prepared tokens are kept."""

from __future__ import annotations

from dataclasses import dataclass

from resnet_bk.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """Corpus and tokenizer of a run.

    The tokenizer is trained on the training split to `model.vocab_size` entries unless `tokenizer` names one.
    """

    name: str = "python-stdlib"
    """Corpus: `python-stdlib` (embedded: documentation and sources of the running Python), `text` (local files under
    `path`), `wikitext-2`, `wikitext-103` and `ptb` (word level; from the folder `path` in the standard format, else by
    hub name, which `ptb` lacks), `c4`, `pile`, `books` and `tinystories` (local files under `path`, else streamed by
    hub name), or any Hugging Face dataset as `owner/name` or `owner/name:configuration`."""
    path: str | None = None
    """File or folder of local corpora (.txt and .jsonl, plain or .xz, and .parquet), or folder of the standard files
    of a word-level corpus. In a folder, files called train, validation and test (or in folders so called) are those
    splits."""
    text_field: str = "text"
    """Column or JSON key that holds the document."""
    tokenizer: str | None = None
    """A `tokenizer.json`, or a folder that holds one; None trains byte-level BPE on the training split."""
    validation_fraction: float = 0.02
    """Share of documents held out for validation, and as much again for testing, chosen by a hash of each document's
    name (by position in the text where there are too few); ignored where the corpus has its own splits."""
    max_bytes: int | None = None
    """Bytes of the training split to read at most; None reads all. Of `c4` and `pile` by hub name, the other splits
    are read up to `validation_fraction` of it."""
    cache_dir: str | None = None
    """Folder of prepared token shards; None uses `$XDG_CACHE_HOME/resnet-bk` (or `~/.cache/resnet-bk`)."""

    def __post_init__(self) -> None:
        """Check every field; raises `ConfigError` naming the first that is wrong."""
        if not self.name:
            raise ConfigError("data.name is empty; expected a corpus name such as 'python-stdlib'.")
        if not 0 < self.validation_fraction < 0.5:
            raise ConfigError(
                f"data.validation_fraction is {self.validation_fraction!r}; expected a number between 0 and 0.5."
            )
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"data.max_bytes is {self.max_bytes!r}; expected None or a whole number >= 1.")
