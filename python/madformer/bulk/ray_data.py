"""The batches of a folder mapped over actors by Ray Data: many GPUs on many machines that share a file system."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from madformer.bulk.drawing import Drawing, num_images, progress_bar
from madformer.bulk.folder import OutputFolder
from madformer.kernels.dispatch import BackendUnavailableError

if TYPE_CHECKING:
    from madformer.pipeline import MADFormerPipeline


class _Actor:
    """Holds a pipeline, and draws the batches that it is sent. A row comes back when its images are in the folder."""

    def __init__(self, load: Callable[[], MADFormerPipeline], folder: OutputFolder) -> None:
        self.folder, self.drawing = folder, Drawing(load(), folder)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[int]]:
        for batch in rows["batch"]:
            self.drawing.draw(int(batch))
        self.drawing.wait()
        return {"images": [len(self.folder.span(int(batch))) for batch in rows["batch"]]}


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
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("Ray is not installed: pip install 'madformer[ray]'") from error
    batches = folder.batches()
    missing = folder.missing(batches)
    if not missing:
        return 0
    started_here = not ray.is_initialized()
    if started_here:
        # joins the cluster that RAY_ADDRESS names, else starts one on this machine
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    try:
        resources = ray.cluster_resources()
        workers = workers or (int(resources.get("GPU", 0)) if on_gpu else 1)
        if workers == 0:
            raise ValueError("the Ray cluster has no GPU: give --device cpu")
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # one block a batch: it is what Ray deals, and what it repeats where an actor was lost
        rows = ray.data.from_items([{"batch": batch} for batch in missing], override_num_blocks=len(missing))
        drawn = rows.map_batches(
            _Actor,
            fn_constructor_args=(load, folder),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(missing))),
            num_gpus=1 if on_gpu else None,
            # without it an actor's torch has one thread
            num_cpus=None if on_gpu else max(1, int(resources["CPU"]) // workers),
        )
        with progress_bar(folder, batches, missing, progress) as bar:
            for row in drawn.iter_rows():
                bar.update(row["images"])
    except ray.exceptions.RayError as error:
        raise _first_cause(error) from None
    finally:
        if started_here:
            ray.shutdown()
    return num_images(folder, missing)


def _first_cause(error: BaseException) -> BaseException:
    """What an actor raised, under Ray's own errors, if it is one that is told in a line; else Ray's error."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, (ValueError, OSError, FloatingPointError, BackendUnavailableError)):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error
