"""`resnet-bk info`: versions, devices and presets, or what a checkpoint holds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from resnet_bk.cli.arguments import Parser

DESCRIPTION = "Show versions, devices and presets; with --model, what a checkpoint holds."


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk info` with these arguments."""
    parser = Parser("info", description=DESCRIPTION)
    parser.add_argument("--model", type=str, default=None, help="Folder of a model or checkpoint, or its hub name.")
    parser.add_argument("--base", type=str, default=None, help="Base model of adapters, if it was moved.")
    options = parser.parse(arguments)
    lines = _installation() if options.model is None else _checkpoint(options.model, options.base)
    print("\n".join(lines))
    return 0


def _installation() -> Iterable[str]:
    """Versions, devices and presets."""
    import torch

    from resnet_bk import __version__
    from resnet_bk.evaluation.ledger import library_versions
    from resnet_bk.models.config import PRESETS, ModelConfig
    from resnet_bk.models.resnet_bk import LanguageModel

    yield f"resnet-bk {__version__}"
    yield ", ".join(f"{name} {version}" for name, version in library_versions().items() if name != "resnet_bk")
    yield f"cpu: {torch.get_num_threads()} threads, {os.cpu_count()} cores"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {device.name}, {device.total_memory / 2**30:.0f} GiB"
    yield ""
    yield f"{'preset':<8}{'parameters':>16}{'less embeddings':>18}{'width':>8}{'layers':>8}{'vocabulary':>12}"
    for name in PRESETS:
        config = ModelConfig.preset(name)
        # Shapes alone: the larger presets do not fit everywhere.
        with torch.device("meta"):
            model = LanguageModel(config)
        yield (
            f"{name:<8}{model.num_parameters():>16,}{model.num_parameters(embeddings=False):>18,}"
            f"{config.d_model:>8}{config.num_layers:>8}{config.vocab_size:>12,}"
        )


def _checkpoint(source: str, base: str | None) -> Iterable[str]:
    """What the model in `source` is, and how far its training came."""
    from resnet_bk.models.resnet_bk import LanguageModel
    from resnet_bk.training.saving.state import STATE_FILE, read_state

    model = LanguageModel.from_pretrained(source, base=base)
    config, folder = model.config, Path(source)
    yield f"{source}: {model.num_parameters():,} parameters, {str(model.output_weight.dtype).removeprefix('torch.')}"
    if model.adapters is not None:
        values = model.adapters.to_dict()
        yield f"adapters of rank {values['rank']} on {values['base']}, checksum {values['base_sha256'][:12]}"
    if (folder / STATE_FILE).is_file():
        state = read_state(folder)
        yield f"training checkpoint: step {state['step']}, {state['tokens']:,} tokens read"
    tokenizer = "none" if model.tokenizer is None else f"{model.tokenizer.vocab_size:,} tokens"
    yield f"tokenizer: {tokenizer}"
    yield ""
    yield from (f"{name:<18} {value}" for name, value in config.to_dict().items())
