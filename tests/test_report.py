"""The page of an evaluation: what it claims, what its pictures show, and how it looks in a browser."""

import base64
import io
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dataset_replicas import disc, picture, save
from matplotlib.colors import to_rgb
from pages import LAPTOP, PHONE, check_fits, opened
from PIL import Image

from nnunet_lgms.cli import main
from nnunet_lgms.evaluation import curves
from nnunet_lgms.evaluation.evaluate import evaluate
from nnunet_lgms.evaluation.labels import LabelSet
from nnunet_lgms.evaluation.metrics import compute_metrics, surface_dice
from nnunet_lgms.evaluation.page import interval, number, p_value, signed, verdict
from nnunet_lgms.evaluation.pictures import LABEL_COLOURS, case_pictures
from nnunet_lgms.evaluation.statistics import PairedTest, compare
from nnunet_lgms.nnunet_files import Reader

pytestmark = pytest.mark.skipif(find_spec("monai") is None, reason="needs the extra [evaluation]")


def test_a_winner_is_named_where_the_test_shows_one():
    rng = np.random.default_rng(0)
    good = rng.uniform(0.7, 0.9, 20)
    (clear,) = compare({"ours": good, "theirs": good - rng.uniform(0.01, 0.05, 20)}, "Dice")
    assert clear.better == "ours" and verdict(clear) == "ours is better"
    (further,) = compare({"ours": good, "theirs": good - rng.uniform(0.01, 0.05, 20)}, "HD95")
    assert further.better == "theirs"
    (two_cases,) = compare({"ours": np.array([0.9, 0.8]), "theirs": np.array([0.1, 0.2])}, "Dice")
    assert two_cases.p == pytest.approx(0.5) and two_cases.better == "" and verdict(two_cases) == "no difference shown"
    noisy = {name: good - rng.normal(shift, 0.02, 20) for name, shift in (("b", 0.002), ("c", 0.009))}
    three = compare({"a": good, **noisy}, "Dice")
    assert all(test.better == "" for test in three if test.p_holm >= 0.05)
    assert verdict(PairedTest("a", "b", 0.1, "", float("nan"), float("nan"), 0)) == "no difference shown"


def test_numbers_have_digits_that_are_worth_reading():
    assert (number(0.87654), number(12.3456), signed(-12.3456), signed(float("nan"))) == (
        "0.877",
        "12.35",
        "−12.35",
        "–",
    )
    assert interval(0.81, 0.9) == "[0.810, 0.900]" and interval(float("nan"), float("nan")) == ""
    assert (p_value(0.0312), p_value(0.00004)) == ("0.031", "4e-5")


def _pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))).astype(int)


def _near(pixels: np.ndarray, colour: str) -> np.ndarray:
    return np.abs(pixels - 255 * np.array(to_rgb(colour))).sum(axis=-1) < 90


def test_a_case_shows_labels_in_their_colours_and_the_slice_with_most_errors():
    reference = np.zeros((6, 40, 40), np.uint8)
    reference[:, 5:15, 5:15], reference[:, 25:35, 25:35] = 1, 2
    prediction = reference.copy()
    prediction[4, 25:35, 25:35] = 0  # a whole label is missed here
    prediction[1, 5:7, 5:15] = 0  # and a little of the other there
    shown = case_pictures(prediction, reference, {"one": (1,), "two": (2,)}, (4, 1, 1), None)
    assert (shown["shown"], shown["n_slices"], shown["numbers"]) == (4, 6, [1, 2, 3, 4, 5, 6])
    pixels = np.split(_pixels(shown["uri"]), 6, axis=1)[shown["shown"]]
    first, second = (_near(pixels, colour) for colour in LABEL_COLOURS[:2])
    zoom = len(pixels) // 40
    outlines = [near[edge * zoom : edge * zoom + 3, (edge + 5) * zoom] for near, edge in ((first, 5), (second, 25))]
    assert all(map(np.any, outlines))  # of the reference
    middle = pixels[10 * zoom, 10 * zoom]  # filled where predicted
    assert middle[0] - middle[2] > 60
    np.testing.assert_allclose(pixels[30 * zoom, 30 * zoom], 90, atol=12)  # empty where it is missed


