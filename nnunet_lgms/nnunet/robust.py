"""A trainer of nnU-Net's that looks before the first step, and whose processes end with it."""

import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import distributed as dist

from nnunet_lgms.files import one_line
from nnunet_lgms.nnunet.checks import (
    check_cases,
    check_images,
    check_preprocessed,
    check_references,
    check_room,
    check_shared_memory,
)
from nnunet_lgms.nnunet.errors import TrainingError, said_in_one_sentence
from nnunet_lgms.nnunet.own_folder import OwnFolderTrainer
from nnunet_lgms.nnunet.workers import PROCESS_ENDED, SharedDataset, end_if_one_ends, end_with_parent
from nnunet_lgms.nnunet_folders import dataset_number

# bytes of a disk that a file has just not found room on
NO_ROOM_LEFT = 2**20


class RobustTrainer(OwnFolderTrainer):
    """nnU-Net's trainer, whatever it trains, with what a long training needs.

    What is wrong with the plans, the preprocessed data or the disk is said in one sentence before the first step where
    that is cheap to see (:class:`TrainingError`), and of batches in the step that meets it.

    Numbers of a recipe may be class attributes: nnU-Net's defaults do not replace them.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature, to the letter
    ):
        try:
            super().__init__(plans, configuration, fold, dataset_json, device)
        except OSError as error:
            raise TrainingError(f"nnUNet_results cannot be written: {error}; set it to another folder.") from error
        for name in [name for name in vars(self) if hasattr(type(self), name)]:
            delattr(self, name)
        self.training_ended = threading.Event()
        self.training_ended.set()  # it has not begun

    def initialize(self):
        with said_in_one_sentence():
            check_preprocessed(Path(self.preprocessed_dataset_folder), self._preprocessing())
        if self.is_ddp:
            end_with_parent(os.getpid())
        super().initialize()

    def _preprocessing(self) -> str:
        """The command that makes this configuration's data."""
        number = dataset_number(self.plans_manager.dataset_name)
        return (
            f"nnUNetv2_preprocess -d {number} -plans_name {self.plans_manager.plans_name} -c {self.configuration_name}"
        )

    def do_split(self):
        """The cases of training and validation, as nnU-Net splits them, after a look at their files.

        Of several processes the first makes the split, the others read it.
        """
        if self.is_ddp and self.local_rank != 0:
            dist.barrier()
        cases = self._split_checked()
        if self.is_ddp and self.local_rank == 0:
            dist.barrier()
        return cases

    def _split_checked(self):
        base, folder = Path(self.preprocessed_dataset_folder_base), Path(self.preprocessed_dataset_folder)
        references, ending = base / "gt_segmentations", self.dataset_json["file_ending"]
        splits, again = base / "splits_final.json", self._preprocessing()
        with said_in_one_sentence():
            if self.fold == "all" or not splits.is_file():
                # nnU-Net takes the files in the folder for all there are, and splits those once and for all
                check_cases(folder, [file.name[: -len(ending)] for file in references.glob(f"*{ending}")], again)
            try:
                training, validation = super().do_split()
            except ValueError as error:
                raise ValueError(
                    f"{splits} cannot be read ({error}): remove it, and nnU-Net writes its own again."
                    if splits.is_file()
                    else f"nnU-Net cannot make five folds ({error}): train fold all, or write {splits} yourself."
                ) from error
            except OSError as error:
                raise ValueError(
                    f"{splits} cannot be read or written ({error.strerror}): make it readable or, where nnU-Net has "
                    "yet to write it, its folder writable."
                ) from error
            previous = self.folder_with_segs_from_previous_stage
            check_cases(
                folder,
                {*training, *validation},
                again,
                Path(previous) if previous else None,
                self.configuration_manager.previous_stage_name or "",
            )
            check_references(references, validation, ending, again)
        return training, validation

    def get_tr_and_val_datasets(self):
        """As nnU-Net's; the processes that load from them end with this one."""
        return tuple(SharedDataset(dataset) for dataset in super().get_tr_and_val_datasets())

    def get_dataloaders(self):
        if n_processes := get_allowed_n_proc_DA():
            # those in the making and those that wait, for training and for validation
            batches = n_processes + max(6, n_processes // 2) + max(1, n_processes // 2) + max(3, n_processes // 4)
            voxels = self.batch_size * int(np.prod(self.configuration_manager.patch_size))
            with said_in_one_sentence():
                check_shared_memory(batches * voxels * (4 * self.num_input_channels + 2))  # float32, and int16 labels
        before = multiprocessing.active_children()
        loaders = super().get_dataloaders()
        workers = [process for process in multiprocessing.active_children() if process not in before]
        if workers:
            end_if_one_ends(workers, self.training_ended)
        return loaders

    def run_training(self):
        """As nnU-Net's.

        Raises:
            TrainingError: a process that prepares batches was killed or failed, or the GPU has not enough memory.
        """
        self.training_ended.clear()
        try:
            super().run_training()
        except torch.OutOfMemoryError as error:
            self._end_loaders()
            raise TrainingError(self._said_of_memory(error)) from error
        except RuntimeError as error:
            if "no longer alive" not in str(error):
                raise
            self._end_loaders()
            raise TrainingError(PROCESS_ENDED) from error
        finally:
            self.training_ended.set()

    def _end_loaders(self):
        """As on_train_end does; cut off, they print a traceback after the sentence."""
        for loader in (self.dataloader_train, self.dataloader_val):
            if hasattr(loader, "_finish"):
                loader._finish()

    def _said_of_memory(self, error: RuntimeError) -> str:
        planned, plans = self.configuration_manager, self.plans_manager
        patch, batch = map(str, planned.patch_size), max(1, planned.batch_size // 2)
        override = f"nnunet_lgms override {dataset_number(plans.dataset_name)} --plans {plans.plans_name}"
        return (
            f"The GPU has not enough memory for {self.batch_size} patches of {'x'.join(map(str, planned.patch_size))} "
            f"({one_line(error)}): end other programs on it, or train with plans of a smaller batch or patch, such as "
            f"{override} --batch-size {batch} --patch-size {' '.join(patch)} -c {self.configuration_name}"
        )

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()
        if self.local_rank == 0:
            weights = sum(p.numel() * p.element_size() for p in self.network.parameters())
            with said_in_one_sentence():
                # weights and momentum; the best, the latest, and one that is being written
                check_room(Path(self.output_folder), 2 * 3 * weights)
        super().on_train_start()

    def validation_step(self, batch: dict) -> dict:
        """As nnU-Net's.

        Raises:
            TrainingError: images hold NaN or infinity; every label would be background.
        """
        result = super().validation_step(batch)
        if not np.isfinite(result["loss"]):
            with said_in_one_sentence():
                check_images(batch)
        return result

    def perform_actual_validation(self, save_probabilities: bool = False):
        if self.is_ddp:
            # A process that has no case to predict makes no forward pass, so there is nothing to wait for in one.
            self.network.broadcast_buffers = False
        try:
            super().perform_actual_validation(save_probabilities)
        except (OSError, RuntimeError) as error:  # SimpleITK leaves out what does not fit, and fails to read it again
            folder = Path(self.output_folder) / "validation"
            if not folder.is_dir() or shutil.disk_usage(folder).free > NO_ROOM_LEFT:
                raise
            raise TrainingError(
                f"{folder} has no room left; the training is done and its weights are whole: make room, then repeat "
                "the validation with --val."
            ) from error
