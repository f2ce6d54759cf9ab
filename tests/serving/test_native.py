"""The native API over a socket: pictures are the pipeline's, events tell how they come about, bad input is refused."""

from __future__ import annotations

import base64
import dataclasses
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import madformer
from madformer import MADFormerPipeline
from madformer.bulk import Settings
from madformer.bulk.records import read_record
from madformer.cli.info import command
from madformer.serving.drawing import Asked, Reader
from madformer.serving.errors import ServingError
from madformer.serving.native import accepted_type
from tests.helpers.engine_cases import FLAT
from tests.helpers.serving_cases import (
    DEFAULTS,
    SETTINGS,
    TEXT,
    Running,
    drawn,
    events_of,
    file_of,
    make_pipeline,
    next_event,
    pixels,
    same,
    serving,
    wait_for,
)  # fmt: skip


def test_images_are_those_of_the_pipeline(server: Running, pipeline: MADFormerPipeline) -> None:
    answer = server.post({"prompt": "a cat", "num_images": 2, "seed": 5})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    expected = drawn(pipeline, prompt="a cat", num_images=2, seed=5)
    assert [image["seed"] for image in body["images"]] == [5, 6]
    for image, own in zip(body["images"], expected, strict=True):
        assert same(pixels(base64.b64decode(image["b64_json"])), own)
        assert [image["width"], image["height"]] == [own.shape[1], own.shape[0]]
    assert not same(expected[0], expected[1])


@pytest.mark.parametrize(
    ("asked", "keywords"),
    [
        ({"guidance_scale": 1, "steps": 2}, {"guidance_scale": 1.0, "num_inference_steps": 2}),
        (
            {"guidance_scale": 4, "guidance_interval": [100, 700], "negative_prompt": "dog"},
            {"guidance_scale": 4.0, "guidance_interval": (100, 700), "negative_prompt": "dog"},
        ),
    ],
    ids=["without guidance", "guided within an interval"],
)
def test_options(server: Running, pipeline: MADFormerPipeline, asked: dict[str, Any], keywords: dict[str, Any]) -> None:
    answer = server.post({"prompt": "a cat", "seed": 2**63 - 1, **asked}, "image/png")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-madformer-seed"] == str(2**63 - 1)
    (expected,) = drawn(pipeline, prompt="a cat", seed=2**63 - 1, **keywords)
    assert same(pixels(answer.content), expected)


def test_a_picture_says_how_it_was_drawn(server: Running, pipeline: MADFormerPipeline, tmp_path: Path) -> None:
    """As those of ``madformer sample`` do: the command that it names draws it, and nothing tells who asked."""
    asked = {"prompt": "a 'cat' 🐈", "negative_prompt": "dog", "seed": 2**40, "num_images": 2, "steps": 1}
    asked |= {"guidance_scale": 1.5, "guidance_interval": [100, 700], "scheduler": "ddim"}
    key = {"Authorization": "Bearer a-key-that-nobody-may-see"}
    images = server.http.post("/api/v1/images", json=asked, headers=key).json()["images"]
    record = Settings.of(pipeline, DEFAULTS, precision="exact", batch_size=SETTINGS.slots)
    for index, image in enumerate(images):
        file = tmp_path / f"{index}.png"
        file.write_bytes(base64.b64decode(image["b64_json"]))
        assert read_record(file) == {
            "version": madformer.__version__, "seed": 2**40 + index, "prompt": "a 'cat' 🐈", "negative_prompt": "dog",
            "guidance_scale": 1.5, "guidance_interval": [100.0, 700.0], "steps": 1, "scheduler": "DDIMScheduler",
            "precision": "exact", "batch_size": 3, "model": record.model, "vae": record.vae, "height": 16, "width": 16,
        }  # fmt: skip
        assert f"--seed {2**40 + index} " in str(command(read_record(file)))
        assert b"nobody" not in file.read_bytes()
    # what was kept of a picture is in no command
    changed = {"prompt": "a dog", "blocks": [1], "image": images[0]["b64_json"]}
    file.write_bytes(server.post(changed, "image/png").content)
    with pytest.raises(ValueError, match="holds no record"):
        read_record(file)


