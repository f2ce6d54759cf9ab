"""OpenAI's own client, as it is, against a server that listens."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest
from PIL import Image

from madformer import MADFormerPipeline
from madformer.serving.openai_api import evenly
from tests.helpers.serving_cases import DEFAULTS, Running, drawn, file_of, pixels, same

if TYPE_CHECKING:
    import openai


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    import openai  # not above: every process of pytest would wait for it, and one needs it

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_generate(client: openai.OpenAI, server: Running) -> None:
    answer = client.images.generate(prompt="a cat", n=2, size="16x16", model="madformer")
    assert answer.data is not None
    pictures = [pixels(base64.b64decode(image.b64_json or "")) for image in answer.data]
    assert [tuple(picture.shape) for picture in pictures] == [(16, 16, 3)] * 2
    assert not same(*pictures)
    assert (answer.size, answer.output_format, answer.background) == ("16x16", "png", "opaque")
    assert answer.usage is not None
    # "a cat" is 5 bytes; each image has 4 blocks of 16 tokens
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (5, 128, 133)


def test_a_picture_with_an_address(client: openai.OpenAI, server: Running) -> None:
    answer = client.images.generate(prompt="a cat", response_format="url", output_format="jpeg", output_compression=50)
    assert answer.data is not None
    url = answer.data[0].url or ""
    assert url.startswith(f"{server.url}/v1/files/images/")
    fetched = httpx.get(url)
    assert fetched.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(fetched.content)).size == (16, 16)
    token = url.rpartition("/")[2]
    files = server.service.files
    files[token] = files[token].__class__(fetched.content, "image/jpeg", 0.0)
    assert httpx.get(url).status_code == 404


def last_seed(server: Running) -> int:
    """OpenAI's API has no seeds."""
    return list(server.service.desk.generations.values())[-1].drawing.seed


def test_partial_pictures(client: openai.OpenAI, server: Running, pipeline: MADFormerPipeline) -> None:
    """As many as were asked for, then the whole one, under the names that are documented."""
    with client.images.generate(prompt="a cat", stream=True, partial_images=3) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == [*["image_generation.partial_image"] * 3, "image_generation.completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1, 2]  # type: ignore[union-attr]
    pictures = [pixels(base64.b64decode(event.b64_json)) for event in events]
    for picture, output in zip(
        pictures, pipeline.stream("a cat", seed=last_seed(server), **DEFAULTS.keywords()), strict=True
    ):
        assert same(picture, pixels(file_of(output.images[0])))
    assert events[-1].usage.output_tokens == 64  # type: ignore[union-attr]


def test_edit(client: openai.OpenAI, server: Running, pipeline: MADFormerPipeline) -> None:
    """Blocks in which the mask is transparent anywhere are drawn anew, and no others."""
    picture = pipeline("a cat", seed=3, **DEFAULTS.keywords()).images[0]
    mask = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    mask.putpixel((9, 2), (0, 0, 0, 0))
    files = {"image": ("a.png", file_of(picture)), "mask": ("m.png", file_of(mask))}
    with client.images.edit(prompt="a dog", stream=True, partial_images=1, **files) as stream:  # type: ignore[call-overload]
        events = list(stream)
    # the one block that is drawn is the whole of it
    assert [event.type for event in events] == ["image_edit.completed"]
    answer = client.images.edit(prompt="a dog", n=2, **files)  # type: ignore[call-overload]
    seed = last_seed(server)
    expected = drawn(pipeline, prompt="a dog", seed=seed, num_images=2, image=picture, blocks=[1])
    for image, own in zip(answer.data, expected, strict=True):
        assert same(pixels(base64.b64decode(image.b64_json)), own)
    assert answer.usage.output_tokens == 2 * 16


def test_what_cannot_be_done(client: openai.OpenAI, pipeline: MADFormerPipeline) -> None:
    import openai

    refused = {
        "size='32x32' is not possible: this model draws 16x16": {"size": "32x32"},
        "background='transparent' is not possible": {"background": "transparent"},
        "quality='hd' is not possible": {"quality": "hd"},
        "output_format='gif' is not possible": {"output_format": "gif"},
        "output_compression is for": {"output_compression": 10},
        "partial_images is for stream=true": {"partial_images": 1},
        "style: Extra inputs are not permitted": {"style": "vivid"},
        "num_images=5 must be from 1 to 4": {"n": 5},
    }
    for message, options in refused.items():
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="a", **options)  # type: ignore[call-overload]
        assert message in caught.value.message
        assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt="a", model="dall-e-2")
    assert missing.value.code == "model_not_found"
    picture, clear = file_of(Image.new("RGB", (16, 16))), Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    for mask, message in (
        (picture, "mask must have an alpha channel"),
        (file_of(clear), "mask is transparent nowhere"),
        (file_of(clear.resize((8, 8))), "mask must be of 16 x 16 pixels, got 8 x 8"),
        (b"no picture", "mask is no PNG, JPEG or WebP"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.images.edit(prompt="a", image=("a.png", picture), mask=("m.png", mask))
    with pytest.raises(openai.BadRequestError, match="a mask is missing"):
        client.images.edit(prompt="a", image=("a.png", picture))


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["madformer"]
    assert client.models.retrieve("madformer").owned_by == "madformer"


def test_partial_pictures_are_spread_over_the_blocks() -> None:
    assert evenly(3, 4) == [0, 1, 2]
    assert evenly(1, 4) == [1]
    assert evenly(2, 9) == [2, 5]
    assert evenly(0, 4) == []
