"""Processes that share one sequence against one process: outputs, states, loss and every gradient."""

from __future__ import annotations

import context_worker
import pytest
import torch
from safetensors.torch import load_file

from resnet_bk.errors import ConfigError, ShapeError
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.training.batches import count_targets
from resnet_bk.training.context_parallel import context_group, split_batch


class Place:
    """A group in which nothing is sent."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def gather(self, part):
        return part.detach()[None].repeat(self.size, *[1] * part.dim())


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def processes(request, tmp_path_factory):
    """Number of processes, and the folder of what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(context_worker.work, (request.param, str(folder)), nprocs=request.param)
    return request.param, folder


def compare(found, name, *, states=True):
    """Error of every tensor in units of its largest entry, against one process in float64.

    Measured worst in float64 1e-12. In float32 1e-4, as of one process, in the gradient of the energies; the others are
    below 5e-5.
    """
    expected = context_worker.alone(name, torch.float64)
    expected = {key: x for key, x in expected.items() if states or key == "loss" or key.startswith("gradient")}
    assert found.keys() == expected.keys()
    budget = 3e-4 if context_worker.CASES[name].get("dtype") == torch.float32 else 1e-10
    for key, exact in expected.items():
        if not exact.is_floating_point():
            assert torch.equal(found[key], exact), key
            continue
        error, scale = (found[key] - exact).abs().max().item(), exact.abs().max().item()
        assert error <= budget * scale, f"{key}: {error / scale:.1e}"


@pytest.mark.parametrize("name", context_worker.CASES)
def test_processes_equal_one(processes, name):
    size, folder = processes
    for rank in range(size):
        compare(load_file(folder / f"{name}-{rank}.safetensors"), name)


def test_groups_of_ranks_beside_data_parallelism(processes):
    size, folder = processes
    if size == 2:
        assert not list(folder.glob("data-*"))  # two ranks are one group
    else:
        for rank in range(size):
            compare(load_file(folder / f"data-{rank}.safetensors"), "default", states=False)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_target_is_counted_once(size):
    batch = {"input_ids": torch.arange(14).view(2, 7), "labels": torch.arange(14).view(2, 7)}
    parts = [split_batch(batch, Place(rank, size)) for rank in range(size)]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts], 1), batch["input_ids"])
    assert sum(count_targets(part) for part in parts) == count_targets(batch)
    targets = torch.cat([part["labels"][:, 1:] for part in parts], 1)
    assert torch.equal(targets, batch["labels"][:, 1:])


def test_a_rank_without_targets_has_a_loss_to_differentiate():
    model, batch, _ = context_worker.build("default")
    part = split_batch(batch, Place(1, 2), lengths=[context_worker.TIME - 1, 1])
    loss = model(**part, group=Place(1, 2)).loss
    loss.backward()
    assert loss == 0 and model.embedding.weight.grad is not None


@pytest.mark.parametrize("lengths", [[3, 3], [7, 0], [2, 2, 3]])
def test_lengths_that_do_not_cover_the_tokens(lengths):
    with pytest.raises(ShapeError, match="sequences of 7 tokens on 2 ranks"):
        split_batch({"input_ids": torch.zeros(1, 7, dtype=torch.long)}, Place(0, 2), lengths=lengths)


def test_fewer_tokens_than_ranks():
    with pytest.raises(ShapeError, match="3 tokens on 4 ranks"):
        split_batch({"input_ids": torch.zeros(1, 3, dtype=torch.long)}, Place(0, 4))


@pytest.mark.parametrize("options", [dict(mixer="mamba2"), dict(mixer="mamba3"), dict(attention_every=1)])
def test_mixers_that_cannot_share_are_named(options):
    sizes = dict(vocab_size=13, d_model=16, num_layers=1, feed_forward_dim=8, head_dim=8, state_size=8)
    model = LanguageModel(ModelConfig(**sizes, attention_head_dim=8, **options))
    with pytest.raises(ConfigError, match=options.get("mixer", "attention")):
        model(torch.zeros(1, 4, dtype=torch.long), group=Place(0, 2))


def test_packed_documents_are_named():
    model, batch, _ = context_worker.build("default")
    bounds = torch.tensor([0, 70, context_worker.TIME])
    with pytest.raises(ConfigError, match="cu_seqlens"):
        model(batch["input_ids"][:1], cu_seqlens=bounds, group=Place(0, 2))
    with pytest.raises(ConfigError, match="cu_seqlens"):
        split_batch({**batch, "cu_seqlens": bounds}, Place(0, 2))


def test_a_size_that_does_not_divide_the_ranks():
    with pytest.raises(ConfigError, match="context_parallel is 2"):
        context_group(2)