def test_another_scheduler_and_format(server: Running, pipeline: MADFormerPipeline) -> None:
    from madformer.engine.schedulers import converted

    answer = server.post({"prompt": "", "seed": 1, "scheduler": "ddim"}, "image/webp")
    assert Image.open(io.BytesIO(answer.content)).format == "WEBP"
    exact = server.post({"prompt": "", "seed": 1, "scheduler": "ddim"}, "image/png")
    other = MADFormerPipeline(
        pipeline.transformer, pipeline.vae, converted(pipeline.scheduler, "ddim"), pipeline.tokenizer
    )
    other.set_progress_bar_config(disable=True)
    assert same(pixels(exact.content), drawn(other, prompt="", seed=1)[0])


def test_events_show_the_picture_as_it_comes_about(server: Running, pipeline: MADFormerPipeline) -> None:
    """The same pictures as ``pipeline.stream``, block by block; one event after the other, none missing."""
    events = server.events({"prompt": "a cat", "seed": 3})
    numbers, kinds, data = zip(*events, strict=True)
    assert list(numbers) == sorted(set(numbers))
    assert kinds[0] == "queued"
    assert kinds[-1] == "done"
    assert [kind for kind in kinds if kind != "step"] == ["queued", "started", *["block"] * 4, "finished", "done"]
    blocks = [values for kind, values in zip(kinds, data, strict=True) if kind == "block"]
    streamed = pipeline.stream("a cat", seed=3, **DEFAULTS.keywords())
    for order, (block, output) in enumerate(zip(blocks, streamed, strict=True)):
        assert (block["order"], block["block"], block["num_blocks"]) == (order, order, 4)
        assert same(pixels(base64.b64decode(block["b64_json"])), pixels(file_of(output.images[0])))
    width, height = server.service.reader.size
    assert [block["box"] for block in blocks] == [
        [column * width // 2, row * height // 2, width // 2, height // 2] for row in range(2) for column in range(2)
    ]
    finished = data[kinds.index("finished")]
    assert finished["b64_json"] == blocks[-1]["b64_json"]
    assert finished["seed"] == 3
    assert len({values["id"] for values in data}) == 1
    # on from where a connection broke off, and the result itself
    name, after = data[0]["id"], numbers[kinds.index("started")]
    rest = server.http.get(f"/api/v1/images/{name}/events", headers={"Last-Event-ID": str(after)})
    told = [event for event in events_of(rest.text) if event[1] != "step"]  # of these the last is kept
    assert told == [event for event in events if event[0] > after and event[1] != "step"]
    state = server.http.get(f"/api/v1/images/{name}").json()
    assert state["status"] == "done"
    assert state["images"][0]["b64_json"] == finished["b64_json"]


def test_blocks_of_a_picture_are_drawn_anew(server: Running, pipeline: MADFormerPipeline) -> None:
    picture = pipeline("a cat", seed=3, **DEFAULTS.keywords()).images[0]
    encoded = base64.b64encode(file_of(picture)).decode()
    body = {"prompt": "a dog", "seed": 4, "blocks": [1, 2], "image": encoded}
    events = server.events(body)
    blocks = [values["block"] for _, kind, values in events if kind == "block"]
    assert blocks == [1, 2]
    (finished,) = (values for _, kind, values in events if kind == "finished")
    expected = drawn(pipeline, prompt="a dog", seed=4, image=picture, blocks=[1, 2])[0]
    assert same(pixels(base64.b64decode(finished["b64_json"])), expected)


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "a prompt is missing"),
    ({"prompt": 1}, "prompt: Input should be a valid string"),
    ({"prompt": "a", "label": 1}, "a class has no place"),
    ({"prompt": "a", "num_images": 0}, "num_images: Input should be greater than or equal to 1"),
    ({"prompt": "a", "num_images": 5}, "num_images=5 must be from 1 to 4"),
    ({"prompt": "a", "steps": 101}, "steps=101 must be from 1 to 100"),
    ({"prompt": "a", "steps": True}, "steps: Input should be a valid integer"),
    ({"prompt": "a" * 2001}, "prompt has 2001 characters, and may have 2000"),
    ({"prompt": "a", "scheduler": "unipc"}, "there are dpmpp, ddim"),
    ({"prompt": "a", "scheduler": "none such"}, "no scheduler 'none such'"),
    ({"prompt": "a", "refresh_every": 2}, "refresh_every=2 has no place"),
    ({"prompt": "a", "diffusion_layers": 1}, "this model was trained for"),
    ({"prompt": "a", "blocks": [0]}, "image and blocks go together"),
    ({"prompt": "a", "blocks": [0], "image": "!"}, "image is no base64"),
    ({"prompt": "a", "blocks": [0], "image": "AAAA"}, "image is no PNG, JPEG or WebP that can be read"),
    ({"prompt": "a", "guidance_scale": 1, "negative_prompt": "b"}, "guidance_scale=1 is none"),
    ({"prompt": "a", "guidance_interval": [9, 1]}, "the lower timestep, then the higher"),
    ({"prompt": "a", "seed": 2**63}, "seed: Input should be less than or equal to"),
    ({"prompt": "a", "seed": 2**63 - 1, "num_images": 2}, "seed=9223372036854775807 must be from 0 to 2^63 - 1"),
    ({"prompt": "a", "cfg": 1}, "cfg: Extra inputs are not permitted"),
    ({"prompt": "a", "deadline": 0}, "deadline: Input should be greater than 0"),
]


