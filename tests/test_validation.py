"""The validation at a training's end against nnU-Net's own: the same labels, metrics and labels for a next stage."""

from __future__ import annotations

import json
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import unet_model
from nnunetv2.evaluation import evaluate_predictions
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module

from nnunet_lgms.nnunet.validating import ValidatingTrainer

CASES = ("case_1", "case_2")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of a cascade's first stage, preprocessed cases of both stages, and worker processes that are threads."""
    plans = {
        "3d_lowres": unet_model.configuration((12, 16, 16), (1.6, 1.4, 1.4), next_stage="3d_cascade_fullres"),
        "3d_cascade_fullres": unet_model.configuration((12, 16, 16), (1.3, 1.0, 0.9), previous_stage="3d_lowres"),
    }
    plans["3d_lowres"]["data_identifier"] = "low"
    plans["3d_cascade_fullres"]["data_identifier"] = "full"
    model = unet_model.model(tmp_path / "model", plans, name="3d_lowres", folds=(0,))
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    data = tmp_path / "preprocessed" / "Dataset903_Tiny"
    for seed, case in enumerate(CASES):
        image = unet_model.image(tmp_path / f"images/{case}_0000.nii.gz", (17 + seed, 30, 22), (1.7, 0.8, 1.0), seed, 3)
        for configuration in plans:
            manager = predictor.plans_manager.get_configuration(configuration)
            samples, labels, properties = DefaultPreprocessor(verbose=False).run_case(
                [str(image)], None, predictor.plans_manager, manager, predictor.dataset_json
            )
            target = data / manager.data_identifier / case
            target.parent.mkdir(parents=True, exist_ok=True)
            nnUNetDatasetBlosc2.save_case(samples, labels, properties, str(target))
        reference = sitk.GetImageFromArray(np.random.default_rng(seed).integers(0, 4, (17 + seed, 30, 22), np.uint8))
        reference.CopyInformation(sitk.ReadImage(str(image)))
        (data / "gt_segmentations").mkdir(exist_ok=True)
        sitk.WriteImage(reference, str(data / f"gt_segmentations/{case}.nii.gz"))
    fake = SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=ThreadPool))
    for module in (trainer_module, evaluate_predictions):
        monkeypatch.setattr(module, "multiprocessing", fake)
    for module in (trainer_module.__name__, "nnunet_lgms.nnunet.validating"):
        monkeypatch.setattr(f"{module}.nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    return tmp_path


def _validated(kind: type, folder: Path, output: Path, axes=(0, 1)) -> dict:
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder / "model"), (0,))
    trainer = kind.__new__(kind)
    said: list[str] = []
    logged: dict[str, float] = {}
    data = folder / "preprocessed" / "Dataset903_Tiny"
    vars(trainer).update(
        device=torch.device("cpu"),
        network=predictor.network,
        plans_manager=predictor.plans_manager,
        configuration_manager=predictor.configuration_manager,
        label_manager=predictor.label_manager,
        dataset_json=predictor.dataset_json,
        dataset_class=nnUNetDatasetBlosc2,
        inference_allowed_mirroring_axes=axes,
        is_ddp=False,
        is_cascaded=False,
        local_rank=0,
        folder_with_segs_from_previous_stage=None,
        preprocessed_dataset_folder=str(data / "low"),
        preprocessed_dataset_folder_base=str(data),
        output_folder=str(output / "fold_0"),
        output_folder_base=str(output),
        set_deep_supervision_enabled=lambda enabled: said.append(f"deep supervision {enabled}"),
        do_split=lambda: ([], list(CASES)),
        print_to_log_file=lambda *words, **options: said.append(" ".join(map(str, words))),
        logger=SimpleNamespace(log_summary=logged.__setitem__),
    )
    trainer.perform_actual_validation()
    assert said[0] == "deep supervision False" and said[-1] == "deep supervision True"
    return logged


def test_files_and_metrics_are_nnunets(folder: Path):
    theirs, ours = folder / "theirs", folder / "ours"
    for output in (theirs, ours):
        output.mkdir()
    logged = {
        output.name: _validated(kind, folder, output)
        for output, kind in ((theirs, trainer_module.nnUNetTrainer), (ours, ValidatingTrainer))
    }
    assert (
        logged["ours"] == pytest.approx(logged["theirs"], abs=1e-3) and logged["ours"]["final_val/foreground_dice"] > 0
    )
    files = sorted(str(file.relative_to(theirs)) for file in theirs.rglob("*.*"))
    assert files == sorted(str(file.relative_to(ours)) for file in ours.rglob("*.*"))
    assert len(files) == 5
    for case in CASES:
        a, b = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(output / f"fold_0/validation/{case}.nii.gz")))
            for output in (ours, theirs)
        )
        assert np.mean(a != b) <= 1e-4 and len(np.unique(b)) > 1
        next_stage = f"predicted_next_stage/3d_cascade_fullres/{case}.b2nd"
        a, b = (blosc2.open(urlpath=str(output / next_stage), mode="r")[:] for output in (ours, theirs))
        assert a.dtype == b.dtype and a.shape == b.shape and np.mean(np.asarray(a) != np.asarray(b)) <= 1e-4
    for output in (ours, theirs):
        assert "foreground_mean" in json.loads((output / "fold_0/validation/summary.json").read_text())


def test_a_case_that_fails_ends_the_validation_with_its_error(folder: Path, monkeypatch):
    def full(*_):
        raise OSError(28, "full")

    monkeypatch.setattr("nnunet_lgms.prediction.one_case.write_case", full)
    with pytest.raises(OSError, match="full"):
        _validated(ValidatingTrainer, folder, folder / "ours")
