"""Draws what a folder lacks; decoding, encoding and writing go on behind the sampling of the next batch.

Shape legend: B images of a batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from madformer.bulk.folder import OutputFolder
from madformer.bulk.records import png_text, safetensors_metadata
from madformer.vae import check_finite, decode, finite, to_uint8

if TYPE_CHECKING:
    from madformer.pipeline import MADFormerPipeline

# a picture of 1024 x 1024 takes a Xeon core 0.28 s, most of it in zlib, which lets other threads run
ENCODERS = 4


class Drawing:
    """Draws batches into a folder, each written while the next is sampled.

    One batch at most is behind the one being sampled, so a kill loses no more than these two. A context: leaving it
    waits for what is being written, also after an error.

    Args:
        on_written: called with the number of images and of their bytes once they are in the folder, from another
            thread.
    """

    def __init__(
        self, pipeline: MADFormerPipeline, folder: OutputFolder, on_written: Callable[[int, int], object] | None = None
    ) -> None:
        self.pipeline, self.folder, self.on_written = pipeline, folder, on_written
        self._encoders = ThreadPoolExecutor(ENCODERS, "encode")
        self._writer = ThreadPoolExecutor(1, "write")
        self._behind: Future[None] | None = None
        device = pipeline.transformer.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def draw(self, batch: int) -> None:
        """Sample a batch, and leave it to be written.

        Raises:
            Whatever sampling raises, or writing the batch before.
        """
        span, settings = self.folder.span(batch), self.folder.settings
        # a smaller batch is planned anew, and while CUDA captures a graph no other thread may call it
        if self._behind is not None and (self._behind.done() or len(span) < settings.batch_size):
            self.wait()
        latents = self.pipeline(**settings.options(span), output_type="latent").images
        images, sound, ready = self._to_host(latents)
        self.wait()
        self._behind = self._writer.submit(self._write, batch, images, sound, ready)

    def wait(self) -> None:
        """Until the last batch is in the folder.

        Raises:
            OSError: it could not be written.
        """
        behind, self._behind = self._behind, None
        if behind is not None:
            behind.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception:
            # the first error is the one to tell
            if error is None:
                raise
        finally:
            self._writer.shutdown()
            self._encoders.shutdown()

    def _to_host(self, latents_BCHW: Tensor) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
        """Latents, or pictures ``(B, H, W, 3)`` as bytes, and which are finite: on the CPU, from the event on.

        On a GPU it is queued on a stream of its own, beside the next batch's sampling.
        """
        if self._stream is None:
            images, sound = self._finish(latents_BCHW)
            return images, sound, None
        self._stream.wait_stream(torch.cuda.current_stream(latents_BCHW.device))
        with torch.cuda.stream(self._stream):
            images, sound = (_begin_copy(made) for made in self._finish(latents_BCHW))
            latents_BCHW.record_stream(self._stream)
            ready = torch.cuda.Event(blocking=True)
            ready.record(self._stream)
        return images, sound, ready

    def _finish(self, latents_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        if self.folder.settings.latents:
            # the engine has looked at them
            return latents_BCHW, torch.ones(len(latents_BCHW), dtype=torch.bool)
        assert self.pipeline.vae is not None
        pixels = decode(self.pipeline.vae, latents_BCHW)
        return to_uint8(pixels), finite(pixels)

    def _write(self, batch: int, images: Tensor, sound: Tensor, ready: torch.cuda.Event | None) -> None:
        if ready is not None:
            ready.synchronize()
        check_finite(sound, self.pipeline.vae)
        span = self.folder.span(batch)
        # the sum is what raises an encoder's error
        size = sum(self._encoders.map(self._write_image, span, images))
        self.folder.pack()
        if self.on_written is not None:
            self.on_written(len(span), size)

    def _write_image(self, index: int, image: Tensor) -> int:
        encode = encode_latents if self.folder.settings.latents else encode_png
        data = encode(image, self.folder.record(index))
        self.folder.write(index, data)
        return len(data)


def _begin_copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def draw_missing(
    pipeline: MADFormerPipeline, folder: OutputFolder, *, rank: int = 0, world_size: int = 1, progress: bool = True
) -> int:
    """Draw what an opened folder lacks of a process's batches; nothing that is there is drawn or decoded again.

    Args:
        pipeline: on its device, in its precision. progress: show a bar over images.

    Returns:
        How many images were drawn.

    Raises:
        OSError: a file cannot be written. FloatingPointError: the network gave numbers that are not finite. Every
            image finished before is in the folder.
    """
    batches, drawn = folder.batches(rank, world_size), 0
    with Progress(folder, batches, progress) as shown, Drawing(pipeline, folder, shown.update) as drawing:
        for batch in folder.missing(batches):
            drawing.draw(batch)
            drawn += len(folder.span(batch))
    return drawn


class Progress:
    """A bar over the images of ``batches``: rate and time left are of what is drawn now, the count is of all.

    After the first batch it says what the rest will take: until then nobody knows.
    """

    def __init__(self, folder: OutputFolder, batches: range, shown: bool) -> None:
        total, done = folder.count(batches), folder.count_done(batches)
        self._path, self._left = folder.path, total - done
        self._estimated, self._started = False, time.monotonic()
        self._bar = tqdm(total=total, initial=done, desc="sampling", unit="image", disable=not shown)

    def update(self, images: int, size: int) -> None:
        """Add images that were written, in so many bytes."""
        self._bar.update(images)
        if not (self._estimated or self._bar.disable or images == self._left):
            needed, free = (self._left - images) * size / images, shutil.disk_usage(self._path).free
            seconds = (self._left - images) * (time.monotonic() - self._started) / images
            short = f", and {_bytes(free)} are free" if needed > free else ""
            tqdm.write(
                f"{self._left - images:,} more images take about {_bytes(needed)} and {_duration(seconds)} here{short}",
                file=sys.stderr,
            )
        self._estimated = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def _bytes(count: float) -> str:
    return f"{tqdm.format_sizeof(count, divisor=1000)}B"


def _duration(seconds: float) -> str:
    units = (("days", 86400), ("hours", 3600), ("minutes", 60))
    name, length = next((unit for unit in units if seconds >= 2 * unit[1]), ("seconds", 1))
    return f"{seconds / length:,.1f} {name}"


def encode_png(image_HWC: Tensor, record: Mapping[str, Any] | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC.numpy()).save(buffer, "PNG", pnginfo=None if record is None else png_text(record))
    return buffer.getvalue()


def encode_latents(latents_CHW: Tensor, record: Mapping[str, Any] | None = None) -> bytes:
    metadata = None if record is None else safetensors_metadata(record)
    return safetensors.torch.save({"latents": latents_CHW.contiguous()}, metadata)
