"""`resnet-bk theory figures`: figures of the theory, and of what a text is to a model's heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from resnet_bk.cli.arguments import Parser
from resnet_bk.errors import ConfigError

DESCRIPTION = (
    "Draw the theory, each figure as PNG and SVG: phase portraits, density of states, decay of the kernel against its "
    "bound, spectral shift of a text token by token, limiting absorption, level spacings."
)


def run(arguments: Sequence[str]) -> int:
    """Exit status of `resnet-bk theory` with these arguments."""
    parser = Parser("theory", description=DESCRIPTION, usage="resnet-bk theory figures --out FOLDER [OPTIONS]")
    parser.add_argument("action", type=Literal["figures"], help="What to do: figures.")
    parser.add_argument("--out", type=str, required=True, help="Folder to write to; created if missing.")
    parser.add_argument(
        "--model", type=str, default=None, help="Model for the spectral shift; default word surprisals."
    )
    parser.add_argument("--text", type=str, default=None, help="Text for the spectral shift; default a sentence.")
    parser.add_argument("--layer", type=int, default=0, help="Layer of the model, counted from 0.")
    options = parser.parse(arguments)
    if options.model is None and options.layer != 0:
        raise ConfigError(f"--layer is {options.layer} without --model; name the model whose layer it is.")

    from resnet_bk.evaluation.theory_figures import draw_theory_figures
    from resnet_bk.evaluation.token_medium import SENTENCE, medium_of_model, medium_of_words

    text = SENTENCE if options.text is None else options.text
    if options.model is None:
        medium = medium_of_words(text)
    else:
        from resnet_bk.models.resnet_bk import LanguageModel

        medium = medium_of_model(LanguageModel.from_pretrained(options.model), text, layer=options.layer)
    for path in draw_theory_figures(options.out, medium=medium):
        print(path)
    return 0
