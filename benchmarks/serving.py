"""How a server does under load: what it costs, what it draws when it is full, how long requests take at given loads.

    python -m benchmarks.serving --seconds 60 --soak 600

A server in a process of its own is asked by an open loop: requests come at random times (a Poisson process), whoever is
still waiting. Each is streamed: from its arrival until the first block's picture, and until the finished one. Loads are
shares of the server's capacity: the images a second that it finishes when asked at random times for twice as many as it
streams to clients who each ask again at once. Those get more, since images that are asked for together begin their
blocks together. Beside it stand the same pipeline in another process (a call and
PNG encoding, alone and in batches of as many as there are slots), and full batches on a virtual clock: arrivals of the
same kind, each batch begun when it is idle and as many wait, in the measured time of a batch. Some processes are a
fifth slower than others for all of their life, so a lone request is measured against a call in several pairs of them.

``--max-waiting`` bounds the queue, and so how long the admitted wait when too much is asked.

The last line on stdout is the metrics as JSON. Exit status 1: a server that does not start, or a request that got no
answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks import ROOT
from benchmarks.batching import arrivals
from benchmarks.record import CannotCompare, environment, finish, results_folder
from benchmarks.serving_processes import PROMPT, Direct, Server
from madformer.engine.precision import PRECISIONS
from madformer.machine import precision_of

LOADS = (0.5, 0.6, 0.8, 1.0, 1.2)
NEVER_READ = 10


@dataclass
class Level:
    """What became of the requests at one load, in seconds from their arrivals."""

    load: float
    rate: float
    images: list[float] = field(default_factory=list)
    first_blocks: list[float] = field(default_factory=list)
    refused: int = 0
    lost: int = 0
    seconds: float = 0.0
    ends: list[float] = field(default_factory=list)
    fills: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    def figures(self, image_steps: int) -> dict[str, Any]:
        """Of a record."""
        predicted = image_steps * statistics.fmean(self.step_seconds) if self.step_seconds else None
        return {
            "load": self.load,
            "arrivals_per_second": self.rate,
            "requests": len(self.images) + self.refused + self.lost,
            "refused": self.refused,
            "lost": self.lost,
            "goodput_images_per_second": len(self.images) / self.seconds,
            "latency": cuts(self.images),
            "mean_latency": statistics.fmean(self.images) if self.images else None,
            "first_block": cuts(self.first_blocks),
            "batch_fill": statistics.fmean(self.fills) if self.fills else None,
            "predicted_latency_by_step_times": predicted,
        }


def cuts(values: Sequence[float]) -> dict[str, float] | None:
    """Median, 95th and 99th percentile."""
    if len(values) < 2:
        return None
    found = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": found[49], "p95": found[94], "p99": found[98]}


async def ask(client: httpx.AsyncClient, seed: int, level: Level, arrived: float) -> None:
    """One streamed request."""
    first = None
    try:
        async with client.stream(
            "POST", "/api/v1/images", json={"prompt": PROMPT, "seed": seed}, headers={"Accept": "text/event-stream"}
        ) as answer:
            if answer.status_code == 429:
                level.refused += 1
                return
            async for line in answer.aiter_lines():
                if line == "event: block" and first is None:
                    first = time.perf_counter() - arrived
                elif line == "event: finished":
                    level.ends.append(time.perf_counter())
                    level.images.append(level.ends[-1] - arrived)
                    level.first_blocks.append(first or 0.0)
                    return
        level.lost += 1
    except httpx.HTTPError:
        level.lost += 1


async def watch(client: httpx.AsyncClient, level: Level, after: float) -> None:
    """How full steps are, and how long an image's takes: twice a second, but not at first, since the server tells means
    over the last half minute."""
    await asyncio.sleep(after)
    while True:
        status = (await client.get("/api/v1/status")).json()
        if status["step_seconds"]:
            level.fills.append(status["batch_fill"])
            level.step_seconds.append(status["step_seconds"])
        await asyncio.sleep(0.5)


async def open_loop(url: str, load: float, rate: float, seconds: float, seed: int) -> Level:
    """Requests at random times for so many seconds, and until all are answered."""
    level = Level(load, rate)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        watching = asyncio.create_task(watch(client, level, min(30.0, 0.75 * seconds)))
        started, tasks = time.perf_counter(), []
        times = [at for at in arrivals(max(4, int(2 * rate * seconds) + 20), rate, seed) if at < seconds]
        for number, at in enumerate(times):
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(client, seed + number, level, started + at)))
        watching.cancel()
        await asyncio.gather(*tasks)
        level.seconds = time.perf_counter() - started
    return level


async def closed_loop(url: str, clients: int, seconds: float, accept: str) -> float:
    """Images a second where so many clients each ask again when they are answered."""
    done: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        end = time.perf_counter() + seconds

        async def again(number: int) -> None:
            while time.perf_counter() < end:
                answer = await client.post(
                    "/api/v1/images", json={"prompt": PROMPT, "seed": number}, headers={"Accept": accept}
                )
                if answer.status_code == 200:
                    done.append(time.perf_counter())
                else:
                    await asyncio.sleep(0.05)

        await asyncio.gather(*(again(number) for number in range(clients)))
    return images_a_second(done, clients, seconds)


def images_a_second(ends: Sequence[float], clients: int, seconds: float) -> float:
    """Images a second, without the time in which a server filled up with so many and emptied."""
    inner = ends[clients:-clients] if len(ends) > 3 * clients else ends
    if len(inner) < 2:
        raise CannotCompare(f"--seconds {seconds:g} is too short to measure what the server draws when it is full")
    return (len(inner) - 1) / (inner[-1] - inner[0])


def cost(server: Server, direct: Direct, rounds: int) -> dict[str, float]:
    """A lone request against a call, interleaved; medians."""
    calls, alone, requests, firsts, streams = [], [], [], [], []
    with httpx.Client(base_url=server.url, timeout=600) as client:
        for seed in range(rounds + 1):
            call, by_one = direct.seconds(1, seed), direct.seconds(1, seed, threads=1)
            started = time.perf_counter()
            client.post("/api/v1/images", json={"prompt": PROMPT, "seed": seed}, headers={"Accept": "image/png"})
            request = time.perf_counter() - started
            level = Level(0, 0)
            asyncio.run(_lone(server.url, seed, level))
            if seed:  # the first of each warms up
                calls.append(call)
                alone.append(by_one)
                requests.append(request)
                firsts += level.first_blocks
                streams += level.images
    return {
        "pipeline_seconds": statistics.median(calls),
        "pipeline_seconds_of_one_thread": statistics.median(alone),
        "request_seconds": statistics.median(requests),
        "streamed_seconds": statistics.median(streams),
        "first_block_seconds": statistics.median(firsts),
    }


def costs(options: argparse.Namespace) -> dict[str, Any]:
    """:func:`cost` of several pairs of processes, and its medians over them."""
    pairs = []
    for _ in range(options.pairs):
        with contextlib.closing(Direct(options)) as direct, contextlib.closing(Server(options)) as server:
            pairs.append(cost(server, direct, options.rounds))
    found = {name: statistics.median(pair[name] for pair in pairs) for name in pairs[0]}
    return {
        **found,
        "own_cost": found["request_seconds"] / found["pipeline_seconds"] - 1,
        "own_cost_over_one_thread": found["request_seconds"] / found["pipeline_seconds_of_one_thread"] - 1,
        "first_block_share": found["first_block_seconds"] / found["streamed_seconds"],
        "pairs": pairs,
    }


async def _lone(url: str, seed: int, level: Level) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await ask(client, seed, level, time.perf_counter())


def full_batches(times: Sequence[float], size: int, seconds: float) -> float:
    """Mean latency where a batch begins when it is idle and as many wait as it holds; the last may be smaller."""
    now, latencies = 0.0, []
    for first in range(0, len(times), size):
        batch = times[first : first + size]
        now = max(now, batch[-1]) + seconds
        latencies += [now - at for at in batch]
    return statistics.fmean(latencies)


@contextlib.contextmanager
def never_reading(server: Server) -> Iterator[None]:
    """Ten clients that ask for a stream and take nothing of it."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    body = json.dumps({"prompt": PROMPT}).encode()
    head = f"POST /api/v1/images HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(NEVER_READ):
            one = stack.enter_context(socket.create_connection((host, int(port))))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            one.sendall(head.encode() + body)
        yield


