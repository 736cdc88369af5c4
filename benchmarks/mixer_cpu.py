"""Time of the mixing layer on a CPU, float32, forward and backward: against length, attention, and its own floor.

    python benchmarks/mixer_cpu.py flatness      # the layer at 131,072 tokens a batch, N = 2,048 ... 131,072
    python benchmarks/mixer_cpu.py mixing        # mixing against attention that materialises its scores, N = 2,048
    python benchmarks/mixer_cpu.py layer         # the layer against fused attention's, N = 512 ... 32,768

Arms alternate within one process (A B A B ...) and medians are reported; one ledger row a question, in
`benchmarks/results/mixer-cpu.jsonl`. Times of different runs or machines are not comparable.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.evaluation.ledger import append_row
from resnet_bk.layers.mixer import Mixer
from resnet_bk.models.config import ModelConfig

D_MODEL = 512
ATTENTION_HEADS = 8
QUESTIONS = {"mixing": 2048, "layer": 32768, "flatness": 131072}
"""Question -> longest sequence in tokens."""
CONFIG = ModelConfig(vocab_size=2, d_model=D_MODEL, num_layers=1)


class Attention(nn.Module):
    """Causal self-attention with the fused kernel: the layer users would otherwise take."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(D_MODEL, 3 * D_MODEL, bias=False)
        self.out_proj = nn.Linear(D_MODEL, D_MODEL, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (ATTENTION_HEADS, -1)).transpose(1, 2) for part in self.in_proj(u).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(-2))


def materialised_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention whose scores exist in memory and go through autograd."""
    time_ = q.shape[-2]
    future = torch.ones(time_, time_, dtype=torch.bool).triu(1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)
    return scores.softmax(-1) @ v


def step(module: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """One forward and backward pass with respect to inputs and parameters."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        y = module(*leaves)
        y.backward(torch.full_like(y, 1 / y.numel()))

    return run


def alternate(arms: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every counted run of every arm, one warm-up each, arms in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, run in arms.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the runs of slow / fast, pair by pair."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def mixer_layer() -> Callable[[Tensor], Tensor]:
    mixer = Mixer(CONFIG)
    nn.init.normal_(mixer.in_proj.weight, std=0.03)
    return lambda u: mixer(u)[0]


def flatness(lengths: list[int], tokens: int, repeats: int) -> dict[str, float]:
    """Microseconds per token of the layer for every length, at `tokens` tokens a batch."""
    layer = mixer_layer()
    arms = {str(n): step(layer, torch.randn(tokens // n, n, D_MODEL)) for n in lengths}
    seconds = alternate(arms, repeats)
    medians = {f"us_per_token_{n}": statistics.median(times) / tokens * 1e6 for n, times in seconds.items()}
    shortest = seconds[str(lengths[0])]
    return medians | {f"ratio_{n}_to_{lengths[0]}": ratio(seconds[str(n)], shortest) for n in lengths[1:]}


def mixing(length: int, repeats: int) -> dict[str, float]:
    """Milliseconds of mixing (gates included) and of attention with scores in memory, projections left out."""
    mixer = Mixer(CONFIG)
    raw = [torch.randn(1, length, size) for size in mixer.sizes[1:]]
    qkv = [torch.randn(1, ATTENTION_HEADS, length, D_MODEL // ATTENTION_HEADS) for _ in range(3)]
    seconds = alternate(
        {
            "mixing": step(lambda *parts: mixer.mix(*parts)[0], *raw),
            "materialised": step(materialised_attention, *qkv),
            "fused": step(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv),
        },
        repeats,
    )
    medians = {f"ms_{name}": statistics.median(times) * 1e3 for name, times in seconds.items()}
    return medians | {
        "materialised_over_mixing": ratio(seconds["materialised"], seconds["mixing"]),
        "fused_over_mixing": ratio(seconds["fused"], seconds["mixing"]),
    }


def layer(lengths: list[int], repeats: int) -> dict[str, float]:
    """Milliseconds of the layer, of fused attention's layer, and of the mixer's projections alone (the floor)."""
    ours, attention, metrics = mixer_layer(), Attention(), {}
    mixer = Mixer(CONFIG)

    def projections(u: Tensor) -> Tensor:
        return mixer.out_proj(mixer.in_proj(u)[..., : CONFIG.inner_dim])

    for n in lengths:
        u = torch.randn(1, n, D_MODEL)
        arms = {"layer": step(ours, u), "attention": step(attention, u), "floor": step(projections, u)}
        seconds = alternate(arms, repeats if n < 32768 else min(repeats, 3))
        metrics |= {f"ms_{name}_{n}": statistics.median(times) * 1e3 for name, times in seconds.items()}
        metrics[f"attention_over_layer_{n}"] = ratio(seconds["attention"], seconds["layer"])
        metrics[f"attention_over_floor_{n}"] = ratio(seconds["attention"], seconds["floor"])
        print(n, {k: round(v, 2) for k, v in metrics.items() if k.endswith(f"_{n}")}, flush=True)
    return metrics


def main() -> None:
    """Run the questions asked for and append their rows."""
    parser = argparse.ArgumentParser(description="Time of the mixing layer on a CPU.")
    parser.add_argument("question", nargs="?", choices=("all", *QUESTIONS), default="all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--longest", type=int, default=None, help="tokens; the default is in QUESTIONS")
    parser.add_argument("--no-row", action="store_true", help="print only, append nothing to the ledger")
    arguments = parser.parse_args()
    for question in QUESTIONS if arguments.question == "all" else (arguments.question,):
        torch.manual_seed(0)
        start = time.perf_counter()
        tokens = arguments.longest or QUESTIONS[question]
        if question == "mixing":
            metrics = mixing(tokens, arguments.repeats)
        elif question == "flatness":
            metrics = flatness([n for n in (2048, 8192, 32768, 131072) if n <= tokens], tokens, arguments.repeats)
        else:
            metrics = layer([2**p for p in range(9, 16) if 2**p <= tokens], arguments.repeats)
        print(question, {name: round(value, 3) for name, value in metrics.items()}, flush=True)
        if not arguments.no_row:
            append_row(
                "mixer-cpu",
                command=f"python benchmarks/mixer_cpu.py {question} --repeats {arguments.repeats}",
                config=CONFIG,
                seeds=[0],
                metrics={"question": question, **metrics},
                wall_seconds=time.perf_counter() - start,
                tokens=tokens,
            )


if __name__ == "__main__":
    main()
