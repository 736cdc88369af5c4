"""`resnet-bk evaluate`: loss, perplexity and bits per byte of a trained model, and its loss by position."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resnet_bk.cli.arguments import Parser
from resnet_bk.data.config import DataConfig
from resnet_bk.errors import ConfigError, DataError

if TYPE_CHECKING:
    from resnet_bk.data.shards import TokenDataset
    from resnet_bk.models.resnet_bk import LanguageModel

DESCRIPTION = (
    "Measure a trained model on a text file, or on one split of a corpus. The text is read as one stream with the "
    "state carried along, so every token is predicted from all before it."
)


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk evaluate` with these arguments."""
    parser = Parser("evaluate", description=DESCRIPTION, usage="resnet-bk evaluate --model FOLDER [OPTIONS]")
    parser.add_argument("--model", type=str, required=True, help="Folder of a model or checkpoint, or its hub name.")
    parser.add_argument("--base", type=str, default=None, help="Base model of adapters, if it was moved.")
    parser.add_argument(
        "--text", type=str, default=None, help="Evaluate this .txt, .jsonl or .parquet file, all of it."
    )
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument(
        "--split", type=Literal["train", "validation", "test"], default="validation", help="Split of the corpus."
    )
    parser.add_argument("--tokens", type=int, default=None, help="Evaluate the first so many tokens only.")
    parser.add_argument("--segment-length", type=int, default=4096, help="Tokens per forward pass; not of the result.")
    parser.add_argument("--by-position", action="store_true", help="Also the loss by number of preceding tokens.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    options = parser.instantiate(parser.parse(arguments))

    from resnet_bk.evaluation.perplexity import evaluate_stream, log_spaced_bins, loss_by_position
    from resnet_bk.models.resnet_bk import LanguageModel
    from resnet_bk.training.device import resolve_device

    model = LanguageModel.from_pretrained(options.model, device=resolve_device(options.device), base=options.base)
    if model.tokenizer is None:
        raise DataError(f"{options.model} has no tokenizer.json; put the tokenizer that it was trained with there.")
    dataset = _dataset(model, options)
    tokens = dataset.tokens[: options.tokens]
    if len(tokens) < 2:
        raise DataError(
            f"There are {len(tokens)} tokens to evaluate; expected at least 2, the first predicts the second."
        )
    text_bytes = None if model.tokenizer.byte_lengths is None else model.tokenizer.text_bytes(tokens[1:])
    result = evaluate_stream(model, tokens, segment_length=options.segment_length, text_bytes=text_bytes)
    bins = []
    if options.by_position:
        starts = [start for start in dataset.document_offsets[:-1] if start + 1 < len(tokens)]
        stops = [min(stop, len(tokens)) for stop in dataset.document_offsets[1:]]
        documents = [tokens[a:b] for a, b in zip(starts, stops, strict=False) if b - a > 1]
        edges = log_spaced_bins(max(len(document) for document in documents) - 1)
        bins = loss_by_position(model, documents, segment_length=options.segment_length, bins=edges)
    report = {
        "text": options.text or f"{options.data.name}, {options.split} split",
        "tokens": result.tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "by_position": [dataclasses.asdict(part) for part in bins],
    }
    print(json.dumps(report, indent=2) if options.json else _table(report))
    return 0


def _dataset(model: LanguageModel, options: Any) -> TokenDataset:
    """The tokens to evaluate."""
    import numpy as np

    from resnet_bk.data.files import read_documents
    from resnet_bk.data.prepare import prepare_corpus
    from resnet_bk.data.shards import TokenDataset

    assert model.tokenizer is not None
    if options.tokens is not None and options.tokens < 2:
        raise ConfigError(f"--tokens is {options.tokens}; expected a whole number >= 2.")
    if options.text is not None:
        documents = read_documents(Path(options.text), text_field=options.data.text_field)
        tokens = (token for document in documents for token in model.tokenizer.encode(document.text))
        return TokenDataset.from_ids("text", np.fromiter(tokens, dtype="<u4"))
    tokenizer = options.data.tokenizer or options.model
    corpus = prepare_corpus(dataclasses.replace(options.data, tokenizer=tokenizer), model.config.vocab_size)
    dataset = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}[options.split]
    if dataset is None:
        raise DataError(f"Corpus {options.data.name!r} has no test split; choose --split validation.")
    return dataset


def _table(report: dict[str, Any]) -> str:
    """The report as aligned text."""
    lines = [
        f"{'text':<16}{report['text']}",
        f"{'tokens':<16}{report['tokens']:,}",
        f"{'loss':<16}{report['loss']:.4f} nats per token",
        f"{'perplexity':<16}{report['perplexity']:.3f}",
    ]
    if report["bits_per_byte"] is not None:
        lines.append(f"{'bits per byte':<16}{report['bits_per_byte']:.4f}")
    if report["by_position"]:
        lines += ["", f"{'preceding tokens':<20}{'loss':>8}{'error':>9}{'tokens':>12}{'documents':>11}"]
    for part in report["by_position"]:
        error = "" if part["standard_error"] is None else f"{part['standard_error']:.4f}"
        span = f"{part['start']:,} to {part['stop'] - 1:,}"
        lines.append(f"{span:<20}{part['mean']:>8.4f}{error:>9}{part['count']:>12,}{part['documents']:>11,}")
    return "\n".join(lines)
