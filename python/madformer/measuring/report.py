"""A sweep as flat figures, as a table for the terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from madformer.files.atomic import atomic_path
from madformer.measuring.sampling import PARTS, Roof, Row, Sweep

HEADINGS = {"ar": "AR", "transformer": "Transf.", "unet": "U-Net", "vae": "VAE", "host": "host"}
LABELS = HEADINGS | {"ar": "AR passes", "transformer": "Transformer"}
COLOURS = {"ar": "#E69F00", "transformer": "#0072B2", "unet": "#009E73", "vae": "#CC79A7", "host": "#999999"}
"""Of Okabe and Ito, which the colour-blind can tell apart."""


def metrics(rows: Sequence[Row], roof: Roof) -> dict[str, float]:
    """Of every step count: seconds at the smallest batch, images a second at the best, overhead at the largest."""
    values = {"matmul_flops": roof.matmul_flops, "copy_bytes_per_second": roof.copy_bytes}
    for steps, own in by_steps(rows).items():
        best, smallest = max(own, key=lambda row: row.images_per_second), own[0]
        values |= {
            f"seconds_batch_{smallest.batch}_steps_{steps}": smallest.seconds.median,
            f"images_per_second_steps_{steps}": best.images_per_second,
            f"best_batch_steps_{steps}": best.batch,
            f"fraction_of_roof_steps_{steps}": best.fraction_of_roof,
            f"overhead_batch_{own[-1].batch}_steps_{steps}": own[-1].overhead,
        }
    return values


def by_steps(rows: Sequence[Row]) -> dict[int, list[Row]]:
    return {steps: [row for row in rows if row.steps == steps] for steps in sorted({row.steps for row in rows})}


def heading() -> str:
    """What stands above :func:`line`."""
    parts = "".join(f"{HEADINGS[part]:>9}" for part in PARTS)
    return (
        f"{'':<34}{'share of the time':^45}{'floors, seconds':^22}\n"
        f"{'steps':>5}{'batch':>7}{'seconds':>11}{'images/s':>11}{parts}{'operations':>13}{'bytes':>9}"
        f"{'of roof':>9}{'overhead':>10}"
    )


def line(row: Row) -> str:
    whole = sum(row.split.values())
    parts = "".join(f"{row.split[part] / whole:>9.1%}" for part in PARTS)
    return (
        f"{row.steps:>5}{row.batch:>7}{row.seconds.median:>11.4g}{row.images_per_second:>11.4g}{parts}"
        f"{row.operations_floor:>13.3g}{row.bytes_floor:>9.3g}{row.fraction_of_roof:>9.1%}{row.overhead:>+10.1%}"
    )


def ending(sweep: Sweep) -> list[str]:
    """What to say below the table."""
    lines = []
    for steps, own in by_steps(sweep.rows).items():
        best, smallest = max(own, key=lambda row: row.images_per_second), own[0]
        lines.append(
            f"{steps} steps: {smallest.seconds.median:.3g} s at batch {smallest.batch}; "
            f"most images a second {best.images_per_second:.3g} at batch {best.batch}"
        )
    lines += [f"stopped, {reason}" for reason in sweep.stopped]
    return lines + [f"out of time, not measured: {row}" for row in sweep.not_measured]


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Throughput against batch size, a line for each step count; and what the time of the most steps goes to.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = by_steps(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for steps, own in curves.items():
        batches, speeds = [row.batch for row in own], [row.images_per_second for row in own]
        left.plot(batches, speeds, "o-", label=f"{steps} steps a block")
    left.set_xscale("log", base=2)
    sizes = sorted({row.batch for row in rows})
    left.set_xticks(sizes, [str(size) for size in sizes])
    left.set_ylim(bottom=0)
    left.set(xlabel="batch size", ylabel="images a second")
    left.grid(alpha=0.3)
    left.legend(frameon=False)

    steps, shown = list(curves.items())[-1]
    bottoms = [0.0] * len(shown)
    for part in PARTS:
        shares = [100 * row.split[part] / sum(row.split.values()) for row in shown]
        right.bar(range(len(shown)), shares, bottom=bottoms, color=COLOURS[part], label=LABELS[part])
        bottoms = [low + share for low, share in zip(bottoms, shares, strict=True)]
    right.set_xticks(range(len(shown)), [str(row.batch) for row in shown])
    right.set(xlabel="batch size", ylabel=f"% of the time, {steps} steps a block", ylim=(0, 100))
    handles, labels = right.get_legend_handles_labels()
    right.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
