"""Prediction from Python, and the table of what a model does on datasets that it has not seen."""

import csv
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import tiny_model
import torch
from conftest import ROOT
from hostile import RunsCode
from PIL import Image

import nnunet_lgms
from nnunet_lgms.arrays import checked_image
from nnunet_lgms.cli import main
from nnunet_lgms.dataset_json import channel_names
from nnunet_lgms.evaluation.label_mapping import map_labels, read_mapping_file
from nnunet_lgms.evaluation.zeroshot import zero_shot
from nnunet_lgms.inference import load_predictor

needs_evaluation = pytest.mark.skipif(find_spec("monai") is None, reason="needs the extra [evaluation]")

HOME, AWAY = "Dataset901_Home", "Dataset902_Away"


@pytest.fixture(autouse=True)
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path / variable.removeprefix("nnUNet_")))
    monkeypatch.setenv("nnUNet_extTrainer", str(ROOT / "trainers"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model.model_folder(tmp_path / "results", HOME)


def test_predict_from_file_and_array(model: Path, tmp_path: Path, capfd):
    dataset = tiny_model.raw_dataset(tmp_path / "raw" / AWAY)
    file = dataset / "imagesTr/case_1_0000.png"
    labels = nnunet_lgms.predict(model, file, device="cpu")
    assert labels.shape == np.asarray(Image.open(file)).shape and set(np.unique(labels)) <= {0, 1}
    samples = np.asarray(Image.open(file))[None].astype(np.float32)
    np.testing.assert_array_equal(nnunet_lgms.predict(model, samples, device="cpu"), labels)
    out, err = capfd.readouterr()
    assert out == "" and "it/s" not in err  # quiet


def test_predict_is_nnunets_own_prediction(model: Path, tmp_path: Path):
    dataset = tiny_model.raw_dataset(tmp_path / "raw" / AWAY, seeds=(1, 2))
    (tmp_path / "out").mkdir()
    predictor = load_predictor(model, device="cpu")
    predictor.predict_from_files_sequential(str(dataset / "imagesTr"), str(tmp_path / "out"))
    for case in (1, 2):
        theirs = np.asarray(Image.open(tmp_path / f"out/case_{case}.png"))
        ours = nnunet_lgms.predict(model, dataset / f"imagesTr/case_{case}_0000.png", device="cpu")
        np.testing.assert_array_equal(ours, theirs)


def test_folds_are_averaged_or_chosen(tmp_path: Path):
    model = tiny_model.model_folder(tmp_path / "results", HOME, folds=(0, 1))
    samples = np.random.default_rng(0).normal(size=(1, 40, 40)).astype(np.float32)
    assert len(load_predictor(model, device="cpu").list_of_parameters) == 2
    first, second = (nnunet_lgms.predict(model, samples, folds=[fold], device="cpu") for fold in (0, 1))
    assert (first != second).any()


def test_predict_refuses(model: Path, tmp_path: Path, monkeypatch):
    samples = np.zeros((1, 32, 32), np.float32)
    with pytest.raises(ValueError, match="is not a trained model: it has no dataset.json"):
        nnunet_lgms.predict(tmp_path, samples)
    with pytest.raises(ValueError, match=r"has no fold_3/checkpoint_final.pth; trained are: 0\."):
        nnunet_lgms.predict(model, samples, folds=[3], device="cpu")
    with pytest.raises(ValueError, match="has 2 channel.s., the model expects 1: ultrasound"):
        nnunet_lgms.predict(model, np.zeros((2, 32, 32)), device="cpu")
    with pytest.raises(ValueError, match=r"shape \(32, 32\), expected \(C, Y, X\)"):
        nnunet_lgms.predict(model, samples[0], device="cpu")
    with pytest.raises(ValueError, match="needs its spacing"):
        nnunet_lgms.predict(model, samples[None], device="cpu")
    with pytest.raises(ValueError, match="does not exist"):
        nnunet_lgms.predict(model, tmp_path / "no.png", device="cpu")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match="cannot be read as the model's training images"):
        nnunet_lgms.predict(model, tmp_path / "text.png", device="cpu")
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "fold_0" / "checkpoint_final.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match="checkpoint_final.pth cannot be read .* it was cut short"):
        nnunet_lgms.predict(broken, samples, device="cpu")
    for wrong, at in ((np.nan, (0, 3, 4)), (np.inf, ())):
        samples[at] = wrong
        with pytest.raises(ValueError, match="The image holds NaN, infinity or more than float32 can hold, which"):
            nnunet_lgms.predict(model, samples, device="cpu")
    samples[:] = 0
    with pytest.raises(ValueError, match="The device 'tpu' is not known: use cuda, cuda:0, mps or cpu"):
        nnunet_lgms.predict(model, samples, device="tpu")
    with pytest.raises(ValueError, match="The device (cuda:99|xla) is not on this machine: use cpu"):
        nnunet_lgms.predict(model, samples, device="cuda:99")
    with pytest.raises(ValueError, match="The device xla is not on this machine: use cpu"):
        nnunet_lgms.predict(model, samples, device="xla")
    monkeypatch.delenv("nnUNet_extTrainer")
    nnunet_lgms.predict(model, samples, device="cpu")  # this package's trainers need no variable
    path = model / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), "trainer_name": "nnUNetTrainerOfMine"}, path)
    with pytest.raises(ValueError, match="nnUNet_extTrainer must name the folder"):
        nnunet_lgms.predict(model, samples, device="cpu")


