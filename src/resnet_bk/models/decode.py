"""One token a step for all sequences under way: an ordinary forward pass, or on a GPU one CUDA graph, replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.layers.mixer import Mixer
from resnet_bk.layers.mixer_state import InPlaceState, MixerState
from resnet_bk.models.prefill import evaluate
from resnet_bk.models.sampling import GenerationConfig, draw, keep_top_k, keep_top_p, penalize_repetition
from resnet_bk.ops.dispatch import choose_backend
from resnet_bk.ops.resolvent import GreenState
from resnet_bk.ops.semiseparable import MixState

if TYPE_CHECKING:
    from resnet_bk.models.resnet_bk import Block, LanguageModel, ModelState


class Decoder:
    """Sequences under way: their state, their last tokens, and how the next ones are chosen.

    Where `captures(model)` is true the step updates the state in place. The first step runs as it is, which compiles
    and checks kernels; the second is captured in a CUDA graph, embedding to choice, and from then on replayed. The
    host may then launch a step before it has read the one before. Elsewhere a step is a forward pass that returns a
    new state.

    Args:
        model: any mode; dropout is off.
        hidden: hidden state of the last token of every sequence.
        state: the state after it. The decoder owns it from now on and may overwrite it.
        config: how tokens are chosen.
        seen: tokens that occur in each sequence, for the repetition penalty, or None; updated by every choice.
    """

    def __init__(
        self,
        model: LanguageModel,
        hidden: Float[Tensor, "rows d_model"],
        state: ModelState,
        config: GenerationConfig,
        seen: Bool[Tensor, "rows vocabulary"] | None = None,
    ) -> None:
        self._model, self._config, self._seen = model, config, seen
        self.in_place = captures(model)
        self.state = owned(state) if self.in_place else state
        self._tokens = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        self._uniform = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
        self._hidden = hidden
        self._chosen: Tensor | None = None
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def choose(self, uniform: Float[Tensor, " rows"] | None = None) -> Choice:
        """The first token of every continuation.

        Args:
            uniform: numbers in [0, 1), float64 on the CPU, that draw the tokens; None where the choice is greedy.
        """
        self._draw_with(uniform)
        return Choice(self._choose(self._hidden))

    def step(self, uniform: Float[Tensor, " rows"] | None = None) -> Choice:
        """The token after the last one of every sequence; argument as for `choose`."""
        self._draw_with(uniform)
        values = self._replay() if self.in_place and self._warm else self._advance()
        self._warm = True
        return Choice(values)

    def keep(self, rows: list[int]) -> bool:
        """Whether the sequences at places `rows` are now the only ones; False if the others stay too.

        A graph is bound to its number of sequences, so it is worth a new one only when half of them have ended.
        """
        if len(rows) == len(self._tokens) or (self.in_place and 2 * len(rows) > len(self._tokens)):
            return False
        self._graph, self._chosen, self._warm = None, None, False
        index = torch.tensor(rows, device=self._tokens.device)
        self.state = self.state.select(index)
        if self.in_place:
            self.state = owned(self.state)
        self._tokens, self._uniform = self._tokens[index], self._uniform[index]
        if self._seen is not None:
            self._seen = self._seen[index]
        return True

    def _draw_with(self, uniform: Tensor | None) -> None:
        if uniform is not None:
            pinned = uniform.pin_memory() if self._uniform.is_cuda else uniform
            self._uniform.copy_(pinned, non_blocking=True)

    def _advance(self) -> Tensor:
        """The choice after one more token; everything that a graph replays."""
        hidden, self.state = evaluate(self._model, self._tokens[:, None], state=self.state)
        if self.in_place:
            cast(MixerState, self.state.layers[0]).mix.position.add_(1)
        return self._choose(hidden[:, -1])

    def _replay(self) -> Tensor:
        """What `_advance` returns, by a graph."""
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self._tokens.device):
                # Other threads, such as a server's, may use the device meanwhile.
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    self._chosen = self._advance()
        self._graph.replay()
        return cast(Tensor, self._chosen)

    @torch.no_grad()
    def _choose(self, hidden: Tensor) -> Tensor:
        """Chosen tokens and their log-probabilities, [2, rows] float64 on the device; see `choose_tokens`."""
        logits = F.linear(hidden, self._model.output_weight)
        tokens, log_probabilities = choose_tokens(logits, self._config, self._uniform, self._seen)
        self._tokens.copy_(tokens)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return torch.stack((tokens.double(), log_probabilities.double()))


class Choice:
    """Tokens and log-probabilities on their way to the host."""

    def __init__(self, values: Float[Tensor, "2 rows"]) -> None:
        # From a GPU into pinned memory, behind the step that computes them and before the next.
        self._values = values.to("cpu", non_blocking=True)
        self._arrived = None
        if values.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> tuple[list[int], list[float]]:
        """Token and log-probability of every row (NaN if its logits were not finite), once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens, log_probabilities = self._values.tolist()
        return [int(token) for token in tokens], log_probabilities


def choose_tokens(
    logits: Float[Tensor, "rows vocabulary"],
    config: GenerationConfig,
    uniform: Float[Tensor, " rows"],
    seen: Bool[Tensor, "rows vocabulary"] | None,
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """The next token of every row and its log-probability under the unfiltered model, without a word to the host.

    Rows whose logits are not all finite get token 0 and log-probability NaN.
    """
    logits = logits.float()
    low, high = logits.aminmax(dim=1)
    finite = low.isfinite() & high.isfinite()
    scores = logits
    if seen is not None:
        scores = penalize_repetition(scores, seen, config.repetition_penalty)
    if config.temperature == 0:
        tokens = scores.argmax(dim=1)
    else:
        # Differences to the largest logit keep a tiny temperature from overflowing.
        scores = (scores - scores.amax(dim=1, keepdim=True)) / config.temperature
        scores = keep_top_p(keep_top_k(scores, config.top_k), config.top_p)
        tokens = draw(scores, uniform)
    tokens = torch.where(finite, tokens, 0)
    picked = logits.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    return tokens, torch.where(finite, picked, torch.nan)


def captures(model: LanguageModel) -> bool:
    """Whether decoding runs in place and in a CUDA graph.

    It does on CUDA devices where the Triton kernels run, except for: models with another mixer than `Mixer` in a block,
    mixers with options that the fused step does not know (`Mixer.fused_step`), float64, models with forward hooks (a
    replay would not call them), and calls under autocast (whose cached casts would be freed under the graph).
    """
    weight = model.output_weight
    if not weight.is_cuda or choose_backend("auto", weight) != "triton" or torch.is_autocast_enabled("cuda"):
        return False
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    mixers = [cast("Block", block).mixer for block in model.blocks]
    return not hooked and all(isinstance(mixer, Mixer) and mixer.fused_step for mixer in mixers)


def owned(state: ModelState) -> ModelState:
    """`state` as layers overwrite it: contiguous float32 tensors, and one position for all layers."""
    mixers = cast(tuple[MixerState, ...], state.layers)
    position = mixers[0].mix.position
    layers = []
    for mixer in mixers:
        green = GreenState(*(part.float().contiguous() for part in cast(GreenState, mixer.green)))
        key = None if mixer.key is None else mixer.key.float().contiguous()
        layers.append(InPlaceState(MixState(mixer.mix.memory.float().contiguous(), position), green, key=key))
    return state._replace(layers=tuple(layers))
