"""An HTTP proxy in front of an S3 server that breaks requests, each by a throw of a seeded die.

    with FaultProxy("http://127.0.0.1:5000", seed=7, rate=0.1) as proxy:
        options = {"endpoint_url": proxy.url, ...}

What becomes of a request depends on the seed, its method and path, and how many times that pair
was seen: not on which thread was faster. Faults come before the effect (the server never sees the
request), after it (the server has done it, the client is told otherwise or nothing), or after the
client has given up (a write that arrives late).
"""

import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

WRITES = ("PUT", "POST", "DELETE")
BEFORE = ("500-before", "503-before", "429-before", "timeout-before", "reset-before")
AFTER = ("500-after", "503-after", "timeout-after", "reset-after")
CONDITIONAL = ("409-before", "409-after", "412-after")
"""Of requests with ``If-None-Match`` only."""

LATE = ("late",)
"""Of writes: the client's connection ends, then the write is made."""

SHORT = ("short-read",)
"""Of reads that have a body: half of what the length promises, then the end."""

FAULTS = (*BEFORE, *AFTER, *CONDITIONAL, *LATE, *SHORT)

_CODES = {
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
}
_UNIQUE = re.compile(r"[0-9a-f]{12,}|[0-9]{12,}")
_HOP_BY_HOP = {"connection", "content-length", "expect", "transfer-encoding"}
_UPSTREAM_TIMEOUT_S = 60


class Request(NamedTuple):
    """One line of the proxy's log."""

    method: str
    path: str
    """With its query."""

    is_conditional: bool
    num_bytes: int
    """Of the answer's body."""

    status: int | None
    """What the server said; None where it was not asked."""

    fault: str | None
    """What the proxy did to it; None: nothing."""


@dataclass(kw_only=True)
class Schedule:
    """Which requests break, and how."""

    seed: int = 0
    rate: float = 0.1
    """Share of requests that break."""

    kinds: tuple[str, ...] = FAULTS
    """Faults to choose from, where they apply."""

    hold_s: float = 1.0
    """How long a request that times out is held; longer than the client's patience."""

    def fault(self, method: str, path: str, seen: int, *, is_conditional: bool) -> str | None:
        """The fate of the ``seen``-th request of this method and path."""
        # Names of attempts and probes are new in every run.
        die = random.Random(f"{self.seed} {method} {_UNIQUE.sub('*', path)} {seen}")
        if die.random() >= self.rate:
            return None
        fitting = [
            kind
            for kind in self.kinds
            if (kind not in CONDITIONAL or is_conditional)
            and (kind not in LATE or method in WRITES)
            and (kind not in SHORT or method == "GET")
        ]
        return die.choice(fitting) if fitting else None


