"""The metrics against nnU-Net's, closed forms and brute force; the statistics; the files; what is refused."""

import csv
import json
import re
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dataset_replicas import disc, save
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.distance import cdist

from nnunet_lgms.cli import main
from nnunet_lgms.evaluation.evaluate import FOREGROUND, evaluate
from nnunet_lgms.evaluation.labels import LabelSet
from nnunet_lgms.evaluation.metrics import compute_metrics
from nnunet_lgms.evaluation.statistics import bootstrap_mean, compare, holm
from nnunet_lgms.nnunet_files import Reader
from nnunet_lgms.nnunet_folders import raw_dataset
from nnunet_lgms.requirements import RequirementError

pytestmark = pytest.mark.skipif(find_spec("monai") is None, reason="needs the extra [evaluation]")

SPACING = (3.0, 1.5, 1.5)


def blob(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """A smooth random mask."""
    return gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2) > 0.03


def write_volume(path: Path, labels: np.ndarray, spacing=SPACING) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # nibabel's axes are x, y, z; nnU-Net's z, y, x
    nib.save(nib.Nifti1Image(labels.T.astype(np.uint8), np.diag([*spacing[::-1], 1])), path)


@pytest.fixture
def volumes(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and references of five cases with labels 0 to 3, anisotropic spacing."""
    for case in range(5):
        reference = blob(case, (10, 18, 16)).astype(int) + blob(case + 50, (10, 18, 16)) * 2
        prediction = np.roll(reference, case % 3, axis=1)
        if case == 4:
            reference[reference == 2] = 0  # label 2 is missing in the reference,
            prediction[prediction >= 2] = 0  # 2 and 3 in the prediction
        write_volume(tmp_path / f"predictions/case_{case}.nii.gz", prediction)
        write_volume(tmp_path / f"references/case_{case}.nii.gz", reference)
    return tmp_path / "predictions", tmp_path / "references"


@pytest.mark.parametrize(
    "labels",
    [
        LabelSet({"one": (1,), "two": (2,), "three": (3,)}),
        LabelSet({"all": (1, 2, 3), "inner": (2, 3)}),
        LabelSet({"one": (1,), "two": (2,)}, ignore=3),
    ],
    ids=["labels", "regions", "ignore"],
)
def test_dice_and_iou_are_nnunets(volumes: tuple[Path, Path], labels: LabelSet):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics as nnunet_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    predictions, references = volumes
    ours = evaluate({"m": predictions}, references, labels, Reader(".nii.gz"), n_resamples=50, workers=1)
    regions = [values if len(values) > 1 else values[0] for values in labels.regions.values()]
    theirs = [
        nnunet_metrics(
            str(references / f"{case}.nii.gz"),
            str(predictions / f"{case}.nii.gz"),
            SimpleITKIO(),
            regions,
            labels.ignore,
        )["metrics"]
        for case in ours.cases
    ]
    for i, region in enumerate(regions):
        for m, metric in enumerate(("Dice", "IoU")):
            expected = [case[region][metric] for case in theirs]
            np.testing.assert_allclose(ours.values["m"][:, i, m], expected, rtol=0, atol=1e-6)
            name = list(labels.regions)[i]
            assert ours.summary["m"][name][metric].mean == pytest.approx(np.nanmean(expected), abs=1e-6)
    foreground = np.mean([np.nanmean([case[region]["Dice"] for case in theirs]) for region in regions])
    assert ours.summary["m"][FOREGROUND]["Dice"].mean == pytest.approx(foreground, abs=1e-6)


def test_a_label_that_no_file_has_is_told(volumes: tuple[Path, Path], capsys):
    folders = list(map(str, volumes))
    assert main(["evaluate", *folders, "--labels", "99", "--bootstrap", "50"]) == 2
    error = capsys.readouterr().err
    assert "No prediction and no reference holds 99: the files hold the labels 1, 2, 3" in error
    assert not (volumes[0] / "evaluation").exists()
    assert main(["evaluate", *folders, "--labels", "1", "2", "3", "ghost=99", "--bootstrap", "50"]) == 0
    assert "Note: No prediction and no reference holds ghost: not evaluated" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, said",
    [
        (["--labels", "-1"], "--labels"),
        (["--labels=x=-1"], "--labels 'x=-1' is not understood"),
        (["--labels", "a=1", "b=1"], "--labels gives b and a the same value, 1"),
        (["--labels", "a=2,3", "b=3,2"], "--labels gives b and a the same value"),
        (["--labels", "a=1,2", "background=2"], "gives the value 2 to background or ignore and to another label"),
        (["--labels", "a=1,2", "ignore=2"], "gives the value 2 to background or ignore and to another label"),
        (["--labels", "a=1", "ignore=2,3"], "--labels gives ignore 2 values"),
        (["--labels", "background=1"], "no label to evaluate"),
        (["--labels", "1", "--bootstrap", "1"], "--bootstrap 1 is not possible: give a number of at least 40"),
        (["--labels", "70000"], "--labels '70000' is not understood"),
        (["--labels", "1", "--images", "/nowhere"], "--images /nowhere is no folder"),
        (["--labels", "1", "--nsd-tolerance", "nan"], "NSD tolerance is nan"),
        (["--labels", "1", "--nsd-tolerance", "inf"], "NSD tolerance is inf"),
        (["--dataset", "²"], "find dataset ²"),
        (["--dataset", ".."], ".. has no dataset.json"),
        (["--dataset", ""], "has no dataset.json"),
    ],
)
def test_options_that_cannot_be(volumes: tuple[Path, Path], capsys, monkeypatch, options, said):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    assert main(["evaluate", *map(str, volumes), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_dataset_named_by_dots_keeps_its_own_name(tmp_path: Path, monkeypatch):
    """Results go into OUTPUT/DATASET; with the name ".." they would land above OUTPUT."""
    (tmp_path / "Dataset005_X" / "imagesTr").mkdir(parents=True)
    (tmp_path / "Dataset005_X" / "dataset.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "Dataset005_X" / "imagesTr")
    assert raw_dataset("..").name == "Dataset005_X"
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    with pytest.raises(ValueError, match=r"has 0 datasets Dataset\*"):
        raw_dataset("Dataset*")


@pytest.mark.parametrize("axis, voxels", [(0, 2), (1, 3), (2, 1)])
def test_distances_of_a_shifted_box_are_in_mm(axis: int, voxels: int):
    box = np.zeros((20, 24, 24), bool)
    box[5:11, 5:15, 5:15] = True
    shifted = np.roll(box, voxels, axis)
    distance = voxels * SPACING[axis]
    metrics = compute_metrics(shifted, box, SPACING, tolerance=distance)
    assert metrics["HD95"] == pytest.approx(distance)
    assert metrics["NSD"] == pytest.approx(1)
    assert compute_metrics(shifted, box, SPACING, tolerance=0.9 * distance)["NSD"] < 1
    assert metrics["Precision"] == metrics["Recall"] == pytest.approx(metrics["Dice"])


@pytest.mark.parametrize("shape, spacing", [((30, 40), (0.5, 0.5)), ((9, 14, 12), SPACING)])
def test_hd95_against_brute_force(shape, spacing):
    prediction, reference = blob(1, shape), blob(2, shape)
    surfaces = []
    for mask in (prediction, reference):
        padded = np.pad(mask, 1)
        surfaces.append(np.argwhere(padded & ~binary_erosion(padded)) * spacing)
    distances = cdist(*surfaces)
    expected = max(np.percentile(distances.min(axis=a), 95) for a in (0, 1))
    metrics = compute_metrics(prediction, reference, spacing, 1.0)
    assert metrics["HD95"] == pytest.approx(expected, rel=1e-5)
    overlap = np.count_nonzero(prediction & reference)
    assert metrics["Precision"] == overlap / np.count_nonzero(prediction)
    assert metrics["Recall"] == overlap / np.count_nonzero(reference)
    assert 0 < metrics["NSD"] < 1


def test_mask_at_the_border_of_the_image_ends_there():
    mask = np.zeros((8, 8, 8), bool)
    mask[:, :, :4] = True
    inside = np.pad(mask, 3)
    assert compute_metrics(mask, mask, SPACING, 0)["HD95"] == 0
    assert compute_metrics(np.roll(mask, 1, 2), mask, SPACING, 1) == compute_metrics(
        np.pad(np.roll(mask, 1, 2), 3), inside, SPACING, 1
    )


def test_empty_masks():
    empty, full = np.zeros((6, 8), bool), np.ones((6, 8), bool)
    assert all(np.isnan(value) for value in compute_metrics(empty, empty, (1, 2), 1).values())
    missed = compute_metrics(empty, full, (1, 2), 1)
    invented = compute_metrics(full, empty, (1, 2), 1)
    for metrics in (missed, invented):
        assert metrics["Dice"] == metrics["IoU"] == metrics["NSD"] == 0
        assert metrics["HD95"] == pytest.approx(np.hypot(6, 16))
    assert np.isnan(missed["Precision"]) and missed["Recall"] == 0
    assert np.isnan(invented["Recall"]) and invented["Precision"] == 0


def test_bootstrap_interval():
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    mean = bootstrap_mean(values)
    assert mean.mean == pytest.approx(values.mean()) and mean.n == 400
    half = 1.96 * values.std() / np.sqrt(400)  # what the normal distribution says
    assert mean.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert mean.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert bootstrap_mean(values) == mean
    with_gaps = bootstrap_mean(np.concatenate([values, np.full(30, np.nan)]))
    assert with_gaps == mean
    one = bootstrap_mean(np.array([0.5, np.nan]))
    assert (one.mean, one.n) == (0.5, 1) and np.isnan(one.low)
    assert np.isnan(bootstrap_mean(np.full(3, np.nan)).mean)


def test_holm_correction():
    # worked by hand: 0.01*4, 0.02*3, max(0.06, 0.03*2), max(0.06, 0.04*1)
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert np.isnan(holm([float("nan"), 0.5])[0]) and holm([float("nan"), 0.5])[1] == 0.5


def test_paired_tests_between_models():
    from scipy.stats import wilcoxon

    rng = np.random.default_rng(1)
    a = rng.uniform(0.6, 0.9, 30)
    models = {"a": a, "b": a - rng.uniform(0, 0.1, 30), "same": a.copy()}
    tests = {(test.first, test.second): test for test in compare(models, "Dice")}
    assert tests["a", "b"].p == pytest.approx(wilcoxon(a, models["b"]).pvalue) and tests["a", "b"].better == "a"
    assert tests["a", "same"].p == 1 and tests["a", "same"].better == ""
    assert tests["a", "b"].p_holm == pytest.approx(3 * tests["a", "b"].p)
    assert compare({"a": a, "b": models["b"]}, "HD95")[0].better == "b"


def test_command_line_writes_table_summary_and_report(volumes: tuple[Path, Path], tmp_path: Path, capsys):
    predictions, references = volumes
    words = ["evaluate", str(predictions), str(references), "--labels", "one=1", "masses=2,3", "--name", "first"]
    words += [
        "--compare",
        f"truth={references}",
        "-o",
        str(tmp_path / "out"),
        "--bootstrap",
        "100",
        "--nsd-tolerance",
        "2",
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"first +masses +0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", out) and FOREGROUND in out
    rows = list(csv.DictReader((tmp_path / "out/cases.csv").open()))
    assert len(rows) == 2 * 5 * 2
    assert {row["Dice"] for row in rows if row["model"] == "truth"} == {"1.0"}
    summary = json.loads((tmp_path / "out/summary.json").read_text())  # fails on NaN, which is no JSON
    assert summary["unit"] == "mm" and summary["nsd_tolerance"] == 2 and "diagonal" in summary["convention"]
    (test,) = summary["tests"]["one"]["Dice"]
    # of five cases no test can show a difference
    assert (test["first"], test["second"], test["better"], test["n"]) == ("first", "truth", "", 5)
    assert test["difference"] < 0 and test["p_holm"] > 0.05
    html = (tmp_path / "out/report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:image/(png|jpeg);base64,)", html)  # needs no other file
    assert html.count("no difference shown") == 3 * 6 and "is better" not in html
    assert html.count('<figure class="case">') == 2 * 5 and "Wilcoxon" in html and "2 mm" in html
    assert not list((tmp_path / "out").glob(".*"))


def test_names_are_text_in_the_report(tmp_path: Path, capsys):
    """Neither HTML nor the mathematics of matplotlib."""
    hostile = "<script>alert(1)<b onload>$x^{$"
    for folder in (hostile, "references", hostile + "2"):
        save(tmp_path / folder / f"{hostile}.png", disc(1).astype(np.uint8))
    dataset_json = {"labels": {"background": 0, hostile: 1}, "file_ending": ".png", "channel_names": {"0": "x"}}
    (tmp_path / hostile / "dataset.json").write_text(json.dumps(dataset_json))
    words = ["evaluate", str(tmp_path / hostile), str(tmp_path / "references"), "-o", str(tmp_path / "out")]
    assert main([*words, "--compare", f"{hostile}2={tmp_path / hostile}2", "--bootstrap", "50"]) == 0
    html = (tmp_path / "out/report.html").read_text()
    assert html.count("&lt;script&gt;alert(1)&lt;b onload&gt;$x^{$") >= 4  # title, models, label, cases
    assert html.count("<script") <= 1  # the page's own
    assert "<script>alert" not in html and "<b onload" not in html


def test_flat_images_are_measured_in_pixels(tmp_path: Path, capsys):
    for number in (1, 2):
        for folder, seed in (("predictions", number + 1), ("references", number)):
            save(tmp_path / folder / f"case_{number}.png", disc(seed).astype(np.uint8))
        save(tmp_path / f"images/case_{number}_0000.png", np.full((40, 56, 3), 90, np.uint8))
    dataset_json = {"labels": {"background": 0, "lesion": 1}, "file_ending": ".png", "channel_names": {"0": "x"}}
    (tmp_path / "predictions/dataset.json").write_text(json.dumps(dataset_json))  # as nnUNetv2_predict leaves it
    words = [
        "evaluate",
        str(tmp_path / "predictions"),
        str(tmp_path / "references"),
        "--images",
        str(tmp_path / "images"),
    ]
    assert main(words) == 0
    assert "lesion" in capsys.readouterr().out
    summary = json.loads((tmp_path / "predictions/evaluation/summary.json").read_text())
    assert summary["unit"] == "pixels" and list(summary["labels"]) == ["lesion"]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_slice_is_flat_along_whichever_axis(axis: int, tmp_path: Path):
    """Across a single slice everything would be surface, and every distance next to nothing."""
    pair = {"prediction": np.roll(disc(2), 4, axis=1), "reference": disc(2), "empty": np.zeros_like(disc(2))}
    read = {}
    for name, mask in pair.items():
        spacing = np.insert([1.5, 0.5], axis, 7.0)
        write_volume(tmp_path / f"{name}.nii.gz", np.expand_dims(mask, axis), spacing)
        read[name] = Reader(".nii.gz").read_labels(tmp_path / f"{name}.nii.gz")
        assert read[name].spacing == pytest.approx((1.5, 0.5))
        np.testing.assert_array_equal(read[name].labels, mask)
    found = compute_metrics(*(read[name].labels > 0 for name in ("prediction", "reference")), (1.5, 0.5), 1.0)
    assert found == compute_metrics(pair["prediction"], pair["reference"], (1.5, 0.5), 1.0)
    assert read["empty"].grid.differences(read["reference"].grid) == ""


def test_files_with_capitals_are_taken_and_hidden_ones_left_out(volumes: tuple[Path, Path], tmp_path: Path, capsys):
    """Finder leaves `._` files beside all that it copies; some scanners write .NII.GZ."""
    predictions, references = volumes
    words = ["evaluate", str(predictions), str(references), "--labels", "1", "--bootstrap", "50", "-o"]
    assert main([*words, str(tmp_path / "before")]) == 0
    for folder in volumes:
        (folder / "case_0.nii.gz").rename(folder / "scan[0] (ü).NII.GZ")
        (folder / "._case_1.nii.gz").write_bytes(b"\0\5\x16\7" + bytes(160))
    (predictions / "._case_9.nii.gz").write_bytes(b"\0\5\x16\7" + bytes(160))
    assert main([*words, str(tmp_path / "after")]) == 0
    rows = [list(csv.reader((tmp_path / name / "cases.csv").open()))[1:] for name in ("before", "after")]
    assert sorted(row[2:] for row in rows[0]) == sorted(row[2:] for row in rows[1])
    assert {row[1] for row in rows[1]} == {"scan[0] (ü)", *(f"case_{n}" for n in (1, 2, 3, 4))}
    (references / "CASE_2.nii.gz").write_bytes((references / "case_2.nii.gz").read_bytes())
    assert main([*words, str(tmp_path / "after")]) == 0  # another name, which no prediction has
    (references / "case_2.NII.gz").write_bytes((references / "case_2.nii.gz").read_bytes())
    assert "which are one case: remove one" in _refused(capsys, *words[1:], tmp_path / "again")


@pytest.mark.parametrize("reader, same", [("NibabelIOWithReorient", True), ("SimpleITKIO", False)])
def test_predictions_in_another_order_of_axes(reader: str, same: bool, tmp_path: Path, capsys):
    """A reader that reorients gives both on one grid; for one that does not, they lie on two."""
    for case in range(2):
        labels = nib.Nifti1Image(blob(case, (16, 18, 10)).astype(np.uint8), np.diag([1.5, 1.5, 3, 1]))
        turned = labels.as_reoriented(np.array([[1, -1], [0, 1], [2, 1]]))
        for folder, image in (("predictions", turned), ("references", labels)):
            (tmp_path / folder).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine), tmp_path / folder / f"c{case}.nii.gz")
    content = {"labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz", "overwrite_image_reader_writer": reader}
    (tmp_path / "predictions/dataset.json").write_text(json.dumps(content))
    words = ["evaluate", str(tmp_path / "predictions"), str(tmp_path / "references"), "--bootstrap", "50"]
    assert main(words) == (0 if same else 2)
    if same:
        rows = csv.DictReader((tmp_path / "predictions/evaluation/cases.csv").open())
        assert [float(row["Dice"]) for row in rows] == [1, 1]


def test_a_small_tilt_of_a_large_image_is_another_place(tmp_path: Path):
    """Half a degree is little in a direction matrix and four voxels at the far side of an image."""
    angle = np.deg2rad(0.5)
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    grids = []
    for name, affine in (("a", np.eye(4)), ("b", tilt), ("c", np.eye(4) + 1e-5 * tilt)):
        nib.save(nib.Nifti1Image(np.zeros((400, 400, 2), np.uint8), affine), tmp_path / f"{name}.nii.gz")
        grids.append(Reader(".nii.gz", "NibabelIO").read_labels(tmp_path / f"{name}.nii.gz").grid)
    assert "up to 4.92 mm apart" in grids[0].differences(grids[1])
    assert grids[0].differences(grids[2], rtol=1e-3) == ""


def test_units_are_those_of_the_files(tmp_path: Path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 4, 5), np.uint8), photometric="minisblack")
    assert Reader(".tif", "Tiff3DIO").unit(tmp_path / "a.tif") == "voxels"
    (tmp_path / "a.json").write_text('{"spacing": [1, 2, 3]}')
    assert Reader(".tif", "Tiff3DIO").unit(tmp_path / "a.tif") == "mm"
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.diag([900, 900, 900, 1]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii.gz")
    assert Reader(".nii.gz", "NibabelIO").unit(tmp_path / "a.nii.gz") == "µm"
    assert Reader(".nii.gz", "SimpleITKIO").unit(tmp_path / "a.nii.gz") == "mm"


def _refused(capsys, *words) -> str:
    assert main(["evaluate", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_other_geometry_is_refused(volumes: tuple[Path, Path], tmp_path: Path, capsys):
    predictions, references = volumes
    labels = np.ones((10, 18, 16))
    write_volume(predictions / "case_0.nii.gz", labels, (3.0, 1.5, 1.4))
    write_volume(predictions / "case_1.nii.gz", labels[:-1])
    moved = np.diag([*SPACING[::-1], 1])
    moved[0, 3] = 20
    nib.save(nib.Nifti1Image(labels.T.astype(np.uint8), moved), predictions / "case_2.nii.gz")
    error = _refused(capsys, predictions, references, "--labels", 1, 2, 3, "-o", tmp_path / "out")
    assert "case_0: " in error and "different spacings (3, 1.5, 1.4) and (3, 1.5, 1.5)" in error
    assert "case_1: " in error and "different sizes (9, 18, 16) and (10, 18, 16)" in error
    assert "case_2: " in error and "different places in space" in error
    assert "3 prediction(s) cannot be evaluated" in error and not (tmp_path / "out").exists()


def test_unknown_labels_are_refused(volumes: tuple[Path, Path], capsys):
    predictions, references = volumes
    labels = np.zeros((10, 18, 16))
    labels[2, 3, 4] = 9
    write_volume(predictions / "case_3.nii.gz", labels)
    error = _refused(capsys, predictions, references, "--labels", 1)
    assert "model, case_3: the prediction has label(s) 9, which no reference knows" in error
    assert "case_2" not in error  # labels 2 and 3 are in references, though they are not evaluated


def _masks(folder: Path, value: int, seeds=(1, 2, 3)) -> Path:
    for seed in seeds:
        save(folder / f"case_{seed}.png", disc(seed) * np.uint8(value))
    return folder


def test_a_reference_with_values_that_no_label_has_is_refused(tmp_path: Path, capsys):
    """A mask of 0 and 255 among those of 0 and 1 would count as background, with a Dice of 0."""
    predictions, references = _masks(tmp_path / "predictions", 1), _masks(tmp_path / "references", 1)
    save(references / "case_2.png", disc(2) * np.uint8(255))
    error = _refused(capsys, predictions, references, "--labels", "lesion=1")
    assert f"the reference {references / 'case_2.png'} has the value(s) 255, which no label has" in error
    assert "1 reference(s) hold values" in error and "background=255, or ignore=255" in error
    assert "case_1" not in error and not (predictions / "evaluation").exists()
    content = {"labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".png", "channel_names": {"0": "x"}}
    (predictions / "dataset.json").write_text(json.dumps(content))
    save(predictions / "case_1.png", disc(1) * np.uint8(255))  # on both sides, but no label of the dataset.json
    error = _refused(capsys, predictions, references)
    assert "has the value(s) 255" in error and "model, case_1: the prediction has label(s) 255" in error


@pytest.mark.parametrize("word, precision", [("background=255", 0.5), ("ignore=255", 1)])
def test_the_command_line_says_what_other_values_are(tmp_path: Path, capsys, word: str, precision: float):
    left = np.zeros((8, 8), np.uint8)
    left[:, :4] = 1
    save(tmp_path / "predictions/a.png", np.ones((8, 8), np.uint8))
    save(tmp_path / "references/a.png", np.where(left, 1, 255).astype(np.uint8))
    words = ["evaluate", str(tmp_path / "predictions"), str(tmp_path / "references"), "--labels", "x=1", word]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    assert ("255, the ignore label, nothing is counted" in capsys.readouterr().out) == (word == "ignore=255")
    (row,) = csv.DictReader((tmp_path / "out/cases.csv").open())
    assert float(row["Precision"]) == precision
    assert list(json.loads((tmp_path / "out/summary.json").read_text())["labels"]) == ["x"]


def test_labels_that_were_not_asked_for_are_told(volumes: tuple[Path, Path], tmp_path: Path, capsys):
    words = ["evaluate", *map(str, volumes), "--labels", "1", "--bootstrap", "50", "-o", str(tmp_path / "out")]
    assert main(words) == 0
    assert "Note: The references also hold 2, 3, which no label has" in capsys.readouterr().out
    content = {"labels": {"background": 0, "a": 1, "b": 2, "c": 3}, "file_ending": ".nii.gz"}
    (volumes[0] / "dataset.json").write_text(json.dumps(content))
    assert main(words) == 0
    assert "Note" not in capsys.readouterr().out


def test_the_ignore_label_of_the_references_stays_one(tmp_path: Path, capsys):
    """Its dataset.json lies above labelsTr; with --labels the ignored half was counted as a false positive."""
    reference = np.ones((8, 8), np.uint8)
    reference[:, 4:] = 2
    save(tmp_path / "predictions/a.png", np.ones((8, 8), np.uint8))
    save(tmp_path / "raw/labelsTr/a.png", reference)
    content = {"labels": {"background": 0, "x": 1, "ignore": 2}, "file_ending": ".png", "channel_names": {"0": "x"}}
    (tmp_path / "raw/dataset.json").write_text(json.dumps(content))
    words = ["evaluate", str(tmp_path / "predictions"), str(tmp_path / "raw/labelsTr"), "--labels", "x=1"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    assert "Note: Where the references hold 2, the ignore label, nothing is counted." in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "out/cases.csv").open())
    assert float(row["Dice"]) == 1


def test_labels_of_a_selection_keep_the_ignore_label_of_the_dataset():
    described = LabelSet.from_dataset_json({"labels": {"background": 0, "kidney": [1, 2], "tumour": 2, "ignore": 4}})
    chosen = LabelSet.parse(["tumour=2"], described)
    assert chosen.regions == {"tumour": (2,)} and chosen.ignore == 4 and chosen.background == {0, 1}
    assert LabelSet.parse(["void=4"], described).ignore is None
    assert LabelSet.parse(["tumour=2", "ignore=9"], described).ignore == 9
    assert described.only({"tumour": (2,)}) == LabelSet({"tumour": (2,)}, 4, frozenset({0, 1}))


def test_damaged_and_fractional_files_are_refused(volumes: tuple[Path, Path], capsys):
    predictions, references = volumes
    (predictions / "case_0.nii.gz").write_bytes(b"no image")
    nib.save(nib.Nifti1Image(np.full((16, 18, 10), 0.5, np.float32), np.eye(4)), predictions / "case_1.nii.gz")
    error = _refused(capsys, predictions, references, "--labels", 1)
    assert "case_0.nii.gz cannot be read" in error and "case_1.nii.gz is not a label map" in error


def test_folders_that_do_not_fit_are_refused(volumes: tuple[Path, Path], tmp_path: Path, capsys):
    predictions, references = volumes
    assert "give --labels or --dataset" in _refused(capsys, predictions, references)
    assert "does not exist" in _refused(capsys, tmp_path / "nowhere", references, "--labels", 1)
    assert "is not understood" in _refused(capsys, predictions, references, "--labels", "liver")
    assert "write NAME=FOLDER" in _refused(capsys, predictions, references, "--labels", 1, "--compare", "x")
    (tmp_path / "empty").mkdir()
    assert "has no dataset.json" in _refused(capsys, predictions, references, "--dataset", tmp_path / "empty")
    for folder in (predictions, references):
        assert "is a folder of label files" in _refused(capsys, predictions, references, "--labels", 1, "-o", folder)
    assert "at least 1" in _refused(capsys, predictions, references, "--labels", 1, "--workers", 0)
    assert "no image or label files" in _refused(capsys, tmp_path / "empty", references, "--labels", 1)
    assert "has no .nii.gz files" in _refused(capsys, predictions, tmp_path / "empty", "--labels", 1)
    (references / "case_4.nii.gz").unlink()
    assert "have no reference" in _refused(capsys, predictions, references, "--labels", 1)
    (predictions / "case_4.nii.gz").rename(tmp_path / "empty/case_4.nii.gz")
    (tmp_path / "empty/case_4.nii.gz").rename(references / "case_4.nii.gz")
    error = _refused(capsys, predictions, references, "--labels", 1, "--compare", f"other={references}")
    assert "Model model lacks 1 case(s) that another model has, such as case_4" in error


def test_a_folder_is_not_compared_with_itself(volumes: tuple[Path, Path], tmp_path: Path, capsys):
    predictions, references = volumes
    link = tmp_path / "link"
    link.symlink_to(references)
    for same in (references, link):
        assert "are one folder, so that every Dice would be 1" in _refused(capsys, same, references, "--labels", 1)
    link.unlink()
    link.symlink_to(predictions)
    for same in (predictions, link):
        words = [predictions, references, "--labels", 1, "--compare", f"truth={references}", "--compare", f"b={same}"]
        assert f"--compare b={same} is the folder of model once more" in _refused(capsys, *words)
    assert not (predictions / "evaluation").exists() and not (references / "evaluation").exists()


def test_missing_extra_is_named(volumes: tuple[Path, Path], monkeypatch):
    from nnunet_lgms.evaluation import requirement

    monkeypatch.setattr(requirement, "find_spec", lambda name: None if name == "monai" else object())
    with pytest.raises(RequirementError, match=r"needs monai.*pip install "):
        evaluate({"m": volumes[0]}, volumes[1], LabelSet.parse(["1"]), Reader(".nii.gz"))


def test_labels_of_dataset_json():
    content = {"labels": {"background": 0, "kidney": [1, 2, 3], "tumor": 2, "ignore": 4}}
    labels = LabelSet.from_dataset_json(content)
    assert labels.regions == {"kidney": (1, 2, 3), "tumor": (2,)} and labels.ignore == 4
    assert labels.values == {0, 1, 2, 3}
