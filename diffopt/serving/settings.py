"""What a server allows, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The limits of a server.

    Attributes:
        max_batch: The most images of one run; None: as many as the engine was built for.
        max_wait_ms: How long an image waits for others to share a run, from the first one on.
        max_queue: How many images may wait for each engine.
        max_images: The largest `n` of a request.
        max_prompt: The most characters of a text.
        max_body_mb: The largest request.
        max_upload_mb: The largest request with pictures.
        body_seconds: How long a client may take to send a request.
        file_seconds: How long a picture can be had by its URL.
        max_files_mb: The memory of all these pictures; the oldest ones go first.
        drain_seconds: How long the images that were accepted may take when the server is stopped.
    """

    max_batch: int | None = None
    max_wait_ms: float = 10.0
    max_queue: int = 64
    max_images: int = 10
    max_prompt: int = 32_000
    max_body_mb: float = 1.0
    max_upload_mb: float = 16.0
    body_seconds: float = 30.0
    file_seconds: float = 3600.0
    max_files_mb: float = 256.0
    drain_seconds: float = 30.0
