"""The server as an ASGI application."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import madformer
from madformer.engine.options import SamplingOptions
from madformer.serving import native, openai_api
from madformer.serving.access import Client, Keys, service_of
from madformer.serving.errors import ServingError
from madformer.serving.middleware import Around, error_answer
from madformer.serving.service import Service
from madformer.serving.settings import ServerSettings

if TYPE_CHECKING:
    from madformer.bulk.settings import Settings
    from madformer.pipeline import MADFormerPipeline


PAGE = Path(__file__).parent / "page"
TYPES = {
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".html": "text/html",
    ".png": "image/png",
}


def create_app(
    pipeline: MADFormerPipeline,
    settings: ServerSettings | None = None,
    *,
    defaults: SamplingOptions | None = None,
    keys: Keys | None = None,
    name: str = "madformer",
    local: bool = True,
    recorded: Settings | None = None,
) -> FastAPI:
    """An application that serves a pipeline, which nobody else may change or draw with meanwhile.

    Its lifespan starts the threads that draw, and ends them.

    Args:
        pipeline: in the precision and on the device to draw with; a scheduler that can be tabulated.
        defaults: steps and guidance of requests that name none.
        keys: what clients have to show; None for nobody.
        name: of the model, in answers.
        local: without keys, answer only where the header Host says localhost.
        recorded: what every PNG says of itself beside prompt, seed, steps, guidance and scheduler of its own; None for
            PNGs that say nothing. It is made of the pipeline as loaded, before it is prepared.

    Raises:
        ValueError: no autoencoder, or another scheduler.
    """
    settings, defaults = settings or ServerSettings(), defaults or SamplingOptions()
    service = Service(pipeline, settings, defaults, name, recorded)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    # its pages of documentation fetch scripts from elsewhere; its spans are OpenTelemetry's, where that is there
    app = FastAPI(
        title="madformer", version=madformer.__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Images made block by block, as a service.", max_body_size=settings.max_body,
    )  # fmt: skip
    app.state.service, app.state.keys = service, keys
    app.include_router(native.router)
    app.include_router(openai_api.router)
    _add_own_routes(app)
    app.add_exception_handler(ServingError, _tell)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )  # fmt: skip
    app.add_middleware(
        Around, metrics=service.metrics, local=local and keys is None,
        origins=settings.cors_origins,
    )  # fmt: skip
    return app


def _add_own_routes(app: FastAPI) -> None:
    @app.get("/healthz", tags=["operation"])
    async def health(request: Request) -> JSONResponse:
        """Whether the process is worth keeping."""
        alive = service_of(request).desk.stepper.is_alive
        return JSONResponse({"status": "ok" if alive else "the thread that draws ended"}, 200 if alive else 503)

    @app.get("/readyz", tags=["operation"])
    async def ready(request: Request) -> JSONResponse:
        """Whether to send requests here: not before it is warmed up, and not while it is draining."""
        is_ready = service_of(request).desk.is_ready
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
    async def metrics(request: Request, client: Client) -> Response:
        """For Prometheus."""
        return Response(service_of(request).metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _page_file("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return _page_file(name)


def _page_file(name: str) -> Response:
    # looked up, never joined: a name leads nowhere else
    found = {path.name: path for path in PAGE.iterdir() if path.is_file()}.get(name)
    if found is None:
        raise ServingError(404, "there is no such file", "not_found")
    return FileResponse(found, media_type=TYPES.get(found.suffix), headers={"Cache-Control": "no-cache"})


# Errors, all in one form


async def _tell(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return error_answer(error)


async def _tell_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(
        error.status_code, "invalid_request"
    )
    answer = error_answer(ServingError(error.status_code, str(error.detail), code))
    answer.headers.update(error.headers or {})
    return answer


async def _tell_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    message = f"{'.'.join(place)}: {first['msg']}" if place else str(first["msg"])
    return error_answer(ServingError.refused(message, ".".join(place) or None, str(first["type"])))
