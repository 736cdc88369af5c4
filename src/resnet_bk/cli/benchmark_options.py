"""Options that several benchmarks share: models, tokens, where rows go, how long it may take."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from resnet_bk.cli.arguments import Parser, model_parser, run_config, run_parser
from resnet_bk.errors import ConfigError
from resnet_bk.evaluation.ledger import BENCHMARKS
from resnet_bk.experiments.arms import ARMS, Arm, make_arms, named_arms
from resnet_bk.experiments.corpora import CorpusSource
from resnet_bk.models.config import ModelConfig
from resnet_bk.training.config import TrainingConfig

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
    parser.add_argument(
        "--rates", type=str, default=None, help="Learning rates of the sweep; default: half, once, twice training's."
    )
    parser.add_argument("--seeds", type=str, default="0,1,2", help="Seeds joined by commas; the first makes the sweep.")
    parser.add_argument(
        "--context",
        type=Literal["fresh", "carried", "documents"],
        default="fresh",
        help="How training sequences begin: with an empty state, with that of the batch before, or with an empty "
        "state at every document too.",
    )
    parser.add_argument("--window", type=int, default=0, help="Tokens of evaluation windows; 0 = training length.")
    parser.add_argument(
        "--curve-points", type=int, default=8, help="Evaluations on the way: at 1, 1/2, 1/4, ... of it."
    )
    parser.add_argument("--sequence-length", type=int, default=None, help="The same as --training.sequence_length.")
    parser.add_argument("--parallel", type=int, default=1, help="Runs at once; small models do not fill a GPU.")
    parser.add_argument("--work", type=str, default="runs/compare", help="Folder for what a broken run continues from.")
    add_ledger_options(parser)
    return parser, arguments


@dataclass(frozen=True)
class ComparisonOptions:
    """What the options of a `training_parser` come to."""

    changes: dict[str, dict[str, Any]]
    """Arm -> fields that it changes."""
    model: ModelConfig
    """Of the corpus's vocabulary."""
    training: TrainingConfig
    source: CorpusSource
    protocol: dict[str, Any]
    """Further fields of `Comparison`."""
    running: dict[str, Any]
    """Keyword arguments of `compare` and `scale`."""


def comparison_options(
    name: str, parser: Parser, options: Any, arguments: Sequence[str], question: str
) -> ComparisonOptions:
    """The options that a `training_parser` parsed.

    Args:
        name: of the benchmark.
        parser: the parser.
        options: what it parsed.
        arguments: what the user gave, for the ledger.
        question: ledger file unless `--question` names another.
    """
    from resnet_bk.experiments.compare import default_rates, parse_numbers

    config = run_config(parser, options)
    training = config.training
    if options.sequence_length is not None:
        training = dataclasses.replace(training, sequence_length=options.sequence_length)
    rates = default_rates(training.learning_rate) if options.rates is None else parse_numbers(options.rates, "rates")
    seeds = parse_numbers(options.seeds, "seeds", int)
    changes = _changes(options)
    source = CorpusSource(options.tokens, config.data, config.model.vocab_size)
    return ComparisonOptions(
        changes=changes,
        model=dataclasses.replace(config.model, vocab_size=source.open().vocab_size),
        training=training,
        source=source,
        protocol={
            "rates": rates,
            "seeds": seeds,
            "context": options.context,
            "window": options.window,
            "curve_points": options.curve_points,
            "label": options.label,
        },
        running={
            "command": command_line(name, arguments),
            "question": options.question or question,
            "benchmarks": Path(options.benchmarks),
            "work_dir": Path(options.work),
            "budget": options.budget,
            "parallel": options.parallel,
            "commit": options.commit,
        },
    )


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


def add_ledger_options(parser: Parser, *, label: bool = True) -> None:
    """Add the options of where rows go and when to stop."""
    parser.add_argument("--question", type=str, default=None, help="File of benchmarks/results that rows go to.")
    parser.add_argument("--benchmarks", type=str, default=str(BENCHMARKS), help="Folder of the ledger.")
    parser.add_argument("--commit", type=str, default=None, help="Commit of the code, where git cannot tell.")
    if label:
        parser.add_argument("--label", type=str, default="", help="Runs with a label that has no rows are made anew.")
    parser.add_argument("--budget", type=float, default=None, help="Seconds after which to stop; run again to go on.")


def arms_of(options: Any, base: ModelConfig) -> tuple[Arm, ...]:
    """The arms that `--models` names and `--arms` describes, of the size of `base`; the file's come last."""
    return make_arms(base, _changes(options))


def _changes(options: Any) -> dict[str, dict[str, Any]]:
    changes = named_arms(name.strip() for name in options.models.split(",") if name.strip())
    return changes if options.arms is None else changes | _read_arms(options.arms)


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
