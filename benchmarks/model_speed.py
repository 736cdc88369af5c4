"""Whole models on a GPU: training tokens/s and MFU against length, memory of a long step, decoding tokens/s.

    python benchmarks/model_speed.py                          # everything, about ten minutes on one H100
    python benchmarks/model_speed.py --only train --preset base
    python benchmarks/model_speed.py --toy                    # the script itself, tiny, on a CPU

Beside this library's model run a Mamba-2 (published kernels, without its short convolution, which favours it) and a
Transformer (rotary phases, normed queries and keys, fused attention) with the same embedding, norms, SwiGLU, loss,
optimizer, depth, width and, within two per cent, parameters. Training is what `Trainer` does: float32 parameters,
bfloat16 autocast, clipping, fused AdamW. Activations are recomputed block by block at every length, so that one policy
holds along a row of lengths. Rows go to `results/model-speed.jsonl` as soon as they are known; a run that was cut off
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import decoders
import peer_models
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
    failures,
    measure_ceilings,
    out_of_time,
    release_memory,
    settle,
    start_again,
    summary,
)

from resnet_bk.models.config import ModelConfig
from resnet_bk.models.resnet_bk import LanguageModel
from resnet_bk.training.config import TrainingConfig
from resnet_bk.training.optimizer import build_optimizer

PARTS = ("train", "memory", "decode")
DECODERS = ("resnet-bk", "resnet-bk, generate", "mamba-2, bfloat16 states", "mamba-2, float32 states", "transformer")
DATASHEET_FLOPS = 989e12
"""Dense bfloat16 rate of an H100 or H200 (SXM) by its datasheet."""
COLUMNS = {"arm": 28, "preset": 6, "batch": 5, "length_tokens": 13, "tokens_per_second": 17, "milliseconds": 12}
COLUMNS |= {
    "peak_gigabytes": 14,
    "over_shortest": 13,
    "over_resnet_bk": 14,
    "mfu_measured": 12,
    "mfu_datasheet": 13,
    "working_gigabytes": 17,
    "outcome": 7,
}


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    presets: tuple[str, ...] = ("base", "xl")
    lengths: tuple[tuple[int, int], ...] = ((64, 2048), (4, 32768), (1, 131072), (1, 1048576))
    """Rows and tokens a row of a training step."""
    longest: tuple[tuple[str, int], ...] = (("xl", 131072),)
    """Preset -> tokens beyond which it is not trained."""
    segment_tokens: int = 65536
    memory_tokens: int = 131072
    decode_preset: str = "base"
    decode_rows: tuple[int, ...] = (1, 64, 512)
    prompts: tuple[int, ...] = (1024, 131072)
    decode_steps: int = 32
    """Tokens a timed call."""
    slowest: float = 30.0
    """Seconds; a Transformer's step that would take longer is left out."""


TOY = Plan(
    presets=("tiny",),
    lengths=((2, 64), (1, 128)),
    longest=(),
    segment_tokens=64,
    memory_tokens=256,
    decode_preset="tiny",
    decode_rows=(1, 2),
    prompts=(16, 64),
    decode_steps=2,
)


