"""What the command does with errors: one line and status 2 for bad input, a traceback for bugs."""

from __future__ import annotations

import errno
import subprocess
import sys
import time

import pytest

from resnet_bk import cli
from resnet_bk.errors import DataError


def run_process(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "resnet_bk", *arguments], capture_output=True, text=True, timeout=120, **options
    )


@pytest.fixture
def failing(monkeypatch):
    """A main that dispatches to a function raising the given error."""

    def install(error: BaseException):
        def dispatch(arguments):
            raise error

        monkeypatch.setattr(cli, "_dispatch", dispatch)

    return install


def test_help_is_fast_and_imports_no_torch():
    code = "import sys; from resnet_bk.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    started = time.perf_counter()
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0
    assert all(name in process.stdout for name in cli.COMMANDS)
    assert time.perf_counter() - started < 5, "a second at most on an idle machine; 5 leaves room for a busy one"


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_of_a_command_imports_no_torch(command):
    code = (
        "import sys\nfrom resnet_bk.cli import main\n"
        f"try: main(['{command}', '--help'])\nexcept SystemExit as leaving: assert leaving.code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert f"resnet-bk {command}" in process.stdout


def test_module_and_version():
    process = run_process("--version")
    assert (process.returncode, process.stdout.split()[0]) == (0, "resnet-bk")


def test_unknown_command_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "resnet-bk: error: Unknown command 'trian'; did you mean 'train'?\n"


def test_expected_error_is_one_line(failing, capsys):
    failing(DataError("first\n  second"))
    assert cli.main([]) == 2
    assert capsys.readouterr().err == "resnet-bk: error: first second\n"


def test_missing_file_is_named(failing, capsys):
    failing(FileNotFoundError(errno.ENOENT, "No such file or directory", "nowhere.yaml"))
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("resnet-bk: error: nowhere.yaml: No such file or directory.")


def test_full_disk_is_bad_luck_and_not_a_bug(failing, capsys):
    failing(OSError(errno.ENOSPC, "No space left on device"))
    assert cli.main([]) == 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("bug", [OSError(errno.EBADF, "Bad file descriptor"), RuntimeError("shape"), TypeError("None")])
def test_bugs_keep_their_traceback(failing, bug):
    failing(bug)
    with pytest.raises(type(bug)):
        cli.main([])


def test_interrupt(failing, capsys):
    failing(KeyboardInterrupt())
    assert cli.main([]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_out_of_memory_on_the_cpu_is_bad_input(monkeypatch, capsys):
    import torch

    def dispatch(arguments):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(cli, "_dispatch", dispatch)
    assert cli.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Out of memory on the CPU. One tensor asked for 1,073,741,824.00 GiB more. Lower the batch size" in error


def test_out_of_memory_on_the_gpu_is_bad_input(failing, capsys):
    import torch

    failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."))
    assert cli.main([]) == 2
    assert "Out of memory on the GPU. One tensor asked for 2.50 GiB more." in capsys.readouterr().err


def test_closed_pipe_is_quiet():
    code = (
        "import sys\nfrom resnet_bk import cli\n"
        "cli._dispatch = lambda arguments: print('x\\n' * 1_000_000) or 0\nsys.exit(cli.main([]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
