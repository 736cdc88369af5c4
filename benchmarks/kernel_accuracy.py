"""How far the mixer's kernels are from float64, beside the same mathematics in plain PyTorch at the same dtype.

`plain_mixing` and its kind are what a researcher would write: scores of all pairs of tokens in memory, operands in the
model's dtype, gates in float32, one token after the other where there is a recursion. A kernel passes if no output,
gradient or state has more than twice the plain form's relative RMS error (`Figure.bound`).

Near a resonance the recursion of the gates magnifies any rounding, and the plain form's error is then one random
number. Its largest error over a few runs whose inputs were moved by one rounding is not a matter of luck.
"""

from __future__ import annotations

import concurrent.futures
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from gpu_timing import failures, summary
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.layers.mixer import Mixer
from resnet_bk.models.config import ModelConfig
from resnet_bk.ops.dispatch import Backend
from resnet_bk.ops.gated_norm import gated_norm
from resnet_bk.ops.resolvent import GreenState, causal_resolvent, decaying_root, flux_gate, flux_gates
from resnet_bk.ops.semiseparable import MixState, rotary_frequencies, rotate, semiseparable_mix
from resnet_bk.ops.semiseparable.rotation import phase_table

FACTOR = 2.0
FLOOR = torch.finfo(torch.float32).eps
HEADS = 4
EPSILON = 1e-5
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Figure:
    """One quantity of one case."""

    quantity: str
    length_tokens: int
    elements: int
    error: float
    """RMS of the kernel's difference from float64, over the RMS of the truth."""
    plain_error: float
    """The same of the plain form, at least the rounding to the result's dtype."""

    @property
    def ratio(self) -> float:
        return self.error / self.plain_error

    @property
    def bound(self) -> float:
        """The error that passes.

        Twice the plain form's, and three standard deviations of the ratio of two RMS values over so few elements, and
        one float32 epsilon: turning a memory between frames costs roundings that the plain form does without.
        """
        return FACTOR * (1 + 3 / math.sqrt(self.elements)) * self.plain_error + FLOOR

    @property
    def passes(self) -> bool:
        return self.error <= self.bound  # NaN does not


def compare(length: int, kernel: Named, plains: Sequence[Named], truth: Named) -> Iterator[Figure]:
    """One figure a quantity; of several plain runs the worst counts."""
    for name, exact in truth.items():
        size = exact.square().mean().sqrt().clamp_min(1e-300)
        error, *plain_errors = (
            float((found[name].double() - exact).square().mean().sqrt() / size) for found in (kernel, *plains)
        )
        # Rounding to nearest alone costs about a fifth of epsilon.
        rounding = torch.finfo(kernel[name].dtype).eps / 5
        yield Figure(name, length, exact.numel(), error, max(*plain_errors, rounding))


def results(function: Callable[..., Named], leaves: Named, cotangents: Named, dtype: torch.dtype | None) -> Named:
    """Outputs of `function(**leaves)` and the gradients of all leaves; in `dtype` if it is given."""

    def converted(x: Tensor) -> Tensor:
        return x.detach() if dtype is None else x.detach().to(dtype)

    inputs = {name: converted(leaf).requires_grad_() for name, leaf in leaves.items()}
    outputs = function(**inputs)
    weights = [cotangents[name].to(outputs[name].dtype) for name in outputs]
    gradients = torch.autograd.grad(list(outputs.values()), list(inputs.values()), weights, allow_unused=True)
    found = {name: output.detach() for name, output in outputs.items()}
    return found | {f"d_{name}": g for name, g in zip(inputs, gradients, strict=True) if g is not None}


def mixing_case(length: int, state: int, value: int, dtype: torch.dtype, device: str, backend: Backend) -> list[Figure]:
    """Outputs, final memory and every gradient of `semiseparable_mix`, continuing a state."""
    batch = 1 if length > 2000 else 2
    random = _Random(device, dtype)
    # Views of one tensor, as the projection leaves them.
    widths = [HEADS * value, state, state]
    x, key, query = random.normal(batch, length, sum(widths)).split(widths, dim=-1)
    leaves = {
        "query": query,
        "key": key,
        "value": x.unflatten(-1, (HEADS, value)),
        "log_decay": -0.1 * random.uniform(batch, length, HEADS),
        "source": random.uniform(batch, length, HEADS),
        "query_bias": 1 + 0.2 * random.wide(HEADS, state),
        "key_bias": 1 + 0.2 * random.wide(HEADS, state),
        "skip": random.wide(HEADS),
        "memory": random.wide(batch, HEADS, state, value),
    }
    frequencies = rotary_frequencies(state, 10000.0, device=device)
    position = torch.arange(12345, 12345 + batch, device=device)
    cotangents = {"y": random.wide(batch, length, HEADS, value), "final": random.wide(batch, HEADS, state, value)}
    scale = state**-0.5

    def mixed(chosen: Backend) -> Callable[..., Named]:
        def run(query, key, value, log_decay, source, query_bias, key_bias, skip, memory):
            y, final = semiseparable_mix(
                query,
                key,
                value,
                log_decay,
                source=source,
                query_bias=query_bias,
                key_bias=key_bias,
                skip=skip,
                frequencies=frequencies,
                scale=scale,
                norm_epsilon=EPSILON,
                initial=MixState(memory, position),
                backend=chosen,
            )
            return {"y": y, "final": final.memory}

        return run

    def plain(**inputs):
        y, final = plain_mixing(**inputs, frequencies=frequencies, position=position, scale=scale)
        return {"y": y, "final": final}

    truth = results(mixed("chunked"), leaves, cotangents, torch.float64)
    kernel = results(mixed(backend), leaves, cotangents, None)
    return list(compare(length, kernel, [results(plain, leaves, cotangents, None)], truth))


