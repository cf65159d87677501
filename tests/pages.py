"""Reports in a real browser: whether they fit, and that they ask nobody for anything.

NNUNET_LGMS_SCREENSHOTS names a folder for pictures of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BROWSER = os.environ.get("NNUNET_LGMS_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
LAPTOP, PHONE = 1100, 400
FITS = """() => ({
    beyond: document.documentElement.scrollWidth - innerWidth,
    scrolled: [...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth).length,
    missing: [...document.images].filter(i => !(i.complete && i.naturalWidth)).length,
})"""


@contextmanager
def opened(file: Path, width: int) -> Iterator:
    """A report in a window of that many pixels; nothing may go wrong in it, and nothing be asked of other machines."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if BROWSER is None:
        pytest.skip("no browser: install chromium, or set NNUNET_LGMS_BROWSER")
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(60_000)
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or wrong.append(r.url))
        page.goto(file.as_uri())
        yield page
        if folder := os.environ.get("NNUNET_LGMS_SCREENSHOTS"):
            page.screenshot(path=Path(folder, f"{file.parent.name}_{file.stem}_{width}.png"), full_page=True)
        chromium.close()
    assert not wrong, wrong


def check_fits(page, width: int) -> None:
    """Nothing but tables may be wider than the window, and on a laptop not even these."""
    found = page.evaluate(FITS)
    assert found["beyond"] <= 0 and found["missing"] == 0, found
    assert found["scrolled"] == 0 or width < LAPTOP, found
