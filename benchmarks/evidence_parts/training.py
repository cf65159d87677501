"""One training through nnU-Net's own loop, stopped and continued at will, and the prediction of its cases.

The trainers are the plugin's and nnU-Net's as they are, so a model folder that comes out is predicted with by
``nnUNetv2_predict`` like any other. What differs from ``nnUNetv2_train``:

- an epoch has 100 steps in place of 250, with one batch of validation after it, uncompiled;
- no "best" checkpoint is kept, as only the last epoch is evaluated, and no progress plot is drawn;
- the weights are seeded. nnU-Net's worker processes draw their samples unseeded, and it offers no way to seed them, so
  a training does not repeat exactly.
"""

from __future__ import annotations

import json
import os
import random
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from record import provenance
from torch._dynamo import OptimizedModule
from tqdm import tqdm

from nnunet_lgms.checkpoint import read_checkpoint
from nnunet_lgms.files import atomic_write, read_json
from nnunet_lgms.nnunet.paper import nnUNetTrainerLGMSNet_paper2D

from .runs import Run, file_of

TRAINERS = Path(__file__).resolve().parents[2] / "trainers"
LATEST, FINAL, WEIGHTS = "checkpoint_latest.pth", "checkpoint_final.pth", "weights.pth"


class OutOfTime(Exception):
    """The training was put aside; the same call goes on with it."""


class Watch:
    """Sits in the hooks of a trainer: counts its seconds, stops it in time.

    Args:
        trainer: nnU-Net's, before its training starts.
        until: ``time.time()`` at which to stop.
        file: where progress is kept between calls.
    """

    def __init__(self, trainer, until: float, file: Path):
        self.trainer, self.until, self.file = trainer, until, file
        self.progress = {"epoch": 0, "steps_s": 0.0, "waiting_s": 0.0, "first_steps_s": []}
        if file.is_file():
            self.progress = read_json(file)
        self.compiled, self.last = False, 0.0
        self.original = {}
        for hook in ("on_train_epoch_start", "train_step", "validation_step", "on_epoch_end"):
            self.original[hook] = getattr(trainer, hook)
            setattr(trainer, hook, getattr(self, hook))

    def on_train_epoch_start(self) -> None:
        self.original["on_train_epoch_start"]()
        self.trainer.logger.plot_progress_png = lambda folder: None  # once the trainer has set its own
        self.last = time.perf_counter()

    def train_step(self, batch: dict) -> dict:
        begin = time.perf_counter()
        result = self.original["train_step"](batch)
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()
        end = time.perf_counter()
        if not self.compiled:
            self.progress["first_steps_s"].append(end - begin)
            self.compiled = True
        else:
            self.progress["waiting_s"] += begin - self.last
            self.progress["steps_s"] += end - begin
        self.last = end
        return result

    def validation_step(self, batch: dict) -> dict:
        with torch.compiler.set_stance("force_eager"):  # compiling it as well is not worth one batch an epoch
            return self.original["validation_step"](batch)

    def on_epoch_end(self) -> None:
        self.original["on_epoch_end"]()
        trainer = self.trainer
        self.progress |= {"epoch": trainer.current_epoch, "epochs": trainer.num_epochs}
        self.progress["loss"] = float(trainer.logger.get_value("train_losses", step=-1))
        out_of_time = time.time() > self.until and trainer.current_epoch < trainer.num_epochs
        if out_of_time:
            trainer.current_epoch -= 1  # save_checkpoint adds one
            trainer.save_checkpoint(str(Path(trainer.output_folder, LATEST)))
        with atomic_write(self.file) as temporary:
            temporary.write_text(json.dumps(self.progress))
        if out_of_time:
            raise OutOfTime


