"""The HTTP side of a server: OpenAI's image API, health, metrics, and a page to try a prompt."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Form, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from diffopt.serving import images
from diffopt.serving.metrics import Metrics
from diffopt.serving.middleware import BearerToken, BodyLimit, Measured, answer
from diffopt.serving.picture_files import PictureFiles
from diffopt.serving.protocol import (
    ApiError,
    EditRequest,
    ErrorBody,
    GenerationRequest,
    Health,
    ImagesResponse,
    ModelData,
    ModelList,
)
from diffopt.serving.served_engine import Call, Servable, ServedEngine, directly
from diffopt.serving.settings import Settings

EDITS = "/v1/images/edits"
_MB = 1 << 20
_CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "What was asked for cannot be done."},
    "5XX": {"model": ErrorBody, "description": "The server cannot do it, now or at all."},
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images; events with stream=true.",
        "content": {"text/event-stream": {}},
    }
}


class Service:
    """The engines of a server, and what their requests share."""

    def __init__(
        self,
        engines: Mapping[str, Servable],
        settings: Settings,
        call: Call = directly,
    ) -> None:
        """Start a queue for each engine; one that cannot be served is a `DiffoptError`.

        Args:
            engines: By the names that requests call them by.
            settings: What the server allows.
            call: Calls the engines; see `engine_thread.call`.
        """
        self.settings = settings
        self.metrics = Metrics()
        self.files = PictureFiles(settings.file_seconds, int(settings.max_files_mb * _MB))
        self.is_draining = False
        self.engines: dict[str, ServedEngine] = {}
        for name, engine in engines.items():
            observe = self.metrics.observer(name)
            served = ServedEngine(name, engine, settings, observe, call)
            self.engines[name] = served
            self.metrics.watch_queue(name, served.batcher.count_waiting)

    @property
    def is_idle(self) -> bool:
        """Whether no image waits or is being made."""
        return all(engine.batcher.is_idle for engine in self.engines.values())

    def drain(self) -> None:
        """Refuse further requests, and finish those that were accepted."""
        self.is_draining = True
        for engine in self.engines.values():
            engine.batcher.close()

    def abort(self) -> None:
        """End what is being made."""
        self.is_draining = True
        for engine in self.engines.values():
            engine.batcher.abort()

    def engine(self, name: str | None) -> ServedEngine:
        """Return the engine that a request names."""
        known = ", ".join(self.engines)
        if name is None and len(self.engines) == 1:
            return next(iter(self.engines.values()))
        if name is None:
            raise ApiError(400, f"model: is missing; there are {known}", param="model")
        if name not in self.engines:
            text = f"the model '{name[:80]}' does not exist; there is {known}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return self.engines[name]

    def body_limit(self, path: str) -> int:
        """Return the most bytes of a request's body."""
        settings = self.settings
        megabytes = settings.max_upload_mb if path == EDITS else settings.max_body_mb
        return int(megabytes * _MB)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Serviced = Annotated[Service, Depends(_service)]
router = APIRouter(responses=_ERRORS)


@router.post(
    "/v1/images/generations",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    responses=_STREAM,
)
async def generations(request: Request, service: Serviced, body: GenerationRequest) -> Any:
    """Make images of a prompt."""
    return await images.respond(request, service.engine(body.model), body, {})


@router.post(
    EDITS,
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    responses=_STREAM,
)
async def edits(
    request: Request,
    service: Serviced,
    form: Annotated[EditRequest, Form(media_type="multipart/form-data")],
) -> Any:
    """Make images of a picture and a prompt, in the whole picture or where the mask is."""
    files: dict[str, bytes] = {}
    seen = set()
    for name, value in (await request.form()).multi_items():
        name = name.removesuffix("[]")  # as OpenAI's clients send a list of one
        if name in seen:
            raise ApiError(400, f"{name}: is given twice", param=name)
        seen.add(name)
        if isinstance(value, UploadFile):
            if name not in ("image", "mask"):
                raise ApiError(400, f"{name}: is a file; there are image and mask", param=name)
            files[name] = await value.read()
    return await images.respond(request, service.engine(form.model), form, files)


@router.get("/v1/models")
async def models(service: Serviced) -> ModelList:
    """List the engines."""
    return ModelList(data=[_model(engine) for engine in service.engines.values()])


@router.get("/v1/models/{name}")
async def model(service: Serviced, name: str) -> ModelData:
    """Describe an engine."""
    return _model(service.engine(name))


def _model(engine: ServedEngine) -> ModelData:
    return ModelData(id=engine.name, created=engine.created)


@router.get(
    "/v1/files/{name}",
    response_class=Response,
    responses={200: {"content": {"image/*": {}}, "description": "The picture."}},
)
async def file(service: Serviced, name: str) -> Response:
    """Return a picture that response_format=url has named."""
    found = service.files.get(name)
    if found is None:
        raise ApiError(404, "there is no such file, or no longer")
    age = f"private, max-age={service.settings.file_seconds:.0f}"
    headers = {"Cache-Control": age, "X-Content-Type-Options": "nosniff"}
    return Response(found.data, media_type=found.media_type, headers=headers)


@router.get("/health", responses={503: {"model": Health}})
async def health(service: Serviced) -> Response:
    """Tell whether requests are taken."""
    waiting = {name: engine.batcher.count_waiting() for name, engine in service.engines.items()}
    status = Health(status="draining" if service.is_draining else "ok", waiting=waiting)
    return JSONResponse(status.model_dump(), 503 if service.is_draining else 200)


@router.get("/metrics", response_class=Response)
async def metrics(service: Serviced) -> Response:
    """Return the numbers that Prometheus collects."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> HTMLResponse:
    """Return a page to try a prompt."""
    text = importlib.resources.files("diffopt.serving").joinpath("page.html").read_text("utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": _CSP})


def create_app(service: Service, token: str | None = None) -> FastAPI:
    """Return the app for a service's engines, for those who have the token, if there is one."""
    app = FastAPI(title="diffopt", docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(images.ClientGone, _on_gone)
    app.add_exception_handler(Exception, _on_failure)
    # The last one is the outermost.
    app.add_middleware(BodyLimit, limit=service.body_limit, seconds=service.settings.body_seconds)
    if token is not None:
        app.add_middleware(BearerToken, token=token)
    app.add_middleware(Measured, metrics=service.metrics)
    return app


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return answer(error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    """Answer a body that is no JSON, or has values of other types."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return answer(
            ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}")
        )
    param = place[0] if place else None
    text = first["msg"].removeprefix("Value error, ")
    message = f"{param}: {text}" if param else text
    return answer(ApiError(400, message, param=param, code=first["type"]))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    api_error = ApiError(error.status_code, str(error.detail))
    api_error.headers = dict(error.headers or {})
    return answer(api_error)


async def _on_gone(request: Request, error: Exception) -> Response:
    return images.gone()


async def _on_failure(request: Request, error: Exception) -> Response:
    return answer(ApiError(500, "the server failed; its log has the reason"))
