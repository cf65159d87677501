"""How fast one process prepares batches: data loading must not be what a training waits for."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch

from .runs import STAGES, Run
from .training import make_trainer

BATCHES = 20


def measure_loading(work: Path) -> dict[str, dict]:
    """CPU seconds of a batch and of a pass over the training cases, on one core, for each augmentation."""
    os.environ["nnUNet_n_proc_DA"] = "0"
    torch.set_num_threads(1)
    rows = {}
    for stage in ("busi", "hippocampus"):
        for model in STAGES[stage].models:
            run = Run(stage, model, 1)
            if any(row["trainer"] == run.settings.trainer and row["stage"] == stage for row in rows.values()):
                continue
            trainer = make_trainer(run, work / "preprocessed", "cpu")
            trainer.initialize()
            loader, _ = trainer.get_dataloaders()
            seconds = []
            for _ in range(BATCHES):
                begin = time.process_time()
                next(loader)
                seconds.append(time.process_time() - begin)
            rows[run.name] = {
                "stage": stage,
                "trainer": run.settings.trainer,
                "batch_size": trainer.batch_size,
                "patch_size": list(trainer.configuration_manager.patch_size),
                "batch_s": statistics.mean(seconds),
                "epoch_s": statistics.mean(seconds) * trainer.num_iterations_per_epoch,
            }
    return rows
