"""`LanguageModel`: embedding, blocks of mixer and feed-forward, final norm, output head."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from resnet_bk.errors import ConfigError, DomainError, ShapeError
from resnet_bk.layers.attention import Attention, AttentionState
from resnet_bk.layers.dropout import locked_dropout, word_dropout
from resnet_bk.layers.feed_forward import FeedForward
from resnet_bk.layers.lora import AdaptedLinear
from resnet_bk.layers.mamba2 import Mamba2, Mamba2State
from resnet_bk.layers.mamba3 import Mamba3
from resnet_bk.layers.mixer import Mixer
from resnet_bk.layers.mixer_state import MixerState
from resnet_bk.models import adapters as adapted
from resnet_bk.models import checkpoint as checkpoints
from resnet_bk.models import generate as generation
from resnet_bk.models.config import ModelConfig, Recompute
from resnet_bk.ops.context import Segment, SequenceGroup
from resnet_bk.ops.dispatch import compute_dtype
from resnet_bk.ops.linear_cross_entropy import linear_cross_entropy
from resnet_bk.ops.state_space import TrapezoidState

if TYPE_CHECKING:
    from resnet_bk.models.prompts import AnyPrompts
    from resnet_bk.tokenizer import Tokenizer


TokenMixer = Mixer | Attention | Mamba2 | Mamba3
LayerState = MixerState | AttentionState | Mamba2State | TrapezoidState
MIXERS: dict[str, type[TokenMixer]] = {
    "resolvent": Mixer,
    "attention": Attention,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
}
"""What can mix tokens in a block, by `ModelConfig.mixers`.

Each is built from the configuration, has `out_proj`, `state_class` and `reset_parameters`, and maps tokens, state and
boundaries to mixed tokens and the state after them, whose tensors have one row a sequence.
"""


class ModelState(NamedTuple):
    """Decode state of a whole model: one state a layer, one row a sequence.

    Its size is constant, but for layers of attention without a window, which keep every token.
    """

    layers: tuple[LayerState, ...]

    def map(self, function) -> ModelState:
        """The state with `function` applied to every tensor."""
        return _map_tensors(self, function)

    def select(self, rows: Tensor) -> ModelState:
        """The state of some sequences only, in the order of the index tensor `rows`."""
        return self.map(lambda tensor: tensor[rows])

    def detach(self) -> ModelState:
        """The state without its history, for truncated backpropagation."""
        return self.map(Tensor.detach)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, layer by layer."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def _map_tensors(value: Any, function) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = [_map_tensors(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


@dataclass
class LanguageModelOutput:
    """Result of one forward pass."""

    logits: Float[Tensor, "batch time vocabulary"] | None
    loss: Float[Tensor, ""] | None
    """Mean negative log-likelihood in nats per predicted token."""
    state: ModelState


class Block(nn.Module):
    """Pre-norm residual block: mixer, then feed-forward."""

    def __init__(self, config: ModelConfig, mixer: str = "resolvent") -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.mixer = MIXERS[mixer](config)
        self.feed_forward_norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.feed_forward = FeedForward(config.d_model, config.feed_forward_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: LayerState | None,
        cu_seqlens: Tensor | None,
        segment: Segment | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], LayerState]:
        """The residual stream after the block, and the mixer's state."""
        shared = () if segment is None else (segment,)
        mixed, after = self.mixer(self.mixer_norm(x), state, cu_seqlens, *shared)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), after


