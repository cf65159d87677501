"""What surrounds every command: too little memory, names that are not UTF-8, packages that cannot be loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import ROOT
from dataset_replicas import REPLICAS, disc, grey, save

from nnunet_lgms import cli
from nnunet_lgms.requirements import RequirementError, needs

NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 4.00 TiB for an array with shape (1099511627776,)"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("itk::ERROR: Failed to allocate memory for image."),
        RuntimeError("std::bad_alloc"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:30]}",
)
def test_too_little_memory_is_one_sentence(monkeypatch, capsys, error: Exception):
    def fail(args):
        raise error

    monkeypatch.setattr("nnunet_lgms.cli.doctor.run", fail)
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("nnunet_lgms: There is not enough memory") and said.count("\n") == 1
    assert said.endswith(": end other programs, or raise what limits it (ulimit -v).\n")


def test_other_errors_of_libraries_keep_their_traceback(monkeypatch):
    def fail(args):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("nnunet_lgms.cli.doctor.run", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.main(["doctor"])


def test_packages_that_cannot_be_loaded_are_not_said_to_be_missing():
    with pytest.raises(RequirementError, match="^x needs no_such_package: pip install "):
        with needs("x", ["numpy", "no_such_package"], "runtime"):
            pass
    said = r"^x needs numpy, of which one is installed and cannot be loaded \(No module named '_numpy'\): allow more"
    with pytest.raises(RequirementError, match=said), needs("x", ["numpy"], "runtime"):
        import _numpy  # noqa: F401  as SimpleITK says that its library cannot be mapped


def test_arguments_that_are_not_utf8(capsys):
    assert cli.main(["evaluate", NOT_UTF8, "references"]) == 2
    assert capsys.readouterr().err == "nnunet_lgms: The argument b'caf\\xe9' is not UTF-8: rename it.\n"


def runtime(folder: Path) -> list:
    pytest.importorskip("onnxruntime", reason="needs the extra [runtime]")
    onnx_stub = pytest.importorskip("onnx_stub", reason="needs the extra [export]")
    (folder / "images").mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 4, 4), np.float32)), folder / "images" / "a_0000.nii.gz")
    os.link(folder / "images" / "a_0000.nii.gz", folder / "images" / f"{NOT_UTF8}_0000.nii.gz")
    return ["runtime", onnx_stub.threshold_model(folder / "m.onnx"), "-i", folder / "images", "-o", folder / "out"]


def evaluate(folder: Path) -> list:
    for kind in ("predictions", "references"):
        for name in ("a", NOT_UTF8):
            save(folder / kind / f"{name}.png", grey(disc(1)) // 255)
    return ["evaluate", folder / "predictions", folder / "references", "--labels", "1", "-o", folder / "out"]


def convert(folder: Path) -> list:
    REPLICAS["kvasir", "published"][0](folder / "download")
    image = next((folder / "download").rglob("images/*"))
    os.rename(image, image.with_name(NOT_UTF8 + image.suffix))
    return ["convert", "kvasir", folder / "download", "--id", "7"]


def zeroshot(folder: Path) -> list:
    import tiny_model

    model = tiny_model.model_folder(folder / "results", "Dataset901_Home")
    away = tiny_model.raw_dataset(folder / "Dataset902_Away")
    os.rename(away / "imagesTr/case_1_0000.png", away / f"imagesTr/{NOT_UTF8}_0000.png")
    return ["zeroshot", model, away, "--device", "cpu", "-o", folder / "out"]


def predict(folder: Path) -> list:
    _, model, away, *_ = zeroshot(folder)
    return ["predict", "-i", away / "imagesTr", "-o", folder / "out", "-m", model, "-device", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [runtime, evaluate, convert, zeroshot, predict])
def test_names_that_are_not_utf8_are_refused_before_anything_is_computed(tmp_path: Path, monkeypatch, capsys, prepare):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_extTrainer", str(ROOT / "trainers"))
    words = prepare(tmp_path)
    assert cli.main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    said = error.splitlines()[-1]  # predict says before which model it takes
    assert said.startswith("nnunet_lgms: The file b'/") and said.endswith(" is not UTF-8: rename it.")
    assert r"caf\xe9" in error
    assert not any((tmp_path / "out").glob("*.png")) and not any((tmp_path / "raw").glob("*"))


def test_a_terminal_that_shows_little_is_no_reason_to_fail(tmp_path: Path):
    """An en dash stands for what is undefined, which Latin-1 does not have."""
    for kind in ("predictions", "references"):
        save(tmp_path / kind / "case.png", np.zeros((9, 9), np.uint8))
    words = ["evaluate", str(tmp_path / "predictions"), str(tmp_path / "references"), "--labels", "1"]
    env = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "nnunet_lgms", *words], env=env, capture_output=True)
    assert done.returncode == 0 and rb"\u2013" in done.stdout, done.stderr
