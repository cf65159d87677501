"""The page by raw requests: nobody without the token, no path from a request, nothing left behind."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnx_stub
import pytest
import SimpleITK as sitk
from conftest import ROOT

pytest.importorskip("starlette", reason="needs the extra [view]")
pytest.importorskip("uvicorn", reason="needs the extra [view]")
pytest.importorskip("onnxruntime", reason="needs the extra [view]")

import namespace  # noqa: E402
import view_server  # noqa: E402

from nnunet_lgms.cli import main  # noqa: E402
from nnunet_lgms.runtime import Predictor  # noqa: E402
from nnunet_lgms.view import session as session_module  # noqa: E402
from nnunet_lgms.view import uploads  # noqa: E402
from nnunet_lgms.view.folders import LOCK, PREFIX, program_folder, remove_left  # noqa: E402

ROUTES = [
    ("GET", "/"),
    ("GET", "/page.css"),
    ("GET", "/page.js"),
    ("GET", "/model"),
    ("GET", "/session"),
    ("POST", "/image"),
    ("POST", "/image/given"),
    ("POST", "/segment"),
    ("GET", "/slice/1/0/0"),
    ("GET", "/mask"),
    ("GET", "/nothing"),
    ("OPTIONS", "/model"),
    ("HEAD", "/"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return onnx_stub.threshold_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with view_server.running(model, tmp_path_factory.mktemp("root")) as running:
        yield running


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> bytes:
    """A small volume with a bright part, compressed NIfTI."""
    samples = np.random.default_rng(0).normal(size=(24, 32, 24)).astype(np.float32)
    samples[8:12, 10:16, 6:12] += 9
    volume = sitk.GetImageFromArray(samples)
    volume.SetSpacing((0.5, 1.0, 2.0))
    file = tmp_path_factory.mktemp("image") / "case.nii.gz"
    sitk.WriteImage(volume, str(file))
    return file.read_bytes()


def test_the_routes_are_all(server):
    paths = {re.sub(r"\{(\w+):int\}", "0", route.path) for route in server.page.app.routes}
    assert paths == {re.sub(r"\d", "0", path) for _, path in ROUTES if path != "/nothing"}


@pytest.mark.parametrize("method, path", ROUTES)
def test_nothing_without_the_token(server, method, path):
    for given in (
        {},
        {"cookie": "a=b"},
        {"cookie": server.cookie[:-1]},
        {"authorization": f"Bearer {server.guard.token}"},
    ):
        answer = server.ask(method, path, **given)
        assert answer.status == 403 and "set-cookie" not in answer.headers
    assert server.ask(method, f"{path}?token={server.guard.token[:-1]}").status == 403
    if (method, path) != ("GET", "/"):  # the one place where the token is taken
        assert server.ask(method, f"{path}?token={server.guard.token}").status == 403


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "localhost.evil.example", "", "192.0.2.1"]
    + ["127.0.0.1@evil.example", "127.0.0.1:{port}:80", "[::1", "0.0.0.0:{port}"],
)
def test_other_names_are_not_served(server, host):
    """A page of somebody else's whose name leads to this machine: its Host is its own."""
    host = host.format(port=server.port)
    assert server.ask("GET", f"/?token={server.guard.token}", host=host).status == 403
    assert server.ask("GET", "/model", host=host, cookie=server.cookie).status == 403


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "[::1]:9", "localhost:9000"])
def test_names_of_this_machine_are_served(server, host):
    """Whatever the port: behind an SSH tunnel it is another one."""
    host = host.format(port=server.port)
    assert server.ask("GET", "/model", host=host, cookie=server.cookie).status == 200
    assert server.ask("GET", "/model", host=host, cookie=server.cookie, origin=f"http://{host}").status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "https://127.0.0.1:{port}"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
def test_other_pages_are_refused(server, headers):
    headers = {name: value.format(port=server.port) for name, value in headers.items()}
    answer = server.known("GET", "/model", **headers)
    assert answer.status == 403 and not [name for name in answer.headers if name.startswith("access-control")]


def test_the_printed_address_may_be_followed_from_anywhere(server):
    answer = server.ask("GET", f"/?token={server.guard.token}", sec_fetch_site="cross-site")
    assert answer.status == 200
    assert "HttpOnly" in answer.headers["set-cookie"] and "SameSite=Strict" in answer.headers["set-cookie"]
    assert server.guard.token not in answer.headers["set-cookie"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]


NAMES = ["/victim", "..", ".", "../..", "%2e%2e", "uploads", "lock", "C:\\", "\x00", "x" * 5000]