class FaultProxy:
    """The proxy, in threads of this process; a context manager.

    Args:
        upstream: address of the S3 server, ``http://host:port``.
        seed: of the schedule.
        rate: share of requests that break; 0 makes a proxy that only counts.
        kinds: faults to choose from.
        hold_s: how long a request that times out is held, seconds.
        ignore_conditions: hide ``If-None-Match`` from the server: a store that lies.
    """

    def __init__(
        self,
        upstream: str,
        *,
        seed: int = 0,
        rate: float = 0.1,
        kinds: tuple[str, ...] = FAULTS,
        hold_s: float = 1.0,
        ignore_conditions: bool = False,
    ) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.schedule = Schedule(seed=seed, rate=rate, kinds=kinds, hold_s=hold_s)
        self.ignore_conditions = ignore_conditions
        self._lock = threading.Lock()
        self._log: list[Request] = []
        self._seen: Counter[tuple[str, str]] = Counter()
        self._late: list[threading.Thread] = []
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        """Address to give to clients."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.settle()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def begin(self, schedule: Schedule) -> None:
        """Go on with another schedule, and an empty log."""
        self.settle()
        with self._lock:
            self.schedule = schedule
            self._seen.clear()
            self._log.clear()

    def settle(self) -> None:
        """Wait for writes that are to arrive late."""
        while True:
            with self._lock:
                late, self._late = self._late, []
            if not late:
                return
            for thread in late:
                thread.join()

    def requests(self) -> list[Request]:
        """What was asked for so far."""
        with self._lock:
            return list(self._log)

    def faults(self) -> Counter[str]:
        """How many requests broke, by kind."""
        return Counter(request.fault for request in self.requests() if request.fault)

    def fate(self, method: str, path: str, *, is_conditional: bool) -> str | None:
        """What is to become of the request that just came in."""
        with self._lock:
            pair = method, _UNIQUE.sub("*", path)
            self._seen[pair] += 1
            seen = self._seen[pair]
            schedule = self.schedule
        return schedule.fault(method, path, seen, is_conditional=is_conditional)

    def record(self, request: Request) -> None:
        """Add a line to the log."""
        with self._lock:
            self._log.append(request)

    def later(self, work: threading.Thread) -> None:
        """Start a write that arrives late, and remember to wait for it."""
        with self._lock:
            self._late.append(work)
            work.start()

    def ask(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """What the server answers: status, headers, body."""
        connection = http.client.HTTPConnection(*self._upstream, timeout=_UPSTREAM_TIMEOUT_S)
        try:
            connection.request(method, path, body=body, headers=dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: FaultProxy

    def log_message(self, format: str, *args: Any) -> None:
        """The proxy keeps its own log."""

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_DELETE(self) -> None:
        self._handle()

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if "100-continue" in (self.headers.get("Expect") or "").lower():
            self.send_response_only(100)
            self.end_headers()
        body = self.rfile.read(length) if length else None
        is_conditional = "If-None-Match" in self.headers
        fault = self.owner.fate(self.command, self.path, is_conditional=is_conditional)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
        if self.owner.ignore_conditions:
            headers = {k: v for k, v in headers.items() if k.lower() != "if-none-match"}

        def ask() -> tuple[int, list[tuple[str, str]], bytes]:
            return self.owner.ask(self.command, self.path, headers, body)

        def record(status: int | None, num_bytes: int = 0) -> None:
            self.owner.record(
                Request(self.command, self.path, is_conditional, num_bytes, status, fault)
            )

        if fault in LATE:
            self._reset()
            record(None)
            self.owner.later(threading.Thread(target=self._ask_late, args=(ask,)))
            return
        if fault in BEFORE or fault == "409-before":
            record(None)
            self._break(fault)
            return
        status, answered, data = ask()
        record(status, len(data))
        if fault in SHORT and len(data) > 1:
            self._answer(status, answered, data, cut=len(data) // 2)
            self._reset()
        elif fault is None or fault in SHORT:
            self._answer(status, answered, data)
        else:
            self._break(fault)

    def _ask_late(self, ask: Any) -> None:
        time.sleep(self.owner.schedule.hold_s / 2)
        try:
            ask()
        except OSError:
            return  # the server is gone: the write never arrives

    def _break(self, fault: str) -> None:
        what = fault.partition("-")[0]
        if what == "reset":
            self._reset()
        elif what == "timeout":
            time.sleep(self.owner.schedule.hold_s)
            self._reset()
        else:
            code = _CODES[int(what)]
            text = f"<Error><Code>{code}</Code><Message>made by the proxy</Message></Error>"
            self._answer(int(what), [("Content-Type", "application/xml")], text.encode())

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, cut: int | None = None
    ) -> None:
        given = dict(headers)
        length = given.get("Content-Length") if self.command == "HEAD" else None
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])

    def _reset(self) -> None:
        """End the connection with a reset, not with a goodbye."""
        self.close_connection = True
        self.wfile.flush()
        linger = struct.pack("ii", 1, 0)
        try:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        except OSError:
            return  # the client was faster
