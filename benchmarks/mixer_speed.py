"""The mixing layer on a GPU: its kernels against float64, then their time beside Mamba-2, Mamba-3 and fused attention.

    python benchmarks/mixer_speed.py                        # everything, about six minutes on one H100
    python benchmarks/mixer_speed.py --only accuracy        # the kernels against float64, nothing timed
    python benchmarks/mixer_speed.py --toy                  # the script itself, tiny, on a CPU

Timed is what lies between the two projections of a layer, from the output of the first to the input of the second,
bfloat16, 32 heads of 64 channels, state 128. Nothing is timed before every kernel has passed `kernel_accuracy`. Arms
alternate (A B A B ...) within one process and medians are reported. Every row is appended to
`results/mixer-accuracy.jsonl` or `results/mixer-speed.jsonl` as soon as it is known, and a run that was cut off goes
on where it stopped. The Mamba peers run if `mamba_ssm` can be imported (`PYTHONPATH`).
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import kernel_accuracy
import peers
import torch
from gpu_timing import (
    Ceilings,
    Clock,
    DeviceLostError,
    Rows,
    Run,
    Timing,
    add_options,
    measure_ceilings,
    out_of_time,
    release_memory,
    settle,
    start_again,
)
from torch import Tensor

from resnet_bk.layers.mixer import Mixer
from resnet_bk.models.config import ModelConfig
from resnet_bk.ops.gated_norm import gated_norm
from resnet_bk.ops.semiseparable import rotary_frequencies, semiseparable_mix

PARTS = ("accuracy", "shapes", "crossover")
PASSES = ("forward", "forward+backward")
SHAPES = [(16, 2048), (1, 32768), (64, 2048), (4, 32768), (1, 131072), (8, 131072), (1, 1048576)]
"""Rows and tokens a row."""
CROSSOVER_SHAPES = [(64, 512), (32, 1024), (16, 2048), (8, 4096), (4, 8192), (1, 32768)]
SLOWEST = 1.0
"""Attention that would take longer than this, seconds a call, is left out."""
SPEED_COLUMNS = {"arm": 28, "pass": 16, "batch": 5, "length_tokens": 13, "milliseconds": 12, "spread": 8}
SPEED_COLUMNS |= {"host_milliseconds": 17, "times_resnet_bk": 15, "fraction_of_floor": 17, "peak_mib": 9, "outcome": 7}
ACCURACY_COLUMNS = {"arm": 32, "quantities": 10, "worst": 28, "ratio": 8, "share_of_bound": 14, "outcome": 7}
CHUNK = 64
"""Tokens per score matrix, for counting operations."""


@dataclass(frozen=True)
class Sizes:
    """What is timed."""

    heads: int = 32
    value: int = 64
    state: int = 128
    dtype: str = "bfloat16"

    @property
    def inner(self) -> int:
        return self.heads * self.value

    def mixer(self) -> Mixer:
        """A mixer of these sizes; of its parameters only those between the projections matter."""
        return Mixer(
            ModelConfig(
                vocab_size=2, d_model=self.inner, expand=1, num_layers=1, head_dim=self.value, state_size=self.state
            )
        )

    def mixing_flops(self) -> int:
        """Operations of the mixing per token, forward: scores, outputs, and the memory read and written."""
        return self.heads * (2 * CHUNK * (self.state + self.value) + 4 * self.state * self.value)


class Whole(peers.Core):
    """This library's core: gates, norms of queries and keys, mixing, skip, gated norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.mixer = sizes.mixer()
        self.width = sum(self.mixer.sizes)

    def forward(self, projected: Tensor) -> Tensor:
        """Output [batch, time, inner]."""
        return self.mixer.core(projected)[0]


@dataclass
class Arm:
    """One way to do the work, and the least it has to do."""

    run: dict[str, Run]
    """Pass -> one call."""
    floors: Mapping[str, tuple[float, float]]
    """Pass -> bytes to move and operations to do; empty for the peers."""


