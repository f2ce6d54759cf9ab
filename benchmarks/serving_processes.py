"""The processes that a server's speed is measured with: the server, and the pipeline that it draws with."""

from __future__ import annotations

import argparse
import io
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks.record import CannotCompare
from madformer.engine.options import SamplingOptions
from madformer.engine.precision import PRECISIONS, apply
from madformer.pipeline import MADFormerPipeline

PROMPT = "red apple"


class Server:
    """``madformer serve`` in a process of its own, until :meth:`close`."""

    def __init__(self, options: argparse.Namespace) -> None:
        words = [
            "serve", "--model", str(options.model), "--port", "0", "--log-level", "error",
            "--slots", str(options.slots), "--max-waiting", str(options.max_waiting),
            "--max-per-client", str(options.slots + options.max_waiting), "--max-images", "1",
            "--guidance", str(options.guidance), "--steps", str(options.steps), "--device", options.device,
            "--precision", options.precision, *(["--compile"] if options.compile else []),
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "madformer.cli.main", *words], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if "http://" not in line:
            raise CannotCompare("the server did not start")
        self.url = next(word for word in line.split() if word.startswith("http://"))

    def close(self) -> int:
        self.process.terminate()
        return self.process.wait(60)

    def memory(self) -> float:
        """MiB that are resident."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) / 1024


class Direct:
    """The same pictures by the pipeline, in a process of its own too, until :meth:`close`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _Caller.begin, (options,))

    def seconds(self, images: int, seed: int = 0, threads: int | None = None) -> float:
        """Of one call and the encoding of its pictures, with so many of PyTorch's threads, or as many as it has."""
        return self._process.submit(_Caller.seconds, images, seed, threads).result()

    def image_steps(self) -> int:
        """Denoising steps that one image takes."""
        return self._process.submit(_Caller.image_steps).result()

    def close(self) -> None:
        self._process.shutdown()


class _Caller:
    """What the other process keeps."""

    pipeline: ClassVar[MADFormerPipeline]
    options: ClassVar[argparse.Namespace]
    threads: ClassVar[int]

    @classmethod
    def begin(cls, options: argparse.Namespace) -> None:
        cls.options, cls.threads = options, torch.get_num_threads()
        dtype = PRECISIONS[options.precision].dtype
        cls.pipeline = MADFormerPipeline.from_pretrained(
            options.model, dtype=torch.float32, vae_dtype=dtype, device=options.device
        )
        cls.pipeline.transformer = apply(cls.pipeline.transformer, options.precision)
        cls.pipeline.set_progress_bar_config(disable=True)
        if options.compile:
            for images in (options.slots, 1):
                sampling = SamplingOptions(options.steps, options.guidance)
                cls.pipeline.warmup(images, sampling, compile_step=True, measure_shares=False)

    @classmethod
    def seconds(cls, images: int, seed: int, threads: int | None) -> float:
        torch.set_num_threads(threads or cls.threads)
        options, started = cls.options, time.perf_counter()
        drawn = cls.pipeline(
            PROMPT, options.steps, num_images=images, guidance_scale=options.guidance, seed=seed
        ).images
        for picture in drawn:
            picture.save(io.BytesIO(), "PNG")
        return time.perf_counter() - started

    @classmethod
    def image_steps(cls) -> int:
        return cls.pipeline.transformer.config.num_blocks * cls.options.steps
