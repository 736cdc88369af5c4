"""What every process of the context-parallel tests runs, beside what one process computes for comparison."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from resnet_bk.models.config import ModelConfig
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.training.batches import count_targets
from resnet_bk.training.context_parallel import ContextGroup, context_group, last_state, split_batch, sum_gradients

TIME = 150
CASES = {
    "float32": dict(dtype=torch.float32),
    "float32-short": dict(dtype=torch.float32, started=True, lengths="short"),
    "default": {},
    # Recomputing a block in the backward pass exchanges its summaries again.
    "recomputed": dict(segment_tokens=64, lengths="short"),
    "continued": dict(started=True, lengths="short"),
    "all-phases": dict(model=dict(phase_coupling=True, peierls_pairs=2, source="free"), started=True, lengths="short"),
    "sites": dict(model=dict(sites_per_token=3, green_readout=True), lengths="short"),
    "decay-only": dict(model=dict(dynamics="decay_only"), segment_tokens=64),
}


def build(name):
    """Model, batch and starting state of a case, the same in every process."""
    case = CASES[name]
    torch.manual_seed(0)
    sizes = dict(vocab_size=13, d_model=16, num_layers=2, feed_forward_dim=24, head_dim=8, state_size=8)
    model = LanguageModel(ModelConfig(**sizes, **case.get("model", {}))).to(case.get("dtype", torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.segment_tokens = case.get("segment_tokens", model.segment_tokens)
    ids = torch.randint(0, 13, (2, TIME))
    labels = ids.clone()
    labels[0, 20:90] = -100
    state = None
    if case.get("started"):
        with torch.no_grad():
            state = model.hidden_states(torch.randint(0, 13, (2, 9)))[1]
    return model, {"input_ids": ids, "labels": labels}, state


def lengths_of(name, size):
    """Segments of a case: None is as equal as possible, "short" has one of a single token at the end."""
    if "lengths" not in CASES[name]:
        return None
    left = [3, 70, 20][: size - 1]
    return [*left[: size - 2], TIME - 1 - sum(left[: size - 2]), 1]


def alone(name, dtype=None):
    """What one process finds: logits, loss, final state and gradients; with a `dtype` computed in that."""
    model, batch, state = build(name)
    if dtype is not None:
        model = model.to(dtype)
        state = None if state is None else state.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    output = model(**batch, state=state, return_logits=True)
    output.loss.backward()
    return results(model, output.logits, output.loss, output.state)


def results(model, logits, loss, state):
    """Everything to compare by name."""
    found = {"logits": logits, "loss": loss, **{f"state.{i}": part for i, part in enumerate(state.tensors)}}
    found |= {f"gradient.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def shared(name, group):
    """What a group of ranks finds."""
    model, batch, state = build(name)
    part = split_batch(batch, group, lengths=lengths_of(name, group.size))
    output = model(**part, state=state, return_logits=True, group=group)
    loss = output.loss * (count_targets(part) / count_targets(batch))
    loss.backward()
    sum_gradients(model, group)
    loss = loss.detach()
    dist.all_reduce(loss, group=group.process_group)
    pieces = [None] * group.size
    dist.all_gather_object(pieces, output.logits.detach(), group=group.process_group)
    return results(model, torch.cat(pieces, 1), loss, last_state(output.state, group))


def with_data_parallel(group):
    """Two groups of ranks, one sequence of the batch each, under DDP; gradients of the mean over both."""
    model, batch, _ = build("default")
    data_rank = dist.get_rank() // group.size
    part = split_batch({name: x[data_rank : data_rank + 1] for name, x in batch.items()}, group)
    engine = torch.nn.parallel.DistributedDataParallel(model)
    # The loss is not a mean over ranks but a sum, and DDP divides by their number.
    share = engine(**part, group=group).loss * (count_targets(part) / count_targets(batch))
    (share * dist.get_world_size()).backward()
    share = share.detach()
    dist.all_reduce(share)
    found = {f"gradient.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": share, **found}


def work(rank, size, folder):
    """Run every case and write what this rank found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder) / "store"), size), rank=rank, world_size=size)
    group = ContextGroup()
    for name in CASES:
        save_file(shared(name, group), Path(folder) / f"{name}-{rank}.safetensors")
    if size == 4:
        save_file(with_data_parallel(context_group(2)), Path(folder) / f"data-{rank}.safetensors")
    dist.destroy_process_group()
