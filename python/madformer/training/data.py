"""What a training step gets: latents, noise and timesteps that depend on the seed and the position in the run alone.

Positions count the samples of a run; epoch after epoch, each is a permutation of the data that the seed and the
epoch's number give. Optimiser step ``s`` takes positions ``s * global_batch`` and following. Whatever is random about a
sample is drawn from a generator that the seed and its position key. So nothing depends on how many processes, workers
and micro-batches share a step, and a run is resumed by the number of its next step, on any number of processes. That is
why no loader's state is kept: torchdata's ``StatefulDataLoader`` saves one a rank, and resumes on as many ranks.

Shape legend: B samples of a micro-batch, M blocks, L latents of a block, C channels, H rows, W columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

from madformer.arguments import choice, whole_number
from madformer.conditioning.tokenizer import Tokenizer
from madformer.config import MADFormerConfig
from madformer.data.images import NO_LABEL
from madformer.data.workers import fetch_batches
from madformer.model.blocks import in_order, to_blocks
from madformer.seeds import check_seed
from madformer.training.losses import Batch
from madformer.training.noise import FlowTimesteps
from madformer.vae import encode

Order = Literal["uniform", "shards"]
WINDOW = 8
"""Shards whose samples ``order="shards"`` mixes."""
_ORDER_STREAM, _SAMPLE_STREAM, _SPLIT_STREAM = range(3)  # of random numbers: of an epoch, of a position, of a step


class TrainingData(Protocol):
    """What a run needs of its data; :class:`ImageDataset`, :class:`LatentDataset` and :class:`CachedLatents` have it.

    Attributes:
        class_names: by label; empty if unknown. num_bad: samples that turned out to be unreadable so far.
        root, shard_lengths: as :class:`madformer.data.sources.Source` has them.
    """

    @property
    def class_names(self) -> list[str]: ...
    @property
    def num_bad(self) -> int: ...
    @property
    def root(self) -> Path | None: ...
    @property
    def shard_lengths(self) -> list[int] | None: ...
    def __len__(self) -> int: ...

    def read(self, index: int, *, flipped: bool = False) -> dict[str, Any]:
        """``label``, ``caption`` and ``key``, with ``mean`` and ``deviation`` of its latents, or with an ``image``."""

    def check(self, config: MADFormerConfig, vae: AutoencoderKL | None, *, flip: bool = False) -> None:
        """Raises ``ValueError`` where a model of ``config`` cannot be trained on it, with mirror images if ``flip``."""


class CachedLatents(TensorDataset):
    """Posterior mean and standard deviation of every image, each ``(N, C, H, W)``, in memory.

    Args:
        labels: -1 where unknown; None for no labels at all. captions: None for none. class_names: by label; empty if
            unknown.
    """

    num_bad, root, shard_lengths = 0, None, None

    def __init__(
        self,
        means: Tensor,
        deviations: Tensor,
        labels: Sequence[int] | None = None,
        captions: list[str] | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        super().__init__(means, deviations)
        self.labels = labels if labels is not None else [NO_LABEL] * len(means)
        self.captions = captions if captions is not None else [""] * len(means)
        self.class_names = list(class_names)

    def read(self, index: int, *, flipped: bool = False) -> dict[str, Any]:
        """As :meth:`madformer.data.latents.LatentDataset.read`; there are no flips."""
        mean, deviation = self[index]
        label, caption = self.labels[index], self.captions[index]
        return {"mean": mean, "deviation": deviation, "label": label, "caption": caption, "key": str(index)}

    def check(self, config: MADFormerConfig, vae: AutoencoderKL | None = None, *, flip: bool = False) -> None:
        """Raises ``ValueError`` where a model does not take these latents."""
        config.check_latents(self.tensors[0].shape[1:], "data in memory")
        if flip:
            raise ValueError("flip=True needs mirror images: `madformer data latents` encodes them, the cache does not")


def cache_latents(vae: AutoencoderKL, images: Dataset[Any], *, batch_size: int = 64) -> CachedLatents:
    """Encode a whole data set once: :func:`encode`'s mean and standard deviation of every image."""
    moments, labels, captions = [], [], []
    for batch in tqdm(DataLoader(images, batch_size=batch_size), desc="encoding", unit="batch"):
        moments.append(torch.stack(encode(vae, batch["image"])).cpu())
        labels += batch["label"].tolist()
        captions += batch["caption"]
    means, deviations = torch.cat(moments, dim=1)
    return CachedLatents(means, deviations, labels, captions, getattr(images, "class_names", ()))


