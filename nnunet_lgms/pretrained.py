"""Trained models: by the name of one that is shipped, by nnU-Net's folder, or by nnU-Net's zip of one."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_lgms.files import read_json, shown
from nnunet_lgms.inference import folds_among, model_files
from nnunet_lgms.nnunet_folders import model_path

if TYPE_CHECKING:
    from nnunet_lgms.architecture.lgmsnet import LGMSNet


def load(model: str | Path, *, fold: int | str | None = None, checkpoint: str = "checkpoint_final.pth") -> LGMSNet:
    """Gives the network of a trained model, with its weights, on the CPU and in evaluation mode.

    The network takes normalised patches (B, C, *spatial) and returns logits (B, heads, *spatial). For whole images,
    with nnU-Net's resampling and normalisation around it, there is :func:`nnunet_lgms.predict`.

    Args:
        model: the name of a shipped model, "hippocampus" or "isic"; a folder that nnU-Net trained,
            ``nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION``; or a zip of one, as
            ``nnUNetv2_export_model_to_zip`` writes it. Nothing in them is run (``weights_only=True``).
        fold: which fold's weights; may be left out where there is one.
        checkpoint: name of the weights in the fold's folder.

    Raises:
        ValueError: it is no trained model, or one of another trainer, or there are several folds and none is named.

    Example:
        >>> network = load("hippocampus")
        >>> network(torch.zeros(1, 1, 40, 56, 40)).shape
        torch.Size([1, 3, 40, 56, 40])
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_lgms.checkpoint import read_checkpoint
    from nnunet_lgms.nnunet.builder import build_network

    path = model_path(model)
    files = _zipped(path) if path.is_file() else model_files(path)
    weights = _weights(path, files, fold, checkpoint)
    content = read_checkpoint(weights if isinstance(weights, Path) else io.BytesIO(weights()))
    plans, dataset = (_json(path, files[name]) for name in ("plans.json", "dataset.json"))
    try:
        trainer, configuration = content["trainer_name"], content["init_args"]["configuration"]
        if not str(trainer).startswith("nnUNetTrainerLGMSNet"):
            raise ValueError(
                f"{path} was trained with {shown(trainer)}: load gives networks of nnUNetTrainerLGMSNet and its "
                "variants; for others take nnU-Net's own nnUNetPredictor."
            )
        manager = PlansManager(plans)
        planned = manager.get_configuration(configuration)
        channels = determine_num_input_channels(manager, planned, dataset)
        heads = manager.get_label_manager(dataset).num_segmentation_heads
        network = build_network(planned, channels, heads, enable_deep_supervision=False)
        network.load_state_dict(content["network_weights"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not as nnU-Net trained it ({type(error).__name__}: {error}): plans.json, dataset.json and the "
            "checkpoint must be those of one training."
        ) from error
    return network.eval()


def _zipped(path: Path) -> dict:
    """The files of the one model in a zip, read where they are asked for; nothing is unpacked."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is no zip: give a folder that nnU-Net trained, or nnU-Net's zip of one.") from None
    roots = [name.removesuffix("plans.json") for name in archive.namelist() if name.endswith("/plans.json")]
    if len(roots) != 1:
        raise ValueError(
            f"{path} holds {len(roots)} trained models: import it with nnUNetv2_install_pretrained_model_from_zip and "
            "give one of their folders."
        )
    return {
        name.removeprefix(roots[0]): (lambda name=name: archive.read(name))
        for name in archive.namelist()
        if name.startswith(roots[0])
    }


def _weights(path: Path, files: dict, fold: int | str | None, checkpoint: str):
    trained = folds_among(files, path, checkpoint)
    if fold is None and len(trained) > 1:
        raise ValueError(f"{path} has the folds {', '.join(trained)}: name one, as in fold=0.")
    chosen = trained[0] if fold is None else str(fold)
    if chosen not in trained:
        raise ValueError(f"{path} has no fold {shown(fold)}; trained are: {', '.join(trained)}.")
    return files[f"fold_{chosen}/{checkpoint}"]


def _json(path: Path, file) -> dict:
    if isinstance(file, Path):
        return read_json(file)
    try:
        return json.loads(file())
    except ValueError as error:
        raise ValueError(f"{path} holds a file that is not JSON ({error}).") from None
