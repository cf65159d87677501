"""`nnunet_lgms convert folder`: data of one's own, with the checks of the paper's data sets."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from dataset_replicas import disc, grey, picture, save, volume
from PIL import Image

from nnunet_lgms.cli import main
from nnunet_lgms.data.datasets import DESCRIPTIONS
from nnunet_lgms.data.folder import template
from nnunet_lgms.data.splits import isic2018_splits, patient_splits, tnscui_splits

pytestmark = pytest.mark.usefixtures("verify_in_threads")


@pytest.fixture(autouse=True)
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "pre"))


def _convert(tmp_path: Path, *words: str, images: str = "images", masks: str = "masks") -> int:
    places = [str(tmp_path / images), str(tmp_path / masks)]
    return main(["convert", "folder", *places, "--id", "7", "--name", "Own", "--workers", "1", *words])


def _label(tmp_path: Path, case: str, ending: str = ".png"):
    path = tmp_path / f"raw/Dataset007_Own/labelsTr/{case}{ending}"
    return np.asarray(Image.open(path) if ending == ".png" else nib.load(path).dataobj)


def _described(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "raw/Dataset007_Own/dataset.json").read_text())


@pytest.mark.parametrize("before, behind", [("", ""), ("", "_mask"), ("mask_", ""), ("", "-GT")])
def test_masks_of_flat_images(tmp_path: Path, before: str, behind: str, capsys):
    for number in (1, 2, 11):
        save(tmp_path / f"images/{number}.jpg", np.dstack([picture(number, 1)] * 3))
        save(tmp_path / f"masks/{before}{number}{behind}.png", grey(disc(number)))
    assert _convert(tmp_path) == 0
    assert "3 cases are in" in capsys.readouterr().out
    for number in (1, 2, 11):
        np.testing.assert_array_equal(_label(tmp_path, str(number)), disc(number))
    described = _described(tmp_path)
    assert list(described["channel_names"].values()) == ["ultrasound"]  # grey, though in three channels
    assert described["labels"] == {"background": 0, "foreground": 1}


def test_label_maps_by_value_and_by_colour(tmp_path: Path):
    inner = disc(1) & (np.arange(56) < 28)
    for number in (1, 2, 3):
        save(tmp_path / f"images/{number}.png", np.dstack([picture(number, 1)] * 2 + [picture(number + 9, 1)]))
        save(tmp_path / f"masks/{number}.png", (128 * disc(1) + 127 * inner).astype(np.uint8))
        colours = np.where(inner[..., None], (0, 128, 0), np.where(disc(1)[..., None], (255, 0, 0), 0))
        save(tmp_path / f"colours/{number}.png", colours.astype(np.uint8))
    assert _convert(tmp_path, "--labels", "disc=128", "cup=255") == 0
    np.testing.assert_array_equal(_label(tmp_path, "1"), disc(1) * 1 + inner)
    described = _described(tmp_path)
    assert described["labels"] == {"background": 0, "disc": 1, "cup": 2}
    assert list(described["channel_names"].values()) == ["rgb_to_0_1"] * 3
    words = ["--id", "8", "--labels", "cup=#008000", "disc=#ff0000"]
    assert _convert(tmp_path, *words, masks="colours") == 0
    label = np.asarray(Image.open(tmp_path / "raw/Dataset008_Own/labelsTr/1.png"))
    np.testing.assert_array_equal(label, np.where(inner, 1, 2 * disc(1)))


def test_grey_of_16_bits_is_kept(tmp_path: Path):
    for number in (1, 2):
        save(tmp_path / f"images/x{number}.png", picture(number, 1).astype(np.uint16) * 200)
        save(tmp_path / f"masks/x{number}.png", grey(disc(number)))
    assert _convert(tmp_path, "--channels", "xray") == 0
    written = np.asarray(Image.open(tmp_path / "raw/Dataset007_Own/imagesTr/x2_0000.png"))
    np.testing.assert_array_equal(written, picture(2, 1).astype(np.uint16) * 200)


def _volumes(tmp_path: Path, affine=None, values=(0, 1, 2)) -> None:
    for patient in (1, 2, 3):
        for frame in (1, 2):
            rng = np.random.default_rng(10 * patient + frame)
            name = f"p{patient}_frame{frame}"
            for channel in ("T1", "T2"):
                samples = rng.integers(0, 99, (8, 9, 5), np.int16)
                volume(tmp_path / f"images/{name}/{channel}.nii.gz", samples)
            label = np.array(values, np.uint8)[rng.integers(0, 3, (8, 9, 5))]
            volume(tmp_path / f"masks/{name}_seg.nii.gz", label, affine)


NAMES = ("--image-names", "{case}/{channel}.nii.gz", "--mask-names", "{case}_seg.nii.gz")


def test_volumes_of_several_channels_with_folds_of_whole_patients(tmp_path: Path):
    _volumes(tmp_path)
    words = [*NAMES, "--labels", "one=1", "two=2", "--channels", "T1", "T2", "--splits", "3"]
    assert _convert(tmp_path, *words, "--patient", "{patient}_frame*") == 0
    folder = tmp_path / "raw/Dataset007_Own"
    for channel, name in enumerate(("T1", "T2")):
        written = folder / f"imagesTr/p1_frame1_{channel:04d}.nii.gz"
        assert written.read_bytes() == (tmp_path / f"images/p1_frame1/{name}.nii.gz").read_bytes()
    assert (folder / "labelsTr/p1_frame1.nii.gz").read_bytes() == (tmp_path / "masks/p1_frame1_seg.nii.gz").read_bytes()
    folds = json.loads((tmp_path / "pre/Dataset007_Own/splits_final.json").read_text())
    assert sorted(case for fold in folds for case in fold["val"]) == sorted({c for f in folds for c in f["train"]})
    for fold in folds:
        assert len({case[:2] for case in fold["val"]}) == 1 and len(fold["train"]) == 4
        assert not {case[:2] for case in fold["val"]} & {case[:2] for case in fold["train"]}


def test_labels_of_volumes_become_consecutive_on_their_own_grid(tmp_path: Path):
    tilted = np.array([[0.0, -1.5, 0, 7], [1.5, 0, 0, -3], [0, 0, 3.0, 2], [0, 0, 0, 1]])
    for number in (1, 2):
        label = np.array([0, 500, 205], np.uint16)[np.random.default_rng(number).integers(0, 3, (8, 9, 5))]
        volume(tmp_path / f"images/a{number}.nii.gz", np.full((8, 9, 5), number, np.int16), tilted)
        volume(tmp_path / f"masks/a{number}.nii.gz", label, tilted)
    assert _convert(tmp_path, "--labels", "ventricle=500", "wall=205", "--channels", "CT") == 0
    before = np.asarray(nib.load(tmp_path / "masks/a1.nii.gz").dataobj)
    np.testing.assert_array_equal(_label(tmp_path, "a1", ".nii.gz"), 1 * (before == 500) + 2 * (before == 205))
    after = nib.load(tmp_path / "raw/Dataset007_Own/labelsTr/a1.nii.gz")
    np.testing.assert_allclose(after.affine, tilted, atol=1e-5)


def test_a_label_that_no_mask_holds_is_told(tmp_path: Path, capsys):
    _volumes(tmp_path)
    for number in (1, 2):
        save(tmp_path / f"flat/{number}.png", picture(number, 1))
        save(tmp_path / f"maps/{number}.png", disc(number).astype(np.uint8))
    said = "Note: no mask holds the label(s) zzz: "
    for more in (["zzz=9", "two=2"], ["two=2"]):
        assert (
            _convert(tmp_path, *NAMES, "--labels", "one=1", *more, "--channels", "T1", "T2", "--id", f"{len(more)}")
            == 0
        )
        assert (said in capsys.readouterr().out) == (len(more) == 2)
    assert _convert(tmp_path, "--labels", "zzz=9", "x=1", images="flat", masks="maps") == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii", ".NII.GZ"])
def test_any_format_that_nnunet_reads(tmp_path: Path, ending: str):
    for number in (1, 2):
        for folder, value in (("images", 40 + number), ("masks", 1)):
            (tmp_path / folder).mkdir(exist_ok=True)
            image = sitk.GetImageFromArray(np.full((3, 4, 5), value, np.uint8))
            path = tmp_path / folder / f"a{number}{ending.lower()}"
            sitk.WriteImage(image, str(path))
            path.rename(tmp_path / folder / f"a{number}{ending}")
    assert _convert(tmp_path, "--labels", "x=1", "--channels", "CT") == 0
    assert _described(tmp_path)["file_ending"] == ending.lower()


def test_stacks_of_tiff(tmp_path: Path):
    tifffile = pytest.importorskip("tifffile")
    for number in (1, 2):
        for folder, value in (("images", number), ("masks", 1)):
            (tmp_path / folder).mkdir(exist_ok=True)
            stack = np.full((3, 24, 25), value, np.uint8)
            tifffile.imwrite(tmp_path / folder / f"a{number}.tif", stack, photometric="minisblack")
    assert _convert(tmp_path, "--labels", "x=1", "--channels", "microscopy") == 0
    assert _described(tmp_path)["overwrite_image_reader_writer"] == "Tiff3DIO"


def _stacks(tmp_path: Path, spacings: dict[str, object]) -> None:
    """Stacks with the JSON files that nnU-Net reads the spacing of such files from."""
    tifffile = pytest.importorskip("tifffile")
    for n, name in enumerate(("image_1", "image_2", "image_12")):
        for folder, value in (("images", 10 + n), ("masks", 1)):
            (tmp_path / folder).mkdir(exist_ok=True)
            stack = np.full((4, 24, 25), value, np.uint8)
            stack[0] = 0
            tifffile.imwrite(tmp_path / folder / f"{name}.tif", stack, photometric="minisblack")
        if name in spacings:
            (tmp_path / "images" / f"{name}.json").write_text(json.dumps(spacings[name]))


STACK_OF = ("--labels", "x=1", "--channels", "microscopy")


def test_spacings_of_stacks_come_along(tmp_path: Path, capsys):
    """As nnU-Net's own reader takes them from the converted data set, for images and for labels."""
    from nnunet_lgms.nnunet_files import Reader

    spacings = {f"image_{n}": [2, 0.5, n] for n in (1, 2, 12)}
    _stacks(tmp_path, {name: {"spacing": spacing} for name, spacing in spacings.items()})
    assert _convert(tmp_path, *STACK_OF) == 0 and "Note" not in capsys.readouterr().out
    reader, folder = Reader(".tif", "Tiff3DIO"), tmp_path / "raw/Dataset007_Own"
    for name, spacing in spacings.items():
        assert reader.read_image(folder / f"imagesTr/{name}_0000.tif")[1].spacing == tuple(spacing)
        assert reader.read_labels(folder / f"labelsTr/{name}.tif").grid.spacing == tuple(spacing)
    (tmp_path / "images/image_2.json").write_text(json.dumps({"spacing": [9, 9, 9]}))
    assert _convert(tmp_path, *STACK_OF) == 2 and "was made from files" in capsys.readouterr().err


