"""One pass through nnU-Net's own commands on a few small cases, on the CPU: every line is one that a user would type.

The tests build on each other in the order of the file, as the steps of a study do. One planning, one training and one
prediction are processes as a user starts them, with their worker processes; the other commands are called in this one
(``workshop.py``), as each process costs seconds before it does anything.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from workshop import Workshop, read

import nnunet_lgms

pytestmark = pytest.mark.slow

DATASET = "Dataset004_Hippocampus"
TRAINER = "nnUNetTrainerLGMSNet_tiny"
PLANS = "tinyPlans"
CASES = ["hippocampus_001", "hippocampus_014", "hippocampus_025", "hippocampus_038", "hippocampus_056"]
TEST_CASE = "hippocampus_046"
ONE_PROCESS = ["-device", "cpu", "-npp", 1, "-nps", 1]  # for reading and for writing
IN_PROCESS = ["-device", "cpu", "-npp", 0, "-nps", 0]


class Study(Workshop):
    """nnU-Net's three folders and its commands, in this process or as one of their own."""

    def process(self, command: str, *args: object, fails: bool = False, **env: str) -> str:
        """Runs ``nnUNetv2_<command>`` as a user's shell does; its output."""
        program = Path(sys.executable).with_name(f"nnUNetv2_{command}")
        base = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet")}
        package = Path(nnunet_lgms.__file__).parents[1]
        more = {
            "nnUNet_def_n_proc": "1",
            "PYTHONPATH": os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_WAIT_POLICY": "PASSIVE",  # nnUNetv2_train takes all cores, which other tests may be using
        }
        env = {**base, **self.env, **more, **env}
        result = subprocess.run([str(program), *map(str, args)], env=env, capture_output=True, text=True, timeout=240)
        output = result.stdout + result.stderr
        assert (result.returncode != 0) == fails, f"{command} {args}\n{output[-4000:]}"
        return output

    def train(self, configuration: str, fold: object, *args: str, process: bool = False, **more) -> str | None:
        # no processes for the batches: one that starts costs more than these four steps
        words = ["train", 4, configuration, fold, "-tr", TRAINER, "-p", PLANS, "-device", "cpu", *args]
        return (self.process if process else self)(*words, nnUNet_n_proc_DA="0", **more)

    def model(self, configuration: str) -> Path:
        return self.results / DATASET / f"{TRAINER}__{PLANS}__{configuration}"


