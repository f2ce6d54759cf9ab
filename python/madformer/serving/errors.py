"""What a request is refused with, in the form that OpenAI's API has for it."""

from __future__ import annotations

import math
from typing import Any, Self


class ServingError(Exception):
    """An answer other than a picture.

    Attributes:
        status: of HTTP. code: short, for programs. kind: whose fault it is, as OpenAI's ``type`` has it.
        retry_after: seconds until it is worth to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.kind, self.param = status, code, kind, param
        self.message = " ".join(message.split())
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))

    @property
    def error(self) -> dict[str, Any]:
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    @classmethod
    def refused(cls, message: str, param: str | None = None, code: str = "invalid_value") -> Self:
        """What the model or the server cannot do."""
        return cls(400, message, code, param=param)

    @classmethod
    def busy(cls, message: str, retry_after: float, code: str = "queue_full") -> Self:
        return cls(429, message, code, kind="rate_limit_error", retry_after=retry_after)

    @classmethod
    def unavailable(cls, message: str, code: str, retry_after: float = 1.0) -> Self:
        return cls(503, message, code, kind="server_error", retry_after=retry_after)

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """A fault of the model's or ours; what it was is told where it says so in a line, never a traceback."""
        from madformer.engine.running import NonFiniteError

        if isinstance(error, FloatingPointError):
            where = str(error) if isinstance(error, NonFiniteError) else "the picture is not finite"
            return cls(500, where, "non_finite", kind="server_error")
        return cls(500, "the server failed; its log says more", "internal_error", kind="server_error")


def cancelled() -> ServingError:
    # 499 is nginx's, for a client that closed the request
    return ServingError(499, "the request was cancelled", "cancelled")


def deadline_passed(seconds: float) -> ServingError:
    return ServingError(504, f"not done within its deadline of {seconds:g} s", "deadline_exceeded", kind="server_error")


def ending() -> ServingError:
    return ServingError.unavailable("the server is shutting down", "shutting_down", 5.0)
