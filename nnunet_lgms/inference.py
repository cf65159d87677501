"""Prediction without the command line: nnU-Net's predictor, ready to use."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_lgms.arrays import checked_image, is_flat
from nnunet_lgms.dataset_json import n_channels
from nnunet_lgms.files import one_line, read_json, shown
from nnunet_lgms.names import check_plans_names
from nnunet_lgms.nnunet_folders import model_path

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nnunet_lgms.prediction.predictor import Predictor

#: this package's trainers, in `trainers/`
LGMSNETS = {
    "nnUNetTrainerLGMSNet",
    "nnUNetTrainerLGMSNet_nnUNetDA",
    "nnUNetTrainerLGMSNet_5epochs",
    "nnUNetTrainerLGMSNet_50epochs",
    "nnUNetTrainerLGMSNet_100epochs",
    "nnUNetTrainerLGMSNet_250epochs",
    "nnUNetTrainerLGMSNet_1000epochs",
    "nnUNetTrainerLGMSNet_paper2D",
    "nnUNetTrainerLGMSNet_paper3D",
    "nnUNetTrainerLGMSNet_smoke",
}
#: the module of nnU-Net's trainer, and its name
UNETS = ("nnunetv2.training.nnUNetTrainer.nnUNetTrainer", "nnUNetTrainer")

#: a file, an array with its channels, an image of SimpleITK or nibabel, or a list with one file or image a channel
Image = Any


def predict(
    model_folder: str | Path,
    image: Image | Sequence[Image],
    *,
    spacing: Sequence[float] | None = None,
    folds: Sequence[int | str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    device: str | torch.device | None = None,
    return_probabilities: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Segments one image or several, quietly.

    Args:
        model_folder: what nnU-Net trained, `nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION`, or the name
            of a shipped model, "hippocampus" or "isic".
        image: a file; samples of shape (C, Y, X) or (C, Z, Y, X); an image of SimpleITK or nibabel; or a list of files
            or of such images that are the channels of one image. Several images: a list of arrays, or of lists of files
            or images.
        spacing: of the axes of arrays, (y, x) or (z, y, x) in mm; others bring their own. Default for (C, Y, X): 1.
        folds: models to average; default: all that are trained.
        checkpoint: name of the weights in each fold's folder.
        device: where to compute; default: the GPU if there is one.
        return_probabilities: give them, too.
        progress: called with windows done and in all, for each image.

    Returns:
        Labels on the grid of the image: (Y, X) for flat images, (Z, Y, X) for volumes; an image of SimpleITK or nibabel
        if it was given. With probabilities a pair: labels, and (heads, Y, X) or (heads, Z, Y, X) in float32, of the
        classes or of the regions. For several images a list.

    Raises:
        ValueError: the model or an image is not as described.

    Example::

        labels = nnunet_lgms.predict("nnUNet_results/Dataset101_BUSI/nnUNetTrainerLGMSNet__nnUNetPlans__2d", "case.png")
    """
    several = isinstance(image, (list, tuple)) and any(isinstance(i, (list, tuple, np.ndarray)) for i in image)
    images = list(image) if several else [image]
    predictor = load_predictor(model_folder, folds=folds, checkpoint=checkpoint, device=device, progress=progress)
    predictor.n_cases = len(images)
    results = [_predict_one(predictor, one, spacing, return_probabilities) for one in images]
    return results if several else results[0]


def _predict_one(
    predictor: Predictor, image: Image, spacing: Sequence[float] | None, with_probabilities: bool
) -> np.ndarray | tuple:
    from nnunet_lgms.prediction.cases import check_axes, check_channels, check_colours, read_case
    from nnunet_lgms.prediction.image_objects import is_image_object, labels_like, write_channels

    channels = list(image) if isinstance(image, (list, tuple)) else [image]
    if not channels:
        raise ValueError("An image is an empty list: give a file or an image for each channel.")
    expected = n_channels(predictor.dataset_json)
    if len(channels) > expected:
        raise ValueError(
            f"A list of {len(channels)} is one image of as many channels, and the model takes {expected}: give several "
            "images as a list of lists."
        )
    objects = all(is_image_object(channel) for channel in channels)
    if not (objects or isinstance(image, np.ndarray) or all(isinstance(c, (str, Path)) for c in channels)):
        raise ValueError(
            f"The image is {shown(image)}: give a file, an array, an image of SimpleITK or nibabel, or a list of these."
        )
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(image, np.ndarray):
            samples, spacing, flat = checked_image(image, spacing)
            properties = {"spacing": spacing}
            check_channels(samples, predictor.dataset_json, "The array")
            check_axes(flat, predictor.configuration_manager, "The array")
            check_colours(image, predictor.configuration_manager, "The array")
        else:
            files = (
                write_channels(channels, Path(folder), predictor.dataset_json["file_ending"]) if objects else channels
            )
            samples, _, properties = read_case(
                list(map(str, files)),
                None,
                predictor.plans_manager,
                predictor.configuration_manager,
                predictor.dataset_json,
                name="The image" if objects else None,
            )
            flat = is_flat(properties)
        result: Any = predictor.predict_single_npy_array(samples, properties, None, None, with_probabilities)
        labels, probabilities = result if with_probabilities else (result, None)
        if objects:
            writer = predictor.plans_manager.image_reader_writer_class()
            found = labels_like(channels[0], labels, properties, writer, Path(folder))
        else:
            found = labels[0] if flat else labels
    if probabilities is None:
        return found
    return found, probabilities[:, 0] if flat else probabilities


