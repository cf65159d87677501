"""`nnunet_lgms override`: new plans beside old ones, and the road from there to a prediction."""

import errno
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
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from planned import configuration
from volumes import write_volume
from workshop import Workshop

from nnunet_lgms.cli import main
from nnunet_lgms.config import settings_of
from nnunet_lgms.nnunet.builder import build_network
from nnunet_lgms.planning import memory
from nnunet_lgms.planning.memory import memory_remarks

NAME = "Dataset999_Tiny"
ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures("no_estimates")


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
    write_volume(folder / "gt_segmentations" / "a.nii.gz", segmentation, (4.0, 1.0, 1.0))
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


@pytest.mark.slow
def test_says_when_more_memory_is_needed(dataset, monkeypatch, capsys):
    monkeypatch.setattr(memory, "memory_remarks", memory_remarks)
    assert main(["override", "999", "--apply", "kernels_3", "--as", "Same"]) == 0
    assert "GiB" not in capsys.readouterr().out
    assert main(["override", "999", "--apply", "large", "--as", "Large"]) == 0
    said = capsys.readouterr().out
    assert "3d_fullres: a training step needs about" in said
    assert "nnunet_lgms plan 999 --vram GB --apply large" in said
    assert main(["override", "999", "--batch-size", "3", "-c", "2d", "--as", "Three"]) == 0
    said = capsys.readouterr().out
    assert "2d: a training step needs about" in said and "for a smaller" not in said


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
        ({"lms_kernels": [27]}, ["lgmsnet.lms_kernels holds 27 at level 3", "12x12", "1 to 25"]),
        ({"lms_kernels": {"1+": [[1, 3, 3]]}}, ["2d: ", "To leave 2d as it is, add -c 3d_fullres."]),
        ({"gms_ratio": "126:3"}, ["126:3", "64 channels"]),
        ({"widths": {"5": 8}}, ["level 5", "levels 1 to 4"]),
        ({"lms_kernals": [3]}, ["did you mean 'lms_kernels'"]),
        ({"requires": "7.0"}, ["need nnunet_lgms 7.0"]),
        ({"block_by_level.encoder": "LMS"}, ['write it as {"block_by_level": {"encoder": ...}}']),
        ({"block_by_level": {"decoder": {"4": "GMS"}}}, ["level 4, which it does not have", "levels 1 to 3"]),
    ],
)
def test_refused_when_written(dataset, tmp_path, capsys, settings, said):
    assert override(tmp_path, settings) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in said:
        assert part in error
    assert not (dataset / "New.json").exists()


def test_settings_without_effect_are_written_with_a_remark(dataset, tmp_path, capsys):
    assert override(tmp_path, {"lms_kernels": {"1": [3], "4": [3]}, "gms_ratio": {"1": "3:1"}}, "-c", "2d") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        '2d: lgmsnet.lms_kernels changes nothing at "4": the plan has LMS blocks at level(s) 1, 2, 3 only.',
        '2d: lgmsnet.gms_ratio changes nothing at "1": the plan has GMS blocks at level(s) 3, 4 only.',
    ]
    assert kernels(dataset, "2d") == [[(3, 3)], *[[(k, k) for k in (3, 5, 7, 9)]] * 2]


@pytest.mark.parametrize("path", sorted((ROOT / "plans").glob("*.json")), ids=lambda p: p.stem)
def test_the_overrides_of_the_package_leave_nothing_to_remark(dataset, capsys, path):
    assert main(["override", "999", "--apply", path.stem]) == 0
    assert "changes nothing" not in capsys.readouterr().out


def test_the_name_of_plans_may_have_its_ending(dataset, capsys):
    assert main(["override", "999", "--apply", "kernels_3", "--plans", "nnUNetPlans.json"]) == 0
    assert (dataset / "nnUNetPlans_kernels_3.json").is_file()
    assert "nnUNetPlans_kernels_3.json written beside nnUNetPlans.json of" in capsys.readouterr().out
    assert main(["override", "999", "--apply", "kernels_3", "--plans", "nnUNetPlans.json", "--as=nnUNetPlans"]) == 2
    assert "would replace the plans that it starts from" in capsys.readouterr().err
    assert main(["override", "999", "--apply", "kernels_3", "--plans", "Nope.json"]) == 2
    assert f"{NAME} has no plans 'Nope': there are nnUNetPlans" in capsys.readouterr().err