def test_stacks_without_a_spacing_are_told(tmp_path: Path, capsys):
    _stacks(tmp_path, {})
    assert _convert(tmp_path, *STACK_OF) == 0
    assert "no stack has a spacing, so that a voxel counts as 1 mm; a JSON file beside it" in capsys.readouterr().out
    _stacks(tmp_path, {"image_1": {"spacing": [1, 1, 2]}, "image_2": {"spacing": [1, 0, 2]}})
    (tmp_path / "masks/image_1.json").write_text(json.dumps({"spacing": [1, 1, 3]}))
    assert _convert(tmp_path, *STACK_OF, "--id", "8") == 2
    said = capsys.readouterr().err
    assert "image_12: the stack" in said and "has no spacing, as others have" in said
    assert "image_2.json has the spacing [1, 0, 2]: expected" in said
    assert "image_1: image and label" in said and "different spacings (1, 1, 2) and (1, 1, 3)" in said


def test_no_image_is_left_out_without_a_word(tmp_path: Path, capsys):
    for name in ("p1_a", "p2_a", "p3_b", "odd"):
        save(tmp_path / f"images/{name}.png", picture(len(name) + ord(name[-1]) + ord(name[1]), 1))
        save(tmp_path / f"masks/{name[:2]}.png", grey(disc(ord(name[1]))))
    (tmp_path / "images/notes.txt").write_text("x")
    words = ["--image-names", "{case}_*.png", "--mask-names", "{case}.png"]
    assert _convert(tmp_path, *words) == 2
    said = capsys.readouterr().err
    assert f"odd: the image {tmp_path / 'images/odd.png'} does not fit --image-names '{{case}}_*.png'" in said
    assert _convert(tmp_path, *words, "--skip-bad") == 0
    out, error = capsys.readouterr()
    assert "Left out, 2 case(s)" in error and "the mask" in error  # of the odd one, too
    assert "1 file(s) in" in out and "notes.txt" in out and "3 cases are in" in out
    assert _convert(tmp_path, "--id", "8", "--image-names", "p*_{case}.png", "--mask-names", "{case}.png") == 2
    assert "makes one image of" in capsys.readouterr().err
    both = tmp_path / "both"
    for n in (1, 2):
        save(both / f"{n}_image.png", picture(n, 1))
        save(both / f"{n}_mask.png", grey(disc(n)))
    save(both / "stray.png", picture(3, 1))
    words = ["--image-names", "{case}_image.png", "--mask-names", "{case}_mask.png", "--id", "9"]
    assert _convert(tmp_path, *words, images="both", masks="both") == 2
    listed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  ")]
    assert len(listed) == 1 and "stray.png does not fit" in listed[0]


