"""A visit to a GPU, as stages that cannot harm one another, and a journal that no cut can empty.

Every stage is a process of its own under a hard limit, so that an error of CUDA's, a hang or a kill ends that stage
alone. What a stage finds it sends line by line through a pipe (:func:`emit`). Each line is appended to a journal at
once; the records are made of the journal, and are written whole or not at all. A second visit reads the journal and
goes on where the first was cut.

Nothing here imports torch: what keeps the books must outlive what it looks at.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

Entry = dict[str, Any]
PIPE, JOURNAL = "MADFORMER_VISIT_PIPE", "MADFORMER_VISIT_JOURNAL"
"""Environment variables of a stage: the number of the pipe that it sends entries through, and the journal so far."""
LIMIT = "MADFORMER_VISIT_SECONDS"
"""How long a stage has: it may leave out what would take longer."""
GRACE = 2.0
"""Seconds between a limit, which is told by SIGTERM, and the kill."""


@dataclass(frozen=True)
class Stage:
    """One process of a visit.

    Attributes:
        command: what is run.
        limit: seconds after which it is ended.
        least: seconds without which it is not begun.
        restarts: how often it is begun again, in what is left of its limit, after an error or a kill that came when it
            had found something. It is then its own task to leave alone what broke it.
    """

    name: str
    command: Sequence[str]
    limit: float
    least: float = 5.0
    restarts: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a stage ended.

    Attributes:
        status: ``done``, ``failed`` (a non-zero exit), ``killed`` (by a signal), ``out of time`` or ``not begun``.
        reason: one line; empty where it is done.
    """

    status: str
    reason: str
    seconds: float


class Journal:
    """Entries: lines of JSON whose ``kind`` says what they are. One that was cut counts for nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes() if path.is_file() else b""
        self.entries: list[Entry] = list(_entries(data))
        self._torn = bool(data) and not data.endswith(b"\n")

    def append(self, entry: Entry) -> None:
        """Returns when the entry is on the disk."""
        line = json.dumps(entry).encode() + b"\n"
        with self.path.open("ab") as file:
            file.write(b"\n" + line if self._torn else line)
            self._torn = True  # should the flush not come to its end
            file.flush()
            os.fsync(file.fileno())
        self._torn = False
        self.entries.append(entry)


def _entries(data: bytes) -> Iterator[Entry]:
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and "kind" in entry:
                yield entry


def write_whole(text: str, path: Path) -> None:
    """The file holds either what it held or all of ``text``, whenever the process or the machine stops."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# A stage's side


def emit(entry: Entry) -> None:
    """Send an entry to the visit; outside of one it is printed."""
    line = json.dumps(entry)
    if PIPE in os.environ:
        os.write(int(os.environ[PIPE]), line.encode() + b"\n")
    else:
        print(line, flush=True)


def known() -> list[Entry]:
    """What this and earlier visits have found already."""
    return Journal(Path(os.environ[JOURNAL])).entries if JOURNAL in os.environ else []


def seconds_left(started: float) -> float:
    """Until this stage's limit; ``started`` by ``time.monotonic()``."""
    return float(os.environ.get(LIMIT, "inf")) - (time.monotonic() - started)


# The visit's side


