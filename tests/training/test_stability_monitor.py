"""Spikes are told from noise, rows say what was seen, and watching changes nothing."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from resnet_bk import Trainer
from resnet_bk.errors import ConfigError, InstabilityError
from resnet_bk.training.spectral import probe_media
from resnet_bk.training.stability.config import StabilityConfig
from resnet_bk.training.stability.monitor import STABILITY_FILE, StabilityMonitor, robust_score, update_ratios

PROBE = torch.arange(24).reshape(2, 12) % 13


def rows_of(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.output_dir / STABILITY_FILE).read_text().splitlines()]


def test_the_score_is_a_z_score_that_outliers_do_not_move() -> None:
    draw = random.Random(0)
    past = [3 + 0.1 * draw.gauss(0, 1) for _ in range(2001)]
    assert robust_score(3.5, past, least=1e-9) == pytest.approx(5, rel=0.1)
    assert robust_score(3.5, [*past, *[1e6] * 100], least=1e-9) == pytest.approx(5, rel=0.2)
    assert robust_score(2.5, past, least=1e-9) == pytest.approx(-5, rel=0.1)
    assert robust_score(2.0, [1.0] * 5, least=0.5) == 2
    assert robust_score(2.0, [1.0] * 5, least=0.0) == math.inf and robust_score(1.0, [1.0] * 5, least=0.0) == 0


def test_quiet_numbers_are_no_spikes_and_loud_ones_are(tiny) -> None:
    trainer = Trainer(tiny.model(), tiny.loader(), tiny.config(), progress=False)
    trainer.output_dir.mkdir(parents=True)
    monitor = StabilityMonitor(StabilityConfig(least_steps=10, every=1000), refuse=True)
    monitor.on_train_start(trainer)
    draw = random.Random(1)
    for step in range(500):  # a falling loss with Gaussian noise
        trainer.step = step
        monitor.on_gradients(trainer, 2 + 3 * 0.99**step + 0.05 * draw.gauss(0, 1), math.exp(0.3 * draw.gauss(0, 1)))
    assert rows_of(trainer) == []
    with pytest.raises(
        InstabilityError, match=r"step 500: the loss is 4, .* deviations above the median of the last 64"
    ):
        monitor.on_gradients(trainer, 4.0, 1.0)
    with pytest.raises(InstabilityError, match=r"step 500: the gradient norm is 1000, .* \(stability.gradient_score\)"):
        monitor.on_gradients(trainer, 2.0, 1000.0)
    held = monitor.state_dict()
    monitor.on_gradients(trainer, 2.0, 0.0)  # a norm of zero is no spike, and has no logarithm
    assert len(monitor.log_norms) == 64 and math.isfinite(sum(monitor.log_norms))
    assert [(row["kind"], row["refused"]) for row in rows_of(trainer)] == [("spike", True)] * 2
    # A refused step is not what later ones are measured by.
    assert max(held["losses"][-10:]) < 3
    again = StabilityMonitor(StabilityConfig())
    again.load_state_dict(json.loads(json.dumps(held)))
    assert again.state_dict() == held
    monitor.on_train_end(trainer)


def test_nothing_is_judged_before_there_is_a_past_or_if_switched_off(tiny) -> None:
    trainer = Trainer(tiny.model(), tiny.loader(), tiny.config(), progress=False)
    trainer.output_dir.mkdir(parents=True)
    young = StabilityMonitor(StabilityConfig(least_steps=8), refuse=True)
    off = StabilityMonitor(StabilityConfig(least_steps=8, loss_score=0, gradient_score=0), refuse=True)
    told = StabilityMonitor(StabilityConfig(least_steps=8))
    for monitor, quiet in ((young, 7), (off, 20), (told, 20)):
        monitor.on_train_start(trainer)
        for _ in range(quiet):
            monitor.on_gradients(trainer, 1.0, 1.0)
        monitor.on_gradients(trainer, 1e9, 1e9)
        assert len(rows_of(trainer)) == (monitor is told)
        monitor.on_train_end(trainer)


def test_rows_hold_scores_ratios_and_media_and_watching_changes_nothing(tiny, tmp_path) -> None:
    losses = []
    for name, callbacks in (
        ("plain", []),
        ("watched", [StabilityMonitor(StabilityConfig(every=3, least_steps=3), PROBE)]),
    ):
        config = tiny.config(output_dir=str(tmp_path / name))
        trainer = Trainer(tiny.model(dropout=0.1), tiny.loader(), config, callbacks=callbacks, progress=False)
        trainer.train()
        metrics = (trainer.output_dir / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in metrics])
    assert losses[0] == losses[1]
    first, second = rows_of(trainer)
    assert (first["step"], second["step"]) == (3, 6) and first["kind"] == "stability"
    assert (
        first["loss_score"] is None and math.isfinite(second["loss_score"]) and math.isfinite(second["gradient_score"])
    )
    assert [layer["layer"] for layer in second["layers"]] == [0, 1]
    for layer in second["layers"]:
        assert layer["smallest_imaginary"] > 0 and 0 < layer["largest_product"] <= 1 and layer["violations"] == 0
    ratios = second["update_over_weight"]
    assert set(ratios) == {"embedding", "norm", *(f"blocks.{n}.{part}" for n in (0, 1) for part in (
        "mixer_norm", "mixer", "feed_forward_norm", "feed_forward"))}  # fmt: skip
    assert all(0 < ratio < 1 for ratio in ratios.values())


def test_update_ratios_are_norms_of_change_over_weight(tiny) -> None:
    model = tiny.model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.25 if name.startswith("blocks.1.mixer.") else 1.0)
    ratios = update_ratios(model, before)
    assert ratios.pop("blocks.1.mixer") == pytest.approx(0.25, rel=1e-6)
    assert set(ratios.values()) == {0.0}


def test_a_sick_medium_is_refused(tiny, monkeypatch) -> None:
    import resnet_bk.training.stability.monitor as module

    found = probe_media(tiny.model(), PROBE)
    sick = {layer: medium._replace(imag=-medium.imag) for layer, medium in found.items()}
    monkeypatch.setattr(module, "probe_media", lambda model, probe: sick)
    for refuse in (False, True):
        monitor = StabilityMonitor(StabilityConfig(every=2), PROBE, refuse=refuse)
        config = tiny.config(steps=2, output_dir=tiny.config().output_dir + str(refuse))
        trainer = Trainer(tiny.model(), tiny.loader(), config, callbacks=[monitor], progress=False)
        if refuse:
            with pytest.raises(InstabilityError, match=r"step 2: layer 0 has \d+ sites with Im m <= 0"):
                trainer.train()
        else:
            trainer.train()
            assert rows_of(trainer)[0]["layers"][0]["violations"] == found[0].imag.numel()


def test_a_resumed_run_judges_and_writes_as_an_unbroken_one(tiny, tmp_path) -> None:
    rows = []
    for name, parts in (("whole", [8]), ("parts", [5, 8])):
        for steps in parts:
            monitor = StabilityMonitor(StabilityConfig(every=2, least_steps=3), PROBE)
            config = tiny.config(output_dir=str(tmp_path / name), steps=steps, resume=True, schedule="constant")
            trainer = Trainer(tiny.model(), tiny.loader(), config, callbacks=[monitor], progress=False)
            trainer.train()
        rows.append(rows_of(trainer))
    assert rows[0] == rows[1] and len(rows[0]) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [("every", 0), ("window", 2), ("least_steps", 65), ("loss_score", -1.0), ("gradient_score", math.inf), ("tries", 0),
     ("learning_rate_factor", 0.0), ("epsilon_share", 1.5), ("absorption_start", 0.0), ("on_spike", "sing"),
     ("epsilon_shape", "square")],
)  # fmt: skip
def test_bad_fields_are_named(field: str, value) -> None:
    with pytest.raises(ConfigError, match=rf"stability\.({field}|window) is "):
        StabilityConfig(**{field: value})


def test_a_probe_needs_a_medium(tiny) -> None:
    plain = tiny.model(mixer="attention", attention_head_dim=8)
    monitor = StabilityMonitor(StabilityConfig(), PROBE)
    trainer = Trainer(plain, tiny.loader(), tiny.config(), callbacks=[monitor], progress=False)
    with pytest.raises(ConfigError, match="no layer with a resolvent"):
        monitor.on_train_start(trainer)