def plain_mixing(
    query, key, value, log_decay, source, query_bias, key_bias, skip, memory, *, frequencies, position, scale
):
    """What `semiseparable_mix` computes, from the scores of all pairs of tokens, in the dtype of `value`."""
    dtype, length = value.dtype, value.shape[1]
    places = position[:, None] + torch.arange(length, device=value.device)
    cos, sin = (part.unsqueeze(2) for part in phase_table(places, frequencies, dtype))
    query, key = (F.rms_norm(part, part.shape[-1:], eps=EPSILON) for part in (query, key))
    q, k = (
        rotate(part.unsqueeze(2) + bias.to(dtype), cos, sin).transpose(1, 2)
        for part, bias in ((query, query_bias), (key, key_bias))
    )
    x = value.transpose(1, 2)
    total = log_decay.cumsum(1).transpose(1, 2)
    past = torch.ones(length, length, dtype=torch.bool, device=value.device).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~past, -torch.inf).exp()
    weight = (decay * source.transpose(1, 2)[..., None, :]).to(dtype)
    q = q * scale
    y = (q @ k.mT * weight) @ x + total.exp()[..., None].to(dtype) * (q @ memory.to(dtype))
    y = y.transpose(1, 2) + skip.to(dtype)[:, None] * value
    kept = ((total[..., -1:] - total).exp() * source.transpose(1, 2)).to(dtype)
    final = ((k * kept[..., None]).mT @ x).float() + total[..., -1, None, None].exp() * memory
    return y, final


def gates_case(length: int, lead: bool, dtype: torch.dtype, device: str, backend: Backend) -> list[Figure]:
    """Decays, sources, final state and every gradient of `flux_gates`, in a disordered medium.

    It continues a state, or starts from the matched lead, which depends on parameters.
    """
    random = _Random(device, dtype)
    batch, heads, floor = 4, 8, 1e-3
    with torch.device(device):
        mixer = Mixer(ModelConfig(vocab_size=2, d_model=32 * heads, num_layers=1, head_dim=64))
    potential, absorption, source = random.normal(batch, length, 3 * heads).split(heads, dim=-1)
    leaves = {
        "potential": potential,
        "absorption": absorption,
        "source": source,
        "potential_scale": 1 + 0.2 * random.wide(heads),
        "energy": mixer.energy,
        "absorption_bias": mixer.absorption_bias,
        "source_bias": random.wide(heads),
    }
    if not lead:
        leaves |= {"real": random.wide(batch, heads), "imag": 0.1 + random.uniform(batch, heads)}
    cotangents = {name: random.wide(batch, length, heads) for name in ("log_decay", "weight")}
    cotangents |= {name: random.wide(batch, heads) for name in ("final_real", "final_imag")}

    def own(chosen: Backend) -> Callable[..., Named]:
        def run(potential, absorption, source, *, real=None, imag=None, **parameters):
            (log_decay, weight), green = flux_gates(
                potential,
                absorption,
                source,
                **parameters,
                absorption_floor=floor,
                source_kind="gated",
                initial=None if real is None or imag is None else GreenState(real, imag),
                backend=chosen,
            )
            return {"log_decay": log_decay, "weight": weight, "final_real": green.real, "final_imag": green.imag}

        return run

    def plain(rounding, potential, absorption, source, *, real=None, imag=None, **parameters):
        def moved(x: Tensor) -> Tensor:
            return x * (1 + rounding * torch.randn_like(x))

        p = {name: value.float() for name, value in parameters.items()}
        eta = moved(F.softplus(absorption.float() + p["absorption_bias"]) + floor)
        delta = moved(p["potential_scale"] * potential.float() - p["energy"])
        root = decaying_root(-p["energy"], F.softplus(p["absorption_bias"]) + floor)
        first = GreenState(*(part.expand(batch, heads) for part in root))
        if real is not None and imag is not None:
            first = GreenState(real, imag)
        m, green = causal_resolvent(delta, eta, initial=first, backend="reference")
        log_decay, unit = flux_gate(torch.cat((first.imag[:, None], m[1][:, :-1]), dim=1), eta)
        weight = unit * (source.float() + p["source_bias"]).sigmoid()
        return {"log_decay": log_decay, "weight": weight, "final_real": green.real, "final_imag": green.imag}

    truth = results(own("chunked"), leaves, cotangents, torch.float64)
    kernel = results(own(backend), leaves, cotangents, None)
    plains = [results(partial(plain, rounding), leaves, cotangents, None) for rounding in (0.0, *3 * [2**-24])]
    return list(compare(length, kernel, plains, truth))


