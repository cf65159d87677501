"""What a plan costs: counted memory, the planner that fills a card with it, and the profile."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from planned import configuration
from torch import nn

from nnunet_lgms import LGMSNet
from nnunet_lgms.architecture.encoder import MaxPool
from nnunet_lgms.cli import main
from nnunet_lgms.config import LGMSSettings
from nnunet_lgms.config.resolve import Topology
from nnunet_lgms.graphs.network import GraphedLGMSNet
from nnunet_lgms.nnunet.builder import build_network
from nnunet_lgms.nnunet.loss import CrossEntropyAndDice
from nnunet_lgms.ops import backend
from nnunet_lgms.ops.backend import as_on_gpu
from nnunet_lgms.ops.norm_act import norm_act
from nnunet_lgms.planning import training_step
from nnunet_lgms.planning.memory import Lifetimes, OnGPU, trace_training_step
from nnunet_lgms.planning.override import build_on_meta
from nnunet_lgms.planning.planner import GIB, LGMSNetPlanner
from nnunet_lgms.planning.profile import (
    LGMSNET,
    NNUNET,
    Subject,
    _measure,
    as_table,
    count_gmac,
    measured_profile,
    receptive_fields,
    static_profile,
)

NAME = "Dataset998_Big"
DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1, "lesion": 2}, "file_ending": ".nii.gz"}


def plans() -> dict:
    return {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "2d": configuration((48, 40), 4, spacing=(0.5, 0.5)),
            "3d_fullres": configuration(
                (16, 24, 16), 3, spacing=(3.0, 1.0, 1.0), kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3]]
            ),
        },
    }


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Path:
    """A dataset of 20 CTs that exist in its fingerprint only; its preprocessed folder."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    raw, folder = tmp_path / "nnUNet_raw" / NAME, tmp_path / "nnUNet_preprocessed" / NAME
    for sub in ("imagesTr", "labelsTr"):
        (raw / sub).mkdir(parents=True)
    (folder / "gt_segmentations").mkdir(parents=True)
    segmentation = np.zeros((8, 20, 20), np.uint8)
    segmentation[2:4, 5:10, 5:10] = 1
    image = sitk.GetImageFromArray(segmentation)
    for path in ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"):
        sitk.WriteImage(image, str(raw / path))
    sitk.WriteImage(image, str(folder / "gt_segmentations" / "a.nii.gz"))
    (raw / "dataset.json").write_text(json.dumps({**DATASET, "numTraining": 200}))
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    fingerprint = {
        "spacings": [[3.0, 0.8, 0.8]] * 20,
        "shapes_after_crop": [[64, 200, 200]] * 20,
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {"0": {"mean": 0.0, "std": 1.0}},
    }
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans()))
    return folder


# --- counted memory ---------------------------------------------------------------------------------------------------


def test_counts_what_lives_at_once():
    with Lifetimes() as lifetimes:
        a = torch.empty(1000, device="meta")  # 4000 bytes take 4096
        b = a + 1  # the last use of a
        b.view(10, 100).mul_(2)  # no memory of its own
        c = b + 1  # the last use of b
    assert lifetimes.peak() == 2 * 4096
    assert lifetimes.peak(kept=[a, c]) == 3 * 4096


def test_an_operator_of_kernels_counts_what_it_allocates_on_the_way():
    @torch.library.triton_op("nnunet_lgms_test::with_workspace", mutates_args=())
    def with_workspace(x: torch.Tensor) -> torch.Tensor:
        workspace = torch.empty(4096, device=x.device)
        return torch.empty_like(x) + workspace[0]

    x = torch.empty(1024, device="meta")
    with Lifetimes() as lifetimes:
        with_workspace(x)
    # the workspace, and the result before and after the addition
    assert lifetimes.peak() == 4 * (4096 + 2 * 1024)


