"""Prediction against nnU-Net's own: the same labels, files and headers, for everything that plans can ask for."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import unet_model
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from PIL import Image

from nnunet_lgms.inference import load_predictor
from nnunet_lgms.prediction import resampling
from nnunet_lgms.prediction.cases import CasesFailed

THICK = (4.0, 0.8, 0.8)


@dataclass
class Kind:
    """A model and an image that differ in one way from those of the first."""

    patch: tuple = (12, 16, 16)
    target: tuple = (1.3, 1.0, 0.9)  # spacing of the model
    shape: tuple = (17, 30, 22)
    spacing: tuple = (1.7, 0.8, 1.0)
    more: dict = field(default_factory=dict)
    labels: dict | None = None
    transpose: tuple = (0, 1, 2)
    folds: tuple = (0,)
    mirror: tuple | None = (0, 1)
    normalization: tuple = ("ZScoreNormalization",)
    margin: int = 0


KINDS = {
    "3d": Kind(),
    "no mirroring, CT": Kind(mirror=None, normalization=("CTNormalization",)),
    "smaller than a window": Kind(shape=(7, 12, 15)),
    "unchanged spacing": Kind(spacing=(1.3, 1.0, 0.9)),
    "2d": Kind(patch=(16, 16), target=(1.0, 0.9), shape=(5, 30, 22)),
    "2d, thick slices": Kind(patch=(16, 16), target=(0.7, 0.9), spacing=THICK, shape=(5, 30, 22)),
    "thick slices": Kind(target=(2.5, 0.7, 0.9), spacing=THICK, shape=(6, 34, 30), patch=(8, 16, 16)),
    "thick slices, transposed": Kind(
        target=(2.5, 0.7, 0.9), spacing=(0.8, 4.0, 0.8), shape=(34, 6, 30), patch=(8, 16, 16), transpose=(1, 0, 2)
    ),
    "transposed": Kind(transpose=(2, 0, 1)),
    "regions": Kind(labels=unet_model.REGIONS),
    "ignore label": Kind(labels={**unet_model.LABELS, "ignore": 4}),
    "folds": Kind(folds=(0, 1, 2)),
    "2d, folds": Kind(patch=(16, 16), target=(1.0, 0.9), shape=(5, 30, 22), folds=(0, 1)),
    "cropped": Kind(margin=4, shape=(20, 30, 28)),
    "masked normalisation": Kind(margin=4, shape=(20, 30, 28), more={"use_mask_for_norm": [True]}),
    "torch": Kind(more=unet_model.resampling("torch")),
    "cubic logits": Kind(more=unet_model.resampling(order_probabilities=3)),
    "no resampling": Kind(
        more={f"resampling_fn_{w}": "no_resampling_hack" for w in ("data", "seg", "probabilities")}
        | {f"resampling_fn_{w}_kwargs": {} for w in ("data", "seg", "probabilities")},
        spacing=(1.3, 1.0, 0.9),
    ),
}


def _model_and_image(folder: Path, kind: Kind) -> tuple[Path, Path]:
    name = "2d" if len(kind.patch) == 2 else "3d_fullres"
    plans = {name: unet_model.configuration(kind.patch, kind.target, kind.normalization, **kind.more)}
    model = unet_model.model(
        folder / "model",
        plans,
        name=name,
        labels=kind.labels,
        transpose=kind.transpose,
        folds=kind.folds,
        mirror=kind.mirror,
    )
    return model, unet_model.image(folder / "images/case_0000.nii.gz", kind.shape, kind.spacing, margin=kind.margin)


def _by_nnunet(model: Path, images: list[list[Path]], output: Path, folds=(0,), previous=None, **options) -> None:
    output.mkdir()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    outputs = [str(output / files[0].name.removesuffix("_0000.nii.gz")) for files in images]
    files = [list(map(str, files)) for files in images]
    predictor.predict_from_files_sequential(files, outputs, folder_with_segs_from_prev_stage=previous, **options)


def _same_file(ours: Path, theirs: Path) -> None:
    """Labels differ in at most 1 of 10 000 voxels, all else in nothing."""
    a, b = sitk.ReadImage(str(ours)), sitk.ReadImage(str(theirs))
    assert a.GetPixelID() == b.GetPixelID()
    for key in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(a, key)() == getattr(b, key)()
    assert {k: a.GetMetaData(k) for k in a.GetMetaDataKeys()} == {k: b.GetMetaData(k) for k in b.GetMetaDataKeys()}
    a, b = sitk.GetArrayFromImage(a), sitk.GetArrayFromImage(b)
    assert len(np.unique(b)) > 1  # there is something to compare
    assert np.mean(a != b) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_nnunets(kind: str, tmp_path: Path):
    model, image = _model_and_image(tmp_path, KINDS[kind])
    folds = KINDS[kind].folds
    _by_nnunet(model, [[image]], tmp_path / "theirs", folds)
    predictor = load_predictor(model, folds=folds, device="cpu")
    predictor.predict_from_files(str(image.parent), str(tmp_path / "ours"))
    _same_file(tmp_path / "ours/case.nii.gz", tmp_path / "theirs/case.nii.gz")
    for name in ("plans.json", "dataset.json"):
        assert json.loads((tmp_path / "ours" / name).read_text()) == json.loads(
            (tmp_path / "theirs" / name).read_text()
        )
    assert (tmp_path / "ours/predict_from_raw_data_args.json").is_file()
    assert len(list((tmp_path / "ours").iterdir())) == 4


def test_probabilities(tmp_path: Path):
    for name, labels in (("labels", None), ("regions", unet_model.REGIONS)):
        model, image = _model_and_image(
            tmp_path / name, Kind(labels=labels, margin=3, transpose=(1, 2, 0), folds=(0, 1))
        )
        theirs, ours = tmp_path / name / "theirs", tmp_path / name / "ours"
        _by_nnunet(model, [[image]], theirs, (0, 1), save_probabilities=True)
        load_predictor(model, device="cpu").predict_from_files(str(image.parent), str(ours), save_probabilities=True)
        _same_file(ours / "case.nii.gz", theirs / "case.nii.gz")
        a, b = (np.load(folder / "case.npz")["probabilities"] for folder in (ours, theirs))
        assert a.dtype == b.dtype and a.shape == b.shape
        # float16 logits: where one is rounded to its neighbour, a probability near one half moves by 0.004
        assert np.abs(a - b).max() < 0.01 and np.mean(np.abs(a - b) > 1e-6) < 0.02
        a, b = (pickle.loads((folder / "case.pkl").read_bytes()) for folder in (ours, theirs))
        assert a == b


def test_second_stage_of_a_cascade(tmp_path: Path):
    first = unet_model.configuration((12, 16, 16), (1.6, 1.4, 1.4), next_stage="3d_cascade_fullres")
    second = unet_model.configuration((12, 16, 16), (1.3, 1.0, 0.9), previous_stage="3d_lowres")
    plans = {"3d_lowres": first, "3d_cascade_fullres": second}
    image = unet_model.image(tmp_path / "images/case_0000.nii.gz", (20, 30, 28), (1.7, 0.8, 1.0), margin=3)
    before, after = (unet_model.model(tmp_path / name, plans, name=name) for name in plans)
    load_predictor(before, device="cpu").predict_from_files(str(image.parent), str(tmp_path / "before"))
    assert len(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "before/case.nii.gz"))))) > 1
    previous = str(tmp_path / "before")
    _by_nnunet(after, [[image]], tmp_path / "theirs", previous=previous)
    predictor = load_predictor(after, device="cpu")
    predictor.predict_from_files(str(image.parent), str(tmp_path / "ours"), folder_with_segs_from_prev_stage=previous)
    _same_file(tmp_path / "ours/case.nii.gz", tmp_path / "theirs/case.nii.gz")
    (tmp_path / "before/case.nii.gz").unlink()
    with pytest.raises(CasesFailed) as failed:
        predictor.predict_from_files(str(image.parent), str(tmp_path / "o"), folder_with_segs_from_prev_stage=previous)
    assert "predict this case with the previous stage" in str(failed.value.errors["case"])


def test_what_only_nnunet_knows_is_left_to_nnunet(tmp_path: Path, monkeypatch):
    """Resampling, preprocessor and label manager of somebody's own nnU-Net."""
    kind = KINDS["cropped"]
    model, image = _model_and_image(tmp_path, kind)
    _by_nnunet(model, [[image]], tmp_path / "theirs")

    class OwnPreprocessor(DefaultPreprocessor):
        pass

    class OwnLabelManager(LabelManager):
        def convert_probabilities_to_segmentation(self, predicted_probabilities):
            return super().convert_probabilities_to_segmentation(predicted_probabilities)

    predictor = load_predictor(model, device="cpu")
    monkeypatch.setattr(type(predictor.configuration_manager), "preprocessor_class", OwnPreprocessor)
    manager = predictor.label_manager
    predictor.label_manager = OwnLabelManager(manager.label_dict, manager.regions_class_order)
    predictor.predict_from_files(str(image.parent), str(tmp_path / "ours"))
    _same_file(tmp_path / "ours/case.nii.gz", tmp_path / "theirs/case.nii.gz")
    monkeypatch.setattr(resampling, "_name", lambda function: "")
    predictor.predict_from_files(str(image.parent), str(tmp_path / "again"))
    _same_file(tmp_path / "again/case.nii.gz", tmp_path / "theirs/case.nii.gz")


def test_flat_images_of_several_channels(tmp_path: Path):
    plans = {"2d": unet_model.configuration((32, 32), (1.0, 1.0), ["RGBTo01Normalization"] * 3)}
    model = unet_model.model(tmp_path / "model", plans, name="2d", reader="NaturalImage2DIO", ending=".png")
    (tmp_path / "images").mkdir()
    for name, size in (("a", (40, 50)), ("b", (20, 90))):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)).save(
            tmp_path / f"images/{name}_0000.png"
        )
    files = sorted((tmp_path / "images").iterdir())
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    (tmp_path / "theirs").mkdir()
    outputs = [str(tmp_path / f"theirs/{name}") for name in "ab"]
    predictor.predict_from_files_sequential([[str(file)] for file in files], outputs)
    load_predictor(model, device="cpu").predict_from_files(str(tmp_path / "images"), str(tmp_path / "ours"))
    for name in ("a.png", "b.png"):
        ours, theirs = (np.asarray(Image.open(tmp_path / folder / name)) for folder in ("ours", "theirs"))
        assert np.mean(ours != theirs) <= 1e-4 and len(np.unique(theirs)) > 1
