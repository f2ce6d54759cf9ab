"""What a killed run had begun goes with the next one; what a living one has begun stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from madformer.bulk import OutputFolder
from madformer.files.atomic import remove_leftovers_of
from tests.helpers.bulk_cases import NOTHING, settings

WRITER = """
import sys
from madformer.files.atomic import atomic_path
with atomic_path(sys.argv[1]) as path:
    path.write_bytes(b"begun")
    print(path, flush=True)
    sys.stdin.read()
"""


@contextmanager
def writing(path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """Another process in the middle of it, and its temporary file."""
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Path(process.stdout.readline().strip()), process
        finally:
            process.kill()


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_files_of_the_dead_go_and_of_the_living_stay(tmp_path: Path, sharded: bool) -> None:
    own = settings(shard_size=8, format="wds") if sharded else settings()
    with OutputFolder(tmp_path, own, 64).opened() as folder:
        folder.write(0, NOTHING)
    dead = [tmp_path / f".{name}.abcdefg{end}" for name in ("manifest.json", "00000900.png") for end in "hi"]
    dead += [folder.images / ".00000003.safetensors.a_234567", tmp_path / ".latents-000001.tar.abcdefgh"]
    others = [
        tmp_path / name for name in (".mine", ".00000003.safetensors", "00000003.txt.abcdefgh", ".notes.txt.abcdefgh")
    ]
    for file in (*dead, *others):
        file.write_bytes(b"x")
    with writing(folder.file(5)) as (begun, process):
        with OutputFolder(tmp_path, own, 64).opened(1, 2):
            assert begun.read_bytes() == b"begun"
            assert not any(file.exists() for file in dead)
        process.kill()
        process.wait()
        assert begun.exists()
        with OutputFolder(tmp_path, own, 64).opened():
            assert not begun.exists()
    assert all(file.exists() for file in others)


def test_of_one_file_beside_others(tmp_path: Path) -> None:
    for name in (".g.png.abcdefgh", ".g.png.xyz", ".other.png.abcdefgh", "g.png.abcdefgh"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / ".g.png.abcdefgh").write_bytes(b"")
    with writing(tmp_path / "g.png") as (begun, _):
        remove_leftovers_of(tmp_path / "g.png")
        assert sorted(os.listdir(tmp_path)) == sorted(
            [".g.png.xyz", ".other.png.abcdefgh", "g.png.abcdefgh", "below", begun.name]
        )
    remove_leftovers_of(tmp_path / "none" / "g.png")
    assert (tmp_path / "below" / ".g.png.abcdefgh").exists()
