"""The trained model in models/, through nnU-Net's own predictor."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

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
