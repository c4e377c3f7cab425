"""An HTTP server on loopback that goes wrong on purpose.

    with serving({"a.tar": data}) as web:
        web.faults["a.tar"] = [status(503), cut(100)]     # the first two answers; then all is well
        fetch(f"{web.url}/a.tar")
        assert web.asked["a.tar"] == 3

A fault is a function of the handler and the bytes of the file; ``always(fault)`` never ends.
"""

from __future__ import annotations

import http.server
import io
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


Fault = Callable[["Handler", bytes], None]

PAGE = b"<!DOCTYPE html><title>Sign in</title>"


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` by name, whatever the folder in the URL; counts what it is asked for."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(files)
        self.faults: dict[str, Iterable[Fault]] = {}
        self.going: dict[str, tuple[Iterable[Fault], Iterator[Fault]]] = {}
        self.asked: Counter[str] = Counter()
        self.times: list[float] = []
        self.queries: list[str] = []
        self.closing = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data"

    def next_fault(self, name: str) -> Fault:
        with self.lock:
            self.asked[name] += 1
            self.times.append(time.monotonic())
            given = self.faults.get(name, ())
            if name not in self.going or self.going[name][0] is not given:
                self.going[name] = given, iter(given)
            return next(self.going[name][1], fine)

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are what is tested here."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a request as the next fault of its file says."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        name = split.path.rpartition("/")[2]
        self.server.queries.append(split.query)
        self.close_connection = True
        self.server.next_fault(name)(self, self.server.files.get(name))

    def do_HEAD(self) -> None:
        self.do_GET()

    def begin(self, length: int | None, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Connection", "close")
        if length is not None:
            self.send_header("Content-Length", str(length))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            self.wfile = io.BytesIO()

    def log_message(self, *args: object) -> None:
        pass


def fine(handler: Handler, data: bytes | None) -> None:
    if data is None:
        status(404)(handler, b"")
        return
    handler.begin(len(data))
    handler.wfile.write(data)


def always(fault: Fault) -> Iterable[Fault]:
    return itertools.repeat(fault)


def status(code: int, **headers: str) -> Fault:
    def fault(handler: Handler, data: bytes) -> None:
        handler.begin(0, code, **headers)

    return fault


def cut(after: int, sized: bool = True) -> Fault:
    """The connection ends after so many bytes; unsized, nothing says that there were to be more."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.begin(len(data) if sized else None)
        handler.wfile.write(data[:after])

    return fault


def stall(after: int = 0, answer: bool = True) -> Fault:
    """So many bytes, then silence until the server ends; without ``answer`` not even a header."""

    def fault(handler: Handler, data: bytes) -> None:
        if answer:
            handler.begin(len(data))
            handler.wfile.write(data[:after])
            handler.wfile.flush()
        handler.server.closing.wait(60)

    return fault


def once(event: threading.Event) -> Fault:
    """All is well, but not before ``event``."""

    def fault(handler: Handler, data: bytes) -> None:
        event.wait(60)
        fine(handler, data)

    return fault


def drip(every: float) -> Fault:
    """A byte now and then."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.begin(len(data))
        with suppress(OSError):
            for index in range(len(data)):
                handler.wfile.write(data[index : index + 1])
                if handler.server.closing.wait(every):
                    return

    return fault


def slow(seconds: float) -> Fault:
    """All of it, in ten parts over so many seconds."""

    def fault(handler: Handler, data: bytes) -> None:
        handler.begin(len(data))
        step = len(data) // 10 + 1
        with suppress(OSError):
            for start in range(0, len(data), step):
                handler.wfile.write(data[start : start + step])
                handler.server.closing.wait(seconds / 10)

    return fault


def wrong(handler: Handler, data: bytes) -> None:
    """The right size, one bit flipped."""
    fine(handler, data[:-1] + bytes([data[-1] ^ 1]))


def longer(handler: Handler, data: bytes) -> None:
    """More than there should be, and nothing says how much."""
    handler.begin(None)
    handler.wfile.write(data * 3)


def page(handler: Handler, data: bytes) -> None:
    """A sign-in page with status 200."""
    handler.begin(len(PAGE), Content_Type="text/html")
    handler.wfile.write(PAGE)


def unsized(handler: Handler, data: bytes) -> None:
    """All of it, without a Content-Length."""
    handler.begin(None)
    handler.wfile.write(data)


def reset(handler: Handler, data: bytes) -> None:
    """The connection is closed without an answer."""


def moved(to: str) -> Fault:
    def fault(handler: Handler, data: bytes) -> None:
        handler.begin(0, 302, Location=to)

    return fault


@contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[Server]:
    server = Server(files)
    thread = threading.Thread(target=server.serve_forever, args=(0.005,))
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
