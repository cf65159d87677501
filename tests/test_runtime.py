"""The runtime where neither PyTorch nor nnU-Net is: another environment, with what it says it needs and no more."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import ROOT

pytest.importorskip("onnx", reason="needs the extra [export]")
pytest.importorskip("onnxruntime", reason="needs the extra [runtime]")

import namespace  # noqa: E402
import onnx_stub  # noqa: E402

from nnunet_lgms.cli import main  # noqa: E402
from nnunet_lgms.runtime import Predictor  # noqa: E402
from nnunet_lgms.runtime.description import checksum  # noqa: E402

NEEDED = ("numpy", "onnxruntime", "SimpleITK", "nibabel", "imageio", "tifffile")
UNWANTED = ("torch", "nnunetv2", "scipy", "skimage", "batchgenerators", "matplotlib", "pydantic", "tqdm")
REPORT = """
import json, sys
from importlib.util import find_spec
from nnunet_lgms.cli import main
code = main(sys.argv[1:])
unwanted = {unwanted!r}
print(json.dumps([code, [m for m in unwanted if m in sys.modules], [m for m in unwanted if find_spec(m)]]))
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """The interpreter of an environment with the three packages that docs/how-to/deployment.md names, and this one."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    # this environment's pip; what is not imported is not compiled
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-compile", "--quiet"]
    pip += ["--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", *NEEDED], check=True, timeout=300)
    # `pip install --no-deps` puts the same folder there; test_packaging holds what a wheel has
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    Path(site.strip(), "checkout.pth").write_text(f"{ROOT}\n")
    return python


def run(python: Path, *words, env: dict) -> list:
    code = REPORT.format(unwanted=UNWANTED)
    done = subprocess.run([python, "-c", code, *map(str, words)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_whole_cases_without_pytorch_and_nnunet(bare, clean_env, hippocampus, tmp_path):
    model = onnx_stub.threshold_model(tmp_path / "model.onnx", spacing=(1.3, 0.9, 1.0), mirror_axes=(0, 2))
    images = hippocampus / "imagesTs"
    assert run(bare, "runtime", model, "-i", images, "-o", tmp_path / "out", env=clean_env) == [0, [], []]
    predictor = Predictor(model)
    files = sorted(images.glob("*.nii.gz"))
    written = sorted((tmp_path / "out").glob("*.nii.gz"))
    assert [f.name for f in written] == [f.name.replace("_0000", "") for f in files] and len(files) == 6
    for image, labels in zip(files, written):
        image, labels = sitk.ReadImage(str(image)), sitk.ReadImage(str(labels))
        assert labels.GetPixelID() == sitk.sitkUInt8
        for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(image, geometry)() == getattr(labels, geometry)()
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(written[0])))
    assert 0 < labels.mean() < 0.5
    np.testing.assert_array_equal(labels, predictor.predict(files[0]))


@pytest.mark.slow
def test_export_and_view_say_what_they_need(bare, clean_env, tmp_path):
    for command, extra in (("view", "filelock"), ("export", "nnunetv2")):
        done = subprocess.run(
            [bare, "-m", "nnunet_lgms", command, tmp_path / "model"], env=clean_env, capture_output=True, text=True
        )
        assert done.returncode == 2 and extra in done.stderr and "pip install" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_axes_channels_and_regions(tmp_path):
    """Transposed axes, two channels, a crop and regions: the labels are where the bright voxels are."""
    rng = np.random.default_rng(0)
    image = np.zeros((2, 20, 34, 27), np.float32)
    image[:, 3:18, 4:30, 2:25] = 1 + rng.random((2, 15, 26, 23))
    image[0, 8:12, 10:20, 5:9] = 60
    fields = {
        "channel_names": ("a", "b"),
        "normalization_schemes": ("ZScoreNormalization", "NoNormalization"),
        "use_mask_for_norm": (True, False),
        "intensity_properties": ({}, {}),
        "transpose_forward": (2, 0, 1),
        "transpose_backward": (1, 2, 0),
    }
    labels = Predictor(onnx_stub.threshold_model(tmp_path / "a.onnx", channels=2, **fields)).predict(
        image, spacing=(1.0, 1.0, 1.0)
    )
    np.testing.assert_array_equal(labels, image[0] == 60)
    regions = {"labels": {"background": 0, "all": [1, 2], "core": 2}, "regions_class_order": (1, 2)}
    model = onnx_stub.threshold_model(tmp_path / "b.onnx", channels=2, **fields, **regions)
    labels = Predictor(model).predict(image, spacing=(1.0, 1.0, 1.0))
    np.testing.assert_array_equal(labels, np.where(image[0] == 60, 2, 0))


def test_flat_pictures(tmp_path):
    picture = np.zeros((40, 50, 3), np.uint8)
    picture[10:20, 30:45] = 255
    sitk.WriteImage(sitk.GetImageFromArray(picture, isVector=True), str(tmp_path / "case_0000.png"))
    model = onnx_stub.threshold_model(
        tmp_path / "m.onnx",
        patch_size=(32, 32),
        channels=3,
        reader="NaturalImage2DIO",
        file_ending=".png",
        configuration="2d",
        channel_names=("R", "G", "B"),
        normalization_schemes=("ZScoreNormalization",) * 3,
        use_mask_for_norm=(False,) * 3,
        intensity_properties=({},) * 3,
        spacing=(1.0, 1.0),
        mirror_axes=(0, 1),
    )
    labels = Predictor(model).predict(tmp_path / "case_0000.png")
    # nnU-Net crops to what is not black, and a picture all of one colour has nothing that stands out
    assert labels.shape == (40, 50) and set(np.unique(labels)) <= {0, 1}
    picture[0, 0] = picture[-1, -1] = 1
    sitk.WriteImage(sitk.GetImageFromArray(picture, isVector=True), str(tmp_path / "case_0000.png"))
    labels = Predictor(model).predict(tmp_path / "case_0000.png")
    np.testing.assert_array_equal(labels, picture[..., 0] == 255)


@pytest.mark.slow
def test_breast_ultrasound_as_nnunets_predictor(shared_data, tmp_path):
    """Real BUSI images through nnU-Net's own predictor and ours, the network the same single convolution."""
    import tiny_model
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    folder = tiny_model.model_folder(tmp_path, "Dataset901_Home")
    plans, dataset = (json.loads((folder / name).read_text()) for name in ("plans.json", "dataset.json"))
    manager = PlansManager(plans)
    network = torch.nn.Conv2d(1, 2, 1)
    network.load_state_dict({"weight": torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), "bias": torch.tensor([0.0, -1.0])})
    theirs = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    theirs.manual_initialization(
        network, manager, manager.get_configuration("2d"), [network.state_dict()], dataset, "none", (0, 1)
    )
    ours = Predictor(
        onnx_stub.threshold_model(
            tmp_path / "m.onnx",
            patch_size=(32, 32),
            reader="NaturalImage2DIO",
            file_ending=".png",
            spacing=tuple(manager.get_configuration("2d").spacing),
            mirror_axes=(0, 1),
        )
    )
    reader = manager.image_reader_writer_class()
    files = sorted((shared_data / "busi_256" / "images").glob("*.png"))[::130]
    assert len(files) >= 4
    for file in files:
        (expected,) = theirs.predict_single_npy_array(*reader.read_images([str(file)]))
        labels = ours.predict(file)
        assert labels.shape == expected.shape and 0 < labels.mean() < 0.5
        assert 2 * (labels & expected).sum() / (labels.sum() + expected.sum()) >= 0.999


