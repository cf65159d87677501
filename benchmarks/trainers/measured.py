"""Trainers with a length and a seed from outside; they write down how long steps took (`ddp.py`, `waits.py`)."""

import json
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist

from nnunet_lgms.files import atomic_write
from nnunet_lgms.nnunet.trainer import nnUNetTrainerLGMSNet


class Measured:
    """MEASURED_EPOCHS epochs of MEASURED_ITERATIONS steps; MEASURED_STOP=n breaks off after epoch n.

    A step of validation and a checkpoint an epoch, unless MEASURED_LIKE_NNUNET=1 leaves both as nnU-Net has them.
    """

    def initialize(self):
        self.num_epochs = int(os.environ["MEASURED_EPOCHS"])
        self.num_iterations_per_epoch = int(os.environ["MEASURED_ITERATIONS"])
        if os.environ.get("MEASURED_LIKE_NNUNET") != "1":
            self.num_val_iterations_per_epoch = self.save_every = 1
        self.seconds, self.waiting, self.times = [], [], []  # of the steps of each epoch of this run
        self.validating = []  # seconds, of each epoch
        self._seed(0)  # every process begins with the same weights, as DDP would see to anyway
        super().initialize()

    def _seed(self, rank: int) -> None:
        seed = 1000 * int(os.environ.get("MEASURED_SEED", "0")) + rank
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def on_train_start(self):
        self._seed(1 + self.local_rank)  # no two processes draw the same samples
        super().on_train_start()

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.begin = self.end_of_step = self._now()
        self.waiting.append(0.0)
        self.times.append(time.time())

    def train_step(self, batch: dict) -> dict:
        self.waiting[-1] += time.perf_counter() - self.end_of_step  # for the batch
        result = super().train_step(batch)
        self.end_of_step = time.perf_counter()
        return result

    def on_train_epoch_end(self, train_outputs):
        self.seconds.append(self._now() - self.begin)
        super().on_train_epoch_end(train_outputs)

    def on_validation_epoch_start(self):
        self.begin_of_validation = self._now()
        super().on_validation_epoch_start()

    def on_validation_epoch_end(self, val_outputs):
        self.validating.append(self._now() - self.begin_of_validation)
        super().on_validation_epoch_end(val_outputs)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_epoch_end(self):
        super().on_epoch_end()
        if self.local_rank == 0:
            record = {
                "epochs_done": self.current_epoch,
                "seconds": self.seconds,
                "waiting": self.waiting,
                "validating": self.validating,
                "times": self.times,
                "losses": [float(x) for x in self.logger.get_value("train_losses", step=None)],
                "batch_size": self.configuration_manager.batch_size,
            }
            with atomic_write(Path(self.output_folder, "measured.json")) as temporary:
                temporary.write_text(json.dumps(record))
        if self.current_epoch == int(os.environ.get("MEASURED_STOP", "-1")):
            raise RuntimeError("stopped, as MEASURED_STOP says")  # a KeyboardInterrupt would end a rank with code 0

    def perform_actual_validation(self, save_probabilities: bool = False):
        if os.environ.get("MEASURED_VALIDATION") == "1":
            super().perform_actual_validation(save_probabilities)
        elif self.is_ddp:  # as nnU-Net's validation ends: a process that goes before an exchange is over may hang
            dist.barrier()


class nnUNetTrainerLGMSNet_measured(Measured, nnUNetTrainerLGMSNet):
    """The paper's recipe, measured."""


class nnUNetTrainer_measured(Measured, nnUNetTrainer):
    """nnU-Net's recipe, measured."""
