"""The runtime's readers against nnU-Net's, over a family of images: voxels, spacing, what the network sees, and labels
written on the grid of the image.

`python tests/test_readers.py` prints how many files of each format are read alike and refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from exported import hippocampus_plans
from image_family import Entry, family
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_lgms import inference
from nnunet_lgms.runtime.description import Resampling
from nnunet_lgms.runtime.images import Case, read_case, write_labels
from nnunet_lgms.runtime.preprocessing import preprocess
from nnunet_lgms.runtime.readers import READERS
from nnunet_lgms.runtime.schema import READERS as NAMES

ALIKE, BOTH, OURS = "alike", "both refuse", "ours refuses"
#: what the runtime alone may refuse, and reads nothing else of
REASONS = (
    "damaged or was cut short",
    "holds NaN or infinity",
    "complex numbers",
    "several values a voxel",
    "no place in space",
    "whose squares float32 cannot hold",
    "a spacing of",
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the libraries."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    logging.disable()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def kind_of(name: str) -> str:
    ending = name.lower().removesuffix(".gz").rpartition(".")[2]
    return {"hdr": "nii", "img": "nii", "tiff": "tif", "mhd": "mha", "nhdr": "nrrd"}.get(ending, ending)


KINDS = sorted({kind_of(entry.name) for entry in family()})


def test_the_family_is_large_and_has_every_reader():
    files = list(family())
    assert len({entry.name for entry in files}) == len(files) >= 200
    assert {reader for entry in files for reader in entry.readers} == set(READERS) == set(NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_read_and_labels_written_as_by_nnunet(tmp_path, kind):
    with quiet():
        for entry, file in made(tmp_path, kind):
            for reader in entry.readers:
                verdict(entry, file, reader)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_in_python_reads_them_as_nnunet(tmp_path, kind):
    with quiet():
        for entry, file in made(tmp_path, kind):
            for reader in entry.readers:
                theirs, ours = by_nnunet(file, reader), in_python(file, reader)
                if isinstance(ours, str):
                    check_refusal(entry, file, reader, ours, theirs)
                else:
                    same_samples(entry, file, reader, ours[0], theirs)
                    assert list(ours[1]["spacing"]) == list(theirs[1]["spacing"])


def made(folder: Path, kind: str | None = None) -> Iterator[tuple[Entry, Path]]:
    """Files of a kind, each in a folder of its own."""
    for number, entry in enumerate(family()):
        if kind in (None, kind_of(entry.name)):
            file = folder / str(number) / entry.name
            file.parent.mkdir()
            entry.write(file)
            yield entry, file


def attempt(function: Callable[[], Any]) -> Any:
    """What it gives, or what it says."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def by_nnunet(file: Path, reader: str) -> Any:
    """Samples and properties."""
    return attempt(lambda: recursive_find_reader_writer_by_name(reader)().read_images([str(file)]))


def preprocessed_by_nnunet(theirs: tuple, reader: str) -> Any:
    """What the network sees."""
    samples, properties = theirs
    manager = PlansManager(description(reader, len(samples)).plans)
    run = DefaultPreprocessor(verbose=False).run_case_npy
    configuration = manager.get_configuration("3d_fullres")
    return attempt(lambda: run(samples, None, dict(properties), manager, configuration, {"labels": {}})[0])


def in_python(file: Path, reader: str) -> Any:
    manager = SimpleNamespace(image_reader_writer_class=recursive_find_reader_writer_by_name(reader))
    return attempt(lambda: inference._from_files(file, SimpleNamespace(plans_manager=manager)))


def verdict(entry: Entry, file: Path, reader: str) -> str:
    """How a file fares; raises AssertionError if the two differ and ours does not say why."""
    theirs = by_nnunet(file, reader)
    about = description(reader, 1 if isinstance(theirs, str) else len(theirs[0]))
    ours = attempt(lambda: read_case([file], about))
    expected = theirs if isinstance(theirs, str) else preprocessed_by_nnunet(theirs, reader)
    if isinstance(ours, str):
        return check_refusal(entry, file, reader, ours, expected)
    where = f"{entry.name} with {reader}"
    same_samples(entry, file, reader, ours.samples, theirs)
    np.testing.assert_array_equal(ours.spacing, theirs[1]["spacing"], err_msg=where)
    same_labels(ours, theirs, file, reader, where)
    seen = attempt(lambda: preprocess(ours, about).data)
    if isinstance(seen, str):  # both would need more memory than there is
        assert isinstance(expected, str) and "correct the spacing" in seen, where
        return BOTH
    np.testing.assert_allclose(seen, expected, atol=2e-3, rtol=1e-3, err_msg=where)
    return ALIKE