def predict_with_pytorch(picture: Path):
    return nnunet_lgms.predict("isic", picture, device="cpu")


def predict_with_the_runtime(picture: Path):
    pytest.importorskip("imageio")
    from nnunet_lgms.runtime.images import read_case

    return read_case([picture], SimpleNamespace(reader="NaturalImage2DIO", channel_names=["red", "green", "blue"]))


@pytest.fixture
def volumes(model: Path, tmp_path: Path):
    """Writes a volume with one bad voxel as each kind of NIfTI file; the model reads them with nnU-Net's default."""
    nib = pytest.importorskip("nibabel")
    plans = json.loads((model / "plans.json").read_text())
    (model / "plans.json").write_text(json.dumps({**plans, "image_reader_writer": "SimpleITKIO"}))

    def write(value: float) -> list[Path]:
        samples = np.random.default_rng(0).normal(100, 20, (32, 30, 3))
        samples[20, 9, 2] = value
        files = []
        for kind, image in {
            "float32": nib.Nifti1Image(samples.astype("<f4"), np.eye(4)),
            "float64": nib.Nifti1Image(samples.astype("<f8"), np.eye(4)),
            "big_endian": nib.Nifti1Image(samples.astype(">f4"), np.eye(4), nib.Nifti1Header(endianness=">")),
        }.items():
            for ending in (".nii", ".nii.gz"):
                files.append(tmp_path / f"{kind}{ending}")
                nib.save(image, files[-1])
        return files

    return write


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_predict_refuses_a_nifti_file_that_is_not_finite(model: Path, volumes, value: float):
    """SimpleITK, nnU-Net's default reader, gives 0 for the voxel, so that its samples do not tell."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    for file in volumes(value):
        assert SimpleITKIO().read_images([str(file)])[0][0, 2, 9, 20] == 0
        with pytest.raises(ValueError, match=rf"{file.name} holds NaN or infinity, .*: clean it first\.$"):
            nnunet_lgms.predict(model, file, device="cpu")


def test_finite_nifti_files_are_predicted(model: Path, volumes):
    for file in volumes(1e10)[:2]:
        assert nnunet_lgms.predict(model, file, device="cpu").shape == (3, 30, 32)


@pytest.mark.parametrize("value", [-3.4e38, 1e30])
def test_predict_refuses_values_whose_variance_is_infinite(model: Path, volumes, value: float):
    """They would make every other voxel 0; -3.4e38 is what some programs pad with."""
    for file in volumes(value)[:2]:
        with pytest.raises(ValueError, match=r"holds values beyond 1e\+18, which would make every label background"):
            nnunet_lgms.predict(model, file, device="cpu")


@pytest.mark.parametrize("mm", [0.0, np.nan, np.inf])
def test_predict_refuses_a_nifti_file_without_spacing(model: Path, volumes, mm: float):
    """Readers make 1 mm of 0, some with a warning."""
    file = volumes(1.0)[0]
    content = bytearray(file.read_bytes())
    content[84:88] = np.float32(mm).tobytes()  # of the second axis
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"has a spacing of \(1\.0, (0\.0|nan|inf), 1\.0\) mm, .*: correct its header"):
        nnunet_lgms.predict(model, file, device="cpu")


@pytest.mark.parametrize("predict", [predict_with_pytorch, predict_with_the_runtime])
def test_predict_refuses_a_picture_that_viewers_turn(tmp_path: Path, predict):
    """The model learned from pictures that were converted, and so turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png", exif=exif)
    with pytest.raises(ValueError, match=r"a\.png says that viewers turn it \(EXIF orientation\)"):
        predict(tmp_path / "a.png")


