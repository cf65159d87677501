"""What all benchmarks have: the option where results go, their files and tables, and where they come from.

    python benchmarks/record.py

Writes the commit into the results that were measured before there was one, or where there is no git.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nnunet_lgms.files import atomic_write  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
CODE = ("nnunet_lgms", "trainers", "plans")
COMMITS = 40  # that are looked through
MISSING = re.compile(r'(?P<before>"code": "(?P<code>[0-9a-f]{64})",\s*"commit": )null')


def command_line(about: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark, with its docstring as the help and with ``--output``."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", "--out", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    return parser


def table(header: str, rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table.

    Args:
        header: names of the columns, with bars between them.
        rows: cells; those that a row lacks at its end are empty.
    """
    columns = header.count("|") + 1
    lines = [f"| {header} |", "|" + "---|" * columns]
    return lines + ["| " + " | ".join(map(str, [*row, *[""] * (columns - len(row))])) + " |" for row in rows]


def write(folder: Path, name: str, content: Any, markdown: str = "", picture: Callable[[Path], Any] | None = None):
    """``NAME.json``, and ``NAME.md`` and ``NAME.png`` where there are such; each whole, or as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {".json": json.dumps(content, indent=1) + "\n"} | ({".md": markdown} if markdown else {})
    for ending, text in texts.items():
        with atomic_write(folder / f"{name}{ending}") as temporary:
            temporary.write_text(text, "utf-8")
    if picture is not None:
        with atomic_write(folder / f"{name}.png") as temporary:
            picture(temporary)


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)", info.read_text() if info.exists() else "", re.M)
    return names[0] if names else platform.processor() or platform.machine()


def provenance(device: str = "cuda") -> dict:
    """Command, date, device (a CPU where there is no GPU), versions, a digest of the code, and its commit."""
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".json")]
    code = digest((path.relative_to(ROOT).as_posix(), path.read_bytes()) for path in files)
    return {
        "command": " ".join(["python", *map(_short, sys.argv)]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "numpy", "nnunetv2", "batchgeneratorsv2")},
        "code": code,
        "commit": commit_of(code),
    }


def digest(files: Iterable[tuple[str, bytes]]) -> str:
    """Of names and contents, in the order of the names."""
    whole = hashlib.sha256()
    for name, content in sorted(files):
        whole.update(f"{name} {len(content)}\n".encode() + content)
    return whole.hexdigest()


def commit_of(code: str) -> str | None:
    """The newest commit whose code has this digest; None if it was not committed lately, or this is no git checkout.

    A folder that lies in a checkout of something else, such as an unpacked archive, is none.
    """
    if shutil.which("git") is None or not (top := _git("rev-parse", "--show-toplevel").decode().strip()):
        return None
    if not Path(top).samefile(ROOT):
        return None
    for commit in _git("rev-list", f"-{COMMITS}", "HEAD").decode().split():
        if _digest_at(commit) == code:
            return commit
    return None


def _git(*words: str) -> bytes:
    """What git says; nothing if it fails."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True).stdout


@cache
def _digest_at(commit: str) -> str | None:
    archive = _git("archive", commit, *CODE)
    if not archive:  # of a time before these folders
        return None
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


def fill(text: str) -> str:
    """A result, as its file holds it, with the commits that it lacked and that are known by now."""
    return MISSING.sub(lambda found: found["before"] + json.dumps(commit_of(found["code"])), text)


def main() -> None:
    for file in sorted(RESULTS.rglob("*.json")):
        text = file.read_text("utf-8")
        if (filled := fill(text)) != text:
            with atomic_write(file) as temporary:
                temporary.write_text(filled, "utf-8")
            print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
