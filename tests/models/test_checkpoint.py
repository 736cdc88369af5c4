"""The model folder: what is saved comes back, what is damaged is named, and nothing is half-written."""

from __future__ import annotations

import json
import os
import struct
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from resnet_bk.errors import CheckpointError, MissingDependencyError
from resnet_bk.models import checkpoint
from resnet_bk.models.checkpoint import load_pretrained, load_weights, save_pretrained
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.generate import GenerationConfig
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.tokenizer import Tokenizer

SIZES = dict(vocab_size=270, d_model=32, num_layers=2, feed_forward_dim=48, head_dim=16, state_size=16)
WEIGHTS = "model.safetensors"


def make_model(**options):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**{**SIZES, **options}))


@pytest.fixture
def folder(tmp_path):
    return save_pretrained(make_model(), tmp_path / "model")


def state_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(source, *words):
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(LanguageModel, source)
    message = str(caught.value)
    assert all(str(word) in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False}, {"phase_coupling": True, "source": "free"}])
def test_round_trip(tmp_path, options):
    model = make_model(**options)
    folder = save_pretrained(model, tmp_path / "a" / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "generation_config.json", WEIGHTS]
    loaded = load_pretrained(LanguageModel, folder)
    assert state_equal(model, loaded)
    assert loaded.config == model.config
    assert not loaded.training
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    ids = torch.randint(0, 270, (1, 9))
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_tokenizer_and_generation_config_travel_with_the_model(tmp_path):
    model = make_model()
    model.tokenizer = Tokenizer.train(["some text"], 260)
    model.generation_config = GenerationConfig(temperature=0.7, top_k=9, seed=3)
    loaded = load_pretrained(LanguageModel, save_pretrained(model, tmp_path / "model"))
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.sha256 == model.tokenizer.sha256
    assert loaded.generation_config == model.generation_config
    save_pretrained(make_model(), tmp_path / "model")
    assert load_pretrained(LanguageModel, tmp_path / "model").tokenizer is None


def test_config_json_names_type_version_and_every_field(folder):
    values = json.loads((folder / "config.json").read_text())
    assert values["model_type"] == "resnet_bk"
    assert values["dtype"] == "float32"
    assert {name: values[name] for name in make_model().config.to_dict()} == make_model().config.to_dict()
    edit_json(folder / "config.json", transformers_version="5.0", _name_or_path="x", torch_dtype="float32", dtype=None)
    assert load_pretrained(LanguageModel, folder).config == make_model().config


def test_data_types(tmp_path):
    model = make_model().to(torch.bfloat16)
    folder = save_pretrained(model, tmp_path / "narrow")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert state_equal(load_pretrained(LanguageModel, folder), model)
    assert state_equal(load_pretrained(LanguageModel, folder, dtype=torch.float32), model.float())
    with torch.no_grad():
        model = model.to(torch.bfloat16)
        model.norm.float()
    mixed = load_pretrained(LanguageModel, save_pretrained(model, tmp_path / "mixed"))
    assert (mixed.norm.weight.dtype, mixed.embedding.weight.dtype) == (torch.float32, torch.bfloat16)


def test_load_weights_fills_a_model_in_place_or_leaves_it(folder):
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    before = [parameter.data_ptr() for parameter in model.parameters()]
    load_weights(model, folder)
    assert state_equal(model, make_model())
    assert before == [parameter.data_ptr() for parameter in model.parameters()]
    other = make_model(feed_forward_dim=40)
    with pytest.raises(CheckpointError, match="has shape"):
        load_weights(other, folder)
    assert state_equal(other, make_model(feed_forward_dim=40))


class TiedModel(nn.Module):
    """Two names for one parameter, a stored buffer, one that is not stored, a frozen parameter and a view."""

    tokenizer = generation_config = adapters = None

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4, bias=False)
        self.outer.weight = self.inner.weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.view = nn.Parameter(torch.randn(100)[:5])
        self.register_buffer("stored", torch.randn(2))
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def test_tied_parameters_are_stored_once_and_stay_tied(tmp_path):
    model = TiedModel(ModelConfig(**SIZES))
    folder = save_pretrained(model, tmp_path / "model")
    stored = load_file(folder / WEIGHTS)
    assert sorted(stored) == ["frozen", "inner.bias", "inner.weight", "stored", "view"]
    assert (folder / WEIGHTS).stat().st_size < 1000
    loaded = load_pretrained(TiedModel, folder)
    assert loaded.inner.weight is loaded.outer.weight
    assert not loaded.frozen.requires_grad
    assert loaded.table.tolist() == [0, 1, 2]
    assert state_equal(model, loaded)


