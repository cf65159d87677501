"""The requests that the page makes; all that there are.

=====================================  ===============================================================================
``GET /``, ``/page.css``, ``/page.js``  the page
``GET /model``                         what the model is
``GET /session``                       a session, which lasts as long as this answer is being read
``POST /image``                        an image to show: the files one after the other, their names and sizes before
``POST /image/given``                  the image that the program was started with
``POST /segment``                      its labels; a line of JSON for each step
``GET /slice/IMAGE/PLANE/INDEX``       one slice, as numbers
``GET /mask``                          the labels as a file
=====================================  ===============================================================================

A session's name is a header, ``X-Session``, of all but the first three, and a key of a table; paths are made of the
program's own names alone.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Coroutine
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote, unquote

from anyio import CapacityLimiter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nnunet_lgms.runtime import Predictor
from nnunet_lgms.view.session import Session, Shown, explained
from nnunet_lgms.view.uploads import Refused, check_self_contained, ending_of, receive

FILES = {
    "": ("page.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
}
LONGEST_NAME = 255
HEARTBEAT = 15  # seconds: what is written to a connection that is gone fails sooner or later
TICK = 0.2  # seconds between two looks at how far a segmentation is


class Page:
    """The requests, for one model.

    Args:
        predictor: the model.
        root: the program's folder; sessions have folders of their own in it.
        given: the image that the program was started with.
        largest: bytes of a file that are taken.
    """

    def __init__(self, predictor: Predictor, root: Path, given: Path | None, largest: int):
        self.predictor, self.root, self.given, self.largest = predictor, root, given, largest
        self.sessions: dict[str, Session] = {}
        self.turn = CapacityLimiter(1)
        self.closing = asyncio.Event()
        self._uploads: set[asyncio.Task] = set()
        files = resources.files(__package__)
        self._files = {path: (files.joinpath(name).read_bytes(), kind) for path, (name, kind) in FILES.items()}
        routes = [
            *(Route(f"/{path}", self.file) for path in FILES),
            Route("/model", self.model),
            Route("/session", SessionStream(self), methods=["GET"]),
            Route("/image", self.upload, methods=["POST"]),
            Route("/image/given", self.open_given, methods=["POST"]),
            Route("/segment", self.segment, methods=["POST"]),
            Route("/slice/{image:int}/{plane:int}/{index:int}", self.slice),
            Route("/mask", self.mask),
        ]
        self.app = Starlette(routes=routes, exception_handlers={Refused: _refused, Exception: _failed})
        self.app.router.redirect_slashes = False

    def session(self, request: Request) -> Session:
        """The session that a request names.

        Raises:
            Refused: there is no such session.
        """
        session = self.sessions.get(request.headers.get("x-session", ""))
        if session is None:
            raise Refused("The connection to the program was lost: load the page again.", 404)
        return session

    async def file(self, request: Request) -> Response:
        content, kind = self._files[request.url.path[1:]]
        return Response(content, media_type=kind)

    async def model(self, request: Request) -> Response:
        description = self.predictor.description
        return JSONResponse(
            {
                "dataset": description.dataset,
                "trainer": description.trainer,
                "configuration": description.configuration,
                "channels": description.channel_names,
                "ending": description.file_ending,
                "largest": self.largest,
                "given": self.given is not None,
            }
        )

    async def upload(self, request: Request) -> Response:
        session = self.session(request)
        names, sizes = self._announced(request)
        paths = [f"case_{number:04d}{ending_of(name)}" for number, name in enumerate(names)]
        try:
            if shutil.disk_usage(session.folder).free < sum(sizes):
                raise Refused("The disk for temporary files has no room for these files: free some space.", 507)
            with TemporaryDirectory(dir=session.folder, ignore_cleanup_errors=True) as folder:
                files = [Path(folder, path) for path in paths]
                await self._until_closing(receive(request.stream(), files, sizes))
                for file, name in zip(files, names):
                    check_self_contained(file, name)
                return _opened(await session.show(files, names))
        except OSError as error:
            raise Refused(*explained(error)) from error

    def _announced(self, request: Request) -> tuple[list[str], list[int]]:
        """Names and sizes of the files that follow.

        Raises:
            Refused: they are not what the page sends, or too many or too large.
        """
        try:
            files = json.loads(unquote(request.headers["x-files"], errors="strict"))
            names, sizes = [name for name, _ in files], [size for _, size in files]
            length = int(request.headers["content-length"])
        except (KeyError, TypeError, ValueError, RecursionError):
            raise Refused("Names and sizes of the files are missing.") from None
        fine = all(isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable() for name in names)
        if not fine or not all(type(size) is int and size > 0 for size in sizes) or sum(sizes) != length:
            raise Refused("A file is empty, or has a name that is too long or not of printable characters.")
        channels = self.predictor.description.channel_names
        if len(names) not in (1, len(channels)):
            raise Refused(
                f"These are {len(names)} files, the model takes {len(channels)} channel(s): {', '.join(channels)}."
            )
        if max(sizes) > self.largest:
            largest = max(zip(sizes, names))
            raise Refused(
                f"{largest[1]} has {largest[0] / 2**20:.0f} MB, {self.largest / 2**20:.0f} are allowed: start the "
                "program with a larger --max-upload.",
                413,
            )
        return names, sizes

    async def open_given(self, request: Request) -> Response:
        session = self.session(request)
        if self.given is None:
            raise Refused("The program was started without an image.", 404)
        return _opened(await session.show([self.given], [self.given.name]))

    async def segment(self, request: Request) -> Response:
        session = self.session(request)
        if session.shown is None:
            raise Refused("Drop an image first.", 404)
        shown = session.shown
        task = session.start(shown)

        async def lines() -> AsyncIterator[str]:
            told = None
            while not (await asyncio.wait({task}, timeout=TICK))[0]:
                if self.closing.is_set():
                    return
                if told != shown.progress:
                    told = shown.progress
                    yield json.dumps({"done": told[0], "of": told[1]}) + "\n"
            try:
                yield json.dumps({"labels": task.result(), "start": shown.picture.fullest()}) + "\n"
            except Refused as refusal:
                yield json.dumps({"error": str(refusal)}) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def slice(self, request: Request) -> Response:
        shown = self.session(request).shown
        image, plane, index = (request.path_params[name] for name in ("image", "plane", "index"))
        try:
            if shown is None or shown.number != image:
                raise IndexError
            return Response(shown.picture.slice_bytes(plane, index), media_type="application/octet-stream")
        except IndexError:
            raise Refused("There is no such slice.", 404) from None

    async def mask(self, request: Request) -> Response:
        content, name = await self.session(request).mask()
        disposition = f"attachment; filename*=UTF-8''{quote(name, safe='')}"
        return Response(content, media_type="application/octet-stream", headers={"content-disposition": disposition})

    async def _until_closing(self, work: Coroutine) -> None:
        """Waits for it, unless the program ends."""
        task = asyncio.ensure_future(work)
        self._uploads.add(task)
        try:
            await task
        except asyncio.CancelledError:
            if self.closing.is_set():
                raise Refused("The program was ended.", 503) from None
            raise
        finally:
            task.cancel()
            self._uploads.discard(task)

    def close(self) -> None:
        """Ends all sessions and uploads."""
        self.closing.set()
        for upload in self._uploads:
            upload.cancel()
        for session in self.sessions.values():
            session.close()


class SessionStream:
    """A session that lasts as long as its connection: its name is sent, and then a heartbeat, until the tab is gone."""

    def __init__(self, page: Page):
        self.page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            session = Session(self.page.predictor, self.page.root, self.page.turn)
        except OSError as error:
            sentence, status = explained(error)
            return await JSONResponse({"error": sentence}, status)(scope, receive, send)
        self.page.sessions[session.name] = session
        closing = asyncio.ensure_future(self.page.closing.wait())
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            event = f"retry: 500\ndata: {session.name}\n\n"
            while True:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
                if (await asyncio.wait({closing, gone}, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED))[0]:
                    break
                event = ": still here\n\n"
            await send({"type": "http.response.body", "body": b""})
        except OSError:  # the connection is gone
            pass
        finally:
            closing.cancel()
            gone.cancel()
            session.close()
            self.page.sessions.pop(session.name)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _opened(shown: Shown) -> Response:
    picture = shown.picture
    return JSONResponse(
        {
            "image": shown.number,
            "name": shown.name,
            "planes": [asdict(plane) for plane in picture.planes],
            "start": picture.fullest(),
            "colours": picture.colours,
            "low": picture.low,
            "step": picture.step,
            "window": picture.window,
        }
    )


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, error.status)


async def _failed(request: Request, error: Exception) -> Response:
    sentence, status = explained(error)
    return JSONResponse({"error": sentence}, status)
