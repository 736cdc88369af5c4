"""Floating-point operations of a model, part by part, counted from shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from resnet_bk.errors import DomainError
from resnet_bk.layers.mamba2 import CONVOLUTION_WIDTH
from resnet_bk.models.config import ModelConfig

PARTS = (
    "embedding", "norm", "in_proj", "gates", "mixing", "gated_norm", "out_proj", "feed_forward", "head", "loss"
)  # fmt: skip
"""Parts of a model in the order of their first use."""


@dataclass(frozen=True)
class FlopRow:
    """Operations of one part. A multiplication and an addition are two."""

    layer: int | None
    """Block, from 0; None outside of blocks."""
    part: str
    """One of `PARTS`."""
    forward: int
    """Of matrix products in the forward pass."""
    backward: int
    """Of matrix products in the backward pass, what operators recompute inside included."""
    elementwise: int
    """All other operations of the forward pass: sums, products, and each elementary function as one."""

    def __add__(self, other: FlopRow) -> FlopRow:
        return replace(
            self,
            layer=self.layer if self.layer == other.layer else None,
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            elementwise=self.elementwise + other.elementwise,
        )


@dataclass(frozen=True)
class FlopCount:
    """Operations of one training step's forward and backward pass, without the optimizer.

    Totals are of matrix products, as is usual. Elementwise operations are listed beside them.
    """

    rows: tuple[FlopRow, ...]
    """Every part of every block, in the order of execution."""
    batch: int
    """Rows of tokens."""
    time: int
    """Tokens of a row."""

    @property
    def forward(self) -> int:
        """Operations of the forward pass."""
        return sum(row.forward for row in self.rows)

    @property
    def backward(self) -> int:
        """Operations of the backward pass."""
        return sum(row.backward for row in self.rows)

    @property
    def total(self) -> int:
        """Operations of both."""
        return self.forward + self.backward

    @property
    def per_token(self) -> float:
        """`total` per token: training on n tokens takes n times as many."""
        return self.total / (self.batch * self.time)

    @property
    def elementwise(self) -> int:
        """All other operations of the forward pass."""
        return sum(row.elementwise for row in self.rows)

    @property
    def parts(self) -> dict[str, FlopRow]:
        """Sums over blocks, by part; parts that the model has not are left out."""
        found: dict[str, FlopRow] = {}
        for part in PARTS:
            for row in self.rows:
                if row.part == part:
                    found[part] = found[part] + row if part in found else row
        return found

    def table(self) -> str:
        """Markdown table of the parts: operations per token, and their share of the total."""
        tokens = self.batch * self.time
        lines = [
            "| part | forward | backward | share | elementwise, forward |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for part, row in self.parts.items():
            share = (row.forward + row.backward) / self.total
            cells = part, _number(row.forward / tokens), _number(row.backward / tokens), f"{share:.1%}"
            lines.append(f"| {' | '.join(cells)} | {_number(row.elementwise / tokens)} |")
        cells = _number(self.forward / tokens), _number(self.backward / tokens), _number(self.elementwise / tokens)
        lines.append(f"| total per token | {cells[0]} | {cells[1]} | 100.0% | {cells[2]} |")
        return "\n".join(lines)


def model_flops(config: ModelConfig, *, batch: int = 1, time: int, all_pairs: bool = False) -> FlopCount:
    """Operations of `LanguageModel(config)` on `batch` rows of `time` tokens with labels, forward and backward.

    What is executed counts: chunks of the mixing are whole (the last one padded) and both halves of their score
    matrices are computed, backward passes that recompute scores do so, and only positions with a label meet the head.
    All mixers with a memory are counted in the chunked form of `semiseparable_mix` for a CPU; kernels for GPUs, the
    published ones of Mamba too, cut the same products up differently. Attention counts the pairs of a query and a key
    that it sees, and five products of a pair's channels in the backward pass, as fused kernels do. Activations that
    are recomputed to save memory do not count.

    Args:
        config: the model.
        batch: rows.
        time: tokens of a row, at least 2.
        all_pairs: count every pair of the blocks that attention is called on, seen or not, as
            `torch.utils.flop_counter` does.

    Raises:
        DomainError: batch < 1 or time < 2.
    """
    if batch < 1 or time < 2:
        raise DomainError(f"batch is {batch} and time {time}; expected at least 1 and 2 (labels are the next tokens).")
    shape = _Shape(config, batch, time, all_pairs)
    rows = [FlopRow(None, "embedding", 0, 0, 0)]
    for layer, mixer in enumerate(config.mixers):
        parts = [shape.norm(), *_MIXERS[mixer](shape), shape.norm(), *shape.feed_forward()]
        rows += [replace(row, layer=layer) for row in parts]
    predictions = batch * (time - 1)
    rows += [
        shape.norm(),
        shape.linear("head", config.d_model, config.vocab_size, tokens=predictions),
        FlopRow(None, "loss", 0, 0, 4 * predictions * config.vocab_size),  # maximum, difference, exponential, sum
    ]
    return FlopCount(tuple(rows), batch, time)


def flops_table(models: Mapping[str, ModelConfig], *, batch: int = 1, time: int) -> str:
    """Markdown table that compares models: operations per token by part, and their totals relative to the first.

    Args:
        models: name -> configuration.
        batch: rows.
        time: tokens of a row; mixing by attention depends on it.
    """
    header = ["model", "in_proj + out_proj", "mixing", "feed_forward", "head", "total per token", "relative"]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    first = None
    for name, config in models.items():
        count = model_flops(config, batch=batch, time=time)
        parts = {part: row.forward + row.backward for part, row in count.parts.items()}
        products = parts["in_proj"] + parts["out_proj"], parts["mixing"], parts["feed_forward"], parts["head"]
        first = count.per_token if first is None else first
        cells = [_number(value / (batch * time)) for value in products]
        lines.append([name, *cells, _number(count.per_token), f"{count.per_token / first:.3f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class _Shape:
    """One call of a model, and the parts that all models have."""

    config: ModelConfig
    batch: int
    time: int
    all_pairs: bool

    @property
    def tokens(self) -> int:
        return self.batch * self.time

    def linear(self, part: str, inputs: int, outputs: int, *, tokens: int | None = None, other: int = 0) -> FlopRow:
        """A matrix without bias: one product forward; gradients of input and matrix, one each, backward."""
        product = 2 * (self.tokens if tokens is None else tokens) * inputs * outputs
        return FlopRow(None, part, product, 2 * product, other)

    def norm(self) -> FlopRow:
        """RMS norm: square, sum, scale, weight; and the sum of the residual stream."""
        return FlopRow(None, "norm", 0, 0, 5 * self.tokens * self.config.d_model)

    def recurrence(self, *, turned: bool) -> FlopRow:
        """`semiseparable_mix` by chunks, keys and queries turned or not; the same for every mixer that has a memory."""
        config = self.config
        state, value = config.state_size, config.head_dim
        chunk = min(64, max(16, 1 << (self.time - 1).bit_length()))
        pairs = self.batch * (-(-self.time // chunk) * chunk) * config.num_heads  # of tokens, padding too, and heads
        inside, across = 2 * chunk, 2 * state * value
        return FlopRow(
            None,
            "mixing",
            # Scores, and what they attend to; writing to the memory, and reading from it.
            pairs * (inside * (state + value) + 2 * across),
            # Scores and memories again; two gradients of each of these four products.
            pairs * (inside * (3 * state + 2 * value) + 5 * across),
            # Turning and biases; decays of scores; sources, decays and skip; decay of the memory.
            pairs * (8 * state * turned + 3 * chunk + 6 * value + across // chunk),
        )

    def feed_forward(self) -> list[FlopRow]:
        """SwiGLU: the two matrices in front are one; exponential, sum, quotient and two products between."""
        width, hidden = self.config.d_model, self.config.feed_forward_dim
        first = self.linear("feed_forward", width, 2 * hidden, other=5 * self.tokens * hidden)
        return [first, self.linear("feed_forward", hidden, width)]


def _resolvent(shape: _Shape) -> list[FlopRow]:
    config, heads, inner = shape.config, shape.config.num_heads, shape.config.inner_dim
    has_potential, has_source = config.dynamics != "decay_only", config.source != "unit"
    width = 2 * inner + 2 * config.state_size + heads * (1 + config.sites_per_token * has_potential + has_source)
    width += config.peierls_pairs
    # Softplus, detuning, one Moebius step (complex quotient), flux, its logarithm, source gate.
    gates = shape.tokens * heads * (14 + 16 * config.sites_per_token * has_potential + 10 * config.green_readout)
    gates += shape.tokens * heads * (8 * config.peierls_pairs + 6 * config.state_size * (config.peierls_pairs > 0))
    gates += shape.tokens * 2 * config.state_size * config.key_shift
    return [
        shape.linear("in_proj", config.d_model, width),
        FlopRow(None, "gates", 0, 0, gates),
        shape.recurrence(turned=True),
        FlopRow(None, "gated_norm", 0, 0, 8 * shape.tokens * inner),
        shape.linear("out_proj", inner + 2 * heads * config.green_readout, config.d_model),
    ]


def _mamba2(shape: _Shape) -> list[FlopRow]:
    config, heads, inner = shape.config, shape.config.num_heads, shape.config.inner_dim
    mixed = inner + 2 * config.state_size
    # The convolution with its silu; softplus, rate and decay.
    gates = shape.tokens * ((2 * CONVOLUTION_WIDTH + 4) * mixed + 5 * heads)
    return [
        shape.linear("in_proj", config.d_model, inner + mixed + heads),
        FlopRow(None, "gates", 0, 0, gates),
        shape.recurrence(turned=False),
        FlopRow(None, "gated_norm", 0, 0, 8 * shape.tokens * inner),
        shape.linear("out_proj", inner, config.d_model),
    ]


def _mamba3(shape: _Shape) -> list[FlopRow]:
    config, heads, inner, state = shape.config, shape.config.num_heads, shape.config.inner_dim, shape.config.state_size
    # Norms of keys and queries; step, rate and trapezoid; angles; a token's share in its own output; the gate.
    gates = 8 * state + heads * 15 + 6 * heads * (state // 4) + 2 * heads * state + 5 * inner
    return [
        shape.linear("in_proj", config.d_model, 2 * inner + 2 * state + 3 * heads + state // 4),
        FlopRow(None, "gates", 0, 0, shape.tokens * gates),
        shape.recurrence(turned=True),
        shape.linear("out_proj", inner, config.d_model),
    ]


def _attention(shape: _Shape) -> list[FlopRow]:
    config, width = shape.config, shape.config.d_model
    pairs = shape.batch * _attended_pairs(shape.time, config.attention_window, shape.all_pairs)
    product = 2 * pairs * width
    heads = width // config.attention_head_dim
    return [
        shape.linear("in_proj", width, 3 * width, other=14 * shape.tokens * width),  # norms and turning
        # Scores and their sums of values; scores again and two gradients of each product. Softmax: as the loss.
        FlopRow(None, "mixing", 2 * product, 5 * product, 5 * pairs * heads),
        shape.linear("out_proj", width, width),
    ]


def _attended_pairs(time: int, window: int, all_pairs: bool) -> int:
    """Pairs of a query and a key in one row."""
    window = window if 0 < window < time else 0
    if not all_pairs:
        reach = window or time
        return reach * (reach + 1) // 2 + (time - reach) * reach
    if not window:
        return time * time
    block = max(window, 64)
    starts = range(0, time, block)
    return sum((min(time, s + block) - s) * (min(time, s + block) - max(0, s - window + 1)) for s in starts)


_MIXERS: dict[str, Callable[[_Shape], list[FlopRow]]] = {
    "resolvent": _resolvent,
    "attention": _attention,
    "mamba2": _mamba2,
    "mamba3": _mamba3,
}


def _number(value: float) -> str:
    """Operations with a unit: 12.3 M."""
    for unit in ("", " k", " M", " G", " T"):
        if value < 1000 or unit == " T":
            return f"{value:.3g}{unit}" if unit and value < 1000 else f"{value:,.0f}{unit}"
        value /= 1000
    raise AssertionError("unreachable")
