"""nnU-Net trainers of LGMSNet (arXiv 2508.15476): the paper's recipe on nnU-Net's planned patches.

nnU-Net finds them through ``trainers/``, which only imports them: the modules of a trainer folder are dropped from
``sys.modules`` after the search, and compilation and pickling need theirs to stay.
"""

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_lgms.config import settings_of
from nnunet_lgms.graphs.ahead import StepResult
from nnunet_lgms.graphs.optimizer import FusedSGD
from nnunet_lgms.nnunet.augmentation import patch_to_turn, rotation_axes, said_of_rotations, training_transforms
from nnunet_lgms.nnunet.builder import build_network
from nnunet_lgms.nnunet.errors import said_in_one_sentence
from nnunet_lgms.nnunet.graphed import GraphedTrainer
from nnunet_lgms.nnunet.loss import compile_dice, cross_entropy_and_dice, deep_supervision_weights
from nnunet_lgms.nnunet.summary import summarise


class nnUNetTrainerLGMSNet(GraphedTrainer):
    """LGMSNet with the paper's recipe (section 4.1 and the released 2D script).

    - 500 epochs (of nnU-Net's 250 iterations), SGD with momentum 0.9 and weight decay 1e-4.
    - Learning rate 0.02, polynomial decay with power 0.9, stepped every iteration as in the paper's script. nnU-Net
      steps its scheduler once an epoch; here every training step first sets the rate of its own fraction of the epoch,
      so the rate depends on epoch and iteration alone and a continued training goes on where it stopped. nnU-Net's log
      and progress plot show each epoch's first rate.
    - 0.5 * BCE + Dice for regions, 0.5 * CE + Dice for labels, smoothing 1e-5.
    - Rotation by 90 degrees in planes of equal spacing, flips, nothing else.
    - Gradients are clipped at norm 12, as in every nnU-Net trainer.

    The rate of 0.02 is as published because it was stable where it was tried: 250 steps at the full rate on the demo's
    hippocampus set, 2D (bfloat16 autocast) and 3D with five stages (float32), gave gradient norms of 1 to 7, so nothing
    was clipped, and no activation above 38, where float16 ends at 65504. 500 steps under float16 on an H200, on MRI and
    on ultrasound, skipped none and left the gradient scaler where it began (benchmarks/results/amp_soundness.json).

    Patch and batch size, foreground oversampling and the choice between Dice per batch or per sample are the plan's.
    The published network has no deep supervision, so it is off; ``{"lgmsnet": {"deep_supervision": true}}`` in the
    plan's configuration turns it on, with nnU-Net's weights.
    """

    num_epochs = 500
    initial_lr = 0.02
    rate_decay_power = 0.9
    momentum = 0.9
    weight_decay = 1e-4
    iteration = 0  # within the epoch

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature, to the letter
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        with said_in_one_sentence():
            self.enable_deep_supervision = settings_of(self.configuration_manager).deep_supervision

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

    def configure_optimizers(self):
        optimizer = FusedSGD(self.network.parameters(), self.initial_lr, self.momentum, self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=self.rate_decay_power)

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.iteration = 0

    def train_step(self, batch: dict) -> StepResult:
        self.lr_scheduler.step(self.current_epoch + self.iteration / self.num_iterations_per_epoch)
        self.iteration += 1
        return super().train_step(batch)

    def print_plans(self):
        """nnU-Net's log of the plans, and what of LGMSNet they make."""
        super().print_plans()
        summary = summarise(self._own_network(), self.configuration_manager, self.device)
        self.print_to_log_file(summary, add_timestamp=False)

    def _build_loss(self):
        loss = cross_entropy_and_dice(self.label_manager, self.configuration_manager.batch_dice, self.is_ddp)
        if self._do_i_compile():
            compile_dice(loss, next(self.network.parameters()), self.label_manager.num_segmentation_heads)
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
        """Axes that may rotate and flip, and the patch that the loader takes, which is larger where a turn needs it.

        nnU-Net hands the first result to ``get_training_transforms`` as ``rotation_for_DA``; here it is axes, not an
        angle.
        """
        patch_size, spacing = self.configuration_manager.patch_size, self.configuration_manager.spacing
        mirror_axes = tuple(range(len(patch_size)))
        self.inference_allowed_mirroring_axes = mirror_axes
        axes = rotation_axes(patch_size, spacing)
        initial_patch = patch_to_turn(patch_size, axes)
        self.print_to_log_file(said_of_rotations(patch_size, spacing, axes))
        return axes, False, initial_patch, mirror_axes

    get_training_transforms = staticmethod(training_transforms(rotation_probability=0.5, flip_probability=0.5))


class nnUNetTrainerLGMSNet_nnUNetDA(nnUNetTrainerLGMSNet):
    """The paper's recipe with nnU-Net's full augmentation."""

    configure_rotation_dummyDA_mirroring_and_inital_patch_size = (
        nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size
    )
    get_training_transforms = staticmethod(nnUNetTrainer.get_training_transforms)


class nnUNetTrainerLGMSNet_5epochs(nnUNetTrainerLGMSNet):
    """The paper's recipe for 5 epochs: a quick look at whether a dataset trains."""

    num_epochs = 5


class nnUNetTrainerLGMSNet_50epochs(nnUNetTrainerLGMSNet):
    """The paper's recipe for 50 epochs."""

    num_epochs = 50


class nnUNetTrainerLGMSNet_100epochs(nnUNetTrainerLGMSNet):
    """The paper's recipe for 100 epochs."""

    num_epochs = 100


class nnUNetTrainerLGMSNet_250epochs(nnUNetTrainerLGMSNet):
    """The paper's recipe for 250 epochs."""

    num_epochs = 250


class nnUNetTrainerLGMSNet_1000epochs(nnUNetTrainerLGMSNet):
    """The paper's recipe for 1000 epochs, as many as nnU-Net's own."""

    num_epochs = 1000