@dataclass(frozen=True)
class Conditioning:
    """What of a sample the model is told.

    Attributes:
        tokenizer: for a model with text.
        caption: what the text is: the sample's caption, or its label in decimal.
        caption_dropout, label_dropout: how often it goes without.
    """

    tokenizer: Tokenizer | None = None
    caption: Literal["caption", "label"] = "caption"
    caption_dropout: float = 0.0
    label_dropout: float = 0.0

    def text_of(self, sample: Mapping[str, Any]) -> str:
        return str(sample["label"]) if self.caption == "label" else sample["caption"]


@dataclass(frozen=True)
class Share:
    """A process's part of every optimiser step.

    With ``W`` processes and micro-batches of ``b``, a step has ``A = global_batch / (W * b)`` of them for each; number
    ``a`` of rank ``r`` holds positions ``step * global_batch + (a * W + r) * b`` and the ``b - 1`` that follow.

    Attributes:
        global_batch: samples of a step. micro_batch: of one batch here.
        rank, world_size: which of how many processes this is.

    Raises:
        ValueError: a number out of range, or micro-batches that do not make up a step.
    """

    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        whole_number("micro_batch", self.micro_batch, 1)
        whole_number("global_batch", self.global_batch, 1)
        if self.global_batch % (self.micro_batch * self.world_size):
            raise ValueError(
                f"global_batch={self.global_batch} must be a multiple of micro_batch={self.micro_batch} "
                f"x world_size={self.world_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} must be from 0 to world_size - 1 = {self.world_size - 1}")

    def micro_batches(self, first_step: int) -> Iterator[range]:
        """Their positions, step after step."""
        for step in itertools.count(first_step):
            first, last = step * self.global_batch, (step + 1) * self.global_batch
            for start in range(first + self.rank * self.micro_batch, last, self.world_size * self.micro_batch):
                yield range(start, start + self.micro_batch)


@dataclass(frozen=True)
class Draws:
    """How samples are drawn.

    Attributes:
        seed: from 0 to 2^63 - 1.
        num_timesteps: timesteps are from ``0 .. num_timesteps - 1``; of a flow, shares of noise times this.
        flip: mirror every second sample, by chance.
        conditioning: what the model is told of a sample.
        order: ``uniform`` permutations, or ``shards`` for disks that seek slowly: shards are permuted, and the samples
            within each :data:`WINDOW` of them.
        flow: how the shares of noise of flow matching are drawn; None for whole timesteps, all as often.

    Raises:
        ValueError: a number out of range, or an order that there is not.
    """

    seed: int
    num_timesteps: int = 1000
    flip: bool = False
    conditioning: Conditioning = field(default_factory=Conditioning)
    order: Order = "uniform"
    flow: FlowTimesteps | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        whole_number("num_timesteps", self.num_timesteps, 1)
        choice("order", self.order, get_args(Order))