def test_no_code_in_a_model_is_run(model: Path, tmp_path: Path):
    path = model / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), "x": RunsCode(tmp_path / "made")}, path)
    with pytest.raises(ValueError, match="holds '?.*mkdir.*would run code when loaded: it is not opened"):
        nnunet_lgms.predict(model, np.zeros((1, 32, 32), np.float32), device="cpu")
    assert not (tmp_path / "made").exists()


def test_plans_of_another_network_are_refused(model: Path):
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["2d"]["lgmsnet"] = {"widths": 32}
    (model / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ValueError, match="are of another network than its plans.json describes"):
        nnunet_lgms.predict(model, np.zeros((1, 32, 32), np.float32), device="cpu")
    (model / "plans.json").write_text("{")
    with pytest.raises(ValueError, match="plans.json is not JSON"):
        nnunet_lgms.predict(model, np.zeros((1, 32, 32), np.float32), device="cpu")


def _validation(model: Path, dataset: Path, cases, fold: int = 0) -> None:
    """Perfect validation predictions, as nnU-Net leaves them at the end of a training."""
    folder = model / f"fold_{fold}/validation"
    folder.mkdir()
    for case in cases:
        shutil.copy(dataset / f"labelsTr/case_{case}.png", folder)


@needs_evaluation
def test_references_with_other_values_are_refused_before_prediction(model: Path, tmp_path: Path, capsys):
    dataset = tiny_model.raw_dataset(tmp_path / "raw" / AWAY)
    path = dataset / "labelsTr/case_2.png"
    Image.fromarray(np.asarray(Image.open(path)) * np.uint8(127)).save(path)
    with pytest.raises(ValueError, match="1 of 4 references hold values that no label of their dataset.json has"):
        zero_shot(model, [dataset], tmp_path / "out", device="cpu", workers=1)
    assert f"the reference {path} has the value(s) 127, which no label has" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.slow
@needs_evaluation
def test_zeroshot_table(tmp_path: Path, capsys):
    model = tiny_model.model_folder(tmp_path / "results", HOME, folds=(0, 1))
    home = tiny_model.raw_dataset(tmp_path / "raw" / HOME, seeds=(1, 2, 3, 4))
    _validation(model, home, (1, 2), fold=0)
    _validation(model, home, (3, 4), fold=1)
    away = tiny_model.raw_dataset(tmp_path / "raw" / AWAY, seeds=(5, 6, 7))
    words = ["zeroshot", str(model), "902", "-o", str(tmp_path / "out"), "--device", "cpu", "--workers", "1"]
    assert main([*words, "--bootstrap", "50"]) == 0
    assert "in-domain" in capsys.readouterr().out

    rows = {row["metric"]: row for row in csv.DictReader((tmp_path / "out/zeroshot.csv").open())}
    assert float(rows["Dice"]["in_domain_mean"]) == 1 and rows["Dice"]["in_domain_n"] == "4"
    assert rows["Dice"]["zero_shot_n"] == "3"
    dice = []
    for case in (5, 6, 7):
        reference = np.asarray(Image.open(away / f"labelsTr/case_{case}.png")) == 1
        per_fold = []
        for fold in (0, 1):
            predicted = np.asarray(Image.open(tmp_path / f"out/{AWAY}/fold_{fold}/case_{case}.png")) == 1
            per_fold.append(2 * (predicted & reference).sum() / (predicted.sum() + reference.sum()))
        dice.append(np.mean(per_fold))
    assert float(rows["Dice"]["zero_shot_mean"]) == pytest.approx(np.mean(dice))
    assert float(rows["Dice"]["drop"]) == pytest.approx(1 - np.mean(dice))
    assert json.loads((tmp_path / "out/zeroshot.json").read_text())["rows"][0]["dataset"] == AWAY
    for report in (f"{AWAY}/report.html", "in_domain/fold_0/report.html", "in_domain/fold_1/report.html"):
        assert (tmp_path / "out" / report).is_file()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / f"out/{AWAY}").glob("fold_*/case_*.png")}
    assert main([*words, "--bootstrap", "50"]) == 0  # goes on from what is there
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 6


