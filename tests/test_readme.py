"""Every command and every Python block of the README is executed; one that nothing here runs fails.

The commands run as written, in order, but small: `resnet-bk train` gets the options `TOY` appended, `make demo` gets
options through the variable DEMO_OPTIONS, and `make test` runs one test file through the variable TESTS.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_bk.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TOY = (
    "--data.max_bytes=200000 --training.steps=2 --training.warmup_steps=1 --training.sequence_length=32 "
    "--training.batch_size=2 --training.evaluation_tokens=512 --training.device=cpu"
).split()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder that looks like a checkout to the commands, with a cache of its own."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


@pytest.fixture(autouse=True)
def inside(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))


def run_make(target: str, **variables: str) -> str:
    """What `make TARGET` prints, with the environment of this test run in place of .venv."""
    settings = {"VENV": sys.prefix, **variables}
    # `-o setup`: this environment is complete, and a test installs nothing.
    command = ["make", "-o", "setup", target, *(f"{name}={value}" for name, value in settings.items())]
    # Workers of a parallel test run tell their children to be workers too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV_"))}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def check_demo(arguments: list[str], workplace: Path) -> None:
    # Enough steps to beat the unigram model, which the exit status tells.
    options = [*TOY, "--training.steps=100", "--training.sequence_length=128", "--training.batch_size=8"]
    options += ["--training.learning_rate=1e-2", f"--training.output_dir={workplace / 'demo'}"]
    output = run_make("demo", DEMO_OPTIONS=" ".join(options))
    for part in ("unigram", "xz", "this model", "loss.png", "a sample"):
        assert part in output


def check_test(arguments: list[str], workplace: Path) -> None:
    assert "passed" in run_make("test", TESTS="tests/test_configs.py", WORKERS="0")


def check_train(arguments: list[str], workplace: Path) -> None:
    assert main([*arguments, *TOY]) == 0
    # The commands that follow name the checkpoint of the whole run.
    (workplace / "runs" / "tiny" / "step-000002").rename(workplace / "runs" / "tiny" / "step-002000")


def check_generate(arguments: list[str], workplace: Path) -> None:
    assert main(arguments) == 0


def check_evaluate(arguments: list[str], workplace: Path) -> None:
    assert main([*arguments, "--tokens=512"]) == 0


def check_info(arguments: list[str], workplace: Path) -> None:
    assert main(arguments) == 0


def check_benchmark(arguments: list[str], workplace: Path) -> None:
    small = {
        "compare": [*TOY, "--seeds=0", "--rates=1e-3", "--curve-points=1"],
        "synthetic": ["--task.steps=1", "--task.tokens_per_step=64", "--task.evaluation_tokens=64", "--seeds=0"],
        "report": [],
    }
    sizes = ["--model.d_model=32", "--model.num_layers=1", "--model.head_dim=16", "--model.state_size=16"]
    if arguments[1] != "report":
        small[arguments[1]] += [*sizes, "--model.attention_head_dim=16"]
    assert main([*arguments, *small[arguments[1]]]) == 0


CHECKS = {
    "make demo": check_demo,
    "make test": check_test,
    "resnet-bk train": check_train,
    "resnet-bk generate": check_generate,
    "resnet-bk evaluate": check_evaluate,
    "resnet-bk info": check_info,
    "resnet-bk benchmark": check_benchmark,
}


@pytest.mark.slow
def test_every_command_runs(workplace, capsys):
    assert len(COMMANDS) >= len(CHECKS)
    for command in COMMANDS:
        program, name, *options = shlex.split(command)
        check = CHECKS.get(f"{program} {name}")
        assert check is not None, f"README shows {command!r}, which no test runs; add it to CHECKS"
        arguments = [name, *options] if program == "resnet-bk" else options
        check(arguments, workplace)
        capsys.readouterr()


def test_every_command_has_a_check():
    assert {" ".join(shlex.split(command)[:2]) for command in COMMANDS} == set(CHECKS)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.split("\n")[0])
def test_every_python_block_runs(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_commands_in_the_text_exist():
    """`make TARGET` and `resnet-bk COMMAND` between backticks name real targets and commands."""
    from resnet_bk.cli import COMMANDS as SUBCOMMANDS

    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    inline = re.findall(r"`(make|resnet-bk) ([\w-]+)", README)
    assert inline
    for program, name in inline:
        assert name in (targets if program == "make" else SUBCOMMANDS) or name == "COMMAND", f"{program} {name}"
