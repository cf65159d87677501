"""The page in a real browser: drop a case, see its labels, scroll, download the mask, nothing left behind.

The browser is whatever NNUNET_LGMS_BROWSER names, or chromium or google-chrome on the PATH; without one these tests are
skipped. NNUNET_LGMS_SCREENSHOTS names a folder for pictures of the page, NNUNET_LGMS_VIEW_MODEL a model for them.
"""

from __future__ import annotations

import http.server
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_stub
import pytest
import SimpleITK as sitk

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
for module in ("starlette", "uvicorn", "onnxruntime"):
    pytest.importorskip(module, reason="needs the extra [view]")
BROWSER = os.environ.get("NNUNET_LGMS_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no browser: install chromium, or set NNUNET_LGMS_BROWSER"),
]

import view_server  # noqa: E402

from nnunet_lgms.runtime import Predictor  # noqa: E402

LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
SCRIPT = "<img src=x onerror=\"document.title='run'\">"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tools:
        # a name of somebody else's that leads to this machine
        rules = "--host-resolver-rules=MAP evil.example 127.0.0.1"
        chromium = tools.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", rules])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    chosen = os.environ.get("NNUNET_LGMS_VIEW_MODEL")
    return Path(chosen) if chosen else onnx_stub.threshold_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def case(hippocampus) -> Path:
    return sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[0]


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with view_server.running(model, tmp_path_factory.mktemp("root")) as running:
        yield running


class Tab:
    """One tab; what it asks of other machines and what goes wrong in it is noted."""

    def __init__(self, browser, server, size=LAPTOP):
        self.page = browser.new_page(viewport=size)
        self.page.set_default_timeout(30_000)
        self.outside, self.errors = [], []
        own = ("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:")
        self.page.on("request", lambda r: None if r.url.startswith(own) else self.outside.append(r.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(server.address)

    def __getitem__(self, selector: str):
        return self.page.locator(selector)

    def open(self, *files) -> None:
        self["#files:not([disabled])"].wait_for(state="attached")
        self["#files"].set_input_files(list(map(str, files)))

    def segment(self) -> None:
        self["#segment:not([disabled])"].click()
        self["#download:not([disabled])"].wait_for()

    def drawn(self, plane: str, times: int = 1) -> int:
        """Waits until a plane was drawn more than so many times."""
        figure = self[f"figure[data-plane={plane}]"]
        deadline = time.monotonic() + 30
        while int(figure.get_attribute("data-drawn") or 0) < times:
            assert time.monotonic() < deadline, f"{plane} is not drawn"
            time.sleep(0.02)
        return int(figure.get_attribute("data-drawn"))

    def pixels(self, plane: str) -> np.ndarray:
        """(rows, columns, 4) of a plane."""
        size, values = self[f"figure[data-plane={plane}] canvas"].evaluate(
            "c => [[c.height, c.width], Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)]"
        )
        return np.uint8(values).reshape(*size, 4)

    def screenshot(self, name: str) -> None:
        if folder := os.environ.get("NNUNET_LGMS_SCREENSHOTS"):
            time.sleep(0.5)
            self.page.screenshot(path=Path(folder, name), full_page=True)

    def close(self) -> None:
        self.page.close()
        assert not self.outside and not self.errors


@pytest.fixture
def tab(browser, server):
    tab = Tab(browser, server)
    yield tab
    tab.close()


def test_drop_look_scroll_download(tab, server, model, case, tmp_path):
    assert tab.page.url == f"http://127.0.0.1:{server.port}/"  # the token does not stay in the address
    tab.open(case)
    drawn = tab.drawn("axial")  # the image is there before anything is segmented
    grey = tab.pixels("axial")
    assert len(np.unique(grey[..., :3])) > 20 and (grey[..., 0] == grey[..., 1]).all()
    tab.segment()
    amount = tab["#legend .amount"].first.inner_text()
    image, labels = sitk.ReadImage(str(case)), Predictor(model).predict(case)
    (value, *_) = Predictor(model).description.label_values[1:]
    assert amount == f"{np.count_nonzero(labels == value) * np.prod(image.GetSpacing()):,.0f} mm³"
    tab.drawn("axial", drawn + 1)
    index = int(tab["figure[data-plane=axial] figcaption"].inner_text().split()[1].split("/")[0]) - 1
    coloured = tab.pixels("axial")
    marked = (coloured[..., 0] != coloured[..., 2]).sum()
    assert marked == np.count_nonzero(labels, axis=(1, 2))[index] == np.count_nonzero(labels, axis=(1, 2)).max()
    tab.screenshot("laptop.png")

    def number(plane: str) -> int:
        return int(tab[f"figure[data-plane={plane}] figcaption"].inner_text().split()[1].split("/")[0]) - 1

    with tab.page.expect_download() as download:
        tab["#download"].click()
    assert download.value.suggested_filename == case.name.replace(".nii.gz", "_mask.nii.gz")
    download.value.save_as(tmp_path / "mask.nii.gz")
    mask = sitk.ReadImage(str(tmp_path / "mask.nii.gz"))
    assert mask.GetSize() == image.GetSize() and mask.GetOrigin() == image.GetOrigin()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), labels)

    tab["h1"].click()
    tab.page.keyboard.press("ArrowDown")
    assert number("axial") == index - 1
    tab.page.keyboard.press("2")
    tab.page.keyboard.press("End")
    assert number("coronal") == len(tab.pixels("axial")) - 1  # the back is the last row
    axial = tab["figure[data-plane=axial] .view"].bounding_box()
    tab.page.mouse.click(axial["x"] + axial["width"] * 0.99, axial["y"] + 2)
    assert (number("coronal"), number("sagittal")) == (0, tab.pixels("axial").shape[1] - 1)
    tab.page.mouse.wheel(0, -100)
    assert number("axial") == index - 2
    tab.segment()  # once more: the same again
    assert tab["#legend .amount"].first.inner_text() == amount

    (session,) = server.page.sessions.values()
    assert not [path for path in server.root.rglob("*") if path.is_file()] and session.folder.exists()
    tab.page.goto("about:blank")
    _until(lambda: not server.page.sessions)
    assert not session.folder.exists() and session.shown is None


