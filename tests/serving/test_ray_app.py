"""The server on a Ray cluster: two engines on this machine, of which one is killed while it draws."""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed")

from madformer.engine import SamplingOptions  # noqa: E402
from madformer.serving import client as client_module  # noqa: E402
from madformer.serving.client import Client  # noqa: E402
from madformer.serving.client_events import ApiError, Block, Done, Event, Finished  # noqa: E402
from madformer.serving.ray_app import ClusterSettings, application, status_of_all  # noqa: E402
from madformer.serving.settings import ServerSettings  # noqa: E402

MODEL = Path(__file__).parents[2] / "assets" / "emoji64"
SETTINGS = ServerSettings(slots=2, max_waiting=6, max_images=4, reconnect=2.0)
PORT = 8765
URL = f"http://127.0.0.1:{PORT}"


def make_app(model: Path) -> Any:
    """In an engine's process."""
    import torch

    from madformer import MADFormerPipeline
    from madformer.serving import create_app

    torch.set_num_threads(1)
    pipeline = MADFormerPipeline.from_pretrained(model, dtype=torch.float32)
    return create_app(pipeline, SETTINGS, defaults=SamplingOptions(steps=4, guidance=3.0), name="emoji64")


def test_status_of_engines() -> None:
    """One of two draws, three images a step of 20 ms, the other has never had anything to do."""
    idle = {
        "ready": True, "draining": True, "waiting": 0, "running": 0, "slots": 4, "steps_per_second": 0.0,
        "step_seconds": 0.0, "batch_fill": 0.0, "images_done": 0, "seconds_per_image": 0.0,
    }  # fmt: skip
    busy = {
        "ready": False, "draining": False, "waiting": 2, "running": 3, "slots": 4, "steps_per_second": 150.0,
        "step_seconds": 0.02, "batch_fill": 0.75, "images_done": 9, "seconds_per_image": 0.8,
    }  # fmt: skip
    total = status_of_all([idle, busy])
    assert (total["ready"], total["draining"], total["waiting"], total["running"]) == (True, False, 2, 3)
    assert (total["slots"], total["steps_per_second"], total["images_done"]) == (8, 150.0, 9)
    assert total["step_seconds"] == pytest.approx(0.02)
    assert total["batch_fill"] == pytest.approx(0.375)
    assert status_of_all([idle, idle])["step_seconds"] == 0.0


def test_without_ray_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'madformer\[cluster\]'"):
        application(lambda: None, SETTINGS, ClusterSettings())  # type: ignore[arg-type, return-value]


def test_what_makes_no_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match="max_replicas=1 must be at least min_replicas=2"):
        ClusterSettings(2, 1)
    with pytest.raises(ValueError, match="fronts"):
        ClusterSettings(fronts=0)


@pytest.fixture(scope="module")
def engines() -> Iterator[Any]:
    """Serve's handle of them."""
    ray = pytest.importorskip("ray", reason="Ray Serve is not installed")
    serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    places = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]), "OMP_NUM_THREADS": "1"}
    with ray.init(log_to_driver=False, num_cpus=4, include_dashboard=False, runtime_env={"env_vars": places}):
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        deployed = application(functools.partial(make_app, MODEL), SETTINGS, ClusterSettings(2, 2, num_cpus=1))
        serve.run(deployed, name="madformer")
        yield serve.get_deployment_handle("engine", "madformer")
        serve.shutdown()


@pytest.fixture
def client(engines: Any) -> Iterator[Client]:
    with Client(URL) as client:
        yield client