@pytest.mark.skipif(not backend.HAS_TRITON, reason="counts the kernels' path")
def test_the_kernels_path_is_counted():
    x = torch.empty(2, 64, 64, 4, device="meta", dtype=torch.float16, requires_grad=True).movedim(-1, 1)
    with torch.device("meta"):
        norm = nn.BatchNorm2d(4)
    maps = []
    for on_gpu in (True, False):
        with Lifetimes() as lifetimes, as_on_gpu() if on_gpu else nullcontext():
            norm_act(x, norm, "gelu_first")
        maps.append(lifetimes.peak() / (2 * x.numel()))
    assert 1 <= maps[0] < 1.2  # statistics beside the result
    assert maps[1] >= 2  # the activation as well


def test_dtypes_are_those_of_autocast_on_a_gpu():
    x = torch.empty(2, 4, 8, 8, device="meta")
    with torch.device("meta"):
        convolution, norm, group = nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)
    with OnGPU():
        half = convolution(x)
        assert half.dtype == torch.float16
        assert group(norm(half)).dtype == torch.float16
        assert F.softmax(half, 1).dtype == torch.float32
        assert (half + x[..., :6, :6]).dtype == torch.float32


@pytest.mark.parametrize(
    "module, maps", [(nn.InstanceNorm2d(4), 2), (nn.Sequential(nn.InstanceNorm2d(4), nn.GELU()), 3)]
)
def test_a_norm_keeps_its_input_and_an_activation_nothing(module, maps):
    x = torch.empty(2, 4, 64, 64, device="meta", dtype=torch.float16, requires_grad=True)
    with Lifetimes() as lifetimes, OnGPU():
        start = x * 1
        module(start).sum().backward()
    # the input, which is kept, and what one operator reads and writes at a time
    assert lifetimes.peak() == pytest.approx(maps * 2 * x.numel(), rel=0.02)


def test_pooling_keeps_no_indices():
    x = torch.empty(2, 4, 64, 64, device="meta", dtype=torch.float16, requires_grad=True)
    with Lifetimes() as lifetimes, OnGPU():
        out = F.max_pool2d(x, (2, 2), (2, 2), ceil_mode=True)
    assert out.shape == (2, 4, 32, 32)
    assert lifetimes.peak() == 2 * out.numel()


def test_attention_is_counted_without_its_matrix():
    n = 10_000
    query = torch.empty(1, 4, n, 8, device="meta", requires_grad=True)
    with Lifetimes() as lifetimes, OnGPU():
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    assert lifetimes.peak() < n * n


def counted(patch, n_stages, batch, n_classes=3, **settings):
    topology = Topology.of(configuration(patch, n_stages))
    network = build_on_meta(LGMSSettings.from_plan(settings), topology, 1, n_classes)
    return trace_training_step(network, (batch, 1, *patch), n_classes)


@pytest.mark.slow
def test_activations_grow_with_the_batch_and_the_patch_and_the_widths():
    # all with so many voxels that the convolutions at full resolution are the kernels'
    one, two = counted((64, 64, 64), 4, 4), counted((64, 64, 64), 4, 8)
    assert two.static == one.static
    assert two.activations / one.activations == pytest.approx(2, rel=0.1)
    assert counted((64, 128, 64), 4, 4).activations / one.activations == pytest.approx(2, rel=0.1)
    large = counted((64, 64, 64), 4, 4, widths={"1": 32, "2": 64, "3+": 128, "4+": 256})
    assert large.activations > 1.7 * one.activations and large.static > 3 * one.static


def test_deep_supervision_is_counted():
    # with few classes the peak lies in the decoder's last block, when the lower heads are done
    plain, supervised = (counted((32, 32, 32), 4, 2, n_classes=8, deep_supervision=on) for on in (False, True))
    assert supervised.activations > plain.activations
    assert supervised.static > plain.static  # the momentum of the auxiliary heads


def test_static_is_weights_and_momentum():
    network = build_network(PlansManager(plans()).get_configuration("2d"), 1, 3, False)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    everything = sum(t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()])
    assert counted((48, 40), 4, 1).static == everything + 4 * trained


