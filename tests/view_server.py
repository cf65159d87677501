"""A page that runs in a thread of the tests, and requests to it that no browser would make."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import uvicorn

from nnunet_lgms.runtime import Predictor
from nnunet_lgms.view.app import Page
from nnunet_lgms.view.guard import Guard
from nnunet_lgms.view.server import Server, listen


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def lines(self) -> list:
        return [json.loads(line) for line in self.body.splitlines()]


@dataclass
class Running:
    """A page that is served.

    Attributes:
        root: its folder.
    """

    page: Page
    guard: Guard
    root: Path
    port: int
    cookie: str = field(init=False)

    def __post_init__(self):
        self.cookie = self.ask("GET", f"/?token={self.guard.token}").headers["set-cookie"].partition(";")[0]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/?token={self.guard.token}"

    def ask(self, method: str, path: str, body=None, host: str | None = None, **headers: str) -> Answer:
        """One request with exactly these headers, and a Host."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", f"127.0.0.1:{self.port}" if host is None else host)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        if body is not None and "content_length" not in headers:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        found = Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        connection.close()
        return found

    def known(self, method: str, path: str, body=None, **headers: str) -> Answer:
        """One request with the cookie."""
        return self.ask(method, path, body, cookie=self.cookie, **headers)

    @contextmanager
    def session(self) -> Iterator[str]:
        """The name of a session, which ends with the block."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            words = f"GET /session HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nCookie: {self.cookie}\r\n\r\n"
            connection.sendall(words.encode())
            seen = b""
            while b"data: " not in seen or not seen.rpartition(b"data: ")[2].count(b"\n"):
                assert (part := connection.recv(4096)), seen
                seen += part
            name = seen.rpartition(b"data: ")[2].split(b"\n")[0].decode()
            yield name
        deadline = time.monotonic() + 30
        while name in self.page.sessions:
            assert time.monotonic() < deadline, "the session outlived its connection"
            time.sleep(0.02)

    def head(self, session: str, method: str, path: str, *headers: str) -> bytes:
        """The first part of a request, as it goes through a socket."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Cookie: {self.cookie}", f"X-Session: {session}"]
        return "\r\n".join([*lines, *headers, "", ""]).encode()

    def upload(self, session: str, *files: tuple[str, bytes], **more: str) -> Answer:
        announced = quote(json.dumps([(name, len(content)) for name, content in files]))
        body = b"".join(content for _, content in files)
        return self.known("POST", "/image", body, x_session=session, **{"x_files": announced} | more)


@contextmanager
def running(model: Path, root: Path, given: Path | None = None, largest: int = 2**20) -> Iterator[Running]:
    with listen("127.0.0.1", None) as listener:
        port = listener.getsockname()[1]
        page = Page(Predictor(model, threads=1), root, given, largest)
        guard = Guard(page.app, "127.0.0.1", port)
        started = threading.Event()
        config = uvicorn.Config(guard, log_level="error", access_log=False, ws="none", lifespan="off")
        server = Server(config, started.set, page.close)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        assert started.wait(30)
        try:
            yield Running(page, guard, root, port)
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive(), "the server does not end"
