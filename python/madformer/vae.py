"""The autoencoder between pixels and latents: one of diffusers', loaded and used in one place.

Shape legend: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ConsistencyDecoderVAE
from torch import Tensor, nn

from madformer.files.hub import CONFIG_NAME, resolve_folder
from madformer.files.text import first_line

MAX_UNTILED = 1024
"""Pixels a side: larger pictures are decoded in tiles of this size, unless :func:`set_tile` says otherwise."""
ENCODED_PIXELS = 2**21
"""Of the pictures that a GPU encodes at once: with Stable Diffusion's encoder 5 GiB of activations in fp32, counted by
torch's ``MemTracker``."""
TOGETHER_PIXELS = 2**17
"""Of the pictures that a CPU decodes at once where that is asked for: 32 of 64 pixels. It is faster only for small
ones, whose convolutions are too short."""
USABLE = (
    "AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL", "AutoencoderDC", "AutoencoderKLHunyuanImage",
    "ConsistencyDecoderVAE", "VQModel",
)  # fmt: skip
"""The classes of diffusers that turn a picture into latents of (channels, rows, columns) and back."""

_casting = threading.Lock()
_users: dict[Any, int] = {}
"""How many calls are under way of each autoencoder that was cast for them."""


def load_vae(
    name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, **options: Any
) -> Any:
    """An autoencoder from a folder or hub id, frozen, in eval mode, channels-last, tiled above ``MAX_UNTILED``.

    Its class is the one that its ``config.json`` names.

    Args:
        dtype: cast the weights; None keeps the stored dtype. options: of the class's ``from_pretrained``.

    Raises:
        FileNotFoundError, ValueError: there is none, it is damaged, or of a class that has no place; one line.
    """
    folder, kind = resolve_folder(name), AutoencoderKL
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        kind = getattr(diffusers, config.get("_class_name", kind.__name__))
        # low_cpu_mem_usage would need accelerate, and says so on every load
        vae = kind.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False, **options)
    except Exception as error:
        # diffusers raises several kinds for one cause, over several lines
        raise ValueError(f"{folder} holds no readable {kind.__name__}: {first_line(error)}") from error
    check_vae(vae)
    return prepare_vae(vae.to(device))


def prepare_vae(vae: Any) -> Any:
    """As it is used for speed: frozen, in eval mode, channels-last, and tiled above ``MAX_UNTILED`` where it can be."""
    if isinstance(vae, AutoencoderKL):
        set_tile(vae, MAX_UNTILED)
    return vae.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def check_vae(vae: Any, latent_channels: int | None = None) -> None:
    """Whether it makes latents of (channels, rows, columns) of pictures, as many channels as the model draws.

    Raises:
        ValueError: it does not; one line.
    """
    name = type(vae).__name__
    foreign = type(vae).__module__.partition(".")[0] != "diffusers"
    if not foreign and name not in USABLE:
        listed = ", ".join(USABLE)
        raise ValueError(f"{name} does not turn pictures into latents (channels, rows, columns) and back: use {listed}")
    if not isinstance(vae, nn.Module) or not all(hasattr(vae, method) for method in ("encode", "decode", "config")):
        raise ValueError(f"the autoencoder must be one of diffusers, got {name}")
    own = num_channels(vae)
    if latent_channels is not None and own is not None and own != latent_channels:
        raise ValueError(f"the autoencoder has {own} latent channels, and the model latent_channels={latent_channels}")


def num_channels(vae: Any) -> int | None:
    """Of its latents; None where its configuration does not say."""
    config = vae.config
    return getattr(config, "vq_embed_dim", None) or getattr(config, "latent_channels", None)


def downscale(vae: Any) -> int:
    """Pixels a latent, along a side."""
    config = vae.config
    if (ratio := getattr(config, "spatial_compression_ratio", None)) is not None:
        return int(ratio)
    levels = getattr(config, "encoder_block_out_channels", None) or config.block_out_channels
    return 2 ** (len(levels) - 1)


