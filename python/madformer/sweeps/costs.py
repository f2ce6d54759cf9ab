"""What an image costs: evaluations of the network and of its layers, operations, seconds and memory.

Shape legend: B batch, L latents of a block, C channels, E time embedding.
"""

from __future__ import annotations

import copy
import functools
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from madformer.config import MADFormerConfig
from madformer.engine.options import SamplingOptions
from madformer.engine.schedule import tabulate
from madformer.evaluation import DrawnImages, Part
from madformer.measuring.bare import Work
from madformer.model import MADFormer

__all__ = ["Evaluations", "PeakMemory", "WatchedImages", "evaluations_of", "flops_per_image", "layers_once"]


@dataclass(frozen=True)
class Evaluations:
    """Of one image.

    Attributes:
        steps: evaluations of the denoiser that each block takes: one a timestep of the scheduler's, two under guidance.
        refreshed: those of ``steps`` that run the diffusion layers, which ``refresh_every`` leaves out in others.
        layers: layers of the Transformer that the image's tokens pass through, autoregressive passes included and the
            text's one pass left out; two under guidance, as above. A layer that a part of the blocks pass through is
            counted as that part.
    """

    steps: int
    refreshed: int
    layers: float


def evaluations_of(model: MADFormer, scheduler: Any, sampling: SamplingOptions) -> Evaluations:
    """How often the network is evaluated with this scheduler.

    Raises:
        ValueError: the scheduler does not have so many steps.
    """
    config, branches = model.config, 2 if sampling.guided else 1
    timesteps = _num_timesteps(scheduler, sampling.steps)
    refreshed = -(-timesteps // sampling.refresh_every)
    layers = layers_once(config) + config.diffusion_layers * refreshed
    return Evaluations(branches * timesteps, branches * refreshed, branches * layers)


def layers_once(config: MADFormerConfig) -> float:
    """Those of :attr:`Evaluations.layers` that an image takes whatever the number of steps, without guidance."""
    # an autoregressive pass a block for the condition, and one a finished block, but for the last, for its context
    condition = config.ar_layers if config.has_condition else 0
    return condition + config.clean_layers * (config.num_blocks - 1) / config.num_blocks


def flops_per_image(model: MADFormer, evaluations: Evaluations, *, guided: bool) -> int:
    """Two for a multiply-add, of products, convolutions and attention; the text's one pass is left out.

    Both branches of guidance see the same noisy image: its embedding by the U-Net is computed once.
    """
    work, branches, config = Work.of(model), 2 if guided else 1, model.config
    skipped = evaluations.steps - evaluations.refreshed
    flops = branches * work.ar_flops + evaluations.refreshed * work.step_flops + skipped * work.unet_flops
    embed = _embed_flops(config)
    shared = evaluations.steps // branches * config.num_blocks
    if config.has_condition or config.clean_layers:
        shared += config.num_blocks - 1
    return flops - (branches - 1) * shared * embed


def _num_timesteps(scheduler: Any, steps: int) -> int:
    table = tabulate(scheduler, steps)
    if table is not None:
        return table.num_steps
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    return len(own.timesteps)


@functools.lru_cache
def _embed_flops(config: MADFormerConfig) -> int:
    """Of one block."""
    with torch.device("meta"):
        model = MADFormer(config).to("meta").requires_grad_(False)
        model.set_backend("reference")
        latents_B1LC = torch.empty(1, 1, config.latents_per_block, config.latent_channels)
        temb_BE = torch.empty(1, config.time_widths[0])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.embed(latents_B1LC, temb_BE)
    return counter.get_total_flops()


@dataclass
class WatchedImages:
    """What a pipeline draws, with the time that it takes, and a few pictures kept.

    Attributes:
        shown: how many are kept, evenly from all over them. kept: those, by their numbers.
        batches: seconds and number of images of each batch.
    """

    drawn_images: DrawnImages
    shown: int = 0
    kept: dict[int, Image.Image] = field(default_factory=dict)
    batches: list[tuple[float, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.drawn_images.name

    @property
    def drawn(self) -> dict[str, Any]:
        return self.drawn_images.drawn

    def __len__(self) -> int:
        return len(self.drawn_images)

    def parts(self) -> Iterator[Part]:
        first = 0
        for part in self.drawn_images.parts():
            yield replace(part, images=functools.partial(self._watch, part, first))
            first += part.count

    @property
    def seconds_per_image(self) -> float:
        """Sampling and decoding: the median over whole batches, so that what is made ready before the first is out."""
        size = max(count for _, count in self.batches)
        return median(seconds / count for seconds, count in self.batches if count == size)

    def _watch(self, part: Part, start: int) -> Iterator[Image.Image]:
        images, size = part.images(), self.drawn_images.settings.batch_size
        places = {index * len(self) // self.shown for index in range(min(self.shown, len(self)))}
        for first in range(0, part.count, size):
            count, seconds = min(size, part.count - first), 0.0
            for index in range(start + first, start + first + count):
                # the first of a batch waits for all of it
                begun = time.perf_counter()
                image = next(images)
                seconds += time.perf_counter() - begun
                if index in places:
                    self.kept[index] = image
                yield image
            self.batches.append((seconds, count))


class PeakMemory:
    """The most memory that was taken since it was made, in bytes: of a GPU, what PyTorch allocated; else the process's.

    On Linux; elsewhere, of a CPU, it is since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Have PyTorch compute with so many on a CPU within it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
