"""`TrainingConfig`, `DistributedConfig` and `RunConfig`: everything a training run needs, in one typed object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from resnet_bk.data.config import DataConfig
from resnet_bk.errors import ConfigError
from resnet_bk.models.config import RECOMPUTE, AdapterConfig, ModelConfig
from resnet_bk.training.stability.config import StabilityConfig


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation, evaluation and bookkeeping of one run. Steps are optimizer steps."""

    output_dir: str = "runs/default"
    """Folder for checkpoints, `metrics.jsonl` and TensorBoard events."""
    steps: int = 1000
    """Optimizer steps in the whole run."""
    sequence_length: int = 1024
    """Tokens per training sequence."""
    batch_size: int = 8
    """Sequences per forward pass. Ranks share the batches of a step; more ranks do not make it larger."""
    curriculum: list[list[int]] = field(default_factory=list)
    """Stages before `sequence_length` and `batch_size` apply: [steps, sequence_length, batch_size] each, in order."""
    curriculum_from: int = 0
    """Sequence length from which stages double up to `sequence_length` over the first half of the run, with as many
    sequences as keep the tokens of a batch; 0 trains at one length."""
    carry: Literal["none", "truncated", "exact"] = "none"
    """State that a batch starts from where its rows continue those of the batch before: `none`, and rows are unrelated;
    `truncated`, without gradient; `exact`, with gradient through all batches of a step."""
    stream: Literal["window", "document"] = "window"
    """What a row reads from batch to batch before its state starts anew: a `window` of `stream_length` tokens, or a
    `document`, whose last segment stays empty behind its end. Needs `carry`."""
    stream_length: int = 0
    """Tokens of a window, a multiple of `sequence_length`; 0 is an equal share of the training text for every row."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step; tokens per step = sequence_length * batch_size * this."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW."""
    minimum_learning_rate_ratio: float = 0.1
    """Final over peak learning rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up from zero."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after warm-up; wsd = stable, then linear decay over the last `decay_fraction` of the run."""
    decay_fraction: float = 0.2
    """Share of the run that decays under the wsd schedule."""
    weight_decay: float = 0.1
    """Decoupled decay, applied to matrices only."""
    beta1: float = 0.9
    """AdamW first-moment decay."""
    beta2: float = 0.95
    """AdamW second-moment decay."""
    gradient_clip_norm: float = 1.0
    """Global L2 norm above which gradients are scaled down; 0 disables."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; parameters stay float32. auto = float32 on CPU, bfloat16 where the GPU has it, else float16."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    seed: int = 0
    """Seed of initialisation, data order and dropout."""
    log_every: int = 10
    """Steps between log rows."""
    evaluate_every: int = 200
    """Steps between evaluations on the validation split; 0 = only at the end."""
    evaluation_tokens: int = 65536
    """Tokens of the validation split read by each evaluation."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 = only at the end."""
    keep_checkpoints: int = 2
    """Most recent checkpoints kept on disk."""
    keep_best_checkpoints: int = 0
    """Checkpoints of lowest validation loss kept beside them; of those saved at a step that was evaluated."""
    asynchronous_checkpoints: bool = True
    """Write checkpoints beside training, from a copy of weights and optimizer in CPU memory."""
    time_budget_seconds: float = 0.0
    """Save and end the run before it has lasted this long; 0 = no limit. SIGTERM always does so."""
    resume: bool = False
    """Continue from the newest checkpoint in `output_dir`."""
    tensorboard: bool = True
    """Write TensorBoard events beside the JSONL metrics."""

    def __post_init__(self) -> None:
        """Check every field; raises `ConfigError` naming the first that is wrong."""
        for name in (
            "steps",
            "sequence_length",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "evaluation_tokens",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} is {getattr(self, name)!r}; expected a whole number >= 1.")
        for stage in self.curriculum:
            if len(stage) != 3 or stage[0] < 1 or stage[1] < 2 or stage[2] < 1:
                raise ConfigError(
                    f"training.curriculum holds {stage!r}; expected [steps, sequence_length, batch_size] with at least "
                    "1, 2 and 1."
                )
        if self.curriculum_from and not 2 <= self.curriculum_from <= self.sequence_length:
            raise ConfigError(
                f"training.curriculum_from is {self.curriculum_from}; expected 0, or a length from 2 to "
                f"training.sequence_length, {self.sequence_length}."
            )
        if self.curriculum and self.curriculum_from:
            raise ConfigError("training.curriculum and training.curriculum_from are both set; keep one of them.")
        self._check_carry()
        if self.sequence_length < 2:
            raise ConfigError("training.sequence_length is 1; expected at least 2, because labels are the next tokens.")
        for name in (
            "minimum_learning_rate_ratio",
            "warmup_steps",
            "weight_decay",
            "gradient_clip_norm",
            "evaluate_every",
            "checkpoint_every",
            "keep_best_checkpoints",
            "time_budget_seconds",
        ):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"training.{name} is {getattr(self, name)!r}; expected a number >= 0.")
        if not self.learning_rate > 0:
            raise ConfigError(f"training.learning_rate is {self.learning_rate!r}; expected a number > 0.")
        for name in ("beta1", "beta2", "decay_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"training.{name} is {getattr(self, name)!r}; expected a number in [0, 1).")
        if self.schedule not in ("cosine", "wsd", "constant"):
            raise ConfigError(f"training.schedule is {self.schedule!r}; expected cosine, wsd or constant.")
        if self.precision not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"training.precision is {self.precision!r}; expected auto, float32, bfloat16 or float16.")

    def _check_carry(self) -> None:
        if self.carry not in ("none", "truncated", "exact"):
            raise ConfigError(f"training.carry is {self.carry!r}; expected none, truncated or exact.")
        if self.stream not in ("window", "document"):
            raise ConfigError(f"training.stream is {self.stream!r}; expected window or document.")
        for name, default in (("stream", "window"), ("stream_length", 0)):
            if getattr(self, name) != default and self.carry == "none":
                raise ConfigError(
                    f"training.{name} is {getattr(self, name)!r}, but training.carry is 'none', with which rows are "
                    f"unrelated. Set carry truncated or exact, or {name} {default}."
                )
        if self.stream_length and self.stream == "document":
            raise ConfigError(
                f"training.stream_length is {self.stream_length}, but training.stream is 'document', which is as long "
                "as it is. Set stream_length 0, or stream window."
            )
        if self.stream_length < 0 or self.stream_length % self.sequence_length:
            raise ConfigError(
                f"training.stream_length is {self.stream_length}; expected 0 or a multiple of "
                f"training.sequence_length, {self.sequence_length}."
            )
        if self.carry == "exact" and self.gradient_accumulation_steps == 1:
            raise ConfigError(
                "training.carry is 'exact' with one batch a step, through which the gradient goes anyway; set "
                "training.gradient_accumulation_steps to the batches that it should go through, or carry truncated."
            )


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes that `torchrun` starts share one run. One process alone ignores all but `strategy: fsdp`."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every rank holds the whole model. fsdp: parameters, gradients and optimizer state are split over them."""
    reshard_after_forward: bool = True
    """fsdp: drop the gathered parameters of a block after its forward pass (ZeRO-3); false keeps them (ZeRO-2)."""
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    """fsdp: dtype in which parameters travel and are used; bfloat16 halves the traffic and rounds all of them."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """fsdp: dtype in which gradients are summed over the ranks."""
    cpu_offload: bool = False
    """fsdp: keep parameters, gradients and optimizer state in the processor's memory."""
    context_parallel: int = 1
    """Neighbouring ranks that share every sequence, each with a segment of it; must divide the number of ranks."""
    timeout_seconds: int = 1800
    """How long a rank waits for the others before the run fails."""

    def __post_init__(self) -> None:
        """Check every field; raises `ConfigError` naming the first that is wrong."""
        if self.strategy not in ("ddp", "fsdp"):
            raise ConfigError(f"distributed.strategy is {self.strategy!r}; expected ddp or fsdp.")
        for name in ("gather_dtype", "reduce_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ConfigError(f"distributed.{name} is {getattr(self, name)!r}; expected float32 or bfloat16.")
        for name in ("context_parallel", "timeout_seconds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"distributed.{name} is {getattr(self, name)}; expected a whole number >= 1.")
        for name, default in (
            ("reshard_after_forward", True),
            ("gather_dtype", "float32"),
            ("reduce_dtype", "float32"),
            ("cpu_offload", False),
        ):
            if self.strategy == "ddp" and getattr(self, name) != default:
                raise ConfigError(
                    f"distributed.{name} is {getattr(self, name)!r}, which only distributed.strategy fsdp knows."
                )


@dataclass(frozen=True)
class MemoryConfig:
    """What is kept, what is computed again and what lies elsewhere. `resnet-bk plan` predicts what a choice costs."""

    recompute: Literal["auto", "none", "block", "segment"] = "auto"
    """Activations that the backward pass computes again: `none`; those inside each block, one segment of tokens at a
    time (`block`: one residual stream a layer is kept); those of whole segments through all blocks (`segment`: only
    states are kept); `auto` is `none` up to `segment_tokens` tokens a forward pass and `block` beyond."""
    segment_tokens: int = 8192
    """Tokens (batch times time) worked on at once where activations are recomputed; at least 64 of each sequence."""
    offload_activations: bool = False
    """Keep the inputs of recomputed blocks in host memory; needs recompute `block`."""
    optimizer: Literal["fused", "8bit", "offload"] = "fused"
    """AdamW with float32 moments (8 bytes a parameter), 8-bit moments (about 2 bytes; extra `memory`), or float32
    moments in host memory, where the update then runs."""

    def __post_init__(self) -> None:
        """Check every field; raises `ConfigError` naming the first that is wrong."""
        for name, options in (("recompute", RECOMPUTE), ("optimizer", ("fused", "8bit", "offload"))):
            if getattr(self, name) not in options:
                raise ConfigError(f"memory.{name} is {getattr(self, name)!r}; expected one of {', '.join(options)}.")
        if self.segment_tokens < 64:
            raise ConfigError(f"memory.segment_tokens is {self.segment_tokens!r}; expected a whole number >= 64.")
        if self.offload_activations and self.recompute != "block":
            raise ConfigError(
                f"memory.offload_activations needs memory.recompute block; it is {self.recompute!r}, with which there "
                "may be no few large tensors to move."
            )


@dataclass(frozen=True)
class RunConfig:
    """One training run: what is trained, on what, and how."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        """Check what no section can check alone; raises `ConfigError`."""
        if self.adapters.base and self.distributed.strategy == "fsdp":
            raise ConfigError(
                "distributed.strategy fsdp cannot split packed matrices; set ddp, or leave adapters.base out."
            )