def calls(core: peers.Core, leaves: list[list[Tensor]], cotangent: Tensor) -> dict[str, Run]:
    """Both passes of `core` over input sets in turn; a set is one tensor, or a batch cut into several."""
    forward_sets, both_sets = itertools.cycle(leaves), itertools.cycle(leaves)
    parameters = list(core.parameters())

    def forward() -> None:
        with torch.no_grad():
            for leaf in next(forward_sets):
                core(leaf)

    def both() -> None:
        for parameter in parameters:
            parameter.grad = None
        for leaf in next(both_sets):
            leaf.grad = None
            y = core(leaf)
            y.backward(cotangent[: y.shape[0]])
            leaf.grad = None

    return {"forward": forward, "forward+backward": both}


def operator_calls(
    function: Callable[..., tuple[Tensor, ...]], leaves: dict[str, Tensor], *cotangents: Tensor
) -> dict[str, Run]:
    """Both passes of one operator with gradients for every operand."""

    def forward() -> None:
        with torch.no_grad():
            function(**leaves)

    def both() -> None:
        torch.autograd.grad(function(**leaves), list(leaves.values()), cotangents)

    return {"forward": forward, "forward+backward": both}


class Bench:
    """Inputs and arms of one shape at a time."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device, self.dtype = sizes, device, getattr(torch, sizes.dtype)
        channels = min(128, sizes.inner)
        whole = Whole(sizes)
        cores: dict[str, peers.Core] = {"resnet-bk": whole}
        self.absent: dict[str, str] = {}
        reason = peers.absence()
        for name, make in {
            "mamba-2 without convolution": lambda: peers.Mamba2(*self._mamba, convolution=False),
            "mamba-2": lambda: peers.Mamba2(*self._mamba, convolution=True),
            "mamba-3": lambda: peers.Mamba3(*self._mamba),
        }.items():
            if reason is None:
                cores[name] = make()
            else:
                self.absent[name] = f"peer absent: {reason}"
        kernels = ("flash", "cudnn") if device.type == "cuda" else (None,)
        cores |= {
            f"attention {kernel or ''}".strip(): peers.Attention(sizes.inner // channels, channels, kernel)
            for kernel in kernels
        }
        self.cores = {name: core.to(device) for name, core in cores.items()}
        self.mixer = whole.mixer
        self.widest = max(core.width for core in cores.values())
        self.buffers: list[Tensor] = []

    @property
    def _mamba(self) -> tuple[int, int, int]:
        return self.sizes.heads, self.sizes.value, self.sizes.state

    def allocate(self, batch: int, time: int) -> None:
        """Fill input sets for this shape; every core sees them as its own projection."""
        self.buffers = []
        release_memory()
        elements = batch * time * self.widest
        sets = 3 if elements < 2**29 else 1  # beyond that one set is hundreds of times the cache
        for _ in range(sets):
            self.buffers.append(torch.empty(elements, dtype=self.dtype, device=self.device).normal_())
        self.cotangent = torch.randn(batch, time, self.sizes.inner, dtype=self.dtype, device=self.device)
        self.batch, self.time = batch, time

    def view(self, width: int) -> list[Tensor]:
        """The input sets as [batch, time, width]."""
        shape = self.batch, self.time, width
        return [buffer[: math.prod(shape)].view(shape) for buffer in self.buffers]

    def core_arm(self, name: str) -> Arm | str:
        """The arm of a core, or why it cannot run at this shape."""
        core = self.cores[name]
        rows = core.rows_per_call(self.time)
        if rows == 0:
            return "not run: one row overflows the 32-bit offsets of its kernels"
        sets = [
            [part.detach().requires_grad_() for part in view.split(rows or self.batch)]
            for view in self.view(core.width)
        ]
        floors = {}
        if name == "resnet-bk":
            tokens, flops = self.batch * self.time, self.batch * self.time * self.sizes.mixing_flops()
            read, written = 2 * tokens * core.width, 2 * tokens * self.sizes.inner
            # Backward: the projection and the output's gradient read, the projection's gradient written.
            floors = {
                "forward": (read + written, flops),
                "forward+backward": (read + written + 2 * read + written, 3 * flops),
            }
        return Arm(calls(core, sets, self.cotangent), floors)

    def part_arms(self) -> Iterator[tuple[str, Arm]]:
        """This library's operators but for the shift of keys, one by one, on views of the projection."""
        sizes, mixer = self.sizes, self.mixer
        tokens, flops = self.batch * self.time, self.batch * self.time * sizes.mixing_flops()
        gate, x, key, query, *raw = (
            part.detach().requires_grad_() for part in self.view(sum(mixer.sizes))[0].split(mixer.sizes, dim=-1)
        )
        heads = (self.batch, self.time, sizes.heads)
        wide = torch.randn(2, *heads, device=self.device)
        config = mixer.config
        frequencies = rotary_frequencies(sizes.state, config.rotary_base, config.rotary_fraction, device=self.device)

        def gates(potential, absorption, source):
            found = mixer.gates(potential, absorption, source, None, None)[0]
            return found.log_decay, found.source

        def mixing(query, key, value, log_decay, source):
            return semiseparable_mix(
                query,
                key,
                value,
                log_decay,
                source=source,
                query_bias=mixer.query_bias,
                key_bias=mixer.key_bias,
                frequencies=frequencies,
                skip=mixer.skip,
                scale=sizes.state**-0.5,
                norm_epsilon=mixer.config.norm_epsilon,
            )[:1]

        def norm(y, gate):
            return (gated_norm(y, gate, mixer.norm_weight, epsilon=mixer.config.norm_epsilon),)

        # Bytes of one token: operands in two bytes, gates in four.
        gates_in, gates_out = 2 * 3 * sizes.heads, 4 * 2 * sizes.heads
        mix_in, mix_out = 2 * (sizes.inner + 2 * sizes.state) + gates_out, 2 * sizes.inner
        norm_in, norm_out = 2 * 2 * sizes.inner, 2 * sizes.inner

        def floors(read: int, written: int, operations: int = 0) -> dict[str, tuple[float, float]]:
            forward = tokens * (read + written)
            return {
                "forward": (forward, operations),
                "forward+backward": (forward + tokens * (2 * read + written), 3 * operations),
            }

        operands: dict[str, Tensor] = dict(zip(("potential", "absorption", "source"), raw, strict=True))
        yield "part: gates", Arm(operator_calls(gates, operands, *wide), floors(gates_in, gates_out))
        decays = {"log_decay": -0.1 * torch.rand(heads, device=self.device), "source": wide[1].sigmoid()}
        decays = {name: leaf.requires_grad_() for name, leaf in decays.items()}
        value = x.detach().unflatten(-1, (sizes.heads, -1)).requires_grad_()
        operands = {"query": query, "key": key, "value": value, **decays}
        per_head = self.cotangent.unflatten(-1, (sizes.heads, -1))
        yield "part: mixing", Arm(operator_calls(mixing, operands, per_head), floors(mix_in, mix_out, flops))
        y = torch.randn_like(per_head).requires_grad_()
        operands = {"y": y, "gate": gate}
        yield "part: gated norm", Arm(operator_calls(norm, operands, self.cotangent), floors(norm_in, norm_out))


