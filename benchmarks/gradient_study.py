"""What the gradient of the full diagonal is worth: exact, diagonal-only, and both blended with the 1/G^2 heuristic.

    python benchmarks/gradient_study.py                 # every blend, three seeds: about five minutes on one thread
    python benchmarks/gradient_study.py --seeds 0 --steps 20 --no-rows

Trains a tiny bidirectional model to restore masked bytes of the embedded corpus, with one learning rate and one order
of batches for all arms, and no clipping, so that AdamW removes the scale of each gradient. The arm "frozen" never
trains the media: what a gradient is worth is measured from there. Reported: masked-token cross-entropy in nats on
held-out text (never next-token perplexity: the full diagonal reads the future), the cosine of the media's gradient to
the exact one and its relative variance over batches, both along the arm's own run, and processor time a step. One row
an arm in `benchmarks/results/gradient-study.jsonl`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.data.config import DataConfig
from resnet_bk.data.sources import open_corpus
from resnet_bk.evaluation.ledger import append_row
from resnet_bk.theory.gradient_study import blended_full_diagonal, gradient_cosine, relative_gradient_variance

BLENDS = (0.0, 0.3, 0.5, 0.7, 1.0)
MASK = 256
CONFIG = {
    "d_model": 64, "heads": 32, "layers": 2, "feed_forward": 128, "sites": 64, "batch": 16, "mask_share": 0.15,
    "learning_rate": 3e-3, "absorption_floor": 0.05, "train_bytes": 2_000_000,
    "validation_bytes": 65_536, "probes": 4, "variance_batches": 8,
}  # fmt: skip


class Core(nn.Module):
    """Bidirectional mixing: every site gets its entry of the resolvent's diagonal, for each head's own medium."""

    def __init__(self) -> None:
        super().__init__()
        self.medium = nn.Linear(CONFIG["d_model"], 2 * CONFIG["heads"])
        self.out = nn.Linear(2 * CONFIG["heads"], CONFIG["d_model"])
        self.blend: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        detuning, absorption = self.medium(x).chunk(2, dim=-1)
        diagonal = blended_full_diagonal(
            2 * detuning, F.softplus(absorption) + CONFIG["absorption_floor"], **self.blend
        )
        return self.out(torch.view_as_real(diagonal).flatten(-2))


class MaskedModel(nn.Module):
    """Bytes in, logits of the masked bytes out."""

    def __init__(self) -> None:
        super().__init__()
        width = CONFIG["d_model"]
        self.embedding = nn.Embedding(MASK + 1, width)
        self.cores = nn.ModuleList(Core() for _ in range(CONFIG["layers"]))
        self.core_norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(CONFIG["layers"]))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(CONFIG["layers"]))
        hidden = CONFIG["feed_forward"]
        self.feed_forwards = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(CONFIG["layers"])
        )
        self.head = nn.Linear(width, MASK)

    def loss(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """Mean cross-entropy of the masked bytes in nats."""
        x = self.embedding(tokens.masked_fill(masked, MASK))
        for core, core_norm, norm, forward in zip(
            self.cores, self.core_norms, self.norms, self.feed_forwards, strict=True
        ):
            x = x + core(core_norm(x))
            x = x + forward(norm(x))
        return F.cross_entropy(self.head(x[masked]), tokens[masked])

    def set_blend(self, **blend: Any) -> None:
        """Choose the gradient of every core."""
        for core in self.cores:
            core.blend = blend  # pyright: ignore

    def medium_gradient(self, batch: tuple[Tensor, Tensor], **blend: Any) -> list[Tensor]:
        """Gradient of the loss in the parameters that make the media, the only ones that the choice can turn first."""
        self.set_blend(**blend)
        medium = [p for core in self.cores for p in core.medium.parameters()]  # pyright: ignore
        return list(torch.autograd.grad(self.loss(*batch), medium))


def read_bytes(split: str, limit: int) -> Tensor:
    """The first `limit` bytes of a split of the embedded corpus, int64."""
    found = bytearray()
    for document in open_corpus(DataConfig(name="python-stdlib")).documents(split):
        found += document.text.encode()
        if len(found) >= limit:
            break
    return torch.frombuffer(found[:limit], dtype=torch.uint8).long()


def draw(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch of windows and which of their bytes are masked."""
    sites = CONFIG["sites"]
    starts = torch.randint(len(text) - sites, (CONFIG["batch"], 1), generator=generator)
    tokens = text[starts + torch.arange(sites)]
    return tokens, torch.rand(tokens.shape, generator=generator) < CONFIG["mask_share"]


