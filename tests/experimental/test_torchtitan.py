"""torchtitan trains the model on many ranks as a plain loop does, and hands its weights back; others are refused."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_bk import LanguageModel, ModelConfig, Tokenizer
from resnet_bk.errors import MissingDependencyError

SCRIPT = Path(__file__).with_name("titan_on_ranks.py")
VERSION = "0.2.2"
INSTALLED = [d.version for d in importlib.metadata.distributions() if d.metadata["Name"] == "torchtitan"]
needs_torchtitan = pytest.mark.skipif(VERSION not in INSTALLED, reason=f"torchtitan=={VERSION} is not installed")


def launch(how: str, folder: Path, ranks: int = 1, *options: str) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if how == "with" else []
    command = [sys.executable, *torchrun, str(SCRIPT), how, str(folder), str(ranks), *options]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-4000:]


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder with a model to start from and texts to train on."""
    folder = tmp_path
    texts = [f"alpha beta {number} gamma delta epsilon " * 40 for number in range(16)]
    (folder / "texts").mkdir()
    (folder / "texts" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    torch.manual_seed(0)
    model = LanguageModel(
        ModelConfig(vocab_size=300, d_model=16, num_layers=2, feed_forward_dim=24, head_dim=8, state_size=8)
    )
    model.tokenizer = Tokenizer.train(texts, vocab_size=300)
    model.save_pretrained(folder / "assets")
    return folder


@pytest.mark.slow
@needs_torchtitan
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ["--activation_checkpoint.mode=full"]),
        (4, ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=2"]),
    ],
)
def test_ranks_follow_a_plain_loop(workplace, ranks, options):
    launch("without", workplace, ranks)
    launch("with", workplace, ranks, *options)
    expected, found = (json.loads((workplace / f"{how}.json").read_text()) for how in ("without", "with"))
    assert len(found) == 4 and found[-1][0] < found[0][0] - 0.2
    for mine, other in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, rel=5e-6)  # measured worst: 1e-6
    wanted = LanguageModel.from_pretrained(workplace / "expected").state_dict()
    trained = torch.load(workplace / "trained.pt", weights_only=True)
    assert trained.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # Measured worst: 2e-7.
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=2e-6, msg=name)
    drawn = torch.load(workplace / "drawn.pt", weights_only=True)
    fresh = LanguageModel.from_pretrained(workplace / "assets")
    torch.manual_seed(7)
    fresh.reset_parameters()
    assert [name for name, tensor in fresh.state_dict().items() if not torch.equal(drawn[name], tensor)] == []


@pytest.mark.slow
@needs_torchtitan
def test_what_is_not_there_is_refused(workplace):
    launch("refused", workplace)
    messages = json.loads((workplace / "refused.json").read_text())
    for message, name in zip(
        messages,
        (
            "parallelism.tensor_parallel_degree",
            "parallelism.context_parallel_degree",
            "parallelism.data_parallel_replicate_degree",
            "compile.components",
            "activation_checkpoint.mode",
        ),
        strict=True,
    ):
        assert message.startswith(name)


def test_another_release_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    monkeypatch.delitem(sys.modules, "resnet_bk.experimental.torchtitan", raising=False)
    with pytest.raises(MissingDependencyError, match=rf"is written for torchtitan {VERSION}; found 0\.1\.0\. pip inst"):
        importlib.import_module("resnet_bk.experimental.torchtitan")
