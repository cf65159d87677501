"""A picture of a report for the docs, as a browser shows it.

    python docs/figures/screenshot.py REPORT.html docs/images/report.png [--width 1100] [--height 2300]

Needs playwright and chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

COLOURS = 64  # of a palette: a third of the bytes
SCALE = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1100, help="pixels of the window")
    parser.add_argument("--height", type=int, help="pixels to keep (default: the whole page)")
    args = parser.parse_args()
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": args.width, "height": 900})
        page.goto(args.report.absolute().as_uri())
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        browser.close()
    if args.height:
        picture = picture.crop((0, 0, picture.width, min(args.height, picture.height)))
    picture = picture.convert("RGB").resize([round(SCALE * n) for n in picture.size], Image.Resampling.LANCZOS)
    picture.quantize(COLOURS).save(args.picture, optimize=True)


if __name__ == "__main__":
    main()