def test_a_volume_of_another_format_is_named(tmp_path: Path, capsys):
    for name in ("a1.nii.gz", "a2.nii.gz", "a3.nrrd"):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
            value = 1 if folder == "masks" else int(name[1])
            sitk.WriteImage(sitk.GetImageFromArray(np.full((3, 4, 5), value, np.uint8)), tmp_path / folder / name)
    assert _convert(tmp_path, "--labels", "x=1", "--channels", "CT") == 2
    assert "a3.nrrd is of another format than most, which end in .nii.gz" in capsys.readouterr().err


def test_nnunets_own_names_are_channels(tmp_path: Path):
    for number in (1, 2):
        for channel in (0, 1):
            save(tmp_path / f"images/a_{number}_{channel:04d}.png", picture(number + 5 * channel, 1))
        save(tmp_path / f"masks/a_{number}.png", grey(disc(number)))
    assert _convert(tmp_path, "--channels", "green", "red") == 0
    written = np.asarray(Image.open(tmp_path / "raw/Dataset007_Own/imagesTr/a_2_0001.png"))
    np.testing.assert_array_equal(written, picture(7, 1))


def test_cases_that_are_numbered_like_channels(tmp_path: Path):
    for number in (1, 2):
        save(tmp_path / f"images/tr_{number:04d}.png", picture(number, 1))
        save(tmp_path / f"masks/tr_{number:04d}.png", grey(disc(number)))
    assert _convert(tmp_path) == 0
    np.testing.assert_array_equal(_label(tmp_path, "tr_0002"), disc(2))


