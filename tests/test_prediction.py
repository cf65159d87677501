"""Prediction against nnU-Net's own: the same labels, files and headers, for everything that plans can ask for."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tiny_model
import torch
import unet_model
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from PIL import Image

import nnunet_lgms
from nnunet_lgms import inference
from nnunet_lgms.channel_files import images_left_out
from nnunet_lgms.cli import main
from nnunet_lgms.inference import load_predictor
from nnunet_lgms.prediction import logits, one_case, resampling, sliding_window
from nnunet_lgms.prediction.cases import CasesFailed, read_case
from nnunet_lgms.prediction.sliding_window import SlidingWindow
from nnunet_lgms.splines import thick_axis

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


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A 2D model of three channels and a folder with pictures of several sizes."""
    folder = tmp_path_factory.mktemp("flat")
    plans = {"2d": unet_model.configuration((32, 32), (1.0, 1.0), ["RGBTo01Normalization"] * 3)}
    model = unet_model.model(folder / "model", plans, name="2d", reader="NaturalImage2DIO", ending=".png")
    (folder / "images").mkdir()
    for name, size in {"a": (40, 50), "b": (20, 90), "c": (300, 280), "d": (32, 32), "e": (31, 70)}.items():
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)).save(
            folder / f"images/{name}_0000.png"
        )
    return model, folder / "images"


@pytest.mark.parametrize("windows", [32, 8, 1])
def test_flat_images_share_batches(flat: tuple[Path, Path], tmp_path: Path, monkeypatch, windows: int):
    model, images = flat
    files = sorted(images.iterdir())
    names = [file.name.removesuffix("_0000.png") for file in files]
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    (tmp_path / "theirs").mkdir()
    outputs = [str(tmp_path / f"theirs/{name}") for name in names]
    predictor.predict_from_files_sequential([[str(file)] for file in files], outputs)

    monkeypatch.setitem(logits.VOXELS, "cpu", windows * 4 * 32 * 32)  # and their mirrored copies
    predictor = load_predictor(model, device="cpu")
    groups: list[int] = []
    together = predictor._logits_of_flat_images
    monkeypatch.setattr(
        predictor, "_logits_of_flat_images", lambda images: groups.append(len(images)) or together(images)
    )
    predictor.predict_from_files(str(images), str(tmp_path / "ours"))
    # c has 340 windows; b and e 5, a 6, d 1
    assert groups == {32: [2, 2], 8: [2], 1: []}[windows]
    for name in names:
        ours, theirs = (np.asarray(Image.open(tmp_path / folder / f"{name}.png")) for folder in ("ours", "theirs"))
        assert np.mean(ours != theirs) <= 1e-4 and len(np.unique(theirs)) > 1