def attention_seconds(batch: int, time: int, sizes: Sizes, which: str, ceilings: Ceilings) -> float:
    """What causal attention would take at half of the measured rate; backward is two and a half forward passes."""
    flops = 2 * batch * time**2 * sizes.inner * (1 if which == "forward" else 3.5)
    return flops / (0.5 * ceilings.matmul_flops_per_second)


def time_shape(bench: Bench, clock: Clock, rows: Rows, ceilings: Ceilings, part: str, batch: int, time: int) -> None:
    """Time every arm that has no row yet at one shape, and write their rows."""
    names = ["resnet-bk", *bench.absent, *(name for name in bench.cores if name != "resnet-bk")]
    if part == "shapes":
        names += ["part: gates", "part: mixing", "part: gated norm"]
    else:
        names = [name for name in names if name == "resnet-bk" or name.startswith("attention")]

    def key(name: str, which: str) -> dict[str, Any]:
        return {"part": part, "arm": name, "pass": which, "batch": batch, "length_tokens": time}

    if all(rows.find(**key(name, which)) for name in names for which in PASSES):
        return
    bench.allocate(batch, time)
    arms: dict[str, Arm | str] = {
        name: bench.absent.get(name) or bench.core_arm(name) for name in names if not name.startswith("part:")
    }
    if part == "shapes":
        arms |= dict(bench.part_arms())
    for which in PASSES:
        missing = [name for name in names if not rows.find(**key(name, which))]
        if not missing:
            continue
        runs: dict[str, Run] = {}
        found: dict[str, Timing | str] = {}
        for name in dict.fromkeys(["resnet-bk", *missing]):
            arm = arms[name]
            if isinstance(arm, str):
                found[name] = arm
            elif name.startswith("attention") and (
                (needed := attention_seconds(batch, time, bench.sizes, which, ceilings)) > SLOWEST
            ):
                found[name] = f"not run: it would take about {needed:.1f} s a call"
            else:
                runs[name] = arm.run[which]
        try:
            found |= clock.alternate(runs, seconds=0.15 * len(runs))
        except DeviceLostError as lost:
            if not rows.find(**key(lost.arm, which)):
                rows.add(**key(lost.arm, which), outcome=f"{lost.reason} (the device's context was lost)")
            raise
        ours = found["resnet-bk"]
        for name in missing:
            timing = found[name]
            if isinstance(timing, str):
                rows.add(**key(name, which), outcome=timing)
                continue
            arm = arms[name]
            floor = None if isinstance(arm, str) else arm.floors.get(which)
            floor_seconds = ceilings.floor_seconds(*floor) if floor else None
            rows.add(
                **key(name, which),
                tokens=batch * time,
                milliseconds=timing.median * 1e3,
                spread=timing.spread,
                ns_per_token=timing.median / (batch * time) * 1e9,
                times_resnet_bk=None if isinstance(ours, str) else timing.median / ours.median,
                peak_mib=timing.peak_bytes / 2**20,
                host_milliseconds=timing.host_seconds * 1e3,
                floor_milliseconds=None if floor_seconds is None else floor_seconds * 1e3,
                fraction_of_floor=None if floor_seconds is None else floor_seconds / timing.median,
                runs=len(timing.seconds),
            )


