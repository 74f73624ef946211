"""What this service refuses, and how that is told over HTTP.

Not here: failures of the model, which are dspylite's own errors and answer for themselves.
"""

from __future__ import annotations

from dspylite.errors import DSPyError, ErrorResponse


class ServiceError(DSPyError):
    """Base of the service's refusals: the message is meant for the caller."""

    http_status = 500
    default_code = "internal"

    def __init__(self, message: str, *, code: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        self.retry_after = retry_after

    @property
    def http_message(self) -> str:
        """The message itself."""
        return str(self)


class UnauthorizedError(ServiceError):
    """There is no key, or none that is known."""

    http_status = 401
    default_code = "unauthorized"

    def to_http(self) -> ErrorResponse:
        """Answer, and say what kind of key is asked for."""
        answer = super().to_http()
        return answer._replace(headers={**answer.headers, "www-authenticate": "Bearer"})


class ForbiddenError(ServiceError):
    """The service runs without keys, and the request does not come from this machine."""

    http_status = 403
    default_code = "forbidden"


class NotFoundError(ServiceError):
    """There is no such thing, or it belongs to somebody else."""

    http_status = 404
    default_code = "not_found"


class TooLargeError(ServiceError):
    """The body is longer than the service takes."""

    http_status = 413
    default_code = "too_large"


class UnsupportedTypeError(ServiceError):
    """The body is of a kind that the service does not read."""

    http_status = 415
    default_code = "unsupported_media_type"


class InvalidInputError(ServiceError):
    """The request was understood and cannot be used."""

    http_status = 422
    default_code = "invalid_input"


class RateLimitedError(ServiceError):
    """The user sent more requests than the limit allows."""

    http_status = 429
    default_code = "rate_limited"


class QueueFullError(ServiceError):
    """So many documents wait that no further one is taken."""

    http_status = 503
    default_code = "queue_full"


class UnavailableError(ServiceError):
    """A part that the service stands on does not answer."""

    http_status = 503
    default_code = "unavailable"
