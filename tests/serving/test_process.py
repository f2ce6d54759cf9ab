"""``madformer serve`` as a process: from the demonstration model's folder to its end by a signal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

import httpx
import pytest

from tests.helpers import ROOT


@pytest.mark.slow
def test_what_is_being_drawn_is_finished_at_sigterm() -> None:
    """Exit status 0; standard output says where it is, standard error is one JSON object a line."""
    words = ["serve", "--model", "assets/emoji64", "--port", "0", "--steps", "20", "--grace", "120"]
    process = subprocess.Popen(
        [sys.executable, "-m", "madformer.cli.main", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = next(word for word in process.stdout.readline().split() if word.startswith("http://127.0.0.1:"))
        answers: list[httpx.Response] = []
        body = {"prompt": "red apple", "num_images": 2}
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/api/v1/images", json=body, timeout=300))
        )
        thread.start()
        while not httpx.get(f"{url}/api/v1/status").json()["running"]:
            pass
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/readyz").status_code == 200:
            pass
        late = httpx.post(f"{url}/api/v1/images", json=body)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        thread.join(300)
        assert len(answers[0].json()["images"]) == 2
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0
        records = [json.loads(line) for line in log.splitlines()]
        assert [one["signal"] for one in records if one["message"] == "draining"] == ["SIGTERM"]
    finally:
        process.kill()
        process.wait()
