"""`resnet-bk generate`: text from a trained model, printed as it is written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_bk.cli.arguments import Parser
from resnet_bk.errors import ConfigError, DataError

DESCRIPTION = "Continue a prompt with a trained model. Without a prompt, a new document is begun."

# Options that are fields of `GenerationConfig`; one that is not given is left to the model's own configuration.
_SAMPLING: dict[str, tuple[type, str]] = {
    "max-new-tokens": (int, "Most tokens to write."),
    "temperature": (float, "Logits are divided by this; 0 takes the most likely token."),
    "top-k": (int, "Sample from the k most likely tokens only; 0 keeps all."),
    "top-p": (float, "Sample from the smallest set of tokens with at least this probability."),
    "repetition-penalty": (float, "Divides positive and multiplies negative logits of tokens seen; 1 does nothing."),
    "seed": (int, "Same seed, same prompt: same text."),
}


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk generate` with these arguments."""
    parser = Parser("generate", description=DESCRIPTION, usage="resnet-bk generate --model FOLDER [OPTIONS]")
    parser.add_argument("--model", type=str, required=True, help="Folder of a model or checkpoint, or its hub name.")
    parser.add_argument("--base", type=str, default=None, help="Base model of adapters, if it was moved.")
    parser.add_argument("--prompt", type=str, default=None, help="Text to continue; printed before the continuation.")
    parser.add_argument("--prompt-file", type=str, default=None, help="UTF-8 file to continue; it is not printed.")
    for name, (kind, text) in _SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, default=None, help=text)
    parser.add_argument("--stop", type=str, action="append", default=[], help="Text that ends the output; repeatable.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N.")
    options = parser.parse(arguments)

    from resnet_bk.models.generate import stream
    from resnet_bk.models.resnet_bk import LanguageModel
    from resnet_bk.training.device import resolve_device

    sampling: dict[str, Any] = {name.replace("-", "_"): options[name.replace("-", "_")] for name in _SAMPLING}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if options.stop:
        sampling["stop_strings"] = options.stop
    # Read before the model, which may take long to load.
    prompt: str | list[int] | None = _prompt(options.prompt, options.prompt_file)
    model = LanguageModel.from_pretrained(options.model, device=resolve_device(options.device), base=options.base)
    if model.tokenizer is None:
        raise DataError(f"{options.model} has no tokenizer.json; put the tokenizer that it was trained with there.")
    if prompt is None:
        if model.tokenizer.end_of_text_id is None:
            raise ConfigError("Its tokenizer has no end-of-text token to begin a document with; give --prompt.")
        prompt = [model.tokenizer.end_of_text_id]
    tokens = stream(model, prompt, **sampling)
    if options.prompt is not None:
        print(options.prompt, end="", flush=True)
    for token in tokens:
        sys.stdout.write(token.text)
        sys.stdout.flush()
    print()
    return 0


def _prompt(text: str | None, file: str | None) -> str | None:
    """The prompt given as text or as a file; None for neither."""
    if text is not None and file is not None:
        raise ConfigError("--prompt and --prompt-file are both given; give one of them.")
    if file is None:
        return text

    from resnet_bk.data.files import read_text

    prompt = read_text(Path(file))
    if not prompt:
        raise DataError(f"{file} is empty; expected the text to continue.")
    return prompt
