"""The four dermoscopy cases of ``demo/data/isic`` with the outlines of the reference and of the shipped model's labels.

python docs/figures/isic.py docs/images/isic.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

import nnunet_lgms

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CASES = Path(__file__).resolve().parents[2] / "demo" / "data" / "isic"
OUTLINES = {"reference": ("#12d612", 2.6), "prediction": ("#2030ff", 0.9)}  # colour; width, so that both are seen


def main(picture: Path) -> None:
    images = sorted((CASES / "imagesTs").glob("*.png"))
    figure, axes = plt.subplots(1, len(images), figsize=(2.4 * len(images), 3), layout="constrained")
    for axis, file in zip(axes, images):
        case = file.name.removesuffix("_0000.png")
        reference = np.asarray(Image.open(CASES / "labelsTs" / f"{case}.png"))
        predicted = nnunet_lgms.predict("isic", file, device="cpu")
        dice = 2 * np.sum((reference > 0) & (predicted > 0)) / (np.sum(reference > 0) + np.sum(predicted > 0))
        axis.imshow(Image.open(file))
        for labels, (colour, width) in zip((reference, predicted), OUTLINES.values()):
            axis.contour(labels, levels=[0.5], colors=colour, linewidths=width)
        axis.set_title(f"{case}, Dice {dice:.2f}", fontsize=9)
        axis.set_axis_off()
    handles = [plt.Line2D([], [], color=colour, linewidth=width) for colour, width in OUTLINES.values()]
    figure.legend(handles, OUTLINES, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(picture, metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
