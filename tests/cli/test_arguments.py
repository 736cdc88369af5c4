"""From YAML and options to a `RunConfig`, and what each mistake is answered with."""

from __future__ import annotations

import dataclasses

import pytest

from resnet_bk.cli.arguments import parse_run_config
from resnet_bk.cli.migration import PROTOTYPE_KEYS, prototype_hint
from resnet_bk.errors import ConfigError
from resnet_bk.models.config import ModelConfig
from resnet_bk.training.config import RunConfig


def parse(*arguments: str) -> RunConfig:
    return parse_run_config("train", "Train.", arguments)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str | bytes):
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def message(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_those_of_the_dataclasses():
    assert parse("--model.vocab_size", "10") == RunConfig(model=ModelConfig(vocab_size=10))


def test_later_sources_win(yaml_file):
    path = yaml_file("model: {preset: tiny, num_layers: 5}\ntraining: {steps: 3, learning_rate: 1e-3}")
    config = parse("--config", path, "--training.steps=4", "--data.tokenizer", "null")
    assert config.model == ModelConfig.preset("tiny", num_layers=5)
    assert (config.training.steps, config.training.learning_rate, config.data.tokenizer) == (4, 1e-3, None)


def test_a_second_file_wins_over_the_first(tmp_path, yaml_file):
    second = tmp_path / "second.yaml"
    second.write_text("training: {steps: 9}")
    config = parse(
        "--config", yaml_file("model: {preset: tiny}\ntraining: {steps: 3, seed: 1}"), "--config", str(second)
    )
    assert (config.training.steps, config.training.seed, config.model) == (9, 1, ModelConfig.preset("tiny"))


def test_preset_option_wins_over_the_preset_of_the_file(yaml_file):
    path = yaml_file("model: {preset: tiny}")
    assert parse("--config", path, "--model.preset", "small").model == ModelConfig.preset("small")


def test_help_shows_the_field_docstrings(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert leaving.value.code == 0
    assert "Width of the residual stream." in text and "Peak rate of AdamW." in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {d_modl: 3}", "Unknown configuration key 'model.d_modl'; did you mean 'model.d_model'?"),
        ("model: {steps: 3}", "did you mean 'training.steps'?"),
        ("modle: {d_model: 3}", "did you mean 'model'?"),
        ("steps: 3", "did you mean 'training.steps'?"),
        ("model: {n_seq: 2048}", "use training.sequence_length"),
        ("training: {mixed_precision: true}", "use training.precision"),
        ("memory_optimization: {cpu_offloading: true}", "Unknown configuration key 'memory_optimization'"),
        ("model: [1]", "section model holds a list"),
        ("model:\n", "section model holds nothing"),
        ("model: {", "line 1"),
        ("- 1", "holds a list; expected the sections model, data, training"),
        ("", "holds nothing"),
        ("model: {preset: tniy}", "Unknown preset 'tniy'; did you mean 'tiny'?"),
        ("model: {vocab_size: ten}", "model.vocab_size is 'ten'; expected a whole number."),
        ("model: {vocab_size: 1.5}", "model.vocab_size is '1.5'; expected a whole number."),
        ("model: {vocab_size: 9, kernel: fluz}", "expected one of flux, transmission, green."),
        ("model: {vocab_size: 0}", "model.vocab_size is 0; expected a whole number >= 1."),
        ("model: {vocab_size: 9, absorption_floor: 0}", "model.absorption_floor is 0.0; expected a number > 0."),
        ("model: {vocab_size: 9, absorption_floor: .nan}", "model.absorption_floor is nan; expected a number > 0."),
        ("model: {vocab_size: 9}\ntraining: {tensorboard: maybe}", "expected true or false."),
        ("model: {vocab_size: 9}\ndata: {max_bytes: many}", "expected a whole number or null."),
        (b"model: {\xff: 1}", "is not UTF-8 (byte 8)"),
    ],
)
def test_faulty_file(yaml_file, text, expected):
    assert expected in message("--config", yaml_file(text))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.d_modl", "3"], "Unknown option 'model.d_modl'; did you mean 'model.d_model'?"),
        (["--steps=3"], "did you mean 'training.steps'?"),
        (["--training.learning_rat", "3"], "did you mean 'training.learning_rate'?"),
        (["--dataset", "wikitext2"], "use data.name"),
        (["--model.vocab_size", "x"], "model.vocab_size is 'x'; expected a whole number."),
        (["--model", "tiny"], "--model names 'tiny', which is no YAML file"),
        (["--model.preset", "tniy"], "did you mean 'tiny'?"),
        (["--model.vocab_size", "9", "stray"], "stray"),
        (["--config"], "--config"),
        ([], "Missing: model.vocab_size. Name a configuration with --config FILE"),
    ],
)
def test_faulty_options(arguments, expected):
    assert expected in message(*arguments)


def test_prototype_keys_do_not_shadow_real_ones():
    config = parse("--model.vocab_size=9")
    sections = [getattr(config, section.name) for section in dataclasses.fields(config)]
    assert not {field.name for section in sections for field in dataclasses.fields(section)} & set(PROTOTYPE_KEYS)


def test_every_prototype_key_is_answered_in_any_section():
    for key, answer in PROTOTYPE_KEYS.items():
        assert answer in (prototype_hint(f"model.{key}") or "") and answer in (prototype_hint(key) or "")
    assert prototype_hint("model.d_model") is None


def test_a_list_of_stages_is_read_from_file_and_option(yaml_file):
    file = yaml_file("model: {vocab_size: 9}\ntraining: {curriculum: [[10, 64, 8], [5, 128, 4]]}")
    assert parse("--config", file).training.curriculum == [[10, 64, 8], [5, 128, 4]]
    assert parse("--config", file, "--training.curriculum", "[[1, 2, 3]]").training.curriculum == [[1, 2, 3]]
    assert "training.curriculum" in message(
        "--config", yaml_file("model: {vocab_size: 9}\ntraining: {curriculum: [a]}")
    )
