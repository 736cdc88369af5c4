"""Decoding on a GPU: bandwidth of the step kernel, and tokens/s of the decoder after short and long prompts.

    python benchmarks/decode_speed.py                    # everything, about two minutes on one H100
    python benchmarks/decode_speed.py --only kernel
    python benchmarks/decode_speed.py --toy              # the script itself, tiny, on a CPU

The kernel is timed on the memories of all layers of the preset in turn, in a CUDA graph, as a fraction of the measured
copy bandwidth. The decoder is the one `generate` uses, bfloat16 weights, greedy; rows of a batch continue one prompt.
Short and long prompts alternate (A B A B ...) and medians are reported. Rows go to `results/decode-speed.jsonl`.
`model_speed.py` measures peers.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass

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
from resnet_bk.layers.mixer_state import MixerState
from resnet_bk.models.config import ModelConfig
from resnet_bk.models.decode import Decoder, owned
from resnet_bk.models.prefill import prefill
from resnet_bk.models.resnet_bk import LanguageModel, ModelState
from resnet_bk.models.sampling import GenerationConfig

PARTS = ("kernel", "model")
COLUMNS = {"part": 7, "arm": 9, "batch": 6, "length_tokens": 13, "tokens_per_second": 17, "milliseconds": 12}
COLUMNS |= {"spread": 9, "over_shortest": 13, "gigabytes_per_second": 20, "fraction_of_floor": 17, "outcome": 7}


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    preset: str = "base"
    batches: tuple[int, ...] = (1, 64, 512)
    prompts: tuple[int, ...] = (1024, 131072)
    steps: int = 64
    """Tokens a timed call."""
    dtype: torch.dtype = torch.bfloat16


TOY = Plan(preset="tiny", batches=(1, 3), prompts=(16, 64), steps=2)


def captured(run: Run) -> Run:
    """`run` as a CUDA graph, after a run that compiles and checks; on the CPU `run` itself."""
    run()
    if not torch.cuda.is_available():
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Bench:
    """The parts, with what they share."""

    def __init__(self, plan: Plan, rows: Rows, clock: Clock, ceilings: Ceilings) -> None:
        self.plan, self.rows, self.clock, self.ceilings = plan, rows, clock, ceilings
        with torch.device(clock.device):
            self.model = LanguageModel(ModelConfig.preset(plan.preset)).to(plan.dtype).eval()

    @torch.no_grad()
    def kernel(self, batch: int) -> None:
        """Time and bandwidth of one step of one layer, everything between the projections."""
        config = self.model.config
        state = self._expanded(torch.zeros(1, dtype=torch.long), batch)[1]
        calls: list[Callable[[], object]] = []
        moved = 0
        for block, layer in zip(self.model.blocks, owned(state).layers, strict=True):
            mixer = block.get_submodule("mixer")
            assert isinstance(mixer, Mixer)
            assert isinstance(layer, MixerState)
            layer.mix.memory.normal_()
            projection = torch.randn(batch, 1, sum(mixer.sizes), dtype=self.plan.dtype, device=self.clock.device)
            calls.append(functools.partial(mixer.step, projection, layer))
            moved += 2 * layer.mix.memory.nbytes + projection.nbytes + batch * config.inner_dim * projection.itemsize
        run = captured(lambda: [call() for call in calls])
        timing = self.clock.alternate({"step": run}, seconds=0.5)["step"]
        self._add("kernel", "step", batch, 1, timing, calls=len(calls), moved=moved / len(calls))

    @torch.no_grad()
    def decode(self, batch: int) -> None:
        """Tokens per second of the decoder after each prompt."""
        arms: dict[str, Run] = {}
        for prompt in self.plan.prompts:
            ids = torch.randint(self.model.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0))
            decoder = Decoder(self.model, *self._expanded(ids, batch), GenerationConfig(temperature=0.0))
            decoder.choose()
            for _ in range(2):  # the first compiles, the second captures
                decoder.step()
            arms[str(prompt)] = functools.partial(self._steps, decoder)
        weights = sum(p.nbytes for p in self.model.parameters())
        state = self._expanded(torch.zeros(1, dtype=torch.long), 1)[1]
        moved = weights + 2 * batch * state.num_bytes
        for name, timing in self.clock.alternate(arms, seconds=3.0, run_ahead=0.0).items():
            self._add("model", "resnet-bk", batch, int(name), timing, calls=self.plan.steps, moved=moved)

    def _steps(self, decoder: Decoder) -> None:
        """Steps of one timed call, each read by the host while the next runs."""
        ahead = decoder.step()
        for _ in range(self.plan.steps - 1):
            following = decoder.step()
            ahead.read()
            ahead = following
        ahead.read()

    def _expanded(self, ids: Tensor, batch: int) -> tuple[Tensor, ModelState]:
        """Hidden state and state after `ids`, for `batch` rows alike; the prompt is read once."""
        hidden, state = prefill(self.model, [ids])
        return hidden.expand(batch, -1), state.select(torch.zeros(batch, dtype=torch.long, device=hidden.device))

    def _add(self, part: str, arm: str, batch: int, length: int, timing: Timing | str, *, calls: int, moved: float):
        key = {"part": part, "arm": arm, "batch": batch, "length_tokens": length}
        if isinstance(timing, str):
            self.rows.add(**key, outcome=timing)
            return
        seconds = timing.median / calls
        shortest = self.rows.find(**key | {"pass": None, "length_tokens": self.plan.prompts[0]})
        self.rows.add(
            **key,
            tokens=batch,
            model=self.model,
            tokens_per_second=batch / seconds if part == "model" else None,
            milliseconds=seconds * 1e3,
            spread=timing.spread,
            over_shortest=batch / seconds / shortest["tokens_per_second"] if shortest else None,
            gigabytes_per_second=moved / seconds / 1e9,
            fraction_of_floor=self.ceilings.floor_seconds(moved, 0) / seconds,
        )


def main() -> None:
    """Measure, and append rows."""
    parser = argparse.ArgumentParser(description="Decoding on a GPU: the step kernel and the decoder.")
    add_options(parser, PARTS)
    arguments = parser.parse_args()
    device = settle(arguments)
    plan = TOY if arguments.toy else Plan()
    rows = Rows(
        "decode-speed",
        out=arguments.out,
        run=arguments.run,
        device=device,
        config={"preset": plan.preset, "batches": plan.batches, "prompts": plan.prompts, "steps": plan.steps},
        command="python benchmarks/decode_speed.py" + (" --toy" if arguments.toy else ""),
        commit=arguments.commit,
        shown=COLUMNS,
    )
    torch.manual_seed(0)
    clock = Clock(device)
    ceilings = measure_ceilings(clock, copy_bytes=1 << 20, side=64) if arguments.toy else measure_ceilings(clock)
    print(f"copy {ceilings.copy_bytes_per_second / 1e9:.4g} GB/s, read and written", flush=True)
    bench = Bench(plan, rows, clock, ceilings)
    try:
        for part, run in (("kernel", bench.kernel), ("model", bench.decode)):
            for batch in plan.batches if part in (arguments.only or PARTS) else ():
                last = {"part": part, "batch": batch, "length_tokens": plan.prompts[-1] if part == "model" else 1}
                if rows.find(arm="resnet-bk" if part == "model" else "step", **last):
                    continue
                if out_of_time(arguments):
                    print("The budget is spent; the same command goes on from here.")
                    return
                run(batch)
                release_memory()
    except DeviceLostError:
        start_again(arguments)


if __name__ == "__main__":
    main()