def test_what_cannot_be_done_is_a_line(server: Running) -> None:
    for body, message in BAD:
        answer = server.post(body)
        assert answer.status_code == 400, (body, answer.text)
        error = answer.json()["error"]
        assert message in error["message"], error
        assert "\n" not in error["message"]
        assert error["type"] == "invalid_request_error"
    picture = Image.new("RGB", (20, 16))
    answer = server.post({"prompt": "a", "blocks": [0], "image": base64.b64encode(file_of(picture)).decode()})
    assert answer.json()["error"]["message"] == "image must be of 16 x 16 pixels, width by height, got 20 x 16"
    assert server.post({"prompt": "a", "num_images": 2}, "image/png").status_code == 400
    assert server.post({"prompt": "a"}, "text/plain").status_code == 406
    garbage = {"Content-Type": "application/json"}
    for content in (b"{", b"[]", b"\xff\xfe", b'{"prompt": NaN}', b'{"seed": ' + b"9" * 5000 + b"}"):
        assert server.http.post("/api/v1/images", content=content, headers=garbage).status_code == 400
    for path, status in (("/api/v1/images/none", 404), ("/no", 404), ("/static/../app.py", 404), ("/v1/models/x", 404)):
        answer = server.http.get(path)
        assert answer.status_code == status
        assert answer.json()["error"]["code"]
    server.settle()


def test_a_request_can_be_cancelled(server: Running) -> None:
    with server.held():
        with server.http.stream(
            "POST", "/api/v1/images", json={"prompt": "a"}, headers={"Accept": "text/event-stream"}
        ) as stream:
            texts = stream.iter_text()
            name = next_event(texts)[2]["id"]
            assert server.http.get(f"/api/v1/images/{name}").json()["status"] == "queued"
            assert server.http.delete(f"/api/v1/images/{name}").status_code == 204
            *_, (_, kind, values) = events_of("".join(texts))
        assert (kind, values["error"]["code"]) == ("error", "cancelled")
        assert not server.service.desk.active
    assert server.http.get(f"/api/v1/images/{name}").json()["status"] == "cancelled"
    server.settle()


def test_a_client_that_went_away_cancels_its_request(server: Running) -> None:
    """After a while in which another connection may go on with it."""
    with server.held():
        with server.http.stream(
            "POST", "/api/v1/images", json={"prompt": "a"}, headers={"Accept": "text/event-stream"}
        ) as stream:
            name = next_event(stream.iter_text())[2]["id"]
        generation = server.service.desk.generations[name]
        wait_for(lambda: generation.status == "cancelled")
        assert server.service.desk.stepper.num_waiting == 0
    server.settle()


