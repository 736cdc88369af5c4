"""Adapters in a folder of their own: what comes back, which base they accept, and what merging computes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk.cli import main
from resnet_bk.errors import CheckpointError, ConfigError
from resnet_bk.layers.lora import AdaptedLinear
from resnet_bk.models.adapters import add_adapters, load_base, merge_adapters
from resnet_bk.models.checkpoint import load_pretrained
from resnet_bk.models.config import AdapterConfig
from resnet_bk.tokenizer import Tokenizer

SIZES = dict(vocab_size=270, d_model=32, num_layers=2, feed_forward_dim=48, head_dim=16, state_size=16)
IDS = torch.arange(2 * 40).view(2, 40) % 270


def dense(seed: int = 0, **options) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(ModelConfig(**{**SIZES, **options}))


@pytest.fixture
def base(tmp_path):
    model = dense()
    model.tokenizer = Tokenizer.train(["one text, and another text"] * 9, 270)
    return model.save_pretrained(tmp_path / "base")


def trained(base) -> LanguageModel:
    """A model whose adapters do something."""
    model = load_base(LanguageModel, AdapterConfig(base=str(base), rank=3, alpha=6.0, group=16))
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, AdaptedLinear):
            nn.init.normal_(layer.adapter_out, std=0.1)
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False}, {"mixer": "mamba2"}])
def test_a_base_read_from_disk_is_the_one_packed_in_memory(tmp_path, options):
    folder = dense(**options).save_pretrained(tmp_path / "base", max_shard_size=5000)
    config = AdapterConfig(base=str(folder), rank=3, group=16)
    read, packed = load_base(LanguageModel, config), dense(**options)
    trainable = add_adapters(packed, config)
    assert read.adapters == packed.adapters and read.adapters is not None
    assert torch.equal(read.eval()(IDS).logits, packed.eval()(IDS).logits)
    assert sum(p.numel() for p in read.parameters() if p.requires_grad) == trainable
    assert not any(tensor.is_meta for tensor in [*read.parameters(), *read.buffers()])
    assert read.num_parameters() - trainable == dense(**options).num_parameters()


def test_a_folder_of_adapters_gives_the_adapted_model(base, tmp_path):
    model = trained(base)
    folder = model.save_pretrained(tmp_path / "adapters")
    stored = load_file(folder / "model.safetensors")
    assert set(stored) == {name for name, p in model.named_parameters() if p.requires_grad}
    again = LanguageModel.from_pretrained(folder)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.tokenizer is not None and not again.training
    assert torch.equal(again.generate(IDS[:1], max_new_tokens=5), model.generate(IDS[:1], max_new_tokens=5))
    with pytest.raises(CheckpointError, match="holds adapters"):
        load_pretrained(LanguageModel, folder)


def test_the_base_may_move_and_be_cut_otherwise(base, tmp_path, capsys):
    model = trained(base)
    folder = model.save_pretrained(tmp_path / "adapters")
    moved = LanguageModel.from_pretrained(base).save_pretrained(tmp_path / "moved", max_shard_size=5000)
    (base / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds adapters of the base model .*--base"):
        LanguageModel.from_pretrained(folder)
    assert torch.equal(LanguageModel.from_pretrained(folder, base=moved)(IDS).logits, model(IDS).logits)
    options = ["--model", str(folder), "--base", str(moved)]
    assert main(["generate", *options, "--prompt", "one", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("one")
    assert main(["info", *options]) == 0
    assert "adapters of rank 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: dense(seed=1), "with checksum [0-9a-f]{12}; .* has checksum [0-9a-f]{12}"),
        (lambda: dense(norm_epsilon=1e-3), "model.norm_epsilon is 1e-05"),
        (lambda: dense(d_model=64), "model.d_model is 32"),
    ],
)
def test_another_base_is_refused_by_name(base, tmp_path, other, words):
    folder = trained(base).save_pretrained(tmp_path / "adapters")
    wrong = other().save_pretrained(tmp_path / "wrong")
    with pytest.raises(CheckpointError, match=words):
        LanguageModel.from_pretrained(folder, base=wrong)


def test_what_makes_no_sense_is_refused(base, tmp_path):
    model = trained(base)
    with pytest.raises(ConfigError, match="adapters already"):
        add_adapters(model, AdapterConfig())
    folder = model.save_pretrained(tmp_path / "adapters")
    with pytest.raises(CheckpointError, match="merge"):
        load_base(LanguageModel, AdapterConfig(base=str(folder), group=16))
    with pytest.raises(ConfigError, match="needs no base"):
        LanguageModel.from_pretrained(base, base=folder)
    with pytest.raises(ConfigError, match="no adapters"):
        merge_adapters(dense())
    values = json.loads((folder / "config.json").read_text())
    del values["adapters"]["base_sha256"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="section adapters is damaged"):
        LanguageModel.from_pretrained(folder)


def test_a_merged_model_computes_what_the_adapted_one_did(base, tmp_path):
    model = trained(base)
    before = model(IDS).logits
    merge_adapters(model)
    assert model.adapters is None and not any(isinstance(layer, AdaptedLinear) for layer in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    # Float32 sums in another order: measured 1e-6 of logits near 1.
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)
    folder = model.save_pretrained(tmp_path / "merged")
    assert torch.equal(load_pretrained(LanguageModel, folder)(IDS).logits, model(IDS).logits)


def test_what_is_frozen_may_be_narrow(base, tmp_path):
    folder = trained(base).save_pretrained(tmp_path / "adapters")
    narrow = LanguageModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert narrow.embedding.weight.dtype == torch.bfloat16
    layer = next(layer for layer in narrow.modules() if isinstance(layer, AdaptedLinear))
    assert layer.scales.dtype == torch.float16 and layer.adapter_in.dtype == torch.float32
    wide = LanguageModel.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(narrow(IDS).logits.float(), wide(IDS).logits, rtol=0.1, atol=0.05)
