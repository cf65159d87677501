"""Plans as nnU-Net itself makes them, from the fingerprints in this folder.

    python tests/planned_by_nnunet/make.py

writes ``<name>/nnUNetPlans.json`` for every ``<name>`` in ``FINGERPRINTS``, and the ``fingerprint.json`` and
``dataset.json`` that they were made from. All but ``hippocampus`` are synthetic: nobody's images stand behind them,
only spacings and sizes as they are usual for such data, drawn with a fixed seed, and the files say so.
``hippocampus`` has the spacings and sizes of the 24 training cases in ``demo/data``.

The tests import :func:`plan` and compare.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

FOLDER = Path(__file__).parent
PLANNED_WITH = "2.8"  # nnunetv2, major and minor version
INTENSITIES = {"max": 1.0, "mean": 0.5, "median": 0.5, "min": 0.0, "percentile_00_5": 0.0, "percentile_99_5": 1.0}


def synthetic(seed: int, n: int, spacing, spacing_range, shape, shape_range) -> dict[str, Any]:
    """Spacings (mm) and shapes (voxels) of ``n`` cases, uniform around their centres; axes as nnU-Net reads them."""
    random = np.random.default_rng(seed)
    spacings = np.array(spacing) * (1 + np.array(spacing_range) * random.uniform(-1, 1, (n, 3)))
    shapes = np.array(shape) * (1 + np.array(shape_range) * random.uniform(-1, 1, (n, 3)))
    return {
        "synthetic": "drawn by make.py, no images stand behind it",
        "spacings": spacings.round(3).tolist(),
        "shapes_after_crop": shapes.round().astype(int).tolist(),
    }


def of_demo(folder: Path) -> dict[str, Any]:
    """Spacings and shapes of the demo's training cases; nothing is cropped, as none has an empty border."""
    import SimpleITK as sitk

    images = [sitk.ReadImage(str(path)) for path in sorted(folder.glob("*.nii.gz"))]
    return {
        "source": "demo/data/hippocampus",
        "spacings": [list(image.GetSpacing()[::-1]) for image in images],
        "shapes_after_crop": [list(image.GetSize()[::-1]) for image in images],
    }


def dataset_json(channels: list[str], n_labels: int, file_ending: str = ".nii.gz", reader: str = "SimpleITKIO"):
    return {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"background": 0, **{f"label {i}": i for i in range(1, n_labels + 1)}},
        "file_ending": file_ending,
        "overwrite_image_reader_writer": reader,
    }


PNG = {"file_ending": ".png", "reader": "NaturalImage2DIO"}
FLAT = (999, 1, 1)
#: name -> (fingerprint's arguments, dataset.json, training cases)
FINGERPRINTS: dict[str, tuple[tuple, dict, int]] = {
    "ct_isotropic": ((1, 30, (1, 1, 1), (0.1,) * 3, (320, 360, 360), (0.2,) * 3), dataset_json(["CT"], 13), 30),
    "prostate_mri_anisotropic": (
        (2, 32, (3.6, 0.62, 0.62), (0, 0.1, 0.1), (20, 320, 320), (0.2, 0.1, 0.1)),
        dataset_json(["T2", "ADC"], 2),
        32,
    ),
    "hippocampus": ((), dataset_json(["MRI"], 2), 24),
    "microscopy_2d": (
        (4, 100, FLAT, (0, 0, 0), (1, 1024, 1360), (0, 0.1, 0.1)),
        dataset_json(["fluorescence", "phase contrast"], 3, ".tif", "NaturalImage2DIO"),
        100,
    ),
    "dermoscopy_rgb": (
        (5, 80, FLAT, (0, 0, 0), (1, 767, 1022), (0, 0.3, 0.3)),
        dataset_json(["rgb_to_0_1"] * 3, 1, **PNG),
        2000,
    ),
    "breast_ultrasound": (
        (6, 60, FLAT, (0, 0, 0), (1, 480, 560), (0, 0.2, 0.2)),
        dataset_json(["ultrasound"], 1, **PNG),
        452,
    ),
    "cardiac_mri_thick_slices": (
        (7, 50, (10, 1.5, 1.5), (0.2, 0.1, 0.1), (10, 224, 200), (0.2, 0.2, 0.2)),
        dataset_json(["cine MRI"], 3),
        100,
    ),
    "brain_mri_four_channels": (
        (8, 40, (1, 1, 1), (0, 0, 0), (140, 170, 137), (0.05,) * 3),
        dataset_json(["T1", "T1ce", "T2", "FLAIR"], 3),
        400,
    ),
}


def fingerprint(name: str, demo: Path | None = None) -> dict[str, Any]:
    """nnU-Net's ``dataset_fingerprint.json`` of one of ``FINGERPRINTS``; intensities do not change a plan."""
    arguments, description, _ = FINGERPRINTS[name]
    cases = synthetic(*arguments) if arguments else of_demo(demo)
    channels = range(len(description["channel_names"]))
    return {
        **cases,
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {str(i): {**INTENSITIES, "std": 0.2} for i in channels},
    }


def plan(fingerprint: dict[str, Any], dataset_json: dict[str, Any], name: str) -> dict[str, Any]:
    """What nnU-Net's ExperimentPlanner makes of a fingerprint, as it stands in nnUNetPlans.json.

    The planner builds every network that it considers to count its feature maps; here they are built without memory.
    """
    import torch

    module = "nnunetv2.experiment_planning.experiment_planners.default_experiment_planner"
    planner_module = import_module(module)
    with preprocessed_folder(fingerprint, dataset_json, name) as preprocessed:
        with contextlib.redirect_stdout(io.StringIO()), torch.device("meta"):
            planner_module.ExperimentPlanner(name).plan_experiment()
        return json.loads((preprocessed / "nnUNetPlans.json").read_text())


@contextlib.contextmanager
def preprocessed_folder(fingerprint: dict[str, Any], dataset_json: dict[str, Any], name: str) -> Iterator[Path]:
    """What planners find of a dataset, in nnU-Net's folders, which are those of the environment meanwhile."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
            (Path(temporary) / variable / name).mkdir(parents=True)
            stack.enter_context(mock.patch.dict(os.environ, {variable: str(Path(temporary) / variable)}))
        raw, preprocessed = (Path(temporary) / v / name for v in ("nnUNet_raw", "nnUNet_preprocessed"))
        for folder, ending in (("imagesTr", "_0000"), ("labelsTr", "")):
            (raw / folder).mkdir()
            (raw / folder / f"case{ending}{dataset_json['file_ending']}").touch()
        (raw / "dataset.json").write_text(json.dumps(dataset_json))
        (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        yield preprocessed


def main() -> None:
    for i, (name, (_, description, n_cases)) in enumerate(FINGERPRINTS.items(), start=1):
        folder = FOLDER / name
        folder.mkdir(exist_ok=True)
        files = {
            "fingerprint": fingerprint(name, FOLDER.parents[1] / "demo/data/hippocampus/imagesTr"),
            "dataset": {**description, "numTraining": n_cases},
        }
        files["nnUNetPlans"] = plan(files["fingerprint"], files["dataset"], f"Dataset{900 + i}_{name}")
        for stem, content in files.items():
            (folder / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        print(name, {c: v.get("patch_size") for c, v in files["nnUNetPlans"]["configurations"].items()})


if __name__ == "__main__":
    main()
