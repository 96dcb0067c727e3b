"""Pictures that can be had by their URL for a while, kept in memory."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class PictureFile:
    """A picture.

    Attributes:
        data: Its file.
        media_type: Of that.
        expires: When it goes, on the monotonic clock.
    """

    data: bytes
    media_type: str
    expires: float


class PictureFiles:
    """The pictures by name. A name cannot be guessed, so that no token is asked for."""

    def __init__(self, seconds: float, limit: int) -> None:
        """Keep each for some seconds, and of all together at most `limit` bytes."""
        self._seconds = seconds
        self._limit = limit
        self._size = 0
        self._files: OrderedDict[str, PictureFile] = OrderedDict()

    def put(self, data: bytes, media_type: str) -> str:
        """Keep a picture; return its name."""
        name = secrets.token_urlsafe(24)
        self._files[name] = PictureFile(data, media_type, time.monotonic() + self._seconds)
        self._size += len(data)
        self._drop()
        return name

    def get(self, name: str) -> PictureFile | None:
        """Return a picture, if it is still there."""
        self._drop()
        return self._files.get(name)

    def _drop(self) -> None:
        """Drop what has expired, and the oldest ones above the limit."""
        now = time.monotonic()
        while self._files:
            oldest = next(iter(self._files.values()))
            if oldest.expires > now and self._size <= self._limit:
                return
            self._files.popitem(last=False)
            self._size -= len(oldest.data)
