"""A trainer as after ``initialize`` but without a preprocessed dataset, and a batch of its own transforms."""

from __future__ import annotations

import runpy

import torch
from conftest import ROOT
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_plans import configuration, dataset_json, plans

from nnunet_lgms.nnunet import paper, smoke
from nnunet_lgms.nnunet import trainer as trainers

EPOCHS = (5, 50, 100, 250, 1000)
IN_TRAINERS = ["nnUNetTrainerLGMSNet", "nnUNetTrainerLGMSNet_nnUNetDA", "nnUNetTrainerLGMSNet_smoke"]
IN_TRAINERS += [f"nnUNetTrainerLGMSNet_{n}epochs" for n in EPOCHS]
IN_TRAINERS += ["nnUNetTrainerLGMSNet_paper2D", "nnUNetTrainerLGMSNet_paper3D"]
TRAINERS = {n: getattr(trainers, n, None) or getattr(smoke, n, None) or getattr(paper, n) for n in IN_TRAINERS}
TRAINERS["nnUNetTrainerLGMSNet_demo"] = runpy.run_path(ROOT / "demo" / "trainers" / "demo.py")[
    "nnUNetTrainerLGMSNet_demo"
]
NAMES = list(TRAINERS)


def make_trainer(name="nnUNetTrainerLGMSNet", labels=None, *, patch_size=(8, 12, 8), **more) -> nnUNetTrainer:
    """A trainer with network, optimiser and loss, as after ``initialize`` but without a preprocessed dataset."""
    trainer = TRAINERS[name](
        plans(only=configuration(list(patch_size), **more)), "only", 0, dataset_json(labels), torch.device("cpu")
    )
    trainer._set_batch_size_and_oversample()
    trainer.network = trainer.build_network_architecture(
        trainer.plans_manager,
        trainer.configuration_manager,
        1,
        trainer.label_manager.num_segmentation_heads,
        trainer.enable_deep_supervision,
    )
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    trainer.loss = trainer._build_loss()
    return trainer


def make_batch(trainer: nnUNetTrainer) -> dict:
    """One random batch that went through the trainer's own transforms."""
    patch = trainer.configuration_manager.patch_size
    generator = torch.Generator().manual_seed(0)
    rotation, dummy_2d, taken, mirror = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    labels = trainer.label_manager
    transform = trainer.get_training_transforms(
        patch,
        rotation,
        trainer._get_deep_supervision_scales(),
        mirror,
        dummy_2d,
        use_mask_for_norm=[False],
        foreground_labels=labels.foreground_labels,
        regions=labels.foreground_regions if labels.has_regions else None,
        ignore_label=labels.ignore_label,
    )
    samples = [
        transform(
            image=torch.randn(1, *taken, generator=generator),
            segmentation=torch.randint(-1, max(labels.all_labels) + 1, (1, *taken), generator=generator).short(),
        )
        for _ in range(trainer.batch_size)
    ]
    targets = [sample["segmentation"] for sample in samples]
    if isinstance(targets[0], list):
        target = [torch.stack(level) for level in zip(*targets, strict=True)]
    else:
        target = torch.stack(targets)
    return {"data": torch.stack([sample["image"] for sample in samples]), "target": target}
