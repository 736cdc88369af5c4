"""Text from a language model: prompts in one batch whatever their lengths, then one token a step for all of them.

Prompts run in segments with the state carried, so memory does not grow with their length. On a GPU the step is a CUDA
graph, and it runs while the host reads the step before; see `decode`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar, Unpack, cast

import torch
from jaxtyping import Int
from torch import Tensor

from resnet_bk.errors import DataError, DomainError
from resnet_bk.models.decode import Choice, Decoder
from resnet_bk.models.prefill import check_memory, prefill
from resnet_bk.models.prompts import AnyPrompts, Prompts, read_prompts
from resnet_bk.models.sampling import GenerationConfig, GenerationOptions, row_seeds
from resnet_bk.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from resnet_bk.models.resnet_bk import LanguageModel
    from resnet_bk.tokenizer import Tokenizer

__all__ = ["GeneratedToken", "GenerationConfig", "GenerationOutput", "complete", "generate", "stream"]

FinishReason = Literal["stop_token", "stop_string", "length"]
Given = TypeVar("Given", bound=AnyPrompts)


class GeneratedToken(NamedTuple):
    """One token of one sequence, as it is generated."""

    row: int
    """Which prompt it continues."""
    token: int
    text: str
    """Text that this token completes; empty inside a character or a possible stop string, or without a tokenizer."""
    log_probability: float
    """Natural log of the token's probability under the model, before penalty, temperature and filters."""
    finish_reason: FinishReason | None
    """Why the sequence ends here; None if it goes on."""


@dataclass
class GenerationOutput:
    """Finished sequences, in the order of the prompts."""

    sequences: list[list[int]]
    """Prompt and continuation, a stop token included."""
    prompt_lengths: list[int]
    text: list[str] | None
    """Prompt and continuation, without stop token or stop string; None if the model has no tokenizer."""
    log_probabilities: list[list[float]]
    """One for each generated token; see `GeneratedToken`."""
    finish_reasons: list[FinishReason]


def generate(
    model: LanguageModel,
    prompts: Given,
    *,
    attention_mask: Int[Tensor, "batch time"] | None = None,
    config: GenerationConfig | None = None,
    **options: Unpack[GenerationOptions],
) -> Given:
    """Prompts with their continuations, in the form in which the prompts were given.

    A string gives a string, a list of token ids a list of token ids, a tensor [time] a tensor [longer], and a list of
    any of these a list of the same. A tensor [batch, time] gives a tensor [batch, longer]: its first `time` columns are
    the prompts as they were, then come the continuations, filled up with the first stop token, or 0 if there is none.

    Args:
        model: its `tokenizer` is needed for strings.
        prompts: token ids in [0, vocab_size) or text; lengths may differ. Every prompt gets the logits it gets alone.
        attention_mask: for a tensor [batch, time]: 1 at tokens, 0 at padding before or after them.
        config: default `model.generation_config`, or `GenerationConfig()`.
        **options: fields of `GenerationConfig` that override `config`.

    Returns:
        As above; `complete` also tells log-probabilities and why sequences ended, `stream` tells tokens one by one.

    Raises:
        DomainError: an empty prompt, a token id outside the vocabulary, a prompt that leaves no room under
            `max_length`, an option outside its domain, or logits that are not finite.
        ConfigError: an unknown option.
        ShapeError: a tensor of another shape or type.
        DataError: text for a model without tokenizer.
        MemoryLimitError: the batch does not fit in memory.
    """
    request, config = _prepare(model, prompts, attention_mask, config, options)
    output = _collect(model, request, config)
    filler = (*(config.stop_tokens or ()), 0)[0]
    return cast(Given, request.restore(output.sequences, output.text, filler))


def complete(
    model: LanguageModel,
    prompts: AnyPrompts,
    *,
    attention_mask: Int[Tensor, "batch time"] | None = None,
    config: GenerationConfig | None = None,
    **options: Unpack[GenerationOptions],
) -> GenerationOutput:
    """Everything known of the continuations; arguments and errors as for `generate`."""
    return _collect(model, *_prepare(model, prompts, attention_mask, config, options))


def stream(
    model: LanguageModel,
    prompts: AnyPrompts,
    *,
    attention_mask: Int[Tensor, "batch time"] | None = None,
    config: GenerationConfig | None = None,
    **options: Unpack[GenerationOptions],
) -> Iterator[GeneratedToken]:
    """Tokens as they are generated; arguments and errors as for `generate`, checked before this returns."""
    return _run(model, *_prepare(model, prompts, attention_mask, config, options))


def _prepare(
    model: LanguageModel,
    prompts: AnyPrompts,
    attention_mask: Tensor | None,
    config: GenerationConfig | None,
    options: GenerationOptions,
) -> tuple[Prompts, GenerationConfig]:
    """Prompts and options after every check, with `stop_tokens` and `seed` settled."""
    default: GenerationConfig = config or model.generation_config or GenerationConfig()
    settings = default.replace(options)
    vocabulary = model.config.vocab_size
    read = read_prompts(prompts, attention_mask, vocabulary, model.tokenizer)
    for row, ids in enumerate(read.ids):
        if settings.max_length is not None and len(ids) >= settings.max_length:
            raise DomainError(
                f"Prompt {row} has {len(ids)} tokens and max_length is {settings.max_length}, which leaves no "
                "room; raise max_length, or set max_new_tokens instead."
            )
    if settings.stop_strings and model.tokenizer is None:
        raise DataError("generation.stop_strings needs text, but the model has no tokenizer; use stop_tokens.")
    if settings.stop_tokens is None:
        end = None if model.tokenizer is None else model.tokenizer.end_of_text_id
        settings = replace(settings, stop_tokens=() if end is None else (end,))
    for token in settings.stop_tokens or ():
        if token >= vocabulary:
            raise DomainError(f"generation.stop_tokens holds {token}; expected ids in [0, {vocabulary}).")
    if settings.seed is None:
        settings = replace(settings, seed=int(torch.randint(2**62, ())))
    check_memory(model, read.ids)
    return read, settings