def test_what_is_applied_is_a_file(dataset, tmp_path, monkeypatch, capsys):
    (tmp_path / "small").mkdir()
    missing = tmp_path / "gone" / "kernels_3.json"  # the package has one of that name
    for given, said in (
        (tmp_path, f"The override '{tmp_path}' is a folder, not a file: give one of its files; by name there are"),
        (missing, f"There is no file '{missing}': correct the path; by name there are gms_only, "),
        ("KERNELS_3", "There is no override 'KERNELS_3'; did you mean 'kernels_3'"),
    ):
        assert main(["override", "999", "--apply", str(given), "--as", "New"]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (dataset / "New.json").exists()
    monkeypatch.chdir(tmp_path)  # a folder does not hide the package's override of that name
    assert main(["override", "999", "--apply", "small", "--as", "New"]) == 0
    assert main(["override", "999", "--apply", "kernels_3.json", "--as", "New", "--force"]) == 0


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
        (["Dataset777_Nothing", "--apply", "kernels_3"], "There is no dataset Dataset777_Nothing"),
    ],
)
def test_bad_input_is_one_sentence(dataset, capsys, arguments, said):
    assert main(["override", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_other_configurations_are_offered_only_if_they_fit(dataset, tmp_path, capsys):
    assert override(tmp_path, {"gms_ratio": "4096:1"}) == 2
    assert "To leave" not in capsys.readouterr().err


def test_what_is_wrong_in_the_old_plans_can_be_overridden_or_is_said_to_be_there(dataset, tmp_path, capsys):
    path = dataset / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["2d"]["lgmsnet"] = {"lms_kernels": "auto"}  # by hand
    path.write_text(json.dumps(plans))
    assert override(tmp_path, {"lms_kernels": [3]}) == 0
    assert kernels(dataset, "2d") == [[(3, 3)]] * 3
    plans["configurations"]["2d"]["lgmsnet"] = {"lms_kernels": [4]}
    path.write_text(json.dumps(plans))
    assert override(tmp_path, {"lms_kernels": [3]}, "--force") == 2
    assert "2d: in the plans to start from, lgmsnet.lms_kernels is [4]" in capsys.readouterr().err


def test_the_system_s_refusal_names_the_file_and_a_way_out(dataset, tmp_path, monkeypatch, capsys):
    def read_only(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", read_only)
    assert main(["override", "999", "--apply", "kernels_3", "--as", "New"]) == 2
    error = capsys.readouterr().err
    assert f"{dataset / 'New.json'}: Permission denied; change its permissions, or name another folder." in error


def test_what_is_no_override(dataset, tmp_path, capsys):
    path = tmp_path / "x.json"
    for content, said in [("{", "not JSON"), ('{"lms_kernels": [3]}', "holds 'lms_kernels'"), ("[]", "holds list")]:
        path.write_text(content)
        assert main(["override", "999", "--apply", str(path)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"lgmsnet": {"heads": 2, "heads": 4}}', "has the key 'heads' more than once in one table: keep one of them."),
        ('{"lgmsnet": {"widths": {"1": 8, "1": 16}}}', "has the key '1' more than once"),
        ('{"lgmsnet": {}, "lgmsnet": {"heads": 2}}', "has the key 'lgmsnet' more than once"),
        ('{"lgmsnet": {"depths": 100000}}', "depths is 100000: allowed is whole numbers from 1 to 64"),
        ('{"lgmsnet": {"widths": 4000000000}}', "widths is 4000000000: allowed is whole numbers from 1 to 4096"),
        ('{"lgmsnet": {"\\ud800": 1}}', "no setting '\\ud800'; known are"),
        ('{"lgmsnet": {"block_by_level": {"\\ud800": 1}}}', "block_by_level is {'\\ud800': 1}"),
        ('{"lgmsnet": {"a\\nb": 1}}', "no setting 'a\\nb'"),
        ('{"lgmsnet": {"widths": ' + "[" * 100 + "]" * 100 + "}}", "nested more than 64 deep"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"lgmsnet": {"requires": "' + "9" * 300 + '"}}', "requires is '999"),
        ('{"lgmsnet": {"widths": ' + str([-1] * 10_000) + "}}", "..."),
        ('{"lgmsnet": {"block_by_level": {"decoder": "' + "Conv+" * 5000 + 'Conv"}}}', "block_by_level.decoder is"),
        ('{"' + "x" * 5000 + '": 1}', "holds 'xxx"),
        ("\x00", "is not JSON"),
    ],
    ids=lambda value: value[:30],
)
def test_hostile_overrides_are_one_short_sentence(dataset, tmp_path, capsys, content, said):
    path = tmp_path / "x.json"
    path.write_text(content)
    assert main(["override", "999", "--apply", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and len(error) < 500 + len(str(path))


def test_an_override_with_a_byte_order_mark_is_read(dataset, tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"lgmsnet": {"lms_kernels": [3]}}', "utf-8-sig")
    assert main(["override", "999", "--apply", str(path), "--as", "New", "-c", "2d"]) == 0
    assert kernels(dataset, "2d") == [[(3, 3)]] * 3


@pytest.mark.parametrize(
    "name", ["-x", "--force", "a\nb", "a;rm -rf x", "$(id)", "a b", "..", "../a", "/tmp/a", "a/b", "", ".a", "x" * 300]
)
def test_names_of_plans_are_plain(dataset, capsys, name):
    before = sorted(dataset.parent.parent.rglob("*"))
    assert main(["override", "999", "--apply", "kernels_3", f"--as={name}"]) == 2
    error = capsys.readouterr().err
    assert "cannot name a plans file" in error and error.count("\n") == 1
    assert sorted(dataset.parent.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    [
        "Dataset999_Tiny/../../x",
        "Dataset/../../x",
        "../Dataset999_Tiny",
        "Dataset999_a\nb",
        "²",
        "DatasetX",
        "Dataset999",
    ],
)
@pytest.mark.parametrize("command", ["override", "plan", "profile"])
def test_names_of_datasets_stay_in_their_folder(dataset, capsys, command, name):
    before = sorted(dataset.parent.parent.rglob("*"))
    assert main([command, name, *(["--apply", "kernels_3"] if command == "override" else [])]) == 2
    error = capsys.readouterr().err
    assert "names no dataset" in error and error.count("\n") == 1
    assert sorted(dataset.parent.parent.rglob("*")) == before


def without(*path: str):
    def change(plans: dict) -> None:
        for key in path[:-1]:
            plans = plans[key]
        del plans[path[-1]]

    return change


def with_value(value, *path: str):
    def change(plans: dict) -> None:
        for key in path[:-1]:
            plans = plans[key]
        plans[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change, said",
    [
        (with_value({}, "configurations"), "have no configuration"),
        (with_value(None, "configurations", "2d"), "configuration '2d' is None"),
        (with_value(None, "configurations", "2d", "lgmsnet"), '2d: in the plans to start from, "lgmsnet" is None'),
        (with_value({}, "configurations", "a/../../b"), "'a/../../b' cannot name a configuration"),
        (with_value({}, "configurations", "-x"), "'-x' cannot name a configuration"),
        (with_value("2d", "configurations", "2d", "inherits_from"), "in a circle, '2d' from '2d'"),
        (with_value("gone", "configurations", "2d", "inherits_from"), "inherits from 'gone', which the plans do not"),
        (without("configurations", "2d", "batch_size"), "'2d' has no batch_size"),
        (with_value(10**12, "configurations", "2d", "batch_size"), "has batch_size 1000000000000"),
        (without("configurations", "2d", "data_identifier"), "'2d' has no data_identifier"),
        (with_value("../x", "configurations", "2d", "data_identifier"), "has data_identifier '../x'"),
        (without("configurations", "2d", "architecture"), "2d: nnU-Net cannot read the configuration"),
        (without("configurations", "2d", "patch_size"), "2d: The plan's configuration cannot be read"),
        (with_value([0, 0], "configurations", "2d", "patch_size"), "2d: The plan has patch_size [0, 0]"),
        (with_value([64, 1.5], "configurations", "2d", "patch_size"), "2d: The plan has patch_size [64, 1.5]"),
        (with_value([64, -1], "configurations", "2d", "patch_size"), "2d: The plan has patch_size [64, -1]"),
        (with_value([64], "configurations", "2d", "patch_size"), "2d: The plan has patch_size [64]"),
        (with_value([2**15] * 2, "configurations", "2d", "patch_size"), "268435456 voxels in all"),
        (with_value([1.0] * 3, "configurations", "2d", "spacing"), "2d: The plan has spacing [1.0, 1.0, 1.0]"),
        (with_value([1.0, float("nan")], "configurations", "2d", "spacing"), "2d: The plan has spacing [1.0, nan]"),
        (with_value([1.0, 0], "configurations", "2d", "spacing"), "2d: The plan has spacing [1.0, 0]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_plans_are_one_sentence(dataset, tmp_path, capsys, change, said):
    path = dataset / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    change(plans)
    path.write_text(json.dumps(plans))
    assert override(tmp_path, {"lms_kernels": [3]}) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and len(error) < 600
    assert not (dataset / "New.json").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (without("labels"), "has no labels"),
        (with_value([], "labels"), "has labels []"),
        (with_value({"background": 0, "a": "x"}, "labels"), "has labels {'background': 0, 'a': 'x'}"),
        (with_value({"background": 1, "a": 2}, "labels"), "has labels"),
        (with_value({"background": 0, "a": [1, 2]}, "labels"), "nnU-Net refuses the labels"),
        (with_value("../*", "file_ending"), "has file_ending '../*'"),
        (without("channel_names"), "names no channels"),
        (with_value({}, "channel_names"), "has channel_names {}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_dataset_json_is_one_sentence(dataset, tmp_path, capsys, change, said):
    path = dataset / "dataset.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert override(tmp_path, {"lms_kernels": [3]}) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    path.write_text("[1")
    assert override(tmp_path, {"lms_kernels": [3]}) == 2
    assert "dataset.json is not JSON" in capsys.readouterr().err


def test_auto_names_the_segmentation_that_cannot_be_read(dataset, capfd):
    (dataset / "gt_segmentations" / "b.nii.gz").touch()
    assert main(["override", "999", "--apply", "kernels_auto"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "b.nii.gz cannot be read" in error and "give kernels as numbers" in error


def test_printed_commands_are_safe_to_paste(dataset, capsys):
    path = dataset / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["2d; touch x"] = plans["configurations"].pop("2d")
    path.write_text(json.dumps(plans))
    assert main(["override", "999", "--apply", "kernels_3"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("nnUNetv2")]
    assert any("2d; touch x" in shlex.split(line) for line in said)
    assert not any("touch" in shlex.split(line) for line in said)


TRAINER = """
    import torch
    from nnunet_lgms.nnunet.trainer import nnUNetTrainerLGMSNet

    class nnUNetTrainerLGMSNet_2steps(nnUNetTrainerLGMSNet):
        def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1

        def on_train_start(self):
            super().on_train_start()
            self.logger.plot_progress_png = lambda folder: None  # its process would cost more than these steps

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
def test_from_override_to_prediction_by_the_printed_commands(tmp_path, clean_env, hippocampus, monkeypatch, capsys):
    """Real MRI; raw and preprocessed data are gone when it predicts.

    What is printed is run as a shell runs it; the commands around it are called here, as a process costs seconds.
    """
    workshop = Workshop(tmp_path / "nnunet")
    raw = workshop.raw / "Dataset999_Hippocampus"
    for sub in ("imagesTr", "labelsTr"):
        (raw / sub).mkdir(parents=True)
        for path in sorted((hippocampus / sub).iterdir())[:4]:
            shutil.copy(path, raw / sub)
    description = json.loads((hippocampus / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": 4}))
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (raw / "labelsTr").iterdir())
    (raw / "splits_final.json").write_text(json.dumps([{"train": cases[:3], "val": cases[3:]}]))
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "two_steps.py").write_text(textwrap.dedent(TRAINER))
    workshop.env["nnUNet_extTrainer"] = str(tmp_path / "trainers")

    workshop("plan_and_preprocess", "-d", 999, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    planned = workshop.preprocessed / "Dataset999_Hippocampus" / "nnUNetPlans.json"
    plans = json.loads(planned.read_text())
    plans["configurations"]["3d_fullres"]["batch_size"] = 2  # the planner thinks of a GPU
    planned.write_text(json.dumps(plans))
    capsys.readouterr()
    with workshop.environment():
        assert main(["override", "999", "--apply", "kernels_auto", "--as", "Auto", "-c", "3d_fullres"]) == 0
    said = capsys.readouterr().out
    assert "kernels from 8 objects in 4 cases" in said
    (train,) = re.findall(r"^nnUNetv2_train .*3d_fullres.*$", said, re.M)
    assert train.endswith(" -device cpu") != torch.cuda.is_available()
    train = train.removesuffix(" -device cpu").replace("LGMSNet", "LGMSNet_2steps") + " -device cpu"
    env = {
        **clean_env,
        **workshop.env,
        "nnUNet_def_n_proc": "1",
        "nnUNet_n_proc_DA": "0",  # batches are made in the training process
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # nnUNetv2_train takes all cores, which other tests may be using
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), clean_env.get("PATH", "")]),
    }
    done = subprocess.run(shlex.split(train), env=env, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    (model,) = workshop.results.glob("Dataset999_Hippocampus/*__Auto__3d_fullres")
    model = shutil.move(model, tmp_path / "model")
    case, out = tmp_path / "in", tmp_path / "out"
    case.mkdir()
    out.mkdir()
    shutil.copy(raw / "imagesTr" / f"{cases[3]}_0000.nii.gz", case)
    shutil.rmtree(tmp_path / "nnunet")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("nnUNet_extTrainer", workshop.env["nnUNet_extTrainer"])
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    predictor.predict_from_files_sequential(str(case), str(out))
    predicted = sitk.ReadImage(str(out / f"{cases[3]}.nii.gz"))
    reference = sitk.ReadImage(str(hippocampus / "labelsTr" / f"{cases[3]}.nii.gz"))
    assert predicted.GetSize() == reference.GetSize()
    stored = json.loads((Path(model) / "plans.json").read_text())["configurations"]["3d_fullres"]["lgmsnet"]
    assert stored["lms_kernels"]["3"] == [[3, 3, 3], [3, 3, 3], [5, 5, 5], [5, 5, 5]]
