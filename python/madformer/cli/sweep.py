"""``madformer sweep``: a grid of models and ways to sample them, each judged, in one table."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from madformer.cli import config_file
from madformer.cli.request import Request
from madformer.machine import device_of

if TYPE_CHECKING:
    from madformer.sweeps import Sweep


@dataclass(frozen=True, kw_only=True)
class SweepRequest(Request):
    """Train what a file names and is not trained, sample every model in every way, judge the pictures, and write a row
    of a Parquet table for each. Stopped or killed, the same command goes on.

    examples:
      madformer sweep examples/sweeps/emoji64.toml --out sweeps/emoji64
      madformer sweep examples/sweeps/emoji64.toml --out sweeps/emoji64 --workers 2
      madformer sweep examples/sweeps/emoji64.toml --out sweeps/emoji64 --ray
      madformer sweep examples/sweeps/emoji64.toml --out sweeps/emoji64 --dry-run
      madformer report sweeps/emoji64
    """

    file: Annotated[Path, Positional, arg(metavar="FILE")]  # what to do, in TOML, YAML or JSON; docs/sweeps.md
    out: Path | None = None  # folder for models, rows and table; goes on where it stopped
    workers: int | None = None  # processes that do it, as many as there are GPUs or processors; unless given one
    ray: bool = False  # deal the work to --workers actors of a Ray cluster; unless given, one for every GPU of it
    threads: int = 1  # of a worker on a processor: more workers are faster than more threads
    device: str = "auto"  # where to compute: auto (a GPU where there is one), cpu, cuda, cuda:1 ...
    cache: Path | None = None  # folder where features are kept; unless given, madformer/features in the user's cache
    dry_run: bool = False  # print what there is to do, and stop
    json: bool = False  # no progress bar

    def run(self) -> None:
        for name in ("workers", "threads"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"--{name} {number} must be at least 1")
        values = config_file.read(self.file, "")
        if self.out is None and not self.dry_run:
            raise ValueError("give --out FOLDER, or --dry-run")
        sweep = _sweep(self.file, values)
        if self.dry_run:
            _describe(sweep, self.out, device_of(self.device))
            return
        from madformer.sweeps import run_sweep

        assert self.out is not None
        table = run_sweep(
            sweep, self.out, workers=self.workers, threads=self.threads, device=self.device,
            cache=self.cache, ray=self.ray, progress=not self.json,
        )  # fmt: skip
        print(
            f"{table.num_rows} cells in {self.out / 'table.parquet'}; madformer report {self.out} makes a page of them"
        )


def _sweep(file: Path, values: dict[str, Any]) -> Sweep:
    from madformer.sweeps import Sweep

    try:
        return Sweep.of(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _describe(sweep: Sweep, out: Path | None, device: str) -> None:
    from madformer.sweeps import SweepFolder
    from madformer.sweeps.checking import check_cells

    folder = SweepFolder(out or Path(), sweep)
    missing = sweep.cells if out is None else folder.missing()
    check_cells(folder, missing, device, elsewhere=True)
    there = len(sweep.cells) - len(missing)
    for model in sweep.all_models:
        seed = "" if model.seed is None else f", seed {model.seed}"
        how = "given" if model.config is None else f"to train, {model.config.steps:,} steps{seed}"
        print(f"{model.label}: {how}")
    count = sweep.evaluate.num_images
    print(f"{len(sweep.cells)} cells of {count:,} images, of which {there} are done")
    if sweep.tune is not None:
        tuned = len({cell.tuning_id for cell in sweep.cells})
        print(f"{tuned} scales of guidance to look for, each in {sweep.tune.evaluations} evaluations", file=sys.stderr)