def make_trainer(run: Run, preprocessed: Path, device: str, continued: bool = False):
    """The trainer of a run, seeded, with its schedule, not yet initialized."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(run.seed)
    os.environ["nnUNet_extTrainer"] = str(TRAINERS)  # the plugin is not installed where there is only a checkout
    cls = recursive_find_trainer_class_by_name(run.settings.trainer)
    folder = preprocessed / run.of.name
    plans = read_json(folder / f"{run.settings.plans_name}.json") | {"continue_training": continued}
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
    """Trains, or goes on where it stopped, then predicts; writes ``work/runs/NAME``.

    Raises:
        OutOfTime: the training was put aside.
    """
    folder, preprocessed = work / "runs" / run.name, work / "preprocessed"
    folder.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = device == "cuda"
    found = [p for name in (FINAL, LATEST) for p in (work / "results" / run.name).glob(f"*/*/fold_{run.fold}/{name}")]
    trainer = make_trainer(run, preprocessed, device, continued=bool(found))
    trainer.initialize()
    watch = Watch(trainer, until, folder / "progress.json")
    if found:
        trainer.load_checkpoint(str(found[0]))
    if not (found and found[0].name == FINAL):
        try:
            trainer.run_training()
        except OutOfTime:
            for loader in (trainer.dataloader_train, trainer.dataloader_val):
                if hasattr(loader, "_finish"):
                    loader._finish()
            raise
    curve = {key: [_short(v) for v in trainer.logger.get_value(key, step=None)] for key in CURVES}
    begins, ends = (trainer.logger.get_value(f"epoch_{k}_timestamps", step=None) for k in ("start", "end"))
    record = {
        "run": run.as_dict(),
        "title": run.settings.title,
        "trainer": run.settings.trainer,
        "plans": run.settings.plans_name,
        "dataset": run.of.name,
        "configuration": run.of.configuration,
        "fold": run.fold,
        "batch_size": trainer.configuration_manager.batch_size,
        "batch_dice": trainer.configuration_manager.batch_dice,
        "patch_size": list(trainer.configuration_manager.patch_size),
        "iterations_per_epoch": trainer.num_iterations_per_epoch,
        "iterations": run.epochs * trainer.num_iterations_per_epoch,
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "workers": run.settings.workers,
        "autocast": "float16" if device == "cuda" else None,
        "compiled": isinstance(trainer.network, OptimizedModule),
        "cuda_graphs": hasattr(trainer, "_trains_on_graphs") and trainer._trains_on_graphs(),
        "cases": dict(zip(("training", "validation"), map(len, trainer.do_split()))),
        "step_ms_alone": None,  # trainings share the GPU: `gpu.py` measures steps
        "waiting_for_batches": watch.progress["waiting_s"]
        / max(1e-9, watch.progress["waiting_s"] + watch.progress["steps_s"]),
        "first_steps_s": watch.progress["first_steps_s"],
        "seconds": sum(e - b for b, e in zip(begins, ends)),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        **curve,
        **provenance(device),
    }
    with atomic_write(folder / "record.json") as temporary:
        temporary.write_text(json.dumps(record) + "\n")
    _write_weights(Path(trainer.output_folder))
    predict_all(trainer, run, preprocessed, folder, device)


CURVES = ("train_losses", "val_losses", "mean_fg_dice")


def _short(number: float) -> float | None:
    return round(float(number), 5) if np.isfinite(number) else None


def _write_weights(folder: Path) -> None:
    """The last checkpoint without what only training needs."""
    checkpoint = read_checkpoint(folder / FINAL)
    with atomic_write(folder / WEIGHTS) as temporary:
        torch.save(checkpoint | {"optimizer_state": {}, "grad_scaler_state": None}, temporary)


def predict_all(trainer, run: Run, preprocessed: Path, folder: Path, device: str) -> None:
    """Labels of the validation cases and of the unseen datasets, with and without nnU-Net's mirroring, as .npz."""
    identifier = trainer.configuration_manager.data_identifier
    if isinstance(trainer.network, OptimizedModule):
        trainer.network = trainer.network._orig_mod
    trainer.set_deep_supervision_enabled(False)
    for name, mirrored in run.predictions:
        file = folder / file_of(name, mirrored)
        if file.is_file():
            continue
        if name == "validation":
            source, cases = Path(trainer.preprocessed_dataset_folder), trainer.do_split()[1]
        else:
            source = preprocessed / name / identifier
            cases = trainer.dataset_class.get_identifiers(str(source))
        labels = dict(_predict(trainer, source, sorted(cases), mirrored, device))
        with atomic_write(file) as temporary:
            np.savez_compressed(temporary, **labels)


def _predict(trainer, source: Path, cases: list[str], mirrored: bool, device: str):
    """Case and labels (Z, Y, X) on the grid of the image, by nnU-Net's own predictor."""
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        use_mirroring=mirrored,
        perform_everything_on_device=device == "cuda",
        device=torch.device(device),
        allow_tqdm=False,
    )
    managers = trainer.plans_manager, trainer.configuration_manager
    about = trainer.dataset_json, type(trainer).__name__, trainer.inference_allowed_mirroring_axes
    predictor.manual_initialization(trainer.network, *managers, None, *about)
    dataset = trainer.dataset_class(str(source), list(cases))
    to_labels = partial(convert_predicted_logits_to_segmentation_with_correct_shape, num_threads_torch=1)
    for case in tqdm(cases, desc=f"{source.parent.name}, {'mirrored' if mirrored else 'plain'}"):
        image, _, _, properties = dataset.load_case(case)
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image[:])).cpu()
        yield case, to_labels(logits, *managers, trainer.label_manager, properties).astype(np.uint8)
