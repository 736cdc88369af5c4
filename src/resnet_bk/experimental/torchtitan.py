"""The model for torchtitan: importing this module registers it there as `resnet_bk`, with the presets as flavors.

    torchrun --nproc-per-node 8 -m torchtitan.train --experimental.custom_import resnet_bk.experimental.torchtitan \
        --model.name resnet_bk --model.flavor base --activation_checkpoint.mode full ...

Data, optimizer, schedule, checkpoints and metrics are torchtitan's own. Of its ways to use many ranks there is FSDP2,
with replicas or without; the others are refused. Its loss takes the logits of all tokens at once.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from resnet_bk.errors import ConfigError, MissingDependencyError
from resnet_bk.evaluation.flops import model_flops
from resnet_bk.models.config import PRESETS, ModelConfig
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.training.distributed import WholeDraws, shard
from resnet_bk.training.saving.tensors import read_tensors_into

VERSION = "0.2.2"
"""The release whose interface this is."""


def _installed() -> str | None:
    try:
        return importlib.metadata.version("torchtitan")
    except importlib.metadata.PackageNotFoundError:
        return None


if _installed() != VERSION:
    raise MissingDependencyError(
        f"resnet_bk.experimental.torchtitan is written for torchtitan {VERSION}; found {_installed() or 'none'}. "
        f"pip install torchtitan=={VERSION}."
    )

# pyright: reportMissingImports=false
from torchtitan.components.loss import build_cross_entropy_loss  # noqa: E402
from torchtitan.components.lr_scheduler import build_lr_schedulers  # noqa: E402
from torchtitan.components.optimizer import build_optimizers  # noqa: E402
from torchtitan.components.tokenizer import build_hf_tokenizer  # noqa: E402
from torchtitan.components.validate import build_validator  # noqa: E402
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.hf_datasets.text_datasets import build_text_dataloader  # noqa: E402
from torchtitan.protocols.model import BaseModelArgs  # noqa: E402
from torchtitan.protocols.state_dict_adapter import StateDictAdapter  # noqa: E402
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec  # noqa: E402


@dataclass
class TitanArgs(BaseModelArgs):
    """A `ModelConfig` in the form in which torchtitan passes it on."""

    config: ModelConfig = field(default_factory=lambda: ModelConfig.preset("tiny"))

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Nothing: no size of the model depends on the job."""

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and operations a token of a forward and a backward pass."""
        count = model_flops(self.config, time=seq_len)
        return sum(parameter.numel() for parameter in model.parameters()), (count.forward + count.backward) // seq_len


class TitanLanguageModel(LanguageModel):
    """`LanguageModel` as torchtitan calls it; parameters have the same names."""

    def __init__(self, args: TitanArgs) -> None:
        super().__init__(args.config)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw all parameters, sharded or not, from the global generator; there are no buffers."""
        with WholeDraws():
            self.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits [batch, time, vocabulary] of token ids [batch, time]."""
        logits = super().forward(tokens).logits
        assert logits is not None  # there are no labels
        return logits


class TitanWeights(StateDictAdapter):
    """Names of parameters are those of a model folder, so nothing is converted."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """`state_dict` itself."""
        return state_dict

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """`hf_state_dict` itself."""
        return hf_state_dict


def parallelize(model: TitanLanguageModel, parallel_dims: ParallelDims, job_config: JobConfig) -> TitanLanguageModel:
    """The model, sharded in place as the job asks for.

    Raises:
        ConfigError: a kind of parallelism, compilation or selective recomputation that is not there for this model.
    """
    job, mode = job_config.parallelism, job_config.activation_checkpoint.mode
    refused = {
        "parallelism.tensor_parallel_degree": parallel_dims.tp_enabled,
        "parallelism.context_parallel_degree": parallel_dims.cp_enabled,
        "parallelism.pipeline_parallel_degree": parallel_dims.pp_enabled,
        "parallelism.data_parallel_replicate_degree": parallel_dims.dp_replicate_enabled
        and not parallel_dims.fsdp_enabled,
        "compile.components": job_config.compile.enable and "model" in job_config.compile.components,
    }
    for name, asked in refused.items():
        if asked:
            raise ConfigError(
                f"{name} asks torchtitan for what resnet_bk.experimental does not support; set a degree of 1 and shard "
                "data (parallelism.data_parallel_shard_degree), compile no more than the loss."
            )
    if mode not in ("none", "full"):
        raise ConfigError(f"activation_checkpoint.mode is {mode!r}; for this model expected none or full.")
    model.recompute = "none" if mode == "none" else "block"
    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        policy = MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
            cast_forward_inputs=False,
        )
        shard(
            model,
            parallel_dims.get_mesh(names),
            policy,
            reshard_after_forward=job.fsdp_reshard_after_forward != "never",
            cpu_offload=job_config.training.enable_cpu_offload,
        )
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # torchtitan divides the loss by the tokens of all ranks: what is left to do is a sum.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    return model


def train_spec(flavors: Mapping[str, ModelConfig]) -> TrainSpec:
    """What torchtitan needs to train models of these configurations; for `register_train_spec` under another name."""
    return TrainSpec(
        model_cls=TitanLanguageModel,
        model_args={name: TitanArgs(config=config) for name, config in flavors.items()},
        parallelize_fn=parallelize,
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_text_dataloader,
        build_tokenizer_fn=build_hf_tokenizer,
        build_loss_fn=build_cross_entropy_loss,
        build_validator_fn=build_validator,
        state_dict_adapter=TitanWeights,
    )


def read_weights(folder: str | os.PathLike[str], config: ModelConfig) -> LanguageModel:
    """The model whose weights torchtitan wrote into `folder` with `checkpoint.last_save_in_hf`.

    Raises:
        CheckpointError: a tensor that is missing or does not fit.
    """
    model = LanguageModel(config)
    read_tensors_into(model.state_dict(), Path(folder), None)
    return model.eval()


register_train_spec("resnet_bk", train_spec({name: ModelConfig.preset(name) for name in PRESETS}))
