"""Listens, and ends in good order: what was accepted is finished, what comes after is refused."""

from __future__ import annotations

import socket
import time
from types import FrameType

import uvicorn

from diffopt.errors import DiffoptError
from diffopt.serving.app import Service, create_app


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        # Python adds the address again, in parentheses.
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
        raise DiffoptError(f"cannot listen on {host}:{port}: {reason}") from error


def run(service: Service, listener: socket.socket, token: str | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        service: The engines.
        listener: Where requests come from.
        token: What clients must have; None: nothing.
    """
    config = uvicorn.Config(
        create_app(service, token),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    _Server(config, service).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Goes on listening while it drains, so that `/health` and new requests get an answer."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._signals = 0
        self._deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Count a signal: the first drains, the second ends."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Tell whether it is time to end; called ten times a second."""
        if self._signals and not self._service.is_draining:
            self._service.drain()
            self._deadline = time.monotonic() + self._service.settings.drain_seconds
        if self._service.is_draining:
            is_late = self._signals > 1 or time.monotonic() > self._deadline
            if is_late:
                self._service.abort()
            self.should_exit = is_late or self._service.is_idle
        return await super().on_tick(counter)