# --- the planner ------------------------------------------------------------------------------------------------------


def planned(vram: float, **kwargs) -> tuple[LGMSNetPlanner, dict]:
    planner = LGMSNetPlanner(NAME, vram, **kwargs)
    return planner, planner.plan_experiment()


@pytest.mark.slow
def test_plans_fill_the_card_and_no_more(dataset):
    sizes = []
    for vram in (4, 12):
        planner, written = planned(vram, plans_name=f"P{vram}")
        for name in ("2d", "3d_fullres"):
            used = planner.memory_of(written["configurations"][name]) / GIB
            assert 0.6 * vram < used < vram, (name, vram, used)
        fullres = written["configurations"]["3d_fullres"]
        sizes.append(np.prod(fullres["patch_size"]) * fullres["batch_size"])
        assert fullres["batch_size"] >= 2
    assert sizes[1] > 2 * sizes[0]


@pytest.mark.slow
def test_stock_nnunet_reads_the_plans(dataset):
    planned(4, plans_name="P4")
    manager = PlansManager(str(dataset / "P4.json")).get_configuration("3d_fullres")
    assert manager.data_identifier == "nnUNetPlans_3d_fullres"
    own = get_network_from_plans(
        manager.network_arch_class_name,
        manager.network_arch_init_kwargs,
        manager.network_arch_init_kwargs_req_import,
        1,
        3,
        deep_supervision=True,
    )
    assert type(own).__name__ == "PlainConvUNet"
    assert len(build_network(manager, 1, 3).encoder.output_channels) == manager.network_arch_init_kwargs["n_stages"]


@pytest.mark.slow
def test_dearer_settings_get_a_smaller_patch(dataset):
    patches = []
    for i, settings in enumerate(({}, {"widths": {"1": 32, "2": 64, "3+": 128, "4+": 256}})):
        planner, written = planned(6, settings=settings, plans_name=f"P{i}")
        content = written["configurations"]["3d_fullres"]
        assert planner.memory_of(content) < 6 * GIB
        patches.append(np.prod(content["patch_size"]))
        assert ("lgmsnet" in content) == bool(settings)
    assert patches[1] < patches[0]


@pytest.mark.slow
def test_plan_command(dataset, capsys):
    assert main(["plan", "998", "--vram", "4", "--apply", "kernels_auto", "--as", "Mine"]) == 0
    said = capsys.readouterr().out
    assert "nnUNetv2_train 998 3d_fullres 0 -p Mine -tr nnUNetTrainerLGMSNet" in said and "GiB" in said
    stored = json.loads((dataset / "Mine.json").read_text())["configurations"]
    # one object of 6 x 4 x 4 mm; voxels of 3 x 0.8 x 0.8 mm
    assert stored["3d_fullres"]["lgmsnet"]["lms_kernels"]["1"][0] == [1, 3, 3]
    assert stored["2d"]["lgmsnet"]["requires"]

    before = (dataset / "Mine.json").read_bytes()
    assert main(["plan", "998", "--vram", "8", "--as", "Mine"]) == 2
    assert "--force" in capsys.readouterr().err and (dataset / "Mine.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, said",
    [
        (["998", "--vram", "0.5"], "--vram 0.5 is too small"),
        (["998", "--vram", "-1"], "--vram -1 is no amount"),
        (["998", "--vram", "0"], "--vram 0 is no amount"),
        (["998", "--vram", "nan"], "--vram nan is no amount"),
        (["998", "--vram", "inf"], "--vram inf is no amount"),
        (["998", "--as=-x"], "'-x' cannot name a plans file"),
        (["998", "--as", "dataset", "--force"], "holds no plans and stays"),
        (["998", "--as", "nnUNetPlans", "--force"], "nnU-Net's own plans and stay"),
        (["997", "--vram", "8"], "'997' names no dataset"),
        (["998", "--vram", "8", "--apply", "nothing"], "There is no override 'nothing'"),
    ],
)
def test_plan_says_what_is_wrong(dataset, capsys, arguments, said):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(dataset.glob("nnUNetLGMSNet*"))


