"""The autoencoder: decoding in groups, one by one and in tiles gives the same pictures, as far as each promises."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from madformer.vae import (
    bytes_per_picture,
    check_finite,
    check_vae,
    decode,
    downscale,
    encode,
    finite,
    load_vae,
    num_channels,
    set_tile,
    tile_of,
    to_uint8,
)
from tests.helpers.testing import DEVICE, assert_within_budget
from tests.helpers.vae_cases import CLASSES, make_vae

ROOT = Path(__file__).parent.parent
VAE = ROOT / "assets" / "emoji64" / "vae"
WIDEST = 9 * 96  # what a convolution of the decoder sums


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return load_vae(VAE)


@pytest.fixture(scope="module")
def picture_latents(vae: AutoencoderKL) -> Tensor:
    """Of a sheet of 16 emoji, 256 x 256 pixels: (1, 4, 64, 64)."""
    sheet = np.asarray(Image.open(ROOT / "docs" / "images" / "grid.png").convert("RGB"))[:256, :256]
    pixels = torch.from_numpy(sheet.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    return encode(vae, pixels)[0]


def test_loaded_for_speed(vae: AutoencoderKL) -> None:
    kernels = [weight for weight in vae.parameters() if weight.ndim == 4 and weight.shape[-1] > 1]
    assert kernels
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    assert not any(weight.requires_grad for weight in vae.parameters())
    assert (downscale(vae), tile_of(vae)) == (4, 1024)


def test_decode_is_the_autoencoders(vae: AutoencoderKL, picture_latents: Tensor) -> None:
    latents = picture_latents.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)[:5]
    raw = latents / vae.config.scaling_factor
    plain = AutoencoderKL.from_pretrained(VAE, low_cpu_mem_usage=False)
    with torch.no_grad():
        eager, oracle = plain.decode(raw).sample, plain.double().decode(raw.double()).sample
    pictures = decode(vae, latents)
    together = decode(vae, latents, together=True)
    for name, actual in (("all", pictures), ("two", decode(vae, latents[:2])), ("together", together)):
        expected, budget = ((t / 2 + 0.5).clamp(0, 1)[: len(actual)] for t in (oracle, eager))
        assert_within_budget(actual, expected, budget, name=name, rows=WIDEST)
    # no picture depends on its neighbours
    assert all(torch.equal(decode(vae, latents[i : i + 1])[0], pictures[i]) for i in range(5))


def test_bytes_are_rounded_as_numpy_does() -> None:
    pixels = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    pixels[0, 0, 0] = torch.tensor([0.0, 1.0, 0.5 / 255, 1.5 / 255, 254.5 / 255])
    expected = np.uint8(np.floor(pixels.permute(0, 2, 3, 1).numpy() * np.float32(255) + np.float32(0.5)))
    assert np.array_equal(to_uint8(pixels).numpy(), expected)


def test_tiles(vae: AutoencoderKL, picture_latents: Tensor) -> None:
    """Near the untiled picture everywhere; the tiles' own pictures where they do not overlap."""
    whole = decode(vae, picture_latents)
    corner = decode(vae, picture_latents[:, :, :32, :32])
    try:
        set_tile(vae, 128)
        tiled = decode(vae, picture_latents)
        small = decode(vae, picture_latents[:, :, :32, :32])
    finally:
        set_tile(vae, 1024)
    assert tiled.shape == whole.shape
    error = (tiled - whole).square()
    # measured: 32.2 dB, and 32.0 where the first two columns of tiles are blended
    assert -10 * error.mean().log10() > 31
    assert -10 * error[..., 96:128].mean().log10() > 31
    # steps of 96 pixels: up to there the first tile is alone
    torch.testing.assert_close(tiled[:, :, :96, :96], corner[:, :, :96, :96], rtol=1e-5, atol=1e-5)
    assert torch.equal(small, corner)  # no larger than a tile


