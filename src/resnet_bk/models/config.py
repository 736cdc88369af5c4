"""`ModelConfig`: every number that decides a model's shape, and the presets; `AdapterConfig`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from resnet_bk.errors import ConfigError

MixerKind = Literal["resolvent", "attention", "mamba2", "mamba3"]
Dynamics = Literal["exact", "semiclassical", "decay_only"]
Kernel = Literal["flux", "transmission", "green"]
Source = Literal["gated", "free", "unit"]
Boundary = Literal["lead", "wall"]
PositionPotential = Literal["none", "prime_bump", "shuffled", "random"]
Recompute = Literal["auto", "none", "block", "segment"]
RECOMPUTE: tuple[Recompute, ...] = ("auto", "none", "block", "segment")
"""What the backward pass computes again; see `LanguageModel.recompute`."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a `LanguageModel`.

    Sizes are counts of channels unless a unit is given. `vocab_size` is the only field without a default.
    """

    vocab_size: int
    """Number of token ids; ids must lie in [0, vocab_size)."""
    d_model: int = 768
    """Width of the residual stream."""
    num_layers: int = 12
    """Number of blocks, each a mixer and a feed-forward."""
    mixer: MixerKind = "resolvent"
    """What mixes tokens in every block: this library's own mixer, or a baseline in its place."""
    attention_every: int = 0
    """Every so many blocks, the last of them mixes by attention instead (a hybrid); 0 is no such block."""
    attention_window: int = 0
    """Tokens that a query of attention sees, itself included; 0 is all before it."""
    attention_head_dim: int = 64
    """Channels per head of attention; even, and `d_model` must be a multiple of it where there is attention."""
    feed_forward_dim: int = 1792
    """Hidden width of the SwiGLU feed-forward."""
    expand: int = 2
    """Inner width of the mixer over `d_model`."""
    head_dim: int = 64
    """Value channels per head; `expand * d_model` must be a multiple of it."""
    state_size: int = 128
    """Key channels, shared by all heads; even, because the rotary phases act on pairs."""
    dynamics: Dynamics = "exact"
    """Where the decay comes from: the half-line Green function, its semiclassical (WKB) root, or absorption alone."""
    kernel: Kernel = "flux"
    """Decay per site: flux-normalised transmission (unit rows), bare transmission |m|, or the Green kernel itself."""
    source: Source = "gated"
    """Weight of a token on entry: sqrt(1 - a^2) times a sigmoid gate, a free softplus, or sqrt(1 - a^2) alone."""
    boundary: Boundary = "lead"
    """What lies left of the first token: a matched lead (no reflection) or a hard wall (m_0 = 0)."""
    phase_coupling: bool = False
    """Add a learned multiple of the accumulated scattering phase to the rotary angle (starts at zero)."""
    peierls_pairs: int = 0
    """Slowest pairs of key channels, of state_size / 2, that data-dependent (Peierls) phases turn too, by the weight
    with which a token enters a head; needs source 'free'."""
    sites_per_token: int = 1
    """Lattice sites a token adds, each with a detuning of its own; three make any element of SL(2, R) of its step."""
    green_readout: bool = False
    """Feed the Green function itself, (m - i) / (m + i) of every head, to the output beside the mixed values."""
    absorption_floor: float = 1e-3
    """Smallest absorption eta, in units of the hopping; > 0."""
    absorption_start: float = 1e-3
    """Absorptions start log-uniform between this and `absorption_stop`, above the floor."""
    absorption_stop: float = 4.0
    """Largest absorption at the start: the shortest memories last about 2 / `absorption_stop` tokens."""
    key_shift: bool = True
    """Add to every key a learned multiple, channel by channel, of the key before it, zero at the start: a value is then
    found by the token before its own, which makes recall learnable in one layer."""
    potential_start: float = 0.0
    """Start of the factor of every head's potential; 0 is a quiet medium."""
    position_potential: PositionPotential = "none"
    """Fixed potential of the position, with a learned factor for every head: bumps at the primes, or as a control their
    values shuffled or random ones of equal norm."""
    position_epsilon: float = 0.25
    """Exponent above 1/2 of the prime bumps, log p / p^(k (1/2 + epsilon)) at n = p^k."""
    energy_range: float = 1.5
    """Head energies start evenly spaced in [-energy_range, energy_range], in units of the hopping; with three sites a
    token at 1 and -1 in turn, where three quiet sites are the identity."""
    head_norm: bool = True
    """Norm the mixed values of every head before the output gate; without it their size says something."""
    skip_start: float = 1.0
    """Start of every head's direct path from a token to its own output, beside which the memory is added."""
    rotary_base: float = 10000.0
    """Ratio of the largest to the smallest rotary wavelength."""
    rotary_fraction: float = 0.25
    """Share of the mixer's pairs of keys, the fastest, that positions turn; attention turns all of its own. With 1/4
    the longest wavelength is 63 tokens, and a distance says nothing beyond, which carries further past the training
    length."""
    tie_embeddings: bool = True
    """Use one matrix for the token embedding and the output head."""
    norm_epsilon: float = 1e-5
    """Added to the mean square inside every RMSNorm."""
    dropout: float = 0.0
    """Probability of zeroing a channel of a mixer's or feed-forward's output during training."""
    word_dropout: float = 0.0
    """Probability of leaving a word out of a training pass: its embedding is 0 wherever it stands."""
    input_dropout: float = 0.0
    """Probability of zeroing a channel of the embeddings, through a whole training sequence."""
    output_dropout: float = 0.0
    """Probability of zeroing a channel of what the output head reads, through a whole training sequence."""

    def __post_init__(self) -> None:
        """Check every field; raises `ConfigError` naming the first that is wrong."""
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"model.{name} is {value!r}; expected a whole number >= {least}.")
        for name, options in _CHOICES.items():
            if getattr(self, name) not in options:
                raise ConfigError(f"model.{name} is {getattr(self, name)!r}; expected one of {', '.join(options)}.")
        for name in ("absorption_floor", "rotary_base", "norm_epsilon"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"model.{name} is {getattr(self, name)!r}; expected a number > 0.")
        if not 0 < self.absorption_start <= self.absorption_stop < math.inf:
            raise ConfigError(
                f"model.absorption_start is {self.absorption_start!r} and model.absorption_stop "
                f"{self.absorption_stop!r}; expected numbers > 0, the second not below the first."
            )
        if not math.isfinite(self.potential_start):
            raise ConfigError(f"model.potential_start is {self.potential_start!r}; expected a finite number.")
        for name in ("energy_range", "position_epsilon", "skip_start"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"model.{name} is {getattr(self, name)!r}; expected a finite number >= 0.")
        if self.position_potential != "none" and self.dynamics == "decay_only":
            raise ConfigError(
                f"model.position_potential is {self.position_potential!r}, but dynamics 'decay_only' has no potential. "
                "Set one of them."
            )
        if not 0 <= self.rotary_fraction <= 1:
            raise ConfigError(f"model.rotary_fraction is {self.rotary_fraction!r}; expected a share in [0, 1].")
        for name in ("dropout", "word_dropout", "input_dropout", "output_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)!r}; expected a probability in [0, 1).")
        if self.inner_dim % self.head_dim:
            raise ConfigError(f"model.head_dim is {self.head_dim}; it must divide expand * d_model = {self.inner_dim}.")
        if self.state_size % 2:
            raise ConfigError(f"model.state_size is {self.state_size}; it must be even (rotary phases act on pairs).")
        if self.mixer == "mamba3" and self.state_size % 4:
            raise ConfigError(
                f"model.state_size is {self.state_size}; it must be a multiple of 4 for mixer 'mamba3' (half of its "
                "channels are turned in pairs)."
            )
        if self.peierls_pairs > self.state_size // 2:
            raise ConfigError(
                f"model.peierls_pairs is {self.peierls_pairs}; there are only state_size / 2 = {self.state_size // 2}."
            )
        if self.peierls_pairs and self.source != "free":
            raise ConfigError(
                f"model.peierls_pairs is {self.peierls_pairs} and model.source {self.source!r}; the phases turn by the "
                "weight of a 'free' source. Set that, or 0 pairs."
            )
        if self.attention_every > self.num_layers:
            raise ConfigError(
                f"model.attention_every is {self.attention_every}, but there are only {self.num_layers} blocks, so "
                "none would mix by attention; lower it, or set 0 for none."
            )
        if "attention" in self.mixers and (self.d_model % self.attention_head_dim or self.attention_head_dim % 2):
            raise ConfigError(
                f"model.attention_head_dim is {self.attention_head_dim}; it must be even and divide d_model = "
                f"{self.d_model}."
            )
        for name, changed in (("sites_per_token", self.sites_per_token > 1), ("green_readout", self.green_readout)):
            if changed and self.dynamics != "exact":
                raise ConfigError(
                    f"model.{name} is {getattr(self, name)!r}, which needs the Green function of every site; dynamics "
                    f"{self.dynamics!r} has none. Set dynamics 'exact'."
                )
        if self.sites_per_token > 1 and (self.kernel != "flux" or self.phase_coupling):
            raise ConfigError(
                f"model.sites_per_token is {self.sites_per_token}; several sites are there for kernel 'flux' without "
                "phase_coupling only."
            )
        if self.phase_coupling and self.dynamics == "decay_only":
            raise ConfigError(
                "model.phase_coupling needs a potential; dynamics 'decay_only' has none. Set one of them."
            )

    @property
    def mixers(self) -> tuple[MixerKind, ...]:
        """What mixes tokens in each block, first to last."""
        every = self.attention_every
        return tuple(
            "attention" if every and place % every == 0 else self.mixer for place in range(1, self.num_layers + 1)
        )

    @property
    def draws(self) -> bool:
        """Whether a training pass draws random numbers: any dropout."""
        return max(self.dropout, self.word_dropout, self.input_dropout, self.output_dropout) > 0

    @property
    def inner_dim(self) -> int:
        """Value channels of the mixer, all heads together."""
        return self.expand * self.d_model

    @property
    def num_heads(self) -> int:
        """Heads of the mixer: `inner_dim / head_dim`."""
        return self.inner_dim // self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, in plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The configuration with these fields; raises `ConfigError` for a name that does not exist."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ConfigError(unknown_key_message(f"model.{name}", [f"model.{known}" for known in names]))
        if "vocab_size" not in values:
            raise ConfigError("model.vocab_size is missing; expected the number of token ids.")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """The configuration called `name`, with `overrides` applied.

        Presets: tiny (about 1M parameters), small (10M), base (130M), large (350M), xl (1.3B), 10b.
        Raises `ConfigError` for an unknown preset or field.
        """
        if name not in PRESETS:
            raise ConfigError(unknown_key_message(name, list(PRESETS), what="preset"))
        return cls.from_dict({**PRESETS[name], **overrides})


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters, trained beside a frozen model whose matrices are packed into four bits."""

    base: str = ""
    """Folder or hub name of the frozen model, whose fields the section model repeats; empty trains a whole model."""
    rank: int = 16
    """Inner width of every adapter."""
    alpha: float = 16.0
    """Adapters are added with the factor alpha / rank."""
    group: int = 64
    """Numbers of a packed matrix that share a scale; even, and a divisor of the length of every row."""

    def __post_init__(self) -> None:
        """Check every field; raises `ConfigError` naming the first that is wrong."""
        if self.rank < 1:
            raise ConfigError(f"adapters.rank is {self.rank!r}; expected a whole number >= 1.")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"adapters.alpha is {self.alpha!r}; expected a finite number > 0.")
        if self.group < 2 or self.group % 2:
            raise ConfigError(f"adapters.group is {self.group!r}; expected an even number >= 2.")


def unknown_key_message(key: str, known: list[str], *, what: str = "configuration key") -> str:
    """One line that says `key` is unknown and names the nearest of `known`."""
    import difflib

    # Only the last part is compared: a shared section name would make everything look near.
    section, _, leaf = key.rpartition(".")
    nearest = [name for name in known if name.rpartition(".")[2] == leaf]
    if not nearest:
        pool = [name for name in known if name.rpartition(".")[0] == section] or known
        leaves = {name.rpartition(".")[2]: name for name in pool}
        nearest = [leaves[close] for close in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.5)]
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}."
    return f"Unknown {what} {key!r}; {hint}"


_LEAST = {
    **dict.fromkeys(("vocab_size", "d_model", "num_layers", "feed_forward_dim", "expand", "head_dim", "state_size"), 1),
    "attention_head_dim": 1,
    "peierls_pairs": 0,
    "sites_per_token": 1,
    "attention_every": 0,
    "attention_window": 0,
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "mixer": ("resolvent", "attention", "mamba2", "mamba3"),
    "dynamics": ("exact", "semiclassical", "decay_only"),
    "kernel": ("flux", "transmission", "green"),
    "source": ("gated", "free", "unit"),
    "boundary": ("lead", "wall"),
    "position_potential": ("none", "prime_bump", "shuffled", "random"),
}

# With 256 channels more of the parameters belong in the mixer (2 % in perplexity); with 512 it makes no difference.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=4096, d_model=128, num_layers=3, feed_forward_dim=256, state_size=64),
    "small": dict(vocab_size=8192, d_model=256, num_layers=8, feed_forward_dim=224, expand=4, state_size=64),
    "base": dict(vocab_size=50304, d_model=768, num_layers=12, feed_forward_dim=1792),
    "large": dict(vocab_size=50304, d_model=1024, num_layers=24, feed_forward_dim=2048),
    "xl": dict(vocab_size=50304, d_model=2048, num_layers=24, feed_forward_dim=4096),
    "10b": dict(vocab_size=50304, d_model=4096, num_layers=48, feed_forward_dim=8192, tie_embeddings=False),
}
