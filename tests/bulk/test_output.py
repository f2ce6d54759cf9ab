"""What `madformer sample` writes where, and what it refuses: many pictures in a grid, odd names, files of prompts."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from madformer.bulk.records import read_record
from madformer.cli.main import main
from madformer.conditioning.tokenizer import ByteTokenizer
from madformer.config import TextConfig
from madformer.engine.schedulers import default_scheduler
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from madformer.sheets import MAX_PIXELS, check_grid, grid_shape, image_grid
from tests.helpers.testing import perturb, small_config, small_vae


def save(folder: Path, *, broken: bool = False, **changes: object) -> Path:
    torch.manual_seed(0)
    config = small_config(num_blocks=1, **changes)
    model = perturb(MADFormer(config))
    if broken:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
    tokenizer = ByteTokenizer() if config.text else None
    vae = small_vae(block_out_channels=(8,))
    MADFormerPipeline(model, vae, default_scheduler("epsilon"), tokenizer).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("text"), text=TextConfig(257, 8))


def sample(model: Path, *options: object) -> int:
    common = ["sample", "--model", model, "--steps", 1, "--precision", "exact", "--device", "cpu", "--json"]
    return main([str(option) for option in (*common, *options)])


def refused(capsys: pytest.CaptureFixture[str], model: Path, *options: object) -> str:
    capsys.readouterr()
    assert sample(model, *options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_grid_of_more_files_than_may_be_open(model: Path, tmp_path: Path) -> None:
    """The same picture with the folder between and without."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = ["--num-images", 100, "--batch-size", 50]
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        assert sample(model, *many, "--out", tmp_path / "out", "--grid", tmp_path / "a.png") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sample(model, *many, "--grid", tmp_path / "b.png") == 0
    first, second = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert np.array_equal(first, second)
    for index in (0, 9, 10, 99):
        row, column = divmod(index, 10)
        tile = first[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert np.array_equal(tile, np.asarray(Image.open(tmp_path / "out" / f"{index:08d}.png")))
    assert read_record(tmp_path / "a.png")["num_images"] == 100


def test_grids_are_laid_out_and_limited() -> None:
    for count in range(1, 60):
        for rows in (None, *range(1, count + 1)):
            down, across = grid_shape(count, rows)
            assert down * across >= count
            assert rows is None or down == rows
            assert rows is not None or (down - 1) * across < count <= across * across
    check_grid(50_000, None, 64, 64)
    check_grid(1, None, 1, MAX_PIXELS)
    for count, rows, height, width in ((10**12, None, 64, 64), (2, 1, 1, MAX_PIXELS), (5000, 50, 1024, 1024)):
        with pytest.raises(ValueError, match="more than the 357,913,940 that picture viewers open"):
            check_grid(count, rows, height, width)
    one_at_a_time = (Image.new("RGB", (2, 1), (index, 0, 0)) for index in range(5))
    assert np.asarray(image_grid(one_at_a_time, 2, count=5))[..., ::2, 0].tolist() == [[0, 2, 4], [1, 3, 255]]
    with pytest.raises(ValueError, match="a grid of 0 pictures"):
        image_grid([])


def test_counts_that_make_no_sense(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is drawn or written."""
    grid = ["--grid", tmp_path / "g.png"]
    assert "a grid of 1,000,000,000,000 pictures" in refused(capsys, model, *grid, "--num-images", 10**12)
    assert "--batch-size 10000000000 must be at most" in refused(capsys, model, *grid, "--batch-size", 10**10)
    assert "2^63 - 1, and with it the last of" in refused(capsys, model, *grid, "--num-images", 10**30)
    for number in (0, -5):
        assert f"--num-images {number} must be at least 1" in refused(capsys, model, *grid, "--num-images", number)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheduler", ["dpmpp", "ddim", "unipc", "euler"])
@pytest.mark.parametrize("where", ["--out", "--grid"])
def test_nothing_that_is_not_finite_becomes_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scheduler: str, where: str
) -> None:
    broken = save(tmp_path / "model", broken=True)
    line = refused(capsys, broken, "--scheduler", scheduler, where, tmp_path / "made.png", "--steps", 2)
    assert "finite" in line
    assert not list(tmp_path.glob("**/[!.]*.png/*.png"))
    assert not (tmp_path / "made.png").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes are Linux's")
@pytest.mark.parametrize("name", [b"caf\xe9", b"[a]*?{b}", b"two\nlines", b" -x "])
def test_odd_names(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: bytes) -> None:
    """Folders and files have any; what is printed of them is text."""
    odd = tmp_path / os.fsdecode(name)
    arguments = ["sample", "--model", model, "--steps", 1, "--device", "cpu", "--out", odd, "--grid", f"{odd}.png"]
    for _ in range(2):
        assert main([str(argument) for argument in arguments]) == 0
    assert "1 images in" in capsys.readouterr().out
    for file in (odd / "00000000.png", Path(f"{odd}.png"), odd):
        assert main(["info", str(file)]) == 0
    assert sorted(os.listdir(os.fsencode(tmp_path))) == sorted([name, name + b".png"])
    assert "holds no config.json" in refused(capsys, odd, "--out", tmp_path / "out")
    assert "is a file" in refused(capsys, Path(f"{odd}.png"), "--out", tmp_path / "out")
    assert "cannot write to" in refused(capsys, model, "--out", f"{odd}.png")
    assert "cannot write to" in refused(capsys, model, "--grid", f"{odd}.png/x.png")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_prompts_of_any_editor(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Marks, line ends and blanks are no part of a prompt; all else is. From a file or from standard input."""
    written = "red\r\n\r\n \t \n  a cat\t\n# blue\x0c\u2028sky\r\nKäse"
    expected = ["red", "a cat", "# blue\x0c\u2028sky", "Käse"]
    (tmp_path / "prompts.txt").write_bytes(written.encode(encoding))
    for source in (tmp_path / "prompts.txt", "-"):
        with (tmp_path / "prompts.txt").open() as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert sample(text_model, "--prompts", source, "--num-images", 4, "--grid", tmp_path / "g.png") == 0
        assert read_record(tmp_path / "g.png")["prompt"] == expected
    assert sample(text_model, *expected, "--num-images", 4, "--grid", tmp_path / "h.png") == 0
    assert (tmp_path / "h.png").read_bytes() == (tmp_path / "g.png").read_bytes()


def test_what_are_no_prompts(text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = ["--grid", tmp_path / "g.png"], tmp_path / "p.txt"
    for data, message in (
        (b"red\nblue\nK\xe4se\n", "line 3"),
        ("red".encode("utf-16-le"), "text in UTF-16 needs a byte-order mark"),
        (b"\xff\xfe", "holds no prompt"),
        (b" \n\r\n", "holds no prompt"),
        (b"\xff\xfer\x00e", "line 1"),
    ):
        file.write_bytes(data)
        line = refused(capsys, text_model, "--prompts", file, *out)
        assert message in line
        assert "p.txt" in line
    assert "is not in the encoding of this terminal" in refused(capsys, text_model, os.fsdecode(b"K\xe4se"), *out)
    assert "give one" in refused(capsys, text_model, "red", "--prompt", "blue", *out)
    assert not (tmp_path / "g.png").exists()


@pytest.mark.parametrize("options", [[], ["--latents"], ["--format", "wds", "--shard-size", 3]])
def test_a_write_that_fails_wherever_it_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[object]
) -> None:
    """As on a full disk: one line, nothing half-written, and the same files in the end."""
    run = ["--num-images", 4, "--batch-size", 2, *options]
    grid = [] if options else ["--grid", tmp_path / "g.png"]
    assert sample(model, *run, "--out", tmp_path / "unbroken") == 0

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    whole = {path.name: path.read_bytes() for path in (tmp_path / "unbroken").rglob("*") if path.is_file()}
    sizes = sorted({len(data) for data in whole.values()})
    failed = 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (10, *(size - 1 for size in sizes if size > 10)):
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            status = sample(model, *run, "--out", tmp_path / "out", *grid)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        lines = capsys.readouterr().err.splitlines()
        assert status == len(lines), lines
        failed += status
        assert not list((tmp_path / "out").rglob(".*.*.*")) or not status, files().keys()
        finished = {name: data for name, data in files().items() if name in whole and name != "manifest.json"}
        assert finished.items() <= whole.items()
        assert status == 0 or not (tmp_path / "g.png").exists()
    assert failed
    assert sample(model, *run, "--out", tmp_path / "out", *grid) == 0
    assert files() == whole
