"""The GPU benchmarks: rehearsed at toy size on the CPU, and the parts that decide what their rows say."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def by_name(name: str) -> ModuleType:
        return importlib.import_module(name)

    return by_name


def _toy(script: str, out: Path, *options: str) -> list[dict]:
    """Metrics of the rows after a rehearsal."""
    command = [sys.executable, str(BENCHMARKS / script), "--toy", "--out", str(out), "--run", "test", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stderr
    files = sorted((out / "results").glob("*.jsonl"))
    return [json.loads(line)["metrics"] for file in files for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_mixer_speed_at_toy_size(tmp_path):
    rows = _toy("mixer_speed.py", tmp_path, "--only", "crossover")
    accuracy = [row for row in rows if row["part"] == "accuracy"]
    assert {row["outcome"] for row in accuracy} == {"passed"}
    timed = [row for row in rows if row["part"] == "crossover" and row["arm"] == "resnet-bk"]
    assert len(timed) == 4
    assert all(row["times_resnet_bk"] == 1 and row["milliseconds"] > 0 for row in timed)
    # A second call finds everything done but the ceilings, which belong to a process.
    assert len(_toy("mixer_speed.py", tmp_path, "--only", "crossover")) == len(rows) + 1


@pytest.mark.slow
def test_long_training_at_toy_size(tmp_path):
    rows = _toy("long_training.py", tmp_path, "--only", "resnet-bk", "--only", "transformer", "--budget", "600")
    assert [(row["arm"], row["length_tokens"]) for row in rows] == [
        (arm, length) for arm in ("resnet-bk", "transformer") for length in (64, 256, 512)
    ]
    for row in rows:
        assert row["steps"] == row["planned_steps"] == len(row["losses"].split()) == len(row["gradient_norms"].split())
        assert row["last_loss"] < row["first_loss"] and row["not_finite"] == 0
    assert rows[2]["judged_steps"] == 6
    assert rows[2]["over_shortest"] == pytest.approx(rows[2]["tokens_per_second"] / rows[0]["tokens_per_second"])
    assert len(_toy("long_training.py", tmp_path, "--only", "resnet-bk", "--only", "transformer")) == len(rows)
    slow = _toy("long_training.py", tmp_path / "limit", "--only", "transformer", "--step-limit", "1e-9")
    assert slow[0]["steps"] == 3
    assert all(row["outcome"].startswith("not run: a step would take about") for row in slow[1:])


@pytest.mark.slow
def test_trainer_overhead_at_toy_size(tmp_path):
    rows = _toy("trainer_overhead.py", tmp_path)
    assert [row["arm"] for row in rows] == ["none, again", "monitor", "recovery", "asynchronous save"]
    assert all(row["rounds"] == 2 and row["least_percent"] <= row["most_percent"] for row in rows)
    assert rows[3]["save_seconds"] > 0 and rows[3]["save_gigabytes"] > 0.01


def test_overhead_is_extra_time_over_the_time_between_two_events(load):
    script = load("trainer_overhead")
    plan = script.Plan(rounds=1)
    turns = script.Turns(plan, lambda: False)
    turns.seconds = [{arm: (steps * 2.0, 0.0) for arm, steps in plan.block.items()}]
    turns.seconds[0][script.MONITOR] = (203.0, 0.0)  # 100 steps of 2 s, and 3 s more
    turns.seconds[0][script.SAVE] = (205.0, 0.0)
    for arm, expected in ((script.AGAIN, 0), (script.MONITOR, 1.5), (script.RECOVERY, 0), (script.SAVE, 0.5)):
        percent, seconds, bare = script.overheads(plan, arm, turns, 0)
        assert percent == pytest.approx([expected]) and bare == 2
    assert seconds == pytest.approx([5])
    assert [arm for arm, _ in script.Turns(script.Plan(rounds=2), lambda: False).blocks][5:7] == [script.SAVE] * 2


@pytest.mark.slow
def test_model_speed_at_toy_size(tmp_path):
    rows = _toy("model_speed.py", tmp_path)
    speeds = {(r["part"], r["arm"]) for r in rows if r.get("tokens_per_second", 0) > 0}
    both = {(part, kind) for part in ("train tiny", "decode") for kind in ("resnet-bk", "transformer")}
    assert speeds == both | {("memory tiny", "resnet-bk"), ("decode", "resnet-bk, generate")}
    assert len(_toy("model_speed.py", tmp_path)) == len(rows)


def test_a_failing_arm_leaves_the_others(load):
    timing = load("gpu_timing")

    def broken() -> None:
        raise RuntimeError("out of luck\nand a second line")

    clock = timing.Clock(torch.device("cpu"))
    found = clock.alternate({"broken": broken, "fine": lambda: torch.ones(10).sum()}, seconds=0.01, most=4)
    assert found["broken"] == "failed: RuntimeError: out of luck"
    assert len(found["fine"].seconds) == 4


def test_rows_of_the_same_run_are_found_again(load, tmp_path):
    timing = load("gpu_timing")
    options = {"out": tmp_path, "device": torch.device("cpu"), "config": {}, "command": "x", "commit": "c", "shown": {}}
    key = {"part": "shapes", "arm": "a", "pass": "forward", "batch": 1, "length_tokens": 8}
    timing.Rows("mixer-speed", run="one", **options).add(**key, milliseconds=2.0, outcome=None)
    found = timing.Rows("mixer-speed", run="one", **options).find(**key)
    assert found["milliseconds"] == 2.0
    assert "outcome" not in found
    assert timing.Rows("mixer-speed", run="two", **options).find(**key) is None


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_the_accuracy_check_sees_a_wrong_kernel(load, monkeypatch, factor):
    accuracy = load("kernel_accuracy")
    mix = accuracy.semiseparable_mix

    def off(*args, backend, **options):
        y, state = mix(*args, backend=backend, **options)
        return (y * factor if backend == "auto" else y), state

    monkeypatch.setattr(accuracy, "semiseparable_mix", off)
    case = replace(accuracy.toy_cases()[0], lengths=(65,))
    failing = {figure.quantity for figure in case.run() if not figure.passes}
    assert ("y" in failing) == (factor != 1)
    assert failing == set() or factor != 1


def test_nan_is_the_worst_figure_and_fails(load):
    accuracy = load("kernel_accuracy")
    good = accuracy.Figure("y", 1, 100, 1e-7, 1e-7)
    bad = replace(good, error=float("nan"))
    assert good.passes
    assert not bad.passes
    assert accuracy.worst([good, bad, good]) is bad


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([(512, 0.5), (1024, 1.0)], "faster from about 1024 tokens"),
        ([(512, 0.5), (2048, 2.0)], "faster from about 1024 tokens"),
        ([(512, 1.5), (1024, 3.0)], "faster from the shortest length measured, 512 tokens"),
        ([(512, 0.5), (1024, 0.9)], "not faster up to 1024 tokens"),
    ],
)
def test_crossover(load, points, said):
    assert load("mixer_speed").crossover(points) == said


def test_short_convolution_is_causal_depthwise(load):
    peers = load("peers")
    x, taps, bias = torch.randn(2, 50, 8), torch.randn(8, 4), torch.randn(8)
    expected = F.silu(F.conv1d(x.mT, taps[:, None], bias, groups=8, padding=3)[..., :50].mT)
    torch.testing.assert_close(peers.short_convolution(x, taps, bias), expected)


@pytest.mark.parametrize("preset", ["small", "base", "xl"])
def test_peers_have_as_many_parameters(load, preset):
    models = load("peer_models")
    sizes = []
    for kind in models.KINDS:
        with torch.device("meta"):
            sizes.append(models.build(kind, preset).num_parameters(embeddings=False))
    assert max(sizes) < 1.02 * min(sizes)


@pytest.mark.parametrize("kind", ["resnet-bk", "transformer"])
def test_operations_of_a_step_against_the_flop_counter(load, kind):
    models = load("peer_models")
    model = models.build(kind, "tiny")
    batch, time = 2, 96
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(100, (batch, time)))
    forward = models.step_flops(model, batch, time) / 3
    if kind == "transformer":  # this attention computes the future too
        forward += len(model.blocks) * 2 * batch * time**2 * model.config.d_model
    else:  # the counter does not look into this library's operators
        forward -= len(model.blocks) * batch * time * models.own_flops_per_token(model.config)
    assert counter.get_total_flops() == pytest.approx(forward, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "found"), [("memory_plan.py", "predicted"), ("adapter_memory.py", "peak")])
def test_memory_benchmarks_at_toy_size(script, found):
    command = [sys.executable, str(BENCHMARKS / script), "--toy"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stderr
    assert f"{found}_gigabytes" in done.stdout