def crossovers(rows: Rows, shapes: list[tuple[int, int]]) -> None:
    """Write the length from which this library's core is faster than the fastest attention, for both passes."""
    for which in PASSES:
        points = []
        for batch, time in shapes:
            ratios = [
                row["times_resnet_bk"]
                for name in ("attention", "attention flash", "attention cudnn")
                if (row := rows.find(part="crossover", arm=name, **{"pass": which}, batch=batch, length_tokens=time))
                and "times_resnet_bk" in row
            ]
            if ratios:
                points.append((time, min(ratios)))
        key: dict[str, Any] = {"part": "crossover", "arm": "crossover", "pass": which}
        if points and not rows.find(**key):
            rows.add(**key, outcome=crossover(sorted(points)))


def crossover(points: list[tuple[int, float]]) -> str:
    """Where the ratio passes 1, between lengths in tokens by straight lines in logarithms."""
    if points[0][1] >= 1:
        return f"faster from the shortest length measured, {points[0][0]} tokens"
    for (short, before), (long, after) in itertools.pairwise(points):
        if after >= 1:
            share = math.log(1 / before) / math.log(after / before)
            return f"faster from about {short * (long / short) ** share:.0f} tokens"
    return f"not faster up to {points[-1][0]} tokens"


def check_kernels(rows: Rows, cases: list[kernel_accuracy.Case], workers: int) -> bool:
    """Whether every kernel passes; one row a case, naming the figure nearest to its bound."""
    waiting = [case for case in cases if not rows.find(part="accuracy", arm=str(case))]
    for case, figures in kernel_accuracy.run_all(waiting, workers):
        if isinstance(figures, str):
            rows.add(part="accuracy", arm=str(case), outcome=figures)
            continue
        worst = kernel_accuracy.worst(figures)
        failing = sorted({f"{f.quantity} at {f.length_tokens} tokens" for f in figures if not f.passes})
        finite = math.isfinite(worst.ratio)
        rows.add(
            part="accuracy",
            arm=str(case),
            quantities=len(figures),
            worst=f"{worst.quantity} at {worst.length_tokens} tokens",
            elements=worst.elements,
            error=worst.error if finite else str(worst.error),
            plain_error=worst.plain_error if finite else str(worst.plain_error),
            ratio=worst.ratio if finite else str(worst.ratio),
            share_of_bound=worst.error / worst.bound if finite else None,
            outcome=f"failed: {', '.join(failing)}"[:300] if failing else "passed",
        )
    outcomes = [rows.find(part="accuracy", arm=str(case)) for case in cases]
    return all(row is not None and row["outcome"] == "passed" for row in outcomes)