@pytest.mark.parametrize("name", NAMES)
def test_no_path_comes_from_a_request(server, tmp_path, image, name):
    (victim := tmp_path / "victim").mkdir()
    (victim / "file").touch()
    name = name.replace("/victim", str(victim))
    before = sorted(tmp_path.rglob("*")), sorted(server.root.rglob("*"))
    if "\x00" not in name:  # which no client sends
        for method, path in ROUTES[5:10]:
            assert server.known(method, path, b"" if method == "POST" else None, x_session=name).status == 404
    session_paths = [
        f"/session/{name}",
        f"/gradio_api/heartbeat/{name}",
        f"/slice/{name}/0/0",
        f"/file={name}",
        f"/{name}",
    ]
    for path in session_paths:
        quoted = "".join(c if c.isalnum() or c in "/.%=" else f"%{ord(c):02x}" for c in path)
        for method in ("GET", "POST", "DELETE", "PUT"):
            assert server.known(method, quoted).status in (400, 404, 405)
    with server.session() as session:
        answer = server.upload(session, (f"{name}.nii.gz", image))
        assert answer.status == (400 if "\x00" in name or len(name) > 255 else 200), answer.body
        outside = [path for path in server.root.rglob("*") if path.parent == server.root]
        assert len(outside) == 1  # the session's folder; nothing stays in it once the image was read
        assert not list(outside[0].iterdir())
    assert (sorted(tmp_path.rglob("*")), sorted(server.root.rglob("*"))) == before


def test_two_tabs_with_the_same_file_and_segment_twice(server, model, image, tmp_path):
    with server.session() as one, server.session() as two:
        assert one != two
        for session in (one, two):
            opened = server.upload(session, ("case.nii.gz", image))
            assert [plane["name"] for plane in opened.json["planes"]] == ["axial", "coronal", "sagittal"]
        first, second = (server.known("POST", "/segment", x_session=session).lines[-1] for session in (one, two))
        assert first == second == server.known("POST", "/segment", x_session=one).lines[-1]
        (row,) = first["labels"]
        assert row["name"] == "bright" and row["unit"] == "mm³" and row["amount"] == row["count"] > 100
        mask = server.known("GET", "/mask", x_session=one)
        assert mask.headers["content-disposition"] == "attachment; filename*=UTF-8''case_mask.nii.gz"
        for name, content in (("mask", mask.body), ("case", image)):
            (tmp_path / f"{name}.nii.gz").write_bytes(content)
        found = sitk.ReadImage(str(tmp_path / "mask.nii.gz"))
        assert found.GetSpacing() == (0.5, 1.0, 2.0)
        labels = Predictor(model).predict(tmp_path / "case.nii.gz")
        np.testing.assert_array_equal(sitk.GetArrayFromImage(found), labels)
        assert row["count"] == np.count_nonzero(labels)
        cut = server.known("GET", f"/slice/{opened.json['image']}/0/10", x_session=one).body
        assert np.array_equal(np.frombuffer(cut[2 * 32 * 24 :], "<u2").reshape(32, 24), labels[10])
        other = server.known("GET", "/slice/2/0/10", x_session=one)
        assert other.status == 404 and other.json["error"] == "There is no such slice."
        assert server.known("GET", "/slice/1/0/24", x_session=one).status == 404


def test_a_session_ends_with_its_connection(server, image):
    with server.session() as session:
        server.upload(session, ("case.nii.gz", image))
        server.known("POST", "/segment", x_session=session)
        assert server.page.sessions[session].shown.labels is not None
        assert len(list(server.root.iterdir())) == 1
    assert session not in server.page.sessions and not list(server.root.iterdir())
    gone = server.known("GET", "/mask", x_session=session)
    assert gone.status == 404 and "load the page again" in gone.json["error"]


