"""Peak memory of a training step before it runs, by part, and which switch makes it fit.

The step runs on tensors without elements (`allocation.py`): every operation, saved activation and recomputation of the
model as it is, of any mixer. Long inputs and deep models are extrapolated from short and shallow ones, in whose numbers
of segments and blocks the bytes are linear.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from resnet_bk.errors import ConfigError
from resnet_bk.layers.lora import adapt
from resnet_bk.models.config import AdapterConfig, ModelConfig
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.ops.dispatch import PlannedGPU, planning_for
from resnet_bk.training.allocation import HOST, autocast_as_on, fused_norms, without_memory
from resnet_bk.training.config import MemoryConfig, RunConfig, TrainingConfig
from resnet_bk.training.memory import apply_memory
from resnet_bk.training.plan_shards import GATHERED, ShardsInFlight, sharded_bytes
from resnet_bk.training.workspace import LOGITS, OTHER

PARTS = ("weights", "gradients", "optimizer", GATHERED, "activations", LOGITS, OTHER)
"""Parts of the peak, in the order in which they are shown."""

Device = Literal["cpu", "cuda"]
# Blocks and segments of the runs that are extrapolated.
_BLOCKS, _SEGMENTS = (2, 3), (3, 4)
# Of a sharded model up to three blocks are on their way at once.
_BLOCKS_SHARDED = (4, 5)


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak of one training step."""

    parts: dict[str, int]
    """Bytes by part at the moment of the peak; see `PARTS`."""
    phase: str
    """When that is: forward (the loss included), backward (early or late) or update."""
    host: int
    """Bytes that the step keeps in host memory instead."""

    @property
    def peak(self) -> int:
        """Bytes on the device at that moment."""
        return sum(self.parts.values())

    def table(self) -> str:
        """Lines of text: bytes by part and in all."""
        lines = [f"{name:<12}{_gigabytes(self.parts[name]):>12}" for name in PARTS]
        lines.append(f"{'peak':<12}{_gigabytes(self.peak):>12}  ({self.phase})")
        if self.host:
            lines.append(f"{'host':<12}{_gigabytes(self.host):>12}")
        return "\n".join(lines)


