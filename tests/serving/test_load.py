"""What a server does when too much is asked of it, when time is up, and when something breaks."""

from __future__ import annotations

import gc
import threading
import time
import unittest.mock
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from madformer import MADFormerPipeline
from madformer.serving import Keys, ServerSettings
from madformer.serving.events import EventLog
from madformer.serving.fairness import FairRanks
from madformer.serving.finishing import Work
from madformer.serving.stepping import Step
from tests.helpers.serving_cases import DEFAULTS, Running, events_of, make_pipeline, next_event, serving, wait_for

KEYS = {"first": "first-key-0123456789", "second": "second-key-0123456789"}


@pytest.fixture
def together() -> Any:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def test_a_full_queue_says_when_to_come_again(server: Running, together: ThreadPoolExecutor) -> None:
    """Nothing is lost: what is admitted is drawn, the rest is told when to try again, by what steps take."""
    with server.held() as go:
        waiting = [together.submit(server.post, {"prompt": "a", "num_images": count}) for count in (4, 3)]
        wait_for(lambda: len(server.service.desk.active) == 7)
        refused = server.post({"prompt": "a"})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        each = server.service.desk.stepper.seconds_per_image_step() * 4 * DEFAULTS.steps
        assert int(refused.headers["retry-after"]) == max(1, -(-each // 1))
        go.set()
        assert [len(one.result().json()["images"]) for one in waiting] == [4, 3]
    assert server.post({"prompt": "a"}).status_code == 200


def test_what_steps_take(server: Running) -> None:
    """Of steps made up: 10 ms alone, 30 ms of four images. An image's step is one of the latter more often than not."""
    stepper, now = server.service.desk.stepper, time.monotonic()
    made_up = deque([Step(now, 0.01, 1), Step(now, 0.03, 4)])
    with unittest.mock.patch.object(stepper, "steps", made_up):
        assert stepper.step_seconds() == pytest.approx((0.01 + 4 * 0.03) / 5)
        assert stepper.seconds_per_image_step() == pytest.approx(0.04 / 5)
        assert server.http.get("/api/v1/status").json()["step_seconds"] == pytest.approx(0.026)
        stepper.steps.clear()
        assert stepper.step_seconds() == 0.0


def test_pictures_on_the_way_are_previews(server: Running) -> None:
    """And the finished one is not, which is to be the pipeline's to the bit."""
    finisher, put = server.service.desk.finisher, []
    own = finisher.put

    def noted(work: Work) -> None:
        put.append(work.preview)
        own(work)

    with unittest.mock.patch.object(finisher, "put", noted):
        names = [name for _, name, _ in server.events({"prompt": "a"})]
    assert names.count("block") == len(put)
    assert put == [True] * (len(put) - 1) + [False]


def test_pictures_on_the_way_are_of_a_steps_time(server: Running) -> None:
    """Whoever draws waits for them, too."""
    stepper = server.service.desk.stepper
    decode_waiting = stepper.between_steps
    assert decode_waiting is not None

    def slowly() -> None:
        time.sleep(0.05)
        decode_waiting()

    slow = unittest.mock.patch.object(stepper, "between_steps", slowly)
    with slow, unittest.mock.patch.object(stepper, "steps", deque()) as taken:
        assert server.post({"prompt": "a", "steps": 1}).status_code == 200
        server.settle()
        assert min(step.seconds for step in taken) >= 0.05


def test_a_deadline_frees_the_slot(server: Running) -> None:
    with server.held():
        answer = server.post({"prompt": "a", "deadline": 0.05})
        assert answer.status_code == 504
        assert answer.json()["error"] == {
            "message": "not done within its deadline of 0.05 s",
            "type": "server_error",
            "param": None,
            "code": "deadline_exceeded",
        }
        assert not server.service.desk.active
    server.settle()
    assert server.post({"prompt": "a", "deadline": 60}).status_code == 200


def test_who_never_reads_keeps_nobody_waiting(server: Running, together: ThreadPoolExecutor) -> None:
    """Ten that do not take a byte; an eleventh is served, and what they do not read is bounded."""
    import socket

    host, port = server.http.base_url.host, server.http.base_url.port
    assert port is not None
    sockets, desk = [], server.service.desk

    def admitted() -> int:
        return desk.images_done + len(desk.active)

    before = admitted()
    for number in range(10):
        wait_for(lambda: len(desk.active) < 6)
        body = b'{"prompt": "a", "steps": 2}'
        one = socket.create_connection((host, port))
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        one.sendall(
            b"POST /api/v1/images HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        sockets.append(one)
        wait_for(lambda: admitted() > before + number)  # noqa: B023 (it is over within the round)
    wait_for(lambda: len(desk.active) < 6)
    assert server.post({"prompt": "a"}).status_code == 200
    for one in sockets:
        one.close()
    server.settle()


def test_what_is_kept_for_readers_is_bounded() -> None:
    log = EventLog(max_block_bytes=1000)
    for number in range(50):
        log.publish("step", {"index": number % 2, "step": number})
        log.publish("block", {"index": 0, "order": number, "b64_json": "x" * 300})
    kinds = [event.kind for event in log.since(0)]
    assert kinds.count("step") == 2
    assert [event.values["order"] for event in log.since(0) if event.kind == "block"] == [48, 49]
    assert [event.number for event in log.since(99)] == [100]


def test_what_is_forgotten_is_freed(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: Python looks for cycles, of pictures and who waits for them, once in thousands of requests."""
    desk = server.service.desk
    # one that is kept open holds its last request until the next one comes, and there may be several
    monkeypatch.setitem(server.http.headers, "Connection", "close")
    before = set(desk.generations)
    gc.collect()
    gc.disable()
    try:
        for accept in ("application/json", "image/png"):
            assert server.post({"prompt": "a"}, accept).status_code == 200
        assert server.events({"prompt": "a", "num_images": 2})[-1][1] == "done"
        server.settle()
        references = [weakref.ref(desk.generations[name]) for name in desk.generations.keys() - before]
        assert len(references) == 3
        for reference in references:
            desk.loop.call_soon_threadsafe(lambda reference=reference: desk._forget(reference()))
        wait_for(lambda: not any(one() for one in references))
    finally:
        gc.enable()


def test_what_is_forgotten_at_its_end_is_still_answered(
    pipeline: MADFormerPipeline, together: ThreadPoolExecutor
) -> None:
    """Of requests that end at once, all but one have no room: whoever waits for them has pictures all the same."""
    settings = ServerSettings(slots=3, max_waiting=4, max_images=4, keep_bytes=1)
    with serving(pipeline, settings) as server, server.held() as go:
        asked = [
            together.submit(server.post, {"prompt": "a"}, accept)
            for accept in ("application/json", "image/png", "application/json")
        ]
        wait_for(lambda: len(server.service.desk.active) == 3)
        go.set()
        first, picture, last = (one.result() for one in asked)
        assert picture.status_code == 200
        assert picture.content
        assert [len(answer.json()["images"]) for answer in (first, last)] == [1, 1]
        assert len(server.service.desk.ended) == 1


def test_clients_take_turns() -> None:
    """One that asked for a hundred does not keep another from its first; dearer images count for more."""
    ranks = FairRanks()
    waiting = [("greedy", ranks.rank("greedy", 0, 10)) for _ in range(100)]
    for _ in range(10):
        ranks.begun(waiting.pop(0)[1])
    waiting += [("late", ranks.rank("late", 0, 20)) for _ in range(5)]
    waiting += [("later", ranks.rank("later", 1, 10)), ("urgent", ranks.rank("urgent", -1, 10))]
    order = [client for client, _ in sorted(waiting, key=lambda one: one[1])]
    assert order[0] == "urgent"
    assert order[-1] == "later"
    assert [order[1:16].count(client) for client in ("late", "greedy")] == [5, 10]
    # who was away has not saved up anything
    ranks = FairRanks()
    for _ in range(10):
        ranks.begun(ranks.rank("busy", 0, 10))
    assert ranks.rank("new", 0, 10) == 90
    ranks.forget()
    assert ranks.ends.keys() == {(0, "busy"), (0, "new")}


def test_keys_and_their_limits(pipeline: MADFormerPipeline, together: ThreadPoolExecutor) -> None:
    settings = ServerSettings(slots=1, max_waiting=8, max_images=2, max_per_client=2)
    headers = {name: {"Authorization": f"Bearer {key}"} for name, key in KEYS.items()}
    with serving(pipeline, settings, keys=Keys.of(KEYS.values())) as server:
        for wrong in ({}, {"Authorization": "Bearer none"}, {"Authorization": f"Basic {KEYS['first']}"}):
            for path in ("/api/v1/status", "/v1/models", "/metrics", "/api/v1/images/x"):
                answer = server.http.get(path, headers=wrong)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert server.http.post("/api/v1/images", json={"prompt": "a"}, headers=wrong).status_code == 401
        for path in ("/healthz", "/readyz", "/"):
            assert server.http.get(path).status_code == 200

        def post(name: str, count: int) -> httpx.Response:
            body = {"prompt": "a", "num_images": count}
            return server.http.post("/api/v1/images", json=body, headers=headers[name])

        with server.held() as go:
            mine = together.submit(post, "first", 2)
            wait_for(lambda: len(server.service.desk.active) == 2)
            assert post("first", 1).json()["error"]["code"] == "client_limit"
            theirs = together.submit(post, "second", 1)
            wait_for(lambda: len(server.service.desk.active) == 3)
            go.set()
            answers = [mine.result(), theirs.result()]
        assert [answer.status_code for answer in answers] == [200, 200]
        name = answers[0].json()["id"]
        assert server.http.get(f"/api/v1/images/{name}", headers=headers["second"]).status_code == 404
        assert server.http.get(f"/api/v1/images/{name}", headers=headers["first"]).status_code == 200
        metrics = server.http.get("/metrics", headers=headers["first"]).text
        assert "madformer_images_total 3.0" in metrics
        assert 'madformer_refused_total{reason="client_limit"} 1.0' in metrics
        assert "process_resident_memory_bytes" in metrics
        assert not any(key in metrics for key in KEYS.values())


def test_draining(pipeline: MADFormerPipeline, together: ThreadPoolExecutor) -> None:
    """What is being drawn is finished, nothing more is admitted; what is not done in time is handed back."""
    with serving(pipeline) as server:
        drain: Callable[[float], Any] = server.service.desk.drain
        with server.held() as go:
            running = together.submit(server.post, {"prompt": "a"})
            wait_for(lambda: server.service.desk.active)
            import asyncio

            done = asyncio.run_coroutine_threadsafe(drain(30), server.service.desk.loop)
            wait_for(lambda: server.http.get("/readyz").status_code == 503)
            late = server.post({"prompt": "a"})
            assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
            assert "retry-after" in late.headers
            assert server.http.get("/healthz").status_code == 200
            go.set()
        assert running.result().status_code == 200
        done.result(10)
        server.service.desk.draining = False
        with server.held():
            cut = together.submit(server.post, {"prompt": "a"})
            wait_for(lambda: server.service.desk.active)
            asyncio.run_coroutine_threadsafe(drain(0.05), server.service.desk.loop).result(10)
            assert (cut.result().status_code, cut.result().json()["error"]["code"]) == (503, "shutting_down")


def test_a_model_whose_numbers_are_not_finite() -> None:
    """An error for its image, in a line; the server goes on."""
    broken = make_pipeline()
    with torch.no_grad():
        broken.transformer.downsampler.conv_in.weight.fill_(torch.nan)
    with serving(broken) as server:
        answer = server.post({"prompt": "a", "num_images": 2})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "non_finite"
        assert "the image is not finite from block 0, step 0 on" in answer.json()["error"]["message"]
        events = server.events({"prompt": "a"})
        assert [kind for _, kind, _ in events if kind != "step"] == ["queued", "started", "error"]
        assert server.http.get("/readyz").status_code == 200


class Death(BaseException):
    pass


def test_a_step_that_fails_and_a_thread_that_ends(pipeline: MADFormerPipeline, together: ThreadPoolExecutor) -> None:
    """Everybody is answered, and an orchestrator sees it."""
    with serving(pipeline) as server:
        stepper = server.service.desk.stepper
        (batcher,) = (one for kind, one in stepper.batchers.items() if kind.guided)
        launch = batcher._launch

        def fail(*_: object) -> None:
            batcher._launch = launch  # type: ignore[method-assign]
            raise RuntimeError("out of luck")

        batcher._launch = fail  # type: ignore[method-assign]
        answer = server.post({"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert "luck" not in answer.text
        assert server.post({"prompt": "a"}).status_code == 200

        def die(*_: object) -> None:
            raise Death

        stepper._step = die  # type: ignore[method-assign]
        answers = [together.submit(server.post, {"prompt": "a"}) for _ in range(3)]
        assert {answer.result().status_code for answer in answers} <= {500, 503}
        wait_for(lambda: not stepper.is_alive)
        assert server.post({"prompt": "a"}).json()["error"]["code"] == "not_drawing"
        assert [server.http.get(path).status_code for path in ("/healthz", "/readyz")] == [503, 503]


def test_many_at_once_are_all_answered(server: Running, together: ThreadPoolExecutor) -> None:
    """Of more than there is room for each gets a picture or a 429; some go away before."""
    codes: list[int] = []
    lock = threading.Lock()

    def ask(number: int) -> None:
        if number % 5 == 4:
            accept = {"Accept": "text/event-stream"}
            with server.http.stream("POST", "/api/v1/images", json={"prompt": "a"}, headers=accept) as stream:
                if stream.status_code == 200:
                    assert next_event(stream.iter_text())[1] == "queued"
            return
        answer = server.post({"prompt": "a", "seed": number, "steps": 1 + number % 3}, "*/*")
        with lock:
            codes.append(answer.status_code)

    list(together.map(ask, range(20)))
    assert len(codes) == 16
    assert set(codes) <= {200, 429}
    assert codes.count(200) >= 3
    server.settle()
    assert not server.service.desk.by_client
    assert events_of("") == []
