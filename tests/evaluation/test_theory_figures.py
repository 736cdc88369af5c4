"""Figures of the theory: every one is drawn, is the same again, and shows what it says."""

from __future__ import annotations

import pytest
import torch

from resnet_bk.cli import main
from resnet_bk.evaluation import theory_figures
from resnet_bk.evaluation.theory_figures import FIGURES, decay_figure, draw_theory_figures, spectral_shift_figure
from resnet_bk.evaluation.token_medium import medium_of_words
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.tokenizer import Tokenizer


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_written_and_repeats(name: str, tmp_path) -> None:
    png, svg = draw_theory_figures(tmp_path / "one", only=name)
    assert png.name == f"{name}.png" and svg.name == f"{name}.svg"
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000
    assert "<svg" in svg.read_text()[:600]
    if name == "spectral-shift":
        again = draw_theory_figures(tmp_path / "two", only=name)
        assert [path.read_bytes() for path in again] == [png.read_bytes(), svg.read_bytes()]


def test_no_measured_decay_crosses_its_bound() -> None:
    lines = decay_figure().axes[0].get_lines()
    drawn = {
        style: [torch.as_tensor(line.get_ydata()) for line in lines if line.get_linestyle() == style] for style in "-:"
    }
    drawn["--"] = [torch.as_tensor(line.get_ydata()) for line in lines if line.get_linestyle() == "--"]
    for value, envelope, bound in zip(drawn["-"], drawn[":"], drawn["--"], strict=False):
        assert value.numel() == envelope.numel() == bound.numel() == 160
        assert bool((value <= envelope * (1 + 1e-12)).all())
        assert bool((envelope <= bound * (1 + 1e-12)).all())
    assert len(drawn["-"]) == 3


def test_the_shift_drawn_is_that_of_the_text() -> None:
    medium = medium_of_words("When a generator function is called it returns an iterator")
    above, below = spectral_shift_figure(medium).axes
    drawn = torch.as_tensor(above.get_lines()[0].get_ydata())
    torch.testing.assert_close(drawn, medium.spectral_shift()[:, 0])
    assert [label.get_text() for label in below.get_xticklabels()] == medium.tokens


def test_the_command_draws_them(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(theory_figures, "FIGURES", {"spectral-shift": spectral_shift_figure})
    assert main(["theory", "figures", "--out", str(tmp_path), "--text", "one word after the other"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"spectral-shift.{kind}") for kind in ("png", "svg")]
    assert "other" in (tmp_path / "spectral-shift.svg").read_text()


def test_the_command_reads_a_model(tmp_path, capsys, monkeypatch) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=300, d_model=32, num_layers=2, feed_forward_dim=32, head_dim=16, state_size=8)
    model = LanguageModel(config)
    model.tokenizer = Tokenizer.train(["one word after the other"], 300)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(theory_figures, "FIGURES", {"spectral-shift": spectral_shift_figure})
    arguments = ["theory", "figures", "--out", str(tmp_path), "--model", str(tmp_path / "model"), "--layer"]
    assert main([*arguments, "1"]) == 0
    assert "layer 1 of the model" in (tmp_path / "spectral-shift.svg").read_text()
    assert main([*arguments, "2"]) == 2
    assert "layer is 2; expected 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["theory", "figures"], "out"),
        (["theory", "tables", "--out", "x"], "action"),
        (["theory", "figures", "--out", "x", "--layer", "1"], "--layer"),
        (["theory", "figures", "--out", "x", "--model", "nowhere"], "nowhere"),
        (["theory", "figures", "--out", "x", "--txt", "a"], "'text'"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], name: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert name in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
