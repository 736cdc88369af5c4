from __future__ import annotations

import json
import math

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from resnet_bk.errors import DataError
from resnet_bk.evaluation.plots import plot_loss_curve


def write_metrics(path, *, bits: bool = True, steps: int = 200):
    rows = []
    for step in range(1, steps + 1):
        tokens = 2048 * step
        loss = 2.2 + 6 * math.exp(-step / 25) + 0.05 * math.sin(step)
        rows.append({"kind": "train", "step": step, "tokens": tokens, "loss": loss})
        if step % 40 == 0:
            rows.append(
                {
                    "kind": "validation",
                    "step": step,
                    "tokens": tokens,
                    "loss": loss + 0.1,
                    "bits_per_byte": (loss + 0.1) / math.log(2) / 3.1 if bits else None,
                }
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, so that what was drawn can be read back."""
    saved = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), savefig(self, *a, **k))[1])
    return saved


def test_curve_shows_both_losses_and_the_baselines(tmp_path, figures):
    metrics = write_metrics(tmp_path / "metrics.jsonl")
    path = plot_loss_curve(metrics, tmp_path / "curve.png", baselines={"unigram": 3.4, "xz": 2.1}, title="tiny")
    assert imread(path).shape[:2] == (750, 1200)
    axes = figures[0].axes[0]
    train, validation, unigram, xz = axes.lines
    assert len(train.get_xdata()) == 200 and len(validation.get_xdata()) == 5
    # One bit per byte is 3.1 ln 2 nats per token in these rows.
    assert list(unigram.get_ydata()) == pytest.approx([3.4 * 3.1 * math.log(2)] * 2)
    assert list(xz.get_ydata()) == pytest.approx([2.1 * 3.1 * math.log(2)] * 2)
    assert axes.get_xlabel() == "tokens trained on" and axes.get_ylabel() == "loss (nats per token)"
    right = axes.child_axes[0]
    assert right.get_ylabel().startswith("bits per byte")
    left, bits = axes.get_ylim(), right.get_ylim()
    assert bits == pytest.approx([y / 3.1 / math.log(2) for y in left])


def test_without_bytes_there_is_one_axis_and_no_baseline(tmp_path, figures):
    metrics = write_metrics(tmp_path / "metrics.jsonl", bits=False)
    plot_loss_curve(metrics, tmp_path / "curve.png", log_x=True)
    axes = figures[0].axes[0]
    assert not axes.child_axes and axes.get_xscale() == "log"
    with pytest.raises(DataError, match="baselines need one"):
        plot_loss_curve(metrics, tmp_path / "other.png", baselines={"xz": 2.0})
    assert not (tmp_path / "other.png").exists()


def test_files_without_rows_are_refused(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("")
    with pytest.raises(DataError, match="no training or validation rows"):
        plot_loss_curve(metrics, tmp_path / "curve.png")
    metrics.write_text('{"kind": "train"\n')
    with pytest.raises(DataError, match="line 1 is not JSON"):
        plot_loss_curve(metrics, tmp_path / "curve.png")