class Training:
    """One model and its optimizer."""

    def __init__(self, kind: str, preset: str, device: torch.device, segment_tokens: int | None) -> None:
        with torch.device(device):
            self.model = peer_models.build(kind, preset)
        if segment_tokens is not None:
            self.model.segment_tokens = segment_tokens
        self.device = device
        self.optimizer = build_optimizer(self.model, TrainingConfig(), device)

    def step(self, batch: int, time: int) -> Run:
        """One training step on random tokens."""
        ids = torch.randint(self.model.config.vocab_size, (batch, time), device=self.device)
        parameters = list(self.model.parameters())

        def run() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.model(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()

        return run


class Bench:
    """The parts, with what they share."""

    def __init__(self, plan: Plan, rows: Rows, clock: Clock, ceilings: Ceilings, out_of_time: Callable[..., bool]):
        self.plan, self.rows, self.clock, self.ceilings = plan, rows, clock, ceilings
        self.device, self.out_of_time = clock.device, out_of_time
        self.absent = peers.absence()

    def train(self, preset: str) -> None:
        """Every model at every length; in turn where all three fit in memory, else one model after the other."""
        limit = dict(self.plan.longest).get(preset, max(time for _, time in self.plan.lengths))
        lengths = [(batch, time) for batch, time in self.plan.lengths if time <= limit]
        together = self.device.type == "cpu" or 3 * self._resident_bytes(preset) < 0.25 * self._memory_bytes()
        groups = [list(peer_models.KINDS)] if together else [[kind] for kind in peer_models.KINDS]
        for group in groups:
            waiting = [
                place
                for place in lengths
                if not all(self.rows.find(**self._key("train " + preset, kind, *place)) for kind in group)
            ]
            trainings: dict[str, Training] = {}
            for batch, time_ in waiting:
                if self.out_of_time():
                    raise TimeoutError
                if not trainings:
                    trainings = {k: t for k in group if (t := self._training(k, preset, lengths)) is not None}
                self._train_at(preset, trainings, batch, time_)
            trainings.clear()
            release_memory()

    def _training(self, kind: str, preset: str, lengths: list[tuple[int, int]]) -> Training | None:
        """A model ready to train, or None with rows that say why not."""
        reason = f"peer absent: {self.absent}" if self.absent and kind.startswith("mamba") else None
        if reason is None:
            try:
                return Training(kind, preset, self.device, self.plan.segment_tokens)
            except failures() as error:
                reason = summary(error)
        for batch, time_ in lengths:
            key = self._key("train " + preset, kind, batch, time_)
            if not self.rows.find(**key):
                self.rows.add(**key, preset=preset, outcome=reason)
        self.clock.check_alive(kind, reason)
        release_memory()
        return None

    def _train_at(self, preset: str, trainings: dict[str, Training], batch: int, time_: int) -> None:
        found: dict[str, Timing | str] = {}
        runs: dict[str, Run] = {}
        for kind, training in trainings.items():
            if self.rows.find(**self._key("train " + preset, kind, batch, time_)):
                continue
            flops = peer_models.step_flops(training.model, batch, time_)
            expected = flops * 4 / 3 / (0.4 * self.ceilings.matmul_flops_per_second)
            if kind == "transformer" and expected > self.plan.slowest:
                found[kind] = f"not run: a step would take about {expected:.0f} s"
            else:
                runs[kind] = training.step(batch, time_)
        with self._noting_loss("train " + preset, preset, batch, time_):
            found |= self.clock.alternate(runs, seconds=6.0, least=0, most=6, run_ahead=0.0)
        for kind, timing in found.items():
            key = self._key("train " + preset, kind, batch, time_)
            model = trainings[kind].model
            if isinstance(timing, str):
                self.rows.add(**key, preset=preset, outcome=timing, model=model)
                continue
            rate = peer_models.step_flops(model, batch, time_) / timing.median
            speed = batch * time_ / timing.median
            self.rows.add(
                **key,
                preset=preset,
                model=model,
                tokens=batch * time_,
                tokens_per_second=speed,
                over_shortest=self._ratio(speed, "train " + preset, kind, *self.plan.lengths[0]),
                over_resnet_bk=self._ratio(speed, "train " + preset, "resnet-bk", batch, time_),
                milliseconds=timing.median * 1e3,
                spread=timing.spread,
                runs=len(timing.seconds),
                mfu_measured=rate / self.ceilings.matmul_flops_per_second,
                mfu_datasheet=rate / DATASHEET_FLOPS,
                working_gigabytes=timing.peak_bytes / 1e9,
                segment_tokens=model.segment_tokens,
            )
        for training in trainings.values():
            training.optimizer.zero_grad(set_to_none=True)
        release_memory()

    def memory(self, preset: str) -> None:
        """Most memory allocated by one step on one long sequence, parameters and optimizer included."""
        key = self._key("memory " + preset, "resnet-bk", 1, self.plan.memory_tokens)
        if self.rows.find(**key):
            return
        release_memory()
        before = self._allocated()
        try:
            training = Training("resnet-bk", preset, self.device, None)
            run = training.step(1, self.plan.memory_tokens)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            run()
            seconds, _ = self.clock.seconds(run)
        except failures() as error:
            reason = summary(error)
            self.rows.add(**key, preset=preset, outcome=reason)
            self.clock.check_alive("resnet-bk", reason)
            return
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        self.rows.add(
            **key,
            preset=preset,
            model=training.model,
            tokens=self.plan.memory_tokens,
            milliseconds=seconds * 1e3,
            tokens_per_second=self.plan.memory_tokens / seconds,
            peak_gigabytes=(peak - before) / 1e9,
            segment_tokens=training.model.segment_tokens,
        )

    @torch.no_grad()
    def decode(self, preset: str) -> None:
        """Tokens per second of greedy decoding after short and long prompts, whole steps as one graph."""
        with torch.device(self.device):
            models = {
                kind.split()[0]: peer_models.build(kind, preset).to(torch.bfloat16).eval()
                for kind in peer_models.KINDS
                if not (self.absent and kind.startswith("mamba"))
            }
        for rows, prompt in itertools.product(self.plan.decode_rows, self.plan.prompts):
            if self.out_of_time():
                raise TimeoutError
            arms: dict[str, Run | str] = {}
            for arm in DECODERS:
                if self.rows.find(**self._key("decode", arm, rows, prompt)):
                    continue
                try:
                    arms[arm] = self._decoder(arm, models, rows, prompt)
                except failures() as error:
                    arms[arm] = reason = summary(error)
                    with self._noting_loss("decode", preset, rows, prompt):
                        self.clock.check_alive(arm, reason)
                    release_memory()
            self._decode_at(preset, arms, rows, prompt)

    def _decode_at(self, preset: str, arms: dict[str, Run | str], rows: int, prompt: int) -> None:
        runs = {name: arm for name, arm in arms.items() if not isinstance(arm, str)}
        found: dict[str, Timing | str] = {name: arm for name, arm in arms.items() if isinstance(arm, str)}
        with self._noting_loss("decode", preset, rows, prompt):
            found |= self.clock.alternate(runs, seconds=1.0, most=15, run_ahead=0.0)
        for name, timing in found.items():
            key = self._key("decode", name, rows, prompt)
            if isinstance(timing, str):
                self.rows.add(**key, preset=preset, outcome=timing)
                continue
            seconds = timing.median / self.plan.decode_steps
            self.rows.add(
                **key,
                preset=preset,
                tokens=rows * self.plan.decode_steps,
                tokens_per_second=rows / seconds,
                over_shortest=self._ratio(rows / seconds, "decode", name, rows, self.plan.prompts[0]),
                over_resnet_bk=self._ratio(rows / seconds, "decode", "resnet-bk", rows, prompt),
                milliseconds=seconds * 1e3,
                spread=timing.spread,
            )
        arms.clear()
        release_memory()

    def _decoder(self, arm: str, models: dict[str, LanguageModel], rows: int, prompt: int) -> Run | str:
        """What is timed for an arm, its prompt read and its step captured, or why it cannot run."""
        kind = arm.split(",")[0]
        if kind not in models:
            return f"peer absent: {self.absent}"
        model = models[kind]
        if kind == "resnet-bk":
            ids = torch.randint(model.config.vocab_size, (prompt,), device=self.device)
            if arm.endswith("generate"):
                return decoders.generation(model, rows, ids, self.plan.decode_steps)
            decoder = decoders.OwnDecoder(model, rows, ids)
        elif kind == "mamba-2":
            decoder = decoders.MambaDecoder(model, rows, getattr(torch, arm.split()[1]))
        else:
            needed = decoders.TransformerDecoder.cache_bytes(model, rows, prompt)
            if needed > 0.8 * self._memory_bytes():
                return f"not run: its cache would take {needed / 1e9:.0f} GB"
            decoder = decoders.TransformerDecoder(model, rows, prompt)
        return decoders.repeated(decoder, self.plan.decode_steps)

    @contextmanager
    def _noting_loss(self, part: str, preset: str, batch: int, time_: int) -> Iterator[None]:
        """Write a row for the arm that breaks the device's context, so that it is not tried again."""
        try:
            yield
        except DeviceLostError as lost:
            reason = f"{lost.reason} (the device's context was lost)"
            self.rows.add(**self._key(part, lost.arm, batch, time_), preset=preset, outcome=reason)
            raise

    def _ratio(self, speed: float, *key: Any) -> float | None:
        """Speed over that of another row, if there is one."""
        other = (self.rows.find(**self._key(*key)) or {}).get("tokens_per_second")
        return None if other is None else speed / other

    @staticmethod
    def _key(part: str, arm: str, batch: int, time_: int) -> dict[str, Any]:
        return {"part": part, "arm": arm, "batch": batch, "length_tokens": time_}

    def _memory_bytes(self) -> float:
        return torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else 8e9

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    @staticmethod
    def _resident_bytes(preset: str) -> int:
        """Parameters, gradients and moments in float32."""
        with torch.device("meta"):
            return 16 * sum(p.numel() for p in LanguageModel(ModelConfig.preset(preset)).parameters())


def main() -> None:
    """Measure, and append rows."""
    parser = argparse.ArgumentParser(description="Whole models on a GPU: training, memory and decoding.")
    add_options(parser, PARTS)
    parser.add_argument("--preset", action="append", help="presets to train; base and xl by default")
    parser.add_argument("--segment-tokens", type=int, default=Plan.segment_tokens, help="tokens worked on at once")
    arguments = parser.parse_args()
    device = settle(arguments)
    plan = TOY if arguments.toy else Plan(segment_tokens=arguments.segment_tokens)
    rows = Rows(
        "model-speed",
        out=arguments.out,
        run=arguments.run,
        device=device,
        config=plan,
        command="python benchmarks/model_speed.py" + (" --toy" if arguments.toy else ""),
        commit=arguments.commit,
        shown=COLUMNS,
    )
    torch.manual_seed(0)
    clock = Clock(device)
    ceilings = measure_ceilings(clock, copy_bytes=1 << 20, side=64) if arguments.toy else measure_ceilings(clock)
    print(f"matmul {ceilings.matmul_flops_per_second / 1e12:.4g} TFLOP/s", flush=True)
    if peers.absence() is None and not arguments.toy:
        peers.compile_candidates_together(os.cpu_count() or 1)
    bench = Bench(plan, rows, clock, ceilings, lambda seconds=0.0: out_of_time(arguments, seconds))
    parts = arguments.only or PARTS
    try:
        if "memory" in parts:
            bench.memory(plan.decode_preset)
        if "decode" in parts:
            bench.decode(plan.decode_preset)
        for preset in (arguments.preset or plan.presets) if "train" in parts else ():
            bench.train(preset)
    except DeviceLostError:
        start_again(arguments)
    except TimeoutError:
        print("The budget is spent; the same command goes on from here.")


if __name__ == "__main__":
    main()
