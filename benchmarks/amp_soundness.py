"""500 steps of the trainer under float16 autocast, on real MRI and ultrasound: does a number overflow?

    python benchmarks/amp_soundness.py [--ultrasound FOLDER] [--steps 500] [--eager]

MRI is the hippocampus set of the demo (3D, patches of 64x64x64, batch 2); ultrasound is a folder of flat images with
``images/*.png`` and ``masks/*.png`` of the same names, such as BUSI resized to 256x256 (2D, batch 16; left out without
the option). nnU-Net plans and preprocesses both, and nnUNetTrainerLGMSNet takes the first steps of its 500 epochs with
its own batches, augmentation, loss, optimiser and, on a GPU, CUDA graphs and gradient scaler. Without a GPU the script
rehearses, in float32 as nnU-Net does there.

Writes benchmarks/results/amp_soundness.json and exits with 1 if a loss or a weight was not finite, or if the scale
fell below ``SCALE_FLOOR``: a network that needs so small a scale trains on gradients that have lost their small ends.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from record import provenance, write
from tqdm import tqdm

from nnunet_lgms.graphs.update import MAX_GRADIENT_NORM
from nnunet_lgms.nnunet.trainer import nnUNetTrainerLGMSNet

ROOT = Path(__file__).resolve().parents[1]
SCALE_FLOOR = 256  # GradScaler begins at 65536 and halves at every overflow


class WatchedTrainer(nnUNetTrainerLGMSNet):
    """The trainer, which remembers gradient norms, scales and the largest logit."""

    def initialize(self):
        super().initialize()
        self.norms, self.scales, self.largest_logits = [], [], []
        self.network.register_forward_hook(self._look_at_logits)

    def _look_at_logits(self, network, inputs, output):
        self.largest_logits.append(output.detach().abs().amax().float())

    def _take_step(self, data, target):
        loss, norm = super()._take_step(data, target)
        self.norms.append(norm.item())
        self.scales.append(self.grad_scaler.get_scale() if self.grad_scaler is not None else None)
        return loss, norm


def copy_mri(source: Path, raw: Path) -> None:
    shutil.copytree(source, raw, ignore=shutil.ignore_patterns("README.md", "imagesTs", "labelsTs"))


def copy_ultrasound(source: Path, raw: Path) -> None:
    """nnU-Net's raw layout of images/ and masks/."""
    from PIL import Image

    for sub in ("imagesTr", "labelsTr"):
        (raw / sub).mkdir(parents=True)
    files = sorted((source / "images").glob("*.png"))
    for path in files:
        Image.open(path).convert("L").save(raw / "imagesTr" / f"{path.stem}_0000.png")
        mask = np.asarray(Image.open(source / "masks" / path.name).convert("L")) > 0
        Image.fromarray(mask.astype(np.uint8)).save(raw / "labelsTr" / path.name)
    labels = {"background": 0, "lesion": 1}
    description = {"channel_names": {"0": "ultrasound"}, "labels": labels, "numTraining": len(files)}
    (raw / "dataset.json").write_text(json.dumps({**description, "file_ending": ".png"}))


def make_trainer(number: int, configuration: str, patch: list[int], batch: int) -> WatchedTrainer:
    """Plans and preprocesses the dataset; the trainer of all its cases, with patches and batches of the given size."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    workers = min(8, os.cpu_count() or 1)
    extract_fingerprints([number], num_processes=workers)
    plan_experiments([number])
    preprocess([number], configurations=[configuration], num_processes=[workers], show_progress_bar=False)
    name = convert_id_to_dataset_name(number)
    plans = json.loads(Path(os.environ["nnUNet_preprocessed"], name, "nnUNetPlans.json").read_text())
    plans["configurations"][configuration] |= {"patch_size": patch, "batch_size": batch}
    description = json.loads(Path(os.environ["nnUNet_raw"], name, "dataset.json").read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["nnUNet_n_proc_DA"] = "0"  # batches are prepared in this process; nnU-Net cannot plan so
    return WatchedTrainer({**plans, "continue_training": False}, configuration, "all", description, device)


def train(trainer: WatchedTrainer, steps: int) -> dict:
    """All figures of the first steps of a training."""
    trainer.on_train_start()
    losses = []
    for step in tqdm(range(steps)):
        if step % trainer.num_iterations_per_epoch == 0:
            trainer.current_epoch = step // trainer.num_iterations_per_epoch
            trainer.on_train_epoch_start()
        losses.append(float(trainer.train_step(next(trainer.dataloader_train))["loss"]))
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(loader, "_finish"):
            loader._finish()
    norms, scales = trainer.norms, [scale for scale in trainer.scales if scale is not None]
    finite = [norm for norm in norms if np.isfinite(norm)]
    return {
        "cases": len(trainer.do_split()[0]),
        "input": [trainer.batch_size, trainer.num_input_channels, *trainer.configuration_manager.patch_size],
        "classes": trainer.label_manager.num_segmentation_heads,
        "dtype": "float16" if trainer.device.type == "cuda" else "float32",
        "cuda_graph": trainer._trains_on_graphs(),
        "update_recorded": trainer.recorded_update is not None,
        "steps": steps,
        "losses_not_finite": sum(not np.isfinite(loss) for loss in losses),
        "steps_left_out": len(norms) - len(finite),
        "weights_finite": all(bool(p.isfinite().all()) for p in trainer.network.parameters()),
        "smallest_scale": min(scales, default=None),
        "last_scale": scales[-1] if scales else None,
        "largest_gradient_norm": max(finite, default=None),
        "steps_clipped": sum(norm > MAX_GRADIENT_NORM for norm in finite),
        "largest_logit": max(map(float, trainer.largest_logits)),
        "losses": [round(loss, 5) if np.isfinite(loss) else None for loss in losses],
    }


def is_sound(result: dict) -> bool:
    """Nothing was lost, and the scaler stayed above its floor."""
    above = result["smallest_scale"] is None or result["smallest_scale"] >= SCALE_FLOOR
    return result["losses_not_finite"] == 0 and result["weights_finite"] and above


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mri", type=Path, default=ROOT / "demo/data/hippocampus", metavar="FOLDER")
    parser.add_argument("--ultrasound", type=Path, metavar="FOLDER", help="with images/ and masks/")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--patch", type=int, default=None, help="edge of all patches (3D: 64, 2D: 256)")
    parser.add_argument("--batch", type=int, default=None, help="batch of all (3D: 2, 2D: 16)")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks/results/amp_soundness.json")
    args = parser.parse_args()

    if args.eager:
        os.environ["nnUNet_compile"] = "f"
    trainings = {"mri": (copy_mri, args.mri, 801, "3d_fullres", [args.patch or 64] * 3, args.batch or 2)}
    if args.ultrasound:
        size = [args.patch or 256] * 2
        trainings["ultrasound"] = (copy_ultrasound, args.ultrasound, 802, "2d", size, args.batch or 16)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            os.environ[name] = str(Path(folder, name))
        for name, (copy, source, number, *plan) in trainings.items():
            copy(source, Path(folder, "nnUNet_raw", f"Dataset{number}_{name}"))
            results[name] = train(make_trainer(number, *plan), args.steps)
    content = {**provenance(), "scale_floor": SCALE_FLOOR, "rate": WatchedTrainer.initial_lr, "trainings": results}
    write(args.output.parent, args.output.stem, content)
    for name, result in results.items():
        print(name, "sound:" if is_sound(result) else "NOT SOUND:", {k: v for k, v in result.items() if k != "losses"})
    return int(not all(map(is_sound, results.values())))


if __name__ == "__main__":
    sys.exit(main())
