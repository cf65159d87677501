"""Windows and macOS, as far as another system can show them."""

import ast
import os
import sys
from pathlib import Path

import pytest
from dataset_replicas import disc, grey, picture, save
from open_files import WindowsDisk

import nnunet_lgms
from nnunet_lgms import locks
from nnunet_lgms.cli import main
from nnunet_lgms.data import convert
from nnunet_lgms.files import atomic_write, ignores_case
from nnunet_lgms.locks import locked
from nnunet_lgms.names import alike, is_dataset_name, is_file_name, windows_refuses
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


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["CON", "nul", "Aux.nii.gz", "com1.png", "LPT9", "con .png", "a.", "a ", "a:b", 'a"b', "a?"]
)
def test_names_that_windows_refuses_are_refused_there_alone(name: str, monkeypatch: pytest.MonkeyPatch):
    assert windows_refuses(name) and is_file_name(name)
    refused = _with_name("nt", is_file_name)(name)
    assert not refused and _with_name("nt", is_file_name)("Console_1.nii.gz")
    assert not _with_name("nt", is_dataset_name)("Dataset004_a.") and is_dataset_name("Dataset004_a.")


def test_names_that_differ_in_capitals_only_are_pairs():
    assert alike(["Case_1", "b", "case_1", "CASE_1", "b"]) == [("Case_1", "case_1"), ("Case_1", "CASE_1")]
    assert not alike(["1", "2", "stra\u00dfe"])


class WithoutCapitals:
    """A disk that knows no capitals, as far as is asked here: whether there is a file of a name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._exists = Path.exists
        monkeypatch.setattr(Path, "exists", lambda path, **options: self.exists(path, **options))

    def exists(self, path: Path, **options) -> bool:
        if self._exists(path, **options):
            return True
        return path.parent.is_dir() and path.name.lower() in (name.lower() for name in os.listdir(path.parent))


def test_a_disk_is_asked_whether_it_knows_capitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    knows = not ignores_case(tmp_path / "not/there/yet")
    WithoutCapitals(monkeypatch)
    assert ignores_case(tmp_path) and not list(tmp_path.iterdir())
    if sys.platform == "linux":
        assert knows


def _convert_two_cases_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    if ignores_case(tmp_path):
        pytest.skip("the two images cannot be on one disk here")
    for number, case in enumerate(("Case_1", "case_1", "case_2")):
        save(tmp_path / f"images/{case}.png", picture(number, 1))
        save(tmp_path / f"masks/{case}.png", grey(disc(number)))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    folders = [str(tmp_path / "images"), str(tmp_path / "masks")]
    return main(["convert", "folder", *folders, "--id", "7", "--name", "Own", "--workers", "1"])


@pytest.mark.usefixtures("verify_in_threads")
def test_cases_that_would_be_one_elsewhere_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    assert _convert_two_cases_alike(tmp_path, monkeypatch) == 0
    assert len(list((tmp_path / "raw/Dataset007_Own/labelsTr").iterdir())) == 3
    said = capsys.readouterr()
    assert "1 case(s) differ from another one in capitals only, such as case_1 from Case_1" in said.out + said.err


def test_cases_that_are_one_on_this_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(convert, "ignores_case", lambda folder: True)
    assert _convert_two_cases_alike(tmp_path, monkeypatch) == 2
    assert "case_1: differs from Case_1 in capitals only, and on this disk they are one" in capsys.readouterr().err
    assert not list((tmp_path / "raw").glob("Dataset*"))


def test_cases_that_are_devices_of_windows_are_refused_there():
    names_on_disk = _with_name("nt", convert._names_on_disk)
    problems, remarks = names_on_disk(["aux", "b"], Path())
    assert [problem.identifier for problem in problems] == ["aux"] and not remarks
    assert convert._names_on_disk(["aux", "b"], Path()) == ([], [])


def test_no_prediction_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    outputs = [str(tmp_path / name) for name in ("Case_1", "b", "case_1")]
    if not ignores_case(tmp_path):
        cases.check_outputs(outputs, ".png")
    monkeypatch.setattr(cases, "ignores_case", lambda folder: True)
    with pytest.raises(ValueError, match=r"Case_1\.png and .*case_1\.png are one file on this disk"):
        cases.check_outputs(outputs, ".png")
    with pytest.raises(ValueError, match=r"Two cases would be written to .*b\.png"):
        cases.check_outputs([*outputs[:2], outputs[1]], ".png")


# --- files that are open ---------------------------------------------------------------------------------------------


@pytest.fixture
def windows_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in WindowsDisk().functions().items():
        monkeypatch.setattr(os, name, function)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which files are open")
def test_a_lock_is_given_back_where_open_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows_disk):
    with pytest.raises(PermissionError), locked(tmp_path / ".lock", "test"):  # as on Linux: removed while it is held
        pass
    lock = tmp_path / "folder" / ".lock"
    monkeypatch.setattr(locks, "_let_go", _with_name("nt", locks._let_go))
    for _ in range(2):
        with locked(lock, "test"):
            assert lock.exists()
        assert not lock.parent.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which files are open")
def test_an_error_in_writing_is_told_also_where_the_file_stays_open(tmp_path: Path, windows_disk):
    with pytest.raises(RuntimeError, match="the library failed"), atomic_write(tmp_path / "a") as temporary:
        left_open = temporary.open("w")
        raise RuntimeError("the library failed")
    left_open.close()
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole"
