"""Runs that train adapters: small checkpoints, exact resume, the base named, and what comes of them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from resnet_bk import LanguageModel, ModelConfig, RunConfig, TrainingConfig
from resnet_bk.data.config import DataConfig
from resnet_bk.errors import CheckpointError, ConfigError, DataError
from resnet_bk.models.config import AdapterConfig
from resnet_bk.tokenizer import Tokenizer
from resnet_bk.training.checkpoint import export_model, latest_checkpoint
from resnet_bk.training.config import DistributedConfig, MemoryConfig
from resnet_bk.training.run import train_run
from resnet_bk.training.stability.config import StabilityConfig

MODEL = ModelConfig(vocab_size=270, d_model=16, num_layers=2, feed_forward_dim=32, head_dim=8, state_size=8)


@pytest.fixture
def config(tmp_path) -> RunConfig:
    """Adapters on a random base, for text that always says the same."""
    torch.manual_seed(0)
    model, text = LanguageModel(MODEL), "alpha beta gamma delta " * 60
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # it is frozen, and the head: as at the start it allows small logits only
    model.tokenizer = Tokenizer.train([text], 270)
    base = model.save_pretrained(tmp_path / "base")
    texts = tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "validation"):
        (texts / f"{split}.txt").write_text(text)
    return RunConfig(
        model=MODEL,
        data=DataConfig(name="text", path=str(texts), cache_dir=str(tmp_path / "cache")),
        training=TrainingConfig(
            output_dir=str(tmp_path / "run"), steps=12, sequence_length=16, batch_size=4, learning_rate=2e-2,
            warmup_steps=2, schedule="constant", evaluate_every=0, evaluation_tokens=200, checkpoint_every=4,
            device="cpu", tensorboard=False,
        ),
        stability=StabilityConfig(recovery=True, snapshot_every=3, every=2),
        adapters=AdapterConfig(base=str(base), rank=2, group=8),
    )  # fmt: skip


def changed(config: RunConfig, section: str, **fields) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


def run(config: RunConfig):
    return train_run(config, progress=False)


def test_adapters_learn_and_a_checkpoint_is_a_folder_of_them(config, tmp_path):
    result = run(changed(config, "training", steps=40))
    base = LanguageModel.from_pretrained(config.adapters.base)
    assert result.corpus.tokenizer.sha256 == base.tokenizer.sha256, "text is read in the tokens of the base"
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-2] < losses[0] - 0.3
    folder = result.training.checkpoint
    stored = load_file(folder / "model.safetensors")
    assert all(name.rpartition(".")[2] in ("adapter_in", "adapter_out") for name in stored)
    moments = load_file(next((folder / "optimizer").glob("*.safetensors")))
    assert len(moments) == 3 * len(stored), "nothing frozen has moments"
    again = LanguageModel.from_pretrained(folder)
    ids = torch.arange(40)[None]
    assert torch.equal(again(ids).logits, result.model(ids).logits)
    assert torch.equal(again.embedding.weight, base.embedding.weight)
    merged = LanguageModel.from_pretrained(export_model(folder, tmp_path / "merged"))
    assert merged.adapters is None and merged.num_parameters() == base.num_parameters()
    # Float32 sums in another order: measured 1e-6 of logits near 1.
    torch.testing.assert_close(merged(ids).logits, again(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["fused", "offload"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(config, tmp_path, optimizer):
    config = dataclasses.replace(config, memory=MemoryConfig(optimizer=optimizer))
    whole = run(changed(config, "training", output_dir=str(tmp_path / "whole")))
    run(changed(config, "training", steps=7))
    parts = run(changed(config, "training", resume=True))
    expected = whole.model.state_dict()
    assert expected and all(torch.equal(parts.model.state_dict()[name], t) for name, t in expected.items())
    assert whole.training.validation == parts.training.validation


@pytest.mark.parametrize(("field", "value"), [("rank", 4), ("alpha", 2.0), ("group", 16)])
def test_resuming_with_other_adapters_names_the_field(config, field, value):
    run(changed(config, "training", steps=2))
    other = changed(changed(config, "training", resume=True), "adapters", **{field: value})
    with pytest.raises(CheckpointError, match=f"adapters.{field} is {value}"):
        run(other)


def test_resuming_on_another_base_is_refused(config, tmp_path):
    run(changed(config, "training", steps=2))
    model = LanguageModel.from_pretrained(config.adapters.base)
    same = model.save_pretrained(tmp_path / "same", max_shard_size=5000)
    with torch.no_grad():
        model.norm.weight[0] += 1
    other = model.save_pretrained(tmp_path / "other")
    longer = changed(config, "training", steps=3, resume=True)
    with pytest.raises(CheckpointError, match=r"adapters.base_sha256 is"):
        run(changed(longer, "adapters", base=str(other)))
    assert run(changed(longer, "adapters", base=str(same))).training.step == 3
    with pytest.raises(CheckpointError, match=r"adapters.rank is None"):
        run(dataclasses.replace(longer, adapters=AdapterConfig()))


def test_a_base_that_does_not_fit_is_named(config, tmp_path):
    with pytest.raises(ConfigError, match=r"model.num_layers is 3, but the base model .* has 2"):
        run(changed(config, "model", num_layers=3))
    with pytest.raises(CheckpointError, match="does not exist"):
        run(changed(config, "adapters", base=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="fsdp cannot split packed matrices"):
        dataclasses.replace(config, distributed=DistributedConfig(strategy="fsdp"))
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer.json"):
        run(config)
    assert latest_checkpoint(config.training.output_dir) is None


@pytest.mark.slow
def test_two_ranks_follow_the_loss_curve_of_one_process(config, tmp_path):
    expected = run(config).training
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    sections = dataclasses.asdict(changed(config, "training", output_dir=str(tmp_path / "two")))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    command += ["--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    found = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert len(found) == len(rows) > 1
    for mine, other in zip(map(json.loads, found), map(json.loads, rows), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-5)
    model = LanguageModel.from_pretrained(tmp_path / "two" / expected.checkpoint.name)
    assert model.adapters is not None


@pytest.mark.parametrize("fields", [{"rank": 0}, {"alpha": 0.0}, {"group": 7}])
def test_a_field_that_cannot_be_is_named(fields):
    with pytest.raises(ConfigError, match=f"adapters.{next(iter(fields))}"):
        AdapterConfig(**fields)