def test_large_models_are_split_into_shards(tmp_path):
    model = make_model()
    folder = save_pretrained(model, tmp_path / "model", max_shard_size=20_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert sorted(index["weight_map"]) == sorted(model.state_dict())
    for shard in shards:
        assert len(load_file(shard)) == 1 or sum(t.nbytes for t in load_file(shard).values()) <= 20_000
    assert state_equal(load_pretrained(LanguageModel, folder), model)

    moved = shards[1].rename(folder / "elsewhere")
    refused(folder, "model.safetensors.index.json", shards[1].name, "copy all of its files")
    moved.rename(shards[1])
    name, file = next(iter(index["weight_map"].items()))
    other = next(shard.name for shard in shards if shard.name != file)
    index["weight_map"][name] = other
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, other, name, "lacks")
    index["weight_map"][name] = "../secret"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "'../secret'")
    save_pretrained(model, tmp_path / "whole")
    os.link(tmp_path / "whole" / WEIGHTS, folder / WEIGHTS)
    refused(folder, WEIGHTS, "model.safetensors.index.json", "out of date")


def test_saving_again_replaces_a_model_folder_and_keeps_its_documents(folder):
    (folder / "README.md").write_text("card")
    save_pretrained(make_model(num_layers=1), folder, max_shard_size=20_000)
    assert load_pretrained(LanguageModel, folder).config.num_layers == 1
    assert not (folder / WEIGHTS).exists()
    save_pretrained(make_model(), folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "generation_config.json", WEIGHTS,
    ]  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_empty_folder_is_used(tmp_path):
    save_pretrained(make_model(), tmp_path)
    assert state_equal(load_pretrained(LanguageModel, tmp_path), make_model())