def test_who_waits_for_an_answer_and_leaves(server: Running) -> None:
    with server.held(), ThreadPoolExecutor(1) as pool:
        asking = pool.submit(server.post, {"prompt": "a"}, timeout=1)
        wait_for(lambda: server.service.desk.active)
        (picture,) = server.service.desk.active
        wait_for(lambda: picture.generation.status == "cancelled")
        assert isinstance(asking.exception(), httpx.ReadTimeout)
    server.settle()


def test_results_are_kept_while_there_is_room(pipeline: MADFormerPipeline) -> None:
    """The last one whatever its size, and those before it by their bytes and seconds."""
    settings = dataclasses.replace(SETTINGS, keep_bytes=1)
    with serving(pipeline, settings) as server:
        first, second = (server.post({"prompt": "a", "steps": 1}).json()["id"] for _ in range(2))
        desk = server.service.desk
        assert list(desk.generations) == [second]
        assert desk.kept_bytes == desk.generations[second].nbytes > 0
        assert server.http.get(f"/api/v1/images/{first}").status_code == 404
        assert server.http.get(f"/api/v1/images/{second}").json()["images"]


@pytest.mark.slow
def test_an_elastic_model() -> None:
    """Each request at its own split, beside the others."""
    config = TEXT.replace(elastic_diffusion_layers=(1, 2))
    elastic = make_pipeline(config)
    expected = {}
    for split in (1, 2):
        elastic.transformer.set_split(split)
        (expected[split],) = drawn(elastic, prompt="a", seed=1)
    elastic.transformer.set_split(config.diffusion_layers)
    with serving(elastic) as server, ThreadPoolExecutor(2) as pool:
        assert server.http.get("/api/v1/model").json()["elastic"] == [1, 2]
        bodies = [{"prompt": "a", "seed": 1, "diffusion_layers": split} for split in (1, 2)]
        for split, answer in zip((1, 2), pool.map(lambda body: server.post(body, "image/png"), bodies), strict=True):
            assert same(pixels(answer.content), expected[split])
    assert not same(expected[1], expected[2])


def test_classes_and_nothing_at_all() -> None:
    """What is read of a request for models of other kinds."""
    classes = make_pipeline(FLAT.replace(num_classes=3, time_conditioning="unet+adaln"), class_names=["a", "b", "c"])
    reader = Reader(classes, SETTINGS, DEFAULTS)
    drawing = reader.read(Asked(label="b", num_images=2))
    assert drawing.prompts.label is not None
    assert drawing.prompts.label.tolist() == [1, 1]
    assert drawing.kind.guided
    with pytest.raises(ServingError, match="no class 'd'"):
        reader.read(Asked(label="d"))
    plain = Reader(make_pipeline(FLAT), SETTINGS, DEFAULTS)
    assert not plain.read(Asked()).kind.guided
    with pytest.raises(ServingError, match="guidance needs a model with text or classes"):
        plain.read(Asked(guidance_scale=3.0))
    with pytest.raises(ServingError, match="a prompt has no place"):
        plain.read(Asked(prompt="a"))


def test_what_is_said_of_model_and_server(server: Running) -> None:
    model = server.http.get("/api/v1/model").json()
    assert model["num_blocks"] == 4
    assert model["schedulers"] == ["dpmpp", "ddim"]
    assert (model["conditioning"], model["elastic"], model["image_size"]) == (["text"], None, [16, 16])
    status = server.http.get("/api/v1/status").json()
    assert (status["ready"], status["running"], status["slots"]) == (True, 0, 3)
    assert status["images_done"] > 0
    assert 0 < status["batch_fill"] <= 1


def test_what_a_client_accepts() -> None:
    assert accepted_type("*/*") == "application/json"
    assert accepted_type("image/*") == "image/png"
    assert accepted_type("text/html, image/webp;q=0.5, text/event-stream;q=0.4") == "image/webp"
    assert accepted_type("application/json;q=0.1, image/jpeg") == "image/jpeg"
