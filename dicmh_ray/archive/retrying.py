"""Which errors of a store may pass, and how long to wait for that.

A request is tried again after a random part of a delay that doubles: workers that were refused
together do not come back together. What one call of a store waits in all is bounded; after that
the caller gets a typed error, and the unit's own attempts begin.
"""

import errno
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

CONFLICT = 409
PRECONDITION_FAILED = 412
RANGE_NOT_SATISFIABLE = 416

_PASSING_STATUS = frozenset({408, CONFLICT, 425, 429, 500, 502, 503, 504})
_PASSING_ERRNO = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH}
)
# By name: their library is an extra, and this layer does not import it.
_NO_CREDENTIALS = frozenset(
    {
        "CredentialRetrievalError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "SSOTokenLoadError",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How often one request is tried, and how long is waited in between.

    With the defaults a request waits 13 s in all on average, 26 s at most, besides the time that
    the tries themselves take.
    """

    tries: int = 8
    """Requests in all, the first one included."""

    base_s: float = 0.2
    """Longest wait before the second try, seconds; it doubles with each."""

    cap_s: float = 20.0
    """No wait is longer than this, seconds."""

    def __post_init__(self) -> None:
        if self.tries < 1 or self.base_s < 0 or self.cap_s < 0:
            raise ValueError(f"a retry policy needs a try, and no negative waits: {self}")

    def wait_s(self, tried: int) -> float:
        """A random wait after ``tried`` tries, seconds: evenly from nothing to the delay."""
        return random.uniform(0.0, min(self.cap_s, self.base_s * 2.0 ** (tried - 1)))

    def attempts(self) -> Iterator[int]:
        """The number of each try, from 1; sleeps between them."""
        for tried in range(1, self.tries + 1):
            yield tried
            if tried < self.tries:
                time.sleep(self.wait_s(tried))


DEFAULT_RETRY = RetryPolicy()
"""Of stores that are opened without a policy of their own."""


def may_pass(exc: BaseException) -> bool:
    """Whether the same request may succeed a moment later.

    That is what the HTTP status says where there is one; otherwise a timeout, a connection that
    was reset or refused, or an answer that broke off.
    """
    if isinstance(exc, TimeoutError):
        return True  # also S3's RequestTimeout, whose status is 400
    status = http_status(exc)
    if status is not None:
        return status in _PASSING_STATUS
    if isinstance(exc, ConnectionError):
        return True
    return isinstance(exc, OSError) and exc.errno in _PASSING_ERRNO


def lacks_credentials(exc: BaseException) -> bool:
    """Whether a client library found no credentials to sign a request with."""
    return any(cls.__name__ in _NO_CREDENTIALS for cls in type(exc).__mro__)


def http_status(exc: BaseException | None) -> int | None:
    """The HTTP status of the first error on the cause chain that has one (botocore's do)."""
    while exc is not None:
        response = getattr(exc, "response", None)
        if isinstance(response, Mapping):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int):
                return status
        exc = exc.__cause__
    return None
