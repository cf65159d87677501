"""The trained models in models/, through nnU-Net's own predictor and by name."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from nnunet_lgms import load, predict
from nnunet_lgms.cli import main
from nnunet_lgms.nnunet_folders import model_path, shipped_models

ROOT = Path(__file__).resolve().parents[1]
CASE = "hippocampus_025"  # of the fold that the model was validated on


ISIC = ROOT / "demo" / "data" / "isic"
LESIONS = ["ISIC_0001769", "ISIC_0001852", "ISIC_0001871", "ISIC_0003462"]


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.sum(a & b) / (a.sum() + b.sum())


def by_nnunet(model: str, read: tuple[np.ndarray, dict], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    monkeypatch.setenv("nnUNet_extTrainer", str(ROOT / "trainers"))
    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(ROOT / "models" / model), (0,))
    return predictor.predict_single_npy_array(*read)


def lesion(case: str) -> np.ndarray:
    return np.asarray(Image.open(ISIC / "labelsTs" / f"{case}.png")) == 1


def test_the_hippocampus_model_finds_both_labels(hippocampus, monkeypatch):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    read = SimpleITKIO().read_images([str(hippocampus / "imagesTr" / f"{CASE}_0000.nii.gz")])
    predicted = by_nnunet("hippocampus", read, monkeypatch)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(hippocampus / "labelsTr" / f"{CASE}.nii.gz")))
    for label in (1, 2):
        assert dice(predicted == label, expected == label) > 0.8


def test_the_isic_model_finds_a_lesion(monkeypatch):
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO

    file = ISIC / "imagesTs" / f"{LESIONS[0]}_0000.png"
    predicted = by_nnunet("isic", NaturalImage2DIO().read_images([str(file)]), monkeypatch)
    assert dice(predicted[0] == 1, lesion(LESIONS[0])) > 0.95
    assert dice(predict("isic", file, device="cpu") == 1, lesion(LESIONS[0])) > 0.95


def test_weights_in_half_precision_become_float32():
    file = ROOT / "models" / "isic" / "fold_0" / "checkpoint_final.pth"
    stored = torch.load(file, weights_only=True)["network_weights"]
    network = load("isic")
    parameters = dict(network.named_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert {stored[name].dtype for name in parameters} == {torch.float16}
    assert sum(p.numel() for p in parameters.values()) == 2_321_864
    assert all(torch.equal(p, stored[name].float()) for name, p in parameters.items())


def test_lesions_of_the_demo_are_validation_cases_with_attribution():
    """Of those that the record of the training names as validated on, so the model has not seen them."""
    record = json.loads(
        (ROOT / "benchmarks" / "results" / "evidence" / "sets_isic-published-50x100-s0.json").read_text()
    )
    validated = sorted(record["scores"]["validation"]["cases"])
    assert len(validated) == 150 and validated[:4] == LESIONS
    assert sorted(file.name for file in (ISIC / "imagesTs").iterdir()) == [f"{case}_0000.png" for case in LESIONS]
    for case in LESIONS:
        image = np.asarray(Image.open(ISIC / "imagesTs" / f"{case}_0000.png"))
        assert image.shape == (256, 256, 3) and lesion(case).shape == (256, 256) and lesion(case).any()
    notice = (ISIC / "README.md").read_text("utf-8")
    assert "CC0" in notice and "Codella" in notice and "arXiv 1710.05006" in notice


def test_the_lines_for_a_picture_of_another_size(tmp_path, monkeypatch):
    """Those of the model's README, on a JPEG that is neither square nor 256 pixels."""
    size = (400, 300)
    picture = Image.open(ISIC / "imagesTs" / f"{LESIONS[0]}_0000.png").resize(size)
    picture.save(tmp_path / "lesion.jpg")
    (lines,) = re.findall(r"```python\n(.+?)```", (ROOT / "models" / "isic" / "README.md").read_text("utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    mask = np.asarray(Image.open("mask.png"))
    expected = Image.fromarray(lesion(LESIONS[0])).resize(size, Image.Resampling.NEAREST)
    assert set(np.unique(mask)) == {0, 255} and dice(mask == 255, np.asarray(expected)) > 0.95


def test_a_folder_of_images_does_not_hide_a_shipped_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "isic" / "imagesTs").mkdir(parents=True)
    assert model_path("isic") == shipped_models()["isic"]
    (tmp_path / "isic" / "plans.json").touch()
    assert model_path("isic") == Path("isic")


def test_colours_that_are_fractions_are_refused():
    """A black picture is one whatever its type."""
    pixels = np.full((3, 256, 256), 0.5)
    with pytest.raises(ValueError, match="from 0.5 to 0.5, the model takes colours from 0 to 255: multiply by 255"):
        predict("isic", pixels, device="cpu")
    for dark in (0 * pixels, (2 * pixels).astype(np.uint8)):
        assert predict("isic", dark, device="cpu").shape == (256, 256)


def test_colours_beyond_255_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"^The image has values that the model's .* 255.*\.$"):
        predict("isic", np.linspace(0, 65535, 3 * 256 * 256).reshape(3, 256, 256), device="cpu")


@pytest.mark.parametrize("model", ["hippocampus", "isic"])
@pytest.mark.parametrize("name", ["plans.json", "dataset.json", "dataset_fingerprint.json"])
def test_the_model_folder_names_no_folder_of_a_machine(model, name):
    assert '"/' not in (ROOT / "models" / model / name).read_text()


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
    with pytest.raises(ValueError, match="'brain' is neither .* hippocampus, isic"):
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
    assert "nor the name of a shipped one: there are hippocampus, isic." in capsys.readouterr().err
    assert main([*words, "hippocampus"]) == 0
    assert (tmp_path / "out" / f"{CASE}.nii.gz").is_file()


def test_export_takes_a_shipped_model_by_its_name():
    from nnunet_lgms.export.model import load_model

    _, description = load_model(Path("isic"), None)
    assert (description.configuration, description.patch_size, len(description.channel_names)) == ("2d", (256, 256), 3)
