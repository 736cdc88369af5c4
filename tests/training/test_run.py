from __future__ import annotations

import dataclasses
import json
import lzma
import math

import numpy as np
import pytest
from matplotlib.image import imread

from resnet_bk import LanguageModel, ModelConfig, RunConfig, TrainingConfig
from resnet_bk.data.config import DataConfig
from resnet_bk.errors import CheckpointError
from resnet_bk.training.run import train_run, validation_baselines
from resnet_bk.training.stability.config import StabilityConfig


@pytest.fixture
def config(tmp_path) -> RunConfig:
    generator = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    texts = tmp_path / "texts"
    texts.mkdir()
    for split, lines in (("train", 200), ("validation", 80)):
        # Each word decides the next one four times in five, which token frequencies cannot express.
        state, text = 0, []
        for _ in range(lines * 8):
            state = (state + 1) % 5 if generator.random() < 0.8 else int(generator.integers(5))
            text.append(words[state])
        (texts / f"{split}.txt").write_text(" ".join(text))
    return RunConfig(
        model=ModelConfig(
            vocab_size=300, d_model=16, num_layers=1, feed_forward_dim=24, head_dim=8, state_size=8
        ),
        data=DataConfig(name="text", path=str(texts), cache_dir=str(tmp_path / "cache")),
        training=TrainingConfig(
            output_dir=str(tmp_path / "run"), steps=60, sequence_length=32, batch_size=8, learning_rate=1e-2,
            warmup_steps=10, evaluate_every=30, evaluation_tokens=500, checkpoint_every=20, device="cpu",
            tensorboard=False,
        ),
    )  # fmt: skip


def test_a_run_beats_the_unigram_baseline_and_leaves_everything(config, capsys):
    result = train_run(config)
    output = capsys.readouterr().out
    assert f"baseline unigram: {result.baselines['unigram']:.4f} bits per byte" in output
    validation = result.training.validation
    assert validation.bits_per_byte < result.baselines["unigram"]
    tokens = result.corpus.validation.tokens[1:500]
    assert validation.tokens == len(tokens) == 499
    assert validation.text_bytes == len(result.corpus.tokenizer.decode(tokens.tolist()).encode())

    folder = result.training.checkpoint
    assert folder.name == "step-000060"
    assert imread(result.loss_curve).shape[2] == 4
    model = LanguageModel.from_pretrained(folder)
    assert model.tokenizer.sha256 == result.corpus.tokenizer.sha256
    assert not result.model.training
    saved = json.loads((folder / "trainer_state.json").read_text())["config"]
    assert saved["data"] == dataclasses.asdict(config.data) and saved["model"] == config.model.to_dict()


def test_the_same_configuration_gives_the_same_model_even_in_parts(config, tmp_path):
    short = dataclasses.replace(config.training, steps=20, schedule="constant", output_dir=str(tmp_path / "parts"))
    train_run(dataclasses.replace(config, training=short), progress=False)
    longer = dataclasses.replace(short, steps=30, resume=True)
    parts = train_run(dataclasses.replace(config, training=longer), progress=False)
    whole = dataclasses.replace(longer, output_dir=str(tmp_path / "whole"))
    whole = train_run(dataclasses.replace(config, training=whole), progress=False)
    a, b = whole.model.state_dict(), parts.model.state_dict()
    assert all((a[name] == b[name]).all() for name in a)
    assert whole.training.validation == parts.training.validation


def test_resuming_on_other_data_names_the_field(config):
    train_run(dataclasses.replace(config, training=dataclasses.replace(config.training, steps=2)), progress=False)
    other = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, max_bytes=5000),
        training=dataclasses.replace(config.training, resume=True),
    )
    with pytest.raises(CheckpointError, match=r"data\.max_bytes is 5000, but"):
        train_run(other, progress=False)


def test_baselines_are_of_the_evaluated_text(config):
    corpus = train_run(dataclasses.replace(config, training=dataclasses.replace(config.training, steps=1))).corpus
    found = validation_baselines(corpus, 200)
    tokens = np.array(corpus.validation.tokens[1:200])
    text = corpus.tokenizer.decode(tokens.tolist()).encode()
    counts = np.bincount(corpus.train.tokens, minlength=corpus.tokenizer.vocab_size) + 1
    expected = -np.log2(counts / counts.sum())[tokens].sum() / len(text)
    assert found["unigram"] == pytest.approx(expected, rel=1e-12) and math.isfinite(expected)
    assert found["xz"] == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def test_the_section_stability_brings_its_callbacks_and_a_spike_is_survived(config):
    stability = StabilityConfig(recovery=True, every=20, spectral_every=30, absorption_start=0.05, snapshot_every=20)
    result = train_run(dataclasses.replace(config, stability=stability), progress=False)
    assert result.training.step == 60
    folder = result.training.checkpoint.parent
    rows = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
            for name in ("stability", "spectral", "recovery")}  # fmt: skip
    assert [row["step"] for row in rows["stability"] if row["kind"] == "stability"] == [20, 40, 60]
    assert [row["step"] for row in rows["spectral"]] == [0, 30, 60]
    assert rows["recovery"] == []
    start, moved = (row["layers"][0]["smallest_absorption"] for row in rows["spectral"][:2])
    assert start < 0.05 and moved < 0.05
    assert result.model.config == config.model