def _zero_shot_dice(model: Path, out: Path, *more: str) -> float:
    words = ["zeroshot", str(model), AWAY, "-o", str(out), "--device", "cpu", "--workers", "1", "--bootstrap", "50"]
    assert main([*words, *more]) == 0
    return float(next(csv.DictReader((out / "zeroshot.csv").open()))["zero_shot_mean"])


def _times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / f"{AWAY}/fold_0").glob("case_*.png")}


@pytest.mark.slow
@needs_evaluation
def test_kept_predictions_are_those_of_the_same_weights(model: Path, tmp_path: Path, capsys):
    """Another checkpoint, or the same name after training anew, is another model."""
    tiny_model.raw_dataset(tmp_path / "raw" / AWAY, seeds=(5, 6))
    other = tiny_model.model_folder(tmp_path / "other", HOME, folds=(1,))
    weights = model / "fold_0/checkpoint_final.pth"
    shutil.copy(other / "fold_1/checkpoint_final.pth", model / "fold_0/checkpoint_best.pth")
    best = ("--checkpoint", "checkpoint_best.pth")
    final = _zero_shot_dice(model, tmp_path / "out")
    assert _zero_shot_dice(model, tmp_path / "out", *best) == _zero_shot_dice(model, tmp_path / "fresh", *best) != final
    assert "validation cases are not those of checkpoint_best.pth: no in-domain" in capsys.readouterr().out
    assert _zero_shot_dice(model, tmp_path / "out") == final
    before = _times(tmp_path / "out")
    assert _zero_shot_dice(model, tmp_path / "out") == final and _times(tmp_path / "out") == before
    shutil.copy(other / "fold_1/checkpoint_final.pth", weights)  # trained anew
    assert _zero_shot_dice(model, tmp_path / "out") != final