def norm_case(length: int, value: int, dtype: torch.dtype, device: str, backend: Backend) -> list[Figure]:
    """Output and every gradient of `gated_norm`."""
    random = _Random(device, dtype)
    batch, inner = 2, HEADS * value
    y, gate = random.normal(batch, length, 2 * inner).split(inner, dim=-1)
    leaves = {"y": y.unflatten(-1, (HEADS, value)), "gate": gate, "weight": 1 + 0.2 * random.wide(inner)}
    cotangents = {"out": random.wide(batch, length, inner)}

    def own(chosen: Backend) -> Callable[..., Named]:
        return lambda y, gate, weight: {"out": gated_norm(y, gate, weight, epsilon=EPSILON, backend=chosen)}

    def plain(y, gate, weight):
        normed = F.rms_norm(y, (value,), eps=EPSILON).flatten(-2)
        return {"out": normed * weight.to(y.dtype) * F.silu(gate)}

    truth = results(own("chunked"), leaves, cotangents, torch.float64)
    kernel = results(own(backend), leaves, cotangents, None)
    return list(compare(length, kernel, [results(plain, leaves, cotangents, None)], truth))


@dataclass(frozen=True)
class Case:
    """One kernel at one set of sizes, for all lengths."""

    kernel: str
    dtype: str
    state: int = 0
    value: int = 0
    lengths: tuple[int, ...] = (1, 63, 64, 65, 1000, 4096)
    device: str = "cuda"
    backend: Backend = "triton"

    def __str__(self) -> str:
        sizes = "".join(f" {name}={size}" for name, size in (("K", self.state), ("P", self.value)) if size)
        return f"{self.kernel}{sizes} {self.dtype}"

    def run(self) -> list[Figure]:
        """Figures of all lengths."""
        torch.manual_seed(0)
        dtype = getattr(torch, self.dtype)
        figures: list[Figure] = []
        for length in self.lengths:
            if self.kernel == "mixing":
                figures += mixing_case(length, self.state, self.value, dtype, self.device, self.backend)
            elif self.kernel == "gates":
                for lead in (False, True):
                    figures += gates_case(length, lead, dtype, self.device, self.backend)
            else:
                figures += norm_case(length, self.value, dtype, self.device, self.backend)
        return figures


def all_cases() -> list[Case]:
    """Every kernel, size and dtype that has to pass before anything is timed."""
    dtypes = ("bfloat16", "float32")
    cases = [Case("gates", d) for d in dtypes]  # first: their plain form goes token by token
    cases += [Case("mixing", d, state=k, value=p) for d in dtypes for k in (128, 64) for p in (128, 64, 32)]
    return cases + [Case("gated norm", d, value=p) for d in dtypes for p in (32, 64, 128)]


def toy_cases() -> list[Case]:
    """A few of them at sizes for a CPU, by whatever backend runs there."""
    cases = (Case("mixing", "float32", 16, 8), Case("gates", "float32"), Case("gated norm", "bfloat16", value=8))
    return [replace(case, lengths=(1, 65), device="cpu", backend="auto") for case in cases]


def worst(figures: Iterable[Figure]) -> Figure:
    """The figure nearest to its bound, or beyond it; NaN first."""
    return max(figures, key=lambda f: math.inf if math.isnan(f.error) else f.error / f.bound)


class _Random:
    """Tensors of one case: operands in its dtype, gates and parameters in float32."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def wide(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device)


def run_all(cases: Sequence[Case], workers: int) -> Iterator[tuple[Case, list[Figure] | str]]:
    """Figures of every case, or why it failed, as they come.

    `workers` processes share the GPU, so that kernels compile side by side.
    """
    if workers < 2:
        yield from ((case, _figures(case)) for case in cases)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(_figures, case): case for case in cases}
        for future in concurrent.futures.as_completed(futures):
            error = future.exception()
            yield futures[future], future.result() if error is None else summary(error)


def _figures(case: Case) -> list[Figure] | str:
    try:
        return case.run()
    except failures() as error:
        return summary(error)
