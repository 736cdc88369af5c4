"""Typed command-line arguments, and a `RunConfig` from YAML files and `--section.key value` overrides."""

from __future__ import annotations

import dataclasses
import itertools
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from resnet_bk.cli.migration import prototype_hint
from resnet_bk.errors import ConfigError
from resnet_bk.models.config import PRESETS, ModelConfig, unknown_key_message
from resnet_bk.training.config import RunConfig

_PRESET = "model.preset"
_CONFIG = "config"


class Parser(ArgumentParser):
    """An argument parser that raises `ConfigError` with one readable line instead of leaving the process."""

    def __init__(self, command: str, **options: Any) -> None:
        # The docstring below a dataclass field is its help.
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(prog=f"resnet-bk {command}", allow_abbrev=False, default_env=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `ConfigError` for what argparse or jsonargparse objects to."""
        raise ConfigError(_explain(message, self._expected_types())) from ex

    def parse(self, arguments: Sequence[str]) -> Namespace:
        """The parsed arguments; an unknown option raises `ConfigError` and names the nearest."""
        known = [option[2:] for action in self._actions for option in action.option_strings if option[:2] == "--"]
        for argument in arguments:
            name = argument[2:].split("=", 1)[0]
            if argument.startswith("--") and name and name not in known:
                raise ConfigError(prototype_hint(name) or unknown_key_message(name, known, what="option"))
        return self.parse_args(list(arguments))

    def _expected_types(self) -> dict[str, Any]:
        """Option name (as in messages) -> what it holds."""
        return {action.dest: getattr(action, "_typehint", None) or action.type for action in self._actions}


def parse_run_config(command: str, description: str, arguments: Sequence[str]) -> RunConfig:
    """The `RunConfig` that the arguments of `command` describe; see `run_parser`."""
    parser = run_parser(command, description, arguments)
    return run_config(parser, parser.parse(arguments))


def run_parser(command: str, description: str, arguments: Sequence[str]) -> Parser:
    """A parser of the sections of a `RunConfig`, to which a command may add options of its own.

    `--config FILE` may be given more than once; later files, then `--section.key value`, win. `model.preset` (in a
    file or as an option) fills the model section first. A help request prints and exits, as argparse does.

    Raises:
        ConfigError: an unknown key (names the nearest, or what replaces a prototype's key), a wrong type or value,
            or a file that cannot be read as YAML; by this function for the files, by `parse` for the rest.
    """
    parser = Parser(
        command,
        description=description,
        usage=f"resnet-bk {command} --config FILE [--section.key VALUE ...]",
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with the sections model, data, training, distributed, stability, memory and adapters.",
    )
    _add_preset(parser)
    parser.add_class_arguments(RunConfig, as_group=True)
    presets = [section.get("preset") for section in map(_model_section, _option_values(arguments, _CONFIG))]
    _fill_from_preset(parser, [*presets, *_option_values(arguments, _PRESET)])
    return parser


def model_parser(command: str, description: str, arguments: Sequence[str], *, preset: str | None = None) -> Parser:
    """A parser of the section model alone, filled from `model.preset` or else from `preset`; see `run_parser`."""
    parser = Parser(command, description=description, usage=f"resnet-bk {command} [--model.key VALUE ...] [OPTIONS]")
    _add_preset(parser)
    parser.add_class_arguments(ModelConfig, "model")
    _fill_from_preset(parser, [preset, *_option_values(arguments, _PRESET)])
    return parser


def model_config(parser: Parser, parsed: Namespace) -> ModelConfig:
    """The `ModelConfig` among what a `model_parser` parsed."""
    sections = parsed.clone()
    sections.pop(_PRESET)
    return parser.instantiate(sections).model


def run_config(parser: Parser, parsed: Namespace) -> RunConfig:
    """The `RunConfig` among what a `run_parser` parsed."""
    sections = parsed.clone()
    sections.pop(_PRESET)
    instances = parser.instantiate(sections)
    return RunConfig(**{field.name: instances[field.name] for field in dataclasses.fields(RunConfig)})


def _add_preset(parser: Parser) -> None:
    preset_type = Literal[tuple(PRESETS)]  # type: ignore[valid-type]
    parser.add_argument(f"--{_PRESET}", type=preset_type, help="Fill the model section from this preset first.")


def _fill_from_preset(parser: Parser, presets: Sequence[Any]) -> None:
    """Make the last preset that is one the default of the model section."""
    named = [preset for preset in presets if preset is not None]
    if named:
        values = ModelConfig.preset(str(named[-1])).to_dict()
        parser.set_defaults({f"model.{name}": value for name, value in values.items()})


def _option_values(arguments: Sequence[str], name: str) -> list[str]:
    """Every value given to `--name VALUE` or `--name=VALUE`, in order."""
    option = f"--{name}"
    values = []
    for before, argument in itertools.pairwise(["", *arguments]):
        if before == option:
            values.append(argument)
        elif argument.startswith(f"{option}="):
            values.append(argument.split("=", 1)[1])
    return values


def _model_section(path: str) -> dict[str, Any]:
    """The model section of a YAML file whose every key is known."""
    values = _read_yaml(Path(path))
    _check_keys(values, [*_dotted_names(RunConfig), _PRESET], prefix="", path=path)
    return values.get("model") or {}


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8 text.") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise ConfigError(f"{path}{where}: not valid YAML ({problem}).") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {_kind(values)}; expected the sections {', '.join(_field_types(RunConfig))}.")
    return values


def _check_keys(values: dict[str, Any], known: list[str], *, prefix: str, path: str) -> None:
    """Raise `ConfigError` for the first key below `prefix` that is not among the dotted names `known`."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in known:
            continue
        if not any(other.startswith(f"{key}.") for other in known):
            names = known if prefix else [*_field_types(RunConfig), *known]
            raise ConfigError(f"{path}: {prototype_hint(key) or unknown_key_message(key, names)}")
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: section {key} holds {_kind(value)}; expected keys and values below it.")
        _check_keys(value, known, prefix=f"{key}.", path=path)


def _dotted_names(config: type, prefix: str = "") -> list[str]:
    """Every key of a configuration, sections included: `model.d_model`, ..."""
    names: list[str] = []
    for name, hint in _field_types(config).items():
        section = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        names += _dotted_names(hint, f"{prefix}{name}.") if section else [prefix + name]
    return names


def _field_types(config: type) -> dict[str, Any]:
    """Field name -> resolved type, in order."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def _kind(value: Any) -> str:
    """What a YAML value is, in words."""
    names = {type(None): "nothing", list: "a list", str: "a text", dict: "a mapping"}
    return names.get(type(value), repr(value))


def _explain(message: str, expected: dict[str, Any]) -> str:
    """A parser's message as field, value, expectation; unchanged but for line breaks if it has another form."""
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if key is not None and value is not None and expected.get(key[1]) is not None:
        return f"{key[1]} is {value[1].strip()!r}; expected {describe_type(expected[key[1]])}."
    missing = re.search(r"the following arguments are required: (.+)", message)
    if missing is not None:
        return f"Missing: {missing[1]}. Name a configuration with --config FILE, or give the value as an option."
    file = re.search(r"Unable to load config ['\"]([^'\"]*)['\"]", message)
    if key is not None and file is not None:
        return f"--{key[1]} names {file[1]!r}, which is no YAML file; for a single value write --{key[1]}.NAME VALUE."
    return " ".join(message.split())


def describe_type(annotation: Any) -> str:
    """What a value of this type looks like, in words."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, typing.get_args(annotation)))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe_type, typing.get_args(annotation)))
    if origin is list:
        return f"a list, each {describe_type(*typing.get_args(annotation))}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