@pytest.fixture(scope="module")
def study(tmp_path_factory, hippocampus) -> Study:
    study = Study(tmp_path_factory.mktemp("study"))
    raw = study.raw / DATASET
    for kind, cases in {"Tr": CASES, "Ts": [TEST_CASE]}.items():
        for folder, suffix in (("images", "_0000"), ("labels", "")):
            (raw / f"{folder}{kind}").mkdir(parents=True)
            for case in cases:
                name = f"{case}{suffix}.nii.gz"
                shutil.copy(hippocampus / f"{folder}{kind}" / name, raw / f"{folder}{kind}" / name)
    description = json.loads((hippocampus / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": len(CASES)}))
    return study


def shrink(plans: dict) -> dict:
    """Patches of odd shape, a thick-slice level, a low resolution stage and the cascade behind it.

    The patches are nearly as large as the images: smaller ones would cost time in validation, by the number of tiles.
    """
    configurations = plans["configurations"]
    configurations["2d"].update(patch_size=[49, 38], batch_size=2)
    fullres = configurations["3d_fullres"]
    fullres.update(patch_size=[36, 50, 35], batch_size=2, lgmsnet={"deep_supervision": True})
    fullres["architecture"]["arch_kwargs"]["strides"] = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    fullres["architecture"]["arch_kwargs"]["kernel_sizes"] = [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    configurations["3d_lowres"] = {
        "inherits_from": "3d_fullres",
        "data_identifier": "tinyPlans_3d_lowres",
        "spacing": [2.0, 2.0, 2.0],
        "median_image_size_in_voxels": [18, 25, 18],
        "patch_size": [23, 31, 23],
        "lgmsnet": {},
        "next_stage": "3d_cascade_fullres",
    }
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    return {**plans, "plans_name": PLANS}


def check_prediction(path: Path, image: Path) -> None:
    prediction, source = sitk.ReadImage(str(path)), sitk.ReadImage(str(image))
    assert prediction.GetSize() == source.GetSize()
    np.testing.assert_allclose(prediction.GetSpacing(), source.GetSpacing())
    assert set(np.unique(sitk.GetArrayFromImage(prediction))) <= {0, 1, 2}


def checkpoint(model: Path, fold: object = 0, name: str = "checkpoint_final.pth") -> dict:
    return torch.load(model / f"fold_{fold}" / name, weights_only=False)


def test_plan_and_preprocess(study):
    study.process("plan_and_preprocess", "-d", 4, "-c", "2d", "3d_fullres", "-npfp", 1, "-np", 1, 1)
    folder = study.preprocessed / DATASET
    plans = shrink(json.loads((folder / "nnUNetPlans.json").read_text()))
    (folder / f"{PLANS}.json").write_text(json.dumps(plans))
    study("preprocess", "-d", 4, "-plans_name", PLANS, "-c", "3d_lowres", "-np", 1)
    assert len(list((folder / "tinyPlans_3d_lowres").glob("*.pkl"))) == len(CASES)


def test_train_2d_with_probabilities(study):
    study.train("2d", 0, "--npz")
    fold = study.model("2d") / "fold_0"
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert set(summary["mean"]) == {"1", "2"}
    (probabilities,) = (fold / "validation").glob("*.npz")
    with np.load(probabilities) as file:
        np.testing.assert_allclose(file["probabilities"].astype(np.float32).sum(0), 1, atol=0.01)
    assert "decoder.seg_layers.0.weight" in checkpoint(study.model("2d"))["network_weights"]


def test_training_that_broke_off_is_continued(study, capsys):
    output = study.train("3d_fullres", 0, "--npz", process=True, fails=True, TINY_TRAINER_STOPS="1")
    assert "Epoch 0" in output and "Epoch 1" not in output
    model = study.model("3d_fullres")
    assert checkpoint(model, name="checkpoint_latest.pth")["current_epoch"] == 1

    study.train("3d_fullres", 0, "--npz", "--c")
    output = capsys.readouterr().out
    assert "Epoch 1" in output and "Epoch 0" not in output
    final = checkpoint(model)
    assert final["trainer_name"] == TRAINER
    assert len(final["logging"]["train_losses"]) == 2 and np.isfinite(final["logging"]["train_losses"]).all()
    np.testing.assert_allclose(final["logging"]["lrs"], [0.02, 0.02 * 0.5**0.9])
    # the rate of the very last step: 3 of 4 steps done
    assert final["optimizer_state"]["param_groups"][0]["lr"] == pytest.approx(0.02 * 0.25**0.9)


def test_validation_alone_repeats_the_validation(study, capsys):
    validation = study.model("3d_fullres") / "fold_0" / "validation"
    (segmentation,) = validation.glob("*.nii.gz")
    expected = read(segmentation)
    shutil.rmtree(validation)
    study.train("3d_fullres", 0, "--val", "--npz")
    output = capsys.readouterr().out
    assert "Epoch" not in output and "Mean Validation Dice" in output
    np.testing.assert_array_equal(read(segmentation), expected)


def test_find_best_configuration(study):
    select = ["-c", "2d", "3d_fullres", "-tr", TRAINER, "-p", PLANS, "-f", 0, "-np", 1]
    study("find_best_configuration", 4, *select)
    best = json.loads((study.results / DATASET / "inference_information.json").read_text())
    assert len(best["all_results"]) == 3  # both configurations and their ensemble


def test_predict_from_the_model_folder_alone(study, tmp_path):
    """No raw data, no preprocessed data, no results folder: the model folder holds all that is needed."""
    model = shutil.copytree(study.model("2d"), tmp_path / "somewhere")
    output = tmp_path / "out"
    away = {name: str(tmp_path / "none") for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    images = study.raw / DATASET / "imagesTs"
    study.process("predict_from_modelfolder", "-i", images, "-o", output, "-m", model, "-f", 0, *ONE_PROCESS, **away)
    check_prediction(output / f"{TEST_CASE}.nii.gz", images / f"{TEST_CASE}_0000.nii.gz")


def test_exported_model_predicts_elsewhere(study, tmp_path):
    archive = tmp_path / "model.zip"
    select = ["-d", 4, "-c", "3d_fullres", "-f", 0, "-tr", TRAINER, "-p", PLANS]
    study("export_model_to_zip", *select, "-o", archive)
    elsewhere = {name: str(tmp_path / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in elsewhere.values():
        Path(folder).mkdir()
    study("install_pretrained_model_from_zip", archive, **elsewhere)

    (validated,) = (study.model("3d_fullres") / "fold_0" / "validation").glob("*.nii.gz")
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    name = validated.name.replace(".nii.gz", "_0000.nii.gz")
    shutil.copy(study.raw / DATASET / "imagesTr" / name, images / name)
    # nnUNetv2_predict looks the dataset's name up in the three folders
    select[1] = DATASET
    study("predict", "-i", images, "-o", output, *select, *IN_PROCESS, **elsewhere)
    check_prediction(output / validated.name, images / name)
    assert np.mean(read(output / validated.name) == read(validated)) > 0.999


def test_cascade(study, tmp_path):
    study.train("3d_lowres", "all")
    previous = study.model("3d_lowres") / "predicted_next_stage" / "3d_cascade_fullres"
    assert len(list(previous.iterdir())) >= len(CASES)
    study.train("3d_cascade_fullres", 0)
    stem = checkpoint(study.model("3d_cascade_fullres"))["network_weights"]["encoder.stem.conv.weight"]
    assert stem.shape[1] == 3  # the image, and one channel for each label of the stage before

    images = study.raw / DATASET / "imagesTs"
    shared = ["-d", 4, "-tr", TRAINER, "-p", PLANS, *IN_PROCESS]
    lowres, output = tmp_path / "lowres", tmp_path / "out"
    study("predict", "-i", images, "-o", lowres, "-c", "3d_lowres", "-f", "all", *shared)
    cascade = ["-c", "3d_cascade_fullres", "-f", 0, "-prev_stage_predictions", lowres]
    study("predict", "-i", images, "-o", output, *cascade, *shared)
    check_prediction(output / f"{TEST_CASE}.nii.gz", images / f"{TEST_CASE}_0000.nii.gz")
