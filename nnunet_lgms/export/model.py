"""From nnU-Net's model folder to the network and the description that go into the exported files."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from nnunet_lgms import __version__
from nnunet_lgms.architecture.encoder import MaxPool
from nnunet_lgms.architecture.lgmsnet import LGMSNet
from nnunet_lgms.blocks.attention import SparseTransformer
from nnunet_lgms.dataset_json import channel_names
from nnunet_lgms.export.onnx_file import MeanLogits
from nnunet_lgms.inference import load_predictor, trained_folds
from nnunet_lgms.nnunet_folders import model_path
from nnunet_lgms.runtime.description import Description, Resampling
from nnunet_lgms.runtime.schema import NORMALIZATIONS, READERS, RESAMPLINGS


def load_model(
    model_folder: Path, folds: Sequence[str] | None, checkpoint: str = "checkpoint_final.pth"
) -> tuple[nn.Module, Description]:
    """The mean of a model's folds as one network, and its description (fp32, sizes fixed to the patch).

    Raises:
        ValueError: it is no trained model or one of another trainer, a fold is missing, or prediction needs what the
            runtime does not have: a cascade's previous stage, a reader, a normalisation or a resampling.
    """
    model_folder = model_path(model_folder)
    folds = trained_folds(model_folder, checkpoint) if folds is None else list(dict.fromkeys(map(str, folds)))
    predictor = load_predictor(model_folder, folds=folds, checkpoint=checkpoint, device="cpu")
    if not isinstance(predictor.network, LGMSNet):
        raise ValueError(
            f"{model_folder} was trained with {predictor.trainer_name}, whose network is "
            f"{type(predictor.network).__name__}: export takes models of LGMSNet's trainers, such as "
            "nnUNetTrainerLGMSNet."
        )
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    if configuration.previous_stage_name is not None:
        raise ValueError(
            f"{model_folder} is the second stage of a cascade and needs the segmentation of "
            f"{configuration.previous_stage_name}: export a model of 3d_fullres or 3d_lowres."
        )
    channels = channel_names(predictor.dataset_json)
    schemes = configuration.normalization_schemes
    label_manager = predictor.label_manager
    description = Description(
        trainer=predictor.trainer_name,
        dataset=plans.dataset_name,
        plans=plans.plans_name,
        configuration=next(
            name
            for name in plans.available_configurations
            if plans.get_configuration(name).configuration == configuration.configuration
        ),
        folds=tuple(folds),
        precision="fp32",
        reader=_known(plans.plans["image_reader_writer"], READERS, "image reader", model_folder),
        file_ending=predictor.dataset_json["file_ending"],
        channel_names=channels,
        transpose_forward=tuple(plans.transpose_forward),
        transpose_backward=tuple(plans.transpose_backward),
        spacing=tuple(map(float, configuration.spacing)),
        normalization_schemes=tuple(_known(s, NORMALIZATIONS, "normalisation", model_folder) for s in schemes),
        use_mask_for_norm=tuple(configuration.use_mask_for_norm),
        intensity_properties=tuple(
            plans.foreground_intensity_properties_per_channel[str(i)] for i in range(len(channels))
        ),
        resampling_data=_resampling(configuration.configuration, "data", model_folder),
        resampling_probabilities=_resampling(configuration.configuration, "probabilities", model_folder),
        patch_size=tuple(map(int, configuration.patch_size)),
        steps=(0,) * len(configuration.patch_size),
        mirror_axes=tuple(map(int, predictor.allowed_mirroring_axes or ())),
        labels=predictor.dataset_json["labels"],
        regions_class_order=tuple(label_manager.regions_class_order) if label_manager.has_regions else None,
        version=__version__,
    )
    networks = []
    for parameters in predictor.list_of_parameters:
        network = copy.deepcopy(predictor.network)
        network.load_state_dict(parameters)
        networks.append(network)
    return (networks[0] if len(networks) == 1 else MeanLogits(networks)).eval(), description


def size_steps(network: nn.Module) -> tuple[int, ...]:
    """By how much each axis of an LGMSNet's input may change: the total stride, times the patch of the attention."""
    network = network.networks[0] if isinstance(network, MeanLogits) else network
    modules = list(network.modules())
    steps = np.prod([m.stride for m in modules if isinstance(m, MaxPool)], axis=0)
    patches = [m.patch for m in modules if isinstance(m, SparseTransformer)]
    return tuple(int(step) * math.lcm(*(p[axis] for p in patches)) for axis, step in enumerate(steps))


def _known(value: str, known: Sequence[str], what: str, model_folder: Path) -> str:
    if value not in known:
        raise ValueError(
            f"{model_folder} needs the {what} {value!r}, which nnunet_lgms.runtime does not have; it has "
            f"{', '.join(known)}."
        )
    return value


def _resampling(configuration: dict, what: str, model_folder: Path) -> Resampling:
    function = _known(configuration[f"resampling_fn_{what}"], RESAMPLINGS, "resampling", model_folder)
    kwargs = configuration[f"resampling_fn_{what}_kwargs"]
    resampling = Resampling(function, **{k: kwargs[k] for k in ("order", "order_z", "force_separate_z") if k in kwargs})
    allowed = (0, 1, 3) if what == "data" else (0, 1)
    for order in (resampling.order, resampling.order_z):
        _known(order, allowed, f"resampling order of {what}", model_folder)
    return resampling