def test_a_file_that_was_cut_short_is_refused(tmp_path, hippocampus):
    case = next((hippocampus / "imagesTs").glob("*.nii.gz"))
    (tmp_path / "short.nii.gz").write_bytes(case.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="short.nii.gz.*cut short"):
        Predictor(onnx_stub.threshold_model(tmp_path / "m.onnx")).predict(tmp_path / "short.nii.gz")


@pytest.mark.parametrize("ending", [".nrrd", ".nii", ".nii.gz"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_that_are_not_finite_are_refused(tmp_path, value, ending):
    image = np.zeros((6, 7, 8), np.float32)
    image[2, 3, 4] = value
    sitk.WriteImage(sitk.GetImageFromArray(image), tmp_path / f"c{ending}")  # of NIfTI files it reads 0 there
    with pytest.raises(ValueError, match=f"c{ending} holds NaN or infinity"):
        Predictor(onnx_stub.threshold_model(tmp_path / "m.onnx", file_ending=ending)).predict(tmp_path / f"c{ending}")


def test_no_image_is_replaced_and_no_channel_left_out(tmp_path, capsys):
    for name in ("whole", "gap_0000", "gap_0002"):
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((6, 7, 8), np.float32)), tmp_path / f"{name}.nii.gz")
    model = str(onnx_stub.threshold_model(tmp_path / "m.onnx"))
    image, before = tmp_path / "whole.nii.gz", (tmp_path / "whole.nii.gz").read_bytes()
    assert main(["runtime", model, "-i", str(image), "-o", str(tmp_path)]) == 2
    assert "would replace the image" in capsys.readouterr().err and image.read_bytes() == before
    channels = [str(tmp_path / f"gap_{i}.nii.gz") for i in ("0000", "0002")]
    for images in ([str(tmp_path)], channels, channels[::-1], channels[:1] * 2):
        assert main(["runtime", model, "-i", *images, "-o", str(tmp_path / "out")]) == 2
        assert "give every channel once, in the order of their numbers" in capsys.readouterr().err
    (tmp_path / "images").mkdir()
    for name in ("a_0000", "b"):
        sitk.WriteImage(sitk.ReadImage(str(image)), tmp_path / f"images/{name}.nii.gz")
    assert main(["runtime", model, "-i", str(tmp_path / "images"), "-o", str(tmp_path / "out")]) == 0
    assert "looks like an image and is left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="give every channel once"):
        Predictor(model).predict(channels)
    assert main(["runtime", model, "-i", str(image), "-o", str(tmp_path / "out"), "--threads", "99999"]) == 2
    assert "this machine has 1 to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch_size", "abc"),
        ("patch_size", [0, 0, 0]),
        ("spacing", [1e-9, 1, 1]),
        ("labels", {"background": None}),
        ("labels", [1, 2]),
        ("channel_names", None),
        ("intensity_properties", []),
        ("normalization_schemes", []),
        ("transpose_backward", [1, 0, 2]),
        ("transpose_forward", [0, 0, 0]),
        ("transpose_forward", []),
        ("spacing", [1, 1]),
        ("use_mask_for_norm", []),
        ("use_mask_for_norm", None),
        ("normalization_schemes", ["CTNormalization"]),
        ("regions_class_order", []),
        ("regions_class_order", [7, 8]),
        ("regions_class_order", "x"),
        ("mirror_axes", [0, 0]),
        ("mirror_axes", [5]),
        ("file_ending", "../x"),
        ("resampling_data", {"function": "resample_torch"}),
        ("resampling_data", {"function": "resample_data_or_seg_to_shape", "order": 7}),
        ("resampling_probabilities", {"function": "resample_data_or_seg_to_shape", "order_z": -1}),
        ("labels", {"background": 0, "gap": 2}),
        ("labels", {"background": 0, "fraction": 1.5}),
        ("labels", {"background": 0, "beyond uint16": 70000}),
        ("labels", {"background": 1, "a": 0}),
        ("labels", {"background": 0, "a": 1, "ignore": 1}),
        ("labels", {"background": 0, "a": [1, -1]}),
        ("regions_class_order", [-1]),
        ("regions_class_order", [True]),
        ("patch_size", [10**9, 10**9, 10**9]),
        ("patch_size", [8192, 8192, 8192]),
        ("steps", [0, 0]),
        ("spacing", [1, 1, float("nan")]),
        ("spacing", [1, 1, 10**400]),
        ("dataset", "/tmp/elsewhere"),
        ("configuration", "../2d"),
        ("folds", ["../0"]),
        ("precision", "fp64"),
        ("format", True),
        ("an_entry_that_nobody_knows", 1),
    ],
)
def test_a_damaged_description_is_one_sentence(tmp_path, field, value):
    model = onnx_stub.threshold_model(tmp_path / "m.onnx")
    description = tmp_path / "m.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {field: value}))
    with pytest.raises(ValueError, match="m.json is not what `nnunet_lgms export` writes"):
        Predictor(model)


