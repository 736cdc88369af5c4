from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resnet_bk import LanguageModel, Trainer
from resnet_bk.data.config import DataConfig
from resnet_bk.errors import CheckpointError, ConfigError
from resnet_bk.training.checkpoint import latest_checkpoint, list_checkpoints, newest_intact_checkpoint
from resnet_bk.training.saving.checksums import checksum_files, write_checksums
from resnet_bk.training.saving.state import read_state

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer/model.safetensors", "trainer_state.json"


def assert_same_checkpoint(left: Path, right: Path) -> None:
    """Every tensor of both folders is bit-identical, and so is the rest of the state."""
    for name in (WEIGHTS, OPTIMIZER):
        a, b = load_file(left / name), load_file(right / name)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    a, b = read_state(left), read_state(right)
    for state in (a, b):
        del state["config"]["training"]["output_dir"], state["config"]["training"]["resume"]
        del state["interval"]["seconds"]
    assert a == b


def rows(folder: Path) -> list[dict]:
    """Metrics without the speed, the only column that a clock decides."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in found]


def train(tiny, folder: Path | None = None, *, model=None, data_config=None, validation=None, **fields) -> Trainer:
    """A trainer that has run to its end."""
    if folder is not None:
        fields["output_dir"] = str(folder)
    trainer = Trainer(
        tiny.model() if model is None else model, tiny.loader(), tiny.config(**fields), data_config=data_config,
        validation=validation, progress=False,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_run_in_two_parts_equals_one(tiny, tmp_path, precision):
    """The first part is a shorter run: its schedule is constant, so that only `steps` differs."""
    options = dict(precision=precision, schedule="constant", log_every=4, gradient_accumulation_steps=2)
    whole = train(tiny, tmp_path / "whole", steps=7, **options)
    train(tiny, tmp_path / "parts", steps=3, **options)
    train(tiny, tmp_path / "parts", steps=7, resume=True, **options)
    a, b = whole.output_dir / "step-000007", tmp_path / "parts" / "step-000007"
    for name in (WEIGHTS, OPTIMIZER):
        left, right = load_file(a / name), load_file(b / name)
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert read_state(a)["scaler"] == read_state(b)["scaler"]


def test_folder_is_a_model_with_the_run_beside_it(tiny):
    trainer = train(tiny)
    folder = trainer.output_dir / "step-000006"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"config.json", "generation_config.json", WEIGHTS, OPTIMIZER, "checksums.json", STATE}
    loaded = LanguageModel.from_pretrained(folder)
    assert all(torch.equal(t, trainer.model.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_large_tensors_are_spread_over_several_files_and_found_again(tiny, tmp_path, monkeypatch):
    whole = train(tiny, tmp_path / "whole", schedule="constant", steps=6).model.state_dict()
    monkeypatch.setattr("resnet_bk.training.saving.state.MAX_FILE_BYTES", 20_000)
    half = train(tiny, tmp_path / "parts", schedule="constant", steps=3).output_dir / "step-000003"
    assert len(list(half.glob("model-*.safetensors"))) > 1
    assert len(list((half / "optimizer").glob("model-*.safetensors"))) > 1
    resumed = train(tiny, tmp_path / "parts", schedule="constant", steps=6, resume=True).model.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_only_the_newest_are_kept(tiny):
    trainer = train(tiny, steps=9, checkpoint_every=2, keep_checkpoints=3)
    assert [path.name for path in list_checkpoints(trainer.output_dir)] == ["step-000006", "step-000008", "step-000009"]
    assert {path.name for path in trainer.output_dir.iterdir()} == {"step-000006", "step-000008", "step-000009",
                                                                     "metrics.jsonl"}  # fmt: skip


def test_listing_orders_by_number_and_ignores_other_names(tmp_path):
    for name in ("step-1000000", "step-999999", "step-12", "step-000001.partial", "notes"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    assert latest_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_writing_leaves_the_last_checkpoint_and_is_cleaned_up(tiny, monkeypatch, error):
    train(tiny, steps=4, schedule="constant")
    rename = Path.rename

    def interrupted(self, target):
        if self.name == "step-000006.partial":
            raise error("No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    expected = CheckpointError if error is OSError else error
    with pytest.raises(expected, match="No space left"):
        train(tiny, steps=6, schedule="constant", resume=True)
    output = Path(tiny.config().output_dir)
    # A disk that refused gets its space back; whoever is killed cannot tidy up.
    assert (output / "step-000006.partial").is_dir() == (error is KeyboardInterrupt)
    assert [path.name for path in list_checkpoints(output)] == ["step-000004"]

    monkeypatch.undo()
    trainer = train(tiny, steps=6, schedule="constant", resume=True)
    assert {path.name for path in output.iterdir()} == {"step-000004", "step-000006", "metrics.jsonl"}
    assert [row["step"] for row in rows(output)] == [1, 2, 3, 4, 5, 6]
    assert trainer.step == 6


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_state(path: Path, change) -> None:
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


DAMAGES = [
    (OPTIMIZER, Path.unlink, f"{OPTIMIZER} is missing"),
    (OPTIMIZER, truncate, f"{OPTIMIZER} is truncated or damaged: it has .* bytes, .* were written"),
    (OPTIMIZER, flip_a_bit, f"{OPTIMIZER} is damaged: its SHA-256"),
    (WEIGHTS, Path.unlink, f"{WEIGHTS} is missing"),
    (WEIGHTS, truncate, f"{WEIGHTS} is truncated"),
    (WEIGHTS, flip_a_bit, f"{WEIGHTS} is damaged: its SHA-256"),
    (STATE, Path.unlink, f"{STATE} is missing"),
    (STATE, truncate, f"{STATE} is truncated"),
    ("checksums.json", Path.unlink, "checksums.json is missing"),
    ("checksums.json", truncate, "checksums.json is not valid JSON"),
]


@pytest.mark.parametrize("file, damage, message", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(tiny, tmp_path, caplog, file, damage, message):
    whole = train(tiny, tmp_path / "whole", checkpoint_every=2)
    trainer = train(tiny, tmp_path / "damaged", checkpoint_every=2)
    damage(trainer.output_dir / "step-000006" / file)
    with caplog.at_level("WARNING", logger="resnet_bk"):
        again = train(tiny, tmp_path / "damaged", checkpoint_every=2, resume=True)
    (record,) = [record for record in caplog.records if record.name == "resnet_bk.training.checkpoint"]
    assert re.search(f"step-000006 is refused: .*{message}", record.getMessage())
    assert again.step == 6 and [p.name for p in list_checkpoints(again.output_dir)] == ["step-000004", "step-000006"]
    assert_same_checkpoint(whole.output_dir / "step-000006", again.output_dir / "step-000006")


def test_without_an_intact_checkpoint_the_newest_damage_is_told(tiny):
    trainer = train(tiny, checkpoint_every=3)
    truncate(trainer.output_dir / "step-000006" / WEIGHTS)
    flip_a_bit(trainer.output_dir / "step-000003" / OPTIMIZER)
    with pytest.raises(CheckpointError, match=rf"is intact. The newest: .*step-000006/{WEIGHTS} is truncated"):
        train(tiny, steps=8, resume=True)


def test_a_file_of_another_checkpoint_is_refused(tiny):
    folder = train(tiny, checkpoint_every=3).output_dir / "step-000006"
    shutil.copy(folder / OPTIMIZER, folder / "optimizer" / "more.safetensors")
    assert newest_intact_checkpoint(folder.parent) == folder.with_name("step-000003")


@pytest.mark.parametrize(
    "file, edit, message",
    [
        (OPTIMIZER, lambda p: edit_tensors(p, lambda t: t.pop("exp_avg/norm.weight")),
         "optimizer lacks the tensor 'exp_avg/norm.weight'"),
        (OPTIMIZER, lambda p: edit_tensors(p, lambda t: t.update(more=torch.zeros(2))),
         "optimizer holds an unknown tensor 'more'"),
        (WEIGHTS, lambda p: edit_tensors(p, lambda t: t.update(other=t.pop("norm.weight"))), "norm.weight"),
        (STATE, lambda p: edit_state(p, lambda s: s.pop("random")), "damaged .KeyError: 'random'"),
        (STATE, lambda p: edit_state(p, lambda s: s.update(format=99)), "format 99; .* reads format 2"),
        (STATE, lambda p: edit_state(p, lambda s: s.update(step="six")), "json is damaged .TypeError"),
        (STATE, lambda p: edit_state(p, lambda s: s["random"].update(torch="AAAA")), "json is damaged"),
    ],
)  # fmt: skip
def test_a_checkpoint_written_wrongly_is_named(tiny, file, edit, message):
    folder = train(tiny).output_dir / "step-000006"
    edit(folder / file)
    (folder / "checksums.json").unlink()
    write_checksums(folder, checksum_files(folder, None))
    with pytest.raises(CheckpointError, match=message):
        train(tiny, steps=8, resume=True)


@pytest.mark.parametrize(
    "section, field, changed",
    [("training", "learning_rate", 0.5), ("training", "seed", 7), ("training", "schedule", "wsd"),
     ("training", "gradient_accumulation_steps", 2), ("model", "dropout", 0.1), ("data", "max_bytes", 10)],
)  # fmt: skip
def test_resuming_with_another_configuration_names_the_field(tiny, section, field, changed):
    train(tiny, data_config=DataConfig())
    fields = {field: changed} if section == "training" else {}
    model = tiny.model(**({field: changed} if section == "model" else {}))
    data_config = DataConfig(**({field: changed} if section == "data" else {}))
    with pytest.raises(
        CheckpointError, match=rf"{section}\.{field} is {changed!r}, but .*step-000006 was trained with"
    ):
        train(tiny, model=model, data_config=data_config, resume=True, **fields)


def test_bookkeeping_may_change_on_resume(tiny):
    train(tiny, data_config=DataConfig())
    trainer = train(
        tiny, data_config=DataConfig(cache_dir="elsewhere"), resume=True, steps=8, log_every=2, evaluate_every=1,
        evaluation_tokens=50, checkpoint_every=1, keep_checkpoints=1, tensorboard=True, validation=tiny.validation,
    )  # fmt: skip
    assert trainer.step == 8 and [path.name for path in list_checkpoints(trainer.output_dir)] == ["step-000008"]


def test_a_finished_run_resumes_to_its_result(tiny):
    first = train(tiny, validation=tiny.validation)
    before = rows(first.output_dir)
    again = Trainer(tiny.model(), tiny.loader(), tiny.config(resume=True), validation=tiny.validation, progress=False)
    result = again.train()
    assert result.step == 6 and result.checkpoint == first.output_dir / "step-000006"
    assert result.validation.loss == before[-1]["loss"]
    assert rows(first.output_dir) == before


def test_fewer_steps_than_done_is_an_error(tiny):
    train(tiny)
    with pytest.raises(ConfigError, match=r"training.steps is 5, but .*step-000006 has done 6 already"):
        train(tiny, steps=5, resume=True)


def test_parameter_without_gradient_has_no_optimizer_state(tiny):
    def frozen():
        model = tiny.model()
        model.norm.weight.requires_grad_(False)
        return model

    trainer = train(tiny, steps=2, model=frozen())
    state = read_state(trainer.output_dir / "step-000002")
    assert state["parameters_without_optimizer_state"] == ["norm.weight"]
    assert train(tiny, steps=4, model=frozen(), resume=True).step == 4
