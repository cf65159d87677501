"""The program: a web server for one model on one address."""

from __future__ import annotations

import html
import ipaddress
import socket
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path

import uvicorn

from nnunet_lgms.runtime import Predictor
from nnunet_lgms.runtime.images import read_case
from nnunet_lgms.view.app import Page
from nnunet_lgms.view.guard import Guard, is_wildcard

PORTS = range(7860, 7960)
WARNING = (
    "Warning: everybody who can reach this address and learns the token can use this page, and what goes over the "
    "network is not encrypted. An SSH tunnel to 127.0.0.1 is safer."
)


def serve(
    model: Path, image: Path | None, folder: Path, *, host: str, port: int | None, megabytes: int, open_browser: bool
) -> None:
    """Serve the page until interrupted; everything that it writes lies in `folder`.

    Raises:
        ValueError: the model or the image is not what it should be.
        OSError: no port is free.
    """
    predictor = Predictor(model)
    if image is not None:
        read_case([image], predictor.description)  # what is wrong with it is said here, not on the page
    with listen(host, port) as listener:
        port = listener.getsockname()[1]
        page = Page(predictor, folder, image, megabytes * 2**20)
        guard = Guard(page.app, host, port)
        address = f"http://{_in_url(_reachable(host))}:{port}/?token={guard.token}"

        def started() -> None:
            print(f"The page: {address}\nIt ends with Ctrl-C.", flush=True)
            if not is_loopback(host):
                print(WARNING, file=sys.stderr, flush=True)
            if open_browser:
                webbrowser.open(_redirection(folder, address).as_uri())

        # Proxies' headers are not believed, and there are no websockets.
        config = uvicorn.Config(
            guard, log_level="error", access_log=False, proxy_headers=False, server_header=False, ws="none",
            lifespan="off", timeout_graceful_shutdown=3,
        )  # fmt: skip
        Server(config, started, page.close).run([listener])


class Server(uvicorn.Server):
    """Calls `started` when it answers and `closing` before it waits for open connections, which sessions are."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None], closing: Callable[[], None]):
        super().__init__(config)
        self._started, self._closing = started, closing

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self._started()

    async def shutdown(self, sockets=None) -> None:
        self._closing()
        await super().shutdown(sockets)


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens at `host`, at `port` or else at the first free one of ``PORTS``.

    Raises:
        OSError: no port is free.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
    both = family == socket.AF_INET6 and is_wildcard(host) and socket.has_dualstack_ipv6()  # IPv4 through IPv6
    for candidate in [port] if port else PORTS:
        try:
            return socket.create_server((address[0], candidate), family=family, backlog=128, dualstack_ipv6=both)
        except OSError as error:
            if port:
                raise
            last = error
    raise OSError(f"No port from {PORTS.start} to {PORTS.stop - 1} is free at {host}: name one with --port.") from last


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    addresses = {address[0] for *_, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)}
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def _reachable(host: str) -> str:
    """An address for the browser: a server on all addresses has the one that other machines would see."""
    if not is_wildcard(host):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of a network that is nowhere; nothing is sent, the system only chooses
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _redirection(folder: Path, address: str) -> Path:
    """A file for the browser to open: other users see the words that a program is started with, and not the token."""
    file = folder / "open.html"
    file.touch(mode=0o600)
    file.write_text(f'<meta http-equiv="refresh" content="0;url={html.escape(address)}">', "utf-8")
    return file