@pytest.mark.parametrize(
    "wrong", [{"mean": "a lot"}, {"std": -1}, {"std": None}, {"percentile_00_5": 3}, {"percentile_99_5": float("inf")}]
)
def test_intensities_that_cannot_be_are_refused(tmp_path, wrong):
    properties = {"percentile_00_5": 0, "percentile_99_5": 2, "mean": 1, "std": 1}
    fields = {"normalization_schemes": ["CTNormalization"], "intensity_properties": [properties | wrong]}
    with pytest.raises(ValueError, match="intensity_properties is .*, allowed is for CTNormalization numbers for perc"):
        Predictor(onnx_stub.threshold_model(tmp_path / "m.onnx", **fields))


@pytest.mark.parametrize("step", ["1e-4", "nan", "2"])
def test_steps_that_nobody_means_are_refused(tmp_path, capsys, step):
    model = str(onnx_stub.threshold_model(tmp_path / "m.onnx"))
    assert main(["runtime", model, "-i", str(tmp_path), "-o", str(tmp_path / "out"), "--step", step]) == 2
    assert "patches: give 0.05 to 1; nnU-Net's is 0.5" in capsys.readouterr().err


def test_a_case_that_fails_does_not_stop_the_others(tmp_path, capsys):
    model = str(onnx_stub.threshold_model(tmp_path / "m.onnx"))
    image = sitk.GetImageFromArray(np.random.default_rng(0).random((8, 9, 10), np.float32))
    for name in ("a", "c"):
        sitk.WriteImage(image, tmp_path / f"{name}_0000.nii.gz")
    (tmp_path / "b_0000.nii.gz").write_bytes(b"no image")
    words = ["runtime", model, "-i", str(tmp_path), "-o", str(tmp_path / "out")]
    assert main(words) == 1
    out, error = capsys.readouterr()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.nii.gz", "c.nii.gz"]
    assert "[3/3] c" in out and "[2/3] b: " in error and "cannot be read" in error
    assert error.splitlines()[-1] == (
        f"nnunet_lgms: 1 of 3 cases are not predicted, for the reasons above: b; the others are in {tmp_path / 'out'}."
    )
    image.SetSpacing((1e4, 1, 1))
    sitk.WriteImage(image, tmp_path / "b_0000.nii.gz")
    assert main(words) == 1
    assert "10000 mm and would have" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_one_sentence(tmp_path, capsys):
    model, image = str(onnx_stub.threshold_model(tmp_path / "m.onnx")), tmp_path / "a_0000.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 4, 4), np.float32)), image)
    for output in (tmp_path / "m.json", tmp_path / "m.json" / "below"):
        assert main(["runtime", model, "-i", str(image), "-o", str(output)]) == 2
        error = capsys.readouterr().err
        assert f"-o {output} is a file, or lies below one: give a folder." in error and "Errno" not in error


