"""What a command owes the shell: statuses, one line for an error, silence where nobody listens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from madformer.cli import main as command_line
from madformer.cli.main import main
from madformer.files.atomic import atomic_path

COMMANDS = [
    "sample --model m --grid g.png",
    "train emoji64 --out r",
    "data emoji --out d",
    "data clipart --out d",
    "data latents --data d --vae v --image-size 64 --out l",
    "export r --out x",
    "convert --checkpoint c --out x",
    "info",
    "bench --model m",
    "advise --data d --budget 9",
]


def running(monkeypatch: pytest.MonkeyPatch, body: Callable[[], None]) -> None:
    """Let every command do this in place of its own work."""
    for kind, _ in command_line.COMMANDS.values():
        monkeypatch.setattr(kind, "run", lambda request: body())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_every_command_with_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    command: str, number: signal.Signals, status: int,
) -> None:  # fmt: skip
    """One line, nothing half-written, and the process's handlers are what they were."""

    def work() -> None:
        with atomic_path(tmp_path / "file") as path:
            path.write_text("half of it")
            os.kill(os.getpid(), number)
            raise AssertionError("the signal was not heard")

    running(monkeypatch, work)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert main(command.split()) == status
    assert capsys.readouterr().err.splitlines() == [f"madformer {command.split()[0]}: interrupted"]
    assert not list(tmp_path.iterdir())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_any_thread_may_call(capsys: pytest.CaptureFixture[str]) -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(main(["info"])))
    thread.start()
    thread.join()
    assert statuses == [0]
    assert "madformer" in capsys.readouterr().out


def test_nobody_reads(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``madformer info | head``: quiet, with the status of SIGPIPE, and nothing is left to fail at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info", "--json"]) == 141
        monkeypatch.undo()
        pipe.write("more")
    assert capsys.readouterr().err == ""


def test_a_pipe_that_is_not_the_output(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Is an error like others."""

    def work() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    running(monkeypatch, work)
    assert main(["info"]) == 1
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status = main(["info", "--json"])
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert status == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-"])
def test_closed_streams_do_not_become_files(tmp_path: Path, closed: str) -> None:
    """The next file to be opened would have their number, and a library's message would go into it."""
    code = """
import os, sys
from madformer.cli.process import settle_streams
settle_streams()
with open(sys.argv[1], "wb") as file:
    print("said"); print("said", file=sys.stderr)
    sys.stdout.flush(); sys.stderr.flush()
    os.write(1, b"said"); os.write(2, b"said")
    file.write(b"a picture")
"""
    shell = f'"$0" -c "$1" "$2" {closed}'
    subprocess.run(["sh", "-c", shell, sys.executable, code, str(tmp_path / "file")], check=True, capture_output=True)
    assert (tmp_path / "file").read_bytes() == b"a picture"


@pytest.mark.parametrize(
    "arguments", ["", "smaple", "sample", "sample --model m --num-images x", "sample --model m --steps", "info --no"]
)
def test_what_cannot_be_parsed_is_one_line(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("madformer")
    assert ": error: " in line


WITHOUT_FCNTL = """
import sys
sys.modules["fcntl"] = None  # as on Windows: importing it raises ModuleNotFoundError
from madformer.cli.main import main
from madformer.files.atomic import atomic_path
try:
    with atomic_path("made/file"):
        raise AssertionError("a file is written that nothing locks")
except OSError as error:
    print(error)
sys.exit(main(["data", "emoji", "--out", "made"]))
"""


def test_a_system_without_unix_locks_is_refused_in_one_line(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_FCNTL], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    (line,), (shown,) = run.stdout.splitlines(), run.stderr.splitlines()
    assert re.fullmatch("files are written under locks of Linux and macOS, .* no fcntl; on Windows use WSL", line)
    assert shown == f"madformer: error: {line}"
    assert not list(tmp_path.iterdir())


def test_apples_gpu_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", "m", "--device", "mps"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("madformer bench: error: --device mps: Apple's GPUs are not supported; --device cpu")