@pytest.mark.parametrize("name", ["thesis.tex", "optimizer.safetensors", "tokenizer.json", "config.json"])
def test_other_people_s_folders_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"not just a model folder .it holds '{name}'.; nothing was written"):
        save_pretrained(make_model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(CheckpointError, match="is a file"):
        save_pretrained(make_model(), tmp_path / name)


@pytest.mark.parametrize("step", ["write_weights", "_write_json", "force_to_disk", "_replace_folder"])
def test_a_failed_save_leaves_the_old_folder_whole_and_nothing_else(monkeypatch, folder, step):
    real, calls = getattr(checkpoint, step), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == (2 if step == "_write_json" else 1):
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(checkpoint, step, failing)
    with pytest.raises(CheckpointError, match=r"could not be written .*No space left.*free the disk"):
        save_pretrained(make_model(num_layers=1), folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert state_equal(load_pretrained(LanguageModel, folder), make_model())


def test_a_failed_rename_brings_the_old_folder_back(monkeypatch, folder):
    real = type(folder).rename

    def rename(self, target):
        if ".partial-" in self.name:
            raise OSError("disk on fire")
        return real(self, target)

    monkeypatch.setattr(type(folder), "rename", rename)
    with pytest.raises(CheckpointError, match="disk on fire"):
        save_pretrained(make_model(num_layers=1), folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert state_equal(load_pretrained(LanguageModel, folder), make_model())


def test_what_is_not_a_model_folder(tmp_path):
    refused(tmp_path / "nothing", "does not exist")
    refused(tmp_path, "not a model folder: it has no config.json")
    (tmp_path / "config.json").write_text('{"model_type": "resnet_bk",')
    refused(tmp_path, "config.json", "not valid JSON", "line 1")
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    refused(tmp_path, "config.json", "not valid JSON", "position 16")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json", "JSON list")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refused(tmp_path, "config.json", "'gpt2'", "'resnet_bk'")
    refused(tmp_path / "config.json", "is a file; expected the folder")


def test_bad_config_fields(folder):
    edit_json(folder / "config.json", d_modell=3)
    refused(folder, "config.json", "'model.d_modell'", "did you mean 'model.d_model'")
    edit_json(folder / "config.json", d_modell=None, d_model="wide")
    refused(folder, "config.json", "model.d_model is 'wide'")
    edit_json(folder / "config.json", d_model=32, format=2)
    refused(folder, "config.json", "format is 2", "Update the library")


def test_bad_generation_config_and_tokenizer(folder):
    (folder / "generation_config.json").write_text('{"top_p": 7}')
    refused(folder, "generation_config.json", "generation.top_p is 7")
    (folder / "generation_config.json").unlink()
    Tokenizer.train(["more than the model has"], 272).save(folder)
    tokens = Tokenizer.from_file(folder).vocab_size
    assert tokens > 270
    refused(folder, "tokenizer.json", f"has {tokens} tokens", "only 270")
    model = make_model()
    model.tokenizer = Tokenizer.from_file(folder)
    with pytest.raises(CheckpointError, match="only 270"):
        save_pretrained(model, folder.parent / "new")
    assert not (folder.parent / "new").exists()


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_weights_cut_inside_the_header(folder, size):
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(size)
    refused(folder, WEIGHTS, "truncated or damaged", f"{size} bytes")


@pytest.mark.parametrize("lost", [1, 50_000])
def test_truncated_weights_name_the_first_tensor_that_is_cut(folder, lost):
    size = (folder / WEIGHTS).stat().st_size
    with (folder / WEIGHTS).open("r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        file.truncate(size - lost)
    header.pop("__metadata__")
    ends = {name: entry["data_offsets"][1] + 8 + length for name, entry in header.items()}
    first = min((end, name) for name, end in ends.items() if end > size - lost)[1]
    refused(folder, WEIGHTS, "truncated", repr(first), f"has {size - lost} bytes")


@pytest.mark.parametrize("header", [b"not json", b"[]", b'{"x": 1}', b'{"x": {"dtype": "F32", "shape": [1]}}'])
def test_weights_with_a_foreign_header(folder, header):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    refused(folder, WEIGHTS, "its header is not that of a safetensors file")


def test_weights_that_safetensors_refuses(folder):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).write_bytes(bytes(raw) + b"rest")
    refused(folder, WEIGHTS, "cannot be read")


def test_missing_renamed_and_extra_tensors(folder):
    name = "blocks.1.mixer.in_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({"blocks.1.mixer.in_projection.weight": tensors.pop(name)}))
    refused(folder, WEIGHTS, repr(name), "'blocks.1.mixer.in_projection.weight'", "renamed")
    edit_weights(folder, lambda tensors: tensors.pop("blocks.1.mixer.in_projection.weight"))
    refused(folder, WEIGHTS, repr(name), "is missing")
    save_pretrained(make_model(), folder)
    edit_weights(folder, lambda tensors: tensors.update(extra=torch.zeros(2, 3)))
    refused(folder, WEIGHTS, "'extra'", "[2, 3]", "unknown to the model")


def test_wrong_shape_and_data_type(folder):
    edit_weights(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(31)}))
    refused(folder, WEIGHTS, "'norm.weight'", "[31]", "[32]")
    edit_weights(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(32, dtype=torch.int8)}))
    refused(folder, WEIGHTS, "'norm.weight'", "I8", "F32")
    edit_weights(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(32, dtype=torch.float16)}))
    refused(folder, WEIGHTS, "'norm.weight'", "F16", "F32")
    edit_json(folder / "config.json", dtype=None)  # says nothing, so any floating type may come
    assert load_pretrained(LanguageModel, folder, dtype=torch.float32).norm.weight.dtype == torch.float32


def test_pickles_are_refused_unread(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, "holds no weights", WEIGHTS)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(folder, "pytorch_model.bin", "pickle", "safetensors")
    refused(folder / "pytorch_model.bin", "pickle")


def test_hub_names(monkeypatch, folder, tmp_path):
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    asked = []

    def fetch(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert state_equal(load_pretrained(LanguageModel, "someone/their-model"), make_model())
    assert asked == [("someone/their-model", ["*.json", "*.safetensors"])]
    assert state_equal(load_pretrained(LanguageModel, "model"), make_model())  # a folder here
    for name in ("gpt2", "./someone/model", "a/b/c", "/no/where", "~/x"):
        refused(name, "does not exist; expected a model folder or a hub name")
    assert len(asked) == 1

    def offline(name, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find the files.\nTry again.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("someone/their-model", "no folder 'someone/their-model' here", "Cannot find the files.", "give its folder")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="pip install huggingface_hub"):
        load_pretrained(LanguageModel, "someone/their-model")