class Visit:
    """Runs stages one after the other.

    Args:
        folder: where the journal ``visit.jsonl``, the log ``visit.log`` and the records lie.
        records: makes each record, by file name, of all entries.
        budget: seconds of all stages together.
    """

    def __init__(
        self, folder: Path, records: Callable[[Sequence[Entry]], Mapping[str, Any]], budget: float = float("inf")
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in folder.glob("*.tmp"):
            left_by_a_kill.unlink()
        self.folder, self.records = folder, records
        self.journal = Journal(folder / "visit.jsonl")
        self.deadline = time.monotonic() + budget

    def run(self, stages: Iterable[Stage]) -> list[tuple[Stage, Outcome]]:
        """Every stage that there is time for."""
        outcomes = []
        self.rewrite()  # of a journal that an earlier visit left
        for stage in stages:
            outcome = self._persist(stage)
            outcomes.append((stage, outcome))
            print(f"== {stage.name}: {outcome.status} after {outcome.seconds:.1f} s {outcome.reason}", flush=True)
            ended = {"status": outcome.status, "reason": outcome.reason, "seconds": round(outcome.seconds, 2)}
            self.add({"kind": "stage", "stage": stage.name, **ended})
        return outcomes

    def add(self, entry: Entry) -> None:
        self.journal.append(entry)
        if entry["kind"] != "test":  # There are thousands, and one says little: the end of the stage is soon enough.
            self.rewrite()

    def rewrite(self) -> None:
        """All records; one that cannot be made or written is said on stderr, and costs nothing else."""
        try:
            for name, record in self.records(self.journal.entries).items():
                write_whole(json.dumps(record, indent=1) + "\n", self.folder / name)
        except Exception as error:
            print(f"visit: a record is not rewritten: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def _persist(self, stage: Stage) -> Outcome:
        started = time.monotonic()
        for attempt in range(stage.restarts + 1):
            before = len(self.journal.entries)
            taken = time.monotonic() - started
            outcome = self._run(replace(stage, limit=stage.limit - taken))
            broken, found = outcome.status in ("failed", "killed"), len(self.journal.entries) > before
            over = stage.limit - (time.monotonic() - started) < stage.least
            if not (broken and found) or over or attempt == stage.restarts:
                break
            print(f"== {stage.name}: {outcome.status} ({outcome.reason}), begun again", flush=True)
        return replace(outcome, seconds=time.monotonic() - started)

    def _run(self, stage: Stage) -> Outcome:
        left = self.deadline - time.monotonic()
        if left < stage.least:
            return Outcome("not begun", f"{max(left, 0):.0f} s are left and it needs {stage.least:.0f}", 0.0)
        print(f"== {stage.name}: at most {min(left, stage.limit):.0f} s", flush=True)
        with (self.folder / "visit.log").open("ab") as log:
            log.write(f"== {stage.name}\n".encode())
            return run_stage(stage, min(left, stage.limit), self.add, log, self.journal.path)


def run_stage(stage: Stage, limit: float, on_entry: Callable[[Entry], None], log: IO[bytes], journal: Path) -> Outcome:
    """One stage; its entries as they come, all that it prints into ``log`` and to stdout.

    Whatever it started is ended with it.
    """
    started = time.monotonic()
    read, write = os.pipe()
    environment = {**os.environ, PIPE: str(write), JOURNAL: str(journal), LIMIT: f"{limit:.1f}"}
    try:
        process = subprocess.Popen(
            stage.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        os.close(read)
        return Outcome("failed", str(error), time.monotonic() - started)
    finally:
        os.close(write)
    assert process.stdout is not None
    lines = Lines(on_entry)
    sinks: dict[int, Callable[[bytes], None]] = {read: lines.feed, process.stdout.fileno(): _to(log)}
    try:
        in_time = _pump(process, sinks, started + limit)
        if not in_time:
            _end(process, signal.SIGTERM)
            _pump(process, sinks, time.monotonic() + GRACE)
    finally:
        _end(process, signal.SIGKILL)
        os.close(read)
        process.stdout.close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # A process may hang in the driver, which no kill reaches.
        process.wait(timeout=10)
    return _outcome(process.returncode, in_time, limit, lines.faults, time.monotonic() - started)


def _outcome(code: int | None, in_time: bool, limit: float, faults: list[str], seconds: float) -> Outcome:
    if not in_time:
        return Outcome("out of time", f"its {limit:.0f} s are over", seconds)
    if code is not None and code < 0:
        return Outcome("killed", signal.Signals(-code).name, seconds)
    if code != 0:
        return Outcome("failed", f"exit status {code}", seconds)
    return Outcome("failed" if faults else "done", faults[0] if faults else "", seconds)


class Lines:
    """Cuts what comes through a pipe into entries; a last line without an end is none."""

    def __init__(self, on_entry: Callable[[Entry], None]) -> None:
        self.on_entry, self.rest, self.faults = on_entry, b"", list[str]()

    def feed(self, data: bytes) -> None:
        *whole, self.rest = (self.rest + data).split(b"\n")
        for line in whole:
            found = list(_entries(line))
            if not found:
                self.faults.append(f"sent what is no entry: {line[:60]!r}")
            for entry in found:
                self.on_entry(entry)


def _to(log: IO[bytes]) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        log.write(data)
        log.flush()
        sys.stdout.write(data.decode(errors="replace"))
        sys.stdout.flush()

    return write


def _pump(process: subprocess.Popen[bytes], sinks: dict[int, Callable[[bytes], None]], deadline: float) -> bool:
    """Feed the sinks until the process has ended, or until the deadline: whether it ended before."""
    with selectors.DefaultSelector() as selector:
        for descriptor in sinks:
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None  # before the last look, so that nothing is missed
            waiting = 0.0 if ended else max(0.0, min(0.1, deadline - time.monotonic()))
            heard = False
            for key, _ in selector.select(waiting):
                data = os.read(key.fd, 1 << 16)
                heard = heard or bool(data)
                if data:
                    sinks[key.fd](data)
                else:
                    selector.unregister(key.fd)
            if ended and not heard:
                return True
            if not ended and time.monotonic() >= deadline:
                return False


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)
