"""From latents to files of pictures, decoded a batch at a time, encoded side by side.

On a GPU that is done beside the thread that draws, by a thread and on a stream of its own. On a processor it is done
between the steps: whatever computes beside these has all of their threads wait.

Shape legend: B pictures, M blocks, L latents of a block, C channels.
"""

from __future__ import annotations

import contextlib
import io
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from madformer.bulk.records import png_text
from madformer.config import MADFormerConfig
from madformer.model.blocks import from_blocks
from madformer.vae import decode, finite, to_uint8

logger = logging.getLogger("madformer.serving")

ENCODERS = 2
MOST_AT_ONCE = 16


@dataclass(frozen=True)
class Work:
    """A picture to be made.

    Attributes:
        compose: gives its latents ``(M, L, C)``, in the thread that decodes.
        deliver: takes the file, or what went wrong, in a thread of the finisher's, in that order too.
        record: what a PNG says of itself.
        preview: on a processor it may differ by rounding from what it would be alone.
    """

    compose: Callable[[], Tensor]
    output_format: str
    quality: int
    deliver: Callable[[bytes | Exception], object]
    record: Mapping[str, Any] | None = None
    preview: bool = False


class Finisher:
    """Makes pictures of what is :meth:`put` between :meth:`start` and :meth:`stop`.

    Attributes:
        beside: in a thread of its own; else whenever :meth:`finish_waiting` is called.
    """

    def __init__(self, vae: Any, config: MADFormerConfig) -> None:
        self.vae, self.config = vae, config
        self.device = next(vae.parameters()).device
        self.beside = self.device.type != "cpu"
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._encoders = ThreadPoolExecutor(ENCODERS, "madformer-encode")
        self._delivering = ThreadPoolExecutor(1, "madformer-deliver")
        self._thread = threading.Thread(target=self._live, name="madformer-decode", daemon=True)
        self._stream: torch.cuda.Stream | None = None

    def start(self) -> None:
        if self.beside:
            self._thread.start()

    def stop(self) -> None:
        """End after what was asked for until now."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        else:
            self.finish_waiting()
        self._delivering.shutdown()
        self._encoders.shutdown()

    def put(self, work: Work) -> None:
        """From any thread; returns at once."""
        self._queue.put(work)

    def finish_waiting(self) -> None:
        """Decode what waits; files are encoded and delivered by other threads."""
        while batch := self._batch():
            self._finish(batch)

    def _batch(self, *begun: Work) -> list[Work]:
        """What waits, as much of it as is decoded at once, behind what was taken already."""
        batch = list(begun)
        with contextlib.suppress(queue.Empty):
            while len(batch) < MOST_AT_ONCE:
                if (work := self._queue.get_nowait()) is None:
                    self._queue.put(None)
                    break
                batch.append(work)
        return batch

    def _live(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            self._stream = torch.cuda.Stream(self.device)
        while (first := self._queue.get()) is not None:
            self._finish(self._batch(first))
            del first  # not held until the next picture comes

    def _finish(self, batch: list[Work]) -> None:
        files: dict[int, Future[bytes] | Exception] = {}
        # a GPU decodes whatever there is together
        for preview in (None,) if self.beside else (False, True):
            places = [place for place, work in enumerate(batch) if preview in (None, work.preview)]
            if places:
                made = self._files([batch[place] for place in places], together=preview is True)
                files.update(zip(places, made, strict=True))
        self._delivering.submit(_deliver, batch, [files[place] for place in range(len(batch))])

    def _files(self, works: Sequence[Work], *, together: bool) -> Sequence[Future[bytes] | Exception]:
        """Of these works, decoded now and encoded by other threads; each or all may be an error."""
        try:
            pictures = self._decode(torch.stack([work.compose() for work in works]), together=together)
        except Exception as error:
            logger.error("decoding failed", exc_info=error)
            return [error] * len(works)
        return [
            picture
            if isinstance(picture, Exception)
            else self._encoders.submit(encode, picture, work.output_format, work.quality, work.record)
            for work, picture in zip(works, pictures, strict=True)
        ]

    def _decode(self, blocks_BMLC: Tensor, *, together: bool) -> list[Image.Image | Exception]:
        """The error of one that is not finite."""
        if self._stream is not None:
            # behind the steps that were launched by now, beside those to come
            self._stream.wait_stream(torch.cuda.default_stream(blocks_BMLC.device))
        with torch.cuda.stream(self._stream), torch.inference_mode():
            pixels = decode(self.vae, from_blocks(blocks_BMLC, self.config), together=together)
            sound, images = finite(pixels).tolist(), to_uint8(pixels).cpu().numpy()
        return [
            Image.fromarray(image) if good else FloatingPointError("the picture is not finite")
            for image, good in zip(images, sound, strict=True)
        ]


def _deliver(batch: Sequence[Work], files: Sequence[Future[bytes] | Exception]) -> None:
    """All in their order, as they are encoded."""
    for work, file in zip(batch, files, strict=True):
        made: bytes | Exception
        try:
            made = file if isinstance(file, Exception) else file.result()
        except Exception as error:
            logger.error("encoding failed", exc_info=error)
            made = error
        work.deliver(made)


def encode(
    picture: Image.Image, output_format: str, quality: int = 90, record: Mapping[str, Any] | None = None
) -> bytes:
    """A file of a picture; a PNG holds the record."""
    stream = io.BytesIO()
    # level 1 takes PNG a third of the time of the default, for files a tenth larger
    options: dict[str, Any] = {"compress_level": 1} if output_format == "png" else {"quality": quality}
    if output_format == "png" and record is not None:
        options["pnginfo"] = png_text(record)
    picture.save(stream, output_format.upper(), **options)
    return stream.getvalue()
