"""`nnunet_lgms override`: new plans beside old ones, and the road from there to a prediction."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from planned import configuration

from nnunet_lgms.cli import main
from nnunet_lgms.config import settings_of
from nnunet_lgms.nnunet.builder import build_network

NAME = "Dataset999_Tiny"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Path:
    """A dataset with plans, a segmentation and no images; its preprocessed folder."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    folder = tmp_path / "nnUNet_preprocessed" / NAME
    (folder / "gt_segmentations").mkdir(parents=True)
    description = {"labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}}
    (folder / "dataset.json").write_text(json.dumps(description))
    segmentation = np.zeros((12, 40, 40), np.uint8)
    segmentation[2:5, 10:22, 10:22] = 1
    image = sitk.GetImageFromArray(segmentation)
    image.SetSpacing((1.0, 1.0, 4.0))
    sitk.WriteImage(image, str(folder / "gt_segmentations" / "a.nii.gz"))
    anisotropic = configuration(
        (12, 48, 48),
        4,
        spacing=(4.0, 1.0, 1.0),
        strides=[[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]],
    )
    plans = {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "2d": configuration((48, 48), 4),
            "3d_fullres": anisotropic,
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
    }
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    return folder


def override(tmp_path: Path, settings: dict, *options: str) -> int:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"lgmsnet": settings}))
    return main(["override", "999", "--apply", str(path), "--as", "New", *options])


def kernels(folder: Path, name: str, plans: str = "New") -> list:
    network = build_network(PlansManager(str(folder / f"{plans}.json")).get_configuration(name), 1, 2, False)
    return [
        [c.kernel_size for c in m.depthwise]
        for m in network.modules()
        if hasattr(m, "squeeze") and hasattr(m, "depthwise")
    ]


def test_writes_plans_that_differ_in_nothing_else(dataset, tmp_path, capsys):
    assert override(tmp_path, {"lms_kernels": [3]}) == 0
    old, new = (json.loads((dataset / f"{n}.json").read_text()) for n in ("nnUNetPlans", "New"))
    assert new.pop("plans_name") == "New" and old.pop("plans_name") == "nnUNetPlans"
    for name in ("2d", "3d_fullres"):
        assert new["configurations"][name].pop("lgmsnet") == {"lms_kernels": [3], "requires": "0.1.0"}
    assert new == old  # the preprocessed data too: data_identifier is the same
    assert kernels(dataset, "3d_cascade_fullres") == [[(3, 3, 3)]] * 3  # inherits
    assert sorted(p.name for p in dataset.iterdir()) == [
        "New.json",
        "dataset.json",
        "gt_segmentations",
        "nnUNetPlans.json",
    ]

    said = capsys.readouterr().out
    assert "nnUNetv2_train 999 3d_fullres 0 -p New -tr nnUNetTrainerLGMSNet" in said
    assert "nnUNetv2_predict -i INPUT -o OUTPUT -d 999 -c 2d -f 0 -p New -tr nnUNetTrainerLGMSNet" in said
    assert "nnUNetv2_preprocess -d 999 -plans_name New -c 2d" in said
    (dataset / "nnUNetPlans_2d").mkdir()
    assert override(tmp_path, {"lms_kernels": [3]}, "--force") == 0
    assert "nnUNetv2_preprocess -d 999 -plans_name New -c 2d" not in capsys.readouterr().out


def test_never_over_existing_plans(dataset, tmp_path, capsys):
    assert override(tmp_path, {"lms_kernels": [3]}) == 0
    before = (dataset / "New.json").read_bytes()
    assert override(tmp_path, {"lms_kernels": [5]}) == 2
    assert "--force" in capsys.readouterr().err
    assert (dataset / "New.json").read_bytes() == before
    assert override(tmp_path, {"lms_kernels": [5]}, "--force") == 0
    assert kernels(dataset, "2d") == [[(5, 5)]] * 3
    assert main(["override", "999", "--apply", "kernels_3", "--as", "nnUNetPlans", "--force"]) == 2


def test_a_failed_write_leaves_the_old_plans(dataset, tmp_path, monkeypatch):
    assert override(tmp_path, {"lms_kernels": [3]}) == 0
    before = sorted((p.name, p.read_bytes()) for p in dataset.glob("*.json"))

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    assert override(tmp_path, {"lms_kernels": [5]}, "--force") == 2
    assert sorted((p.name, p.read_bytes()) for p in dataset.glob("*.json")) == before
    assert not list(dataset.glob(".*"))


