"""A program in a network namespace of its own, with a resolver that counts what is asked: would anything be sent?

For Linux, where user namespaces are allowed.

    python namespace.py FILE WORDS...    runs WORDS; the names that were looked up are FILE's lines
"""

from __future__ import annotations

import fcntl
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

UNSHARE = ["unshare", "--map-root-user", "--net", "--mount"]
SIOCSIFFLAGS, UP_AND_RUNNING = 0x8914, 0x41


def possible() -> bool:
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=20).returncode == 0
    except OSError:
        return False


def names_asked_by(words: list[str], folder: Path, **options) -> tuple[subprocess.CompletedProcess, list[str]]:
    """What the program did, and the names that it looked up."""
    asked = folder / "asked"
    done = subprocess.run(
        [*UNSHARE, sys.executable, __file__, str(asked), *words], capture_output=True, text=True, **options
    )
    return done, asked.read_text().split()


def _answer(resolver: socket.socket, asked: Path) -> None:
    while True:
        question, address = resolver.recvfrom(4096)
        labels, rest = [], question[12:]
        while rest[0]:
            labels.append(rest[1 : 1 + rest[0]].decode())
            rest = rest[1 + rest[0] :]
        with asked.open("a") as file:
            print(".".join(labels), file=file)
        no_such_name = question[:2] + b"\x81\x83" + question[4:6] + bytes(6) + question[12:]
        resolver.sendto(no_such_name, address)


def _main(asked: Path, words: list[str]) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", UP_AND_RUNNING))
    resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    resolver.bind(("127.0.0.1", 53))
    asked.touch()
    threading.Thread(target=_answer, args=(resolver, asked), daemon=True).start()
    servers = asked.with_name("resolv.conf")
    servers.write_text("nameserver 127.0.0.1\n")
    subprocess.run(["mount", "--bind", servers, "/etc/resolv.conf"], check=True)
    return subprocess.run(words).returncode


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), sys.argv[2:]))
