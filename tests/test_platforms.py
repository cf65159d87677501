"""Windows and macOS, as far as another system can show them."""

import ast
import os
import sys
from pathlib import Path

import pytest

import nnunet_lgms
from nnunet_lgms.planning import profile
from nnunet_lgms.prediction import cases
from nnunet_lgms.study import gpus

FILES = sorted(Path(nnunet_lgms.__file__).parent.rglob("*.py"))
# modules of the standard library, and names of os and signal, that Windows lacks
MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "pty", "syslog"}
NAMES = {"getuid", "geteuid", "fork", "forkpty", "killpg", "setsid", "nice", "sched_getaffinity", "statvfs", "uname"}
NAMES |= {"mkfifo", "chown", "getpgid", "SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "pthread_sigmask", "setitimer"}


def _is_guarded(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether something around a node asks for the system or the name first."""
    while node in parents:
        node = parents[node]
        if isinstance(node, ast.If | ast.IfExp) and any(w in ast.unparse(node.test) for w in ("hasattr", "os.name")):
            return True
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type):
            return True
    return False


def test_what_windows_lacks_is_asked_for_before_it_is_used():
    found = []
    for file in FILES:
        tree = ast.parse(file.read_text("utf-8"))
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                lacks = any(alias.name in MODULES for alias in node.names)
            elif isinstance(node, ast.Attribute):
                lacks = ast.unparse(node.value) in ("os", "signal") and node.attr in NAMES
            else:
                lacks = isinstance(node, ast.ImportFrom) and node.module in MODULES
            if lacks and not _is_guarded(node, parents):
                found.append(f"{file.name}:{node.lineno} {ast.unparse(node)}")
    assert not found


def test_files_are_written_in_one_encoding_everywhere():
    """Windows writes text in the encoding of its country where none is named."""
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "read_text":
                if not node.args and not any(k.arg == "encoding" for k in node.keywords):
                    found.append(f"{file.name}:{node.lineno} {ast.unparse(node)}")
    assert not found


def test_on_windows_no_process_is_asked_whether_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """There signal 0 is Ctrl+C."""
    sent = []
    monkeypatch.setattr(cases.os, "kill", lambda process, number: sent.append(process))
    leftover = tmp_path / ".4242.case.nii.gz"
    leftover.touch()
    monkeypatch.setattr(cases, "_runs", _with_name("nt", cases._runs))
    cases.remove_leftovers([str(tmp_path / "case")], ".nii.gz")
    assert leftover.exists() and not sent


def _with_name(name: str, function):
    """The function on a system of that name; pathlib must not see it."""

    def call(*args):
        before, os.name = os.name, name
        try:
            return function(*args)
        finally:
            os.name = before

    return call


def test_gpus_are_shared_out_where_users_have_no_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delattr(os, "getuid")
    monkeypatch.setattr(gpus.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(gpus, "visible_gpus", lambda: ["GPU-1"])
    with gpus.one_gpu() as gpu:
        assert gpu == "GPU-1" and os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-1"


def test_profile_says_what_windows_does_not_tell(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(ValueError, match="Windows does not tell the memory"):
        profile._peak_of_process()
