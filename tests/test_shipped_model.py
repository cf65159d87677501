"""The trained model in models/, through nnU-Net's own predictor."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_lgms import load, predict
from nnunet_lgms.cli import main

ROOT = Path(__file__).resolve().parents[1]
CASE = "hippocampus_025"  # of the fold that the model was validated on


def test_the_hippocampus_model_finds_both_labels(hippocampus, monkeypatch, tmp_path):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    monkeypatch.setenv("nnUNet_extTrainer", str(ROOT / "trainers"))
    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(ROOT / "models" / "hippocampus"), (0,))
    image, properties = SimpleITKIO().read_images([str(hippocampus / "imagesTr" / f"{CASE}_0000.nii.gz")])
    predicted = predictor.predict_single_npy_array(image, properties)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(hippocampus / "labelsTr" / f"{CASE}.nii.gz")))
    for label in (1, 2):
        a, b = predicted == label, expected == label
        assert 2 * np.sum(a & b) / (a.sum() + b.sum()) > 0.8


@pytest.mark.parametrize("name", ["plans.json", "dataset.json", "dataset_fingerprint.json"])
def test_the_model_folder_names_no_folder_of_a_machine(name):
    assert '"/' not in (ROOT / "models" / "hippocampus" / name).read_text()


MODEL = ROOT / "models" / "hippocampus"


def zipped(path: Path, root: str = "Dataset004_Hippocampus/nnUNetTrainerLGMSNet__nnUNetPlans__3d_fullres/") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in MODEL.rglob("*.*"):
            archive.write(file, root + file.relative_to(MODEL).as_posix())
    return path


def test_load_gives_the_network_by_name_folder_and_zip(tmp_path):
    networks = [load("hippocampus"), load(MODEL, fold=0), load(zipped(tmp_path / "model.zip"))]
    x = torch.randn(1, 1, 16, 24, 16)
    with torch.no_grad():
        first, *others = [network(x) for network in networks]
    assert first.shape == (1, 3, 16, 24, 16)
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda folder: (folder / "plans.json").unlink(), "has no plans.json"),
        (lambda folder: (folder / "fold_0" / "checkpoint_final.pth").unlink(), "the training is not finished"),
        (lambda folder: shutil.copytree(folder / "fold_0", folder / "fold_1"), "has the folds 0, 1: name one"),
    ],
)
def test_load_refuses(change, sentence, tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "model")
    change(folder)
    with pytest.raises(ValueError, match=sentence):
        load(folder)


def test_load_names_the_shipped_models(tmp_path):
    with pytest.raises(ValueError, match="'brain' is neither .* hippocampus"):
        load("brain")
    with pytest.raises(ValueError, match="holds 0 trained models"):
        load(zipped(tmp_path / "flat.zip", root=""))


def test_predict_takes_a_shipped_model_by_its_name():
    image = np.random.default_rng(0).normal(size=(1, 20, 24, 20))
    assert predict("hippocampus", image, spacing=(1, 1, 1), device="cpu").shape == (20, 24, 20)


def test_the_command_takes_a_shipped_model_by_its_name(hippocampus, tmp_path, capsys):
    (images := tmp_path / "images").mkdir()
    shutil.copy(hippocampus / "imagesTr" / f"{CASE}_0000.nii.gz", images)
    words = ["predict", "-i", str(images), "-o", str(tmp_path / "out"), "-device", "cpu", "--disable_tta", "-m"]
    assert main([*words, "hippocampos"]) == 2
    assert "nor the name of a shipped one: there are hippocampus." in capsys.readouterr().err
    assert main([*words, "hippocampus"]) == 0
    assert (tmp_path / "out" / f"{CASE}.nii.gz").is_file()
