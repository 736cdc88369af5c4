"""Options that several benchmarks share: models, tokens, where rows go, how long it may take."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_bk.cli.arguments import Parser, model_parser, run_parser
from resnet_bk.errors import ConfigError
from resnet_bk.evaluation.ledger import BENCHMARKS
from resnet_bk.experiments.arms import ARMS, Arm, make_arms, named_arms
from resnet_bk.experiments.corpora import CorpusSource, ExperimentCorpus

DEFAULT_PRESET = "tiny"


def training_parser(name: str, description: str, arguments: Sequence[str]) -> tuple[Parser, list[str]]:
    """A parser of model, data and training with the shared options, and the arguments to parse.

    Without a configuration or preset the model is the `tiny` one.
    """
    arguments = list(arguments)
    given = {argument.split("=", 1)[0] for argument in arguments}
    if not given & {"--config", "--model.preset", "--model.vocab_size"}:
        arguments = ["--model.preset", DEFAULT_PRESET, *arguments]
    parser = run_parser(f"benchmark {name}", description, arguments)
    parser.add_argument(
        "--tokens",
        type=str,
        default=None,
        help="Folder of prepared token shards, or .npy file of token ids, to use instead of data.name.",
    )
    _add_arms(parser)
    add_ledger_options(parser)
    return parser, arguments


def shape_parser(name: str, description: str, arguments: Sequence[str]) -> Parser:
    """A parser of the model section, `tiny` unless told otherwise, and of the arms."""
    parser = model_parser(f"benchmark {name}", description, arguments, preset=DEFAULT_PRESET)
    _add_arms(parser)
    return parser


def _add_arms(parser: Parser) -> None:
    default = "bk,transformer,mamba2,mamba3"
    parser.add_argument("--models", type=str, default=default, help=f"Names joined by commas: {', '.join(ARMS)}.")
    parser.add_argument(
        "--arms", type=str, default=None, help="YAML file: name -> fields of the model section that it changes."
    )


def add_ledger_options(parser: Parser, *, question: bool = True, label: bool = True) -> None:
    """Add the options of where rows go and when to stop."""
    if question:
        parser.add_argument("--question", type=str, default=None, help="File of benchmarks/results that rows go to.")
    parser.add_argument("--benchmarks", type=str, default=str(BENCHMARKS), help="Folder of the ledger.")
    parser.add_argument("--commit", type=str, default=None, help="Commit of the code, where git cannot tell.")
    if label:
        parser.add_argument("--label", type=str, default="", help="Runs with a label that has no rows are made anew.")
    parser.add_argument("--budget", type=float, default=None, help="Seconds after which to stop; run again to go on.")


def arms_of(options: Any, base: Any) -> tuple[Arm, ...]:
    """The arms that `--models` names and `--arms` describes, of the size of `base`; the file's come last."""
    changes = named_arms(name.strip() for name in options.models.split(",") if name.strip())
    if options.arms is not None:
        changes |= _read_arms(options.arms)
    return make_arms(base, changes)


def source_of(options: Any, run: Any) -> tuple[CorpusSource, ExperimentCorpus]:
    """Where the tokens come from, and the opened corpus."""
    source = CorpusSource(options.tokens, run.data, run.model.vocab_size)
    return source, source.open()


def command_line(name: str, arguments: Sequence[str]) -> str:
    """The command for the ledger; of paths outside the project only the last part is told."""
    shown = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    return shlex.join(["resnet-bk", "benchmark", name, *shown])


def _read_arms(file: str) -> dict[str, dict[str, Any]]:
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--arms {file} is not valid YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(content, dict) or not all(isinstance(fields, dict) for fields in content.values()):
        raise ConfigError(f"--arms {file} must hold names of arms, each with fields of the model section below it.")
    return {str(name): fields for name, fields in content.items()}