def test_one_of_several_flat_images_fails_alone(flat: tuple[Path, Path], monkeypatch):
    model, images = flat
    monkeypatch.setitem(logits.VOXELS, "cpu", 1 << 20)
    predictor = load_predictor(model, device="cpu")
    files = [[str(images / f"{name}_0000.png")] for name in "abd"]
    expected = predictor.predict_from_files(files, None)
    preprocess = one_case.preprocess

    def infinite(samples, previous, properties, *rest):
        return preprocess(samples, previous, properties, *rest) * (np.inf if samples.shape[-1] == 90 else 1)

    monkeypatch.setattr(one_case, "preprocess", infinite)
    with pytest.raises(CasesFailed, match="1 of 3 cases are not predicted: image 2 .*infinity or NaN"):
        predictor.predict_from_files(files, None)
    monkeypatch.setattr(one_case, "preprocess", preprocess)
    for ours, theirs in zip(predictor.predict_from_files(files, None), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A 3D model and an image for it."""
    return _model_and_image(tmp_path_factory.mktemp("volume"), KINDS["cropped"])


def test_python_gives_back_what_it_was_given(volume: tuple[Path, Path]):
    model, file = volume
    seen = []
    labels, probabilities = nnunet_lgms.predict(
        model, file, device="cpu", return_probabilities=True, progress=lambda done, total: seen.append((done, total))
    )
    assert labels.shape == KINDS["cropped"].shape and probabilities.shape == (4, *labels.shape)
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 1
    picture = sitk.ReadImage(str(file))
    found = nnunet_lgms.predict(model, picture, device="cpu")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), labels)
    assert found.GetDirection() == picture.GetDirection() and found.GetOrigin() == picture.GetOrigin()
    picture = nib.load(file)
    found, found_probabilities = nnunet_lgms.predict(model, picture, device="cpu", return_probabilities=True)
    assert isinstance(found, nib.Nifti1Image)
    np.testing.assert_allclose(found.affine, picture.affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found.dataobj).T, labels)
    np.testing.assert_array_equal(found_probabilities, probabilities)
    samples = np.asarray(picture.dataobj).T[None]
    kept = samples.copy()
    several = nnunet_lgms.predict(model, [samples, samples], spacing=KINDS["cropped"].spacing, device="cpu")
    assert len(several) == 2
    np.testing.assert_array_equal(several[1], labels)
    np.testing.assert_array_equal(samples, kept)
    np.testing.assert_array_equal(nnunet_lgms.predict(model, [[file]], device="cpu")[0], labels)


def test_python_says_what_is_wrong_with_an_image(volume: tuple[Path, Path], tmp_path: Path):
    model, file = volume

    def refused(image, **options) -> str:
        with pytest.raises(ValueError) as error:
            nnunet_lgms.predict(model, image, device="cpu", **options)
        return str(error.value)

    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "colours.png")
    assert "colours.png is none of the .nii.gz files" in refused(tmp_path / "colours.png")
    assert "The array is flat, the model takes volumes" in refused(np.zeros((1, 20, 20), np.float32))
    flat = sitk.GetImageFromArray(np.ones((20, 20), np.float32))
    assert "The image is flat, the model takes volumes" in refused(flat)
    sitk.WriteImage(flat, str(tmp_path / "flat.nii.gz"))
    assert "flat.nii.gz is flat, the model takes volumes" in refused(tmp_path / "flat.nii.gz")
    assert "A list of 2 is one image of as many channels, and the model takes 1" in refused([file, file])
    assert "empty list" in refused([])
    assert "The image is 7: give a file" in refused(7)
    (tmp_path / "short.nii.gz").write_bytes(file.read_bytes()[:3000])
    assert "damaged or was cut short" in refused(tmp_path / "short.nii.gz")


def test_a_broken_case_is_named_and_the_others_go_on(volume: tuple[Path, Path], tmp_path: Path, capsys):
    model, file = volume
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a", "c"):
        shutil.copy(file, images / f"{name}_0000.nii.gz")
    (images / "b_0000.nii.gz").write_bytes(file.read_bytes()[:3000])
    samples = sitk.GetArrayFromImage(sitk.ReadImage(str(file))).astype(np.float32)
    samples[0, 0, 0] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(samples), images / "d_0000.nii.gz")
    (images / "._a_0000.nii.gz").write_text("macOS")
    out = tmp_path / "out"
    words = [
        "predict",
        "-i",
        str(images),
        "-o",
        str(out),
        "-m",
        str(model),
        "-f",
        "0",
        "-device",
        "cpu",
        "--disable_tta",
    ]
    assert main([*words, "--json-times", str(tmp_path / "times.json")]) == 1
    said = capsys.readouterr().err
    assert "[2/4] b: " in said and "cut short" in said and "2 of 4 cases are not predicted: b, d" in said
    assert "[4/4] d: " in said and "NaN or infinity" in said and f"The others are in {out}." in said
    assert sorted(f.name for f in out.glob("*.nii.gz")) == ["a.nii.gz", "c.nii.gz"]
    times = json.loads((tmp_path / "times.json").read_text())
    assert times["seconds"]["total"] > times["seconds"]["start"] > 0
    assert times["cases"]["a"].keys() == {"read", "preprocess", "network", "export", "write"}
    shutil.copy(file, images / "b_0000.nii.gz")
    (images / "d_0000.nii.gz").unlink()
    before = (out / "a.nii.gz").stat().st_mtime_ns
    (out / "c.nii.gz").unlink()
    left = out / f".{2**30}.c.nii.gz"  # of a call that was killed: no process has this number
    left.write_text("half")
    other = out / f".{2**30}.z.nii.gz"  # of another part
    other.write_text("half")
    assert main([*words, "--continue_prediction"]) == 0
    assert "1 of 3 cases are predicted already" in capsys.readouterr().err
    assert sorted(f.name for f in out.glob("*.nii.gz")) == sorted([other.name, "a.nii.gz", "b.nii.gz", "c.nii.gz"])
    assert (out / "a.nii.gz").stat().st_mtime_ns == before
    assert main([*words, "-num_parts", "2", "-part_id", "1"]) == 0
    assert "[1/1] b" in capsys.readouterr().err


def test_channels_are_those_of_their_numbers(
    volume: tuple[Path, Path], flat: tuple[Path, Path], tmp_path: Path, capsys
):
    """A case without channel 0, or with a gap, is refused by name, and the others go on."""
    model, file = volume
    images = tmp_path / "images"
    images.mkdir()
    for name in ("one_0000", "two_0001"):
        shutil.copy(file, images / f"{name}.nii.gz")

    def predicted(model: Path, images: Path, out: str) -> tuple[str, list[str]]:
        words = ["-i", str(images), "-o", str(tmp_path / out), "-m", str(model), "-device", "cpu", "--disable_tta"]
        assert main(["predict", *words]) == 1
        labels = sorted(f.name for f in (tmp_path / out).iterdir() if f.suffix != ".json")
        return capsys.readouterr().err, labels

    shutil.copy(file, images / "CAP_0000.NII.GZ")
    said, labels = predicted(model, images, "volumes")
    assert "rename CAP_0000.NII.GZ to CAP_0000.nii.gz." in said
    assert "[2/2] two: The channels of two are two_0001.nii.gz, not two_0000.nii.gz: give every channel once" in said
    assert labels == ["one.nii.gz"]

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in (
        "all_0000",
        "all_0001",
        "all_0002",
        "gap_0000",
        "gap_0002",
        "gap_0003",
        "off_0001",
        "off_0002",
        "off_0003",
    ):
        Image.fromarray(np.full((32, 32), 7, np.uint8)).save(pictures / f"{name}.png")
    said, labels = predicted(flat[0], pictures, "flat")
    assert "not gap_0000.png, gap_0001.png, gap_0002.png" in said and "The channels of off are off_0001.png" in said
    assert labels == ["all.png"]

    with pytest.raises(ValueError, match="The channels of two are"):
        load_predictor(model, device="cpu").predict_from_files(str(images), None)
    swapped = [pictures / f"all_000{channel}.png" for channel in (0, 2, 1)]
    with pytest.raises(ValueError, match="not all_0000.png, all_0001.png, all_0002.png: give every channel once"):
        nnunet_lgms.predict(flat[0], swapped, device="cpu")
    # files that somebody lists may be called as they are
    nnunet_lgms.predict(model, images / "two_0001.nii.gz", device="cpu")
    for channel, name in enumerate(("red", "green", "blue")):
        shutil.copy(pictures / f"all_000{channel}.png", pictures / f"{name}.png")
    nnunet_lgms.predict(flat[0], [pictures / f"{name}.png" for name in ("red", "green", "blue")], device="cpu")


def test_only_labels_of_the_same_model_are_gone_on_with(volume: tuple[Path, Path], tmp_path: Path, capsys):
    model, file = volume
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for name in ("a", "b"):
        shutil.copy(file, images / f"{name}_0000.nii.gz")
    _by_nnunet(model, [[images / "a_0000.nii.gz"]], out)  # which does not say of what trainer, configuration and folds

    def predict(model: Path, *more: str) -> tuple[int, str]:
        words = ["-i", str(images), "-o", str(out), "-device", "cpu", "--disable_tta", "--continue_prediction"]
        code = main(["predict", *words, "-m", str(model), *more])
        return code, capsys.readouterr().err

    def copy(name: str, file: str, **changes) -> Path:
        other = shutil.copytree(model, tmp_path / name)
        content = json.loads((other / file).read_text())
        (other / file).write_text(json.dumps(content | changes))
        return other

    def refused(model: Path, *more: str) -> str:
        before = {path: path.read_bytes() for path in out.iterdir()}
        code, said = predict(model, *more)
        assert code == 2 and "holds predictions of another model" in said
        assert {path: path.read_bytes() for path in out.iterdir()} == before
        return said

    dataset = copy("dataset", "plans.json", dataset_name="Dataset904_Other")
    assert "dataset_name 'Dataset903_Tiny', and this model has 'Dataset904_Other'" in refused(dataset)
    labels = copy("labels", "dataset.json", labels={"background": 0, "c": 1, "b": 2, "a": 3})
    assert "its dataset.json has labels" in refused(labels)
    configurations = json.loads((model / "plans.json").read_text())["configurations"]
    coarser = {"3d_fullres": configurations["3d_fullres"] | {"spacing": [2.0, 2.0, 2.0]}}
    assert "its plans.json has spacing" in refused(copy("spacing", "plans.json", configurations=coarser))

    more = copy("more", "plans.json", configurations=configurations | {"another": {"inherits_from": "3d_fullres"}})
    code, said = predict(more)  # what was planned beside it does not matter
    assert code == 0 and "1 of 2 cases are predicted already" in said
    shutil.copytree(more / "fold_0", more / "fold_1")
    shutil.copy(more / "fold_0/checkpoint_final.pth", more / "fold_0/checkpoint_best.pth")
    assert "has folds ['0'], and this model has ['0', '1']" in refused(more, "-f", "0", "1")
    assert "has checkpoint 'checkpoint_final.pth'" in refused(more, "-chk", "checkpoint_best.pth")
    with pytest.raises(ValueError, match="another model"):
        load_predictor(dataset, device="cpu").predict_from_files(
            [[str(images / "a_0000.nii.gz")]], [str(out / "a")], overwrite=False
        )

    whole = (out / "a.nii.gz").read_bytes()
    for junk in (b"", b"junk", whole[: len(whole) // 2]):
        (out / "a.nii.gz").write_bytes(junk)
        code, said = predict(model)
        assert code == 0 and "a.nii.gz is no label map that can be read: it is predicted anew." in said
        assert "1 of 2 cases are predicted already" in said and "[1/1] a" in said
    for labels in out.glob("*.nii.gz"):
        labels.unlink()
    assert predict(dataset)[0] == 0  # nothing would be kept


@pytest.mark.parametrize(
    ("ending", "name", "said"),
    [
        (".nii.gz", "noidx.nii.gz", "rename noidx.nii.gz to noidx_0000.nii.gz."),
        (".nii.gz", "x_00000.nii.gz", "rename x_00000.nii.gz to x_00000_0000.nii.gz."),
        (".nii.gz", "y_000.nii.gz", "rename y_000.nii.gz to y_000_0000.nii.gz."),
        (".nii.gz", "CAP_0000.NII.GZ", "rename CAP_0000.NII.GZ to CAP_0000.nii.gz."),
        (".nii.gz", "gz_0001.nii", "convert gz_0001.nii to gz_0001.nii.gz."),
        (".png", "jpg_0000.jpg", "convert jpg_0000.jpg to jpg_0000.png."),
        (".png", "bmp.bmp", "convert bmp.bmp to bmp_0000.png."),
        (".own", "a.own", "rename a.own to a_0000.own."),
    ],
)
def test_what_looks_like_an_image_and_is_left_out_is_named(tmp_path: Path, ending: str, name: str, said: str):
    for other in ("a_0000" + ending, "dataset.json", "notes.txt", "._a.nii.gz", ".hidden.png", name):
        (tmp_path / other).touch()
    (tmp_path / "folder.png").mkdir()
    line = images_left_out(tmp_path, ending)
    assert line.startswith(f"1 file of {tmp_path} looks like an image and is left out") and line.endswith(said)
    (tmp_path / "z.nii.gz").touch()
    line = images_left_out(tmp_path, ending)
    assert line.startswith(f"2 files of {tmp_path} look like images") and line.endswith(said)
    (tmp_path / "z.nii.gz").unlink()
    (tmp_path / name).unlink()
    assert images_left_out(tmp_path, ending) == ""


def test_wrong_options_are_said_in_one_sentence(volume: tuple[Path, Path], tmp_path: Path, capsys, monkeypatch):
    model, file = volume
    monkeypatch.delenv("nnUNet_results", raising=False)
    images, out = ["-i", str(file.parent)], ["-o", str(tmp_path / "out")]

    def refused(*words: str) -> str:
        assert main(["predict", *words]) == 2
        return capsys.readouterr().err

    assert "Which model?" in refused(*images, *out)
    for more in (["-d", "903"], ["-c", "2d"], ["-tr", "nnUNetTrainer"], ["-p", "nnUNetPlans"]):
        said = refused(*images, *out, "-m", str(model), *more)
        assert "either by its folder" in said and f"leave out -m or {' '.join(more)}" in said
    assert "nnUNet_results is not set" in refused(*images, *out, "-d", "903", "-c", "2d")
    assert "-step_size 0: give more than 0" in refused(*images, *out, "-m", str(model), "-step_size", "0")
    assert "-part_id 2 of -num_parts 2" in refused(*images, *out, "-m", str(model), "-num_parts", "2", "-part_id", "2")
    assert "is no folder" in refused("-i", str(file), *out, "-m", str(model))
    assert "-o is the folder of the images" in refused(*images, "-o", str(file.parent), "-m", str(model))
    assert "has no fold_3" in refused(*images, *out, "-m", str(model), "-f", "3")
    (tmp_path / "none").mkdir()
    assert "has no images named CASE_0000.nii.gz" in refused("-i", str(tmp_path / "none"), *out, "-m", str(model))
    assert not list(tmp_path.rglob("plans.json"))  # of a model that then predicts nothing


class Small(torch.nn.Module):
    """A network on a device that holds a batch of so many windows."""

    def __init__(self, network: torch.nn.Module, largest: int):
        super().__init__()
        self.network, self.largest, self.batches = network, largest, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(x))
        if len(x) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return self.network(x)

    def load_state_dict(self, weights, strict=True, assign=False):
        return self.network.load_state_dict(weights)


def test_out_of_memory_makes_batches_smaller_and_then_another_device_compute(volume, monkeypatch):
    model, file = volume
    expected = nnunet_lgms.predict(model, file, device="cpu")
    said: list[str] = []
    predictor = load_predictor(model, device="cpu", talk=said.append)
    monkeypatch.setitem(logits.VOXELS, "cpu", 1 << 15)  # several windows
    case = read_case(
        [str(file)], None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    network = predictor.network = Small(predictor.network, largest=2)
    np.testing.assert_array_equal(predictor.predict_single_npy_array(case[0], case[2]), expected)
    assert max(network.batches) > 2 and said == [
        f"Batches of {n} windows need more memory than there is: {n // 2} at a time." for n in (8, 4)
    ]
    n = len(network.batches)
    predictor.predict_single_npy_array(case[0], case[2])
    assert max(network.batches[n:]) == 2  # remembered

    # a device that has no room even for one window, and one that has
    cpu, said[:] = torch.device("cpu"), []
    network.largest = 0
    ways = [(cpu, cpu), (cpu, cpu), (cpu, cpu)]
    monkeypatch.setattr(predictor, "_ways", lambda: ways)
    attempts = []
    segmented = predictor._segmented

    def attempt(*arguments):
        attempts.append(arguments)
        network.largest = 8 if len(attempts) == 3 else 0
        return segmented(*arguments)

    monkeypatch.setattr(predictor, "_segmented", attempt)
    np.testing.assert_array_equal(predictor.predict_single_npy_array(case[0], case[2]), expected)
    assert len(attempts) == 3 and sum("the GPU has not enough memory" in line for line in said) == 2


def test_a_network_that_gives_no_numbers_is_no_prediction(volume: tuple[Path, Path]):
    model, file = volume
    predictor = load_predictor(model, device="cpu")
    predictor.list_of_parameters[0]["decoder.seg_layers.0.bias"][0] = torch.nan
    with pytest.raises(CasesFailed, match="gave infinity or NaN"):
        predictor.predict_from_files([[str(file)]], None)


def test_logits_are_nnunets(volume: tuple[Path, Path]):
    """What others call: the whole volume's logits, of all models or of the network as it is."""
    model, _ = volume
    data = torch.randn(1, 15, 40, 20)
    ours = load_predictor(model, device="cpu")
    theirs = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    theirs.initialize_from_trained_model_folder(str(model), (0,))
    for name in ("predict_logits_from_preprocessed_data", "predict_sliding_window_return_logits"):
        a, b = (getattr(predictor, name)(data.clone()) for predictor in (ours, theirs))
        assert a.dtype == b.dtype == torch.float16
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.002)