REFUSED = {
    "large": (413, "large.nii.gz has 2 MB, 1 are allowed"),
    "text": (400, "notes.txt is no image that this page takes"),
    "damaged": (400, "broken.nii.gz is damaged or was cut short"),
    "empty": (400, "A file is empty"),
    "control": (400, "not of printable characters"),
    "many": (400, "These are 2 files, the model takes 1 channel(s): MRI"),
    "hdf5": (400, "h.nii does not hold what files with the ending .nii do"),
    "detached": (400, "The pixels of d.nrrd are in another file"),
    "metaimage": (400, "The pixels of m.mha are in another file"),
    "ome": (400, "The pixels of o.tif are in another file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_wrong_files_are_one_sentence_and_leave_nothing(server, image, kind):
    detached = b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: /etc/passwd\n\n"
    metaimage = (
        b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nElementDataFile = /etc/passwd\n"
    )
    files = {
        "large": [("large.nii.gz", bytes(2 * 2**20))],
        "text": [("notes.txt", b"text")],
        "damaged": [("broken.nii.gz", image[: len(image) // 2])],
        "empty": [("case.nii.gz", b"")],
        "control": [("a\nb.nii.gz", image)],
        "many": [("a.nii.gz", image), ("b.nii.gz", image)],
        "hdf5": [("h.nii", b"\x89HDF\r\n\x1a\n" + bytes(400))],
        "detached": [("d.nrrd", detached)],
        "metaimage": [("m.mha", metaimage)],
        "ome": [("o.tif", b'II*\0 <UUID FileName="../other.tif">')],
    }[kind]
    status, sentence = REFUSED[kind]
    with server.session() as session:
        answer = server.upload(session, *files)
        assert (
            answer.status == status
            and sentence in answer.json["error"]
            and str(server.root) not in answer.json["error"]
        )
        assert [path for path in server.root.rglob("*") if path.is_file()] == []
        assert server.upload(session, ("case.nii.gz", image)).status == 200  # and the tab goes on


@pytest.mark.parametrize("announced", [None, "x", "%ff", "[]", "[[1,2]]", '[["a.nii.gz",-1]]', "{}", "[" * 3000])
def test_uploads_that_no_page_makes(server, announced):
    with server.session() as session:
        more = {} if announced is None else {"x_files": announced}
        answer = server.known("POST", "/image", b"12345", x_session=session, **more)
        assert answer.status == 400 and answer.json["error"].endswith(".")


def test_an_upload_that_is_cut_short_leaves_nothing(server, image):
    with server.session() as session, socket.create_connection(("127.0.0.1", server.port)) as connection:
        announced = f'[["case.nii.gz",{len(image)}]]'
        words = f"POST /image HTTP/1.1\r\nHost: localhost\r\nCookie: {server.cookie}\r\nX-Session: {session}\r\n"
        connection.sendall(
            f"{words}X-Files: {announced}\r\nContent-Length: {len(image)}\r\n\r\n".encode() + image[:1000]
        )
        _until(lambda: list(server.root.rglob("case_0000.nii.gz")))
        connection.close()
        _until(lambda: not list(server.root.rglob("case_0000.nii.gz")))
        assert server.page.sessions[session].shown is None


def test_an_upload_that_stands_still_ends(server, monkeypatch):
    monkeypatch.setattr(uploads, "PATIENCE", 0.2)
    with server.session() as session, socket.create_connection(("127.0.0.1", server.port)) as connection:
        files = 'X-Files: [["case.nii.gz",9]]'
        connection.sendall(server.head(session, "POST", "/image", files, "Content-Length: 9") + b"123")
        assert b"408" in connection.recv(100)
        assert not [path for path in server.root.rglob("*") if path.is_file()]


def _caused(cause: Exception) -> Exception:
    error = ValueError("The image cannot be read.")
    error.__cause__ = cause
    return error


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    "fault, sentence",
    [
        (MemoryError(), "There is too little memory for this image"),
        (RuntimeError("Failed to allocate memory for requested buffer of size 9"), "There is too little memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "The disk for temporary files is full"),
        (_caused(MemoryError()), "There is too little memory for this image"),
        (RuntimeError("of the\nlibrary"), "This went wrong (RuntimeError: of the library)."),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_the_next_try_works(server, image, monkeypatch, fault, sentence):
    def fails(*_):
        raise fault

    with server.session() as session:
        with monkeypatch.context() as patched:
            patched.setattr(session_module, "read_case", fails)
            assert sentence in server.upload(session, ("case.nii.gz", image)).json["error"]
        server.upload(session, ("case.nii.gz", image))
        with monkeypatch.context() as patched:
            patched.setattr(server.page.predictor, "predict_case", fails)
            assert sentence in server.known("POST", "/segment", x_session=session).lines[-1]["error"]
        assert server.upload(session, ("case.nii.gz", image)).status == 200
        assert "labels" in server.known("POST", "/segment", x_session=session).lines[-1]
        with monkeypatch.context() as patched:
            patched.setattr(session_module, "write_labels", fails)
            assert sentence in server.known("GET", "/mask", x_session=session).json["error"]
        assert not [path for path in server.root.rglob("*") if path.is_file()]


def test_no_room_is_seen_before_an_upload(server, image, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(1, 1, 10))
    with server.session() as session:
        answer = server.upload(session, ("case.nii.gz", image))
        assert answer.status == 507 and "no room" in answer.json["error"]


def test_an_image_that_is_no_longer_wanted_is_not_computed_to_the_end(server, image, monkeypatch):
    windows = []

    def slow(case, progress):
        for done in range(1, 1000):
            windows.append(done)
            progress(done, 1000)
            time.sleep(0.01)

    monkeypatch.setattr(server.page.predictor, "predict_case", slow)
    with server.session() as session:
        server.upload(session, ("case.nii.gz", image))
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            words = (
                f"POST /segment HTTP/1.1\r\nHost: localhost\r\nCookie: {server.cookie}\r\nX-Session: {session}\r\n\r\n"
            )
            connection.sendall(words.encode())
            _until(lambda: windows)
    _until(lambda: server.page.turn.borrowed_tokens == 0)
    assert len(windows) < 500


def _until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- the program --------------------------------------------------------------------------------------------------


def test_what_a_killed_program_left_goes_at_the_next_start(model, tmp_path, clean_env, monkeypatch):
    environment = clean_env | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    words = [sys.executable, "-m", "nnunet_lgms", "view", str(model), "--no-browser"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert re.fullmatch(r"The page: http://127\.0\.0\.1:\d+/\?token=[\w-]{43}\n", process.stdout.readline())
        (left,) = tmp_path.glob(f"{PREFIX}*")
        assert left.stat().st_mode & 0o777 == 0o700
        (left / "patient.nii.gz").touch()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        remove_left()
        assert (left / "patient.nii.gz").exists()  # it runs
        process.kill()
    assert (left / "patient.nii.gz").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "elsewhere")
    with program_folder() as mine:
        assert not left.exists() and (tmp_path / "elsewhere").exists()
        with program_folder() as another:
            assert another != mine and (mine / LOCK).exists()
    assert not mine.exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_however_it_is_stopped_nothing_stays(name, model, capsys, monkeypatch):
    """SIGHUP is what a program gets when its terminal is closed."""
    stop, folders = getattr(signal, name), []
    before = signal.signal(stop, deaf := lambda *_: None)  # what is not caught would end the tests

    def serve(model, image, folder, **_):
        folders.append(folder)
        (folder / "mask.nii.gz").touch()
        os.kill(os.getpid(), stop)
        time.sleep(0.1)

    monkeypatch.setattr("nnunet_lgms.view.server.serve", serve)
    try:
        assert main(["view", str(model), "--no-browser"]) == 130
        # worker processes forked later would inherit what is left behind, and not end when they are told to
        assert signal.getsignal(stop) is deaf
    finally:
        signal.signal(stop, before)
    assert "interrupted" in capsys.readouterr().err and folders and not folders[0].exists()


def test_the_page_sends_nothing_elsewhere(model, tmp_path, clean_env):
    """Also that it ends by itself on a signal while a tab is open, and leaves nothing."""
    if not namespace.possible():
        pytest.skip("needs a network namespace")
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    program = (
        "import http.client, os, re, signal, socket, subprocess, sys\n"
        "view = subprocess.Popen([sys.executable, '-m', 'nnunet_lgms', 'view', sys.argv[1], '--no-browser', '--host',"
        " '0.0.0.0'], stdout=subprocess.PIPE, text=True)\n"
        "port, query = re.search(r':(\\d+)/(\\S+)', view.stdout.readline()).groups()\n"
        "page = http.client.HTTPConnection('127.0.0.1', int(port))\n"
        "page.request('GET', '/' + query)\n"
        "answer = page.getresponse(); answer.read()\n"
        "page.request('GET', '/session', headers={'Cookie': answer.headers['set-cookie'].partition(';')[0]})\n"
        "assert page.getresponse().status == 200\n"
        "view.send_signal(signal.SIGTERM)\n"
        "assert view.wait(120) == 130\n"
        "try: socket.getaddrinfo('seen.example', 80)\n"
        "except OSError: pass\n"
    )
    folders = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": str(ROOT)}
    done, asked = namespace.names_asked_by(
        [sys.executable, "-c", program, str(model)], tmp_path, env=clean_env | folders, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Warning: everybody who can reach this address" in done.stderr
    assert set(asked) == {"seen.example"}
    assert not [*(tmp_path / "home").iterdir(), *(tmp_path / "temporary").iterdir()]


@pytest.mark.parametrize(
    "words, message",
    [
        (["view", "FOLDER"], "export it first"),
        (["view", "none.onnx"], "does not exist"),
        (["view", "MODEL", "none.nii.gz"], "does not exist"),
        (["view", "MODEL", "--max-upload", "0"], "--max-upload 0"),
        (["view", "MODEL", "--host", "203.0.113.7"], "--host 203.0.113.7 is no address of this machine"),
        (["view", "MODEL", "--host", "no such host"], "--host no such host is no address of this machine"),
    ],
)
def test_view_refuses(words, message, model, tmp_path, capsys):
    places = {"FOLDER": str(tmp_path), "MODEL": str(model)}
    assert main([places.get(word, word) for word in words]) == 2
    assert message in capsys.readouterr().err


def test_a_taken_port_names_the_option(model, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["view", str(model), "--no-browser", "--port", str(port)]) == 2
    assert f"--port {port} of 127.0.0.1 is taken: give another one" in capsys.readouterr().err
