"""``madformer report``: a sweep as one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from madformer.cli.request import Request


@dataclass(frozen=True, kw_only=True)
class Report(Request):
    """Make one page of HTML of a sweep, finished or not, that opens offline: quality against cost, training curves,
    samples side by side, the table and the protocol.

    examples:
      madformer report sweeps/emoji64
      madformer report sweeps/emoji64 --metric fd --out emoji64.html --figures figures/
    """

    folder: Annotated[Path, Positional, arg(metavar="FOLDER")]  # of madformer sweep --out
    out: Path | None = None  # file to write; unless given, report.html in the folder
    metric: str | None = None  # what quality is, such as kid; unless given, the first that was measured
    figures: Path | None = None  # folder for the figures as PNG files, too

    def run(self) -> None:
        from madformer.files.atomic import atomic_path, check_writable
        from madformer.sweeps import plot, write_report

        if self.out is not None and self.out.is_dir():
            raise ValueError(f"--out {self.out} is a folder; it names a file")
        if self.figures is not None:
            check_writable(self.figures)
            for name, figure in plot(self.folder, self.metric).items():
                with atomic_path(self.figures / f"{name}.png") as temporary:
                    figure.savefig(temporary, format="png", dpi=150)
        print(write_report(self.folder, self.out, self.metric))