@pytest.mark.slow
def test_plan_remarks_upon_settings_that_change_nothing(dataset, tmp_path, capsys):
    (tmp_path / "x.json").write_text('{"lgmsnet": {"lms_kernels": {"4+": [3]}}}')
    assert main(["plan", "998", "--vram", "4", "--apply", str(tmp_path / "x.json"), "--as", "Mine"]) == 0
    said = capsys.readouterr().out
    assert '3d_fullres: lgmsnet.lms_kernels changes nothing at "4+": the plan has LMS blocks at level(s) 1, 2' in said


@pytest.mark.slow
def test_plan_says_when_the_dataset_is_the_limit(dataset, capsys):
    assert main(["plan", "998", "--vram", "8", "--as", "Card"]) == 0
    assert "the dataset sets the limit" not in capsys.readouterr().out
    path = dataset.parents[1] / "nnUNet_raw" / NAME / "dataset.json"
    path.write_text(json.dumps({**DATASET, "numTraining": 3}))
    assert main(["plan", "998", "--vram", "80", "--as", "Dataset3"]) == 0
    said = capsys.readouterr().out
    assert "3d_fullres: the dataset sets the limit, not the card: patches cover at most the median image" in said


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"spacings": []}'])
def test_plan_refuses_half_a_fingerprint(dataset, capsys, content):
    (dataset / "dataset_fingerprint.json").write_text(content)
    assert main(["plan", "998", "--vram", "8"]) == 2
    assert "is no whole fingerprint of nnU-Net's: remove it" in capsys.readouterr().err


# --- the profile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dim, channels, classes, size, gmac, parameters",
    [(2, 3, 1, 256, 5.01, 2_321_393), (3, 1, 14, 96, 68.6, 6_193_742)],
)
def test_gmac_of_the_published_network(dim, channels, classes, size, gmac, parameters):
    """The figures measured on the authors' implementation: convolutions, linear layers and attention products."""
    with torch.device("meta"):
        network = LGMSNet.paper(channels, classes, dim=dim)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert count_gmac(network, (1, channels, *(size,) * dim)) == pytest.approx(gmac, rel=2e-3)


@pytest.mark.slow
def test_the_paper_s_table_needs_no_data_set(capsys, tmp_path):
    assert main(["profile", "--paper", "--json", str(tmp_path / "paper.json")]) == 0
    said = capsys.readouterr().out
    for part in ("2,321,393", "6,193,742", "nnU-Net's U-Net, 7 stages", "ResEnc M, 5 stages", "105.32 M", "2405.06880"):
        assert part in said
    flat, deep = json.loads((tmp_path / "paper.json").read_text()).values()
    assert [p["network"] for p in flat[:-1]] == [p["network"].replace("5 stages", "7 stages") for p in deep]
    assert all(p["parameters"] > flat[0]["parameters"] for p in flat[2:])
    assert (flat[0]["unused_heads"], flat[3]["unused_heads"]) == (0, 512 + 512 + 256 + 128 + 64 + 5)
    assert main(["profile"]) == 2 and "or give --paper" in capsys.readouterr().err
    assert main(["profile", "998", "--paper"]) == 2 and "--paper is of no data set" in capsys.readouterr().err