def killed(options: argparse.Namespace) -> dict[str, int]:
    """Requests of a server that is killed while it draws: each ends in an error or a picture, none hangs."""
    server, ends = Server(options), {"answered": 0, "failed": 0}

    def ask_one() -> None:
        try:
            httpx.post(f"{server.url}/api/v1/images", json={"prompt": PROMPT}, timeout=60).raise_for_status()
            ends["answered"] += 1
        except httpx.HTTPError:
            ends["failed"] += 1

    threads = [threading.Thread(target=ask_one) for _ in range(min(4, options.slots))]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    server.process.kill()
    server.process.wait()
    for thread in threads:
        thread.join(70)
    return {**ends, "hanging": sum(thread.is_alive() for thread in threads)}


def soak(server: Server, rate: float, seconds: float) -> dict[str, float]:
    """The slope of the server's memory at a steady load, after a fifth of the time."""
    samples: list[tuple[float, float]] = []
    started, over = time.perf_counter(), threading.Event()

    def sample() -> None:
        while not over.wait(1.0):
            samples.append((time.perf_counter() - started, server.memory()))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        level = asyncio.run(open_loop(server.url, 0.8, 0.8 * rate, seconds, 7))
    finally:
        over.set()
        thread.join()
    after = [(at, size) for at, size in samples if at > seconds / 5]
    slope, _ = statistics.linear_regression(*zip(*after, strict=True))
    return {
        "seconds": seconds, "images": len(level.images), "lost": level.lost, "mib": after[-1][1],
        "mib_per_minute": 60 * slope,
    }  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start, measure, end; returns the record.

    Raises:
        CannotCompare, OSError: see the message.
    """
    device = torch.device(options.device)
    alone = costs(options)
    print(json.dumps(alone), flush=True)
    direct, server = Direct(options), Server(options)
    try:
        image_steps = direct.image_steps()
        clients = options.slots + options.max_waiting
        throughput = asyncio.run(closed_loop(server.url, clients, options.seconds, "image/png"))
        closed = asyncio.run(closed_loop(server.url, clients, options.seconds, "text/event-stream"))
        full = asyncio.run(open_loop(server.url, 2.0, 2 * closed, options.seconds, 0))
        capacity = images_a_second(full.ends, clients, options.seconds)
        batch = statistics.median(direct.seconds(options.slots) for _ in range(3))
        levels = {}
        for load in options.loads:
            level = asyncio.run(open_loop(server.url, load, load * capacity, options.seconds, int(1000 * load)))
            levels[load] = level.figures(image_steps)
            print(json.dumps(levels[load]), flush=True)
        with never_reading(server):
            beside = Level(0, 0)
            asyncio.run(_patient(server.url, beside))
        steady = soak(server, capacity, options.soak) if options.soak else None
    finally:
        direct.close()
        status = server.close()
    times = arrivals(2000, 0.6 * capacity)
    waiting = full_batches(times, options.slots, batch)
    record = {
        **environment("serving", device, ("diffusers", "fastapi", "uvicorn")),
        "cores": os.cpu_count(),
        "model": Path(options.model).name,
        "slots": options.slots,
        "max_waiting": options.max_waiting,
        "steps": options.steps,
        "guidance": options.guidance,
        "precision": options.precision,
        "compiled": options.compile,
        "alone": alone,
        "images_per_second": throughput,
        "capacity_images_per_second": capacity,
        "at_twice_the_streamed": full.figures(image_steps),
        "streamed_images_per_second": closed,
        "pipeline_images_per_second": options.slots / batch,
        "levels": list(levels.values()),
        "full_batches_mean_latency": waiting,
        "beside_ten_that_never_read": beside.images,
        "killed": killed(options),
        "soak": steady,
        "exit_status_at_sigterm": status,
    }
    record["metrics"] = metrics(record)
    lost = full.lost + sum(level["lost"] for level in levels.values()) + record["killed"]["hanging"]
    if lost := lost + (steady["lost"] if steady else 0):
        raise CannotCompare(f"{lost} requests ended without an answer")
    return record


async def _patient(url: str, level: Level) -> None:
    """Ask until there is room."""
    while not level.images and level.refused < 1000:
        await _lone(url, 0, level)
        await asyncio.sleep(0.05)


def metrics(record: dict[str, Any]) -> dict[str, float]:
    """What the issue of a server's speed is about; those of loads that were not measured are left out."""
    by_load = {level["load"]: level for level in record["levels"] if level["latency"]}
    alone = record["alone"]
    found = {
        "server_own_cost": alone["own_cost"],
        "server_own_cost_over_one_thread": alone["own_cost_over_one_thread"],
        "server_first_block_share": alone["first_block_share"],
        "server_throughput_over_pipeline": record["images_per_second"] / record["pipeline_images_per_second"],
    }
    if level := by_load.get(0.8):
        found["server_p95_at_80_over_unloaded"] = level["latency"]["p95"] / alone["streamed_seconds"]
        if level["predicted_latency_by_step_times"]:
            found["server_p95_at_80_over_predicted"] = (
                level["latency"]["p95"] / level["predicted_latency_by_step_times"]
            )
        if over := by_load.get(1.2):
            found["server_p95_at_120_over_80"] = over["latency"]["p95"] / level["latency"]["p95"]
            found["server_refused_at_120"] = over["refused"] / over["requests"]
    if level := by_load.get(0.6):
        found["server_full_batches_over_in_flight"] = record["full_batches_mean_latency"] / level["mean_latency"]
    if record["soak"]:
        found["server_mib_per_minute"] = record["soak"]["mib_per_minute"]
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "assets" / "emoji64"), help="model folder (assets/emoji64)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="as madformer serve (auto)")
    parser.add_argument("--compile", action="store_true", help="compile the denoising steps, of server and pipeline")
    parser.add_argument("--slots", type=int, default=8, help="images at once (8)")
    parser.add_argument("--max-waiting", type=int, default=4, help="images that may wait (4)")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of a block (10)")
    parser.add_argument("--guidance", type=float, default=3.0, help="scale of guidance (3)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load (60)")
    parser.add_argument("--rounds", type=int, default=6, help="lone requests of a pair of processes (6)")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of processes for lone requests (5)")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds at 80 %% in which memory is looked at (0)")
    parser.add_argument("--loads", type=float, nargs="+", default=list(LOADS), help="shares of what it draws when full")
    parser.add_argument("--out", type=Path, metavar="RECORD.json", help="in place of benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    options.precision = precision_of(options.precision, torch.device(options.device))
    counts = options.slots, options.max_waiting, options.steps, options.rounds, options.pairs
    if min(counts) < 1 or not 0 < options.seconds < math.inf:
        parser.error("--slots, --max-waiting, --steps, --rounds, --pairs and --seconds must be positive")
    if options.soak and not 10 <= options.soak < math.inf:
        parser.error("--soak must be 0 or at least 10")
    if not all(0 < load < math.inf for load in options.loads):
        parser.error("--loads must be positive")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    out = options.out or results_folder(torch.device(options.device)) / "serving.json"
    return finish("serving", lambda: run(options), out, errors=(CannotCompare, ValueError, OSError, httpx.HTTPError))


if __name__ == "__main__":
    sys.exit(main())
