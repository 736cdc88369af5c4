"""A corpus and a trained checkpoint small enough to make in seconds, shared by the tests of the commands."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from resnet_bk.cli import main

MODEL = "vocab_size: 300, d_model: 32, num_layers: 1, feed_forward_dim: 32, head_dim: 32, state_size: 8"


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory) -> Path:
    """Folder with `text/` (two files), `config.yaml` and the finished run `run/` of that configuration."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "text").mkdir()
    for name in ("one", "two"):
        lines = [f"def {name}_{number}(x):\n    return x + {number}\n" for number in range(200)]
        (folder / "text" / f"{name}.txt").write_text("\n".join(lines))
    (folder / "config.yaml").write_text(
        f"model: {{{MODEL}}}\n"
        f"data: {{name: text, path: {folder / 'text'}, cache_dir: {folder / 'cache'}, validation_fraction: 0.1}}\n"
        f"training: {{output_dir: {folder / 'run'}, steps: 4, sequence_length: 32, batch_size: 2, warmup_steps: 1,\n"
        "  log_every: 2, evaluate_every: 2, evaluation_tokens: 256, device: cpu}\n"
    )
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(["train", "--config", str(folder / "config.yaml")]) == 0
    (folder / "train.log").write_text(output.getvalue())
    return folder


@pytest.fixture
def checkpoint(toy_run) -> str:
    """The checkpoint that `toy_run` ended with; not to be changed."""
    return str(toy_run / "run" / "step-000004")
