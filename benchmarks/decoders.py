"""One more token for every row of a batch: this library's model, and its peers against their own states or cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from peer_models import prepare_heads
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.layers.mixer_state import MixerState
from resnet_bk.models import decode
from resnet_bk.models.prefill import evaluate, prefill
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.models.sampling import GenerationConfig

Step = Callable[[], None]


class Decoder:
    """Greedy decoding of `rows` sequences at a time; `step` reads and writes tensors that stay where they are."""

    def __init__(self, model: LanguageModel, rows: int) -> None:
        self.model = model
        # Peers differ from `LanguageModel` in their blocks.
        self.blocks = cast(list[Any], list(model.blocks))
        self.ids = torch.zeros(rows, dtype=torch.long, device=model.output_weight.device)

    def step(self) -> None:
        """Replace `ids` by the next token of every row."""
        raise NotImplementedError

    def choose(self, x: Tensor) -> None:
        """The likeliest token after the residual stream x [rows, d_model]."""
        self.ids.copy_(F.linear(self.model.norm(x), self.model.output_weight).argmax(-1))


class OwnDecoder(Decoder):
    """This library's model; all rows continue one prompt, so that a long one is read once."""

    def __init__(self, model: LanguageModel, rows: int, prompt: Tensor) -> None:
        super().__init__(model, rows)
        _, state = prefill(model, [prompt])
        self.state = state.select(torch.zeros_like(self.ids))
        self.in_place = decode.captures(model)
        if self.in_place:
            self.state = decode.owned(self.state)
        elif self.ids.is_cuda:
            raise RuntimeError("this model's step cannot be captured")

    def step(self) -> None:
        hidden, self.state = evaluate(self.model, self.ids[:, None], state=self.state)
        if self.in_place:
            first = self.state.layers[0]
            assert isinstance(first, MixerState)
            first.mix.position.add_(1)
        self.ids.copy_(F.linear(hidden[:, -1], self.model.output_weight).argmax(-1))


def generation(model: LanguageModel, rows: int, prompt: Tensor, times: int) -> Step:
    """A call that makes `times` steps of `generate`: choices checked, their log-probabilities read by the host."""
    hidden, state = prefill(model, [prompt])
    every = torch.zeros(rows, dtype=torch.long, device=hidden.device)
    decoder = decode.Decoder(model, hidden[every], state.select(every), GenerationConfig(temperature=0))
    decoder.choose()

    def run() -> None:
        before = decoder.step()
        for _ in range(times - 1):
            now = decoder.step()
            before.read()
            before = now
        before.read()

    return run


class MambaDecoder(Decoder):
    """Mamba-2 by its published step kernel, which changes the states in place.

    Args:
        model: of this kind, in the dtype of its weights.
        rows: sequences.
        dtype: of the states; the published cache has that of the weights.
    """

    def __init__(self, model: LanguageModel, rows: int, dtype: torch.dtype) -> None:
        super().__init__(model, rows)
        config = model.config
        shape = rows, config.num_heads, config.head_dim, config.state_size
        self.memories = [torch.randn(shape, dtype=dtype, device=self.ids.device) for _ in self.blocks]

    def step(self) -> None:
        x = self.model.embedding(self.ids)
        for block, memory in zip(self.blocks, self.memories, strict=True):
            layer = block.mixer
            x = x + layer.out_proj(layer.core.step(layer.in_proj(block.mixer_norm(x)), memory))
            x = x + block.feed_forward(block.feed_forward_norm(x))
        self.choose(x)


class TransformerDecoder(Decoder):
    """Attention against a full cache of `length` tokens, of which every step replaces the last."""

    def __init__(self, model: LanguageModel, rows: int, length: int) -> None:
        super().__init__(model, rows)
        weight, layer = model.output_weight, self.blocks[0].mixer
        shape = 2, rows, layer.heads, length, layer.channels
        self.length = length
        self.slot = torch.tensor([length - 1], device=weight.device)
        self.caches = [torch.randn(shape, dtype=weight.dtype, device=weight.device) for _ in self.blocks]

    @staticmethod
    def cache_bytes(model: LanguageModel, rows: int, length: int) -> int:
        """Bytes of keys and values."""
        return 2 * len(model.blocks) * rows * length * model.config.d_model * model.output_weight.itemsize

    def step(self) -> None:
        x = self.model.embedding(self.ids)
        for block, cache in zip(self.blocks, self.caches, strict=True):
            layer = block.mixer
            projected = layer.in_proj(block.mixer_norm(x))[:, None]
            cos, sin = (part[-1:] for part in layer.phases(self.length, projected))
            query, key, value = prepare_heads(projected, layer.heads, layer.norm_weight, cos, sin)[:, 0].unbind(1)
            for stored, new in zip(cache, (key, value), strict=True):
                stored.index_copy_(2, self.slot, new[:, :, None])
            y = F.scaled_dot_product_attention(query[:, :, None], cache[0], cache[1])
            x = x + layer.out_proj(y[:, :, 0].flatten(1))
            x = x + block.feed_forward(block.feed_forward_norm(x))
        self.choose(x)


def repeated(decoder: Decoder, times: int) -> Step:
    """A call that makes `times` steps; on a GPU one step is captured as a graph and replayed."""
    replay: Step = decoder.step
    if decoder.ids.is_cuda:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                decoder.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decoder.step()
        replay = graph.replay

    def run() -> None:
        for _ in range(times):
            replay()

    # A graph writes to the decoder's tensors, so the decoder lives as long as the call.
    run.decoder = decoder  # pyright: ignore[reportFunctionMemberAccess]
    return run