def main() -> None:
    """Check, time, and append rows."""
    parser = argparse.ArgumentParser(description="The mixing layer on a GPU, against float64 and beside its peers.")
    add_options(parser, PARTS)
    parser.add_argument(
        "--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes that check kernels"
    )
    arguments = parser.parse_args()
    device = settle(arguments)
    sizes = Sizes(heads=2, value=8, state=16, dtype="float32") if arguments.toy else Sizes()
    shapes = [(2, 64), (1, 128)] if arguments.toy else SHAPES
    crossing = [(4, 32), (1, 128)] if arguments.toy else CROSSOVER_SHAPES
    cases = kernel_accuracy.toy_cases() if arguments.toy else kernel_accuracy.all_cases()
    options = {
        "out": arguments.out,
        "run": arguments.run,
        "device": device,
        "config": asdict(sizes),
        "command": "python benchmarks/mixer_speed.py" + (" --toy" if arguments.toy else ""),
        "commit": arguments.commit,
    }
    rows = Rows("mixer-speed", **options, shown=SPEED_COLUMNS)
    parts = arguments.only or PARTS
    accuracy = Rows("mixer-accuracy", **options, shown=ACCURACY_COLUMNS)
    # In processes of their own, before this one takes memory.
    if not check_kernels(accuracy, cases, 0 if arguments.toy else arguments.workers):
        sys.exit("A kernel failed its accuracy check; nothing is timed. See the rows above.")
    torch.manual_seed(0)
    clock = Clock(device)
    ceilings = measure_ceilings(clock, copy_bytes=1 << 20, side=64) if arguments.toy else measure_ceilings(clock)
    rows.add(
        part="ceilings",
        arm="ceilings",
        copy_terabytes_per_second=(copied := ceilings.copy_bytes_per_second / 1e12),
        matmul_teraflops_per_second=(multiplied := ceilings.matmul_flops_per_second / 1e12),
        outcome=f"copy {copied:.4g} TB/s, matmul {multiplied:.4g} TFLOP/s",
    )
    if peers.absence() is None and not arguments.toy:
        peers.compile_candidates_together(os.cpu_count() or 1)
    bench = Bench(sizes, device)
    try:
        for part, places in (("shapes", shapes), ("crossover", crossing)):
            for batch, time in places if part in parts else ():
                if out_of_time(arguments):
                    print("The budget is spent; the same command goes on from here.")
                    return
                time_shape(bench, clock, rows, ceilings, part, batch, time)
    except DeviceLostError:
        start_again(arguments)
    if "crossover" in parts:
        crossovers(rows, crossing)


if __name__ == "__main__":
    main()
