"""The converters on real files. BUSI, STU and KiTS23 may not be shipped: without them the tests are skipped."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from nnunet_lgms.cli import main
from nnunet_lgms.data.convert import convert, write_splits
from nnunet_lgms.data.datasets import DESCRIPTIONS


@pytest.mark.slow
def test_busi_sample_through_the_command_line(shared_data: Path, tmp_path: Path, monkeypatch):
    """Real processes and nnU-Net's real integrity check, nothing replaced."""
    source = shared_data / "busi_original_sample"
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    assert main(["convert", "busi", str(source), "--id", "101", "--splits", "paper", "--workers", "2"]) == 0
    folder = tmp_path / "raw/Dataset101_BUSI"
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 10
    label = np.asarray(Image.open(folder / "labelsTr/benign_181.png"))
    masks = [
        np.asarray(Image.open(source / f"Dataset_BUSI_with_GT/benign/benign (181)_mask{end}.png")) for end in ("", "_1")
    ]
    assert all(mask.any() for mask in masks)
    np.testing.assert_array_equal(label, masks[0] | masks[1])
    folds = json.loads((tmp_path / "preprocessed/Dataset101_BUSI/splits_final.json").read_text())
    assert [len(fold["train"]) + len(fold["val"]) for fold in folds] == [10, 10, 10]


@pytest.mark.slow
@pytest.mark.usefixtures("verify_in_threads")
def test_stu(shared_data: Path, tmp_path: Path):
    result = convert(DESCRIPTIONS["stu"], shared_data / "stu_hospital", 102, raw=tmp_path, workers=1)
    assert len(result.identifiers) == 42
    for identifier in result.identifiers:
        image = np.asarray(Image.open(result.folder / f"imagesTr/{identifier}_0000.png"))
        label = np.asarray(Image.open(result.folder / f"labelsTr/{identifier}.png"))
        assert image.shape == label.shape and 0 < label.mean() < 0.6
        assert image[label == 1].mean() < image[label == 0].mean() + 40  # lesions are dark: the two lie on each other


@pytest.mark.slow
@pytest.mark.usefixtures("verify_in_threads")
def test_whole_busi_with_the_papers_splits(shared_data: Path, tmp_path: Path):
    """All 647 images; two of them are the same, which the paper's splits demand."""
    source = shared_data / "busi_256"
    result = convert(DESCRIPTIONS["busi"], source, 101, raw=tmp_path / "raw", workers=1)
    assert len(result.identifiers) == 647 and not result.skipped and not result.remarks
    folds = json.loads(write_splits(DESCRIPTIONS["busi"], result, tmp_path / "preprocessed").read_text())
    published = json.loads((source / "paper_splits.json").read_text())
    for fold, split in zip(folds, published.values()):
        for part, size in (("train", 452), ("val", 195)):
            assert len(fold[part]) == size
            assert sorted(fold[part]) == sorted(DESCRIPTIONS["busi"].identify(name) for name in split[part])


@pytest.mark.usefixtures("verify_in_threads")
def test_kits23_with_real_segmentations(shared_data: Path, tmp_path: Path):
    """The images cannot be had: a CT-like volume of the same geometry stands in."""
    for case in ("case_00110",):
        source = shared_data / "kits23_labels/dataset" / case / "segmentation.nii.gz"
        target = tmp_path / "dataset" / case
        target.mkdir(parents=True)
        (target / "segmentation.nii.gz").write_bytes(source.read_bytes())
        label = nib.load(source)
        volume = np.where(np.asanyarray(label.dataobj) > 0, 180, -100).astype(np.int16)
        nib.save(nib.Nifti1Image(volume, label.affine), target / "imaging.nii.gz")
    result = convert(DESCRIPTIONS["kits23"], tmp_path / "dataset", 220, raw=tmp_path / "raw", workers=1)
    assert result.identifiers == ("case_00110",)


@pytest.mark.usefixtures("verify_in_threads")
def test_btcv_layout_with_a_real_ct(shared_data: Path, tmp_path: Path):
    """A real CT with organ labels, renumbered from TotalSegmentator's classes to BTCV's."""
    ct, organs = (nib.load(shared_data / "ct_sample" / f"example_{name}.nii.gz") for name in ("ct_sm", "seg"))
    classes = {1: 1, 2: 2, 3: 3, 4: 4, 15: 5, 5: 6, 6: 7, 52: 8, 63: 9, 64: 10, 7: 11, 8: 12, 9: 13}
    values = np.asanyarray(organs.dataobj)
    label = np.zeros(values.shape, np.uint8)
    for theirs, ours in classes.items():
        label[values == theirs] = ours
    assert label.any()
    training = tmp_path / "RawData/Training"
    for folder in ("img", "label"):
        (training / folder).mkdir(parents=True)
    nib.save(ct, training / "img/img0001.nii.gz")
    nib.save(nib.Nifti1Image(label, organs.affine), training / "label/label0001.nii.gz")
    result = convert(DESCRIPTIONS["btcv"], tmp_path / "RawData", 27, raw=tmp_path / "raw", workers=1)
    assert result.identifiers == ("btcv_0001",)


@pytest.mark.usefixtures("verify_in_threads")
def test_nifti_of_another_scanner_and_header(hippocampus: Path, tmp_path: Path):
    """Real MR volumes with scaling in their headers, in BTCV's places: read, compared and copied bit by bit."""
    images = sorted((hippocampus / "imagesTr").glob("*.nii.gz"))[:2]
    for number, path in enumerate(images, start=1):
        case = path.name.removesuffix("_0000.nii.gz")
        for folder, source in (("img", path), ("label", hippocampus / "labelsTr" / f"{case}.nii.gz")):
            target = tmp_path / f"Training/{folder}/{folder}{number:04d}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    result = convert(DESCRIPTIONS["btcv"], tmp_path / "Training", 27, raw=tmp_path / "raw", workers=1)
    assert (result.folder / "imagesTr/btcv_0001_0000.nii.gz").read_bytes() == images[0].read_bytes()
