"""What a conversion refuses, what it leaves behind, and the paper's splits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from dataset_replicas import REPLICAS, disc, grey, save, volume
from PIL import Image

from nnunet_lgms.cli import main
from nnunet_lgms.data import convert as convert_module
from nnunet_lgms.data import natural_images
from nnunet_lgms.data.convert import convert, write_splits
from nnunet_lgms.data.datasets import DESCRIPTIONS
from nnunet_lgms.data.splits import btcv_split, busi_splits, random_splits

pytestmark = pytest.mark.usefixtures("verify_in_threads")


@pytest.fixture
def bus(tmp_path: Path) -> Path:
    REPLICAS["bus", "published"][0](tmp_path / "download")
    return tmp_path / "download"


def _convert(name: str, source: Path, raw: Path, **options):
    return convert(DESCRIPTIONS[name], source, 7, raw=raw, workers=1, **options)


def _spoil(bus: Path) -> None:
    """One fault of every kind."""
    for number in range(4, 9):
        save(bus / f"BUS/original/{number:06d}.png", np.full((40, 56), number, np.uint8))
        save(bus / f"BUS/GT/{number:06d}.png", grey(disc(number)))
    save(bus / "BUS/GT/000004.png", grey(disc(4, 41, 56)))  # another size
    (bus / "BUS/GT/000005.png").unlink()
    path = bus / "BUS/original/000006.png"
    path.write_bytes(path.read_bytes()[:60])  # truncated
    (bus / "BUS/original/000007.png").write_bytes((bus / "BUS/original/000001.png").read_bytes())
    (bus / "BUS/original/000008.png").unlink()


def test_all_problems_are_listed_and_nothing_is_written(bus: Path, tmp_path: Path, capsys):
    _spoil(bus)
    with pytest.raises(ValueError, match=r"^5 case\(s\) of BUS cannot be converted .* nothing was written.*--skip-bad"):
        _convert("bus", bus, tmp_path / "raw")
    listed = capsys.readouterr().err
    for identifier, text in {
        "bus_000004": "the image has 56x40 pixels, the mask",
        "bus_000005": "has no mask",
        "bus_000006": "cannot be read",
        "bus_000007": "shows the same image as",
        "bus_000008": "has no image",
    }.items():
        assert any(identifier in line and text in line for line in listed.splitlines()), (identifier, listed)
    assert not (tmp_path / "raw").exists()


def test_skip_bad_converts_the_rest_and_says_what_was_left_out(bus: Path, tmp_path: Path):
    _spoil(bus)
    result = _convert("bus", bus, tmp_path / "raw", skip_bad=True)
    assert result.identifiers == ("bus_000001", "bus_000002", "bus_000003")
    assert [problem.identifier for problem in result.skipped] == [f"bus_00000{n}" for n in (4, 5, 6, 7, 8)]
    record = json.loads((result.folder / "conversion.json").read_text())
    assert [problem["identifier"] for problem in record["skipped"]] == [p.identifier for p in result.skipped]


def test_stu_may_differ_in_size_but_not_in_shape(tmp_path: Path):
    REPLICAS["stu", "published"][0](tmp_path / "download")
    result = _convert("stu", tmp_path / "download", tmp_path / "raw")
    assert Image.open(result.folder / "imagesTr/stu_2_0000.png").size == (80, 80)
    save(tmp_path / "download/Hospital/mask_1.png", grey(disc(1, 64, 90)))
    with pytest.raises(ValueError, match=r"1 case\(s\)"):
        convert(DESCRIPTIONS["stu"], tmp_path / "download", 8, raw=tmp_path / "raw", workers=1)


def test_faulty_volumes(tmp_path: Path, capsys):
    REPLICAS["kits23", "published"][0](tmp_path / "download")
    dataset = tmp_path / "download/dataset"
    volume(dataset / "case_00000/segmentation.nii.gz", np.full((6, 12, 10), 4, np.uint8))
    volume(dataset / "case_00000/imaging.nii.gz", np.full((6, 12, 10), np.nan, np.float32))
    volume(dataset / "case_00003/segmentation.nii.gz", np.ones((6, 12, 10), np.uint8), np.diag([1, 1, 5, 1]))
    path = dataset / "case_00007/imaging.nii.gz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"3 case\(s\)"):
        _convert("kits23", tmp_path / "download", tmp_path / "raw")
    listed = capsys.readouterr().err
    assert "case_00000/segmentation.nii.gz has the value(s) 4, allowed are 0, 1, 2, 3" in listed
    assert "case_00000/imaging.nii.gz holds NaN or infinity" in listed
    assert "case_00003/segmentation.nii.gz have different spacings (3, 0.8, 0.8) and (5, 1, 1)" in listed
    assert "case_00007" in listed and "cannot be read" in listed


def test_wrong_source_names_what_was_expected_and_found(bus: Path, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"expected Kvasir-SEG/images/.*jpg with .*found 6 file\(s\), such as BUS/GT/0"
    ):
        _convert("kvasir", bus, tmp_path / "raw")
    with pytest.raises(ValueError, match="does not exist: expected"):
        _convert("kvasir", tmp_path / "nowhere", tmp_path / "raw")
    (tmp_path / "set.zip").touch()
    with pytest.raises(ValueError, match="is a file; unpack it"):
        _convert("kvasir", tmp_path / "set.zip", tmp_path / "raw")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found no file at all"):
        _convert("kvasir", tmp_path / "empty", tmp_path / "raw")


def test_full_disk_leaves_nothing(bus: Path, tmp_path: Path, monkeypatch):
    real, written = Image.Image.save, []

    def save_until_full(self, path, **options):
        if len(written) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(path)
        real(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", save_until_full)
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\) and nothing of it remains"):
        _convert("bus", bus, tmp_path / "raw")
    assert len(written) == 3 and not (tmp_path / "raw").exists()


def test_interrupted_conversion_goes_on(bus: Path, tmp_path: Path, monkeypatch):
    real, written = natural_images.write, []

    def write(case, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(case.identifier)
        real(case, *rest)

    monkeypatch.setattr(natural_images, "write", write)
    with pytest.raises(KeyboardInterrupt):
        _convert("bus", bus, tmp_path / "raw")
    assert not (tmp_path / "raw/Dataset007_BUS").exists()
    (tmp_path / "raw/.Dataset007_BUS.partial/.123.conversion.json").touch()  # what a kill leaves that was being written
    again = []
    monkeypatch.setattr(natural_images, "write", lambda case, *rest: (again.append(case.identifier), real(case, *rest)))
    assert len(_convert("bus", bus, tmp_path / "raw").identifiers) == 3
    assert not list((tmp_path / "raw").rglob(".*"))
    assert written == ["bus_000001", "bus_000002"] and again == ["bus_000003"]


def test_finished_conversion_is_kept_and_never_overwritten(bus: Path, tmp_path: Path):
    folder = _convert("bus", bus, tmp_path / "raw").folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "converted before" in _convert("bus", bus, tmp_path / "raw").remarks[0]
    with pytest.raises(ValueError, match="made otherwise"):
        _convert("bus", bus, tmp_path / "raw", size=32)
    with pytest.raises(ValueError, match="belongs to Dataset007_BUS already"):
        _convert("stu", bus, tmp_path / "raw")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_conversion_is_tied_to_its_files(bus: Path, tmp_path: Path):
    """Not kept when the download was repaired after it; kept when the download is gone."""
    assert _convert("bus", bus, tmp_path / "raw").identifiers
    save(bus / "BUS/GT/000001.png", grey(disc(9)))
    with pytest.raises(ValueError, match="was made from files of .* that are others now: remove that folder"):
        _convert("bus", bus, tmp_path / "raw")
    shutil.rmtree(tmp_path / "raw/Dataset007_BUS")
    label = _convert("bus", bus, tmp_path / "raw").folder / "labelsTr/bus_000001.png"
    np.testing.assert_array_equal(np.asarray(Image.open(label)), disc(9))
    shutil.rmtree(bus)
    assert "converted before" in _convert("bus", bus, tmp_path / "raw").remarks[0]


@pytest.mark.slow
def test_an_interrupted_conversion_of_other_files_starts_anew(bus: Path, tmp_path: Path, monkeypatch):
    real = natural_images.write

    def write(case, *rest):
        if case.identifier == "bus_000002":
            raise KeyboardInterrupt
        real(case, *rest)

    monkeypatch.setattr(natural_images, "write", write)
    with pytest.raises(KeyboardInterrupt):
        _convert("bus", bus, tmp_path / "raw")
    monkeypatch.undo()
    save(bus / "BUS/GT/000001.png", grey(disc(9)))
    label = _convert("bus", bus, tmp_path / "raw").folder / "labelsTr/bus_000001.png"
    np.testing.assert_array_equal(np.asarray(Image.open(label)), disc(9))


def test_nnunet_has_the_last_word(bus: Path, tmp_path: Path, monkeypatch):
    def wrong(case, description, image_files, label_file, size):
        natural_images.Image.fromarray(np.full((4, 4), 9, np.uint8)).save(image_files[0])
        natural_images.Image.fromarray(np.full((4, 4), 9, np.uint8)).save(label_file)

    monkeypatch.setattr(natural_images, "write", wrong)
    with pytest.raises(ValueError, match="nnU-Net's integrity check refuses"):
        _convert("bus", bus, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_size_as_in_the_paper(bus: Path, tmp_path: Path):
    folder = _convert("bus", bus, tmp_path / "raw", size=32).folder
    assert {Image.open(path).size for path in folder.rglob("*.png")} == {(32, 32)}
    with pytest.raises(ValueError, match="--size 256 is for flat images"):
        convert(DESCRIPTIONS["btcv"], bus, 8, raw=tmp_path / "raw", size=256)


def test_normal_images_on_demand(tmp_path: Path):
    REPLICAS["busi", "published"][0](tmp_path / "download")
    result = _convert("busi", tmp_path / "download", tmp_path / "raw", groups=["normal"])
    assert len(result.identifiers) == 6
    assert np.asarray(Image.open(result.folder / "labelsTr/normal_1.png")).max() == 0
    assert any("2 case(s) have an empty mask" in remark for remark in result.remarks)
    with pytest.raises(ValueError, match="has no group 'normal'"):
        convert(DESCRIPTIONS["bus"], tmp_path, 8, raw=tmp_path / "raw", groups=["normal"])


def test_known_duplicate_of_busi_is_kept(tmp_path: Path):
    folder = tmp_path / "download"
    REPLICAS["busi", "published"][0](folder)
    groups = folder / "Dataset_BUSI_with_GT"
    for name in ("benign/benign (433)", "malignant/malignant (145)"):
        save(groups / f"{name}.png", np.full((40, 56, 3), 9, np.uint8))
        save(groups / f"{name}_mask.png", grey(disc(1)))
    assert {"benign_433", "malignant_145"} <= set(_convert("busi", folder, tmp_path / "raw").identifiers)


def test_busi_splits_are_the_papers():
    names = [f"benign_{i}" for i in range(1, 438)] + [f"malignant_{i}" for i in range(1, 211)]
    folds = busi_splits(names)
    assert [(len(fold["train"]), len(fold["val"])) for fold in folds] == [(452, 195)] * 3
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(names)
    assert len({tuple(fold["val"]) for fold in folds}) == 3


def test_btcv_split_is_the_usual_18_12():
    (fold,) = btcv_split([f"btcv_{n:04d}" for n in [*range(1, 11), *range(21, 41)]])
    assert len(fold["train"]) == 18 and len(fold["val"]) == 12
    assert "btcv_0008" in fold["val"] and "btcv_0005" in fold["train"] and not set(fold["train"]) & set(fold["val"])


def test_random_splits_never_change():
    names = [f"case_{n}" for n in range(10)]
    folds = random_splits(names)
    assert folds == random_splits(list(reversed(names)))
    assert [fold["val"] for fold in folds] == [
        ["case_5", "case_7", "case_8"],
        ["case_6", "case_8", "case_9"],
        ["case_0", "case_3", "case_8"],
    ]
    assert all(sorted(fold["train"] + fold["val"]) == names for fold in folds)


def test_splits_are_written_once(bus: Path, tmp_path: Path):
    result = _convert("bus", bus, tmp_path / "raw")
    path = write_splits(DESCRIPTIONS["bus"], result, tmp_path / "preprocessed")
    assert path == tmp_path / "preprocessed/Dataset007_BUS/splits_final.json"
    folds = json.loads(path.read_text())
    assert len(folds) == 3 and all(len(f["train"]) == 2 and len(f["val"]) == 1 for f in folds)
    assert write_splits(DESCRIPTIONS["bus"], result, tmp_path / "preprocessed") == path
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds other splits"):
        write_splits(DESCRIPTIONS["bus"], result, tmp_path / "preprocessed")


def test_command_line(bus: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    assert main(["convert", "bus", str(bus), "--id", "7", "--splits", "paper", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "the paper's folds are of all 163 published cases, these are of 3: results are not comparable" in out
    assert "3 cases are in" in out and "nnUNetv2_plan_and_preprocess -d 7" in out and "not listed in the text" in out
    assert main(["convert", "bus", str(bus), "--id", "0"]) == 2
    assert "dataset numbers are 1 to 999" in capsys.readouterr().err
    monkeypatch.delenv("nnUNet_raw")
    assert main(["convert", "bus", str(bus), "--id", "9"]) == 2
    assert "nnUNet_raw is not set" in capsys.readouterr().err


def test_errors_in_a_worker_process_reach_the_caller(bus: Path, tmp_path: Path):
    """Two processes, as users run it."""
    _spoil(bus)
    with pytest.raises(ValueError, match=r"5 case\(s\)"):
        convert(DESCRIPTIONS["bus"], bus, 7, raw=tmp_path / "raw", workers=2)
    assert convert_module.parallel_map(len, ["a", "bb", "ccc"], 2, "lengths") == [1, 2, 3]