def set_tile(vae: Any, tile: int) -> None:
    """Decode pictures with a side of more than ``tile`` pixels in tiles of that size; 0 never tiles.

    The tiles are those of diffusers' ``AutoencoderKL``: they overlap by a quarter and are blended linearly. Memory is
    then a tile's, and the result is not quite the untiled one: GroupNorm and attention see a tile, not the picture.

    Raises:
        ValueError: ``tile`` is neither 0 nor a multiple of four times :func:`downscale`, whose quarter is a whole
            number of latents; tiles of another class of autoencoder.
    """
    if tile == 0:
        if hasattr(vae, "disable_tiling"):
            vae.disable_tiling()
        return
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(
            f"tile={tile}: tiles are for AutoencoderKL, and this is {type(vae).__name__}; 0 is for no tiles"
        )
    unit = 4 * downscale(vae)
    if tile < 0 or tile % unit:
        raise ValueError(f"tile={tile} must be a multiple of {unit} pixels, or 0 for no tiles")
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // downscale(vae)


def tile_of(vae: Any) -> int:
    """What :func:`set_tile` was given."""
    return getattr(vae, "tile_sample_min_size", 0) if getattr(vae, "use_tiling", False) else 0


def normalization(vae: Any, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Offset and scale, fp32 and to be broadcast over ``(B, C, H, W)``: the model draws ``(latents - offset) * scale``.

    What the configuration says of it: ``scaling_factor``, ``shift_factor``, and ``latents_mean`` and ``latents_std``
    of every channel.
    """
    config = vae.config

    def field(name: str, default: float) -> Tensor:
        value = getattr(config, name, None)
        return torch.tensor(default if value is None else value, dtype=torch.float32, device=device).view(1, -1, 1, 1)

    offset = field("latents_mean", 0.0) + field("shift_factor", 0.0)
    return offset, field("scaling_factor", 1.0) / field("latents_std", 1.0)


@torch.inference_mode()
def encode(vae: Any, images_BCHW: Tensor, *, check: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scaled latents, each ``(B, C, H, W)``, of images in [-1, 1].

    On a GPU in groups of ``ENCODED_PIXELS``; on a CPU all together, which for pictures of 64 pixels takes half as long
    as one by one.

    Args:
        check: wait for the device and look for numbers that are not finite.

    Raises:
        FloatingPointError: latents that are not finite, such as those of fp16 where it overflows.
    """
    with _in_working_dtype(vae):
        images = images_BCHW.to(_device(vae), vae.dtype)
        group = len(images) if images.device.type == "cpu" else max(1, ENCODED_PIXELS // images[0, 0].numel())
        moments = [_moments(vae.encode(some)) for some in images.split(group)]
    mean, deviation = (torch.cat(parts).float() for parts in zip(*moments, strict=True))
    if check:
        check_finite(finite(mean), vae, "latents")
    offset, scale = normalization(vae, mean.device)
    return (mean - offset) * scale, deviation * scale


def _moments(encoded: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what an autoencoder calls its result; one without a distribution is exact."""
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is not None:
        return posterior.mean, posterior.std
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return latents, torch.zeros_like(latents)


@torch.no_grad()
def decode(vae: Any, latents_BCHW: Tensor, *, together: bool = False) -> Tensor:
    """Pictures ``(B, 3, H, W)`` in [0, 1] of scaled latents, fp32 on the autoencoder's device; waits for nothing.

    On a CPU one at a time, so that no picture depends on its neighbours: oneDNN's results change with the batch, by
    4e-6 in fp32 and 8e-3 in bf16 (``assets/emoji64``, values in [-1, 1]). On a GPU in groups, whose size depends on
    the device and the picture's size alone. Numbers that are not finite stay so: :func:`check_finite` looks for them.

    Args:
        together: a picture may depend on its neighbours by rounding, so that a CPU decodes small ones in groups, too:
            eight of 64 pixels in two thirds of the time in fp32, in two fifths in bf16 (two cores of a Xeon with AMX).
    """
    offset, scale = normalization(vae, latents_BCHW.device)
    latents = latents_BCHW / scale + offset
    with _in_working_dtype(vae):
        latents = latents.to(_device(vae), vae.dtype, memory_format=torch.channels_last)
        # the one decoder that draws random numbers of its own: always the same, and of a group one after the other
        drawn = isinstance(vae, ConsistencyDecoderVAE)
        groups = latents.split(_group_size(vae, latents, together and not drawn))
        options = [{"generator": torch.Generator(latents.device).manual_seed(0)} if drawn else {} for _ in groups]
        pixels = torch.cat(
            [vae.decode(g, **keywords).sample.float() for g, keywords in zip(groups, options, strict=True)]
        )
    # infinity becomes NaN, which is not clamped
    return (pixels / 2 + 0.5 + 0 * pixels).clamp(0, 1)


def finite(values_BCHW: Tensor) -> Tensor:
    """Which pictures or latents are finite throughout, ``(B,)``; waits for nothing."""
    return values_BCHW.isfinite().flatten(1).all(1)


def check_finite(finite_B: Tensor, vae: Any, what: str = "pictures") -> None:
    """Of what an autoencoder made, by :func:`finite`; waits for the device.

    Raises:
        FloatingPointError: one is not; the message names the first one of the batch.
    """
    sound = finite_B.tolist()
    if not all(sound):
        dtype = str(vae.dtype).removeprefix("torch.")
        raise FloatingPointError(
            f"image {sound.index(False)} of the batch: {type(vae).__name__} in {dtype} makes {what} that are not finite"
            + ("; load it in float32 or bfloat16" if dtype == "float16" else "")
        )


@contextmanager
def _in_working_dtype(vae: Any) -> Iterator[None]:
    """fp32 in place of fp16 for an autoencoder whose ``force_upcast`` says that its activations overflow in it."""
    if not getattr(vae.config, "force_upcast", False):
        yield
        return
    with _casting:
        cast = vae in _users or vae.dtype == torch.float16
        if cast:
            vae.to(torch.float32)
            _users[vae] = _users.get(vae, 0) + 1
    try:
        yield
    finally:
        with _casting:
            if cast:
                _users[vae] -= 1
                if not _users[vae]:
                    del _users[vae]
                    vae.to(torch.float16)


def _device(vae: Any) -> torch.device:
    """Where it computes, which an offloading hook decides before the module's own place."""
    hook = getattr(vae, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or vae.device)


def to_uint8(pixels_BCHW: Tensor) -> Tensor:
    """Values in [0, 1] to ``(B, H, W, 3)`` bytes, rounded."""
    return (pixels_BCHW * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def bytes_per_picture(vae: Any, latents_BCHW: Tensor) -> int:
    """What decoding one picture of these latents takes besides the weights, or one tile of it.

    A decoder holds at most three of its widest activations, those behind the last upsampling, at a time: counted
    with torch's ``MemTracker`` on Stable Diffusion's geometry, at 512, 1024 and 2048 pixels.
    """
    tile = tile_of(vae)
    sides = [side * downscale(vae) for side in latents_BCHW.shape[2:]]
    area = math.prod(min(side, tile or side) for side in sides)
    # channels of the decoder's levels, from the picture inwards
    widths = getattr(vae.config, "decoder_block_out_channels", None) or vae.config.block_out_channels
    return 3 * area * max(widths[:2]) * vae.dtype.itemsize


def _group_size(vae: Any, latents_BCHW: Tensor, together: bool) -> int:
    """How many pictures are decoded at once: on a GPU by an eighth of its memory.

    Free memory is not asked for: the grouping, and with it the rounding, would differ from run to run.
    """
    if latents_BCHW.device.type != "cuda":
        pixels = math.prod(latents_BCHW.shape[2:]) * downscale(vae) ** 2
        return max(1, TOGETHER_PIXELS // pixels) if together else 1
    memory = torch.cuda.get_device_properties(latents_BCHW.device).total_memory
    return max(1, memory // 8 // bytes_per_picture(vae, latents_BCHW))