def test_the_configuration_that_is_there(dataset, capsys):
    content = json.loads((dataset / "nnUNetPlans.json").read_text())
    del content["configurations"]["3d_fullres"]
    (dataset / "Flat.json").write_text(json.dumps(content))
    assert main(["profile", "998", "-p", "Flat", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert ", 2d\n" in said and "heads for deep supervision only" in said
    assert "training step " not in said.replace("training step, GPU", "")  # a CPU is not timed unless asked to


def test_receptive_fields():
    ours, theirs = (static_profile(Subject(kind, plans(), "3d_fullres", DATASET)) for kind in (LGMSNET, NNUNET))
    first, second, third = ours["receptive_field"]
    # stem 3, LMS 9 and 3; kernel 1 across thick slices; then pooling 2, LMS 9 and 3 at half the resolution
    assert first["voxels"] == [1, 13, 13] and first["mm"] == [3, 13, 13]
    assert second["voxels"] == [1 + 1 + 2 * 10, 13 + 1 + 2 * 10, 34]
    assert not third["whole_patch"]
    # two convolutions per level, the first of which has the stride
    assert theirs["receptive_field"][0]["voxels"] == [1, 5, 5]
    assert theirs["receptive_field"][1]["voxels"] == [1 + 2 + 4, 5 + 2 + 4, 11]


def test_flat_images_have_pixels_and_no_mm():
    flat = plans() | {"image_reader_writer": "NaturalImage2DIO"}
    told = static_profile(Subject(LGMSNET, flat, "2d", DATASET))
    assert told["spacing_mm"] == [] and all(level["mm"] is None for level in told["receptive_field"])
    table = as_table([told])
    assert "patch (pixels)" in table and "13x13 pixels" in table and "mm" not in table
    assert "mm)" in as_table([static_profile(Subject(LGMSNET, plans(), "2d", DATASET))])


def test_a_receptive_field_is_where_the_gradient_is():
    planned_2d = configuration((96, 96), 2, {"lms_kernels": [3, 7]})
    network = build_network(ConfigurationManager(planned_2d), 1, 2, enable_deep_supervision=False)
    told = receptive_fields(network, Topology.of(planned_2d))[1]["voxels"]
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.BatchNorm2d, nn.GroupNorm)):  # a norm mixes positions through its statistics
                setattr(module, name, nn.Identity())
            elif isinstance(child, MaxPool):  # every voxel of the window, not only the largest
                setattr(module, name, nn.AvgPool2d(2))
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.01)
    x = torch.ones(1, 1, 96, 96, requires_grad=True)
    network.encoder(x)[1][0, :, 24, 24].sum().backward()
    seen = x.grad[0, 0].abs().sum(1).nonzero()
    assert told == [len(seen)] * 2


def test_attention_sees_the_whole_patch():
    levels = static_profile(Subject(LGMSNET, plans(), "2d", DATASET))["receptive_field"]
    assert [level["whole_patch"] for level in levels] == [False, False, False, True]


def test_profile_command(dataset, capsys, tmp_path):
    assert main(["override", "998", "--apply", "kernels_3", "--as", "K3"]) == 0
    report = tmp_path / "report.json"
    assert (
        main(
            [
                "profile",
                "998",
                "-c",
                "2d",
                "-p",
                "K3",
                "--against",
                "nnUNetPlans",
                "--steps",
                "0",
                "--json",
                str(report),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "LGMSNet" in said and "PlainConvUNet" in said and "48x40" in said
    ours, theirs = json.loads(report.read_text())["networks"]
    assert (ours["plans"], theirs["plans"]) == ("K3", "nnUNetPlans")
    assert 0 < ours["parameters"] < theirs["parameters"] and 0 < ours["gmac"] < theirs["gmac"]
    assert ours["estimated_training_mib"] > 0
    assert main(["profile", "998", "-c", "3d"]) == 2
    assert "no configuration '3d'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dataset.json", "nnUNetPlans.json", "other.json", ""])
def test_a_profile_replaces_nothing_else(dataset, capsys, name):
    (dataset / "other.json").write_text('{"machine": 1, "networks": [1]}')
    before = {p: p.read_bytes() for p in dataset.glob("*.json")}
    assert main(["profile", "998", "-c", "2d", "--steps", "0", "--json", str(dataset / name)]) == 2
    assert "is no profile and stays" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in dataset.glob("*.json")} == before


