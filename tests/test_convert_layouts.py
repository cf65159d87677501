"""Every converter on an exact replica of its dataset's folders, checked by nnU-Net's own integrity check."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from dataset_replicas import REPLICAS, disc, picture
from PIL import Image

from nnunet_lgms.data.convert import convert
from nnunet_lgms.data.datasets import DESCRIPTIONS
from nnunet_lgms.data.masks import read_mask

pytestmark = pytest.mark.usefixtures("verify_in_threads")


def test_every_dataset_has_a_replica_and_a_line_in_the_documentation():
    assert {name for name, _ in REPLICAS} == set(DESCRIPTIONS)
    lines = (ROOT / "docs/how-to/data-and-evaluation.md").read_text().splitlines()
    for name, description in DESCRIPTIONS.items():
        (line,) = (line for line in lines if line.startswith(f"| `{name}` |"))
        assert str(description.published_cases[0]) in line


@pytest.mark.parametrize("replica", REPLICAS, ids="-".join)
def test_replica_converts(replica: tuple[str, str], tmp_path: Path):
    name, (write, identifiers) = replica[0], REPLICAS[replica]
    write(tmp_path / "download")
    description = DESCRIPTIONS[name]
    result = convert(description, tmp_path / "download", 7, raw=tmp_path / "raw", workers=1)

    assert list(result.identifiers) == identifiers and not result.skipped
    assert result.folder == tmp_path / "raw" / f"Dataset007_{description.title}"
    written = {path.name for path in (result.folder / "imagesTr").iterdir()}
    assert written == {f"{identifier}_0000{description.file_ending}" for identifier in identifiers}
    labels = {path.name for path in (result.folder / "labelsTr").iterdir()}
    assert labels == {f"{identifier}{description.file_ending}" for identifier in identifiers}
    assert [path.name for path in (tmp_path / "raw").iterdir()] == [result.folder.name]  # nothing else is left

    dataset_json = json.loads((result.folder / "dataset.json").read_text())
    assert dataset_json["numTraining"] == len(identifiers)
    assert list(dataset_json["channel_names"].values()) == list(description.channel_names)


@pytest.mark.parametrize("replica", [key for key in REPLICAS if DESCRIPTIONS[key[0]].kind == "image"], ids="-".join)
def test_labels_are_the_published_masks(replica: tuple[str, str], tmp_path: Path):
    """Whatever the file type of the mask, the label is the circle that the replica drew."""
    name, (write, identifiers) = replica[0], REPLICAS[replica]
    write(tmp_path / "download")
    folder = convert(DESCRIPTIONS[name], tmp_path / "download", 7, raw=tmp_path / "raw", workers=1).folder
    for identifier in identifiers:
        label = np.asarray(Image.open(folder / "labelsTr" / f"{identifier}.png"))
        image = np.asarray(Image.open(folder / "imagesTr" / f"{identifier}_0000.png"))
        assert label.dtype == np.uint8 and set(np.unique(label)) == {0, 1}
        assert image.dtype == np.uint8 and image.shape[:2] == label.shape
        assert image.shape[2:] == ((3,) if len(DESCRIPTIONS[name].channel_names) == 3 else ())
        number = int(identifier.split("_")[-1].removeprefix("IMD").removeprefix("cju"))
        if name == "stu":
            expected = np.asarray(Image.fromarray(disc(number, 32, 32)).resize(label.shape, Image.Resampling.NEAREST))
        else:
            expected = disc(number + 10 * identifier.startswith("malignant"))
        # JPEG masks and resized ones may differ by edge pixels
        tolerance = 0.03 if name in ("kvasir", "stu") else 0
        assert np.mean(label != expected) <= tolerance
        if name not in ("kvasir", "isic2018", "stu", "busi"):  # lossless and not turned to grey
            np.testing.assert_array_equal(image, picture(number, len(DESCRIPTIONS[name].channel_names)))


def test_volumes_are_copied_unchanged(tmp_path: Path):
    REPLICAS["kits23", "published"][0](tmp_path / "download")
    folder = convert(DESCRIPTIONS["kits23"], tmp_path / "download", 7, raw=tmp_path / "raw", workers=1).folder
    for part, name in (("imagesTr/case_00003_0000", "imaging"), ("labelsTr/case_00003", "segmentation")):
        source = tmp_path / f"download/dataset/case_00003/{name}.nii.gz"
        assert (folder / f"{part}.nii.gz").read_bytes() == source.read_bytes()
    dataset_json = json.loads((folder / "dataset.json").read_text())
    assert dataset_json["labels"] == {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": [2]}
    assert dataset_json["regions_class_order"] == [1, 3, 2]


def test_btcv_takes_the_thirty_training_cases_only(tmp_path: Path):
    REPLICAS["btcv", "published"][0](tmp_path / "download")
    folder = convert(DESCRIPTIONS["btcv"], tmp_path / "download", 7, raw=tmp_path / "raw", workers=1).folder
    assert not list(folder.rglob("*0061*"))
    labels = json.loads((folder / "dataset.json").read_text())["labels"]
    assert len(labels) == 14 and labels["right kidney"] == 2 and labels["left adrenal gland"] == 13
    assert nib.load(folder / "labelsTr/btcv_0021.nii.gz").shape == (12, 10, 8)


@pytest.mark.parametrize(
    "mode, full_scale", [("1", 255), *((mode, scale) for mode in ("L", "P", "RGB", "RGBA") for scale in (1, 255))]
)
def test_masks_of_every_pixel_type_are_read_alike(mode: str, full_scale: int, tmp_path: Path):
    mask = disc(3)
    Image.fromarray(mask.astype(np.uint8) * full_scale).convert(mode).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), mask)


def test_anti_aliased_edges_are_cut_at_half(tmp_path: Path):
    Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [[False, False, True, True]]


def test_source_may_be_the_dataset_or_a_folder_above(tmp_path: Path):
    REPLICAS["etis", "published"][0](tmp_path / "a" / "b")
    for depth, source in enumerate((tmp_path, tmp_path / "a", tmp_path / "a/b/ETIS-LaribPolypDB")):
        raw = tmp_path.parent / f"{tmp_path.name}_raw{depth}"
        assert len(convert(DESCRIPTIONS["etis"], source, 7, raw=raw, workers=1).identifiers) == 3
