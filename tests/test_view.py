"""The page in a real browser: drop a case, see the overlay, scroll, download the mask, nothing left behind.

The browser is whatever `NNUNET_LGMS_BROWSER` names, or chromium or google-chrome on the PATH; without one the test is
skipped. NNUNET_LGMS_SCREENSHOT names a file for a picture of the page.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_stub
import pytest
import SimpleITK as sitk
from conftest import ROOT

pytest.importorskip("gradio", reason="needs the extra [view]")
pytest.importorskip("onnxruntime", reason="needs the extra [view]")
BROWSER = os.environ.get("NNUNET_LGMS_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")

from nnunet_lgms.cli import main  # noqa: E402
from nnunet_lgms.runtime import Predictor  # noqa: E402
from nnunet_lgms.view.slices import PICTURE, Segmented, draw, fullest_slice, to_grey  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    if chosen := os.environ.get("NNUNET_LGMS_VIEW_MODEL"):  # for a screenshot of a trained one
        return Path(chosen)
    return onnx_stub.threshold_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture
def server(model: Path, tmp_path: Path, clean_env):
    """Address and temporary folder of a running page, with uploads of at most 1 MB."""
    environment = clean_env | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    words = [sys.executable, "-m", "nnunet_lgms", "view", str(model), "--no-browser", "--max-upload", "1"]
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if match := re.search(r"http://\S+", line):
                break
        else:
            pytest.fail("".join(lines))
        try:
            yield match[0], tmp_path
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    assert not list(tmp_path.glob("nnunet_lgms_view_*")), "the temporary folder outlived the program"


@pytest.fixture
def page(server):
    if BROWSER is None:
        pytest.skip("no browser: install chromium, or name one with NNUNET_LGMS_BROWSER")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 900})
        tab.set_default_timeout(120_000)
        outside = []
        tab.on("request", lambda request: outside.append(request.url) if "127.0.0.1" not in request.url else None)
        tab.goto(server[0])
        yield tab
        browser.close()
    assert not [url for url in outside if url.startswith("http")], "the page asked another machine for something"


def test_drop_look_scroll_download(page, server, model, hippocampus, tmp_path):
    address, folder = server
    assert address.startswith("http://127.0.0.1:")
    case = sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[0]
    page.locator("#upload input[type=file]").set_input_files(str(case))
    page.get_by_text(case.name[:15]).first.wait_for()
    page.locator("#segment").click()
    overlay = page.locator("#overlay img")
    overlay.wait_for()
    page.locator("#legend").get_by_text("ml").first.wait_for()
    first = overlay.get_attribute("src")

    def changed(old: str) -> str:
        deadline = time.monotonic() + 120
        while (new := overlay.get_attribute("src")) == old:
            assert time.monotonic() < deadline, "the picture stays as it is"
            time.sleep(0.1)
        return new

    number = page.locator("#slice input[type=number]")
    shown = int(number.input_value())
    number.fill(str(shown - 3))
    number.press("Enter")
    second = changed(first)
    page.locator("#plane").get_by_text("sagittal").click()
    changed(second)
    if picture := os.environ.get("NNUNET_LGMS_SCREENSHOT"):
        time.sleep(1)
        page.screenshot(path=picture)

    with page.expect_download() as download:
        page.locator("#download").click()
    download.value.save_as(tmp_path / "mask.nii.gz")
    mask = sitk.ReadImage(str(tmp_path / "mask.nii.gz"))
    image = sitk.ReadImage(str(case))
    assert mask.GetSize() == image.GetSize() and mask.GetOrigin() == image.GetOrigin()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), Predictor(model).predict(case))
    # the image itself is gone as soon as it was read, the mask when the page is closed
    (root,) = folder.glob("nnunet_lgms_view_*")
    assert not [file for file in root.glob("uploads/**/*.nii.gz") if "mask" not in file.name]
    assert [file for file in root.rglob("*_mask.nii.gz") if "uploads" not in file.parts]
    page.goto("about:blank")
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(FileNotFoundError):  # a folder that is removed while it is searched
            if not [file for file in root.rglob("*_mask.nii.gz") if "uploads" not in file.parts]:
                break
        assert time.monotonic() < deadline, "the mask outlived its page"
        time.sleep(0.2)


def test_wrong_and_large_files_are_refused_on_the_page(page, tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")
    page.locator("#upload input[type=file]").set_input_files(str(tmp_path / "broken.nii.gz"))
    page.get_by_text("broken").first.wait_for()
    page.locator("#segment").click()
    page.get_by_text("damaged or was cut short").first.wait_for()
    page.reload()
    (tmp_path / "large.nii.gz").write_bytes(bytes(2 * 2**20))
    page.locator("#upload input[type=file]").set_input_files(str(tmp_path / "large.nii.gz"))
    page.get_by_text("maximum allowed size").first.wait_for()


def test_slices():
    image = np.zeros((1, 4, 6, 8), np.float32)
    image[0, 2] = 100
    labels = np.zeros((4, 6, 8), np.uint8)
    labels[2, 1:3, 4:6] = 1
    case = Segmented(to_grey(image), labels, (4.0, 2.0, 1.0), flat=False)
    assert fullest_slice(labels, 0) == 2 and fullest_slice(labels * 0, 0) == 2
    axial = draw(case, 0, 2, 1.0)
    assert axial.shape == (PICTURE, round(PICTURE * 8 / 12), 3)  # 12 mm x 8 mm
    assert tuple(axial[PICTURE // 4, round(axial.shape[1] * 4.5 / 8)]) == (230, 159, 0)
    assert tuple(axial[0, 0]) == (255, 255, 255)
    sagittal = draw(case, 2, 4, 1.0)  # upside down: the last slice is on top
    height = sagittal.shape[0]
    assert tuple(sagittal[height * 3 // 8, round(sagittal.shape[1] * 1.5 / 6)]) == (230, 159, 0)
    assert tuple(draw(case, 0, 99, 1.0)[0, 0]) == (0, 0, 0)  # beyond the end is the end


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

    monkeypatch.setattr("nnunet_lgms.view.page.serve", serve)
    try:
        assert main(["view", str(model), "--no-browser"]) == 130
        # worker processes forked later would inherit what is left behind, and not end when they are told to
        assert signal.getsignal(stop) is deaf
    finally:
        signal.signal(stop, before)
    assert "interrupted" in capsys.readouterr().err and folders and not folders[0].exists()