def test_an_output_may_be_the_file_of_one_case(tmp_path, capsys):
    model = str(onnx_stub.threshold_model(tmp_path / "m.onnx"))
    samples = np.random.default_rng(0).random((8, 9, 10), np.float32)
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        sitk.WriteImage(sitk.GetImageFromArray(samples), tmp_path / f"images/{name}_0000.nii.gz")
    image, output = tmp_path / "images/a_0000.nii.gz", tmp_path / "new" / "out.nii.gz"
    words = ["runtime", model, "-i", str(image), "-o"]
    assert main([*words, str(output)]) == 0 and f"-> {output}" in capsys.readouterr().out
    assert [file.name for file in output.parent.iterdir()] == ["out.nii.gz"]
    assert main([*words, str(tmp_path / "folder")]) == 0
    written = [sitk.GetArrayFromImage(sitk.ReadImage(file)) for file in (output, tmp_path / "folder/a.nii.gz")]
    np.testing.assert_array_equal(*written)
    (tmp_path / "old.nii.gz").mkdir()  # a folder that is there is one
    assert main([*words, str(tmp_path / "old.nii.gz")]) == 0 and (tmp_path / "old.nii.gz/a.nii.gz").is_file()
    capsys.readouterr()
    for output, images, said in (
        ("out.nii.gz", "images", "is one file, and there are 2 cases: give a folder"),
        ("out.NII.gz", "images/a_0000.nii.gz", "is no folder, and this model's files end in .nii.gz: name it so"),
        ("out.nii", "images/a_0000.nii.gz", "is no folder, and this model's files end in .nii.gz: name it so"),
        ("images/a_0000.nii.gz", "images/a_0000.nii.gz", "would replace the image"),
    ):
        assert main(["runtime", model, "-i", str(tmp_path / images), "-o", str(tmp_path / output)]) == 2
        assert said in capsys.readouterr().err


def test_files_of_two_models_are_refused(tmp_path):
    one, two = (onnx_stub.threshold_model(tmp_path / f"{n}.onnx", channels=n) for n in (1, 2))
    two.replace(one)
    with pytest.raises(ValueError, match="they are of two models"):
        Predictor(one)


