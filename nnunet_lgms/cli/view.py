"""`nnunet_lgms view MODEL.onnx [IMAGE]`: a local page to look with."""

from __future__ import annotations

import argparse
import errno
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "view",
        help="a local page: drop an image, see its segmentation",
        description="Open a page where an exported model segments the image that you drop: overlay, slices, the mask "
        "to download. Only this machine can reach it unless --host says otherwise, and only who has the token in the "
        "address that is printed.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="what `nnunet_lgms export` wrote")
    parser.add_argument("image", type=Path, nargs="?", metavar="IMAGE", help="shown and segmented when the page opens")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, help="(the first free one from 7860)")
    parser.add_argument("--max-upload", type=int, default=500, metavar="MB", help="largest file to take (500)")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")


def run(args: argparse.Namespace) -> int:
    from nnunet_lgms.requirements import needs

    if args.model.is_dir():
        raise ValueError(f"{args.model} is a folder: export it first, `nnunet_lgms export {args.model} -o model.onnx`.")
    if args.max_upload < 1:
        raise ValueError(f"--max-upload {args.max_upload}: give at least 1 MB.")
    if args.port is not None and not 1 <= args.port <= 65535:
        raise ValueError(f"--port {args.port}: give one from 1 to 65535, or leave it out.")
    check_address(args.host, args.port)
    packages = (
        "numpy",
        "SimpleITK",
        "nibabel",
        "imageio",
        "tifffile",
        "onnxruntime",
        "starlette",
        "uvicorn",
        "anyio",
        "filelock",
    )
    with needs("view", packages, "view"):
        from nnunet_lgms.view.folders import program_folder
        from nnunet_lgms.view.server import serve

    # However it is stopped, images and masks go with it.
    with signals_interrupt(), program_folder() as folder:
        serve(
            args.model,
            args.image,
            folder,
            host=args.host,
            port=args.port,
            megabytes=args.max_upload,
            open_browser=not args.no_browser,
        )
    return 0


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Within, what stops a program raises KeyboardInterrupt; afterwards it does what it did before.

    SIGINT too: a shell starts what runs in its background deaf to it. SIGHUP says that the terminal was closed.
    """
    stops = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {stop: signal.signal(stop, signal.default_int_handler) for stop in stops}
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)


def check_address(host: str, port: int | None) -> None:
    """The page can be served there; a web server that cannot would wait for itself for ever.

    Raises:
        ValueError: the address is not this machine's, or the port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as web servers do
            listener.bind(address)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ValueError(
                f"--port {port} of {host} is taken: give another one, or leave --port out for the first free one."
            ) from None
        if getattr(error, "errno", None) == errno.EACCES:
            raise ValueError(f"--port {port} may not be used: give one from 1024 to 65535, or leave it out.") from None
        raise ValueError(
            f"--host {host} is no address of this machine ({error}): 127.0.0.1 serves to this machine only, 0.0.0.0 on "
            "all of its addresses."
        ) from None
