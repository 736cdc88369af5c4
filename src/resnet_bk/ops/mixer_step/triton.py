"""One decode step of the mixer in one Triton kernel: a program a sequence and head, its memory read and written once.

A program holds the memory [state, value] of its head in registers, as two halves, so that turning the channel pairs
(p, p + state / 2) exchanges no data between threads. Everything else it reads (the token's projection, parameters)
comes from cache. Heads are not split over programs: the norm needs all their channels, and the second kernel which
that would take costs more than a multiprocessor needs for one memory.
Bytes of a step: 8 batch heads state value, and a few hundredths of that for the rest.
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_bk.ops.dispatch import verify_once
from resnet_bk.ops.mixer_step.reference import StepParameters, mixer_step_reference
from resnet_bk.ops.semiseparable import rotary_frequencies

_SOURCES = {"unit": 0, "gated": 1, "free": 2}


@triton.jit
def _softplus(x):
    """Log of 1 + e^x, with small relative error also where it is tiny."""
    small = tl.exp(-tl.abs(x))
    above = 1 + small
    rounded = above == 1
    # Kahan's log1p: the rounding error of `above` cancels in log(above) / (above - 1).
    tail = tl.where(rounded, small, tl.log(above) * (small / tl.where(rounded, 1.0, above - 1)))
    return tl.maximum(x, 0.0) + tail


@triton.jit
def _flux_gate(before, eta):
    """Decay a and weight sqrt(1 - a^2) of a site of absorption eta behind one of Im m = `before`."""
    # Nothing lies behind a hard wall (Im m = 0), so nothing decays.
    wall = before == 0
    return tl.where(wall, 1.0, 1 / tl.sqrt(1 + eta / tl.where(wall, 1.0, before))), 1 / tl.sqrt(1 + before / eta)


@triton.jit
def _phases(turns):
    """Cosine and sine of `turns` (float64) whole turns, both to a rounding of float32, without a table or a branch."""
    quarters = tl.floor(4 * turns + 0.5)
    angle = (turns - 0.25 * quarters).to(tl.float32) * 6.283185307179586
    # Taylor's series: an eighth of a turn at most, so the terms left out are below 1e-9.
    s = angle * angle
    sine = angle * (1 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880)))))
    cosine = 1 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320 + s * (-1 / 3628800)))))
    quarter = quarters.to(tl.int64) & 3
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def _load_bias(key_bias, query_bias, place, mask, is_key):
    """The key's bias where `is_key`, else the query's, float32."""
    bias = tl.load(key_bias + place, mask=mask & is_key, other=0.0).to(tl.float32)
    return bias + tl.load(query_bias + place, mask=mask & (is_key == 0), other=0.0).to(tl.float32)


@triton.jit
def _shifted(previous, key_shift, place, mask):
    """What the key before adds to the key, float32."""
    factor = tl.load(key_shift + place, mask=mask, other=0.0).to(tl.float32)
    return factor * tl.load(previous + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _turned(
    shared, previous, key_shift, key_bias, query_bias, turns, position, epsilon,
    HALF: tl.constexpr, HEIGHT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """RMSNorm plus bias of key and query, turned to `position`: low and high half [HEIGHT] of each.

    Worked out on one tile [key or query, half, channel] with its halves exchanged beside it. It is no smaller than
    the program's block of threads, so the compiler shares the work among them; vectors of half as many channels as
    threads it would compute anew in every thread that needs them.
    """
    is_key = (tl.arange(0, 2) == 0)[:, None, None]
    half = tl.arange(0, 2)[None, :, None]
    channel = tl.arange(0, HEIGHT)[None, None, :]
    mask = channel < HALF
    place, opposite = half * HALF + channel, (1 - half) * HALF + channel
    section = shared + tl.arange(0, 2)[:, None, None] * (2 * HALF)
    raw = tl.load(section + place, mask=mask, other=0.0).to(tl.float32)
    exchanged = tl.load(section + opposite, mask=mask, other=0.0).to(tl.float32)
    if SHIFT:
        raw += _shifted(previous, key_shift, place, mask & is_key)
        exchanged += _shifted(previous, key_shift, opposite, mask & is_key)
    bias = _load_bias(key_bias, query_bias, place, mask, is_key)
    exchanged_bias = _load_bias(key_bias, query_bias, opposite, mask, is_key)
    # One angle a channel pair; as many as the tile has places, for the reason above.
    frequency = tl.load(turns + 0 * place + channel, mask=mask, other=0.0)
    squares = tl.sum(tl.sum(raw * raw, axis=2), axis=1)
    scale = (1 / tl.sqrt(squares / (2 * HALF) + epsilon))[:, None, None]
    cos, sin = _phases(position * frequency)
    exchanged = exchanged * scale + exchanged_bias
    turned = (raw * scale + bias) * cos + tl.where(half == 0, -exchanged, exchanged) * sin
    key, query = tl.split(tl.permute(turned, (2, 1, 0)))
    key_low, key_high = tl.split(key)
    query_low, query_high = tl.split(query)
    return key_low, key_high, query_low, query_high


@triton.jit
def _step_kernel(
    projection, query_bias, key_bias, absorption_bias, potential_scale, energy, skip, source_bias, norm_weight,
    key_shift, turns, memory, position, real, imag, previous, new_memory, new_real, new_imag, out,
    heads, projection_stride, floor, epsilon, readout,
    HALF: tl.constexpr, VALUE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SOURCE: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, head = program // heads, program % heads
    channel, column = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    paired, valued = channel < HALF, column < VALUE
    inside = paired[:, None] & valued[None, :]
    place = channel[:, None] * VALUE + column[None, :]
    first = program * (2 * HALF * VALUE)

    # All loads come before all arithmetic, so that there is one wait for memory, not several.
    low = tl.load(memory + first + place, mask=inside, other=0.0)
    high = tl.load(memory + first + HALF * VALUE + place, mask=inside, other=0.0)
    # Sections of the projection: gate and x (heads * VALUE each), key and query (2 * HALF each), and potential,
    # absorption and source (heads each).
    inner = heads * VALUE
    token = projection + row * projection_stride
    shared = token + 2 * inner
    scalars = shared + 4 * HALF + head
    tokens_before = tl.load(position + row).to(tl.float64)
    potential = tl.load(scalars).to(tl.float32) * tl.load(potential_scale + head).to(tl.float32)
    detuning = potential - tl.load(energy + head).to(tl.float32) - tl.load(real + program)
    absorption = tl.load(scalars + heads).to(tl.float32) + tl.load(absorption_bias + head).to(tl.float32)
    before = tl.load(imag + program)
    if SOURCE != 0:
        raw_source = tl.load(scalars + 2 * heads).to(tl.float32) + tl.load(source_bias + head).to(tl.float32)
    factor_of_skip = tl.load(skip + head).to(tl.float32)
    mine = head * VALUE + column
    x = tl.load(token + inner + mine, mask=valued, other=0.0).to(tl.float32)
    gate = tl.load(token + mine, mask=valued, other=0.0).to(tl.float32)
    factor = tl.load(norm_weight + mine, mask=valued, other=0.0).to(tl.float32)

    bias = head * (2 * HALF)
    if SHIFT:
        previous += row * (2 * HALF)
    key_low, key_high, query_low, query_high = _turned(
        shared, previous, key_shift, key_bias + bias, query_bias + bias, turns, tokens_before, epsilon,
        HALF, HEIGHT, SHIFT,
    )  # fmt: skip
    eta = _softplus(absorption) + floor
    decay, weight = _flux_gate(before, eta)
    if SOURCE == 1:
        weight = weight * tl.sigmoid(raw_source)
    if SOURCE == 2:
        weight = _softplus(raw_source)
    losses = eta + before
    square = detuning * detuning + losses * losses

    incoming = (weight * x)[None, :]
    low = decay * low + key_low[:, None] * incoming
    high = decay * high + key_high[:, None] * incoming
    y = tl.sum(query_low[:, None] * low + query_high[:, None] * high, axis=0)
    y = readout * y + factor_of_skip * x
    y = y * (1 / tl.sqrt(tl.sum(y * y, axis=0) / VALUE + epsilon))
    y = y * factor * (gate * tl.sigmoid(gate))

    # In place: every thread has read the old state before any overwrites it.
    tl.debug_barrier()
    tl.store(new_memory + first + place, low, mask=inside)
    tl.store(new_memory + first + HALF * VALUE + place, high, mask=inside)
    tl.store(new_real + program, detuning / square)
    tl.store(new_imag + program, losses / square)
    tl.store(out + program * VALUE + column, y.to(out.dtype.element_ty), mask=valued)


@cache
def _turns(state: int, base: float, fraction: float, device: torch.device) -> Tensor:
    """Whole turns a token of every channel pair, float64 [state / 2]."""
    return rotary_frequencies(state, base, fraction, device=device) / (2 * math.pi)


def _warps(height: int, width: int, programs: int) -> int:
    """64 numbers of the memory a thread, or half of that where the programs are too few to fill a GPU."""
    warps = max(1, 2 * height * width // (64 * 32))
    return min(16, 2 * warps if programs < 264 else warps)


def _launch(
    projection: Tensor, parameters: StepParameters, state: list[Tensor], after: list[Tensor], previous: Tensor | None,
    source: str, floor: float, rotary_base: float, rotary_fraction: float, epsilon: float, warps: int,
) -> Tensor:  # fmt: skip
    """The output [batch, inner]; memory and Green function go to `after`, which may be those of `state`."""
    memory, position, real, imag = state
    batch, heads, channels, value = memory.shape
    height, width = _tile(channels, value)
    out = torch.empty(batch, heads * value, dtype=projection.dtype, device=projection.device)
    with torch.cuda.device_of(projection):
        _step_kernel[(batch * heads,)](
            projection, *parameters, _turns(channels, rotary_base, rotary_fraction, projection.device),
            memory, position, real, imag, previous, *after, out,
            heads, projection.stride(0), floor, epsilon, channels**-0.5,
            HALF=channels // 2, VALUE=value, HEIGHT=height, WIDTH=width, SOURCE=_SOURCES[source],
            SHIFT=previous is not None, num_warps=warps,
        )  # fmt: skip
    return out


def _tile(channels: int, value: int) -> tuple[int, int]:
    """Powers of two that cover half the channels and the values."""
    return 1 << (channels // 2 - 1).bit_length(), 1 << (value - 1).bit_length()


def _step(
    projection: Tensor, parameters: StepParameters, state: list[Tensor], after: list[Tensor], previous: Tensor | None,
    source: str, floor: float, rotary_base: float, rotary_fraction: float, epsilon: float,
) -> Tensor:  # fmt: skip
    """`_launch` on operands as it wants them, after the check of its compiled form."""
    projection = projection if projection.stride(1) == 1 else projection.contiguous()
    previous = None if previous is None else previous.contiguous()
    batch, heads, channels, value = state[0].shape
    warps = _warps(*_tile(channels, value), batch * heads)
    dtypes = tuple(None if x is None else x.dtype for x in (projection, *parameters, previous))
    options = (source, floor, rotary_base, rotary_fraction, epsilon)

    def measure() -> dict[str, tuple[float, float]]:
        return _errors(heads, channels, value, dtypes, projection.device, options, warps)

    verify_once("mixer_step", (projection.device, heads, channels, value, dtypes, options, warps), measure)
    return _launch(projection, parameters, state, after, previous, *options, warps)


# Relative root-mean-square error allowed of the output by dtype: a few roundings. The state is float32.
_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def _errors(heads: int, channels: int, value: int, dtypes: tuple, device: torch.device, options: tuple, warps: int):
    """Relative errors of a small random step, far into a text, against the reference in float64."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    inner, scalars = heads * value, (2 + (options[0] != "unit")) * heads
    shapes = [(heads, channels)] * 2 + [(heads,)] * 5 + [(inner,), (channels,), (3, channels)]
    projection = draw((3, 2 * (inner + channels) + scalars), dtypes[0])
    rest = [None if to is None else draw(shape, to) for shape, to in zip(shapes, dtypes[1:], strict=True)]
    memory, real, imag = draw((3, heads, channels, value)), draw((3, heads)), draw((3, heads)).abs()
    position = torch.arange(3, device=device) * 1_000_003
    wide = (memory.double(), position, real.double(), imag.double())
    previous, parameters = rest.pop(), StepParameters._make(rest)
    state, after = [memory, position, real, imag], [memory, real, imag]
    truth = mixer_step_reference(projection.double(), parameters.to(torch.float64), *wide, previous, *options)
    ours = (_launch(projection, parameters, state, after, previous, *options, warps), *after)
    return {
        name: (((one.double() - two).norm() / two.norm()).item(), _BOUNDS[one.dtype])
        for name, one, two in zip(("out", "memory", "real", "imag"), ours, truth, strict=True)
    }