def _collect(model: LanguageModel, prompts: Prompts, config: GenerationConfig) -> GenerationOutput:
    """The whole stream, sequence by sequence."""
    sequences = [ids.tolist() for ids in prompts.ids]
    lengths = [len(sequence) for sequence in sequences]
    text = prompts.text
    if text is None and model.tokenizer is not None:
        text = [model.tokenizer.decode(sequence) for sequence in sequences]
    text = None if text is None else list(text)
    log_probabilities: list[list[float]] = [[] for _ in sequences]
    reasons: dict[int, FinishReason] = {}
    for step in _run(model, prompts, config):
        sequences[step.row].append(step.token)
        log_probabilities[step.row].append(step.log_probability)
        if text is not None:
            text[step.row] += step.text
        if step.finish_reason is not None:
            reasons[step.row] = step.finish_reason
    return GenerationOutput(
        sequences, lengths, text, log_probabilities, [reasons[row] for row in range(len(sequences))]
    )


def _run(model: LanguageModel, prompts: Prompts, config: GenerationConfig) -> Iterator[GeneratedToken]:
    """Prefill, then one step for all unfinished sequences at a time."""
    device = model.output_weight.device
    rows = [
        _Row(index, ids, seed, model.tokenizer, config)
        for index, (ids, seed) in enumerate(zip(prompts.ids, row_seeds(config.seed or 0, prompts.ids), strict=True))
    ]
    hidden, state = prefill(model, prompts.ids)
    seen = None
    if config.repetition_penalty != 1:
        seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=device)
        for row, ids in zip(seen, prompts.ids, strict=True):
            row[ids.to(device)] = True
    decoder = Decoder(model, hidden, state, config, seen)
    slots, choice = rows, decoder.choose(_draws(rows, config))
    while True:
        # In place, the next step can start before this one's tokens are known here.
        ahead: tuple[list[_Row], Choice] | None = None
        if decoder.in_place and any(row.remaining > 1 for row in slots if not row.finished):
            ahead = rows, decoder.step(_draws(rows, config))
        for row, token, value in zip(slots, *choice.read(), strict=True):
            if row.finished:
                continue
            if math.isnan(value):
                raise DomainError(
                    f"The model's logits for prompt {row.index} are not finite; its weights are damaged or its "
                    "training diverged. Load an earlier checkpoint, or a wider dtype."
                )
            text, reason = row.accept(token)
            yield GeneratedToken(row.index, token, text, value, reason)
        unfinished = [place for place, row in enumerate(rows) if not row.finished]
        if not unfinished:
            return
        if decoder.keep(unfinished):
            rows = [rows[place] for place in unfinished]
        slots, choice = ahead or (rows, decoder.step(_draws(rows, config)))


def _draws(rows: list[_Row], config: GenerationConfig) -> Tensor | None:
    """The number in [0, 1) that draws the next token of each row; None where nothing is drawn."""
    if config.temperature == 0:
        return None
    return torch.stack([torch.rand((), dtype=torch.float64, generator=row.generator) for row in rows])


class _Row:
    """One sequence under way: its random numbers, its text and when it ends."""

    def __init__(
        self, index: int, prompt: Tensor, seed: int, tokenizer: Tokenizer | None, config: GenerationConfig
    ) -> None:
        self.index = index
        self.generator = torch.Generator().manual_seed(seed)
        self._config = config
        limits = (config.max_new_tokens, config.max_length and config.max_length - len(prompt))
        self.remaining = min(limit for limit in limits if limit is not None)
        self.finished = False
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        if self._decoder is not None:
            # Decoders treat the first token of a text differently, so the stream begins inside the prompt.
            for token in prompt[-4:].tolist():
                self._decoder.push(token)
        self._held = ""

    def accept(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that `token` completes, and why the sequence ends with it, if it does."""
        text, reason = self._extend(token)
        self.finished = reason is not None
        return text, reason

    def _extend(self, token: int) -> tuple[str, FinishReason | None]:
        self.remaining -= 1
        if token in (self._config.stop_tokens or ()):
            return self._flush(), "stop_token"
        if self._decoder is not None:
            self._held += self._decoder.push(token)
            starts = [place for stop in self._config.stop_strings if (place := self._held.find(stop)) >= 0]
            if starts:
                return self._held[: min(starts)], "stop_string"
        if self.remaining == 0:
            return self._flush(), "length"
        # What may be the beginning of a stop string waits until the next tokens decide.
        waiting = max((_overlap(self._held, stop) for stop in self._config.stop_strings), default=0)
        text, self._held = self._held[: len(self._held) - waiting], self._held[len(self._held) - waiting :]
        return text, None

    def _flush(self) -> str:
        return self._held + ("" if self._decoder is None else self._decoder.finish())


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, `stop` itself excluded."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
