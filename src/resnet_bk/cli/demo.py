"""`resnet-bk demo`: a small model trained on real text, measured against baselines, and a sample of what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from resnet_bk.cli.arguments import parse_run_config

if TYPE_CHECKING:
    from resnet_bk.models.resnet_bk import LanguageModel
    from resnet_bk.training.run import RunResult

DESCRIPTION = "Train as `resnet-bk train` does, then compare with baselines, plot the loss and write a sample."
PROMPT = "def"


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk demo` with these arguments; 1 if the model did not beat the unigram baseline."""
    config = parse_run_config("demo", DESCRIPTION, arguments)

    from resnet_bk.training.checkpoint import latest_checkpoint
    from resnet_bk.training.run import train_run

    output = config.training.output_dir
    if config.training.resume and latest_checkpoint(output) is not None:
        print(f"Continuing the run in {output}; delete that folder to begin anew.")
    print(f"Training for {config.training.steps} steps on {config.data.name}.", flush=True)
    result = train_run(config)
    print(_comparison(result))
    print(f"\nLoss curve: {result.loss_curve}\nModel: {result.training.checkpoint}\n")
    print(_sample(result.model, config.training.seed))
    print(
        f"\nMore of it: resnet-bk generate --model {result.training.checkpoint} --prompt '{PROMPT}' --temperature 0.8"
    )
    return 0 if _beats_unigram(result) else 1


def _comparison(result: RunResult) -> str:
    """Bits per byte of the model and of the baselines on the same text, lowest last."""
    validation = result.training.validation
    if validation is None or validation.bits_per_byte is None:
        return "No comparison: the tokenizer does not tell the bytes behind its tokens."
    rows = {**result.baselines, "this model": validation.bits_per_byte}
    lines = [f"\nBits per byte of {validation.text_bytes:,} bytes that were not trained on (lower is better):"]
    lines += [f"  {name:<12}{bits:>8.3f}" for name, bits in sorted(rows.items(), key=lambda row: -row[1])]
    if not _beats_unigram(result):
        lines.append("The model is no better than token frequencies; train it for longer.")
    return "\n".join(lines)


def _beats_unigram(result: RunResult) -> bool:
    """Whether the model uses context at all."""
    validation, unigram = result.training.validation, result.baselines.get("unigram")
    return unigram is None or validation is None or (validation.bits_per_byte or 0.0) < unigram


def _sample(model: LanguageModel, seed: int) -> str:
    """A text that the model writes, framed."""
    text = model.generate(PROMPT, max_new_tokens=200, temperature=0.7, top_p=0.95, seed=seed)
    return f"--- a sample, after the prompt {PROMPT!r} ---\n{text}\n---"
