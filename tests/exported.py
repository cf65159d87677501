"""Model folders to export: a small network fitted to real hippocampus cases, and nnU-Net's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tiny_plans
import torch
import torch.nn.functional as F

HIPPOCAMPUS = "Dataset004_Hippocampus"
SPACING = [1.2, 1.0, 0.9]  # another than the images', so that everything is resampled
PATCH = [22, 32, 24]  # 11 at the lower level: attention pads it


def hippocampus_plans(patch_size=PATCH, **more) -> dict:
    """A plan of two stages for the demo's cases, LMS above GMS."""
    resampling = {
        f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")
    } | {
        f"resampling_fn_{what}_kwargs": {
            "is_seg": what == "seg",
            "order": order,
            "order_z": 0,
            "force_separate_z": None,
        }
        for what, order in (("data", 3), ("seg", 1), ("probabilities", 1))
    }
    configuration = tiny_plans.configuration(
        list(patch_size),
        strides=[[1, 1, 1], [2, 2, 2]],
        lgmsnet={"widths": [16, 32], "block_by_level": {"encoder": ["LMS", "GMS"]}},
        normalization_schemes=["ZScoreNormalization"],
        preprocessor_name="DefaultPreprocessor",
        **resampling,
        **more,
    )
    configuration["spacing"] = SPACING
    return tiny_plans.plans(**{"3d_fullres": configuration}) | {
        "dataset_name": HIPPOCAMPUS,
        "foreground_intensity_properties_per_channel": {"0": {}},
    }


def fit_hippocampus(results: Path, raw: Path, steps: int = 50) -> Path:
    """A model folder whose network has seen six cases for some steps: its labels are not noise."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_lgms.nnunet.builder import build_network

    plans, dataset_json = hippocampus_plans(), json.loads((raw / "dataset.json").read_text())
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = build_network(configuration, 1, 3, enable_deep_supervision=False)
    preprocessor = DefaultPreprocessor(verbose=False)
    cases = []
    for label in sorted((raw / "labelsTr").glob("*.nii.gz"))[:6]:
        image = raw / "imagesTr" / label.name.replace(".nii.gz", "_0000.nii.gz")
        data, target, _ = preprocessor.run_case([str(image)], str(label), manager, configuration, dataset_json)
        cases.append((torch.from_numpy(data), torch.from_numpy(target).long()))
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / steps)
        batch = [_patch(*cases[rng.integers(len(cases))], rng) for _ in range(2)]
        images, targets = (torch.stack(tensors) for tensors in zip(*batch))
        loss = F.cross_entropy(network(images), targets[:, 0].clamp(min=0), torch.tensor([0.3, 1.0, 1.0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return write_model(results, plans, dataset_json, network, "nnUNetTrainerLGMSNet", mirror_axes=(1,))


def _patch(image: torch.Tensor, target: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    room = [max(0, p - s) for p, s in zip(PATCH, image.shape[1:])]
    padding = [n for r in reversed(room) for n in (r // 2, r - r // 2)]
    image, target = F.pad(image, padding), F.pad(target, padding)
    start = [int(rng.integers(s - p + 1)) for s, p in zip(image.shape[1:], PATCH)]
    area = (slice(None), *(slice(s, s + p) for s, p in zip(start, PATCH)))
    return image[area], target[area]


def write_model(results: Path, plans: dict, dataset_json: dict, network, trainer: str, mirror_axes=()) -> Path:
    """What nnU-Net leaves behind a training."""
    (name,) = plans["configurations"]
    folder = results / plans["dataset_name"] / f"{trainer}__nnUNetPlans__{name}"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    checkpoint = {
        "trainer_name": trainer,
        "init_args": {"configuration": name},
        "inference_allowed_mirroring_axes": mirror_axes or None,
        "network_weights": network.state_dict(),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder
