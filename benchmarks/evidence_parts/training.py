"""One training through nnU-Net's own loop, stopped and continued at will, and the prediction of its cases.

The trainers are the plugin's and nnU-Net's as they are, so a model folder that comes out is predicted with by
``nnUNetv2_predict`` like any other. What differs from ``nnUNetv2_train`` is in docs/explanation/evidence.md.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import provenance
from torch._dynamo import OptimizedModule
from tqdm import tqdm

from nnunet_lgms.files import atomic_write, read_json
from nnunet_lgms.nnunet.paper import nnUNetTrainerLGMSNet_paper2D

from .runs import Run
from .sets import SETS

TRAINERS = Path(__file__).resolve().parents[2] / "trainers"
LATEST, FINAL = "checkpoint_latest.pth", "checkpoint_final.pth"
CURVES = ("train_losses", "val_losses", "mean_fg_dice")


class OutOfTime(Exception):
    """The training was put aside; the same call goes on with it."""


class Watched:
    """Put before a trainer's class: counts its seconds, and stops it in time."""

    until: float  # ``time.time()`` at which to stop
    file: Path  # where progress is kept between calls
    progress: dict[str, Any]  # the first step of each call, which compiles or records, is not in its seconds
    last: float | None = None  # end of the last step

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.logger.plot_progress_png = lambda folder: None  # once the trainer has set its own
        if self.last is not None:
            self.last = time.perf_counter()

    def train_step(self, batch: dict) -> dict:
        begin = time.perf_counter()
        result = super().train_step(batch)
        end = time.perf_counter()
        if self.last is not None:
            self.progress["waiting_s"] += begin - self.last
            self.progress["steps_s"] += end - begin
        self.last = end
        return result

    def validation_step(self, batch: dict) -> dict:
        with torch.compiler.set_stance("force_eager"):  # compiling it as well is not worth one batch an epoch
            return super().validation_step(batch)

    def on_epoch_end(self):
        super().on_epoch_end()
        self.progress |= {"epoch": self.current_epoch, "epochs": self.num_epochs}
        self.progress["loss"] = float(self.logger.get_value("train_losses", step=-1))
        self.progress["steps_left_out"] += getattr(self, "steps_left_out", 0)
        if self.device.type == "cuda":
            self.progress["smallest_scale"] = min(self.progress["smallest_scale"], self.grad_scaler.get_scale())
            self.progress["peak_gib"] = max(self.progress["peak_gib"], torch.cuda.max_memory_allocated() / 2**30)
        with atomic_write(self.file) as temporary:
            temporary.write_text(json.dumps(self.progress))
        if time.time() > self.until and self.current_epoch < self.num_epochs:
            self.current_epoch -= 1  # save_checkpoint adds one
            self.save_checkpoint(str(Path(self.output_folder, LATEST)))
            raise OutOfTime


def make_trainer(run: Run, preprocessed: Path, device: str, continued: bool):
    """The trainer of a run, seeded, watched, with its schedule, not yet initialized."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(run.seed)
    os.environ["nnUNet_extTrainer"] = str(TRAINERS)  # the plugin is not installed where there is only a checkout
    cls = recursive_find_trainer_class_by_name(run.settings.trainer)
    cls = type(cls.__name__, (Watched, cls), {})
    folder = preprocessed / run.of.name
    plans = read_json(folder / f"{run.settings.plans}.json") | {"continue_training": continued}
    trainer = cls(plans, run.of.configuration, run.fold, read_json(folder / "dataset.json"), torch.device(device))
    trainer.num_epochs = run.epochs
    trainer.num_iterations_per_epoch = run.iterations
    trainer.num_val_iterations_per_epoch = 1
    if isinstance(trainer, nnUNetTrainerLGMSNet_paper2D):  # its epochs are passes, set when it gets the data
        trainer.get_tr_and_val_datasets = super(nnUNetTrainerLGMSNet_paper2D, trainer).get_tr_and_val_datasets
    trainer.save_every = run.epochs + 1
    trainer._best_ema = float("inf")
    return trainer


def train_run(run: Run, work: Path, device: str, until: float) -> None:
    """Trains, or goes on where it stopped, then predicts; writes ``work/runs/NAME``, the record last.

    Raises:
        OutOfTime: the training was put aside.
    """
    folder, preprocessed = work / "runs" / run.name, work / "preprocessed"
    folder.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = device == "cuda"
    found = [p for name in (FINAL, LATEST) for p in (work / "results" / run.name).glob(f"*/*/fold_{run.fold}/{name}")]
    trainer = make_trainer(run, preprocessed, device, continued=bool(found))
    trainer.until, trainer.file = until, folder / "progress.json"
    trainer.progress = {
        "steps_s": 0.0,
        "waiting_s": 0.0,
        "peak_gib": 0.0,
        "steps_left_out": 0,
        "smallest_scale": 2.0**16,
    }
    trainer.initialize()
    if found:
        trainer.progress = read_json(trainer.file)
        trainer.load_checkpoint(str(found[0]))
    if not (found and found[0].name == FINAL):
        trainer.run_training()
    record = record_of(run, trainer, device)
    predict_all(trainer, run, preprocessed, folder, device)
    with atomic_write(folder / "record.json") as temporary:
        temporary.write_text(json.dumps(record) + "\n")


def record_of(run: Run, trainer, device: str) -> dict[str, Any]:
    """What a finished training was, took and came to."""
    configuration, progress = trainer.configuration_manager, trainer.progress
    begins, ends = (trainer.logger.get_value(f"epoch_{k}_timestamps", step=None) for k in ("start", "end"))
    return {
        "run": asdict(run),
        **asdict(run.settings),
        "dataset": run.of.name,
        "configuration": run.of.configuration,
        "fold": run.fold,
        "batch_size": configuration.batch_size,
        "batch_dice": configuration.batch_dice,
        "patch_size": list(configuration.patch_size),
        "iterations_per_epoch": trainer.num_iterations_per_epoch,
        "iterations": run.epochs * trainer.num_iterations_per_epoch,
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "compiled": isinstance(trainer.network, OptimizedModule),
        "cases": dict(zip(("training", "validation"), map(len, trainer.do_split()))),
        "waiting_for_batches": progress["waiting_s"] / max(1e-9, progress["waiting_s"] + progress["steps_s"]),
        "seconds": sum(e - b for b, e in zip(begins, ends)),
        **{key: progress[key] for key in ("peak_gib", "steps_left_out", "smallest_scale")},
        **{key: list(map(_short, trainer.logger.get_value(key, step=None))) for key in CURVES},
        **provenance(device),
    }


def _short(number: float) -> float | None:
    return round(float(number), 5) if np.isfinite(number) else None


def predict_all(trainer, run: Run, preprocessed: Path, folder: Path, device: str) -> None:
    """Labels of the validation cases and of the unseen sets, with and without nnU-Net's mirroring, as .npz."""
    if isinstance(trainer.network, OptimizedModule):
        trainer.network = trainer.network._orig_mod
    trainer.set_deep_supervision_enabled(False)
    identifier = trainer.configuration_manager.data_identifier
    sources = {"validation": (Path(trainer.preprocessed_dataset_folder), trainer.do_split()[1])}
    for row in (SETS[name] for name in run.of.unseen):
        source = preprocessed / row.name / identifier
        sources[row.name] = source, trainer.dataset_class.get_identifiers(str(source))
    for mirrored in (False, True):
        for name, (source, cases) in sources.items():
            file = folder / f"{name}{'-mirrored' if mirrored else ''}.npz"
            if not file.is_file():  # from a call that was stopped while it predicted
                labels = dict(predict(trainer, source, sorted(cases), mirrored, device))
                with atomic_write(file) as temporary:
                    np.savez_compressed(temporary, **labels)


def predict(trainer, source: Path, cases: list[str], mirrored: bool, device: str) -> Iterator[tuple[str, np.ndarray]]:
    """Case and labels (Z, Y, X) on the grid of the image, by nnU-Net's own predictor."""
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    on_gpu = device == "cuda"
    predictor = nnUNetPredictor(
        use_mirroring=mirrored, perform_everything_on_device=on_gpu, device=torch.device(device), allow_tqdm=False
    )
    managers = trainer.plans_manager, trainer.configuration_manager
    about = trainer.dataset_json, type(trainer).__name__, trainer.inference_allowed_mirroring_axes
    predictor.manual_initialization(trainer.network, *managers, None, *about)
    dataset = trainer.dataset_class(str(source), cases)
    for case in tqdm(cases, desc=f"{source.parent.name}, {'mirrored' if mirrored else 'plain'}"):
        image, _, _, properties = dataset.load_case(case)
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image[:])).cpu()
        labels = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, *managers, trainer.label_manager, properties, num_threads_torch=1
        )
        yield case, labels.astype(np.uint8)
