from __future__ import annotations

import json
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resnet_bk import LanguageModel, Trainer
from resnet_bk.data.config import DataConfig
from resnet_bk.errors import CheckpointError, ConfigError
from resnet_bk.training.checkpoint import latest_checkpoint, list_checkpoints, read_trainer_state

SCRIPT = Path(__file__).with_name("run_to_kill.py")


def assert_same_checkpoint(left: Path, right: Path) -> None:
    """Every tensor of both folders is bit-identical, and so is the rest of the state."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(left / name), load_file(right / name)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    a, b = read_trainer_state(left), read_trainer_state(right)
    for state in (a, b):
        del state["config"]["training"]["output_dir"], state["interval"]["seconds"]
    assert a == b


def rows(folder: Path) -> list[dict]:
    """Metrics without the speed, the only column that a clock decides."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in found]


def steps_logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def test_run_killed_at_a_random_step_is_bit_identical_to_one_never_killed(tmp_path):
    module = runpy.run_path(str(SCRIPT))
    module["build"](str(tmp_path / "whole")).train()

    folder, kill_at = tmp_path / "killed", random.randrange(8, 60)
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(folder)])
    while steps_logged(folder) < kill_at:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    reached = latest_checkpoint(folder)
    assert reached is not None and 7 <= int(reached.name[5:]) < module["STEPS"], f"killed at {kill_at}: {reached}"

    subprocess.run([sys.executable, str(SCRIPT), str(folder)], check=True)
    assert_same_checkpoint(tmp_path / "whole" / "step-000080", folder / "step-000080")
    assert rows(tmp_path / "whole") == rows(folder), f"killed at {kill_at}"


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
    for name in ("model.safetensors", "optimizer.safetensors"):
        left, right = load_file(a / name), load_file(b / name)
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert read_trainer_state(a)["scaler"] == read_trainer_state(b)["scaler"]


def test_folder_is_a_model_with_two_files_more(tiny):
    trainer = train(tiny)
    folder = trainer.output_dir / "step-000006"
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "optimizer.safetensors",
                     "trainer_state.json"}  # fmt: skip
    loaded = LanguageModel.from_pretrained(folder)
    assert all(torch.equal(t, trainer.model.state_dict()[name]) for name, t in loaded.state_dict().items())


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
    assert (output / "step-000006.partial").is_dir()
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


@pytest.mark.parametrize(
    "file, damage, message",
    [
        ("optimizer.safetensors", Path.unlink, "has no optimizer.safetensors"),
        ("optimizer.safetensors", truncate, "optimizer.safetensors is truncated or damaged"),
        ("optimizer.safetensors", lambda p: edit_tensors(p, lambda t: t.pop("exp_avg/norm.weight")),
         "optimizer.safetensors lacks the tensor 'exp_avg/norm.weight'"),
        ("optimizer.safetensors", lambda p: edit_tensors(p, lambda t: t.update(more=torch.zeros(2))),
         "optimizer.safetensors holds an unknown tensor 'more'"),
        ("model.safetensors", truncate, "model.safetensors"),
        ("model.safetensors", lambda p: edit_tensors(p, lambda t: t.update(other=t.pop("norm.weight"))), "norm.weight"),
        ("trainer_state.json", Path.unlink, "has no trainer_state.json"),
        ("trainer_state.json", truncate, "trainer_state.json is damaged"),
        ("trainer_state.json", lambda p: edit_state(p, lambda s: s.pop("random")), "damaged .KeyError: 'random'"),
        ("trainer_state.json", lambda p: edit_state(p, lambda s: s.update(format=99)), "format 99; .* reads format 1"),
        ("trainer_state.json", lambda p: edit_state(p, lambda s: s.update(step="six")), "json is damaged .TypeError"),
        ("trainer_state.json", lambda p: edit_state(p, lambda s: s["random"].update(torch="AAAA")), "json is damaged"),
    ],
)  # fmt: skip
def test_damage_is_named(tiny, file, damage, message):
    trainer = train(tiny)
    damage(trainer.output_dir / "step-000006" / file)
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
    state = read_trainer_state(trainer.output_dir / "step-000002")
    assert state["parameters_without_optimizer_state"] == ["norm.weight"]
    assert train(tiny, steps=4, model=frozen(), resume=True).step == 4
