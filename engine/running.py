"""What every drawing has in common, a plan's and a batcher's: who may draw, in which modes, and what goes wrong.

Shape legend: B batch, P blocks looked at, M blocks, L latents of a block, C channels.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from madformer.arguments import floats
from madformer.config import MADFormerConfig
from madformer.engine.slots import Slots
from madformer.model.blocks import block_order, check_blocks, check_order


class NonFiniteError(FloatingPointError):
    """Latents that are not finite; the message says from which block and step on."""


class NonFiniteInputError(NonFiniteError, ValueError):
    """Noise or given latents that are not finite; the message says of which image and block."""


class InUseError(RuntimeError):
    """A plan or batcher that is drawing was asked to draw, from another thread or from what it calls."""


class Exclusive:
    """A context that one thread is in at a time, once; whoever else enters it is refused, and does not wait."""

    def __init__(self, message: str) -> None:
        self.message, self._lock = message, threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise InUseError(self.message)

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@contextlib.contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """The engine computes in the model's dtype, whatever its caller has asked autocast for."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield


def first_fault(tensor_BMLC: Tensor, places: Sequence[int]) -> tuple[int, int] | None:
    """Image and block of the first number that is not finite, among blocks of these places."""
    sound_BP = tensor_BMLC[:, list(places)].isfinite().all(-1).all(-1)
    if sound_BP.all():
        return None
    image, index = sound_BP.logical_not().nonzero()[0].tolist()
    return image, places[index]


def places_to_draw(
    config: MADFormerConfig,
    given: Tensor | None = None,
    blocks: Collection[int] | None = None,
    order: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """All places in the order in which a run passes them, and those that are drawn: all, or some of a given image's.

    Raises:
        ValueError: there are none such, or nothing is given, or the model does not know the order, or cannot read what
            it did not draw.
    """
    if blocks is not None:
        check_blocks(blocks, config)
        if given is None:
            raise ValueError(f"blocks={list(blocks)}: what the others hold must be given")
        if not config.has_clean_stream:
            raise ValueError(f"context={config.context!r} reads blocks as it drew them, so none can be given")
    if order is not None:
        check_order(order, config)
    return list(order or block_order(config)), sorted(range(config.num_blocks) if blocks is None else blocks)


def check_latents(name: str, latents: Any, shape: torch.Size, places: Sequence[int] = ()) -> None:
    """Refuse what has another shape than ``(B, M, L, C)``, or numbers that are not finite in these places.

    Raises:
        NonFiniteInputError: there are some; names the first. ValueError: another shape, or no floating-point numbers.
    """
    floats(name, latents, shape)
    if places and (fault := first_fault(latents, places)) is not None:
        raise NonFiniteInputError("{} is not finite: image {}, block {}".format(name, *fault))


def check_sound(slots: Slots, drawn: Sequence[int], steps: int, steps_made: int) -> None:
    """Refuse a run in which numbers came up that are not finite; waits for the device.

    Args:
        drawn: places of the blocks that it drew, in order. steps: of a block. steps_made: in all.

    Raises:
        NonFiniteError: there are; names the first image, and the block and step from which on.
    """
    for image, sound in enumerate(slots.sound_R.tolist()):
        if sound < steps_made:
            block, step = drawn[sound // steps], sound % steps
            raise NonFiniteError(f"image {image} of the batch is not finite from block {block}, step {step} on")
    # whoever was called after the last step may have written to it
    if (fault := first_fault(slots.canvas_RMLC, drawn)) is not None:
        raise NonFiniteError("image {} of the batch is not finite in block {}, after its last step".format(*fault))