def test_overrides_add_up_and_the_later_wins(dataset, tmp_path):
    assert override(tmp_path, {"lms_kernels": [3], "block_by_level": {"encoder": "LMS"}}) == 0
    second = tmp_path / "second.json"
    second.write_text('{"lgmsnet": {"lms_kernels": [5], "block_by_level": {"decoder": "Fusion"}}}')
    assert main(["override", "999", "--plans", "New", "--apply", str(second), "--as", "Newer"]) == 0
    settings = settings_of(PlansManager(str(dataset / "Newer.json")).get_configuration("2d"))
    assert settings.lms_kernels == [5]
    assert (settings.block_by_level.encoder, settings.block_by_level.decoder) == ("LMS", "Fusion")


def test_one_configuration_only(dataset, tmp_path):
    assert override(tmp_path, {"lms_kernels": [3]}, "-c", "3d_cascade_fullres") == 0
    assert kernels(dataset, "3d_cascade_fullres") == [[(3, 3, 3)]] * 3
    assert kernels(dataset, "3d_fullres")[0] == [(k, k, k) for k in (3, 5, 7, 9)]


def test_says_when_more_memory_is_needed(dataset, capsys):
    assert main(["override", "999", "--apply", "kernels_3", "--as", "Same"]) == 0
    assert "GiB" not in capsys.readouterr().out
    assert main(["override", "999", "--apply", "large", "--as", "Large"]) == 0
    said = capsys.readouterr().out
    assert "3d_fullres: a training step needs about" in said
    assert "nnunet_lgms plan 999 --vram GB --apply large" in said


def test_auto_is_resolved_printed_and_repeatable(dataset, capsys):
    assert main(["override", "999", "--apply", "kernels_auto", "--as", "A"]) == 0
    said = capsys.readouterr().out
    # one object of 12 x 12 x 12 mm
    assert "3d_fullres: kernels from 1 objects in 1 cases" in said
    assert "level 1: voxels of 4 x 1 x 1 mm, objects of 12 mm -> kernels 1x3x3, 1x5x5, 1x7x7, 3x9x9" in said
    assert kernels(dataset, "3d_fullres", "A")[0] == [(1, 3, 3), (1, 5, 5), (1, 7, 7), (3, 9, 9)]
    assert '"auto"' not in (dataset / "A.json").read_text()
    assert main(["override", "999", "--apply", "kernels_auto", "--as", "B"]) == 0
    assert (dataset / "A.json").read_text().replace('"A"', '"B"') == (dataset / "B.json").read_text()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"lms_kernels": [27]}, ["lgmsnet.lms_kernels holds 27 at level 3", "12x12", "1 to 25", "-c 3d_fullres"]),
        ({"gms_ratio": "126:3"}, ["126:3", "64 channels"]),
        ({"widths": {"5": 8}}, ["level 5", "levels 1 to 4"]),
        ({"lms_kernals": [3]}, ["did you mean 'lms_kernels'"]),
        ({"requires": "7.0"}, ["need nnunet_lgms 7.0"]),
    ],
)
def test_refused_when_written(dataset, tmp_path, capsys, settings, said):
    assert override(tmp_path, settings) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in said:
        assert part in error
    assert not (dataset / "New.json").exists()


