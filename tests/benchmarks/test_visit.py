"""A visit to a GPU, rehearsed: stages that raise, hang, send nonsense, give a wrong result or are killed, and the visit
itself killed in each stage and in the middle of writing. Nothing that was found may be lost, and a second visit must
complete the first. The device is a stand-in: a script that sends rows.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import visit
from benchmarks.visit import Entry, Journal, Stage, Visit, write_whole

ROOT = Path(visit.__file__).parents[1]

# A stage of five rows that skips what is known, as gpu_stages.py does, and fails at the third in the way it is told.
DEVICE = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from benchmarks.visit import emit, known
name, fault = sys.argv[2:4]
done = {entry["row"] for entry in known() if entry["kind"] == "row"}
begun = {entry["row"] for entry in known() if entry["kind"] == "begun"} - done
rows = [f"{name} {index}" for index in range(5)]
for row in sorted((row for row in rows if row not in done), key=lambda row: row in begun):
    emit({"kind": "begun", "row": row})
    if row == f"{name} 2" and not (row in begun and fault.endswith("once")):
        if fault.startswith("raise"): raise RuntimeError("planted")
        if fault.startswith("hang"): time.sleep(60)
        if fault.startswith("kill"): os.kill(os.getpid(), 9)
        if fault.startswith("deaf"):
            import signal
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        if fault == "nonsense":
            os.write(int(os.environ["MADFORMER_VISIT_PIPE"]), b"no entry\\n")
        if fault == "orphan":
            os.fork() or time.sleep(60)
    emit({"kind": "row", "row": row, "ok": fault != "wrong" or row != f"{name} 2"})
    print("did", row, flush=True)
"""


def stage(folder: Path, name: str, fault: str = "", limit: float = 20.0, **options: Any) -> Stage:
    script = folder / "device.py"
    script.write_text(DEVICE)
    return Stage(name, (sys.executable, "-S", str(script), str(ROOT), name, fault or "none"), limit, **options)


def rows(entries: Sequence[Entry]) -> dict[str, Any]:
    """The record: rows by name, once each."""
    return {"rows.json": {entry["row"]: entry["ok"] for entry in entries if entry["kind"] == "row"}}


def record(folder: Path) -> dict[str, bool]:
    return json.loads((folder / "out" / "rows.json").read_text())


def all_rows(*names: str) -> set[str]:
    return {f"{name} {index}" for name in names for index in range(5)}


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("raise", "failed"),
        pytest.param("kill", "killed", marks=pytest.mark.slow),
        pytest.param("hang", "out of time", marks=pytest.mark.slow),
        ("deaf", "out of time"),
        ("nonsense", "failed"),
        ("orphan", "done"),
    ],
)
def test_a_fault_ends_its_stage_alone(fault: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit, "GRACE", 0.3)
    limit = 2.5 if fault in ("hang", "deaf") else 20.0
    started = time.monotonic()
    outcomes = Visit(tmp_path / "out", rows).run(
        [stage(tmp_path, "a"), stage(tmp_path, "b", fault, limit, least=0.1), stage(tmp_path, "c")]
    )
    assert time.monotonic() - started < 15
    assert [outcome.status for _, outcome in outcomes] == ["done", status, "done"]
    assert all_rows("a", "c") | {"b 0", "b 1"} <= record(tmp_path).keys()
    log = (tmp_path / "out" / "visit.log").read_text()
    assert "did b 1" in log
    assert ("planted" in log) == (fault == "raise")
    Visit(tmp_path / "out", rows).run([stage(tmp_path, name) for name in "abc"])
    assert record(tmp_path).keys() == all_rows("a", "b", "c")


@pytest.mark.parametrize("fault", ["raise once", "kill once"])
def test_a_stage_is_begun_again_without_what_broke_it(fault: str, tmp_path: Path) -> None:
    ((_, outcome),) = Visit(tmp_path / "out", rows).run([stage(tmp_path, "a", fault, restarts=3)])
    assert outcome.status == "done"
    assert record(tmp_path).keys() == all_rows("a")


def test_a_stage_that_cannot_be_mended_is_begun_again_only_so_often(tmp_path: Path) -> None:
    ((_, outcome),) = Visit(tmp_path / "out", rows).run([stage(tmp_path, "a", "raise", restarts=3)])
    assert outcome.status == "failed"
    assert record(tmp_path).keys() == all_rows("a") - {"a 2"}  # all others, before it