@torch.library.custom_op("resnet_bk::mixer_step_triton", mutates_args=())
def mixer_step_triton(
    projection: Tensor, query_bias: Tensor, key_bias: Tensor, absorption_bias: Tensor, potential_scale: Tensor,
    energy: Tensor, skip: Tensor, source_bias: Tensor | None, norm_weight: Tensor, key_shift: Tensor | None,
    memory: Tensor, position: Tensor, real: Tensor, imag: Tensor, previous: Tensor | None,
    source: str, floor: float, rotary_base: float, rotary_fraction: float, epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output [batch, inner] of one token, and memory and Green function after it."""
    parameters = StepParameters(
        query_bias, key_bias, absorption_bias, potential_scale, energy, skip, source_bias, norm_weight, key_shift
    )
    state = [memory.contiguous(), position, real.contiguous(), imag.contiguous()]
    after = memory, real, imag = [torch.empty_like(part) for part in (state[0], *state[2:])]
    return (
        _step(projection, parameters, state, after, previous, source, floor, rotary_base, rotary_fraction, epsilon),
        memory,
        real,
        imag,
    )


@torch.library.custom_op("resnet_bk::mixer_step_triton_", mutates_args=("memory", "real", "imag"))
def mixer_step_triton_(
    projection: Tensor, query_bias: Tensor, key_bias: Tensor, absorption_bias: Tensor, potential_scale: Tensor,
    energy: Tensor, skip: Tensor, source_bias: Tensor | None, norm_weight: Tensor, key_shift: Tensor | None,
    memory: Tensor, position: Tensor, real: Tensor, imag: Tensor, previous: Tensor | None,
    source: str, floor: float, rotary_base: float, rotary_fraction: float, epsilon: float,
) -> Tensor:  # fmt: skip
    """Output [batch, inner] of one token; memory and Green function become those after it."""
    parameters = StepParameters(
        query_bias, key_bias, absorption_bias, potential_scale, energy, skip, source_bias, norm_weight, key_shift
    )
    state = [memory, position, real, imag]
    return _step(
        projection, parameters, state, [memory, real, imag], previous, source, floor, rotary_base, rotary_fraction,
        epsilon,
    )  # fmt: skip


@mixer_step_triton.register_fake
def _(projection, query_bias, key_bias, absorption_bias, potential_scale, energy, skip, source_bias, norm_weight,
      key_shift, memory, position, real, imag, previous, source, floor, rotary_base, rotary_fraction,
      epsilon):  # fmt: skip
    out = projection.new_empty(projection.shape[0], norm_weight.shape[0])
    return out, *(part.new_empty(part.shape) for part in (memory, real, imag))


@mixer_step_triton_.register_fake
def _(projection, query_bias, key_bias, absorption_bias, potential_scale, energy, skip, source_bias, norm_weight,
      key_shift, memory, position, real, imag, previous, source, floor, rotary_base, rotary_fraction,
      epsilon):  # fmt: skip
    return projection.new_empty(projection.shape[0], norm_weight.shape[0])
