"""The monitor sees the media the mixer uses, leaves training alone, and clips only on request."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from resnet_bk import Trainer
from resnet_bk.errors import ConfigError, DomainError, ShapeError
from resnet_bk.theory.spectral_monitor import schatten_bound
from resnet_bk.training.spectral import SPECTRAL_FILE, SpectralMonitor, probe_media

PROBE = torch.arange(24).reshape(2, 12) % 13


def rows_of(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.output_dir / SPECTRAL_FILE).read_text().splitlines()]


def loud(model, scale: float = 20.0):
    """A model whose potential is switched on."""
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.potential_scale.fill_(scale)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": "transmission"},
        {"boundary": "wall"},
        {"sites_per_token": 3},
        {"position_potential": "prime_bump"},
        {"position_potential": "prime_bump", "sites_per_token": 3},
    ],
)
def test_the_media_are_those_of_the_mixer(tiny, options: dict) -> None:
    model = loud(tiny.model(**options), 1.0)
    media = probe_media(model, PROBE)
    _, state = model.hidden_states(PROBE)
    for medium, after in zip(media.values(), state.layers, strict=True):
        assert medium.potential.shape == (2, 12 * options.get("sites_per_token", 1), model.config.num_heads)
        torch.testing.assert_close(medium.real[:, -1], after.green.real, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(medium.imag[:, -1], after.green.imag, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamics", ["exact", "semiclassical", "decay_only"])
def test_every_dynamics_is_watched(tiny, dynamics: str) -> None:
    monitor = SpectralMonitor(PROBE, every=3)
    trainer = Trainer(tiny.model(dynamics=dynamics), tiny.loader(), tiny.config(), callbacks=[monitor], progress=False)
    trainer.train()
    rows = rows_of(trainer)
    assert [row["step"] for row in rows] == [0, 3, 6]
    for row in rows:
        assert row["kind"] == "spectral" and len(row["layers"]) == 2
        for number, layer in enumerate(row["layers"]):
            assert layer["layer"] == number
            assert layer["violations"] == 0
            assert layer["smallest_absorption"] >= 1e-3 and layer["smallest_imaginary"] > 0
            assert layer["largest_product"] <= 1 + 1e-6
            assert layer["operator_bound"] <= layer["hilbert_schmidt_bound"] <= layer["trace_bound"]
            assert "clipped_heads" not in layer
    # The potential starts switched off and grows.
    assert rows[0]["layers"][0]["trace_bound"] == 0
    assert (rows[-1]["layers"][0]["trace_bound"] > 0) == (dynamics != "decay_only")
    assert len(monitor.reports) == 2


def test_watching_changes_nothing(tiny, tmp_path) -> None:
    losses = []
    for name, callbacks in (("plain", []), ("watched", [SpectralMonitor(PROBE, every=1)])):
        config = tiny.config(output_dir=str(tmp_path / name))
        trainer = Trainer(tiny.model(dropout=0.1), tiny.loader(), config, callbacks=callbacks, progress=False)
        trainer.train()
        metrics = (trainer.output_dir / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in metrics])
        assert trainer.model.training
        assert not any(block.mixer.in_proj._forward_hooks for block in trainer.model.blocks)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_clipping_brings_the_first_layer_to_the_limit_and_says_so(tiny, order: float) -> None:
    limit = 5.0
    model = loud(tiny.model())
    before = schatten_bound(*probe_media(model, PROBE)[0][:2], order)
    assert (before > limit).any()
    monitor = SpectralMonitor(PROBE, every=1, limit=limit, order=order)
    trainer = Trainer(model, tiny.loader(), tiny.config(steps=1), callbacks=[monitor], progress=False)
    trainer.output_dir.mkdir(parents=True)
    monitor.on_train_start(trainer)
    monitor.on_train_end(trainer)
    after = schatten_bound(*probe_media(model, PROBE)[0][:2], order)
    worst = before.amax(0)
    torch.testing.assert_close(after.amax(0), worst.clamp(max=limit), rtol=1e-4, atol=0)
    layer = rows_of(trainer)[0]["layers"][0]
    assert layer["clipped_heads"] == int((worst > limit).sum())
    assert layer["smallest_factor"] == pytest.approx(limit / worst.max().item(), rel=1e-5)


def test_a_resumed_run_keeps_the_rows_that_its_checkpoint_knew(tiny) -> None:
    def trainer(**fields) -> Trainer:
        monitor = SpectralMonitor(PROBE, every=1)
        return Trainer(tiny.model(), tiny.loader(), tiny.config(**fields), callbacks=[monitor], progress=False)

    first = trainer(steps=6, checkpoint_every=4)
    first.train()
    rows = rows_of(first)
    (newest,) = first.output_dir.rglob("step-000006")
    shutil.rmtree(newest)
    second = trainer(steps=6, checkpoint_every=4, resume=True)
    second.train()
    assert [row["step"] for row in rows_of(second)] == list(range(7))
    assert rows_of(second) == rows


def test_a_sick_medium_stops_a_strict_run_only(tiny, monkeypatch) -> None:
    import resnet_bk.training.spectral as module

    found = probe_media(tiny.model(), PROBE)
    sick = {layer: medium._replace(imag=-medium.imag) for layer, medium in found.items()}
    monkeypatch.setattr(module, "probe_media", lambda model, probe: sick)
    for strict in (False, True):
        monitor = SpectralMonitor(PROBE, every=1, strict=strict)
        trainer = Trainer(tiny.model(), tiny.loader(), tiny.config(steps=1), callbacks=[monitor], progress=False)
        trainer.output_dir.mkdir(parents=True, exist_ok=True)
        if strict:
            with pytest.raises(DomainError, match="Step 0: layer 0 has"):
                monitor.on_train_start(trainer)
        else:
            monitor.on_train_start(trainer)
        monitor.on_train_end(trainer)
        assert rows_of(trainer)[0]["layers"][0]["violations"] == found[0].imag.numel()


def test_bad_options_are_named(tiny) -> None:
    with pytest.raises(ConfigError, match="every is 0"):
        SpectralMonitor(PROBE, every=0)
    for limit in (0.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="limit is"):
            SpectralMonitor(PROBE, limit=limit)
    with pytest.raises(ConfigError, match=r"order is 0\.5"):
        SpectralMonitor(PROBE, order=0.5)
    for probe in (PROBE[0], PROBE[:0], torch.zeros(1, 8193, dtype=torch.int64)):
        with pytest.raises(ShapeError, match="probe has shape"):
            probe_media(tiny.model(), probe)
    with pytest.raises(DomainError, match="input_ids holds 99"):
        probe_media(tiny.model(), PROBE + 99)
    monitor = SpectralMonitor(PROBE, limit=1.0)
    trainer = Trainer(tiny.model(dynamics="decay_only"), tiny.loader(), tiny.config(), callbacks=[monitor])
    with pytest.raises(ConfigError, match="no potential to clip"):
        monitor.on_train_start(trainer)


def test_hybrids_are_watched_where_they_have_a_medium(tiny) -> None:
    hybrid = tiny.model(attention_every=2, attention_head_dim=8)
    assert list(probe_media(hybrid, PROBE)) == [0]
    monitor = SpectralMonitor(PROBE)
    plain = tiny.model(mixer="attention", attention_head_dim=8)
    trainer = Trainer(plain, tiny.loader(), tiny.config(), callbacks=[monitor], progress=False)
    with pytest.raises(ConfigError, match="no layer with a resolvent"):
        monitor.on_train_start(trainer)
