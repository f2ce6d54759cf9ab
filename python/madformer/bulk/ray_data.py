"""The batches of a folder mapped over actors by Ray Data: many GPUs on many machines that share a file system."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from madformer import cluster
from madformer.bulk.drawing import Drawing, Progress
from madformer.bulk.folder import OutputFolder

if TYPE_CHECKING:
    from madformer.pipeline import MADFormerPipeline

# batches that Ray is told of at once: it plans all of them before the first is drawn
ROUND = 10_000


class _Actor:
    """Holds a pipeline, and draws the batches that it is sent. A row comes back when its images are in the folder."""

    def __init__(self, load: Callable[[], MADFormerPipeline], folder: OutputFolder) -> None:
        self.drawing, self.written = Drawing(load(), folder, self._count), (0, 0)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[int]]:
        for batch in rows["batch"]:
            self.drawing.draw(int(batch))
        self.drawing.wait()
        (images, size), self.written = self.written, (0, 0)
        return {"images": [images], "size": [size]}

    def _count(self, images: int, size: int) -> None:
        self.written = self.written[0] + images, self.written[1] + size


def draw_missing(
    load: Callable[[], MADFormerPipeline],
    folder: OutputFolder,
    *,
    workers: int | None = None,
    on_gpu: bool,
    progress: bool = True,
) -> int:
    """As :func:`madformer.bulk.draw_missing`, by Ray's actors. ``folder`` is opened here and seen by all of them.

    Args:
        load: makes an actor's pipeline, on its device and in its precision.
        workers: actors; None for one a GPU of the cluster, or one without.
        on_gpu: give each actor a GPU.

    Returns:
        How many images were drawn.

    Raises:
        ImportError: Ray is not installed. ValueError: the cluster has no GPU, or what an actor raised.
    """
    if folder.had_all:
        return 0
    with cluster.joined():
        import ray.data

        share = cluster.share_of(workers, on_gpu=on_gpu)
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        batches, drawn = folder.batches(), 0
        missing = folder.missing(batches)
        with Progress(folder, batches, progress) as shown:
            while dealt := list(itertools.islice(missing, ROUND)):
                # one block a batch: it is what Ray deals, and what it repeats where an actor was lost
                rows = ray.data.from_items([{"batch": batch} for batch in dealt], override_num_blocks=len(dealt))
                done = rows.map_batches(
                    _Actor,
                    fn_constructor_args=(load, folder),
                    batch_size=1,
                    compute=ray.data.ActorPoolStrategy(size=min(share.workers, len(dealt))),
                    num_gpus=share.num_gpus,
                    num_cpus=share.num_cpus,
                )
                for row in done.iter_rows():
                    shown.update(row["images"], row["size"])
                    drawn += row["images"]
    return drawn
