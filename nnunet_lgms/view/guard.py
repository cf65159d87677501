"""Who may ask: every request is looked at before anything else is done with it.

Three things can go wrong with a page on one's own machine. Another user of the machine opens it: a token is needed,
which only the terminal shows. A page of somebody else's, open in the same browser, asks for it: the cookie is
`SameSite=Strict`, and what a browser says about where a request comes from is checked. Such a page gives its own name
this machine's address (DNS rebinding): only names that are the machine's are served.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Iterable
from urllib.parse import parse_qs

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    # The page is made of three files of its own; nothing that an image or a model says can become script or be sent.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """ASGI middleware that lets through what holds the token and was meant for this server.

    Args:
        app: what is guarded.
        host: the address that is served, a name or a number.
        port: tells the cookies of two servers apart, as browsers do not.
    """

    def __init__(self, app: ASGIApp, host: str, port: int):
        self.app = app
        self.token = secrets.token_urlsafe(32)
        self._cookie, self._secret = f"nnunet_lgms_view_{port}", secrets.token_urlsafe(32)
        self._hosts = {*LOOPBACK} | ({host.lower()} if not is_wildcard(host) else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        first_visit = self._brings_token(scope)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = dict(HEADERS)
                if first_visit:
                    added["set-cookie"] = f"{self._cookie}={self._secret}; Path=/; HttpOnly; SameSite=Strict"
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in added.items())]
            await send(message)

        refusal = self._refusal(scope, headers, first_visit)
        if refusal:
            first_visit = False
            return await PlainTextResponse(refusal + "\n", 403)(scope, receive, send_guarded)
        return await self.app(scope, receive, send_guarded)

    def _refusal(self, scope: Scope, headers: list[tuple[str, str]], first_visit: bool) -> str:
        """Why a request is not served, "" if it is."""
        hosts = [value for name, value in headers if name == "host"]
        if len(hosts) != 1 or not self._is_ours(hosts[0], scope):
            return "This page is not served under that name: open the address that the terminal shows."
        if any(value.lower() != f"http://{hosts[0].lower()}" for name, value in headers if name == "origin"):
            return "Another page asked for this one."
        # The address may be followed from anywhere, as it holds the token; a page of another port is "same-site".
        sites = [value for name, value in headers if name == "sec-fetch-site"]
        if not first_visit and any(site not in ("same-origin", "none") for site in sites):
            return "Another page asked for this one: open the address that the terminal shows."
        if not first_visit and not self._brings_cookie(value for name, value in headers if name == "cookie"):
            return "The token is missing: open the address that the terminal shows, with all that follows the '?'."
        return ""

    def _is_ours(self, host: str, scope: Scope) -> bool:
        name = _without_port(host)
        address = scope.get("server")  # of this connection: a number, which no other page can have as its name
        return name in self._hosts or address is not None and name == _plain(address[0])

    def _brings_token(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["path"] != "/" or scope["method"] != "GET":
            return False
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])
        return hmac.compare_digest(given[0].encode(), self.token.encode())

    def _brings_cookie(self, cookies: Iterable[str]) -> bool:
        pairs = (pair.strip().partition("=") for cookie in cookies for pair in cookie.split(";"))
        return any(
            name == self._cookie and hmac.compare_digest(value.encode(), self._secret.encode())
            for name, _, value in pairs
        )


def is_wildcard(host: str) -> bool:
    """Whether a server there listens on all addresses of the machine."""
    try:
        return host == "" or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _without_port(host: str) -> str:
    name, port = (host, "") if host.endswith("]") or ":" not in host else host.rsplit(":", 1)
    return name.strip("[]").lower() if port == "" or port.isdecimal() else ""


def _plain(address: str) -> str:
    """An address as browsers write it: IPv4 within IPv6 without its prefix."""
    try:
        number = ipaddress.ip_address(address)
    except ValueError:  # a socket of the file system
        return ""
    mapped = getattr(number, "ipv4_mapped", None)
    return str(mapped or number)