def test_the_largest_kernel_that_a_refusal_names_is_taken(dataset, tmp_path):
    assert override(tmp_path, {"lms_kernels": [3, 25]}, "-c", "2d") == 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["999", "--apply", "kernel_3"], "did you mean 'kernels_3'"),
        (["999", "--apply", "qqqqqq"], "by name there are"),
        (["998", "--apply", "kernels_3"], "'998' names no dataset"),
        (["999", "--apply", "kernels_3", "--plans", "Nope"], "there are nnUNetPlans"),
        (["999", "--apply", "kernels_3", "--as", "a/b"], "'a/b' cannot name"),
        (["999", "--apply", "kernels_3", "--as", "a__b"], "'a__b' cannot name"),
        (["999", "--apply", "kernels_3", "-c", "3d"], "no configuration '3d'"),
    ],
)
def test_bad_input_is_one_sentence(dataset, capsys, arguments, said):
    assert main(["override", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_is_no_override(dataset, tmp_path, capsys):
    path = tmp_path / "x.json"
    for content, said in [("{", "not JSON"), ('{"lms_kernels": [3]}', "holds lms_kernels"), ("[]", "holds list")]:
        path.write_text(content)
        assert main(["override", "999", "--apply", str(path)]) == 2
        assert said in capsys.readouterr().err


TRAINER = """
    import torch
    from nnunet_lgms.nnunet.trainer import nnUNetTrainerLGMSNet

    class nnUNetTrainerLGMSNet_2steps(nnUNetTrainerLGMSNet):
        def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1

        def perform_actual_validation(self, save_probabilities=False):
            pass  # the test predicts itself
"""


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_is_no_plans_file_is_never_replaced(dataset, capsys, force):
    before = (dataset / "dataset.json").read_bytes()
    assert main(["override", "999", "--apply", "kernels_3", "--as", "dataset", *force]) == 2
    assert "holds no plans and stays" in capsys.readouterr().err
    assert (dataset / "dataset.json").read_bytes() == before


@pytest.mark.slow
def test_from_override_to_prediction_by_the_printed_commands(tmp_path, clean_env, hippocampus):
    """Real MRI; raw and preprocessed data are gone when it predicts."""
    folders = {v: tmp_path / v for v in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    raw = folders["nnUNet_raw"] / "Dataset999_Hippocampus"
    for sub in ("imagesTr", "labelsTr"):
        (raw / sub).mkdir(parents=True)
        for path in sorted((hippocampus / sub).iterdir())[:4]:
            shutil.copy(path, raw / sub)
    description = json.loads((hippocampus / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": 4}))
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (raw / "labelsTr").iterdir())
    (raw / "splits_final.json").write_text(json.dumps([{"train": cases[:3], "val": cases[3:]}]))
    for folder in ("nnUNet_preprocessed", "nnUNet_results"):
        folders[folder].mkdir()
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "two_steps.py").write_text(textwrap.dedent(TRAINER))
    env = {
        **clean_env,
        **{name: str(path) for name, path in folders.items()},
        "nnUNet_extTrainer": str(tmp_path / "trainers"),
        "nnUNet_def_n_proc": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), clean_env.get("PATH", "")]),
    }

    def sh(command: str) -> str:
        done = subprocess.run(shlex.split(command), env=env, cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    sh("nnUNetv2_plan_and_preprocess -d 999 -c 3d_fullres -np 1 -npfp 1")
    said = sh(f"{sys.executable} -m nnunet_lgms override 999 --apply kernels_auto --as Auto -c 3d_fullres")
    assert "kernels from 8 objects in 4 cases" in said
    (train,) = re.findall(r"^nnUNetv2_train .*3d_fullres.*$", said, re.M)
    env["nnUNet_n_proc_DA"] = "0"  # batches are made in the training process; nnU-Net's planner cannot count so low
    assert train.endswith(" -device cpu") != torch.cuda.is_available()
    sh(train.removesuffix(" -device cpu").replace("LGMSNet", "LGMSNet_2steps") + " -device cpu")

    (model,) = folders["nnUNet_results"].glob("Dataset999_Hippocampus/*__Auto__3d_fullres")
    model = shutil.move(model, tmp_path / "model")
    case = tmp_path / "in"
    case.mkdir()
    shutil.copy(raw / "imagesTr" / f"{cases[3]}_0000.nii.gz", case)
    for name, folder in folders.items():
        shutil.rmtree(folder)
        env.pop(name)
    sh(
        f"nnUNetv2_predict_from_modelfolder -i {case} -o {tmp_path / 'out'} -m {model} -f 0 -chk checkpoint_final.pth "
        "-device cpu -npp 1 -nps 1 --disable_tta"
    )
    predicted = sitk.ReadImage(str(tmp_path / "out" / f"{cases[3]}.nii.gz"))
    reference = sitk.ReadImage(str(hippocampus / "labelsTr" / f"{cases[3]}.nii.gz"))
    assert predicted.GetSize() == reference.GetSize()
    stored = json.loads((Path(model) / "plans.json").read_text())["configurations"]["3d_fullres"]["lgmsnet"]
    assert stored["lms_kernels"]["3"] == [[3, 3, 3], [3, 3, 3], [5, 5, 5], [5, 5, 5]]