def test_the_checks_are_those_of_the_papers_data_sets(tmp_path: Path, capsys):
    _volumes(tmp_path, affine=np.diag([-0.8, 0.8, 3, 1]), values=(0, 1, 9))
    (tmp_path / "images/p2_frame1/T2.nii.gz").unlink()
    (tmp_path / "masks/p3_frame1_seg.nii.gz").rename(tmp_path / "masks/p9_frame1_seg.nii.gz")
    assert _convert(tmp_path, *NAMES, "--labels", "one=1", "two=2", "--channels", "T1", "T2") == 2
    listed = capsys.readouterr().err
    for said in (
        "p1_frame1: image and label .* have different places in space",
        "p1_frame1: the label file .* has the value.s. 9, allowed are 0, 1, 2",
        r"p2_frame1: .* has the channel.s. T1, others have T1, T2",
        "p3_frame1: the image .* has no mask",
        "p9_frame1: the mask .* has no image",
    ):
        assert re.search(said, listed), said
    assert "7 case(s) of Own cannot be converted" in listed and not (tmp_path / "raw/Dataset007_Own").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--labels", "x"], "--labels 'x' is not understood: write liver=1, or cup=128, or lesion=#ff0000"),
        (["--labels", "background=0"], "is not understood"),
        (["--labels", "a=1", "a=2"], "--labels names a twice"),
        (["--labels", "liver=255", "tumour=255"], "--labels gives liver and tumour the same value, 255"),
        (["--labels", "liver=#ff0000", "tumour=#FF0000"], "--labels gives liver and tumour the same value, #FF0000"),
        (["--name", "a b"], "cannot be a folder of nnU-Net"),
        (["--image-names", "a.png"], "has no {case}"),
        (["--mask-names", "{name}.png"], "has {name}: there are {case}, {channel}"),
        (["--mask-names", "{case}_x.png"], "belong together by name"),
        (["--splits", "paper"], "for a folder give a number of folds"),
        (["--splits", "5"], "--splits 5 needs as many patients, there are 2"),
        (["--splits", "2", "--patient", "{patient}_*"], "--patient does not fit the case 1"),
        (["--patient", "{patient}_*"], "--patient is for --splits N"),
        (["--reader", "NoReader"], "has no images|has no reader"),
        (["--include-normal"], "is for BUSI"),
    ],
)
def test_what_cannot_be(tmp_path: Path, capsys, words: list[str], said: str):
    for number in (1, 2):
        save(tmp_path / f"images/{number}.png", picture(number, 1))
        save(tmp_path / f"masks/{number}.png", grey(disc(number)))
    assert _convert(tmp_path, *words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert any(part in last for part in said.split("|")), last
    assert not list(tmp_path.glob("raw/*Dataset007_*")) and not (tmp_path / "pre").exists()


def test_options_of_a_folder_are_for_folders(tmp_path: Path, capsys):
    assert main(["convert", "bus", str(tmp_path), "--id", "7", "--labels", "x=1"]) == 2
    assert "--labels is for convert folder: bus has its own" in capsys.readouterr().err
    assert main(["convert", "folder", str(tmp_path), "--id", "7"]) == 2
    assert "needs two folders" in capsys.readouterr().err
    assert main(["convert", "BUS", str(tmp_path), "--id", "7"]) == 2  # any case
    assert "does not look like BUS" in capsys.readouterr().err


def test_other_options_are_another_conversion(tmp_path: Path, capsys):
    for number in (1, 2):
        save(tmp_path / f"images/{number}.png", picture(number, 1))
        save(tmp_path / f"masks/{number}.png", disc(number).astype(np.uint8))
    assert _convert(tmp_path, "--labels", "a=1") == 0 and _convert(tmp_path, "--labels", "a=1") == 0
    assert "was converted before" in capsys.readouterr().out
    assert _convert(tmp_path, "--labels", "b=1") == 2
    assert "was made otherwise" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, name, found",
    [
        ("{case}_{channel}", "a_b_0001", {"case": "a_b", "channel": "0001"}),
        ("{case}/{case}_{channel}.nii.gz", "p1/p1_T1.nii.gz", {"case": "p1", "channel": "T1"}),
        ("{case}/{case}.nii.gz", "p1/p2.nii.gz", None),
        ("*/{case}[1].png", "x/a[1].png", {"case": "a"}),
    ],
)
def test_templates(text: str, name: str, found: dict | None):
    match = template(text, "--image-names").fullmatch(name)
    assert (match and match.groupdict()) == found


def test_released_splits_of_isic_and_tnscui():
    isic = isic2018_splits([f"ISIC_{n:07d}" for n in range(20000)])
    assert [(len(fold["train"]), len(fold["val"])) for fold in isic] == [(1815, 779)] * 3
    thyroid = tnscui_splits([f"tnscui_{n}" for n in range(10000)])
    assert [(len(fold["train"]), len(fold["val"])) for fold in thyroid] == [(2550, 1094)] * 3
    for folds in (isic, thyroid):
        assert all(not set(fold["train"]) & set(fold["val"]) for fold in folds)
        assert len({tuple(fold["val"]) for fold in folds}) == 3
    assert DESCRIPTIONS["isic2018"].paper_splits is isic2018_splits
    assert DESCRIPTIONS["tnscui"].paper_splits is tnscui_splits


def test_patients_are_split_as_nnunet_splits_cases():
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    names = [f"case_{n:02d}" for n in range(17)]
    theirs = [
        {part: [str(n) for n in fold[part]] for part in fold} for fold in generate_crossval_split(names, 12345, 5)
    ]
    assert patient_splits(names, n_splits=5) == theirs
