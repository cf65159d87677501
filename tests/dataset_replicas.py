"""Small replicas of the published folder layouts: same folders, names, formats and pixel types, made-up content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

HEIGHT, WIDTH = 40, 56


def disc(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A filled circle, (H, W) of bool; another place and radius for every seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    centre = rng.uniform(0.35, 0.65, 2) * (height, width)
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < (rng.uniform(0.15, 0.3) * height) ** 2


def picture(seed: int, channels: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A noisy image that is brighter inside `disc(seed)`, (H, W) or (H, W, 3) of uint8."""
    rng = np.random.default_rng(seed)
    samples = rng.integers(0, 120, (height, width, channels)) + 100 * disc(seed, height, width)[..., None]
    return samples.astype(np.uint8).squeeze()


def save(path: Path, samples: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(samples)
    (image.convert(mode) if mode else image).save(path)


def grey(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8) * 255


def busi(root: Path) -> None:
    folder = root / "Dataset_BUSI_with_GT"
    for group, seed in (("benign", 0), ("malignant", 10), ("normal", 20)):
        for number in (1, 2):
            name = f"{group} ({number})"
            save(folder / group / f"{name}.png", picture(seed + number, 3))
            mask = disc(seed + number) if group != "normal" else np.zeros((HEIGHT, WIDTH), bool)
            half = mask.copy()
            half[:, : WIDTH // 2] = False
            # 1-bit, RGBA and RGB masks all occur; a second lesion has a file of its own
            save(folder / group / f"{name}_mask.png", grey(half if number == 2 else mask), ("1", "RGBA")[number - 1])
            if number == 2:
                save(folder / group / f"{name}_mask_1.png", grey(mask & ~half), "RGB")


def _pairs(image: str, mask: str, channels: int, numbers=(1, 2, 3), mask_mode: str | None = None):
    """A writer of a layout with one image and one mask a case; the templates get the number."""

    def write(root: Path) -> None:
        for number in numbers:
            save(root / image.format(number), picture(number, channels))
            save(root / mask.format(number), grey(disc(number)), mask_mode)

    return write


def stu(root: Path) -> None:
    for number, size in ((1, 64), (2, 80), (3, 32)):
        save(root / f"Hospital/Test_Image_{number}.png", picture(number, 1, 32, 32))
        smooth = Image.fromarray(grey(disc(number, 32, 32))).resize((size, size), Image.Resampling.BILINEAR)
        save(root / f"Hospital/mask_{number}.png", np.asarray(smooth))


def volume(path: Path, samples: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(samples, np.diag([0.8, 0.8, 3, 1]) if affine is None else affine), path)


def btcv(root: Path) -> None:
    for number in (1, 2, 5, 6, 21):
        rng = np.random.default_rng(number)
        volume(root / f"RawData/Training/img/img{number:04d}.nii.gz", rng.integers(-200, 300, (12, 10, 8), np.int16))
        volume(root / f"RawData/Training/label/label{number:04d}.nii.gz", rng.integers(0, 14, (12, 10, 8), np.uint8))
    volume(root / "RawData/Testing/img/img0061.nii.gz", np.zeros((4, 4, 4), np.int16))


def kits23(root: Path) -> None:
    for number in (0, 3, 7):
        rng = np.random.default_rng(number)
        case = root / f"dataset/case_{number:05d}"
        volume(case / "imaging.nii.gz", rng.integers(-200, 300, (6, 12, 10), np.int16))
        volume(case / "segmentation.nii.gz", rng.integers(0, 4, (6, 12, 10), np.uint8))
        volume(case / "instances/kidney_instance-1_annotation-1.nii.gz", np.ones((6, 12, 10), np.uint8))


def cvc_colondb(root: Path) -> None:
    _pairs("CVC-ColonDB/{}.bmp", "CVC-ColonDB/p{}.bmp", 3)(root)
    for number in (1, 2, 3):
        for other in "sc":
            save(root / f"CVC-ColonDB/{other}{number}.bmp", grey(disc(number + 50)))


def endoscene(root: Path) -> None:
    _pairs("CVC-EndoSceneStill/CVC-300/bbdd/{}.bmp", "CVC-EndoSceneStill/CVC-300/gtpolyp/{}.bmp", 3)(root)
    _pairs("CVC-EndoSceneStill/CVC-612/bbdd/{}.bmp", "CVC-EndoSceneStill/CVC-612/gtpolyp/{}.tif", 3, (1, 2))(root)


def polyp_benchmark(root: Path) -> None:
    for seed, name in enumerate(("CVC-300", "CVC-ClinicDB", "CVC-ColonDB", "ETIS-LaribPolypDB", "Kvasir")):
        numbers = (10 * seed + 1, 10 * seed + 2, 10 * seed + 3)
        _pairs(f"TestDataset/{name}/images/{{}}.png", f"TestDataset/{name}/masks/{{}}.png", 3, numbers)(root)


ISIC = (
    "ISIC2018_Task1-2_Training_Input/ISIC_{:07d}.jpg",
    "ISIC2018_Task1_Training_GroundTruth/ISIC_{:07d}_segmentation.png",
)
PH2 = "PH2Dataset/PH2 Dataset images/IMD{0:03d}/"

# (dataset, layout) -> writer, identifiers that must come out
REPLICAS: dict[tuple[str, str], tuple[Callable[[Path], None], list[str]]] = {
    ("busi", "published"): (busi, ["benign_1", "benign_2", "malignant_1", "malignant_2"]),
    ("busi", "merged"): (
        _pairs("BUSI/images/benign ({}).png", "BUSI/masks/benign ({}).png", 1, mask_mode="1"),
        ["benign_1", "benign_2", "benign_3"],
    ),
    ("tnscui", "published"): (
        _pairs("TNSCUI2020_train/image/{}.PNG", "TNSCUI2020_train/mask/{}.PNG", 1),
        ["tnscui_1", "tnscui_2", "tnscui_3"],
    ),
    ("isic2018", "published"): (_pairs(*ISIC, 3), ["ISIC_0000001", "ISIC_0000002", "ISIC_0000003"]),
    ("kvasir", "published"): (
        _pairs("Kvasir-SEG/images/cju{}.jpg", "Kvasir-SEG/masks/cju{}.jpg", 3, mask_mode="RGB"),
        ["cju1", "cju2", "cju3"],
    ),
    ("btcv", "published"): (btcv, ["btcv_0001", "btcv_0002", "btcv_0005", "btcv_0006", "btcv_0021"]),
    ("kits23", "published"): (kits23, ["case_00000", "case_00003", "case_00007"]),
    ("bus", "published"): (
        _pairs("BUS/original/{:06d}.png", "BUS/GT/{:06d}.png", 1, mask_mode="1"),
        ["bus_000001", "bus_000002", "bus_000003"],
    ),
    ("stu", "published"): (stu, ["stu_1", "stu_2", "stu_3"]),
    ("ph2", "published"): (
        _pairs(
            PH2 + "IMD{0:03d}_Dermoscopic_Image/IMD{0:03d}.bmp",
            PH2 + "IMD{0:03d}_lesion/IMD{0:03d}_lesion.bmp",
            3,
            mask_mode="1",
        ),
        ["IMD001", "IMD002", "IMD003"],
    ),
    ("cvc-clinicdb", "published"): (
        _pairs("CVC-ClinicDB/Original/{}.tif", "CVC-ClinicDB/Ground Truth/{}.tif", 3),
        ["clinicdb_1", "clinicdb_2", "clinicdb_3"],
    ),
    ("cvc-clinicdb", "benchmark"): (polyp_benchmark, ["clinicdb_11", "clinicdb_12", "clinicdb_13"]),
    ("cvc-colondb", "published"): (cvc_colondb, ["colondb_1", "colondb_2", "colondb_3"]),
    ("cvc-colondb", "benchmark"): (polyp_benchmark, ["colondb_21", "colondb_22", "colondb_23"]),
    ("cvc-300", "published"): (endoscene, ["cvc300_1", "cvc300_2", "cvc300_3"]),
    ("cvc-300", "benchmark"): (polyp_benchmark, ["cvc300_1", "cvc300_2", "cvc300_3"]),
    ("etis", "published"): (
        _pairs("ETIS-LaribPolypDB/ETIS-LaribPolypDB/{}.tif", "ETIS-LaribPolypDB/Ground Truth/p{}.tif", 3),
        ["etis_1", "etis_2", "etis_3"],
    ),
    ("etis", "benchmark"): (polyp_benchmark, ["etis_31", "etis_32", "etis_33"]),
}
