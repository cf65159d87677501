"""nnU-Net trainers of LGMSNet (arXiv 2508.15476): the paper's recipe on nnU-Net's planned patches.

nnU-Net finds them through ``trainers/``, which only imports them: the modules of a trainer folder are dropped from
``sys.modules`` after the search, and compilation and pickling need theirs to stay.
"""

import multiprocessing
import os
import shutil
import threading
from collections import deque
from pathlib import Path

import numpy as np
import torch
from batchgeneratorsv2.helpers.scalar_type import RandomScalar
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed as dist
from torch import nn

from nnunet_lgms.checkpoint import read_checkpoint
from nnunet_lgms.config import settings_of
from nnunet_lgms.files import atomic_write, one_line
from nnunet_lgms.graphs.ahead import LossOfAStep, StepResult, copied_ahead
from nnunet_lgms.graphs.data_parallel import GraphedDataParallel
from nnunet_lgms.graphs.optimizer import FusedSGD
from nnunet_lgms.graphs.step import record_step, training_step
from nnunet_lgms.graphs.update import RecordedUpdate
from nnunet_lgms.nnunet.augmentation import rotation_axes, rotations_and_flips
from nnunet_lgms.nnunet.builder import build_network
from nnunet_lgms.nnunet.checks import check_cases, check_images, check_preprocessed, check_references, check_room
from nnunet_lgms.nnunet.errors import TrainingError, said_in_one_sentence
from nnunet_lgms.nnunet.loss import cross_entropy_and_dice, deep_supervision_weights
from nnunet_lgms.nnunet.workers import PROCESS_ENDED, SharedDataset, end_if_one_ends, end_with_parent
from nnunet_lgms.ops.backend import use_kernels

# A step that a precision cannot hold is nothing unusual, and it is left out; this many in a row are the end.
MAX_STEPS_LEFT_OUT = 20
# bytes of a disk that a file has just not found room on
NO_ROOM_LEFT = 2**20