def plan_memory(config: RunConfig, *, device: Device = "cuda", kernels: bool = True, ranks: int = 1) -> MemoryPlan:
    """What one training step of `config` allocates at its peak, on each rank.

    Args:
        config: the run; `training.precision` auto is bfloat16 on a GPU and float32 on a CPU.
        device: where it is to run; the device need not be there.
        kernels: whether the GPU runs the Triton kernels (compute capability 8.0 or newer).
        ranks: processes that share the run.

    Not counted: what the CUDA context and its libraries take, fragmentation, buffers inside NCCL, what ranks of a
    context exchange, and the published kernels of Mamba.
    """
    model, memory = config.model, config.memory
    training = _share(config.training, ranks, config.distributed.context_parallel)
    sharded = ranks > 1 and config.distributed.strategy == "fsdp"
    tokens = training.batch_size * training.sequence_length
    if min(ranks, config.distributed.context_parallel) > 1:
        # Ranks that share a sequence do not cut their own segments of it.
        policy = _policy(memory, tokens)
        whole = max(tokens, memory.segment_tokens)
        memory = replace(memory, recompute="block" if policy == "segment" else policy, segment_tokens=whole)
    segment = _segment_time(model, training, memory)
    segments = -(-training.sequence_length // segment)
    uniform = len(set(model.mixers)) == 1
    blocks_seen = _BLOCKS_SHARDED if sharded else _BLOCKS
    if not uniform or model.num_layers <= blocks_seen[-1]:
        blocks_seen = (model.num_layers,)
    segments_seen = _SEGMENTS if segments > _SEGMENTS[-1] else (segments,)
    seen: dict[tuple[int, int], dict[str, Counter[str]]] = {}
    for blocks in blocks_seen:
        for count in segments_seen:
            time = training.sequence_length if len(segments_seen) == 1 else count * segment
            shape = replace(model, num_layers=blocks) if uniform else model
            pretended = replace(training, sequence_length=time)
            # The policy "auto" must not change its mind about a shorter input.
            chosen = replace(memory, recompute=_policy(memory, tokens))
            run = replace(config, model=shape, training=pretended, memory=chosen)
            seen[blocks, count] = _step(run, device, kernels, ranks)
    phases = _extrapolate(seen, blocks_seen, segments_seen, model.num_layers, segments)
    trained = [p for p in _model_on_meta(model, config.adapters).parameters() if p.requires_grad]
    sizes = [sharded_bytes([p], ranks, 1) if sharded else p.numel() for p in trained]
    moments, host_moments, scratch = _optimizer_bytes(sizes, memory, device)
    updated = Counter({"weights": phases["backward, late"]["weights"], "gradients": 4 * sum(sizes), OTHER: scratch})
    if sharded and config.distributed.cpu_offload and device == "cuda":
        moments, host_moments = 0, moments
        updated = Counter({HOST: 8 * sum(sizes)})
    phases["update"] = updated
    found = max(phases, key=lambda phase: sum(phases[phase][part] for part in PARTS))
    parts = {part: phases[found][part] for part in PARTS} | {"optimizer": moments}
    host = max(phases[phase][HOST] for phase in phases) + host_moments
    return MemoryPlan(parts, found, host)


def suggestions(
    config: RunConfig, *, device: Device = "cuda", kernels: bool = True, ranks: int = 1
) -> Iterator[tuple[str, MemoryPlan]]:
    """Changes of `config` and their plans, the cheapest in time first, each planned when it is asked for.

    Each change adds to those before it; none changes what is computed beyond rounding, but for 8-bit moments. A change
    that does not lower the peak of those before it is left out.
    """
    least = math.inf
    for change in _CHANGES:
        while (proposed := change(config, ranks)) is not None:
            name, changed = proposed
            plan = plan_memory(changed, device=device, kernels=kernels, ranks=ranks)
            if plan.peak >= least:
                break
            config, least = changed, plan.peak
            yield name, plan


def _recompute_blocks(config: RunConfig, ranks: int) -> tuple[str, RunConfig] | None:
    share = _share(config.training, ranks, config.distributed.context_parallel)
    if _policy(config.memory, share.batch_size * share.sequence_length) != "none":
        return None
    return "--memory.recompute block", replace(config, memory=replace(config.memory, recompute="block"))


def _halve(config: RunConfig, ranks: int) -> tuple[str, RunConfig] | None:
    training = config.training
    batch, passes = training.batch_size // 2, 2 * training.gradient_accumulation_steps
    # Rows that continue each other are not the same rows any more in batches of another shape.
    if training.carry != "none" or training.batch_size % 2:
        return None
    name = f"--training.batch_size {batch} --training.gradient_accumulation_steps {passes}"
    half = replace(training, batch_size=batch, gradient_accumulation_steps=passes)
    return name, replace(config, training=half)


def _set(section: str, fields: dict[str, Any], config: RunConfig, ranks: int) -> tuple[str, RunConfig] | None:
    """A switch and `config` with it; None where it is set already, makes no sense or cannot be."""
    sharded = ranks > 1 and config.distributed.strategy == "fsdp"
    if section == "distributed" and (ranks == 1 or config.adapters.base or config.memory.optimizer != "fused"):
        return None
    if ("optimizer" in fields and sharded) or ("cpu_offload" in fields and not sharded):
        return None
    before = getattr(config, section)
    changed = replace(before, **fields)
    if changed == before or (section == "memory" and changed.segment_tokens > before.segment_tokens):
        return None
    name, value = next((name, value) for name, value in fields.items() if getattr(before, name) != value)
    return f"--{section}.{name} {str(value).lower()}", replace(config, **{section: changed})


_CHANGES: tuple[Callable[[RunConfig, int], tuple[str, RunConfig] | None], ...] = (
    _recompute_blocks,
    _halve,
    partial(_set, "memory", {"segment_tokens": 2048}),
    partial(_set, "memory", {"recompute": "segment", "offload_activations": False}),
    partial(_set, "distributed", {"strategy": "fsdp", "reshard_after_forward": True}),
    partial(_set, "distributed", {"cpu_offload": True}),
    partial(_set, "memory", {"optimizer": "8bit"}),
    partial(_set, "memory", {"optimizer": "offload"}),
)


def parse_bytes(text: str) -> int:
    """Bytes of a text such as "16GB", "79GiB" or "512MB".

    Raises:
        ConfigError: not a positive number with one of the units.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "B": 1}
    spelled = text.strip().upper()
    unit = next((unit for unit in units if spelled.endswith(unit)), "")
    try:
        value = float(spelled.removesuffix(unit)) * units[unit]
    except (KeyError, ValueError):
        value = 0.0
    if not 1 <= value < 2**63:
        raise ConfigError(f"{text!r} is no amount of memory; expected a number with a unit, such as 16GB or 79GiB.")
    return int(value)


def _policy(memory: MemoryConfig, tokens: int) -> Literal["none", "block", "segment"]:
    if memory.recompute == "auto":
        return "block" if tokens > memory.segment_tokens else "none"
    return memory.recompute


def _segment_time(model: ModelConfig, training: TrainingConfig, memory: MemoryConfig) -> int:
    """Tokens of a row in one segment, as `LanguageModel.hidden_states` cuts them."""
    tokens = training.batch_size * training.sequence_length
    whole = "attention" in model.mixers and not model.attention_window
    if whole or tokens <= memory.segment_tokens or _policy(memory, tokens) == "none":
        return training.sequence_length
    cut = max(64, model.attention_window, memory.segment_tokens // training.batch_size // 64 * 64)
    return min(cut, training.sequence_length)


def _model_on_meta(config: ModelConfig, adapters: AdapterConfig) -> LanguageModel:
    """The model that is trained, without storage."""
    with torch.device("meta"):
        model = LanguageModel(config)
    if adapters.base:
        adapt(model, rank=adapters.rank, alpha=adapters.alpha, group=adapters.group)
    return model


def _share(training: TrainingConfig, ranks: int, together: int) -> TrainingConfig:
    """What one rank computes of a step, as `distributed.share_out` deals it out."""
    together = min(together, ranks)
    dealt = math.gcd(training.gradient_accumulation_steps, ranks // together) if training.carry == "none" else 1
    sharers = ranks // together // dealt
    if ranks % together or training.batch_size % sharers:
        raise ConfigError(
            f"{ranks} ranks cannot share {training.gradient_accumulation_steps} batches of {training.batch_size} rows "
            f"evenly, {together} to a row; see training.gradient_accumulation_steps and training.batch_size."
        )
    return replace(
        training,
        batch_size=training.batch_size // sharers,
        gradient_accumulation_steps=training.gradient_accumulation_steps // dealt,
        sequence_length=max(2, -(-training.sequence_length // together)),
    )


def _step(config: RunConfig, device: Device, kernels: bool, ranks: int) -> dict[str, Counter[str]]:
    """Bytes by part at the peak of every phase of one forward and backward pass of one rank.

    Args:
        config: of the rank's own share of a step.
        device: where it is to run.
        kernels: whether that runs the Triton kernels.
        ranks: how many there are.
    """
    training, memory, distributed = config.training, config.memory, config.distributed
    model = _model_on_meta(config.model, config.adapters)
    sharded = ranks > 1 and distributed.strategy == "fsdp"
    together = training.gradient_accumulation_steps if training.carry == "exact" else 1
    several = training.gradient_accumulation_steps > together
    # DDP keeps its buckets of gradients from step to step.
    keeps_gradients = several or (ranks > 1 and not sharded)
    gathered = torch.bfloat16 if sharded and distributed.gather_dtype == "bfloat16" else torch.float32
    gpu = PlannedGPU(kernels) if device == "cuda" else None
    phases: dict[str, Counter[str]] = {}
    norms = fused_norms() if gpu is not None else nullcontext()
    with planning_for(gpu), norms, without_memory() as allocation:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                values = torch.empty(parameter.shape, dtype=gathered)
                setattr(module, name, nn.Parameter(values, parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        flight = None
        if sharded:
            flight = ShardsInFlight(model, distributed, ranks, accumulating=several, allocation=allocation)
        allocation.claim([*model.parameters(), *model.buffers()], "weights")
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if keeps_gradients:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
                allocation.claim([parameter.grad], "gradients")
        apply_memory(model, memory)
        model.offload = False  # what would be moved is claimed below instead
        model._check_ids = lambda input_ids: None  # type: ignore[method-assign]
        saved = HOST if memory.offload_activations else "activations"

        def end(phase: str) -> None:
            phases[phase] = allocation.parts
            allocation.reset_peak()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            allocation.claim([tensor], saved)
            return tensor

        half = parameters[len(parameters) // 2]
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: allocation.claim([parameter.grad], "gradients")
            )
        half.register_post_accumulate_grad_hook(lambda _: end("backward, early"))
        ids = torch.empty(training.batch_size, training.sequence_length, dtype=torch.long)
        precision = _precision(training, device)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        # CPU autocast stands in for that of the device: tensors without elements are on the CPU.
        with autocast_as_on("cpu", precision), hooks:
            loss = _loss_of(model, ids, together)
        end("forward")
        if flight is None:
            loss.backward()
        else:
            flight.start_backward()
            loss.backward()
            flight.finish()
        end("backward, late")
    phases.setdefault("backward, early", phases["backward, late"])
    return phases


def _loss_of(model: LanguageModel, ids: torch.Tensor, together: int) -> torch.Tensor:
    """The loss of so many batches that continue each other, whose states are not held beyond."""
    loss, state = torch.zeros(()), None
    for _ in range(together):
        output = model(ids, labels=ids, state=state)
        loss, state = loss + output.loss, output.state.map(torch.clone)
    return loss


def _precision(training: TrainingConfig, device: Device) -> torch.dtype | None:
    """The dtype of autocast; None for float32."""
    name = training.precision
    if name == "auto":
        name = "bfloat16" if device == "cuda" else "float32"
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _extrapolate(seen, blocks_seen, segments_seen, blocks: int, segments: int) -> dict[str, Counter[str]]:
    """The phases at `blocks` and `segments`, bilinear in both through what was seen."""

    def line(low: Counter[str], high: Counter[str], steps: int) -> Counter[str]:
        return Counter({part: max(0, low[part] + steps * (high[part] - low[part])) for part in {*low, *high}})

    def along_segments(count: int) -> dict[str, Counter[str]]:
        first = seen[count, segments_seen[0]]
        if len(segments_seen) == 1:
            return first
        second = seen[count, segments_seen[1]]
        return {phase: line(first[phase], second[phase], segments - segments_seen[0]) for phase in first}

    first = along_segments(blocks_seen[0])
    if len(blocks_seen) == 1:
        return first
    second = along_segments(blocks_seen[1])
    return {phase: line(first[phase], second[phase], blocks - blocks_seen[0]) for phase in first}


def _optimizer_bytes(sizes: list[int], memory: MemoryConfig, device: Device) -> tuple[int, int, int]:
    """Bytes of the moments on the device and in host memory, and what an update needs besides.

    Args:
        sizes: numbers in every parameter that is trained.
        memory: which optimizer.
        device: where the step runs.
    """
    largest = 4 * max(sizes)
    if memory.optimizer == "offload":
        held = 8 * sum(sizes)
        return (held, 0, 0) if device == "cpu" else (0, held, 0)
    if memory.optimizer == "8bit":
        # A code for every moment and a scale for 256 of them; torchao leaves small and odd sizes as they are.
        held = sum(2 * (size + size // 256 * 4) if size >= 4096 and size % 256 == 0 else 8 * size for size in sizes)
        return held, 0, 2 * largest
    return 8 * sum(sizes), 0, 0 if device == "cuda" else 2 * largest


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.3f} GB"