@pytest.mark.parametrize("fields", [{"patch_size": [16, 16, 16]}, {"labels": {"background": 0, "a": 1, "b": 2}}])
def test_a_description_of_another_network_is_refused(tmp_path, fields):
    model = onnx_stub.threshold_model(tmp_path / "m.onnx")
    description = tmp_path / "m.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | fields))
    with pytest.raises(ValueError, match="they are of two models"):
        Predictor(model)


@pytest.mark.parametrize("format", [1, 2])  # format 1: the checksum was of the model alone
def test_a_model_that_changed_since_its_export_is_refused(tmp_path, format):
    model = onnx_stub.threshold_model(tmp_path / "m.onnx", format=format)
    content, beside = bytearray(model.read_bytes()), model.with_suffix(".json")
    described = json.loads(beside.read_text())
    written = hashlib.sha256(content).hexdigest() if format == 1 else checksum(bytes(content), described)
    beside.write_text(json.dumps(described | {"sha256": written}))
    Predictor(model)
    position = content.index(np.float32(-1).tobytes())
    content[position : position + 4] = np.float32(1).tobytes()  # still a model, of other labels
    model.write_bytes(content)
    with pytest.raises(ValueError, match="m.onnx and the JSON beside it are not the pair that was exported"):
        Predictor(model)


def test_a_description_that_changed_since_its_export_is_refused(tmp_path):
    model = onnx_stub.threshold_model(tmp_path / "m.onnx")
    beside = model.with_suffix(".json")
    described = json.loads(beside.read_text())
    described["sha256"] = checksum(model.read_bytes(), described)
    beside.write_text(json.dumps(dict(reversed(described.items()))))  # another layout is no change
    Predictor(model)
    beside.write_text(json.dumps(described | {"labels": {"background": 0, "dark": 1}}))
    with pytest.raises(ValueError, match="are not the pair that was exported"):
        Predictor(model)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\x00", "a\u202eb", "a\u2028b"])
@pytest.mark.parametrize("field", ["labels", "channel_names", "dataset"])
def test_names_that_act_on_a_terminal_are_refused(tmp_path, field, name):
    value = {"labels": {"background": 0, name: 1}, "channel_names": [name], "dataset": name}[field]
    with pytest.raises(ValueError, match=f"is not what `nnunet_lgms export` writes: {field} is"):
        Predictor(onnx_stub.threshold_model(tmp_path / "m.onnx", **{field: value}))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_arrays_that_are_not_finite_are_refused(tmp_path, value):
    image = np.zeros((1, 4, 5, 6))
    image[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match="The image holds NaN, infinity or more"):
        Predictor(onnx_stub.threshold_model(tmp_path / "m.onnx")).predict(image, spacing=(1, 1, 1))


def test_logits_that_are_not_finite_are_no_labels(tmp_path):
    fields = {"normalization_schemes": ("NoNormalization",)}  # 1e6 is more than nnU-Net's float16 sums hold
    predictor = Predictor(onnx_stub.threshold_model(tmp_path / "m.onnx", **fields))
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="gave NaN or infinity"):
        predictor.predict(np.full((1, 4, 5, 6), 1e6), spacing=np.ones(3))


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_threads_that_no_machine_has_are_refused(tmp_path, threads):
    with pytest.raises(ValueError, match=f"{threads} threads are not possible"):
        Predictor(onnx_stub.threshold_model(tmp_path / "m.onnx"), threads=threads)


def test_importing_it_loads_no_torch(clean_env):
    code = "import sys, nnunet_lgms.runtime; print([m for m in ('torch', 'nnunetv2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=clean_env | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.stdout.decode().strip() == "[]", done.stderr


def test_nothing_is_sent_elsewhere(tmp_path, clean_env):
    """ONNX Runtime's telemetry looks up its server once a session is made, and keeps a database in the home folder."""
    if not namespace.possible():
        pytest.skip("needs a network namespace")
    model = onnx_stub.threshold_model(tmp_path / "m.onnx")
    (home := tmp_path / "home").mkdir()
    predict = (
        "import socket, sys, time; from nnunet_lgms.runtime import Predictor; import numpy as np\n"
        "Predictor(sys.argv[1]).predict(np.eye(24, dtype='f')[None, None], spacing=(1, 1, 1)); time.sleep(1)\n"
        "try: socket.getaddrinfo('seen.example', 80)\n"
        "except OSError: pass"
    )
    done, asked = namespace.names_asked_by(
        [sys.executable, "-c", predict, str(model)],
        tmp_path,
        env=clean_env | {"HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert set(asked) == {"seen.example"}  # our own: the resolver does see what is asked
    assert not list(home.iterdir())
