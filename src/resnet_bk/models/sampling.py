"""How the next token is chosen: `GenerationConfig`, and the filters and the draw behind it as plain functions."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resnet_bk.errors import ConfigError, DomainError
from resnet_bk.models.config import unknown_key_message

# Fields that other libraries write into generation_config.json and that say nothing about the choice of tokens.
_FOREIGN_FIELDS = ("bos_token_id", "pad_token_id", "transformers_version", "use_cache")


class GenerationOptions(TypedDict, total=False):
    """The fields of `GenerationConfig` as keyword arguments."""

    max_new_tokens: int | None
    max_length: int | None
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    stop_tokens: tuple[int, ...] | list[int] | None
    stop_strings: tuple[str, ...] | list[str]
    seed: int | None


@dataclass(frozen=True)
class GenerationConfig:
    """Length, sampling and stopping of generated text."""

    max_new_tokens: int | None = 128
    """Most tokens added to a prompt; None leaves the limit to `max_length`."""
    max_length: int | None = None
    """Most tokens of a prompt and its continuation together."""
    temperature: float = 0.0
    """Logits are divided by this; 0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Sample from the k most likely tokens only; 0 keeps all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to at least this, in (0, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen before; > 0, 1 does nothing."""
    stop_tokens: tuple[int, ...] | None = None
    """Token ids that end a sequence; None means the tokenizer's end of text, if there is one."""
    stop_strings: tuple[str, ...] = ()
    """Strings that end a sequence, and are cut from its text; need a tokenizer."""
    seed: int | None = None
    """Same seed, same prompt: same text, whatever else is in the batch. None draws one from torch's generator."""

    def __post_init__(self) -> None:
        """Check every field; raises `DomainError` naming the first that is wrong."""
        for name in ("stop_tokens", "stop_strings"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        checks = {
            "max_new_tokens": (lambda v: v is None or _whole(v, 1), "a whole number >= 1 or None"),
            "max_length": (lambda v: v is None or _whole(v, 2), "a whole number >= 2 or None"),
            "temperature": (lambda v: _number(v) and 0 <= v < float("inf"), "a number >= 0 (0 is greedy)"),
            "top_k": (lambda v: _whole(v, 0), "a whole number >= 0 (0 keeps all tokens)"),
            "top_p": (lambda v: _number(v) and 0 < v <= 1, "a number in (0, 1]"),
            "repetition_penalty": (lambda v: _number(v) and 0 < v < float("inf"), "a number > 0 (1 does nothing)"),
            "stop_tokens": (
                lambda v: v is None or (isinstance(v, tuple) and all(_whole(token, 0) for token in v)),
                "token ids >= 0 or None",
            ),
            "stop_strings": (
                lambda v: isinstance(v, tuple) and all(isinstance(text, str) and text for text in v),
                "a list of non-empty strings",
            ),
            "seed": (lambda v: v is None or _whole(v, 0), "a whole number >= 0 or None"),
        }
        for name, (accepts, expected) in checks.items():
            value = getattr(self, name)
            if not accepts(value):
                raise DomainError(f"generation.{name} is {value!r}; expected {expected}.")
        if self.max_new_tokens is None and self.max_length is None:
            raise DomainError("generation.max_new_tokens and max_length are both None; one of them must end the text.")

    def replace(self, options: GenerationOptions) -> GenerationConfig:
        """The configuration with `options` in place; a length limit that is given alone replaces both.

        Raises:
            ConfigError: an option that does not exist (names the nearest).
            DomainError: a value outside its domain.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in options:
            if name not in known:
                raise ConfigError(unknown_key_message(name, known, what="generation option"))
        values: dict[str, Any] = dict(options)
        if ("max_length" in values) != ("max_new_tokens" in values):
            values = {"max_length": None, "max_new_tokens": None, **values}
        return dataclasses.replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as `generation_config.json` stores them, under the names that Hugging Face libraries use."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        values["do_sample"] = self.temperature > 0
        if self.temperature == 0:
            del values["temperature"]
        if self.stop_tokens is not None:
            values["eos_token_id"] = list(values.pop("stop_tokens"))
        values["stop_strings"] = list(self.stop_strings)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GenerationConfig:
        """The configuration that `to_dict`, or another library, wrote.

        Raises:
            ConfigError: an unknown field (names the nearest) or a value outside its domain.
        """
        values = {
            name: value for name, value in values.items() if name not in _FOREIGN_FIELDS and not name.startswith("_")
        }
        temperature = values.pop("temperature", None)
        if not values.pop("do_sample", temperature is not None):
            temperature = 0.0
        elif temperature is None:
            temperature = 1.0
        stop = values.pop("eos_token_id", None)
        if stop is not None:
            values["stop_tokens"] = [stop] if isinstance(stop, int) else stop
        if "max_length" in values:
            values.setdefault("max_new_tokens", None)
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(unknown_key_message(name, known, what="generation option"))
        try:
            return cls(temperature=temperature, **values)
        except DomainError as error:
            raise ConfigError(str(error)) from None


def penalize_repetition(
    logits: Float[Tensor, "rows vocabulary"], seen: Bool[Tensor, "rows vocabulary"], penalty: float
) -> Float[Tensor, "rows vocabulary"]:
    """Logits with those of `seen` tokens divided by `penalty` if positive and multiplied by it if negative.

    Source: Keskar et al. 2019 (CTRL), section 4.1, in the sign-aware form that libraries use.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Tensor, "rows vocabulary"], k: int) -> Float[Tensor, "rows vocabulary"]:
    """Logits with all but the k largest of each row at -inf; tokens tied with the k-th stay. 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    kth = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Float[Tensor, "rows vocabulary"], p: float) -> Float[Tensor, "rows vocabulary"]:
    """Logits with all but the nucleus of each row at -inf: the fewest most likely tokens of total probability >= p.

    Of equally likely tokens the smaller id comes first. At least one token stays; p = 1 keeps all.

    Source: Holtzman et al. 2020.
    """
    if p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(outside, -torch.inf)


def draw(logits: Float[Tensor, "rows vocabulary"], uniform: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """One token a row from softmax(logits), by inversion of the cumulative distribution at `uniform` in [0, 1).

    A token of probability 0 is never drawn, and the result depends on nothing but the arguments.
    """
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]


def row_seeds(seed: int, prompts: list[Tensor]) -> list[int]:
    """A seed for each prompt that depends on `seed`, the prompt, and how many equal prompts come before it."""
    earlier: dict[bytes, int] = {}
    seeds = []
    for prompt in prompts:
        key = prompt.cpu().numpy().tobytes()
        count = earlier[key] = earlier.get(key, -1) + 1
        digest = hashlib.blake2b(key, digest_size=8, key=f"{seed}/{count}".encode()[:64])
        seeds.append(int.from_bytes(digest.digest(), "little") >> 1)
    return seeds


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
