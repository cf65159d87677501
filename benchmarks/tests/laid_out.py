"""Made-up files of a data set of the evidence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from dataset_replicas import volume
from evidence_parts.sets import FLAT, GREY, DataSet
from PIL import Image


def lay_out(folder: Path, row: DataSet, n: int, size: int = 40) -> None:
    """Files of a set as it is published; flat images have an edge of its own size, masks grey edges."""
    random = np.random.default_rng(0)
    defaults = "{case}.png" if row.channels == GREY else "{case}.jpg", "{case}.png"
    if row.configuration != FLAT:
        defaults = "{case}_0000.nii.gz" if row.images == "imagesTr" else "{case}.nii.gz", "{case}.nii.gz"
    for i in range(40, 40 + n):  # of the lesions with these numbers each of BUSI's published splits has some
        name = str(i) if row.title == "STU" else f"benign ({i})"
        image, mask = (
            folder / row.source / sub / (template or default).format(case=name)
            for sub, template, default in zip((row.images, row.masks), row.names, defaults)
        )
        for path in (image, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        if row.configuration == FLAT:
            shape = (size, size) if row.channels == GREY else (size, size, 3)
            Image.fromarray(random.integers(0, 255, shape, np.uint8)).save(image)
            edge = np.where(np.arange(size * size) < 200, 255, 3).reshape(size, size)
            Image.fromarray(edge.astype(np.uint8)).save(mask)
        else:
            labels = np.zeros((20, 24, 22), np.uint8)
            for value in range(1, 1 + len(row.labels)):
                labels[4 * value :, 6:18, 6:16] = value
            volume(image, (100 * labels + random.integers(0, 50, labels.shape)).astype(np.int16))
            volume(mask, labels)
