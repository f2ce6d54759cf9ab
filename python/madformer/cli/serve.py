"""``madformer serve``: a model as a service, on this machine or on a Ray cluster."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from madformer.cli.loading import load, prepare
from madformer.cli.request import Precision, Request, resolved
from madformer.cli.sample_options import DrawingOptions, check_drawing
from madformer.engine.options import SamplingOptions
from madformer.engine.schedulers import SHORT_NAMES
from madformer.serving.settings import ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from madformer.pipeline import MADFormerPipeline


@dataclass(frozen=True, kw_only=True)
class Serve(ServerSettings, SamplingOptions, Request):
    """Serve a model over HTTP: a page, OpenAI's images API, and one of its own (docs/serving.md). Requests share the
    model's steps, and their pictures appear block by block. SIGTERM and Ctrl-C end it after what it is drawing.

    examples:
      madformer serve --model assets/emoji64 --guidance 3
      madformer serve --model MODEL --slots 32 --port 8000
      madformer serve --model assets/emoji64 --compile             # without a GPU
      madformer serve --model MODEL --host 0.0.0.0 --api-key-file keys.txt
      madformer serve --model MODEL --ray --max-replicas 8
      curl -H 'Content-Type: application/json' -d '{"prompt": "red apple"}' -H 'Accept: image/png' \\
        http://127.0.0.1:8000/api/v1/images > apple.png
    """

    model: str = field()  # folder (or hub id) that save_pretrained or convert wrote
    host: str = "127.0.0.1"  # address to listen at; one that others reach needs an API key
    port: int = 8000  # port to listen at; 0 for any that is free
    # file with API keys, one a line; else the environment's MADFORMER_API_KEYS, with commas between them
    api_key_file: Path | None = None
    name: str | None = None  # of the model in answers; unless given, its folder's
    # origin of another page that may use the server from a browser, as https://example.org; may be repeated
    cors_origins: Annotated[UseAppendAction[tuple[str, ...]], arg(name="cors-origin", metavar="URL")] = ()
    ray: bool = False  # engines on a Ray cluster, that of RAY_ADDRESS or one of this machine: so many as it has GPUs
    replicas: int | None = None  # engines, in place of one a GPU; with --ray
    max_replicas: int | None = None  # engines that there may become as requests wait, with --ray
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # of the log, one JSON object a line

    height: int | None = None  # pixels of the images; unless given, as trained: others are extrapolated
    width: int | None = None  # pixels of the images, likewise
    scheduler: Annotated[
        str | None, arg(help=f"noise scheduler in place of the model's own: {', '.join(SHORT_NAMES)}")
    ] = None
    lora: str | None = None  # adapters to merge into the model, a folder or hub id
    lora_strength: float | None = None  # share of what the adapters change, from 0 (nothing) to 1 (all, unless given)
    vae: str | None = None  # autoencoder in place of the model's own, a folder or hub id
    vae_tile: int | None = None  # decode larger pictures in tiles of so many pixels, for less memory; 1024, or 0: never
    tokenizer: str | None = None  # in place of the model's own: bytes, a folder or a hub id
    precision: Precision = "auto"  # exact is fp32, default bf16, fp8 for GPUs that have it; auto takes what is faster
    device: str = "auto"  # where to compute: auto (a GPU where there is one), cpu, cuda, cuda:1 ...
    backend: Literal["auto", "triton", "reference"] = "auto"  # implementation of the kernels; auto takes the best here

    def __post_init__(self) -> None:
        """Nothing is refused before all options are known: :meth:`run` does, by their names."""

    def run(self) -> None:
        request = resolved(self.drawing, elsewhere=self.ray)
        check_drawing(request)
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"--port {self.port} must be from 0 to 65535")
        if not self.ray and (self.replicas or self.max_replicas):
            raise ValueError("--replicas and --max-replicas are for --ray")
        try:
            from madformer.serving import access, telemetry
        except ModuleNotFoundError as error:
            raise ImportError(f"serving needs {error.name}: pip install 'madformer[serve]'") from error
        make_app = self._app(request)
        access.check_bind(self.host, make_app.keywords["keys"])
        telemetry.log_as_json(self.log_level)
        if not self.ray:
            from madformer.serving import running

            running.run(make_app(), self.host, self.port)
            return
        from madformer.serving import ray_app

        ray_app.run(
            make_app,
            self.settings,
            host=self.host,
            port=self.port,
            replicas=self.replicas,
            max_replicas=self.max_replicas,
            on_gpu=request.device.startswith("cuda"),
        )

    def _app(self, request: DrawingOptions) -> functools.partial[FastAPI]:
        """Makes the application, here or where it is sent to; keys are read here."""
        from madformer.serving.access import Keys, is_loopback

        assert self.model is not None
        return functools.partial(
            _make_app,
            # an engine has a GPU of its own
            dataclasses.replace(request, device="cuda") if self.ray and request.device.startswith("cuda") else request,
            self.settings,
            defaults=self.drawing.sampling,
            keys=Keys.load(self.api_key_file),
            name=self.name or Path(self.model).resolve().name,
            local=is_loopback(self.host),
        )

    @property
    def settings(self) -> ServerSettings:
        """What the server allows."""
        return ServerSettings(**self._part(ServerSettings))

    @property
    def drawing(self) -> DrawingOptions:
        """How the model is loaded and what it draws unless told otherwise."""
        return DrawingOptions(**self._part(DrawingOptions))

    def _part(self, kind: type) -> dict[str, Any]:
        own = {one.name for one in fields(self)}
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(kind) if one.name in own}


def _make_app(request: DrawingOptions, settings: ServerSettings, **options: Any) -> FastAPI:
    from madformer.bulk.settings import Settings
    from madformer.engine.sharing import in_new_thread
    from madformer.serving.app import create_app

    def prepared() -> tuple[MADFormerPipeline, Settings]:
        pipeline, lora = load(request)
        # of the weights as they are stored
        recorded = Settings.of(
            pipeline, request.sampling, precision=request.precision, batch_size=settings.slots, lora=lora
        )
        # the steps of images in flight are what is compiled, and theirs are the server's
        prepare(pipeline, dataclasses.replace(request, compile=False))
        return pipeline, recorded

    # the cores are for the thread that draws
    pipeline, recorded = in_new_thread(prepared)
    return create_app(pipeline, settings, recorded=recorded, **options)


def deployment(arguments: dict[str, Any]) -> Any:
    """What ``serve deploy`` deploys: ``import_path: madformer.cli.serve:deployment``.

    Args:
        arguments: options of ``madformer serve``, with ``_`` for ``-``; ``device`` is that of an engine.

    Raises:
        TypeError: there is no such option. As :meth:`Serve.run` else.
    """
    from madformer.serving.ray_app import ClusterSettings, application

    if "api_key_file" in arguments:
        arguments = arguments | {"api_key_file": Path(arguments["api_key_file"])}
    serve = Serve(**arguments, ray=True)
    request = resolved(serve.drawing, elsewhere=True)
    check_drawing(request)
    least = serve.replicas or 1
    on_gpu = request.device.startswith("cuda")
    cluster = ClusterSettings(least, serve.max_replicas or least, num_gpus=int(on_gpu))
    return application(serve._app(request), serve.settings, cluster)
