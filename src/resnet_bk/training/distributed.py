"""One model on many ranks: replicated (DDP) or sharded (FSDP2), with the batches of one process shared out.

A step on N ranks reads the batches that one process would read. Each rank computes its part of every step's loss, so
losses and gradients are those of one process up to rounding, and neither the schedule nor the place in the data
depends on N.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_bk.errors import ConfigError
from resnet_bk.training.config import DistributedConfig
from resnet_bk.training.context_parallel import ContextGroup, context_group, split_batch
from resnet_bk.training.random_state import seed_everything
from resnet_bk.training.ranks import Ranks

_STREAM = "_streamed_hidden_states"


class Engine:
    """A model as the ranks hold it: what a step calls, and how gradients are summed over ranks.

    Args:
        model: the same on every rank, or on the meta device; moved, filled (with `reset_parameters`, from `seed`) and,
            under FSDP, sharded in place.
        config: replicated or sharded, and how.
        ranks: who takes part.
        seed: of parameters that have no storage yet; they are the same whatever the number of ranks.

    Attributes:
        model: the model itself. Under FSDP its parameters are DTensors, and only `forward` may be called on it.
        sharded: whether it is under FSDP.
        context: the ranks that share this one's sequences; None where each sequence is on one rank.
    """

    def __init__(self, model: Any, config: DistributedConfig, ranks: Ranks, *, seed: int) -> None:
        self.model = model
        self._model_class = type(model)  # `fully_shard` gives the model another
        self.ranks = ranks
        self.sharded = config.strategy == "fsdp"
        self.context = context_group(config.context_parallel) if min(config.context_parallel, ranks.size) > 1 else None
        self._keeps_parameters = self.sharded and not config.reshard_after_forward
        empty = any(parameter.is_meta for parameter in model.parameters())
        if self.sharded:
            if not empty:
                # Every rank cuts its shards out of its own copy: nothing is sent.
                model.to(ranks.device)
            _shard(model, config, ranks)
        if empty:
            _fill(model, torch.device("cpu") if config.cpu_offload else ranks.device, seed)
        elif not self.sharded:
            model.to(ranks.device)
        self.forward = model
        if not self.sharded and ranks.size > 1:
            if getattr(model, "adapters", None) is not None:
                # Every rank read the same base; DDP would send packed matrices again before every pass.
                frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
                frozen += [name for name, _ in model.named_buffers()]
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
            self.forward = DistributedDataParallel(
                model,
                device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
                # Some variants of the mixer have parameters that their loss does not depend on.
                find_unused_parameters=True,
                gradient_as_bucket_view=True,
            )

    def loss(self, arguments: dict[str, Tensor], weight: float, state: Any = None) -> tuple[Tensor, Any]:
        """`weight` times the mean loss over the targets of `arguments`, which continue `state`, and the state after.

        To be used inside `accumulating`. A weight of 0 takes part in the ranks' collective calls, and adds nothing.
        """
        if weight == 0:
            # The model refuses a batch without targets; any will do.
            arguments = {"input_ids": arguments["input_ids"], "labels": arguments["input_ids"]}
        options = {} if self.context is None else {"group": self.context}
        if state is not None:
            options["state"] = state
        output = self.forward(**arguments, **options)
        return output.loss * weight, output.state

    def backward(self, loss: Tensor) -> None:
        """Add this rank's gradients; DDP and FSDP divide the sum over ranks by their number, which is undone here."""
        (loss * self.ranks.size).backward()

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Sum gradients over ranks only in the `last` forward and backward pass of a step."""
        if isinstance(self.forward, DistributedDataParallel) and not last:
            with self.forward.no_sync():
                yield
            return
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)
            if self._keeps_parameters:
                self.model.set_reshard_after_backward(last)
        yield

    def gradient_norm(self) -> Tensor:
        """L2 norm of the gradients of all parameters, the same on every rank."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return whole(torch.nn.utils.get_total_norm(gradients)).to(self.ranks.device)

    @contextmanager
    def evaluating(self) -> Iterator[Any]:
        """The model as `evaluate_stream` wants it; every rank must evaluate, and all find the same.

        A sharded model gathers its blocks one after the other; its embedding and head are whole for the duration.
        """
        if not self.sharded:
            yield self.model
            return
        stream = _ShardedStream(self.model)
        try:
            yield stream
        finally:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def whole_model(self) -> Any:
        """The model with whole parameters: itself, or on rank 0 a copy on the processor. Every rank must call.

        Under FSDP the other ranks receive a model without storage.
        """
        if not self.sharded:
            return self.model
        state = {
            name: tensor.cpu() if self.ranks.is_main else tensor.to("meta")
            for name, tensor in ((name, whole(tensor)) for name, tensor in self.model.state_dict().items())
        }
        with torch.device("meta"):
            copy = self._model_class(self.model.config)
        copy.load_state_dict(state, assign=True)
        copy.tokenizer = self.model.tokenizer
        copy.generation_config = self.model.generation_config
        copy.segment_tokens = self.model.segment_tokens
        return copy.train(self.model.training)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over ranks; every rank must call."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Offloaded shards travel over the mesh's device.
    return cast(DTensor, tensor.detach().to(tensor.device_mesh.device_type)).full_tensor()


