"""A trained model's folder, as nnU-Net leaves it, with random weights; and a raw 2D dataset to predict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tiny_plans
import torch
from dataset_replicas import disc, grey, picture, save

TRAINER = "nnUNetTrainerLGMSNet"
LABELS = {"background": 0, "lesion": 1}


def dataset_json(labels: dict | None = None, n_channels: int = 1, n_cases: int = 4) -> dict:
    return {
        "channel_names": {str(i): "ultrasound" for i in range(n_channels)},
        "labels": labels or LABELS,
        "numTraining": n_cases,
        "file_ending": ".png",
        "overwrite_image_reader_writer": "NaturalImage2DIO",
    }


def raw_dataset(folder: Path, labels: dict | None = None, n_channels: int = 1, seeds=(1, 2, 3, 4)) -> Path:
    """`labelsTr` hold discs with the first foreground label, `imagesTr` brighter noise inside them."""
    values = [v for v in (labels or LABELS).values() if v]
    for seed in seeds:
        save(folder / f"imagesTr/case_{seed}_0000.png", picture(seed, n_channels))
        save(folder / f"labelsTr/case_{seed}.png", (grey(disc(seed)) // 255) * np.uint8(values[0]))
    (folder / "dataset.json").write_text(json.dumps(dataset_json(labels, n_channels, len(seeds))))
    return folder


def model_folder(results: Path, dataset: str, labels: dict | None = None, folds=(0,)) -> Path:
    """`results/DATASET/TRAINER__nnUNetPlans__2d` with a network of random weights in every fold."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_lgms.nnunet.builder import build_network

    resampling = {
        f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")
    } | {
        f"resampling_fn_{what}_kwargs": {"is_seg": what == "seg", "order": 1, "order_z": 0, "force_separate_z": None}
        for what in ("data", "seg", "probabilities")
    }
    configuration = tiny_plans.configuration([32, 32], normalization_schemes=["ZScoreNormalization"], **resampling)
    plans = tiny_plans.plans(**{"2d": configuration}) | {
        "dataset_name": dataset,
        "foreground_intensity_properties_per_channel": {"0": {}},
        "image_reader_writer": "NaturalImage2DIO",
    }
    content = dataset_json(labels)
    folder = results / dataset / f"{TRAINER}__nnUNetPlans__2d"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(content))
    manager = PlansManager(plans)
    n_heads = manager.get_label_manager(content).num_segmentation_heads
    for fold in folds:
        torch.manual_seed(int(fold))
        network = build_network(manager.get_configuration("2d"), 1, n_heads, enable_deep_supervision=False)
        (folder / f"fold_{fold}").mkdir()
        checkpoint = {
            "trainer_name": TRAINER,
            "init_args": {"configuration": "2d"},
            "inference_allowed_mirroring_axes": (0,),
            "network_weights": network.state_dict(),
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder
