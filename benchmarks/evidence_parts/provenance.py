"""Where a result comes from: machine, versions, code."""

from __future__ import annotations

import hashlib
import io
import platform
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("nnunet_lgms", "trainers", "plans")
COMMITS = 40  # that are looked through


def provenance() -> dict:
    """Command, date, device, versions, and a digest of the code (`commit_of` finds its commit)."""
    import torch

    files = [path for folder in CODE for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".json")]
    return {
        "command": " ".join(["python", *map(_short, sys.argv)]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "numpy", "nnunetv2", "batchgeneratorsv2")},
        "code": digest((path.relative_to(ROOT).as_posix(), path.read_bytes()) for path in files),
    }


def digest(files: Iterable[tuple[str, bytes]]) -> str:
    """Of names and contents, in the order of the names."""
    whole = hashlib.sha256()
    for name, content in sorted(files):
        whole.update(f"{name} {len(content)}\n".encode() + content)
    return whole.hexdigest()


def commit_of(code: str) -> str | None:
    """The newest commit whose code has this digest; None if it was never committed."""
    listed = subprocess.run(["git", "rev-list", f"-{COMMITS}", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    for commit in listed.stdout.split():
        if _digest_at(commit) == code:
            return commit
    return None


def _digest_at(commit: str) -> str:
    archive = subprocess.run(["git", "archive", commit, *CODE], cwd=ROOT, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = [m for m in tar if m.isfile() and Path(m.name).suffix in (".py", ".json")]
        return digest((m.name, tar.extractfile(m).read()) for m in members)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _short(word: str) -> str:
    """Without folders of this machine."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