def spread_like(tensor: Tensor, model: Tensor) -> Tensor:
    """This rank's part of `tensor`, which every rank has whole, spread over the ranks as `model` is."""
    if not isinstance(model, DTensor):
        return tensor
    mesh = model.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, model.placements, src_data_rank=None).to(model.device)


def share_out(
    batches: list[dict[str, Tensor]], ranks: Ranks, context: ContextGroup | None = None, *, in_order: bool = False
) -> list[dict[str, Tensor]]:
    """The parts of one step's batches that this rank computes; the same number on every rank.

    Whole batches are dealt out where their number allows it, so that a step takes fewer passes; what ranks remain
    share the rows of each batch. Ranks of one `context` get the same rows, and each its segment of them. `in_order`
    is for rows that continue those of the batch before: a rank gets the same rows of every batch.

    Raises:
        ConfigError: batches and rows that the ranks cannot share evenly.
    """
    together = 1 if context is None else context.size
    rank, size = ranks.rank // together, ranks.size // together
    dealt = 1 if in_order else math.gcd(len(batches), size)
    sharers = size // dealt
    parts = []
    for batch in batches[rank // sharers :: dealt]:
        rows = batch["input_ids"].shape[0]
        if rows % sharers or (sharers > 1 and "cu_seqlens" in batch):
            what = "packed documents in 1 row" if "cu_seqlens" in batch else f"{rows} rows"
            product = "" if in_order else "training.gradient_accumulation_steps, or else that times "
            who = f"{size} ranks" if context is None else f"{size} groups of {together} ranks"
            raise ConfigError(
                f"{who} cannot share {len(batches)} batches of {what} evenly. Choose {product}training.batch_size, "
                f"as a multiple of the number of {'ranks' if context is None else 'groups'}."
            )
        length, place = rows // sharers, rank % sharers
        parts.append(batch if sharers == 1 else {n: t[place * length : (place + 1) * length] for n, t in batch.items()})
    return parts if context is None else [split_batch(part, context) for part in parts]


def shard(
    model: Any, mesh: DeviceMesh, policy: MixedPrecisionPolicy, *, reshard_after_forward: bool, cpu_offload: bool
) -> None:
    """Apply `fully_shard` to every block and to the model.

    Args:
        model: a `LanguageModel`.
        mesh: of ranks to shard over; of two dimensions the first replicates.
        policy: dtypes of the traffic; inputs must not be cast, because states are float32 or wider and stay so.
        reshard_after_forward: drop the gathered parameters of a block after its forward pass.
        cpu_offload: keep shards in the processor's memory.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy(),
    }
    # The views are states, which nothing changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    # What the model itself holds is needed at once when the backward pass begins, so it is never dropped between.
    fully_shard(model, reshard_after_forward=None if reshard_after_forward else False, **options)


def _shard(model: Any, config: DistributedConfig, ranks: Ranks) -> None:
    """`shard` as the configuration says, with a way to evaluate streams."""
    mesh = init_device_mesh(ranks.device.type, (ranks.size,), mesh_dim_names=("data",))
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    gather = None if config.gather_dtype == "float32" else dtypes[config.gather_dtype]
    policy = MixedPrecisionPolicy(
        param_dtype=gather, reduce_dtype=dtypes[config.reduce_dtype], cast_forward_inputs=False
    )
    shard(model, mesh, policy, reshard_after_forward=config.reshard_after_forward, cpu_offload=config.cpu_offload)
    setattr(model, _STREAM, model.hidden_states)
    register_fsdp_forward_method(model, _STREAM)


def _fill(model: Any, device: torch.device, seed: int) -> None:
    """Give a model on the meta device storage on `device`, and draw its parameters on the processor from `seed`."""
    seed_everything(seed)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        model.to_empty(device=device)
        with WholeDraws():
            model.reset_parameters()
        return
    model.to_empty(device="cpu")
    model.reset_parameters()
    model.to(device)


class WholeDraws(TorchDispatchMode):
    """Inside, in-place operations on a sharded tensor are done on the whole tensor, of which each rank keeps its shard.

    So random numbers do not depend on the number of ranks. One whole tensor exists at a time.
    """

    _OVERWRITES = ("normal_", "uniform_", "fill_", "zero_", "copy_")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not (name.endswith("_") and args and isinstance(args[0], DTensor)):
            return func(*args, **(kwargs or {}))
        target = args[0]
        if name in self._OVERWRITES:
            complete = torch.empty(target.shape, dtype=target.dtype, device="cpu")
        else:
            complete = whole(target).cpu()
        func(complete, *(whole(a).cpu() if isinstance(a, DTensor) else a for a in args[1:]), **(kwargs or {}))
        target.to_local().copy_(_local(spread_like(complete, target)))
        return target


class _ShardedStream:
    """A sharded model as a `StreamModel`: hidden states gather blocks as they are needed, the head is gathered once."""

    def __init__(self, model: Any) -> None:
        self._model = model
        device = model.output_weight.device_mesh.device_type
        self.output_weight = whole(model.output_weight.detach()).to(device)

    @property
    def training(self) -> bool:
        return self._model.training

    def train(self, mode: bool = True) -> Any:
        return self._model.train(mode)

    def hidden_states(self, input_ids: Tensor, *, state: Any = None) -> tuple[Tensor, Any]:
        return getattr(self._model, _STREAM)(input_ids, state=state)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
