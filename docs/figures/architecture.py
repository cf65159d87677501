"""Draws the network and its blocks in the paper's terms (arXiv 2508.15476), light and dark, as SVG.

python docs/figures/architecture.py     # writes docs/images/{network,blocks}-{light,dark}.svg
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

IMAGES = Path(__file__).resolve().parents[1] / "images"
# The colours of a block are the same in both figures.
THEMES = {
    "light": {
        "text": "#1f2328",
        "line": "#59636e",
        "LMS": "#cfe3fb",
        "GMS": "#fbd9b5",
        "Fusion": "#cdeccf",
        "": "#eceff2",
    },
    "dark": {
        "text": "#f0f6fc",
        "line": "#9198a1",
        "LMS": "#17416f",
        "GMS": "#7a4410",
        "Fusion": "#1d5a2b",
        "": "#2d333b",
    },
}
WIDTHS = (16, 32, 64, 128, 128)
ENCODER = ("LMS", "LMS", "LMS", "GMS", "GMS")
DECODER = (("Fusion",), ("Fusion",), ("Fusion", "GMS"), ("GMS",))
SCALES = ("1", "1/2", "1/4", "1/8", "1/16")


class Drawing:
    """A canvas in centimetres with boxes and arrows in the colours of a theme."""

    def __init__(self, theme: str, width: float, height: float):
        self.colours = THEMES[theme]
        self.figure = plt.figure(figsize=(width / 2.54, height / 2.54))
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def box(self, x: float, y: float, width: float, height: float, text: str, kind: str = "", size: float = 8) -> None:
        patch = FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, "round,pad=0,rounding_size=0.12",
            facecolor=self.colours[kind], edgecolor=self.colours["line"], linewidth=0.7,
        )  # fmt: skip
        self.axes.add_patch(patch)
        self.text(x, y, text, size=size)

    def text(self, x: float, y: float, text: str, size: float = 8, **options) -> None:
        options = {"ha": "center", "va": "center", "color": self.colours["text"], **options}
        self.axes.text(x, y, text, fontsize=size, **options)

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """Draws a line through the points with its head at the last."""
        style = {"color": self.colours["line"], "linewidth": 0.9, "linestyle": (0, (4, 2)) if dashed else "solid"}
        xs, ys = zip(*points[:-1])
        self.axes.plot(xs, ys, **style)
        head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7, **style}
        self.axes.annotate("", points[-1], points[-2], arrowprops=head)

    def save(self, name: str) -> None:
        self.figure.savefig(IMAGES / f"{name}.svg", transparent=True, metadata={"Date": None})
        plt.close(self.figure)


def network(theme: str) -> None:
    """The published network: five levels, widths 16 to 128."""
    drawing = Drawing(theme, 16, 8.6)
    rows = [7.2 - 1.5 * level for level in range(5)]
    left, right = 4.3, 11.4
    for level, (y, block, width, scale) in enumerate(zip(rows, ENCODER, WIDTHS, SCALES)):
        x = left if level < 4 else (left + right) / 2
        drawing.box(x, y, 2.2, 0.72, block, block, size=10)
        drawing.text(0.7, y, scale, size=8)
        if level < 4:
            drawing.text(x + 1.25, y + 0.2, f"{width}", size=7, ha="left")
            drawing.arrow((x + 1.1, y), (right - (2.25 if level == 2 else 1.1), y), dashed=True)
        else:
            drawing.text(x, y - 0.58, f"{width} channels", size=7)
        if level < 3:
            drawing.arrow((x, y - 0.36), (x, rows[level + 1] + 0.36))
            drawing.text(x + 0.12, (y + rows[level + 1]) / 2, "max pool", size=6.5, ha="left")
    middle = (left + right) / 2
    drawing.arrow((left, rows[3] - 0.36), (left, rows[4]), (middle - 1.1, rows[4]))
    drawing.text(left + 0.2, rows[4] + 0.2, "max pool", size=6.5, ha="left")
    drawing.arrow((middle + 1.1, rows[4]), (right, rows[4]), (right, rows[3] - 0.36))
    drawing.text(right - 0.2, rows[4] + 0.2, "up", size=6.5, ha="right")
    for level, blocks in enumerate(DECODER):
        for i, block in enumerate(blocks):
            x = right + (i - (len(blocks) - 1) / 2) * 2.3
            drawing.box(x, rows[level], 2.2, 0.72, block, block, size=10)
        if level < 3:
            drawing.arrow((right, rows[level + 1] + 0.36), (right, rows[level] - 0.36))
            drawing.text(right + 0.12, (rows[level] + rows[level + 1]) / 2, "up", size=6.5, ha="left")
    drawing.box(2.0, rows[0], 1.3, 0.72, "stem", size=8)
    drawing.arrow((2.65, rows[0]), (left - 1.1, rows[0]))
    drawing.box(14.1, rows[0], 1.3, 0.72, "head", size=8)
    drawing.arrow((right + 1.1, rows[0]), (13.45, rows[0]))
    drawing.text(0.7, 8.15, "scale", size=7)
    drawing.text(left, 8.15, "encoder", size=8)
    drawing.text(middle, 8.15, "skip", size=7)
    drawing.text(right, 8.15, "decoder", size=8)
    drawing.save(f"network-{theme}")


def blocks(theme: str) -> None:
    """LMS, GMS and Fusion, each read from top to bottom."""
    drawing = Drawing(theme, 16, 9.4)
    for x, title in ((2.7, "LMS: local multiscale"), (8.3, "GMS: global multiscale"), (13.7, "Fusion")):
        drawing.text(x, 9.0, title, size=9, weight="bold")

    x = 2.7  # LMS
    drawing.text(x, 8.3, "C channels")
    for i, kernel in enumerate((3, 5, 7, 9)):
        group = x + (i - 1.5) * 1.12
        drawing.arrow((x, 8.1), (group, 7.45))
        drawing.box(group, 7.1, 1.02, 0.7, f"dw {kernel}", "LMS")
        drawing.arrow((group, 6.75), (group, 6.25))
    drawing.box(x, 5.9, 4.4, 0.7, "concatenate, + x")
    drawing.box(x, 4.8, 4.4, 0.7, "GroupNorm, GELU")
    drawing.box(x, 3.7, 4.4, 0.7, "conv 1, C to C/4", "LMS")
    drawing.box(x, 2.6, 4.4, 0.7, "conv 3, C/4 to C", "LMS")
    drawing.box(x, 1.5, 4.4, 0.7, "+ x")
    for y in (5.9, 4.8, 3.7, 2.6):
        drawing.arrow((x, y - 0.35), (x, y - 0.75))

    x = 8.3  # GMS
    drawing.text(x, 8.3, "D channels")
    drawing.arrow((x, 8.1), (x, 7.45))
    drawing.box(x, 7.1, 4.6, 0.7, "conv 3, conv 1 (D to C)", "GMS")
    drawing.arrow((x - 0.7, 6.75), (x - 0.7, 6.25))
    drawing.arrow((x + 1.6, 6.75), (x + 1.6, 6.25))
    drawing.text(x - 0.85, 6.5, "3/4 C", size=6.5, ha="right")
    drawing.text(x + 1.5, 6.5, "1/4 C", size=6.5, ha="right")
    drawing.box(
        x - 0.7, 5.35, 3.2, 1.8, "sparse attention:\nevery second pixel\nof an axis, over\nthe whole map", "GMS", size=7
    )
    drawing.box(x + 1.6, 5.35, 1.3, 1.8, "dw 3\ndw 1\n+", "GMS", size=7)
    drawing.arrow((x - 0.7, 4.45), (x - 0.7, 4.05))
    drawing.arrow((x + 1.6, 4.45), (x + 1.6, 4.05))
    drawing.box(x, 3.7, 4.6, 0.7, "concatenate, conv 1", "GMS")
    drawing.box(x, 2.6, 4.6, 0.7, "concatenate with the input")
    drawing.box(x, 1.5, 4.6, 0.7, "conv 3, C + D to C", "GMS")
    for y in (3.7, 2.6):
        drawing.arrow((x, y - 0.35), (x, y - 0.75))

    x = 13.7  # Fusion
    drawing.text(x - 0.95, 8.3, "skip")
    drawing.text(x + 0.95, 8.3, "from below")
    for side in (-0.95, 0.95):
        drawing.arrow((x + side, 8.1), (x + side, 7.45))
        drawing.box(x + side, 7.1, 1.8, 0.7, "conv 3", "Fusion")
        drawing.arrow((x + side, 6.75), (x + side, 6.25))
    drawing.box(x, 5.9, 3.7, 0.7, "GELU, norm")
    drawing.box(x, 4.8, 3.7, 0.7, "conv 1, D to 4C", "Fusion")
    drawing.box(x, 3.7, 3.7, 0.7, "GELU, norm")
    drawing.box(x, 2.6, 3.7, 0.7, "conv 1, 4C to C", "Fusion")
    drawing.box(x, 1.5, 3.7, 0.7, "GELU, norm")
    for y in (5.9, 4.8, 3.7, 2.6):
        drawing.arrow((x, y - 0.35), (x, y - 0.75))
    drawing.text(
        8.0,
        0.5,
        "dw k: depthwise convolution of kernel k.  conv k: dense, followed by norm and SiLU in LMS and GMS.",
        size=7,
    )
    drawing.save(f"blocks-{theme}")


if __name__ == "__main__":
    plt.rcParams.update({"svg.hashsalt": "nnunet_lgms", "font.family": "DejaVu Sans"})
    for theme in THEMES:
        network(theme)
        blocks(theme)
