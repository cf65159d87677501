"""A data set is planned for LGMSNet: fingerprint, plans, and the file that holds them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset

from nnunet_lgms.dataset_json import n_channels, read_dataset_json
from nnunet_lgms.files import read_json
from nnunet_lgms.nnunet_folders import dataset_number, nnunet_folder
from nnunet_lgms.parallel import default_workers
from nnunet_lgms.planning.auto_kernels import components_of
from nnunet_lgms.planning.planner import LGMSNetPlanner
from nnunet_lgms.planning.plans_files import check_writable, plans_file, plans_lock


def plan_dataset(
    dataset: str, vram: float, settings: Mapping[str, Any], name: str, *, force: bool = False, wait: bool = False
) -> tuple[LGMSNetPlanner, dict[str, Any], Path]:
    """Plans patch and batch of a data set, and writes the plans.

    Args:
        dataset: nnU-Net's name of it.
        vram: memory of the card in GiB.
        settings: LGMSNet's, as under the key ``"lgmsnet"``.
        name: of the plans.
        force: replace plans of that name.
        wait: let another one that makes the same plans end first, instead of refusing.

    Returns:
        The planner, the plans, and their file.

    Raises:
        ValueError: the data set is not there or not whole, the plans may not be written, or nothing fits the card.
    """
    raw, preprocessed = (nnunet_folder(f"nnUNet_{kind}") / dataset for kind in ("raw", "preprocessed"))
    if not (raw / "dataset.json").is_file():
        raise ValueError(
            f"{dataset} is not in nnUNet_raw, where planning reads it: put it there or correct nnUNet_raw."
        )
    description = read_dataset_json(raw)
    n_channels(description)
    if not isinstance(description.get("numTraining"), int):
        raise ValueError(f"dataset.json of {dataset} has no numTraining, the number of training cases: add it.")
    target = plans_file(dataset, name)
    with plans_lock(target, wait=wait):
        check_writable(target, force)
        if not (preprocessed / "dataset_fingerprint.json").is_file():
            extract_fingerprint_dataset(dataset_number(dataset), num_processes=default_workers(), clean=False)
        _check_fingerprint(preprocessed / "dataset_fingerprint.json")
        with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net prints every configuration as one long line
            planner = LGMSNetPlanner(dataset, vram, settings, name)
            reader = {
                "image_reader_writer": planner.determine_reader_writer().__name__,
                "label_manager": "LabelManager",
                "transpose_forward": [int(i) for i in planner.determine_transpose()[0]],
            }
            planner.measure = lambda: components_of(dataset, reader)
            plans = planner.plan_experiment()
    return planner, plans, target


def _check_fingerprint(path: Path) -> None:
    """nnU-Net's fingerprint has what planning reads; a killed extraction leaves half of it."""
    needed = {"spacings", "shapes_after_crop", "median_relative_size_after_cropping"}
    needed.add("foreground_intensity_properties_per_channel")
    try:
        content = read_json(path)
    except ValueError:
        content = None
    if not isinstance(content, dict) or needed - content.keys() or not content["spacings"]:
        raise ValueError(f"{path} is no whole fingerprint of nnU-Net's: remove it, and it is extracted again.")