class LanguageModel(nn.Module):
    """Causal language model whose token mixing is the half-line resolvent of a Jacobi matrix.

    `config.mixer` puts a baseline in the mixer's place, and `config.attention_every` makes a hybrid; everything else
    stays the same.

    Args:
        config: architecture; see `ModelConfig` and `ModelConfig.preset`.

    Attributes:
        tokenizer: the `Tokenizer` saved and loaded with the model, or None.
        generation_config: defaults of `generate`, saved and loaded with the model, or None.
        segment_tokens: tokens (batch times time) worked on at once. Longer inputs run in segments with the state
            carried. Results do not depend on it beyond rounding.
        recompute: what the backward pass computes again. "none": nothing, and training does not cut time. "block":
            every block, one segment at a time, so memory grows by one residual stream a layer. "segment": whole
            segments through all blocks, so it grows by the states at their ends and one residual stream in all; as
            "block" for inputs that are not cut (packed documents, attention without a window). "auto": "none" up to
            `segment_tokens` tokens, "block" beyond.
        offload: keep in host memory what recomputation starts from.
        adapters: what is trained beside the frozen model (see `models.adapters`), or None. The state dict is then that
            of the adapters alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.generation_config: generation.GenerationConfig | None = None
        self.adapters: adapted.Adapters | None = None
        self.register_state_dict_post_hook(_leave_out_what_is_frozen)
        self.segment_tokens = 8192
        self.recompute: Recompute = "auto"
        self.offload = False
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, mixer) for mixer in config.mixers)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew from the global random generator.

        Matrices are normal with standard deviation (3 fan_in)^(-1/2); those that write to the residual stream are
        divided by sqrt(2 num_layers). The embedding has standard deviation 0.02. Norms start at 1, per-head
        parameters as the mixer's `reset_parameters` says.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=(3 * module.in_features) ** -0.5)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, TokenMixer):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, TokenMixer | FeedForward):
                module.out_proj.weight.div_(math.sqrt(2 * self.config.num_layers))
        nn.init.normal_(self.embedding.weight, std=0.02)

    @property
    def output_weight(self) -> Tensor:
        """Matrix of the output head [vocab_size, d_model]; the embedding itself when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        labels: Int[Tensor, "batch time"] | None = None,
        state: ModelState | None = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
        *,
        return_logits: bool | None = None,
        group: SequenceGroup | None = None,
    ) -> LanguageModelOutput:
        """Logits, or the loss against `labels`, and the state that continues the sequences.

        Args:
            input_ids: token ids in [0, vocab_size).
            labels: unshifted targets, usually `input_ids` itself; position t is trained to predict labels[t + 1].
                -100 is ignored. The logits of a long sequence are then never materialised. With one token more than
                `input_ids` the last is what the last position predicts.
            state: returned by an earlier call whose tokens these continue.
            cu_seqlens: boundaries 0 = b_0 < ... < b_documents = time of documents packed along time (batch 1). No
                document sees another, and a document's first token is nobody's target.
            return_logits: None computes logits exactly when there are no labels.
            group: ranks that share the sequences: `input_ids` are this one's segments of them, `state` is the one
                before the whole sequences, and the results are those of this segment (see
                `training.context_parallel`). The loss is then the mean over this rank's targets, 0 without any.

        Raises:
            ShapeError: `input_ids` is not [batch, time], `labels` has another shape, `state` does not fit.
            DomainError: a token id outside the vocabulary (names the first), or labels without a single target.
            ConfigError: `group` with a mixer that cannot share a sequence, or with packed documents.
        """
        if labels is not None and (
            labels.shape[0] != input_ids.shape[0] or labels.shape[1] - input_ids.shape[1] not in (0, 1)
        ):
            raise ShapeError(
                f"labels have shape {list(labels.shape)}; expected that of input_ids, {list(input_ids.shape)}, or one "
                "token more."
            )
        # Models that override `hidden_states` need not know of groups.
        shared = {} if group is None else {"group": group}
        hidden, state = self.hidden_states(input_ids, state=state, cu_seqlens=cu_seqlens, **shared)
        loss = None
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, input_ids.shape[1] + 1 - labels.shape[1]), value=-100)
            if cu_seqlens is not None:
                targets[:, cu_seqlens[1:].long() - 1] = -100
            if group is not None and not (targets != -100).any():
                # A rank without a target takes part in the exchange of gradients all the same.
                loss = 0 * hidden.sum(dtype=compute_dtype(hidden))
            else:
                loss = linear_cross_entropy(hidden.flatten(0, 1), self.output_weight, targets.flatten())
        if return_logits is None:
            return_logits = labels is None
        logits = F.linear(hidden, self.output_weight) if return_logits else None
        return LanguageModelOutput(logits, loss, state)

    def hidden_states(
        self,
        input_ids: Int[Tensor, "batch time"],
        *,
        state: ModelState | None = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
        group: SequenceGroup | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], ModelState]:
        """Residual stream after the final norm, and the state that continues the sequences.

        Arguments and errors are those of `forward`. Multiply by `output_weight` for logits.
        """
        self._check_ids(input_ids)
        if state is not None:
            rows = input_ids.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
            held = len(state.layers), state.tensors[0].shape[0]
            if held != (len(self.blocks), rows):
                raise ShapeError(
                    f"state holds {held[0]} layers of {held[1]} sequences; expected {len(self.blocks)} of {rows}. "
                    "Pass the state that this model returned for the same sequences."
                )
            for place, (block, held) in enumerate(zip(self.blocks, state.layers, strict=True), start=1):
                expected = cast(Block, block).mixer.state_class
                if not isinstance(held, expected):
                    raise ShapeError(
                        f"state of layer {place} is a {type(held).__name__}; expected {expected.__name__}. Pass the "
                        "state that this model returned."
                    )
        # Packed documents may end anywhere, so they are not cut in time; only their activations are recomputed. Nor is
        # time cut in training where attention sees everything: each segment would keep all keys before it.
        segment = self._segment(input_ids, group, cu_seqlens)
        # The longest segment decides for all ranks, because recomputing exchanges the summaries again.
        most = input_ids.shape[1] if segment is None else max(segment.lengths)
        training = torch.is_grad_enabled()
        long = input_ids.shape[0] * most > self.segment_tokens
        policy = self.recompute
        if policy == "auto":
            policy = "block" if long else "none"
        step = input_ids.shape[1]
        whole = "attention" in self.config.mixers and not self.config.attention_window and training
        whole = whole or segment is not None
        if long and cu_seqlens is None and not whole and not (training and policy == "none"):
            step = max(64, self.config.attention_window, self.segment_tokens // input_ids.shape[0] // 64 * 64)
        elif policy == "segment":
            policy = "block"
        run, run_block = self._through, self._block
        if training and policy == "segment":
            run = self._recomputed(run)
        elif training and policy == "block":
            run_block = self._recomputed(run_block)
        states = (None,) * len(self.blocks) if state is None else state.layers
        parts = []
        with save_on_cpu(pin_memory=input_ids.is_cuda) if training and self.offload else nullcontext():
            for ids in input_ids.split(step, dim=1):
                x, states = run(ids, states, cu_seqlens, segment, run_block)
                parts.append(x)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), ModelState(cast(Any, states))

    def restarted(self, state: ModelState, continues: Bool[Tensor, " rows"]) -> ModelState:
        """`state` where rows continue; what the others have before their first token elsewhere.

        Not for a model whose parameters are sharded: what the resolvent starts from is made of some of them.
        """

        def kept(x: Tensor) -> Tensor:
            return torch.where(continues.view(-1, *(1,) * (x.dim() - 1)), x, x.new_zeros(()))

        layers = []
        for block, held in zip(self.blocks, state.layers, strict=True):
            held = _map_tensors(held, kept)
            mixer = cast(Block, block).mixer
            layers.append(mixer.with_lead(held, continues) if isinstance(mixer, Mixer) else held)
        return ModelState(tuple(layers))

    def _through(
        self,
        ids: Tensor,
        states: Sequence[LayerState | None],
        cu_seqlens: Tensor | None,
        segment: Segment | None,
        run_block: Callable,
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """The normed residual stream after these tokens, and the states that continue them."""
        config = self.config
        x = self.embedding(ids)
        if self.training:
            x = word_dropout(x, ids, config.vocab_size, config.word_dropout)
            x = locked_dropout(x, config.input_dropout)
        following = []
        for block, before in zip(self.blocks, states, strict=True):
            x, after = run_block(block, x, before, cu_seqlens, segment)
            following.append(after)
        x = self.norm(x)
        return locked_dropout(x, config.output_dropout) if self.training else x, tuple(following)

    @staticmethod
    def _block(
        block: nn.Module, x: Tensor, before: LayerState | None, cu_seqlens: Tensor | None, segment: Segment | None
    ) -> Any:
        return block(x, before, cu_seqlens, segment)

    def _recomputed(self, function: Callable) -> Callable:
        """`function`, keeping its arguments alone; the backward pass calls it again."""
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": self.config.draws}
        return partial(checkpoint, function, **options)

    def _segment(self, input_ids: Tensor, group: SequenceGroup | None, cu_seqlens: Tensor | None) -> Segment | None:
        """Where `input_ids` lie in sequences that ranks share; None if they are whole."""
        if group is None:
            return None
        others = sorted(set(self.config.mixers) - {"resolvent"})
        if others:
            raise ConfigError(
                f"model.mixer is {', '.join(others)} in some block, which cannot share a sequence between ranks; set "
                "mixer 'resolvent' and attention_every 0, or distributed.context_parallel 1."
            )
        if cu_seqlens is not None:
            raise ConfigError(
                "cu_seqlens packs documents along time, which ranks cannot share yet; give whole sequences, or set "
                "distributed.context_parallel 1."
            )
        return Segment.of(group, input_ids)

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ShapeError(
                "input_ids must be non-empty int64 or int32 [batch, time]; got "
                f"{input_ids.dtype} {list(input_ids.shape)}."
            )
        # The values are not looked at where that would break a graph.
        if torch.compiler.is_compiling() or (input_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        low, high = (int(bound) for bound in torch.aminmax(input_ids))
        if low < 0 or high >= self.config.vocab_size:
            row, place = ((input_ids < 0) | (input_ids >= self.config.vocab_size)).nonzero()[0].tolist()
            raise DomainError(
                f"input_ids holds {int(input_ids[row, place])} at row {row}, position {place}; expected ids in "
                f"[0, {self.config.vocab_size}). The tokenizer and the model have different vocabularies."
            )

    def generate(self, prompts: AnyPrompts, **options: Any) -> Any:
        """Prompts with their continuations, in the form in which they were given; see `generate.generate`."""
        return generation.generate(self, prompts, **options)

    def stream(self, prompts: AnyPrompts, **options: Any) -> Iterator[generation.GeneratedToken]:
        """Tokens of the continuations as they are generated; see `generate.stream`."""
        return generation.stream(self, prompts, **options)

    def save_pretrained(self, folder: str | os.PathLike[str], *, max_shard_size: int = 5 * 10**9) -> Path:
        """The folder just written: config.json, model.safetensors, generation_config.json and the tokenizer.

        Arguments and errors are those of `checkpoint.save_pretrained`.
        """
        return checkpoints.save_pretrained(self, folder, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        base: str | os.PathLike[str] | None = None,
    ) -> LanguageModel:
        """The model stored in a folder or hub repository, in evaluation mode.

        A folder of adapters gives the base model with them; `base` says where that is, if it is no longer where it was.
        Arguments and errors are those of `checkpoint.load_pretrained` and `adapters.load_adapters`.
        """
        source = checkpoints.locate(source)
        if adapted.holds_adapters(source):
            return adapted.load_adapters(cls, source, base=base, device=device, dtype=dtype)
        if base is not None:
            raise ConfigError(f"{source} holds a whole model, which needs no base; leave {base} out.")
        return checkpoints.load_pretrained(cls, source, device=device, dtype=dtype)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """AdamW groups: matrices with `weight_decay`; per-head parameters, biases and norms without.

        Parameters that are frozen are in neither.
        """
        matrices = {id(module.weight) for module in self.modules() if isinstance(module, nn.Linear | nn.Embedding)}
        for module in self.modules():
            if isinstance(module, AdaptedLinear):
                matrices |= {id(module.adapter_in), id(module.adapter_out)}
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            {"params": [p for p in parameters if id(p) in matrices], "weight_decay": weight_decay},
            {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
        ]

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Number of parameters; without the token embedding and an untied head if `embeddings` is False.

        Packed matrices count with all their numbers, beside their adapters.
        """
        total = sum(parameter.numel() for parameter in self.parameters())
        total += sum(2 * module.codes.numel() for module in self.modules() if isinstance(module, AdaptedLinear))
        if embeddings:
            return total
        return total - self.embedding.weight.numel() - (0 if self.head is None else self.head.weight.numel())


def _leave_out_what_is_frozen(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Of a model with adapters, keep only these in its state dict."""
    if cast(LanguageModel, model).adapters is None:
        return
    kept = {prefix + name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in [name for name in state if name.startswith(prefix) and name not in kept]:
        del state[name]
