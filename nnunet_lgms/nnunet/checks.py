"""What is looked at before the first step, because it would otherwise surface hours later or deep inside a worker."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import blosc2


def check_preprocessed(folder: Path, command: str) -> None:
    """The folder of preprocessed cases is there and not empty.

    Args:
        folder: ``nnUNet_preprocessed/DATASET/DATA_IDENTIFIER``.
        command: what makes it.

    Raises:
        ValueError: it is not.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        raise ValueError(f"There is no preprocessed data in {folder}: run {command}")


def check_cases(
    folder: Path, identifiers: Iterable[str], command: str, previous_stage: Path | None = None, stage_name: str = ""
) -> None:
    """Every case is there and whole, as far as the ends of its files tell.

    A preprocessing that was killed leaves its last cases out, or their files short. Opening a Blosc2 file finds its
    trailer, and a pickle ends with its stop code; damage in the middle of a file only shows when it is decompressed.

    Args:
        folder: ``nnUNet_preprocessed/DATASET/DATA_IDENTIFIER``.
        identifiers: cases of the fold.
        command: what makes the folder anew.
        previous_stage: in a cascade, the folder of the segmentations that the stage before predicted.
        stage_name: the configuration of that stage.

    Raises:
        ValueError: naming the first such case and the number of all.
    """
    identifiers = sorted(identifiers)
    if previous_stage is not None:
        there = [file.name for file in previous_stage.iterdir()] if previous_stage.is_dir() else []
        lacking = [case for case in identifiers if not any(name.startswith(f"{case}.") for name in there)]
        if lacking:
            raise ValueError(
                f"{len(lacking)} case(s) have no segmentation from {stage_name}, such as {lacking[0]}: train all folds "
                f"of {stage_name} first, with the same trainer and plans; its validation writes them."
            )
    problems = [problem for problem in (_problem(folder, case) for case in identifiers) if problem]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]} in {folder}{more}: run {command}")


def _problem(folder: Path, case: str) -> str:
    """What is wrong with a case, "" if nothing is."""
    files = [folder / f"{case}{ending}" for ending in (".b2nd", "_seg.b2nd", ".pkl")]
    if (folder / f"{case}.npz").is_file():  # nnU-Net's older format
        files = [folder / f"{case}.npz", files[-1]]
    for file in files:
        if not file.is_file():
            return f"Case {case} has no {file.name}"
        if not _is_whole(file):
            return f"{file.name} is damaged or was cut short"
    return ""


def _is_whole(file: Path) -> bool:
    if file.suffix == ".b2nd":
        try:
            blosc2.open(urlpath=str(file), mode="r")
        except (RuntimeError, ValueError, OSError):
            return False
        return True
    end = {".pkl": b".", ".npz": b"PK\x05\x06"}[file.suffix]
    with file.open("rb") as stream:
        stream.seek(-min(22, file.stat().st_size), os.SEEK_END)
        tail = stream.read()
    return tail.endswith(end) if file.suffix == ".pkl" else tail.startswith(end)


def check_references(folder: Path, identifiers: Iterable[str], file_ending: str, command: str) -> None:
    """The validation at the end of a training finds its reference segmentations; a killed preprocessing has none.

    Args:
        folder: ``nnUNet_preprocessed/DATASET/gt_segmentations``.
        identifiers: cases of the fold's validation.
        file_ending: of the dataset's files.
        command: what makes the folder.

    Raises:
        ValueError: naming the first case without.
    """
    lacking = [case for case in sorted(identifiers) if not (folder / f"{case}{file_ending}").is_file()]
    if lacking:
        raise ValueError(
            f"{folder.name} has no reference of {len(lacking)} case(s), such as {lacking[0]}: run {command}"
        )


def check_images(batch: dict[str, Any]) -> None:
    """The images of a batch are finite: a single NaN turns loss, gradients and weights into NaN.

    Args:
        batch: nnU-Net's, "data" (B, C, *patch) and "keys", the names of the B cases.

    Raises:
        ValueError: naming the cases that are not.
    """
    finite = [bool(image.isfinite().all()) for image in batch["data"]]
    if not all(finite):
        names = batch.get("keys", ["?"] * len(finite))
        bad = sorted({str(name) for name, good in zip(names, finite, strict=True) if not good})
        raise ValueError(
            f"The preprocessed image of {', '.join(bad)} holds NaN or infinity, on which no training can work: correct "
            "or leave out the case, preprocess again, then continue with --c."
        )


def check_room(folder: Path, n_bytes: int) -> None:
    """The folder of results can be written, and its disk has room for the checkpoints.

    nnU-Net writes ``plans.json`` anew into a model's folder at the start of every training, in place: on a full disk
    that would cut the plans of a trained model to nothing.

    Raises:
        ValueError: it cannot, or has less than ``n_bytes`` left.
    """
    probe = folder / f".{os.getpid()}.writable"
    try:
        probe.write_bytes(b"\0")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}): make it writable or set nnUNet_results to another folder."
        ) from error
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ValueError(
            f"{folder} has {free / 2**20:.1f} MiB left, the checkpoints of this training need {n_bytes / 2**20:.1f} "
            "MiB: make room or set nnUNet_results to another disk."
        )


def check_shared_memory(n_bytes: int, folder: Path = Path("/dev/shm")) -> None:
    """The shared memory has room for the batches that other processes prepare.

    Where it has not, as in containers, those processes fail one batch after the other and the training waits for ever.

    Args:
        n_bytes: of all batches that can wait at the same time.
        folder: where the system keeps it; a system without such a folder is not checked.

    Raises:
        ValueError: it has less left.
    """
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ValueError(
            f"{folder} has {free / 2**20:.1f} MiB left, and the processes that prepare batches need "
            f"{n_bytes / 2**20:.1f} MiB: give the container more (docker run --shm-size or --ipc=host), allow fewer "
            "processes (nnUNet_n_proc_DA), or none (0)."
        )