def load_predictor(
    model_folder: str | Path,
    *,
    folds: Sequence[int | str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    device: str | torch.device | None = None,
    allow_tqdm: bool = False,
    **options: Any,
) -> Predictor:
    """nnU-Net's predictor with the weights of a trained model.

    Args:
        model_folder: as in `predict`, like the next three.
        folds: see there.
        checkpoint: see there.
        device: see there.
        allow_tqdm: show progress bars.
        **options: other arguments of :class:`nnunet_lgms.prediction.predictor.Predictor`.

    Raises:
        ValueError: the folder is no trained model, a fold is missing, or its trainer cannot be found.
    """
    folder = model_path(model_folder)
    trained = trained_folds(folder, checkpoint)
    folds = trained if folds is None else [str(fold) for fold in folds]
    if not folds:
        raise ValueError(f"No fold of {folder} is named: name one of {', '.join(trained)}, or leave folds out for all.")
    if missing := [fold for fold in folds if fold not in trained]:
        raise ValueError(f"{folder} has no fold_{missing[0]}/{checkpoint}; trained are: {', '.join(trained)}.")
    read_model_plans(folder)
    device = usable_device(device)
    if device.type == "cuda":
        import torch

        # The driver takes a second for its first tensor: meanwhile the rest is imported.
        ThreadPoolExecutor(1).submit(lambda: torch.zeros(1, device=device))
    from nnunet_lgms.prediction.predictor import Predictor

    options = {"known_networks": known_network, **options}
    predictor = Predictor(device=device, allow_tqdm=allow_tqdm, **options)
    try:
        predictor.initialize_from_trained_model_folder(str(folder), folds, checkpoint)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} is not as nnU-Net trained it ({type(error).__name__}: {one_line(error)}): "
            "plans.json, dataset.json and the checkpoint must be those of one training."
        ) from error
    except RuntimeError as error:
        reason = one_line(error)
        if "state_dict" in reason:
            raise ValueError(
                f"The weights of {folder} are of another network than its plans.json describes ({reason}): take the "
                "plans that it was trained with."
            ) from error
        if "trainer" not in reason.lower():
            raise
        raise ValueError(
            f"The trainer of {folder} cannot be found: the environment variable nnUNet_extTrainer must name the folder "
            f"of its module ({reason})."
        ) from error
    return predictor


def known_network(trainer: str) -> Callable[..., nn.Module] | None:
    """What builds the network of a trainer, if that is known without the trainer; else None.

    To find a trainer, nnU-Net imports all that trainings need, and for one that is not its own the modules of all of
    its trainers: two to three seconds before the first image is read.
    """
    if trainer in LGMSNETS:
        from nnunet_lgms.nnunet.builder import build_network

        return lambda plans_manager, *arguments, **options: build_network(*arguments, **options)
    if trainer == UNETS[1] and UNETS[0] not in sys.modules:
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

        def build(plans_manager, configuration, n_inputs: int, n_outputs: int, enable_deep_supervision: bool = True):
            return get_network_from_plans(
                configuration.network_arch_class_name,
                configuration.network_arch_init_kwargs,
                configuration.network_arch_init_kwargs_req_import,
                n_inputs,
                n_outputs,
                allow_init=False,  # weights are loaded
                deep_supervision=enable_deep_supervision,
            )

        return build
    return None


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """The named device, or the GPU if there is one, or else the CPU.

    Raises:
        ValueError: PyTorch does not know the device, or does not find it on this machine.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"The device {shown(device)} is not known: use cuda, cuda:0, mps or cpu.") from None
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (wanted.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(wanted.type, False):
        raise ValueError(
            f"The device {wanted} is not on this machine: use {' or '.join(d for d in there if there[d])}."
        )
    return wanted


def read_model_plans(model_folder: Path) -> dict[str, Any]:
    """The plans that a model was trained with.

    Raises:
        ValueError: they are not nnU-Net's, or a name in them would lead elsewhere when it becomes part of a path.
    """
    path = model_folder / "plans.json"
    plans = read_json(path)
    if not isinstance(plans, dict):
        raise ValueError(f"{path} holds {shown(plans)} instead of a table: it is no plans file of nnU-Net's.")
    check_plans_names(plans, str(path))
    return plans


def trained_folds(model_folder: Path, checkpoint: str = "checkpoint_final.pth") -> list[str]:
    """Folds of a model that have weights: "0", "1", … or "all".

    Raises:
        ValueError: it is not a folder that nnU-Net trained, or there are no weights.
    """
    folds = folds_among(model_files(model_folder), model_folder, checkpoint)
    # as nnU-Net does: a model of all cases is asked for by name
    return [fold for fold in folds if fold != "all"] or folds


def model_files(folder: Path) -> dict[str, Path]:
    """Descriptions and weights of a model's folder, by their names in it."""
    found = [folder / "plans.json", folder / "dataset.json", *folder.glob("fold_*/*.pth")]
    return {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}


def folds_among(names: Iterable[str], model: Path, checkpoint: str) -> list[str]:
    """Folds with such weights among the files of a model, sorted; "all" is one of them.

    Raises:
        ValueError: it is no trained model, or has no such weights.
    """
    there = set(names)
    for name in ("dataset.json", "plans.json"):
        if name not in there:
            raise ValueError(
                f"{model} is not a trained model: it has no {name}. Expected is nnU-Net's folder "
                f"nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION."
            )
    folds = sorted(m[1] for n in there if (m := re.fullmatch(rf"fold_(\d+|all)/{re.escape(checkpoint)}", n)))
    if not folds:
        raise ValueError(f"{model} has no fold_*/{checkpoint}: the training is not finished.")
    return folds
