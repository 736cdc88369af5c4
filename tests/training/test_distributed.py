"""Sharing out, drawing and sharding on one rank; and, slower, the same runs on two ranks and on one."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from resnet_bk import LanguageModel, Trainer
from resnet_bk.errors import ConfigError, DomainError
from resnet_bk.training.checkpoint import export_model
from resnet_bk.training.config import DistributedConfig
from resnet_bk.training.distributed import share_out
from resnet_bk.training.random_state import seed_everything

SCRIPT = Path(__file__).with_name("run_on_ranks.py")
MODULE = runpy.run_path(str(SCRIPT))


def launch(
    ranks: int, *arguments: str, script: Path = SCRIPT, restarts: int = 0, seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """The finished `torchrun` of `script` on so many ranks."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}", str(script), *arguments,
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def group() -> Iterator[None]:
    """FSDP makes a group of one process; it is left after the test."""
    yield
    dist.destroy_process_group()


def of(rank: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(rank=rank, size=size)


@pytest.mark.parametrize(
    "batches, rows, size", [(1, 4, 1), (1, 4, 2), (1, 4, 4), (2, 1, 2), (4, 3, 2), (3, 4, 2), (4, 2, 8), (6, 2, 4)]
)
def test_parts_of_all_ranks_are_the_batches_of_one_process(batches, rows, size):
    ids = torch.arange(batches * rows * 5).view(batches, rows, 5)
    step = [{"input_ids": batch, "labels": -batch} for batch in ids]
    shares = [share_out(step, of(rank, size)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    parts = [part for share in shares for part in share]
    assert {part["input_ids"].shape for part in parts} == {parts[0]["input_ids"].shape}
    seen = torch.cat([part["input_ids"] for part in parts])
    assert torch.equal(seen[seen[:, 0].argsort()], ids.flatten(0, 1))
    assert all(torch.equal(part["labels"], -part["input_ids"]) for part in parts)


def test_batches_that_continue_each_other_are_shared_by_rows():
    step = [{"input_ids": torch.arange(8).view(4, 2) + 8 * n} for n in range(2)]
    found = share_out(step, of(1, 2), in_order=True)
    assert [part["input_ids"].tolist() for part in found] == [[[4, 5], [6, 7]], [[12, 13], [14, 15]]]
    with pytest.raises(ConfigError, match=r"4 ranks cannot .* Choose training\.batch_size, as a multiple"):
        share_out([{"input_ids": torch.zeros(2, 5)}] * 4, of(0, 4), in_order=True)


def test_packed_batches_are_dealt_out_whole():
    step = [{"input_ids": torch.full((1, 6), n), "cu_seqlens": torch.tensor([0, n + 1, 6])} for n in range(4)]
    assert share_out(step, of(1, 2)) == [step[1], step[3]]


def test_batches_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(ConfigError, match="2 ranks cannot share 1 batches of 3 rows evenly"):
        share_out([{"input_ids": torch.zeros(3, 5)}], of(0, 2))
    packed = {"input_ids": torch.zeros(1, 5), "cu_seqlens": torch.tensor([0, 5])}
    with pytest.raises(ConfigError, match="4 ranks cannot share 2 batches of packed documents"):
        share_out([packed] * 2, of(0, 4))


def test_ranks_of_a_context_get_segments_of_the_same_rows():
    ids = torch.arange(4 * 7).view(4, 7)
    step = [{"input_ids": ids, "labels": ids}]
    shares = [share_out(step, of(rank, 4), of(rank % 2, 2)) for rank in range(4)]
    for group in range(2):
        left, right = shares[2 * group][0], shares[2 * group + 1][0]
        mine = ids[2 * group : 2 * group + 2]
        assert torch.equal(torch.cat((left["input_ids"], right["input_ids"]), 1), mine)
        assert torch.equal(torch.cat((left["labels"][:, 1:], right["labels"][:, 1:]), 1), mine[:, 1:])
    with pytest.raises(ConfigError, match="2 groups of 3 ranks cannot share 1 batches of 3 rows evenly"):
        share_out([{"input_ids": torch.zeros(3, 5)}], of(0, 6), of(0, 3))


def test_options_of_fsdp_need_fsdp():
    with pytest.raises(ConfigError, match=r"distributed.cpu_offload is True, which only distributed.strategy fsdp"):
        DistributedConfig(cpu_offload=True)
    with pytest.raises(ConfigError, match=r"distributed.reduce_dtype is 'float8'"):
        DistributedConfig(strategy="fsdp", reduce_dtype="float8")  # type: ignore[arg-type]


@pytest.mark.parametrize("overrides", [{}, {"mixer": "mamba2"}, {"mixer": "mamba3"}, {"attention_every": 2}])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_model_without_storage_is_drawn_from_the_seed(tiny, request, strategy, overrides):
    if strategy == "fsdp":
        request.getfixturevalue("group")
    config = tiny.model(attention_head_dim=8, **overrides).config
    with torch.device("meta"):
        model = LanguageModel(config)
    distributed = DistributedConfig(strategy=strategy)
    trainer = Trainer(model, tiny.loader(), tiny.config(seed=5), distributed=distributed, progress=False)
    expected = LanguageModel(config)
    seed_everything(5)
    expected.reset_parameters()
    found = trainer.engine.whole_model().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_sharded_model_keeps_the_parameters_it_was_given(tiny, group):
    model, expected = tiny.model(), tiny.model().state_dict()
    trainer = Trainer(
        model, tiny.loader(), tiny.config(), distributed=DistributedConfig(strategy="fsdp"), progress=False
    )
    found = trainer.engine.whole_model()
    assert type(found) is LanguageModel
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.items())


def test_a_sharded_run_names_the_parameter_that_is_not_finite(tiny, group):
    model = tiny.model()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    trainer = Trainer(
        model, tiny.loader(), tiny.config(), distributed=DistributedConfig(strategy="fsdp"), progress=False
    )
    with pytest.raises(DomainError, match=r"Training step 1: .* value is not finite is norm.weight\."):
        trainer.train()


def test_a_checkpoint_of_a_plain_run_continues_sharded_and_back(tiny, group):
    options = dict(schedule="constant", checkpoint_every=2)
    whole = Trainer(
        tiny.model(), tiny.loader(), tiny.config(output_dir=tiny.config().output_dir + "whole", **options),
        progress=False,
    )  # fmt: skip
    whole.train()
    for steps, strategy in ((2, "ddp"), (4, "fsdp"), (6, "ddp")):
        trainer = Trainer(
            tiny.model(), tiny.loader(), tiny.config(steps=steps, resume=True, **options),
            distributed=DistributedConfig(strategy=strategy), progress=False,
        )  # fmt: skip
        assert trainer.train().step == steps
    for name in ("model.safetensors", "optimizer/model.safetensors"):
        expected, found = (load_file(run.output_dir / "step-000006" / name) for run in (whole, trainer))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


# Measured worst on losses and norms: 5e-5 in float32 (losses 2e-6), 4e-3 in float16 (whose norms are 5e-2 off those of
# float32), 3.5e-2 where parameters, residual stream and sums of gradients are bfloat16, which one process keeps in
# float32.
TOLERANCE = {"float16": 1e-2, "bfloat16": 1e-1}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_follow_the_loss_curve_of_one_process(tmp_path, strategy):
    names = [name for name in MODULE["SCENARIOS"] if name.startswith(strategy)]
    launch(2, str(tmp_path / "two"), *names)
    for name in names:
        trainer = MODULE["build"](tmp_path / "one", name, plain=True)
        trainer.train()
        tolerance = TOLERANCE.get(name.split("-")[-1], 2e-4)
        one, two = rows(tmp_path / "one" / name), rows(tmp_path / "two" / name)
        assert len(one) == 8  # six of training, two of validation
        for expected, found in zip(one, two, strict=True):
            assert [found[key] for key in ("kind", "step", "tokens")] == [
                expected[key] for key in ("kind", "step", "tokens")
            ]
            for key in {"loss", "gradient_norm"} & expected.keys():
                assert found[key] == pytest.approx(expected[key], rel=tolerance), f"{name}, {key}"
        folders = [
            export_model(tmp_path / runs / name / "step-000006", tmp_path / runs / f"{name}-model")
            for runs in ("one", "two")
        ]
        saved = [load_file(folder / "model.safetensors") for folder in folders]
        assert saved[0].keys() == saved[1].keys() and len(saved[0]) == len(list(trainer.model.state_dict()))


def assert_same_curve(found: Path, expected: Path, tolerance: float = 2e-5) -> None:
    assert [row["step"] for row in rows(found)] == [row["step"] for row in rows(expected)]
    for mine, other in zip(rows(found), rows(expected), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp", "ddp-documents", "fsdp-carry-exact"])
def test_runs_continue_on_another_number_of_ranks(tmp_path, name):
    MODULE["build"](tmp_path / "whole", name, plain=True).train()
    for first, second in ((2, 1), (1, 2)):
        folder = tmp_path / f"{first}-{second}"
        launch(first, str(folder), f"{name}:steps=3")
        launch(second, str(folder), f"{name}:steps=6")
        assert (folder / name / "starts").read_text().split() == ["0", "3"]
        assert_same_curve(folder / name, tmp_path / "whole" / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_killed_rank_is_started_anew_and_the_run_continues(tmp_path, name):
    MODULE["build"](tmp_path / "whole", name, plain=True).train()
    launch(2, str(tmp_path / "killed"), f"{name}:kill=5", restarts=1)
    assert (tmp_path / "killed" / name / "starts").read_text().split() == ["0", "3"]
    assert_same_curve(tmp_path / "killed" / name, tmp_path / "whole" / name)


@pytest.mark.slow
def test_one_rank_can_stop_all(tmp_path):
    launch(2, str(tmp_path), "ddp:stop=2")
    assert [row["step"] for row in rows(tmp_path / "ddp")] == [1, 2]
    assert [path.name for path in (tmp_path / "ddp").glob("step-*")] == ["step-000002"]


@pytest.mark.slow
def test_the_command_runs_under_torchrun(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "validation"):
        (texts / f"{split}.txt").write_text("alpha beta gamma delta " * 200)
    options = {
        "model.vocab_size": 300, "model.d_model": 16, "model.num_layers": 1, "model.feed_forward_dim": 24,
        "model.head_dim": 8, "model.state_size": 8, "data.name": "text", "data.path": texts,
        "data.cache_dir": tmp_path / "cache", "training.output_dir": tmp_path / "run", "training.steps": 3,
        "training.sequence_length": 32, "training.batch_size": 2, "training.device": "cpu",
        "training.tensorboard": "false", "distributed.strategy": "fsdp",
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in options.items()]
    finished = launch(2, *arguments, script=Path(__file__).parents[2] / "train.py")
    assert finished.stdout.count("baseline unigram") == 1 and finished.stdout.count("Step 3, 192 tokens read.") == 1
    assert (tmp_path / "run" / "loss.png").is_file()
    model = LanguageModel.from_pretrained(export_model(tmp_path / "run" / "step-000003", tmp_path / "model"))
    assert model.tokenizer is not None and model.config.d_model == 16


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch.cuda.device_count() < 2")
@pytest.mark.parametrize("name", ["ddp-accumulation", "fsdp-accumulation", "fsdp-zero2", "fsdp-offload"])
def test_two_gpus_follow_the_loss_curve_of_one(tmp_path, name):
    MODULE["build"](tmp_path / "one", name, plain=True, device="cuda", precision="float32").train()
    launch(2, str(tmp_path / "two"), f"{name}:gpu=1", seconds=480)  # float32 kernels compile for minutes
    # Both runs multiply in TF32 at most, whose step is 2^-11; sums of other shapes round differently.
    assert_same_curve(tmp_path / "two" / name, tmp_path / "one" / name, tolerance=2e-3)
