"""Every shipped configuration loads, means what its name says, and fits its model on paper."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from resnet_bk.cli.arguments import parse_run_config
from resnet_bk.models.config import PRESETS, ModelConfig
from resnet_bk.training.curriculum import curriculum_stages

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
NAMES = [
    "10b",
    "10b_adapters",
    "base",
    "demo",
    "gpu80",
    "gpu8x80",
    "laptop",
    "large",
    "long_context",
    "small",
    "t4",
    "tiny",
    "wikitext2",
    "xl",
]


def load(name: str, *overrides: str):
    return parse_run_config("train", "", ["--config", str(CONFIGS / f"{name}.yaml"), *overrides])


def test_the_expected_files_ship():
    assert [file.stem for file in FILES] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_config_loads_and_is_complete(name):
    config = load(name)
    assert config.training.output_dir == f"runs/{name}", "runs of different configurations must not share a folder"
    assert config.training.warmup_steps < config.training.steps
    assert config.training.evaluation_tokens >= config.training.sequence_length


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_config_named_after_a_preset_is_that_preset(name):
    assert load(name).model == ModelConfig.preset(name)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("10b_adapters", "10b"),
        ("demo", "tiny"),
        ("long_context", "small"),
        ("laptop", "tiny"),
        ("t4", "base"),
        ("gpu80", "xl"),
        ("gpu8x80", "xl"),
    ],
)
def test_config_with_a_preset_keeps_it(name, preset):
    assert load(name).model == ModelConfig.preset(preset)


def test_wikitext2_has_the_published_vocabulary():
    assert load("wikitext2").model.vocab_size == 33278


def test_long_context_is_long():
    training = load("long_context").training
    assert (training.sequence_length, training.batch_size) == (131072, 1)


@pytest.mark.parametrize("length", [131072, 1048576])
def test_long_context_can_grow_to_its_length(length):
    config = load("long_context", "--training.sequence_length", str(length), "--training.curriculum_from", "4096")
    stages = curriculum_stages(config.training)
    assert stages[0].sequence_length == 4096 and stages[-1] == (None, length, 1)
    assert {stage.sequence_length * stage.batch_size for stage in stages} == {length}
    assert sum(stage.steps or 0 for stage in stages) <= config.training.steps // 2
    assert config.training.evaluation_tokens >= length


def test_long_context_can_carry_its_state():
    comment = (CONFIGS / "long_context.yaml").read_text()
    (options,) = re.findall(r"# (--training.sequence_length \d+ --training.carry .*) reads", comment)
    training = load("long_context", *options.split()).training
    assert (training.carry, training.sequence_length, training.stream_length) == ("truncated", 16384, 1048576)


def test_overrides_win_over_the_file():
    config = load("tiny", "--training.steps", "7", "--model.num_layers=2")
    assert (config.training.steps, config.model.num_layers, config.model.d_model) == (7, 2, 128)
