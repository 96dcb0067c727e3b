"""From a request for images to the response: whole, or as a stream of events."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Literal, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from diffopt.serving.batcher import Job, Refused
from diffopt.serving.middleware import answer
from diffopt.serving.picture_files import PictureFiles
from diffopt.serving.protocol import (
    ApiError,
    ImageData,
    ImageEvent,
    ImageRequest,
    ImagesResponse,
    Usage,
)
from diffopt.serving.refusals import failure
from diffopt.serving.served_engine import Order, ServedEngine

T = TypeVar("T")
EventName = Literal["image_generation", "image_edit"]


class ClientGone(Exception):
    """Nobody waits for the response."""


async def respond(
    request: Request, engine: ServedEngine, asked: ImageRequest, pictures: Mapping[str, bytes]
) -> Any:
    """Return the response to a request that an engine can do."""
    order = await asyncio.to_thread(engine.order, asked, pictures)
    if asked.stream:
        name: EventName = "image_edit" if pictures else "image_generation"
        return Stream(engine, order, name, asked.partial_images or 0)
    jobs = [Job(call) for call in order.calls]
    submit(engine, jobs)
    results = asyncio.gather(*(asyncio.wrap_future(job.result) for job in jobs))
    try:
        made = await while_connected(request, results)
    except ClientGone:
        raise
    except Exception as error:
        raise failure(error) from error
    finally:
        engine.batcher.cancel(jobs)
    files = await asyncio.to_thread(
        lambda: [
            engine.encoded(engine.picture(result), order, index)
            for index, result in enumerate(made)
        ]
    )
    kept = request.app.state.service.files if asked.response_format == "url" else None
    data = [
        _data(request, kept, file, order.encoding.media_type, order.seed(index))
        for index, file in enumerate(files)
    ]
    return ImagesResponse(
        created=int(time.time()),
        data=data,
        output_format=order.encoding.format,
        size=engine.size,
    )


def submit(engine: ServedEngine, jobs: list[Job]) -> None:
    """Queue jobs; an `ApiError` where there is no place."""
    try:
        engine.batcher.submit(jobs)
    except Refused as error:
        raise failure(error) from error


def _data(
    request: Request, kept: PictureFiles | None, file: bytes, media_type: str, seed: int | None
) -> ImageData:
    if kept is None:
        return ImageData(b64_json=base64.b64encode(file).decode(), seed=seed)
    url = request.url_for("file", name=kept.put(file, media_type))
    return ImageData(url=str(url), seed=seed)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return what comes of the work; it is cancelled where the client goes away: `ClientGone`."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Previews:
    """Takes pictures of a run, evenly spaced over its steps."""

    def __init__(self, engine: ServedEngine, count: int, put: Callable[[Any], None]) -> None:
        """Take `count` pictures, and `put` each."""
        self._engine = engine
        self._count = count
        self._put = put

    def __call__(self, step: Any, place: int) -> None:
        """Take a picture of the image at a place of the run, where it is time."""
        parts = self._count + 1
        before, now = (number * parts // step.total for number in (step.index - 1, step.index))
        if before < now < parts:
            self._put(self._engine.preview(step, place))


class Stream(StreamingResponse):
    """An image as a stream of events, with previews before it."""

    def __init__(self, engine: ServedEngine, order: Order, name: EventName, previews: int) -> None:
        """Queue the image; an `ApiError` where there is no place."""
        self._engine = engine
        self._order = order
        self._name = name
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(event: Any) -> None:  # in the engine's thread
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        wanted = previews and engine.engine.steps
        self._job = Job(order.calls[0], Previews(engine, previews, put) if wanted else None)
        self._job.result.add_done_callback(lambda _: put(None))
        submit(engine, [self._job])
        super().__init__(self._lines(), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-store"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; the image is not made where the client goes away."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._engine.batcher.cancel([self._job])

    async def _lines(self) -> AsyncIterator[str]:
        sent = 0
        while (preview := await self._events.get()) is not None:
            event = await self._event(preview, None)
            yield _line(event.model_copy(update={"partial_image_index": sent}))
            sent += 1
        try:
            picture = self._engine.picture(self._job.result.result())
        except Exception as error:
            yield f"event: error\ndata: {json.dumps(failure(error).body)}\n\n"
            return
        event = await self._event(picture, 0)
        yield _line(event.model_copy(update={"usage": Usage(), "seed": self._order.seed(0)}))

    async def _event(self, picture: Any, index: int | None) -> ImageEvent:
        file = await asyncio.to_thread(self._engine.encoded, picture, self._order, index)
        return ImageEvent(
            type=f"{self._name}.{'partial_image' if index is None else 'completed'}",
            b64_json=base64.b64encode(file).decode(),
            created_at=int(time.time()),
            output_format=self._order.encoding.format,
            size=self._engine.size,
        )


def _line(event: ImageEvent) -> str:
    return f"event: {event.type}\ndata: {event.model_dump_json(exclude_none=True)}\n\n"


def gone() -> JSONResponse:
    """Return the response that nobody reads, for the metrics."""
    return answer(ApiError(499, "the client went away"))