class nnUNetTrainerLGMSNet(nnUNetTrainer):
    """LGMSNet with the paper's recipe (section 4.1 and the released 2D script).

    - 500 epochs (of nnU-Net's 250 iterations), SGD with momentum 0.9 and weight decay 1e-4.
    - Learning rate 0.02, polynomial decay with power 0.9, stepped every iteration as in the paper's script. nnU-Net
      steps its scheduler once an epoch; here every training step first sets the rate of its own fraction of the epoch,
      so the rate depends on epoch and iteration alone and a continued training goes on where it stopped. nnU-Net's log
      and progress plot show each epoch's first rate.
    - 0.5 * BCE + Dice for regions, 0.5 * CE + Dice for labels, smoothing 1e-5.
    - Rotation by 90 degrees where the patch allows it, flips, nothing else.
    - Gradients are clipped at norm 12, as in every nnU-Net trainer.

    The rate of 0.02 is as published because it was stable where it was tried: 250 steps at the full rate on the demo's
    hippocampus set, 2D (bfloat16 autocast) and 3D with five stages (float32), gave gradient norms of 1 to 7, so nothing
    was clipped, and no activation above 38, where float16 ends at 65504. 500 steps under float16 on an H100, on MRI and
    on ultrasound, skipped none and left the gradient scaler where it began (benchmarks/results/amp_soundness.json).

    Patch and batch size, foreground oversampling and the choice between Dice per batch or per sample are the plan's.
    The published network has no deep supervision, so it is off; ``{"lgmsnet": {"deep_supervision": true}}`` in the
    plan's configuration turns it on, with nnU-Net's weights.

    Checkpoints appear whole or not at all, so a training that is killed at any moment goes on with ``--c``. What is
    wrong with the plans, the preprocessed data or the disk is said in one sentence before the first step where that is
    cheap to see (:class:`TrainingError`).
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
        self.num_epochs = 500
        self.initial_lr = 0.02
        self.momentum = 0.9
        self.weight_decay = 1e-4
        with said_in_one_sentence():
            self.enable_deep_supervision = settings_of(self.configuration_manager).deep_supervision
        self.iteration = 0  # within the epoch
        self.steps_left_out = 0  # of the epoch
        self.steps_left_out_in_a_row = 0
        self.training_ended = threading.Event()
        self.training_ended.set()  # it has not begun
        self.recorded_update: RecordedUpdate | None = None
        self.steps_ahead = int(device.type == "cuda")  # that Python may be, and the GPU not
        self.launched: deque[tuple[dict, LossOfAStep]] = deque()  # steps whose loss was not looked at

    def initialize(self):
        with said_in_one_sentence():
            check_preprocessed(Path(self.preprocessed_dataset_folder), self._preprocessing())
        if self.is_ddp:
            end_with_parent(os.getpid())
        super().initialize()
        if self._trains_on_graphs():  # nothing is compiled before its first step
            if self.is_ddp:
                self.network = GraphedDataParallel(self.network.module._orig_mod, device_ids=[self.local_rank])
            else:
                self.network = self.network._orig_mod

    def _trains_on_graphs(self) -> bool:
        """Whether steps are replayed as CUDA graphs: where nnU-Net would compile.

        On several GPUs, what batch norms exchange and the mean of the gradients are part of the graphs.
        """
        return self._do_i_compile() and use_kernels(next(self.network.parameters()))

    def _own_network(self) -> nn.Module:
        return self.network.module if self.is_ddp else self.network

    def _record_step(self):
        """Records the training step before the loaders' threads, which use the GPU as well, begin."""
        self.print_to_log_file("Recording the training step as a CUDA graph...")
        shape = (self.batch_size, self.num_input_channels, *self.configuration_manager.patch_size)
        self.network.train()
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        network = self._own_network()
        x, group = torch.zeros(shape, device=self.device), self.network.process_group if self.is_ddp else None
        reason = None
        try:
            self.recorded_update = record_step(network, self.optimizer, self.grad_scaler, x, group)
        except RuntimeError as error:  # for want of memory: a graph holds what a step takes, and shares it with nobody
            reason = one_line(error)
        if reason is not None:
            torch.cuda.empty_cache()
            self.print_to_log_file(f"The step could not be recorded ({reason}); training goes on, slower, without.")

    def _preprocessing(self) -> str:
        """The command that makes this configuration's data."""
        number = int(self.plans_manager.dataset_name[len("Dataset") :].split("_")[0])
        return (
            f"nnUNetv2_preprocess -d {number} -plans_name {self.plans_manager.plans_name} -c {self.configuration_name}"
        )

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """LGMSNet in the planned topology, for training and for prediction (see :func:`build_network`)."""
        with said_in_one_sentence():
            return build_network(
                configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
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
        before = multiprocessing.active_children()
        loaders = super().get_dataloaders()
        workers = [process for process in multiprocessing.active_children() if process not in before]
        if workers:
            end_if_one_ends(workers, self.training_ended)
        return loaders

    def run_training(self):
        """As nnU-Net's.

        Raises:
            TrainingError: a process that prepares batches was killed or failed.
        """
        self.training_ended.clear()
        self.launched.clear()
        self.steps_left_out_in_a_row = 0
        try:
            super().run_training()
        except RuntimeError as error:
            if "no longer alive" not in str(error):
                raise
            for loader in (self.dataloader_train, self.dataloader_val):
                if hasattr(loader, "_finish"):
                    loader._finish()  # as on_train_end does; cut off, it prints a traceback after the sentence
            raise TrainingError(PROCESS_ENDED) from error
        finally:
            self.training_ended.set()
            if self.network is not None and self._trains_on_graphs():
                # The validation can do with their memory, and processes cannot part while a graph holds an exchange.
                self._own_network().forget_graphs()
                self.recorded_update = None

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()
        output = Path(self.output_folder)
        if self.local_rank == 0:
            weights = sum(p.numel() * p.element_size() for p in self.network.parameters())
            with said_in_one_sentence():
                # weights and momentum; the best, the latest, and one that is being written
                check_room(output, 2 * 3 * weights)
            for left_behind in output.glob(".*.checkpoint_*.pth"):  # by a training killed while it wrote
                left_behind.unlink()
        if self._trains_on_graphs():
            self._record_step()
        super().on_train_start()

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

    def on_epoch_end(self):
        try:
            super().on_epoch_end()
        except OSError as error:  # the progress plot; checkpoints say so themselves
            raise TrainingError(f"{self.output_folder} cannot be written ({error}); {self._how_to_go_on()}") from error

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net's, but the file appears whole or not at all: ``--c`` loads it whatever happens while writing."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        try:
            with atomic_write(Path(filename)) as temporary:
                super().save_checkpoint(str(temporary))
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())  # on the disk before it takes the old one's place
        except (OSError, RuntimeError) as error:  # PyTorch's writer says RuntimeError for a full disk
            reason = one_line(getattr(error, "strerror", None) or error)
            raise TrainingError(f"{filename} cannot be written ({reason}); {self._how_to_go_on()}") from error

    def _how_to_go_on(self) -> str:
        return "the checkpoints before are still there: make room, then continue with --c."

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """As nnU-Net's; a training that stopped between its latest and its best checkpoint makes up for the latter.

        The file is read without running code first: nnU-Net's own way of reading runs what a file tells it to.
        """
        way_out = "remove it, and --c goes on from another checkpoint if there is one"
        if isinstance(filename_or_checkpoint, str):
            try:
                read_checkpoint(filename_or_checkpoint)
            except ValueError as error:
                raise TrainingError(f"{str(error).rstrip('.')}; {way_out}.") from error
        try:
            super().load_checkpoint(filename_or_checkpoint)
        except KeyError as error:
            raise TrainingError(f"{filename_or_checkpoint} has no {error}; {way_out}.") from error
        except RuntimeError as error:
            if "state_dict" not in str(error):
                raise
            reason = one_line(error)
            raise TrainingError(
                f"{filename_or_checkpoint} is of another network than these plans describe ({reason}): continue with "
                "the plans that it was trained with, or train anew."
            ) from error
        # nnU-Net saves the latest before it looks whether the epoch was the best
        averages = self.logger.get_value("ema_fg_dice", step=None)
        if averages and (self._best_ema is None or averages[-1] > self._best_ema):
            self._best_ema = averages[-1]
            self.current_epoch -= 1  # save_checkpoint adds one
            self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_best.pth"))
            self.current_epoch += 1

    def configure_optimizers(self):
        optimizer = FusedSGD(self.network.parameters(), self.initial_lr, self.momentum, self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=0.9)

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.iteration = self.steps_left_out = 0

    def train_step(self, batch: dict) -> StepResult:
        """nnU-Net's step on ``{"data": (B, C, *patch), "target": (B, 1, *patch) or a list of them}``.

        It ends when the step before it has: on a GPU, this one is being computed while nnU-Net gets the next batch.

        Raises:
            TrainingError: the loss is no number, on a GPU that of the step before, so going on would only lose time:
                images hold NaN or infinity, or the network diverged.
        """
        self.lr_scheduler.step(self.current_epoch + self.iteration / self.num_iterations_per_epoch)
        self.iteration += 1
        data, target = copied_ahead((batch["data"], batch["target"]), self.device)
        arriving = LossOfAStep(*self._take_step(data, target))
        self.launched.append((batch, arriving))
        self._look_at_losses(self.steps_ahead)
        return StepResult(loss=arriving)

    def _take_step(self, data: torch.Tensor, target: torch.Tensor | list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The loss and the norm of its gradients, on the device (see :func:`training_step`)."""
        return training_step(
            self.network, self.loss, self.optimizer, self.grad_scaler, data, target, self.recorded_update
        )

    def _look_at_losses(self, but: int):
        """Those of all steps so far but the latest."""
        while len(self.launched) > but:
            self._look_at_loss(*self.launched.popleft())

    def _look_at_loss(self, batch: dict, loss: LossOfAStep):
        has_loss, was_taken = bool(np.isfinite(loss.read())), loss.step_was_taken()
        self.steps_left_out += not was_taken
        if has_loss and was_taken:
            self.steps_left_out_in_a_row = 0
            return
        if not has_loss:
            with said_in_one_sentence():
                check_images(batch)
        self.steps_left_out_in_a_row += 1
        # without float16 there is nothing that would bring a loss back
        no_loss_comes_back = not has_loss and self.grad_scaler is None
        if no_loss_comes_back or self.steps_left_out_in_a_row == MAX_STEPS_LEFT_OUT:
            raise TrainingError(
                f"The loss is {float(loss.read())} in epoch {self.current_epoch}, for images that are finite: the "
                "training diverged; continue from the last checkpoint with --c, and with a lower initial_lr if it "
                "happens again."
                if not has_loss
                else f"The gradients are not finite in epoch {self.current_epoch}, {MAX_STEPS_LEFT_OUT} steps in a "
                "row, for images that are finite: the training diverged; continue from the last checkpoint with --c, "
                "and with a lower initial_lr if it happens again."
            )

    def on_train_epoch_end(self, train_outputs: list[StepResult]):
        self._look_at_losses(0)
        if self.steps_left_out:
            self.print_to_log_file(
                f"{self.steps_left_out} of {self.num_iterations_per_epoch} steps were left out: their gradients were "
                "not finite."
            )
        super().on_train_epoch_end(train_outputs)

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

    def _build_loss(self):
        loss = cross_entropy_and_dice(self.label_manager, self.configuration_manager.batch_dice, self.is_ddp)
        if self._do_i_compile():
            loss.dc = torch.compile(loss.dc)
        if self.enable_deep_supervision:
            n_outputs = len(self._get_deep_supervision_scales())
            loss = DeepSupervisionWrapper(loss, deep_supervision_weights(n_outputs, self.is_ddp))
        return loss

    def set_deep_supervision_enabled(self, enabled: bool):
        """Switches the decoder's outputs; never on in a training without deep supervision.

        nnU-Net asks for it after every validation, also in a trainer that works without.
        """
        super().set_deep_supervision_enabled(enabled and self.enable_deep_supervision)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """Axes that may rotate and flip. Neither needs a larger initial patch or a detour through 2D.

        nnU-Net hands the first result to ``get_training_transforms`` as ``rotation_for_DA``; here it is axes, not an
        angle.
        """
        patch_size = self.configuration_manager.patch_size
        mirror_axes = tuple(range(len(patch_size)))
        self.inference_allowed_mirroring_axes = mirror_axes
        return rotation_axes(patch_size, self.configuration_manager.spacing), False, patch_size, mirror_axes

    @staticmethod
    def get_training_transforms(
        patch_size: np.ndarray | tuple[int],
        rotation_for_DA: RandomScalar,
        deep_supervision_scales: list | tuple | None,
        mirror_axes: tuple[int, ...],
        do_dummy_2d_data_aug: bool,
        use_mask_for_norm: list[bool] | None = None,
        is_cascaded: bool = False,
        foreground_labels: tuple[int, ...] | list[int] | None = None,
        regions: list[list[int] | tuple[int, ...] | int] | None = None,
        ignore_label: int | None = None,
    ) -> BasicTransform:
        """Rotations by 90 degrees and flips (see :func:`rotations_and_flips`).

        Neither changes an intensity or brings in voxels from outside, so an image that was normalised inside its mask
        needs no second masking.
        """
        return rotations_and_flips(
            rotation_for_DA, mirror_axes, deep_supervision_scales, is_cascaded, foreground_labels, regions, ignore_label
        )


class nnUNetTrainerLGMSNet_nnUNetDA(nnUNetTrainerLGMSNet):
    """The paper's recipe with nnU-Net's full augmentation."""

    configure_rotation_dummyDA_mirroring_and_inital_patch_size = (
        nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size
    )
    get_training_transforms = staticmethod(nnUNetTrainer.get_training_transforms)


class nnUNetTrainerLGMSNet_5epochs(nnUNetTrainerLGMSNet):
    """The paper's recipe for 5 epochs: a quick look at whether a dataset trains."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature, to the letter
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 5


class nnUNetTrainerLGMSNet_demo(nnUNetTrainerLGMSNet):
    """A few minutes on two CPU cores, for ``make demo``: own optimiser, schedule and augmentation, not the paper's.

    400 steps of AdamW at 2e-3, polynomial decay, one planned patch a step (the planned batch is made for a GPU), no
    augmentation. Measured on the demo's data (24 training and 6 test cases of the hippocampus set, mean Dice of
    anterior and posterior, bfloat16): 0.83 after 200 and 0.87 after 400 steps; with the paper's rotations and flips
    0.74 and 0.80, because flips hide which end is anterior. Without flips in training there are none at prediction,
    which makes it eight times faster.

    A checkpoint is written every epoch, so that an interrupted demo goes on where it stopped.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature, to the letter
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 20
        self.num_iterations_per_epoch = 20
        self.num_val_iterations_per_epoch = 2
        self.initial_lr = 2e-3
        self.weight_decay = 1e-2
        self.save_every = 1

    def _set_batch_size_and_oversample(self):
        super()._set_batch_size_and_oversample()
        self.batch_size = 1

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=0.9)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """No axis rotates and none flips, neither in training nor at prediction."""
        self.inference_allowed_mirroring_axes = None
        return (), False, self.configuration_manager.patch_size, None