def test_bad_tiles(vae: AutoencoderKL) -> None:
    for tile in (-16, 24, 1):
        with pytest.raises(ValueError, match=f"tile={tile} must be a multiple of 16 pixels"):
            set_tile(vae, tile)
    assert tile_of(vae) == 1024
    set_tile(vae, 0)
    assert (tile_of(vae), vae.use_tiling) == (0, False)
    set_tile(vae, 1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_a_picture(dtype: torch.dtype) -> None:
    """Against what torch counts of Stable Diffusion's decoder, whose pictures it need not compute for that."""
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            levels = 4
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                layers_per_block=2,
            )
            latents = torch.randn(1, 4, 64, 64)
            tracker = MemTracker()
            tracker.track_external(vae, latents)
            with tracker, torch.no_grad():
                vae.decode(latents)
            peak = sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())
            weights = sum(p.numel() * p.element_size() for p in vae.parameters())
            assert bytes_per_picture(vae, latents) == pytest.approx(peak - weights, rel=0.02)
            set_tile(vae, 256)
            assert bytes_per_picture(vae, latents) == pytest.approx((peak - weights) / 4, rel=0.02)
    finally:
        torch.set_default_dtype(torch.float32)


def test_small_pictures_are_decoded_together(vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as make up so many pixels, and only where that is asked for."""
    sizes, own = [], vae.decode

    def counted(latents_BCHW: Tensor) -> Any:
        sizes.append(len(latents_BCHW))
        return own(latents_BCHW)

    monkeypatch.setattr(vae, "decode", counted)
    small, large = torch.randn(35, 4, 4, 4), torch.randn(2, 4, 16, 96)
    for latents, together, expected in (
        (small, True, [35]),
        (small, False, [1] * 35),
        (small[:0], True, [0]),
        (large.repeat(8, 1, 1, 1), True, [5, 5, 5, 1]),
    ):
        sizes.clear()
        decode(vae, latents, together=together)
        assert sizes == expected


@pytest.mark.gpu
def test_groups_decode_as_single_pictures() -> None:
    vae = load_vae(VAE, DEVICE)
    latents = torch.randn(9, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    singles = torch.cat([decode(vae, latent[None]) for latent in latents])
    oracle = load_vae(VAE, DEVICE, torch.float64)
    exact = (oracle.decode(latents.to(DEVICE).double() / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert_within_budget(decode(vae, latents), exact, singles, rows=WIDEST)


@pytest.mark.gpu
def test_decoding_waits_for_nothing() -> None:
    vae = load_vae(VAE, DEVICE)
    latents = torch.randn(9, 4, 16, 16, device=DEVICE)
    expected = to_uint8(decode(vae, latents))
    try:
        torch.cuda.set_sync_debug_mode("error")
        pictures = to_uint8(decode(vae, latents))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(pictures, expected)


# Autoencoders of any kind


def raw_latents(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, before any scaling, as each class has them in diffusers."""
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean, encoded.latent_dist.std
    latents = encoded.latent if type(vae).__name__ == "AutoencoderDC" else encoded.latents
    return latents, torch.zeros_like(latents)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_autoencoder(name: str, tmp_path: Path) -> None:
    """Its own pictures and latents, scaled as its configuration says, and found again by its name."""
    made = make_vae(name)
    made.save_pretrained(tmp_path)
    vae = load_vae(tmp_path)
    assert type(vae) is type(made)
    assert (downscale(vae), num_channels(vae)) == (2, 4)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    raw, spread = raw_latents(made, pixels)
    mean, deviation = encode(vae, pixels)
    torch.testing.assert_close(mean, (raw - shift) * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deviation, spread * scale, rtol=1e-4, atol=1e-5)
    expected = (made.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decode(vae, mean.clone()), expected, rtol=1e-4, atol=1e-4)
    # not the next numbers of one that draws some
    alone = torch.cat([decode(vae, one[None]) for one in mean])
    torch.testing.assert_close(decode(vae, mean, together=True), alone, rtol=1e-4, atol=1e-4)


def test_mean_and_deviation_of_every_channel() -> None:
    """As in diffusers' pipelines of SDXL: ``latents * std / scaling_factor + mean`` is what is decoded."""
    mean, std = [0.1, -0.2, 0.3, 0.4], [1.5, 0.5, 2.0, 1.0]
    vae = make_vae("AutoencoderKL", latents_mean=mean, latents_std=std, shift_factor=None)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean_C, std_C = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    expected = (vae.decode(latents * std_C / 0.7 + mean_C).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decode(vae, latents), expected, rtol=1e-4, atol=1e-4)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    raw, spread = raw_latents(vae, pixels)
    torch.testing.assert_close(encode(vae, pixels)[0], (raw - mean_C) * 0.7 / std_C, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encode(vae, pixels)[1], spread * 0.7 / std_C, rtol=1e-4, atol=1e-5)


def test_autoencoders_that_have_no_place(tmp_path: Path) -> None:
    video = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1
    )
    refusal = "AutoencoderKLTemporalDecoder does not turn pictures into latents"
    video.save_pretrained(tmp_path / "video")
    for refuse in (lambda: check_vae(video), lambda: load_vae(tmp_path / "video")):
        with pytest.raises(ValueError, match=refusal) as raised:
            refuse()
        assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(ValueError, match="has 4 latent channels, and the model latent_channels=16"):
        check_vae(make_vae("AutoencoderKL"), 16)
    with pytest.raises(ValueError, match="must be one of diffusers, got Linear"):
        check_vae(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="tiles are for AutoencoderKL, and this is AutoencoderTiny"):
        set_tile(make_vae("AutoencoderTiny"), 512)


