"""The paper's losses (arXiv 2508.15476, section 4.1): nnU-Net's own, and of labels in one operator on GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

from nnunet_lgms.ops import softmax_sums

CROSS_ENTROPY_WEIGHT = 0.5
DICE_WEIGHT = 1.0
DICE_SMOOTHING = 1e-5
#: weight of a head that takes no part in the loss but must receive a gradient (nnU-Net's own value)
NEGLIGIBLE_WEIGHT = 1e-6


def cross_entropy_and_dice(label_manager: LabelManager, batch_dice: bool, ddp: bool) -> nn.Module:
    """0.5 * BCE + Dice for regions (sigmoid), 0.5 * CE + Dice for labels (softmax).

    The Dice part is minus the soft Dice, as everywhere in nnU-Net, so a perfect prediction costs -1. Under a softmax
    the background takes no part in it, as is nnU-Net's default. Both parts are means over the voxels that have a label;
    an ignore label that no voxel has changes nothing.

    Args:
        label_manager: says whether labels are regions, and which label, if any, is ignored.
        batch_dice: the plan's choice: one Dice over the whole batch (nnU-Net plans this in 2D and at low resolution),
            or one per sample, then the mean, as in the paper.
        ddp: whether the batch is spread over processes.

    Returns:
        a module that takes logits (B, C, *spatial) and targets (B, 1, *spatial) for labels, (B, regions, *spatial) for
        regions, followed by one channel for the ignore label if there is one.
    """
    if label_manager.has_regions:
        has_ignore, n_regions = label_manager.ignore_label is not None, len(label_manager.foreground_regions)
        return DC_and_BCE_loss(
            {},
            {"batch_dice": batch_dice, "smooth": DICE_SMOOTHING, "ddp": ddp, "do_bg": True},
            # with an ignore label nnU-Net sums over the regions where it otherwise takes their mean
            weight_ce=CROSS_ENTROPY_WEIGHT / n_regions if has_ignore else CROSS_ENTROPY_WEIGHT,
            weight_dice=DICE_WEIGHT,
            use_ignore_label=has_ignore,
            dice_class=MemoryEfficientSoftDiceLoss,
        )
    return CrossEntropyAndDice(batch_dice, ddp, label_manager.ignore_label)


def nnunets_cross_entropy_and_dice(label_manager: LabelManager, batch_dice: bool, ddp: bool) -> nn.Module:
    """nnU-Net's own CE + Dice for labels, as its trainer has it; see :func:`cross_entropy_and_dice`."""
    return DC_and_CE_loss(**_of_labels(batch_dice, ddp, label_manager.ignore_label), weight_ce=1, weight_dice=1)


def _of_labels(batch_dice: bool, ddp: bool, ignore_label: int | None) -> dict[str, Any]:
    """What nnU-Net's loss is given of labels, but for its weights."""
    return {
        "soft_dice_kwargs": {"batch_dice": batch_dice, "smooth": DICE_SMOOTHING, "ddp": ddp, "do_bg": False},
        "ce_kwargs": {},
        "ignore_label": ignore_label,
        "dice_class": MemoryEfficientSoftDiceLoss,
    }


class CrossEntropyAndDice(DC_and_CE_loss):
    """nnU-Net's 0.5 * CE + Dice for labels, in one pass over the logits where the kernels run.

    nnU-Net's own code takes what they do not serve: other devices, more classes, float64, and a compiler.

    Args:
        batch_dice: whether there is one Dice over the whole batch, or one per sample.
        ddp: whether the batch is spread over processes, which then share the sums of a Dice over all of it.
        ignore_label: the label, if any, whose voxels take no part.
    """

    def __init__(self, batch_dice: bool, ddp: bool, ignore_label: int | None):
        given = _of_labels(batch_dice, ddp, ignore_label)
        super().__init__(**given, weight_ce=CROSS_ENTROPY_WEIGHT, weight_dice=DICE_WEIGHT)
        self.batch_dice, self.ddp = batch_dice, ddp

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Logits (B, C, *spatial) and labels (B, 1, *spatial) -> the loss, ()."""
        sums = softmax_sums(net_output, target, self.ignore_label)
        if sums is None:
            return super().forward(net_output, target)
        *_, labelled, entropy = sums.unbind(1)
        cross_entropy = entropy.sum() / labelled.sum().clamp_min(1)  # 0 where every voxel is ignored
        if self.batch_dice:
            sums = sums.sum(0, keepdim=True)
            if self.ddp:
                sums = AllGatherGrad.apply(sums).sum(0)
        return self.weight_ce * cross_entropy - self.weight_dice * _soft_dice(sums)


def _soft_dice(sums: Tensor) -> Tensor:
    """nnU-Net's soft Dice of sums (B, 4, C), see :func:`softmax_sums`: the mean over samples and foreground, ()."""
    overlap, predicted, labelled, _ = sums.unbind(1)
    dice = (2 * overlap + DICE_SMOOTHING) / (labelled + predicted + DICE_SMOOTHING).clamp_min(1e-8)
    return dice[:, 1:].mean()


def deep_supervision_weights(n_outputs: int, every_head_needs_gradient: bool = False) -> np.ndarray:
    """nnU-Net's weights: halved from level to level, none for the lowest, sum 1.

    A network of two stages has one output only, which is also the lowest: it keeps all the weight, where nnU-Net's own
    formula would divide 0 by 0.

    Args:
        n_outputs: outputs of the network, full resolution first.
        every_head_needs_gradient: give the lowest output a negligible weight instead of none. DDP needs that: it
            waits for the gradient of every parameter.
    """
    weights = 0.5 ** np.arange(n_outputs)
    if n_outputs > 1:
        weights[-1] = NEGLIGIBLE_WEIGHT if every_head_needs_gradient else 0
    return weights / weights.sum()
