"""Preprocessed data small enough to travel, and results cut into pieces that may come back."""

from __future__ import annotations

import io
import lzma
import os
import pickle
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nnunet_lgms.files import atomic_write, read_json, shown

from .sets import pixels

DESCRIPTIONS = ("dataset.json", "dataset_fingerprint.json", "splits_final.json")
#: differences of neighbouring bytes: a tenth less for images
NEIGHBOURS = [{"id": lzma.FILTER_DELTA, "dist": 1}, {"id": lzma.FILTER_LZMA2, "preset": 6}]


def pack_dataset(
    dataset: Path, identifier: str, plans: Sequence[str], pack: Path, images: Mapping[str, Path] | None = None
) -> None:
    """A dataset of ``nnUNet_preprocessed`` as one file.

    Images are kept as whole numbers that point into a table of their values, which loses nothing: an image that was
    normalised but not resampled has as many values as it had grey levels. Where those numbers are what a JPEG file
    holds, that file travels in their place, a fifth as large. The places from which nnU-Net draws foreground are left
    out: they follow from the labels, by nnU-Net's own seeded function.

    Args:
        dataset: ``nnUNet_preprocessed/DATASET``.
        identifier: folder of the preprocessed cases in it.
        plans: names of the plans that go along.
        pack: a ``.tar.xz`` to write.
        images: case → the image file that it was made of.
    """
    import blosc2

    arrays = {}
    cases = sorted(path.stem for path in (dataset / identifier).glob("*.pkl"))
    for case in tqdm(cases, desc=f"packing {dataset.name}"):
        image, labels = (blosc2.open(str(dataset / identifier / f"{case}{end}.b2nd"))[:] for end in ("", "_seg"))
        properties = pickle.loads((dataset / identifier / f"{case}.pkl").read_bytes())
        jpeg = (images or {}).get(case)
        if jpeg is not None and jpeg.suffix == ".jpg":
            levels = _levels_of_jpeg(image, jpeg.read_bytes(), properties)
            arrays[f"{case}/jpeg"] = np.frombuffer(jpeg.read_bytes(), np.uint8)
        else:
            levels, codes = np.unique(image, return_inverse=True)
            if len(levels) > 2**16:
                raise ValueError(f"{case} has more than 65536 grey levels: it cannot be packed.")
            arrays[f"{case}/codes"] = codes.reshape(image.shape).astype(np.uint8 if len(levels) <= 256 else np.uint16)
        if labels.min() < -128 or labels.max() > 127:
            raise ValueError(f"{case} has labels beyond 8 bits: it cannot be packed.")
        arrays[f"{case}/levels"], arrays[f"{case}/labels"] = levels, labels.astype(np.int8)
        del properties["class_locations"]
        arrays[f"{case}/properties"] = np.frombuffer(pickle.dumps(properties), np.uint8)
    descriptions = [dataset / name for name in (*DESCRIPTIONS, *(f"{name}.json" for name in plans))]
    with tempfile.TemporaryDirectory() as folder, atomic_write(pack) as temporary:
        np.savez(Path(folder, "cases.npz"), **arrays)
        with lzma.open(temporary, "wb", filters=NEIGHBOURS) as xz, tarfile.open(fileobj=xz, mode="w") as tar:
            tar.add(Path(folder, "cases.npz"), f"{dataset.name}/{identifier}.npz")
            for path in [p for p in descriptions if p.is_file()] + sorted((dataset / "gt_segmentations").iterdir()):
                tar.add(path, path.relative_to(dataset.parent).as_posix())


def _codes_of_jpeg(content: bytes, properties: Mapping, channels: int) -> np.ndarray:
    """What the file holds of the part that nnU-Net kept, (C, 1, Y, X) of 0 to 255."""
    codes = pixels(io.BytesIO(content), channels)
    codes = codes[None, None] if channels == 1 else codes.transpose(2, 0, 1)[:, None]
    return codes[(slice(None), *(slice(low, high) for low, high in properties["bbox_used_for_cropping"]))]


def _levels_of_jpeg(image: np.ndarray, content: bytes, properties: Mapping) -> np.ndarray:
    """What nnU-Net made of the values 0 to 255 of each channel, (C, 256).

    Raises:
        ValueError: it made different things of one value, so the image is not what the file holds.
    """
    codes = _codes_of_jpeg(content, properties, len(image))
    levels = np.zeros((len(image), 256), image.dtype)
    for values, channel, there in zip(levels, codes, image):
        values[channel] = there
        if not np.array_equal(values[channel], there):
            raise ValueError("a preprocessed image is not its JPEG file, value by value: pack it without `images`.")
    return levels


def unpack_dataset(pack: Path, preprocessed: Path, workers: int) -> None:
    """What `pack_dataset` packed, as nnU-Net itself would have written it."""
    with tarfile.open(pack) as tar:
        dataset = tar.next().name.split("/")[0]
        _extract(tar, preprocessed, pack)
    (file,) = (preprocessed / dataset).glob("*.npz")
    file.with_suffix("").mkdir(exist_ok=True)
    with np.load(file) as arrays:
        cases = sorted({name.split("/")[0] for name in arrays.files})
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        list(pool.map(_save_cases, *zip(*((file, cases[i::workers]) for i in range(workers)))))
    file.unlink()