def overflowing_vae(*, force_upcast: bool) -> Any:
    """Its decoder's and encoder's first activations are beyond fp16, and normalized behind."""
    vae = make_vae("AutoencoderKL", force_upcast=force_upcast)
    for half in (vae.encoder, vae.decoder):
        half.conv_in.weight *= 3e5
        half.conv_in.weight.clamp_(-6e4, 6e4)
    return vae


def test_an_overflow_is_an_error_and_no_black_picture() -> None:
    latents, pixels = 9 * torch.randn(2, 4, 8, 8), torch.rand(2, 3, 16, 16) * 2 - 1
    vae = overflowing_vae(force_upcast=False).half()
    message = (
        "image 0 of the batch: AutoencoderKL in float16 makes {} that are not finite; load it in float32 or bfloat16"
    )
    with pytest.raises(FloatingPointError, match=message.format("pictures")):
        check_finite(finite(decode(vae, latents)), vae)
    with pytest.raises(FloatingPointError, match=message.format("latents")):
        encode(vae, pixels)
    for value in (torch.inf, -torch.inf, torch.nan):
        vae = make_vae("AutoencoderKL")
        vae.decoder.conv_out.bias.data[1] = value
        with pytest.raises(FloatingPointError, match="AutoencoderKL in float32 makes pictures that are not finite"):
            check_finite(finite(decode(vae, latents)), vae)
    exact, forced = overflowing_vae(force_upcast=True).half().float(), overflowing_vae(force_upcast=True).half()
    assert torch.equal(decode(forced, latents), decode(exact, latents))
    assert torch.equal(encode(forced, pixels)[0], encode(exact, pixels)[0])
    assert forced.dtype == torch.float16


def test_calls_side_by_side_of_one_that_is_cast_for_them() -> None:
    """The first that ends leaves it in fp32 for the other, and the last puts it back; also within each other."""
    vae, exact = overflowing_vae(force_upcast=True).half(), overflowing_vae(force_upcast=True).half().float()
    latents = 9 * torch.randn(1, 4, 8, 8)
    expected = decode(exact, latents)
    begun, may_end = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            may_end.wait(10)

    vae.decoder.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(decode, vae, latents)
        assert begun.wait(10)
        assert torch.equal(decode(vae, latents), expected)
        assert vae.dtype == torch.float32
        may_end.set()
        assert torch.equal(other.result(), expected)
    assert vae.dtype == torch.float16