def test_time_that_is_not_there_begins_nothing(tmp_path: Path) -> None:
    outcomes = Visit(tmp_path / "out", rows, budget=1.0).run([stage(tmp_path, "a", least=5.0)])
    assert [(outcome.status, outcome.reason) for _, outcome in outcomes] == [
        ("not begun", "1 s are left and it needs 5")
    ] or outcomes[0][1].reason.endswith("it needs 5")
    assert record(tmp_path) == {}


def test_a_program_that_is_not_there_fails_its_stage(tmp_path: Path) -> None:
    outcomes = Visit(tmp_path / "out", rows).run([Stage("a", ("/no/such/program",), 5), stage(tmp_path, "b")])
    assert [outcome.status for _, outcome in outcomes] == ["failed", "done"]


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.benchmarks.test_visit import Visit, rows, stage
folder = Path(sys.argv[2])
fault = {sys.argv[3]: "hang"} if sys.argv[3] else {}
Visit(folder / "out", rows).run([stage(folder, name, fault.get(name, "")) for name in "abc"])
"""


@pytest.mark.parametrize(
    "where", [pytest.param("a", marks=pytest.mark.slow), "b", pytest.param("c", marks=pytest.mark.slow)]
)
def test_the_visit_itself_is_killed(where: str, tmp_path: Path) -> None:
    """In each stage, with two of its rows found: the record holds them, and a second visit does the rest."""
    command = [sys.executable, "-c", DRIVER, str(ROOT), str(tmp_path), where]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    out = tmp_path / "out" / "rows.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out.is_file() and f"{where} 1" in json.loads(out.read_text())):
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = all_rows(*"abc"["abc".index("a") : "abc".index(where)]) | {f"{where} 0", f"{where} 1"}
    assert record(tmp_path).keys() == before
    Visit(tmp_path / "out", rows).run([stage(tmp_path, name) for name in "abc"])
    assert record(tmp_path).keys() == all_rows("a", "b", "c")


def test_a_journal_that_is_cut_at_any_byte(tmp_path: Path) -> None:
    """What was whole is read, what is added after it too, and the records are made anew from it."""
    path = tmp_path / "visit.jsonl"
    journal = Journal(path)
    for index in range(4):
        journal.append({"kind": "row", "row": f"r{index}\n", "ok": True})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        whole = data[:length].count(b"\n")
        # a line that lacks its end alone is whole too
        whole += length + 1 <= len(data) and data[length : length + 1] == b"\n"
        cut = Journal(path)
        assert [entry["row"] for entry in cut.entries] == [f"r{index}\n" for index in range(whole)]
        cut.append({"kind": "row", "row": "more", "ok": True})
        assert [entry["row"] for entry in Journal(path).entries][-1] == "more"
        assert len(Journal(path).entries) == whole + 1


@pytest.mark.parametrize("written", [0, 1, 17, 10_000])
def test_a_record_that_is_cut_while_it_is_written(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is gone after so many bytes, and with it the new record; the old one is there."""
    out = tmp_path / "rows.json"
    write_whole("old", out)
    if (child := os.fork()) == 0:
        monkeypatch.setattr(os, "fsync", lambda descriptor: os.ftruncate(descriptor, written) or os._exit(9))
        write_whole("new" * 1000, out)
        os._exit(0)
    os.waitpid(child, 0)
    assert out.read_text() == "old"
    assert list(tmp_path.glob("*.tmp"))
    Visit(tmp_path, rows)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_record_that_was_damaged_is_made_anew(tmp_path: Path) -> None:
    Visit(tmp_path / "out", rows).run([stage(tmp_path, "a")])
    whole = (tmp_path / "out" / "rows.json").read_bytes()
    (tmp_path / "out" / "rows.json").write_bytes(whole[: len(whole) // 2])
    Visit(tmp_path / "out", rows).run([])
    assert (tmp_path / "out" / "rows.json").read_bytes() == whole


def test_a_record_that_cannot_be_made_costs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(entries: Sequence[Entry]) -> dict[str, Any]:
        raise KeyError("median")

    Visit(tmp_path / "out", broken).run([stage(tmp_path, "a")])
    assert "a record is not rewritten: KeyError: 'median'" in capsys.readouterr().err
    assert {entry["row"] for entry in Journal(tmp_path / "out" / "visit.jsonl").entries if entry["kind"] == "row"} == (
        all_rows("a")
    )


def test_an_entry_outside_of_a_visit_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    visit.emit({"kind": "row", "row": "x"})
    assert json.loads(capsys.readouterr().out) == {"kind": "row", "row": "x"}
    assert visit.known() == []