def test_a_profile_without_steps_replaces_none_with_steps(dataset, capsys):
    arguments = ["profile", "998", "-c", "2d", "--steps", "0"]
    assert main(arguments) == 0 and main(arguments) == 0
    (file,) = dataset.glob("*_profile.json")
    profile = json.loads(file.read_text())
    profile["networks"][0]["steps"] = {}
    file.write_text(json.dumps(profile))
    assert main(arguments) == 2
    assert "holds measured steps" in capsys.readouterr().err and json.loads(file.read_text()) == profile


def test_a_profile_s_file_is_looked_at_before_anything_is_measured(dataset, capsys, tmp_path):
    assert main(["profile", "998", "-c", "2d", "--json", str(tmp_path / "nowhere" / "x.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_plan_that_nnunet_cannot_read_is_one_sentence(dataset, capsys):
    content = json.loads((dataset / "nnUNetPlans.json").read_text())
    del content["configurations"]["2d"]["architecture"]
    (dataset / "Broken.json").write_text(json.dumps(content))
    assert main(["profile", "998", "-c", "2d", "-p", "Broken", "--steps", "0"]) == 2
    error = capsys.readouterr().err
    assert "nnU-Net cannot read the configuration" in error and error.count("\n") == 1


@pytest.mark.slow
def test_steps_are_measured_and_a_failure_is_told():
    subject = Subject(LGMSNET, plans(), "3d_fullres", DATASET)
    profile = static_profile(subject)
    profile["steps"] = {k: _measure(subject, k, "cpu", 2, False) for k in ("training", "inference")}
    assert all(0 < s["ms_fastest"] <= s["ms"] <= s["ms_slowest"] for s in profile["steps"].values())
    assert profile["steps"]["training"]["ms"] > profile["steps"]["inference"]["ms"]
    assert " ms (" in as_table([profile])
    if not torch.cuda.is_available():
        profile["steps"] = measured_profile(subject, "cuda", 1, False)
        assert all("failed" in step for step in profile["steps"].values())
        assert "failed: " in as_table([profile])


@pytest.mark.parametrize(
    ("kernels_run", "why", "made"),
    [(True, None, "recorded"), (False, None, "compiled"), (False, "A P100 is too old.", "recorded")],
)
def test_a_step_is_made_fast_as_its_trainer_does(kernels_run, why, made, monkeypatch: pytest.MonkeyPatch) -> None:
    network, did = GraphedLGMSNet(1, 2, 2, [8, 8], nn.Conv2d, 3, [1, 2]), []
    step = training_step.TrainingStep(network, lambda out, target: out.sum(), torch.zeros(1, 1, 8, 8), None)
    monkeypatch.setattr(torch, "compile", lambda network: did.append("compiled") or network)
    monkeypatch.setattr(training_step, "record_step", lambda *arguments: did.append("recorded"))
    step.make_fast()
    assert not did  # on a CPU
    step.data = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    monkeypatch.setattr(torch, "zeros_like", lambda data: data)
    monkeypatch.setattr(training_step, "use_kernels", lambda data: kernels_run)
    monkeypatch.setattr(training_step, "why_not_compiled", lambda device: why)
    step.make_fast()
    assert did == [made]


@pytest.mark.parametrize("kernels_run", [True, False])
@pytest.mark.parametrize("is_ours", [True, False])
def test_dice_is_compiled_unless_kernels_take_its_place(kernels_run, is_ours, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of nnU-Net's own networks are nnU-Net's, also where the kernels run."""
    pytest.importorskip("triton")
    network, compiled = GraphedLGMSNet(1, 2, 2, [8, 8], nn.Conv2d, 3, [1, 2]) if is_ours else nn.Conv2d(1, 2, 1), []
    monkeypatch.setattr(torch, "compile", lambda dice: compiled.append(dice) or dice)
    with as_on_gpu() if kernels_run else nullcontext():
        step = training_step.planned_training_step(network, (1, 1, 8, 8), 2, torch.device("cpu"), fast=True)
        assert bool(compiled) != (kernels_run and is_ours)
        monkeypatch.setattr(CrossEntropyAndDice, "forward", lambda *args: pytest.fail("LGMSNet's"))
        if not is_ours:
            step()
