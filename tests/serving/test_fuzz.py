"""Requests that nobody would send: each is answered, none with a fault of the server's own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from madformer import MADFormerPipeline
from madformer.serving import ServerSettings
from tests.helpers.serving_cases import serving

NAMES = [
    "prompt", "label", "negative_prompt", "num_images", "steps", "guidance_scale", "guidance_interval", "seed",
    "scheduler", "priority", "deadline", "blocks", "image", "diffusion_layers", "refresh_every", "output_format", "n",
    "size", "response_format", "stream", "partial_images", "model", "background", "quality", "user",
    "output_compression",
]  # fmt: skip
PATHS = ["/api/v1/images", "/v1/images/generations", "/v1/images/edits"]
OTHERS = [
    "/api/v1/images/x", "/api/v1/images/x/events", "/v1/models/x", "/v1/files/images/x", "/static/x", "/x", "/metrics",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 3, 10**9, 2**63, -(2**70), 0.0, 1.5, -1e308, 1e400, float("nan"), "", "a", "a cat",
    "\0", "é" * 50, "x" * 3000, "ddim", "png", "webp", "url", "b64_json", "16x16", "auto", "AAAA", "=", [], [0], [0, 1],
    [3, 3], [-1], [99], [1.5], ["a"], [10, 500], [500, 10], [None], {}, {"a": 1}, [[0]], 0.05,
]  # fmt: skip
ACCEPT = [
    "*/*", "application/json", "image/png", "image/webp", "text/event-stream", "text/html", "", ";;q=x", "image/*;q=0",
]  # fmt: skip


def send(client: httpx.Client, seed: int) -> tuple[int, str]:
    """The answer's status to one random request, and what it was."""
    draw = random.Random(seed)
    headers = {"Accept": draw.choice(ACCEPT)}
    if draw.random() < 0.05:
        headers["Last-Event-ID"] = draw.choice(["x", "-1", "9" * 20, "1"])
        method = draw.choice(["GET", "POST", "DELETE", "PUT", "PATCH", "HEAD"])
        answer = client.request(method, draw.choice([*OTHERS, *PATHS]), headers=headers)
        return answer.status_code, f"{method} {answer.url}"
    path = draw.choice(PATHS)
    names = draw.sample(NAMES, draw.randint(0, 6))
    body = {"prompt": "a", "steps": 1} if draw.random() < 0.5 else {}
    body |= {name: draw.choice(VALUES) for name in names}
    if path.endswith("edits"):
        kinds = [b"", b"\x89PNG\r\n\x1a\n", b"x" * 100]
        files = {name: ("a.png", draw.choice(kinds)) for name in draw.sample(["image", "mask", "image[]", "other"], 2)}
        fields = {name: str(value)[:200] for name, value in body.items()}
        return client.post(path, data=fields, files=files, headers=headers).status_code, str(body)
    content = json.dumps(body).encode()
    if draw.random() < 0.2:
        cut = draw.randint(0, len(content))
        content = content[:cut] + bytes(draw.randint(0, 255) for _ in range(draw.randint(0, 4))) + content[cut + 1 :]
    headers["Content-Type"] = draw.choice(["application/json"] * 9 + ["text/plain"])
    return client.post(path, content=content, headers=headers).status_code, content.decode(errors="replace")


def fuzz(pipeline: MADFormerPipeline, count: int) -> dict[int, int]:
    """How many requests got which status; none a fault."""
    codes: dict[int, int] = {}
    settings = ServerSettings(slots=4, max_waiting=8, max_images=2, max_steps=4, reconnect=0.05, keep=1)
    with serving(pipeline, settings) as server, ThreadPoolExecutor(8) as pool:
        for status, what in pool.map(lambda seed: send(server.http, seed), range(count)):
            assert status < 500 or status == 504, (status, what)
            codes[status] = codes.get(status, 0) + 1
        server.settle()
        assert server.post({"prompt": "a"}).status_code == 200
        assert not server.service.desk.by_client
    return codes


@pytest.mark.slow
def test_ten_thousand_random_requests(pipeline: MADFormerPipeline) -> None:
    codes = fuzz(pipeline, 10_000)
    assert sum(codes.values()) == 10_000
    assert {200, 400, 404, 405, 406} <= codes.keys()


@pytest.mark.slow
def test_schemathesis_over_the_schema(pipeline: MADFormerPipeline, tmp_path: Path) -> None:
    """Requests of the schema and beside it, which are answered as the schema says."""
    settings = ServerSettings(slots=4, max_waiting=60, max_images=2, max_steps=4, reconnect=0.05, keep=1)
    with serving(pipeline, settings) as server:
        done = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--max-examples", "40",
                "--checks", "not_a_server_error,status_code_conformance,content_type_conformance", "--seed", "1",
            ],
            capture_output=True, text=True, timeout=900, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