def test_thick_pixels_keep_their_shape():
    mask = np.zeros((20, 40), np.uint8)
    mask[5:15, 5:15] = 1
    shown = case_pictures(mask, mask, {"x": (1,)}, (3.0, 1.0), None)
    height, width = _pixels(shown["uri"]).shape[:2]
    assert height / width == pytest.approx(20 * 3 / 40, rel=0.02) and shown["numbers"] == []


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    """Two models on six flat images, one with probabilities that are what they say."""
    for seed in range(1, 7):
        reference = disc(seed).astype(np.uint8)
        save(tmp_path / f"references/case_{seed}.png", reference)
        save(tmp_path / f"images/case_{seed}_0000.png", picture(seed, 3))
        for model, shift in (("ours", 1), ("a model with a rather long name", 3)):
            save(tmp_path / model / f"case_{seed}.png", np.roll(reference, shift, axis=1))
        rng = np.random.default_rng(seed)
        probability = rng.uniform(0, 1, reference.shape)
        drawn = rng.uniform(0, 1, reference.shape) < probability
        save(tmp_path / f"drawn/case_{seed}.png", drawn.astype(np.uint8))
        heads = np.stack([1 - probability, probability])[:, None].astype(np.float32)
        np.savez_compressed(tmp_path / f"ours/case_{seed}.npz", probabilities=heads)
    content = {"labels": {"background": 0, "lesion": 1}, "file_ending": ".png", "channel_names": {"0": "x"}}
    (tmp_path / "ours/dataset.json").write_text(json.dumps(content))
    return tmp_path


def test_calibration_of_probabilities_that_are_what_they_say(predictions: Path):
    models = {"ours": predictions / "ours"}
    labels = LabelSet({"lesion": (1,)})
    evaluation = evaluate(models, predictions / "drawn", labels, Reader(".png"), n_resamples=9, workers=1)
    predicted, share = curves.calibration(evaluation, "ours")["lesion"]
    np.testing.assert_allclose(predicted, np.linspace(0.05, 0.95, 10), atol=0.01)
    np.testing.assert_allclose(share, predicted, atol=0.04)
    (predictions / "ours/case_1.npz").unlink()
    assert curves.probability_files(evaluation, "ours") is None


def test_surface_dice_of_several_distances_is_that_of_each():
    one, other = disc(2), np.roll(disc(2), 3, axis=1)
    several = surface_dice(one, other, (1.5, 0.5), [0.5, 1, 2])
    assert several == pytest.approx([compute_metrics(one, other, (1.5, 0.5), t)["NSD"] for t in (0.5, 1, 2)])
    assert several[0] < several[-1]


def _report(predictions: Path) -> Path:
    words = ["evaluate", predictions / "ours", predictions / "references", "--images", predictions / "images"]
    compared = f"a model with a rather long name={predictions / 'a model with a rather long name'}"
    assert main([*map(str, words), "--name", "ours", "--compare", compared, "--bootstrap", "50"]) == 0
    return predictions / "ours/evaluation/report.html"


def test_the_report_has_curves_where_there_are_probabilities(predictions: Path):
    html = _report(predictions).read_text("utf-8")
    assert "Calibration, ours" in html and "Surface Dice, ours" in html and "Calibration, a model" not in html
    assert html.count("ours is better") >= 1 and "what is shown" in html


@pytest.mark.slow
@pytest.mark.parametrize("width", [LAPTOP, PHONE])
def test_the_report_fits_into_a_browser(predictions: Path, width: int):
    with opened(_report(predictions), width) as page:
        check_fits(page, width)


def test_the_keyboard_leads_through_the_slices_of_a_volume(tmp_path: Path):
    """Each place of the slider shows its slice, as the picture of all has them side by side."""
    reference = np.zeros((7, 30, 30), np.uint8)
    for z in range(1, 6):
        reference[z, 5:15, 3 * z : 3 * z + 6] = 1
    wrong = reference.copy()
    wrong[3] = 0
    for name, labels in (("references", reference), ("ours", wrong)):
        (tmp_path / name).mkdir()
        sitk.WriteImage(sitk.GetImageFromArray(labels), tmp_path / name / "case.nii.gz")
    words = ["evaluate", tmp_path / "ours", tmp_path / "references", "--labels", "organ=1", "--bootstrap", "50"]
    assert main(list(map(str, words))) == 0
    with opened(tmp_path / "ours/evaluation/report.html", LAPTOP) as page:
        slider, view = page.get_by_label("slice of case"), page.locator(".slices")
        left = "e => e.getBoundingClientRect().left"

        def shown() -> tuple[str, float]:
            window, picture = view.evaluate(left), view.locator("img").evaluate(left)
            return page.locator("figure output").inner_text(), (window - picture) / view.evaluate("e => e.clientWidth")

        assert shown() == ("4", pytest.approx(2, abs=0.01))  # slices 2 to 6 hold something, 4 has the errors
        slider.focus()
        page.keyboard.press("ArrowRight")
        assert shown() == ("5", pytest.approx(3, abs=0.01)) and slider.get_attribute("aria-valuetext") == "slice 5"
        for _ in range(9):
            page.keyboard.press("ArrowLeft")
        assert shown() == ("2", pytest.approx(0, abs=0.01))