@pytest.mark.slow
@needs_evaluation
def test_kept_predictions_are_those_of_the_same_images(model: Path, tmp_path: Path, capsys):
    away = tiny_model.raw_dataset(tmp_path / "raw" / AWAY, seeds=(5, 6, 7))
    predictions = tmp_path / f"out/{AWAY}/fold_0"
    _zero_shot_dice(model, tmp_path / "out")
    before = _times(tmp_path / "out")
    shutil.copy(away / "imagesTr/case_5_0000.png", away / "imagesTr/case_6_0000.png")  # another image
    (away / "imagesTr/case_7_0000.png").unlink()  # and one less
    (away / "labelsTr/case_7.png").unlink()
    (away / "imagesTr/._case_5_0000.png").write_bytes(b"what Finder leaves")
    (predictions / "mine.txt").touch()
    _zero_shot_dice(model, tmp_path / "out")
    assert "1 of 2 cases" in capsys.readouterr().out
    after = _times(tmp_path / "out")
    assert after["case_5.png"] == before["case_5.png"] and after["case_6.png"] != before["case_6.png"]
    assert len(after) == 2 and (predictions / "mine.txt").exists()
    whole = (predictions / "case_5.png").read_bytes()
    (predictions / "case_5.png").write_bytes(whole[: len(whole) // 2])  # killed while it was written
    _zero_shot_dice(model, tmp_path / "out")
    assert (predictions / "case_5.png").read_bytes() == whole
    (predictions / "made_from.json").unlink()  # nobody knows what made them
    (predictions / "case_5.png").write_bytes((predictions / "case_6.png").read_bytes())
    _zero_shot_dice(model, tmp_path / "out")
    assert (predictions / "case_5.png").read_bytes() == whole


@needs_evaluation
@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_zeroshot_compares_the_names_of_channels(model: Path, tmp_path: Path, capsys, key: str):
    away = tiny_model.raw_dataset(tmp_path / "raw" / AWAY, seeds=(5,))
    content = json.loads((away / "dataset.json").read_text())
    del content["channel_names"]
    words = ["zeroshot", str(model), AWAY, "-o", str(tmp_path / "out"), "--device", "cpu", "--workers", "1"]
    (away / "dataset.json").write_text(json.dumps(content | {key: {"0": "CT"}}))
    assert main(words) == 2
    assert "has the channel(s) CT, the model in" in (said := capsys.readouterr().err) and "expects ultrasound" in said
    (away / "dataset.json").write_text(json.dumps(content | {key: {"0": "Ultrasound"}}))
    assert main([*words, "--bootstrap", "50"]) == 0


def test_channels_are_in_the_order_of_their_numbers():
    assert channel_names({"modality": {"1": "T2", "0": "T1"}}) == ("T1", "T2")
    assert channel_names({"channel_names": {str(i): f"c{i}" for i in (10, 2, 1, 0)}}) == ("c0", "c1", "c2", "c10")


@needs_evaluation
def test_zeroshot_with_other_label_names(model: Path, tmp_path: Path, capsys):
    tiny_model.raw_dataset(tmp_path / "raw" / AWAY, {"background": 0, "cyst": 2, "tumour": 1}, seeds=(5, 6))
    words = ["zeroshot", str(model), AWAY, "-o", str(tmp_path / "out"), "--device", "cpu", "--workers", "1"]
    assert main(words) == 2
    assert "Label(s) lesion of the model have no counterpart in Dataset902_Away" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # said before anything is predicted
    (tmp_path / "map.json").write_text(json.dumps({"Away": {"lesion": "cyst"}}))
    assert main([*words, "--mapping", str(tmp_path / "map.json"), "--bootstrap", "50"]) == 0
    assert "no in-domain results" in capsys.readouterr().out  # the raw home dataset is not there
    rows = list(csv.DictReader((tmp_path / "out/zeroshot.csv").open()))
    assert {row["label"] for row in rows} == {"cyst"} and rows[0]["in_domain_mean"] == rows[0]["drop"] == ""
    reference = np.asarray(Image.open(tmp_path / f"raw/{AWAY}/labelsTr/case_5.png")) == 2
    predicted = np.asarray(Image.open(tmp_path / f"out/{AWAY}/fold_0/case_5.png")) == 1
    cases = list(csv.DictReader((tmp_path / f"out/{AWAY}/cases.csv").open()))
    dice = 2 * (predicted & reference).sum() / (predicted.sum() + reference.sum())
    assert float(cases[0]["Dice"]) == pytest.approx(dice)


@needs_evaluation
def test_zeroshot_refuses(model: Path, tmp_path: Path, capsys):
    tiny_model.raw_dataset(tmp_path / "raw" / HOME)
    tiny_model.raw_dataset(tmp_path / "raw" / AWAY, n_channels=3)

    def refused(*words) -> str:
        assert main(["zeroshot", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "is what the model was trained on" in refused(model, 901)
    assert "has 3 channel(s), the model" in refused(model, 902)
    assert "has 0 datasets 903, expected one; there are: Dataset901_Home, Dataset902_Away" in refused(model, 903)
    assert "is not a trained model" in refused(tmp_path, 902)
    (tmp_path / "map.json").write_text("[1]")
    assert "is not understood" in refused(model, 902, "--mapping", tmp_path / "map.json")
    content = json.loads((tmp_path / f"raw/{AWAY}/dataset.json").read_text())
    (tmp_path / f"raw/{AWAY}/dataset.json").write_text(json.dumps(content | {"file_ending": ".nii.gz"}))
    assert "has .nii.gz files, the model" in refused(model, 902)


def _map(model_labels: dict, dataset_labels: dict, file_content: dict | None = None):
    return map_labels({"labels": model_labels}, {"labels": dataset_labels}, "Dataset005_Other", file_content)


def test_labels_are_matched_by_name_then_by_file():
    mapping = _map({"background": 0, "Liver": 1, "spleen": 2}, {"background": 0, "spleen": 1, "liver": 4, "aorta": 2})
    assert mapping.values == {1: 4, 2: 1}
    assert mapping.target.regions == {"spleen": (1,), "liver": (4,)}  # the model knows no aorta
    assert mapping.source.regions == {"spleen": (2,), "liver": (1,)}
    both = _map({"tumour": 1, "cyst": 2}, {"lesion": 1}, {"*": {"tumour": "lesion", "2": 1}})
    assert both.values == {1: 1, 2: 1} and both.source.regions == {"lesion": (1, 2)}
    dropped = _map({"tumour": 1, "cyst": 2}, {"lesion": 1}, {"Dataset005_Other": {"tumour": "lesion", "cyst": None}})
    assert dropped.values == {1: 1, 2: 0} and dropped.source.regions == {"lesion": (1,)}


def test_regions_need_no_mapping_when_equal_and_values_otherwise():
    kits = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": [2]}
    assert _map(kits, kits).values == {} and _map(kits, kits, {"Another": {}}).target.regions["kidney"] == (1, 2, 3)
    with pytest.raises(ValueError, match=r"Label\(s\) 1, 3 of the model have no counterpart"):
        _map(kits, {"kidney": 1, "tumor": 2})
    mapping = _map(kits, {"kidney": 1, "tumor": 2}, {"*": {"1": "kidney", "3": "kidney"}})
    assert mapping.values == {1: 1, 2: 2, 3: 1} and mapping.source.regions == {"kidney": (1, 3), "tumor": (2,)}


def test_mapping_files_with_mistakes(tmp_path: Path):
    with pytest.raises(ValueError, match="names label 'liver', which the model lacks; it has lesion"):
        _map({"lesion": 1}, {"tumour": 1}, {"*": {"liver": "tumour"}})
    with pytest.raises(ValueError, match="names label 'liver', which Dataset005_Other lacks"):
        _map({"lesion": 1}, {"tumour": 1}, {"*": {"lesion": "liver"}})
    with pytest.raises(ValueError, match="nothing to evaluate"):
        _map({"lesion": 1}, {"tumour": 1}, {"*": {"lesion": None}})
    with pytest.raises(ValueError, match="is not understood"):
        read_mapping_file(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("image", "spacing", "said"),
    [
        (np.ma.masked_array(np.zeros((1, 9, 9)), mask=True), None, "is a masked array, and its mask would be ignored"),
        (np.zeros((1, 9, 9), complex), None, "holds complex128 values: give whole or real numbers"),
        (np.array([[["a"]]]), None, "holds <U1 values: give whole or real numbers"),
        (np.zeros((1, 0, 9)), None, r"has shape \(1, 0, 9\), expected"),
        (np.zeros((1, 4, 9, 9)), [1, 0, 1], r"The spacing \(1.0, 0.0, 1.0\) must be of positive numbers of mm"),
        (np.zeros((1, 4, 9, 9)), [1, np.nan, 1], "must be of positive numbers of mm"),
        (np.zeros((1, 4, 9, 9)), [1, -1, 1], "must be of positive numbers of mm"),
        (np.zeros((1, 4, 9, 9)), "x,y", "The spacing 'x,y' is no list of 3 numbers of mm"),
        (np.zeros((1, 4, 9, 9)), 1.0, "The spacing 1.0 is no list of 3 numbers of mm"),
        (np.full((1, 9, 9), 1e300), None, "more than float32 can hold"),
    ],
)
def test_arrays_that_are_no_images(image: np.ndarray, spacing: object, said: str):
    with pytest.raises(ValueError, match=said):
        checked_image(image, spacing)


def test_arrays_of_one_slice_and_spacings_that_are_arrays(model: Path):
    """The number of axes decides whether an image is flat, not the number of its slices."""
    samples = np.random.default_rng(0).normal(size=(1, 32, 32)).astype(np.float32)
    flat = nnunet_lgms.predict(model, samples, spacing=np.array([1.0, 1.0]), device="cpu")
    volume = nnunet_lgms.predict(model, samples[:, None], spacing=np.array([3.0, 1.0, 1.0]), device="cpu")
    assert flat.shape == (32, 32) and volume.shape == (1, 32, 32)
    np.testing.assert_array_equal(volume[0], flat)


def test_files_of_one_slice_keep_their_axes(model: Path, volumes, tmp_path: Path):
    volumes(0)  # the model reads volumes
    samples = np.random.default_rng(0).normal(size=(1, 24, 26)).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(samples), tmp_path / "volume.nii.gz")
    sitk.WriteImage(sitk.GetImageFromArray(samples[0]), tmp_path / "flat.nii.gz")
    assert nnunet_lgms.predict(model, tmp_path / "volume.nii.gz", device="cpu").shape == (1, 24, 26)
    assert nnunet_lgms.predict(model, tmp_path / "flat.nii.gz", device="cpu").shape == (24, 26)


def test_no_fold_is_not_all_folds(model: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="No fold of .* is named: name one of 0, or leave folds out for all"):
        nnunet_lgms.predict(model, np.zeros((1, 32, 32), np.float32), folds=[], device="cpu")
    with pytest.raises(ValueError, match="No fold of .* is named"):
        zero_shot(model, [], tmp_path / "out", folds=[])