def _save_cases(file: Path, cases: Sequence[str]) -> None:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    folder, description = file.with_suffix(""), read_json(file.parent / "dataset.json")
    plans = read_json(next(file.parent.glob("nnUNetPlans*.json")))["configurations"].values()
    patch = next(tuple(c["patch_size"]) for c in plans if c.get("data_identifier") == folder.name)
    foreground = LabelManager(description["labels"], description.get("regions_class_order")).foreground_labels
    with np.load(file) as arrays:
        for case in cases:
            properties = pickle.loads(arrays[f"{case}/properties"].tobytes())
            levels, labels = arrays[f"{case}/levels"], arrays[f"{case}/labels"].astype(np.int16)
            if f"{case}/jpeg" in arrays:
                codes = _codes_of_jpeg(arrays[f"{case}/jpeg"].tobytes(), properties, len(levels))
                image = np.stack([values[channel] for values, channel in zip(levels, codes)])
            else:
                image = levels[arrays[f"{case}/codes"]]
            blocks, chunks = comp_blosc2_params(image.shape, patch, image.itemsize)
            blocks_seg, chunks_seg = comp_blosc2_params(labels.shape, patch, labels.itemsize)
            properties["class_locations"] = DefaultPreprocessor._sample_foreground_locations(labels, foreground)
            for end in ("", "_seg"):  # blosc2 does not write over what is there
                (folder / f"{case}{end}.b2nd").unlink(missing_ok=True)
            sizes = {"blocks": blocks, "chunks": chunks, "blocks_seg": blocks_seg, "chunks_seg": chunks_seg}
            nnUNetDatasetBlosc2.save_case(image, labels, properties, str(folder / case), **sizes)


def bundle(runs: Path, results: Path, out: Path, piece: int, pieces: int, models_too: bool = True) -> list[str]:
    """What comes back from the machine: all records and predictions, then models, as far as there is room.

    Args:
        runs: folder of the runs' records and predictions.
        results: folder with a ``nnUNet_results`` for each run.
        out: where the pieces go: ``results.tar.xz.00``, ``models.tar.00``, ….
        piece: bytes of a piece.
        pieces: how many there may be in all.
        models_too: whether models are wanted.

    Returns:
        names of the models that found no room.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder, "results.tar.xz")
        with tarfile.open(small, "w:xz") as tar:
            for file in sorted(path for path in runs.rglob("*") if path.is_file()):
                if file.name[0] != "." and file.exists():  # what trainings are still writing comes the next time
                    tar.add(file, f"runs/{file.relative_to(runs).as_posix()}")
        left = pieces - cut(small, out, piece)
        if not models_too:
            return []
        room, chosen, left_out = left * piece - 2**20, [], []
        finished = [run.name for run in sorted(runs.iterdir()) if (run / "record.json").is_file()]
        models = {name: _model_files(results / name) for name in finished}
        sizes = {name: sum(f.stat().st_size + 4096 for f in files) for name, files in models.items() if files}
        for name in sorted(sizes, key=sizes.get):  # the more of them the better
            if sizes[name] <= room:
                room -= sizes[name]
                chosen += models[name]
            else:
                left_out.append(name)
        if chosen:
            with tarfile.open(Path(folder, "models.tar"), "w") as tar:
                for file in chosen:
                    tar.add(file, f"models/{file.relative_to(results).as_posix()}")
            cut(Path(folder, "models.tar"), out, piece)
    return left_out


def _model_files(folder: Path) -> list[Path]:
    """What prediction needs of a trained model."""
    weights = list(folder.glob("*/*/fold_*/weights.pth"))
    return weights + [p for w in weights for p in sorted(w.parents[1].glob("*.json"))]


def cut(file: Path, out: Path, piece: int) -> int:
    """A file as ``NAME.00``, ``NAME.01``, … of at most ``piece`` bytes; how many."""
    n = 0
    with file.open("rb") as stream:
        while content := stream.read(piece):
            with atomic_write(out / f"{file.name}.{n:02d}") as temporary:
                temporary.write_bytes(content)
            n += 1
    return n


def join(folder: Path, name: str, target: Path) -> bool:
    """Unpack ``NAME.00``, ``NAME.01``, … into a folder; False if there are none."""
    pieces = sorted(folder.glob(f"{name}.[0-9][0-9]"))
    if not pieces:
        return False
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as whole:
        for file in pieces:
            whole.write(file.read_bytes())
        whole.seek(0, os.SEEK_SET)
        with tarfile.open(fileobj=whole) as tar:
            _extract(tar, target, folder / name)
    return True


def _extract(tar: tarfile.TarFile, folder: Path, pack: Path) -> None:
    """Everything into the folder, or nothing: what would leave it, or is neither file nor folder, is refused.

    Looked at here, as Python's own filter came with 3.10.12 and 3.11.4, and older ones write wherever a name points.
    """
    inside = folder.resolve()
    for member in tar.getmembers():
        if not (member.isfile() or member.isdir()):
            raise ValueError(
                f"{pack} holds {shown(member.name)}, a link or device: packs are files and folders only, so nothing of "
                "it was unpacked; pack it again."
            )
        # links that lie in the folder already count too
        if not (folder / member.name).resolve().is_relative_to(inside):
            raise ValueError(
                f"{pack} holds {shown(member.name)}, which would be written outside {folder}: nothing of it was "
                "unpacked; take the file that pack_dataset or bundle wrote."
            )
    tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
    tar.extractall(folder)
