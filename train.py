"""`python train.py --config FILE --dataset NAME`, also under torchrun: the command `resnet-bk train` as a script.

`--dataset` is short for `--data.name`; every other argument goes through unchanged.
"""

from __future__ import annotations

import sys

from resnet_bk.cli import main

# Common spellings of the corpora that have a name of their own here.
CORPORA = {"wikitext2": "wikitext-2", "wikitext_2": "wikitext-2"}


def translate(arguments: list[str]) -> list[str]:
    """The arguments of `resnet-bk train` for those of this script."""
    translated: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option == "--dataset":
            argument = f"--data.name{equals}{CORPORA.get(value, value)}"
        elif translated and translated[-1] == "--data.name":
            argument = CORPORA.get(argument, argument)
        translated.append(argument)
    return translated


if __name__ == "__main__":
    sys.exit(main(["train", *translate(sys.argv[1:])]))