@torch.no_grad()
def validate(model: MaskedModel, text: Tensor) -> float:
    """Masked cross-entropy over all windows of `text`, one mask for every arm and seed."""
    generator = torch.Generator().manual_seed(1234)
    windows = text[: len(text) // CONFIG["sites"] * CONFIG["sites"]].view(-1, CONFIG["sites"])
    masked = torch.rand(windows.shape, generator=generator) < CONFIG["mask_share"]
    total = torch.zeros(())
    for tokens, hidden in zip(windows.split(128), masked.split(128), strict=True):
        total += model.loss(tokens, hidden) * hidden.sum()
    return float(total / masked.sum())


def run(seed: int, steps: int, blend: dict[str, Any] | None, train: Tensor, validation: Tensor) -> dict[str, float]:
    """Train one arm with one seed; its figures. Without a blend the media stay as they were drawn."""
    torch.manual_seed(seed)
    model = MaskedModel()
    media = {id(p) for core in model.cores for p in core.medium.parameters()}  # pyright: ignore
    trained = [p for p in model.parameters() if blend is not None or id(p) not in media]
    optimizer = torch.optim.AdamW(trained, lr=CONFIG["learning_rate"])
    order, probe = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(10_000 + seed)
    seconds, cosines = [], []
    for step in range(steps):
        if step % max(1, steps // CONFIG["probes"]) == 0:
            batch = draw(train, probe)
            cosines.append(gradient_cosine(model.medium_gradient(batch), model.medium_gradient(batch, **(blend or {}))))
        for group in optimizer.param_groups:
            group["lr"] = CONFIG["learning_rate"] * min(1, (step + 1) / 20, (steps - step) / (0.5 * steps))
        model.set_blend(**(blend or {}))
        batch = draw(train, order)
        began = time.process_time()  # other processes on the machine do not count
        optimizer.zero_grad(set_to_none=True)
        model.loss(*batch).backward()
        optimizer.step()
        seconds.append(time.process_time() - began)
    found = {
        "masked_nats": validate(model, validation),
        "processor_milliseconds_a_step": 1e3 * statistics.median(seconds),
    }
    if blend is None:
        return found
    samples = [model.medium_gradient(draw(train, probe), **blend) for _ in range(CONFIG["variance_batches"])]
    return found | {
        "cosine_first": cosines[0],
        "cosine_mean": statistics.mean(cosines),
        "gradient_variance": relative_gradient_variance(samples),
    }


def main() -> None:
    """Run every arm and append its row."""
    parser = argparse.ArgumentParser(description="The gradient of the full diagonal: exact against approximations.")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-rows", action="store_true", help="print only, append nothing to the ledger")
    arguments = parser.parse_args()
    train, validation = (read_bytes(s, CONFIG[f"{s}_bytes"]) for s in ("train", "validation"))
    counts = torch.bincount(train, minlength=MASK).double() + 1
    floor = float(-(counts / counts.sum()).log()[validation].mean())
    print(f"unigram cross-entropy of the validation bytes: {floor:.4f} nats")
    seeds = " ".join(map(str, arguments.seeds))
    command = f"python benchmarks/gradient_study.py --steps {arguments.steps} --seeds {seeds}"
    # At alpha 1 the heuristic is alone, whatever the base.
    arms = [(base, alpha) for base, alpha in itertools.product(("exact", "diagonal"), BLENDS) if alpha < 1]
    for base, alpha in [*arms, ("heuristic", 1.0), ("frozen", None)]:
        blend = None if alpha is None else {"grad_blend": alpha}
        if base in ("exact", "diagonal"):
            blend = {"base": base, "grad_blend": alpha}
        began = time.perf_counter()
        runs = [run(seed, arguments.steps, blend, train, validation) for seed in arguments.seeds]
        wall = time.perf_counter() - began
        metrics: dict[str, Any] = {"base": base, "alpha": alpha, "steps": arguments.steps, "unigram_nats": floor}
        for name in runs[0]:
            values = [figures[name] for figures in runs]
            metrics[name] = statistics.mean(values)
            if name in ("masked_nats", "cosine_mean", "gradient_variance"):
                metrics[f"{name}_spread"] = max(values) - min(values)
        shown = {name: round(value, 4) if isinstance(value, float) else value for name, value in metrics.items()}
        print(shown, flush=True)
        if not arguments.no_rows:
            append_row(
                "gradient-study",
                command=command,
                config={**CONFIG, "steps": arguments.steps},
                seeds=arguments.seeds,
                metrics=metrics,
                wall_seconds=wall,
                model=MaskedModel(),
                tokens=arguments.steps * CONFIG["batch"] * CONFIG["sites"],
            )


if __name__ == "__main__":
    main()
