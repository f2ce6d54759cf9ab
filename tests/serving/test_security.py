"""What keeps a server to those it is for: addresses, keys, headers, limits, and nothing of a prompt but its text."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from madformer.cli.main import main
from madformer.serving.access import ENVIRONMENT, Keys, check_bind
from madformer.serving.drawing import decode_upload
from madformer.serving.errors import ServingError
from madformer.serving.settings import ServerSettings
from madformer.serving.telemetry import JsonFormatter, request_id
from tests.helpers.serving_cases import Running, wait_for

KEY = "0123456789abcdef"


def test_an_address_that_others_reach_needs_a_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", "127.0.0.1.example.org"):
        with pytest.raises(ValueError, match="can be reached by others: give --api-key-file FILE"):
            check_bind(host, None)
        check_bind(host, Keys.of([KEY]))
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        check_bind(host, None)
    assert main(["serve", "--model", "none", "--host", "0.0.0.0"]) == 1
    assert "--host 0.0.0.0 can be reached by others" in capsys.readouterr().err
    assert main(["serve", "--model", "none", "--api-key-file", str(tmp_path / "none")]) == 1
    assert main(["serve", "--model", "none", "--max-images", "9", "--max-waiting", "0"]) == 1
    assert "max_waiting=0 must be at least 1" in capsys.readouterr().err


def test_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a file or the environment; by then only digests are kept, and none is told."""
    file = tmp_path / "keys"
    file.write_text(f"# of the page\n{KEY}\n\nanother-{KEY}\n")
    keys = Keys.load(file)
    assert keys is not None
    assert keys.client(KEY) != keys.client(f"another-{KEY}")
    assert keys.client(KEY[:-1]) is None
    assert keys.client("\udc80") is None
    assert KEY not in repr(keys)
    assert KEY not in str(vars(keys))
    monkeypatch.setenv(ENVIRONMENT, f"{KEY}x, {KEY}y")
    given = Keys.load(None)
    assert given is not None
    assert given.client(f"{KEY}y")
    monkeypatch.setenv(ENVIRONMENT, "short")
    with pytest.raises(ValueError, match="an API key must have at least 16 characters"):
        Keys.load(None)
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="there is no API key"):
        Keys.load(file)


def test_headers(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/", "/api/v1/model", "/nowhere"):
        headers = server.http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
        assert len(headers["x-request-id"]) == 32
    named = {"X-Request-ID": "mine-7"}
    assert server.http.get("/healthz", headers=named).headers["x-request-id"] == "mine-7"
    for bad in ("a b", "x" * 129, '"\\'):
        assert server.http.get("/healthz", headers={"X-Request-ID": bad}).headers["x-request-id"] != bad
    monkeypatch.setattr(server.service, "status", lambda: 1 / 0)
    answer = server.http.get("/api/v1/status", headers=named)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "ZeroDivisionError" not in answer.text
    assert "division" not in answer.text
    assert (answer.headers["x-content-type-options"], answer.headers["x-request-id"]) == ("nosniff", "mine-7")


def test_pages_of_other_sites_are_kept_out(server: Running) -> None:
    """By the names that they would reach a server on loopback by, and by what browsers say of them."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[", ""):
        answer = server.http.get("/api/v1/model", headers={"Host": host})
        assert answer.status_code in (400, 403), host
    body = {"prompt": "a"}
    foreign = server.http.post("/api/v1/images", json=body, headers={"Origin": "https://evil.example"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "wrong_origin")
    assert server.http.post("/api/v1/images", json=body, headers={"Origin": server.url}).status_code == 200
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.http.options("/api/v1/images", headers=asked).headers


def test_bodies_have_a_limit(server: Running) -> None:
    """Said in advance or not; more is not read."""
    most = server.service.settings.max_body
    head = b"POST /api/v1/images HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    port = server.http.base_url.port
    with socket.create_connection(("127.0.0.1", port or 0)) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % (most + 1))
        assert connection.recv(100).startswith(b"HTTP/1.1 413")

    async def endless() -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        while True:
            yield b"x" * 2**20

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/api/v1/images", content=endless(), headers={"Content-Type": "application/json"})

    answer = asyncio.run(post())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_pictures_have_a_limit() -> None:
    """That is looked at before a pixel is decoded: of 10^8 that one says that it has, and 10^10."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side, message in ((10_000, "10000 x 10000 pixels, and may have 16777216"), (100_000, "far more than the 1677")):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        with pytest.raises(ServingError, match=f"image has {message}"):
            decode_upload(bomb, ServerSettings().max_pixels)
    for data in (b"", b"GIF89a" + bytes(20), b"%!PS-Adobe\n%%BoundingBox: 0 0 1 1\n", bomb[:40]):
        with pytest.raises(ServingError, match="no PNG, JPEG or WebP"):
            decode_upload(data, 2**24)


def test_prompts_are_texts_and_nothing_else(server: Running) -> None:
    for prompt in ("../../etc/passwd", "{{7*7}}", "$(reboot)", "<script>", "\0\n\r", "%s%n", "𝔘𝔫𝔦", "a" * 2000):
        answer = server.post({"prompt": prompt, "steps": 1}, "image/png")
        assert answer.status_code == 200, (prompt, answer.text)
    answer = server.http.post(
        "/api/v1/images", content=b'{"prompt": "\\ud800"}', headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400


def test_logs_are_json_with_the_requests_id(caplog: pytest.LogCaptureFixture, server: Running) -> None:
    with caplog.at_level("INFO", "madformer.serving.access"):
        server.http.get("/api/v1/images/a%0Ab?x=secret", headers={"X-Request-ID": "mine-8"})
        # the line is written when the answer is on its way
        wait_for(lambda: [one for one in caplog.records if one.name == "madformer.serving.access"])
    (record,) = (one for one in caplog.records if one.name == "madformer.serving.access")
    token = request_id.set("mine-8")
    line = JsonFormatter().format(record)
    request_id.reset(token)
    values = json.loads(line)
    assert "\n" not in line
    assert (values["request_id"], values["status"]) == ("mine-8", 404)
    assert values["route"] == "/api/v1/images/{id}"
    assert "secret" not in line
    error = logging.makeLogRecord({"msg": "a\nb", "exc_info": (ValueError, ValueError("x"), None)})
    assert json.loads(JsonFormatter().format(error))["message"] == "a\nb"


def test_spans(server: Running) -> None:
    """OpenTelemetry's, below the client's own, where somebody collects them."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    parent = "0af7651916cd43dd8448eb211c80319c"
    server.http.get("/api/v1/status", headers={"traceparent": f"00-{parent}-b7ad6b7169203331-01"})
    # it ends when the answer is on its way
    wait_for(lambda: [span for span in exporter.get_finished_spans() if span.kind is trace.SpanKind.SERVER])
    (span,) = (span for span in exporter.get_finished_spans() if span.kind is trace.SpanKind.SERVER)
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == parent
    assert (span.attributes or {})["http.route"] == "/api/v1/status"
