"""From a data set of images to batches of blocked latents, in an order that depends on the step alone.

Shape legend: B batch, C channels, H rows, W columns, M blocks, L latents of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from tqdm import tqdm

from madformer.model.blocks import to_blocks
from madformer.vae import encode


def cache_latents(vae: AutoencoderKL, images: Dataset[Any], *, batch_size: int = 64) -> TensorDataset:
    """Encode a whole data set once: :func:`encode`'s mean and standard deviation of every image."""
    loader = DataLoader(images, batch_size=batch_size)
    encoded = [encode(vae, batch["image"]) for batch in tqdm(loader, desc="encoding", unit="batch")]
    means, deviations = (torch.cat(parts).cpu().clone() for parts in zip(*encoded, strict=True))
    return TensorDataset(means, deviations)


class ShuffledStream(Sampler[int]):
    """Endless epochs, each in an order that the seed and its number give, so that a run can resume anywhere."""

    def __init__(self, length: int, seed: int, start: int = 0) -> None:
        self.length, self.seed, self.start = length, seed, start

    def __iter__(self) -> Iterator[int]:
        epoch, offset = divmod(self.start, self.length)
        while True:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            yield from torch.randperm(self.length, generator=generator)[offset:].tolist()
            epoch, offset = epoch + 1, 0


class LatentBatches:
    """Batches of blocked latents ``(B, M, L, C)``, from cached latents or through the VAE.

    Args:
        data: a :func:`cache_latents` result, or a data set of images.
        first_batch: how many batches of an earlier run to pass over.
    """

    def __init__(
        self,
        data: Dataset[Any],
        vae: AutoencoderKL,
        *,
        batch_size: int,
        num_blocks: int,
        seed: int,
        first_batch: int = 0,
        num_workers: int = 0,
    ) -> None:
        sampler = ShuffledStream(len(data), seed, first_batch * batch_size)  # type: ignore[arg-type]
        self.loader = DataLoader(data, batch_size=batch_size, sampler=sampler, num_workers=num_workers)
        self.batches = iter(self.loader)
        self.vae, self.num_blocks = vae, num_blocks

    def next(self, generator: torch.Generator) -> Tensor:
        """The next batch; ``generator`` draws from the VAE's posterior."""
        batch = next(self.batches)
        mean, deviation = encode(self.vae, batch["image"]) if isinstance(batch, dict) else batch
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        return to_blocks(mean + deviation * noise, self.num_blocks)