def until(found: Callable[[], Any], seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while not (one := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return one


def statuses(engines: Any) -> list[dict[str, Any]]:
    """Of those that answer: one that was killed may not be known to be dead yet."""
    found = engines.broadcast("status").results(timeout_s=30, return_exceptions=True)
    return [one for one in found if not isinstance(one, BaseException)]


def kill_the_one_that_draws(engines: Any) -> None:
    (busy,) = until(lambda: [one for one in statuses(engines) if one["running"]])
    os.kill(busy["pid"], signal.SIGKILL)


def two_are_there(engines: Any) -> bool:
    return sum(one["ready"] for one in statuses(engines)) == 2


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.int16)


@pytest.mark.slow
def test_a_cluster_answers_as_a_server_does(client: Client, engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page, errors, pictures, streams, and what one engine alone knows, ten times: a wrong engine would be asked."""
    page = httpx.get(f"{URL}/")
    assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
    assert "static/page.js" in page.text
    assert httpx.get(f"{URL}/static/page.css").headers["Content-Type"].startswith("text/css")
    assert [httpx.get(f"{URL}/{name}").status_code for name in ("healthz", "readyz", "nowhere")] == [200, 200, 404]
    assert client.status()["slots"] == 4
    with pytest.raises(ApiError, match="num_images=5 must be from 1 to 4"):
        client.images("red apple", num_images=5)
    large = httpx.post(f"{URL}/api/v1/images", content=b" " * (SETTINGS.max_body + 1))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")

    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda seed: client.images("red apple", seed=seed)[0], range(4)))
    assert all(one["images_done"] for one in statuses(engines))
    from madformer import MADFormerPipeline

    pipeline = MADFormerPipeline.from_pretrained(MODEL)
    expected = pipeline("red apple", num_images_per_prompt=4, seed=0, num_inference_steps=4, guidance_scale=3.0).images
    assert max(abs(pixels(a.image) - pixels(b)).max() for a, b in zip(drawn, expected, strict=True)) <= 2

    events = list(client.stream("red apple", seed=1, steps=8))
    assert [event.block for event in events if isinstance(event, Block)] == [0, 1, 2, 3]
    assert isinstance(events[-1], Done)
    with httpx.Client(base_url=URL) as http:
        for _ in range(10):
            again = http.get(f"/api/v1/images/{events[-1].id}/events", headers={"Last-Event-ID": "1"})
            assert again.text.rstrip().rpartition("event: ")[2].startswith("done")
        assert http.get("/api/v1/images/unknown").status_code == 404

    monkeypatch.setattr(client_module, "WAITS", (0.1,))
    watched = client.stream("red apple", steps=100)
    next(watched)
    watched.close()  # cancels
    until(lambda: client.status()["running"] == 0, 20)


@pytest.mark.slow
def test_a_request_whose_engine_is_killed_is_drawn_by_the_other(client: Client, engines: Any) -> None:
    until(lambda: two_are_there(engines))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.images, "blue heart", seed=3, steps=60)
        kill_the_one_that_draws(engines)
        (picture,) = waiting.result(120)
    until(lambda: two_are_there(engines))
    (again,) = client.images("blue heart", seed=3, steps=60)
    assert (picture.seed, abs(pixels(picture.image) - pixels(again.image)).max() <= 2) == (3, True)


@pytest.mark.slow
def test_a_stream_whose_engine_is_killed_says_so(client: Client, engines: Any) -> None:
    until(lambda: two_are_there(engines))
    events: list[Event] = []
    errors: list[ApiError] = []

    def listen() -> None:
        try:
            events.extend(iter(client.stream("blue heart", seed=3, steps=60)))
        except ApiError as error:
            errors.append(error)

    listener = threading.Thread(target=listen)
    listener.start()
    kill_the_one_that_draws(engines)
    listener.join(60)
    assert [error.code for error in errors] == ["engine_lost"]
    # and nothing else suffers
    assert isinstance(list(client.stream("blue heart", seed=3))[-2], Finished)
    asked = {"prompt": "red apple", "n": 1, "response_format": "url"}
    (drawn,) = httpx.post(f"{URL}/v1/images/generations", json=asked, timeout=60).json()["data"]
    for _ in range(5):
        assert Image.open(io.BytesIO(httpx.get(drawn["url"]).content)).size == (64, 64)