def check_refusal(entry: Entry, file: Path, reader: str, ours: str, theirs: Any) -> str:
    assert ours.startswith("ValueError: ") and "\n" not in ours and str(file) in ours, ours
    if isinstance(theirs, str):
        return BOTH
    assert any(reason in ours for reason in REASONS), f"{entry.name} with {reader}: nnU-Net reads it, ours says {ours}"
    return OURS


def same_samples(entry: Entry, file: Path, reader: str, ours: np.ndarray, theirs: Any) -> None:
    where = f"{entry.name} with {reader}"
    assert not isinstance(theirs, str), f"{where}: ours reads it, nnU-Net says {theirs}"
    assert ours.dtype == theirs[0].dtype == np.float32
    np.testing.assert_array_equal(ours, theirs[0], err_msg=where)
    assert np.isfinite(ours).all(), where
    if entry.damaged:  # nothing but filling may be missing
        assert entry.whole, f"{where}: damaged, but read"
        entry.whole(file)
        whole = by_nnunet(file, reader)[0]
        entry.write(file)
        np.testing.assert_array_equal(ours, whole, err_msg=f"{where}: damaged, but read")


def same_labels(ours: Case, theirs: tuple, file: Path, reader: str, where: str) -> None:
    """Write the same labels with both, and read them again."""
    ending = file.name[file.name.index(".") :].lower().replace(".jpg", ".png").replace(".hdr", ".img")
    if ours.samples.shape[0] > 1 and reader.startswith("SimpleITK"):
        return  # channels in one file, which nnU-Net reads but cannot write labels for
    labels = (theirs[0][0] > np.median(theirs[0][0])).astype(np.uint8) * 3
    a, b = file.parent / f"theirs{ending}", file.parent / f"ours{ending}"
    recursive_find_reader_writer_by_name(reader)().write_seg(labels, str(a), theirs[1])
    write_labels(labels[0] if ours.flat else labels, ours, b)
    assert not list(file.parent.glob(".ours*"))
    for one, other in zip(content(a), content(b), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=where)
    if reader == "Tiff3DIO":
        assert json.loads(a.with_suffix(".json").read_text()) == json.loads(b.with_suffix(".json").read_text())


def content(file: Path) -> tuple:
    """Voxels and place of a label file, by libraries that know both."""
    if kind_of(file.name) == "nii":
        image = nib.load(file)
        return np.asarray(image.dataobj), image.affine, image.header.get_zooms(), image.get_data_dtype().str
    if kind_of(file.name) == "tif":
        return (tifffile.imread(file),)
    image = sitk.ReadImage(str(file))
    geometry = image.GetSpacing(), image.GetOrigin(), image.GetDirection(), image.GetPixelIDTypeAsString()
    return sitk.GetArrayFromImage(image), *geometry


def description(reader: str, n_channels: int) -> SimpleNamespace:
    """What reading and preprocessing ask of a model's description, with nnU-Net's plans that say the same."""
    flat = reader == "NaturalImage2DIO"
    plans = hippocampus_plans() | {"image_reader_writer": reader}
    configuration = plans["configurations"]["3d_fullres"]
    configuration["normalization_schemes"] = ["ZScoreNormalization"] * n_channels
    configuration["use_mask_for_norm"] = [False] * n_channels
    configuration["spacing"] = [1.0, 1.0] if flat else [1.2, 1.0, 0.9]
    plans["foreground_intensity_properties_per_channel"] = {str(i): {} for i in range(n_channels)}
    return SimpleNamespace(
        reader=reader,
        channel_names=("a",) * n_channels,
        transpose_forward=(0, 1, 2),
        normalization_schemes=tuple(configuration["normalization_schemes"]),
        use_mask_for_norm=(False,) * n_channels,
        intensity_properties=({},) * n_channels,
        spacing=tuple(configuration["spacing"]),
        resampling_data=Resampling("resample_data_or_seg_to_shape"),
        resampling_probabilities=Resampling("resample_data_or_seg_to_shape", order=1),
        plans=plans,
    )


def main() -> None:
    counts: dict[str, Counter] = {}
    with TemporaryDirectory() as folder, quiet():
        for entry, file in made(Path(folder)):
            for reader in entry.readers:
                counts.setdefault(f"{kind_of(entry.name)} {reader}", Counter())[verdict(entry, file, reader)] += 1
    print(f"{'format and reader':32}{ALIKE:>14}{BOTH:>14}{OURS:>14}")
    for key, count in counts.items():
        print(f"{key:32}{count[ALIKE]:14}{count[BOTH]:14}{count[OURS]:14}")


if __name__ == "__main__":
    sys.exit(main())