def test_level_window_opacity_and_single_labels(tab, case):
    tab.open(case)
    drawn = tab.drawn("axial")
    before = tab.pixels("axial")
    tab["#width-number"].fill("1")
    tab["#width-number"].press("Enter")
    drawn = tab.drawn("axial", drawn + 1)
    assert set(np.unique(tab.pixels("axial")[..., 0])) <= set(range(256)) - set(range(60, 190)) | {0, 255}
    tab["#reset"].click()
    tab.drawn("axial", drawn + 1)
    np.testing.assert_array_equal(tab.pixels("axial"), before)
    tab.segment()
    drawn = tab.drawn("coronal", 2)
    tab["#opacity"].fill("100")
    drawn = tab.drawn("coronal", drawn + 1)
    assert (tab.pixels("coronal")[..., :3] == (230, 159, 0)).all(-1).any()
    tab["#legend input"].first.uncheck()
    tab.drawn("coronal", drawn + 1)
    assert not (tab.pixels("coronal")[..., :3] == (230, 159, 0)).all(-1).any()


def test_slices_that_come_with_labels_before_their_names_do(tab, server, case, monkeypatch):
    """The server has labels a moment before it has counted them, and a slice may be asked for in between."""
    from nnunet_lgms.view import session

    counted, amounts = threading.Event(), session.amounts
    monkeypatch.setattr(session, "amounts", lambda *words: counted.wait(30) and amounts(*words))
    tab.open(case)
    drawn = tab.drawn("axial")
    tab["#segment:not([disabled])"].click()
    _until(lambda: any(one.shown and one.shown.labels is not None for one in server.page.sessions.values()))
    tab["h1"].click()
    tab.page.keyboard.press("ArrowDown")
    drawn = tab.drawn("axial", drawn + 1)
    assert (tab.pixels("axial")[..., 0] == tab.pixels("axial")[..., 2]).all()
    counted.set()
    tab["#download:not([disabled])"].wait_for()
    tab.drawn("axial", drawn + 1)
    assert (tab.pixels("axial")[..., 0] != tab.pixels("axial")[..., 2]).any()


def test_wrong_and_large_files_are_refused_on_the_page(tab, case, tmp_path):
    (tmp_path / f"{SCRIPT[:9]}.nii.gz").write_bytes(b"no image")
    tab.open(tmp_path / f"{SCRIPT[:9]}.nii.gz")
    tab.page.get_by_text("<img src=.nii.gz is damaged or was cut short").wait_for()
    assert not tab["body img"].count()
    (tmp_path / "large.nii.gz").write_bytes(bytes(2 * 2**20))
    tab.open(tmp_path / "large.nii.gz")
    tab.page.get_by_text("large.nii.gz has 2 MB, 1 are allowed").wait_for()
    assert tab["#segment"].is_disabled()
    tab.open(case)
    tab.drawn("axial")
    assert tab["#message"].inner_text() == ""