class BatchStream:
    """Endless micro-batches of one process, in order: those of step ``first_step``, of the next step, and so on.

    All processes' together are bit for bit what one process would get (with images on a GPU, to the VAE's rounding).

    Random numbers are drawn in the workers: there is one stream of Philox for a pair of seed and position. In it stand,
    in this order, the flip, the posterior's noise, the timesteps, the noise, whether caption and label are left out,
    and the blocks' order; each is drawn even if it is not used.

    Args:
        data: moments on the disk (:class:`LatentDataset`) or in memory (:func:`cache_latents`, or any tensors of means
            and deviations): no VAE is called. Or images, which the VAE encodes in passing, in this process.
        vae: as stored; of latents on the disk it is asked whether it made them. None will do for latents.
        config: gives blocks and geometry.
        first_step: where to begin, or to go on.
        num_workers: processes that read and draw, beside this one; with 0 this one does.

    Raises:
        ValueError: a number out of range; data that do not fit the model, or the VAE; flips or shards where there are
            none. Later: data that are damaged, or too many unreadable images.
    """

    def __init__(
        self,
        data: TrainingData | TensorDataset,
        vae: AutoencoderKL | None,
        config: MADFormerConfig,
        share: Share,
        draws: Draws,
        *,
        first_step: int = 0,
        num_workers: int = 0,
    ) -> None:
        whole_number("first_step", first_step, 0)
        whole_number("num_workers", num_workers, 0)
        if isinstance(data, TensorDataset) and not isinstance(data, CachedLatents):
            means, deviations = data.tensors
            data = CachedLatents(means, deviations)
        data.check(config, vae, flip=draws.flip)
        self.vae, self.config = vae, config
        if draws.order == "shards" and data.shard_lengths is None:
            raise ValueError("order='shards' needs data in .tar shards")
        order = EpochOrder(len(data), draws.seed, data.shard_lengths if draws.order == "shards" else None)
        places = ([(place, order[place]) for place in places] for places in share.micro_batches(first_step))
        # one loader for the whole run: its workers live as long
        self._draws = fetch_batches(
            _Reader(data, config, draws), places, num_workers=num_workers, pin_memory=torch.cuda.is_available()
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, pixels_BCHW = next(self._draws)
        if pixels_BCHW is not None:
            batch.clean_BMLC = self._encode(pixels_BCHW, batch.clean_BMLC, batch.order_BM)
        return batch

    def close(self) -> None:
        """Stop the workers, if there are any."""
        self._draws.close()

    def _encode(self, pixels_BCHW: Tensor, noise_BMLC: Tensor, order_BM: Tensor | None) -> Tensor:
        assert self.vae is not None
        # on a CPU one by one: oneDNN's results change with the batch, and with it would the draw
        num = 1 if self.vae.device.type == "cpu" else len(pixels_BCHW)
        encoded = [encode(self.vae, some) for some in pixels_BCHW.split(num)]
        mean, deviation = (to_blocks(torch.cat(parts), self.config) for parts in zip(*encoded, strict=True))
        if order_BM is not None:
            order_BM = order_BM.to(mean.device, non_blocking=True)
        mean, deviation = (in_order(moments, self.config, order_BM) for moments in (mean, deviation))
        return mean + deviation * noise_BMLC.to(mean.device, non_blocking=True)


class EpochOrder:
    """Which sample stands at a position: endless epochs, each a permutation given by the seed and its number.

    Args:
        length: samples. shard_lengths: of consecutive shards, to keep together what lies together.
    """

    def __init__(self, length: int, seed: int, shard_lengths: Sequence[int] | None = None) -> None:
        self.length, self.seed, self.shard_lengths = length, seed, shard_lengths
        self._epoch, self._samples = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._samples = epoch, self._permutation(epoch)
        return int(self._samples[offset])

    def _permutation(self, epoch: int) -> np.ndarray:
        random = _generator(self.seed, epoch, _ORDER_STREAM)
        if self.shard_lengths is None:
            return random.permutation(self.length)
        shards = np.split(np.arange(self.length), np.cumsum(self.shard_lengths)[:-1])
        shuffled = [shards[i] for i in random.permutation(len(shards))]
        windows = (np.concatenate(shuffled[i : i + WINDOW]) for i in range(0, len(shuffled), WINDOW))
        return np.concatenate([random.permutation(window) for window in windows])


_Place = tuple[int, int]  # position, and the sample that stands there
_Draw = tuple[Batch, Tensor | None]


@dataclass(frozen=True)
class _Reader:
    """What a worker makes of places: a batch and None. Or, of images, their pixels, and the batch has the posterior's
    noise in place of clean latents."""

    data: TrainingData
    config: MADFormerConfig
    draws: Draws

    def __call__(self, places: Sequence[_Place]) -> _Draw:
        samples = [self._draw(*place) for place in places]
        clean, noise, timestep = (torch.stack([s[name] for s in samples]) for name in ("clean", "noise", "timestep"))
        order = torch.stack([s["order"] for s in samples]) if self.config.block_order == "random" else None
        batch = Batch(
            in_order(to_blocks(clean, self.config), self.config, order),
            noise,
            timestep,
            torch.tensor([sample["label"] for sample in samples]),
            [sample["caption"] for sample in samples],
            order_BM=order,
        )
        if self.config.text is not None and self.draws.conditioning.tokenizer is not None:
            batch.text_BP = self.draws.conditioning.tokenizer.encode(batch.captions, self.config.text.length)
        images = [sample["image"] for sample in samples if "image" in sample]
        return batch, torch.stack(images) if images else None

    def _draw(self, position: int, index: int) -> dict[str, Any]:
        config, random = self.config, _generator(self.draws.seed, position, _SAMPLE_STREAM)
        flipped = bool(random.random() < 0.5) and self.draws.flip
        posterior_CHW = _normal(random, *config.latent_shape)
        timestep_M = self._timesteps(random)
        noise_MLC = _normal(random, config.num_blocks, config.latents_per_block, config.latent_channels)
        sample = self.data.read(index, flipped=flipped)
        sample |= self._condition(sample, *(random.random(2)))
        order_M = torch.from_numpy(random.permutation(config.num_blocks))
        clean_CHW = posterior_CHW if "image" in sample else sample["mean"] + sample["deviation"] * posterior_CHW
        drawn = {"clean": clean_CHW, "noise": noise_MLC, "timestep": timestep_M, "order": order_M}
        return {**sample, **drawn}

    def _timesteps(self, random: np.random.Generator) -> Tensor:
        num_timesteps, num_blocks = self.draws.num_timesteps, self.config.num_blocks
        if self.draws.flow is None:
            return torch.from_numpy(random.integers(0, num_timesteps, num_blocks))
        return torch.from_numpy(num_timesteps * self.draws.flow.shares(random, num_blocks)).float()

    def _condition(self, sample: dict[str, Any], caption_chance: float, label_chance: float) -> dict[str, Any]:
        """Caption and label as the model is told them."""
        label, classes = sample["label"], self.config.num_classes
        if classes and not 0 <= label < classes:
            known = "none" if label == NO_LABEL else str(label)
            raise ValueError(f"sample {sample['key']} has the label {known}, and the model's are 0 to {classes - 1}")
        left_out = caption_chance < self.draws.conditioning.caption_dropout
        return {
            "caption": "" if left_out else self.draws.conditioning.text_of(sample),
            "label": NO_LABEL if label_chance < self.draws.conditioning.label_dropout else label,
        }


def draw_split(config: MADFormerConfig, seed: int, step: int) -> int | None:
    """How many diffusion layers the batches of a step have; None for the configuration's.

    All processes agree on it, and a resumed run draws what the unbroken one would have.
    """
    choices = config.elastic_diffusion_layers
    return int(_generator(seed, step, _SPLIT_STREAM).choice(choices)) if choices else None


def _generator(seed: int, number: int, stream: int) -> np.random.Generator:
    """Random numbers of a key: all bits of the seed and of the number count."""
    return np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, stream]))


def _normal(random: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
