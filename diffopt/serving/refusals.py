"""What an engine says no to, as an answer."""

from __future__ import annotations

import re
from collections.abc import Collection

from diffopt.errors import Cancelled, DiffoptError
from diffopt.host.guards import Mismatch
from diffopt.serving.batcher import Refused, log
from diffopt.serving.protocol import ApiError


def refusal(error: DiffoptError, names: Collection[str]) -> ApiError:
    """Return the answer for what an engine refuses, in its words; it names one of the arguments."""
    match = re.match(r"(?:missing argument ')?(\w+)", error.message)
    param = match[1] if match and match[1] in names else None
    return ApiError(400, error.message, param=param)


def failure(error: BaseException) -> ApiError:
    """Return the answer for a run that failed."""
    if isinstance(error, Cancelled):  # which befalls no one who waits, but at the server's end
        error = Refused("the server is shutting down", retry_after=5)
    if isinstance(error, Refused):
        answer = ApiError(503, str(error), code="overloaded")
        answer.headers = {"Retry-After": str(error.retry_after)}
        return answer
    if isinstance(error, Mismatch):  # what only a run can see, of the arguments still
        return refusal(error, ("prompt", "negative_prompt"))
    log.error("a run failed", exc_info=error)
    return ApiError(500, "the engine failed; the server's log has the reason")