def test_a_network_of_an_old_trainer_is_built(volume: tuple[Path, Path], monkeypatch):
    """Trainers from before nnU-Net 2.8 have another signature."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    def build(arch_class_name, arch_kwargs, req_import, n_input, n_output, enable_deep_supervision=True):
        return get_network_from_plans(
            arch_class_name, arch_kwargs, req_import, n_input, n_output, deep_supervision=enable_deep_supervision
        )

    expected = nnunet_lgms.predict(*volume, device="cpu")
    monkeypatch.setattr(nnUNetTrainer, "build_network_architecture", staticmethod(build))
    np.testing.assert_array_equal(nnunet_lgms.predict(*volume, device="cpu"), expected)


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.tuples(*[st.tuples(st.integers(1, 9), st.integers(1, 9)) for _ in range(3)]),
    spacings=st.tuples(st.sampled_from([(1, 1, 1), THICK, (1, 5, 1)]), st.sampled_from([(1, 1, 1), (6.0, 1, 1)])),
    order=st.sampled_from([1, 3]),
    kind=st.sampled_from(["skimage", "torch"]),
)
def test_resampling_is_nnunets_and_the_runtimes(shapes, spacings, order, kind):
    old, new = zip(*shapes)
    volume = np.random.default_rng(0).normal(size=(2, *old)).astype(np.float32)
    entries = unet_model.resampling(kind, order_data=order)
    function = ConfigurationManager({"architecture": {}, **entries}).resampling_fn_data
    expected = np.asarray(function(volume.copy(), new, *spacings))
    ours = resampling.as_matrices(function, old, new, *spacings)
    np.testing.assert_allclose(ours(torch.from_numpy(volume)).numpy(), expected, atol=2e-5)
    if kind == "skimage" and find_spec("onnxruntime"):
        from nnunet_lgms.runtime.description import Resampling
        from nnunet_lgms.runtime.resampling import axis_matrices, resample

        rule = Resampling("resample_data_or_seg_to_shape", order, 0, None)
        thick = thick_axis(None, *spacings)
        matrices = axis_matrices(rule, old, new, *spacings)
        without_torch = np.stack([resample(channel.copy(), matrices, thick) for channel in volume])
        np.testing.assert_allclose(ours(torch.from_numpy(volume)).numpy(), without_torch, atol=2e-6)


def test_a_slab_goes_through_a_volume_as_a_whole_would(monkeypatch):
    """Windows that overlap in any way, two models, planes handed on one at a time."""
    monkeypatch.setitem(sliding_window.CHUNK, "cpu", 1)
    data, weights = torch.randn(1, 23, 6, 5), torch.rand(4, 4, 4).half() + 0.1
    starts = [(z, y, x) for z in (0, 1, 4, 5, 6, 9, 12, 16, 19) for y in (0, 2) for x in (0, 1)]
    window = SlidingWindow(data, starts, (4, 4, 4), False, weights, heads=2, n_models=2, at_once=3)
    rows = list(window.rows(lambda model, x: torch.cat([x, -x], 1) * (model + 1), lambda n: None))
    assert all(part.shape == (2, 1, 6, 5) for part in rows)
    found = torch.cat(rows, 1).float()
    expected = torch.cat([data, -data]) * 1.5
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-2)
    assert window.thickness < 23


WITHOUT = """
import sys, torch
from nnunet_lgms.cli import main
assert main(sys.argv[1:]) == 0
heavy = ("torch._dynamo", "matplotlib", "nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
print([name for name in heavy if name in sys.modules])
from nnunetv2.inference import predict_from_raw_data
from torch._dynamo import OptimizedModule
stands = predict_from_raw_data.OptimizedModule
linear = torch.nn.Linear(1, 1)
print(stands is OptimizedModule, isinstance(linear, stands), isinstance(torch.compile(linear), stands))
"""


@pytest.mark.slow
@pytest.mark.parametrize("network", ["U-Net", "LGMSNet"])
def test_a_prediction_imports_neither_compiler_nor_trainer(network: str, volume: tuple[Path, Path], tmp_path: Path):
    """Half of the start of the command, and nnU-Net finds no trainer of ours without nnUNet_extTrainer."""
    model, image = volume
    if network == "LGMSNet":
        model = tiny_model.model_folder(tmp_path, "Dataset001_Discs")
        image = tiny_model.raw_dataset(tmp_path / "raw", seeds=(1,)) / "imagesTr/case_1_0000.png"
    words = ["predict", "-i", str(image.parent), "-o", str(tmp_path / "out"), "-m", str(model), "-device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "nnUNet_extTrainer"}
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT, *words], env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines()[-2:] == ["[]", "False False True"]


def test_the_trainers_whose_networks_are_known_are_those_there_are(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "trainers"))
    trainers = importlib.import_module("lgmsnet")
    assert set(trainers.__all__) == inference.LGMSNETS
    for name in trainers.__all__:
        build = getattr(trainers, name).build_network_architecture
        assert build is trainers.nnUNetTrainerLGMSNet.build_network_architecture


FAULTS = """
import resource, numpy
from nnunet_lgms.cli.predict import keep_freed_memory
keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    numpy.empty(1 << 26, numpy.uint8).fill(1)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one")
def test_memory_that_is_freed_is_used_again():
    """64 MiB are 16 384 pages of 4 KiB, which the system would give anew."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    said = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    assert int(said.stdout) < 20
