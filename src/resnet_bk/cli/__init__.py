"""The command `resnet-bk`: finds the subcommand, and turns every expected error into one line and exit status 2.

Nothing heavy is imported before the subcommand is known, so that help answers at once.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence

from resnet_bk.errors import ConfigError, MemoryLimitError, ResNetBKError

COMMANDS = {
    "train": "train a model from a YAML configuration",
    "plan": "predict the memory of a run, and what makes it fit",
    "generate": "continue a prompt with a trained model",
    "evaluate": "measure a trained model on a corpus",
    "benchmark": "compare models under equal conditions",
    "theory": "draw figures of the theory",
    "info": "show versions, devices and presets, or what a checkpoint holds",
    "demo": "train, compare with baselines, plot and write a sample",
}
"""Subcommand -> what it does; each is the module `resnet_bk.cli.<name>` with a function `run(arguments) -> int`."""

BAD_INPUT = 2
INTERRUPTED = 130
READER_GONE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of `resnet-bk` with these arguments (default: those of the process).

    0 = done, 2 = the input cannot be used (one line on standard error says why), 130 = interrupted, 141 = whoever
    read the output has closed it. Anything else that goes wrong is a bug and keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    notes, package = logging.StreamHandler(), logging.getLogger("resnet_bk")
    package.addHandler(notes)
    package.setLevel(logging.INFO)
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except ResNetBKError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes standard output once more when it exits; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except OSError as error:
        # Without a file name it is not about anything the user named, unless the disk is full.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        return _refuse(f"{where}{error.strerror}. Check the path, its permissions and the free space.")
    except (MemoryError, RuntimeError) as error:
        limit = _memory_limit(error)
        if limit is None:
            raise
        return _refuse(str(limit))
    finally:
        package.removeHandler(notes)


def _dispatch(arguments: list[str]) -> int:
    """Run the subcommand that the first argument names."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name == "--version":
        from resnet_bk import __version__

        print(f"resnet-bk {__version__}")
        return 0
    if name not in COMMANDS:
        from resnet_bk.models.config import unknown_key_message

        raise ConfigError(unknown_key_message(name, list(COMMANDS), what="command"))
    # Torch's threads spin while they wait for each other. On a machine that does anything else besides, the default of
    # libgomp makes a step several times slower; this many turns cost nothing on a quiet one. Read when torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    return importlib.import_module(f"resnet_bk.cli.{name}").run(rest)


def _help() -> str:
    """The text of `resnet-bk --help`."""
    lines = [
        "usage: resnet-bk COMMAND [OPTIONS]",
        "",
        "Train and use linear-time causal language models.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<10} {summary}" for name, summary in COMMANDS.items()]
    return "\n".join([*lines, "", "`resnet-bk COMMAND --help` lists the options of one; --version prints the version."])


def _refuse(message: str) -> int:
    """Print `message` on one line of standard error; the exit status for bad input."""
    print(f"resnet-bk: error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _memory_limit(error: Exception) -> MemoryLimitError | None:
    """The error to show if `error` means that memory ran out, else None.

    PyTorch has no exception type for CPU memory; its allocator's name in the message is the only mark.
    """
    text = str(error)
    on_cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or "Storage size calculation" in text
    if not on_cpu and type(error).__name__ != "OutOfMemoryError":
        return None
    size = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", text)
    asked = ""
    if size is not None:
        asked = f" One tensor asked for {size[2] or f'{int(size[1]) / 2**30:,.2f} GiB'} more."
    return MemoryLimitError(
        f"Out of memory on the {'CPU' if on_cpu else 'GPU'}.{asked} Lower the batch size, the sequence or prompt "
        "length, or the model's size."
    )