def test_two_tabs_do_not_meet(tab, browser, server, case):
    other = Tab(browser, server)
    for one in (tab, other):
        one.open(case)
    for one in (tab, other):
        one.segment()
    assert tab["#legend"].inner_text() == other["#legend"].inner_text()
    other.close()
    _until(lambda: len(server.page.sessions) == 1)
    tab.segment()
    with tab.page.expect_download():
        tab["#download"].click()


def test_a_lost_connection_is_said_and_the_next_try_works(tab, server, case):
    tab.open(case)
    tab.segment()
    old = dict(server.page.sessions)
    server.page.closing.set()  # ends the connection, as a laptop that slept
    _until(lambda: not server.page.sessions)
    server.page.closing.clear()
    _until(lambda: server.page.sessions)
    tab.page.get_by_text("The connection was lost for a moment").wait_for()
    assert not old.keys() & server.page.sessions.keys()
    tab.segment()
    assert tab["#message"].inner_text() == ""


def test_no_image_is_taken_before_the_program_has_answered(browser, server, case):
    tab, asked = Tab(browser, server), []
    with tab.page.expect_request("**/model"):
        tab.page.route("**/model", lambda route: asked.append(route))
        tab.page.reload()
    assert tab["#files"].is_disabled()
    asked[0].continue_()
    tab.open(case)
    tab.segment()
    tab.close()


def test_nothing_of_a_model_or_a_file_is_run(browser, tmp_path, case, monkeypatch):
    """Names of labels, channels and the data set that are HTML are text; 300 labels have room, on a phone too."""
    names = {"background": 0, SCRIPT: 1} | {f"{SCRIPT} {n}": n for n in range(2, 301)}
    more = {"dataset": SCRIPT, "channel_names": (SCRIPT,), "trainer": SCRIPT, "configuration": SCRIPT}
    model = onnx_stub.threshold_model(tmp_path / "m.onnx", **more)
    (root := tmp_path / "root").mkdir()
    with view_server.running(model, root, given=case) as server:
        predictor = server.page.predictor  # a network of 300 labels would be large
        monkeypatch.setattr(predictor, "description", replace(predictor.description, labels=names))
        monkeypatch.setattr(
            predictor, "predict_case", lambda case, _: np.resize(np.arange(301), case.samples.shape[1:])
        )
        for size in (PHONE, LAPTOP):
            tab = Tab(browser, server, size)
            tab["#legend li"].nth(299).wait_for(state="attached")  # the image is shown and segmented by itself
            assert tab["#legend .name"].first.inner_text() == SCRIPT and not tab["img"].count()
            assert tab["h1"].inner_text() == tab.page.title() == SCRIPT
            wide = tab.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert wide[0] <= wide[1]
            tab.close()


def test_on_a_phone(browser, server, case):
    tab = Tab(browser, server, PHONE)
    tab.open(case)
    tab.segment()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert tab["figure[data-plane=axial]"].bounding_box()["y"] < PHONE["height"] / 2  # the image is seen at once
    for button in ("#segment", "#download"):
        assert tab[button].bounding_box()["height"] >= 40
    tab.screenshot("phone.png")
    tab.close()


ATTACK = """<!doctype html><body><script>
const tries = ["model", "mask", "slice/1/0/0", "session", ""];
Promise.all(tries.map(path => fetch("http://TARGET/" + path, {credentials: "include", method: "GET"})
  .then(a => a.text().then(t => a.status + t.slice(0, 20)), e => "refused")))
  .then(found => document.title = found.join("|"));
</script>"""


def test_a_foreign_page_learns_nothing(browser, server, case):
    """A page on another port of this machine, and one whose own name leads to this machine (DNS rebinding)."""

    class Attacker(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(ATTACK.replace("TARGET", f"127.0.0.1:{server.port}").encode())

        def log_message(self, *_):
            pass

    context = browser.new_context()
    page = context.new_page()
    page.goto(server.address)  # the cookie is there
    page.locator("#files:not([disabled])").wait_for(state="attached")
    with http.server.HTTPServer(("127.0.0.1", 0), Attacker) as attacker:
        threading.Thread(target=attacker.serve_forever, daemon=True).start()
        for name in ("127.0.0.1", "localhost", "evil.example"):
            other = context.new_page()
            other.goto(f"http://{name}:{attacker.server_port}/")
            _until(lambda: other.title())  # noqa: B023
            assert other.title() == "|".join(["refused"] * 5)
        attacker.shutdown()
    rebound = context.new_page()
    answer = rebound.goto(f"http://evil.example:{server.port}/?token={server.guard.token}")
    assert answer.status == 403 and "not served under that name" in rebound.content()
    context.close()


def _until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
