"""Files from others: about 2,900 of them, each read or refused in one sentence (ValueError), never with a traceback.

The inputs are the same at every run; ``NNUNET_LGMS_FUZZ=1`` looks for new ones, ten times as many.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import string
import struct
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from planned import configuration

from nnunet_lgms.checkpoint import read_checkpoint
from nnunet_lgms.cli import main
from nnunet_lgms.config import LGMSSettings
from nnunet_lgms.config.planned import Planned
from nnunet_lgms.config.resolve import Topology, network_kwargs
from nnunet_lgms.data import natural_images, volumes
from nnunet_lgms.data.datasets import DESCRIPTIONS
from nnunet_lgms.data.find import Case, find_cases
from nnunet_lgms.evaluation.label_mapping import map_labels, read_mapping_file
from nnunet_lgms.evaluation.labels import LabelSet
from nnunet_lgms.image_files import check_image_file
from nnunet_lgms.nnunet_files import Reader
from nnunet_lgms.planning.auto_kernels import measure_components
from nnunet_lgms.planning.override import override_plans
from nnunet_lgms.planning.plans_files import read_dataset_json, read_override, read_plans

NAME = "Dataset999_Fuzz"
DATASET = {"labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}}
PLANS = {
    "dataset_name": NAME,
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "label_manager": "LabelManager",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "configurations": {
        "2d": {**configuration((16, 16), 2), "lgmsnet": {"widths": [8, 8], "lms_kernels": [3, 5]}},
        "heir": {"inherits_from": "2d", "batch_size": 4},
    },
}
SETTINGS = {
    "widths": {"1": 8, "2+": 16},
    "depths": [1, 2],
    "block_by_level": {"encoder": ["LMS", "GMS"], "decoder": "Fusion+GMS"},
    "lms_kernels": [[3, 5], [[1, 3], 7]],
    "lms_group_channels": [[4, 4], None],
    "gms_ratio": "3:1",
    "gms_patch": [2, 1],
    "heads": 2,
    "head_dim": 4,
    "mlp_ratio": 0.5,
    "norm": "group",
    "deep_supervision": True,
    "requires": "0.1.0",
}


def fuzz(n: int):
    """``n`` examples of what follows, without time limits."""
    search = bool(os.environ.get("NNUNET_LGMS_FUZZ"))
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=n * (10 if search else 1), deadline=None, derandomize=not search, suppress_health_check=checks
    )


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """What is refused is refused in one line of bounded length; anything but a ValueError is a failure."""
    try:
        yield
    except ValueError as refusal:
        message = str(refusal)
        assert "\n" not in message and 10 < len(message) < 1000, message


texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["\ud800", "../../x", "/etc/passwd", "auto", "3:1", "LMS", "Conv", "1+", "nan", "2d", "a\nb", "__"]
    ),
)
numbers = st.one_of(
    st.integers(-3, 70), st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 10**30, -1, 0, 1e308, True])
)
values = st.recursive(
    st.one_of(st.none(), numbers, texts),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all entries of a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, value in items:
        found += [(*path, key), *places(value, (*path, key))]
    return found


@st.composite
def spoiled(draw, tree):
    """``tree`` with one to three entries replaced, removed or renamed."""
    tree = deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        if not (there := places(tree)):
            break
        *path, last = draw(st.sampled_from(there))
        parent = tree
        for key in path:
            parent = parent[key]
        what = draw(st.integers(0, 3))
        if what == 0:
            del parent[last]
        elif what == 1 and isinstance(parent, dict):
            parent[draw(texts)] = parent.pop(last)
        else:
            parent[last] = draw(values)
    return tree


@st.composite
def damaged(draw, content: bytes, first: int = 0):
    """``content`` with some bytes overwritten, most of them in its first ``first``, cut short or prolonged."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 8))):
        end = first if first and draw(st.integers(0, 3)) else len(content)
        content[draw(st.integers(0, end - 1))] = draw(st.integers(0, 255))
    cut = draw(st.sampled_from([None, None, None, 0, 1, 100, 350, len(content) - 3]))
    return bytes(content[:cut]) + draw(st.sampled_from([b"", b"", b"\0" * 64]))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The preprocessed folder of a dataset."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    folder = tmp_path / "nnUNet_preprocessed" / NAME
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    (folder / "nnUNetPlans.json").write_text(json.dumps(PLANS))
    return folder


# --- JSON ------------------------------------------------------------------------------------------------------------

topology = Topology((32, 24), ((1, 1), (2, 2)), ((3, 3), (3, 3)))


@pytest.mark.slow
@fuzz(400)
@given(st.one_of(values, spoiled(SETTINGS)))
def test_settings(given_settings):
    with one_sentence():
        network_kwargs(LGMSSettings.from_plan(given_settings), topology)


@pytest.mark.slow
@fuzz(400)
@given(st.dictionaries(st.sampled_from([*SETTINGS, "x"]), values, max_size=3))
def test_values_of_settings(given_settings):
    with one_sentence():
        network_kwargs(LGMSSettings.from_plan(given_settings), topology)


@fuzz(300)
@given(content=st.one_of(st.binary(max_size=60), damaged(json.dumps({"lgmsnet": SETTINGS}).encode())))
def test_override_files(folder, content):
    path = folder / "x.json"
    path.write_bytes(content)
    with one_sentence():
        override = read_override(str(path))
        Planned.from_override(override)
        LGMSSettings.from_plan(override.get("lgmsnet", {}))


@pytest.mark.slow
@fuzz(400)
@given(plans=spoiled(PLANS))
def test_plans(folder, plans):
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))

    def say(line: str) -> None:  # a plan may be left without the block that reads the setting
        assert "heads changes nothing" in line and "\n" not in line

    with one_sentence():
        override_plans(read_plans(NAME, "nnUNetPlans"), {"lgmsnet": {"heads": 2}}, "New", None, pytest.fail, say)


@fuzz(300)
@given(content=spoiled(DATASET))
def test_descriptions(folder, content):
    (folder / "dataset.json").write_text(json.dumps(content))
    with one_sentence():
        description = read_dataset_json(NAME)
        assert LabelSet.from_dataset_json(description).regions
        Reader.of_dataset(description)


@fuzz(150)
@given(content=st.one_of(spoiled({NAME: {"a": "b", "b": None}, "*": {"a": 1}}), values))
def test_mapping_files(folder, content):
    path = folder / "mapping.json"
    path.write_text(json.dumps(content))
    with one_sentence():
        map_labels(DATASET, {**DATASET, "labels": {"background": 0, "b": 1, "c": 2}}, NAME, read_mapping_file(path))


# --- images and labels -----------------------------------------------------------------------------------------------


def nifti() -> bytes:
    labels = np.zeros((6, 5, 4), np.uint8)
    labels[2:4, 1:3, 1:3] = 1
    return nib.Nifti1Image(labels, np.diag([1.0, 1.0, 3.0, 1.0])).to_bytes()


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("start", [2.4e13, 1e30])
def test_voxels_that_begin_beyond_the_end_of_any_file(tmp_path, start):
    path = tmp_path / "labels.nii"
    path.write_bytes(nifti()[:108] + struct.pack("<f", start) + nifti()[112:])
    with pytest.raises(ValueError, match="is damaged or was cut short"):
        check_image_file(path)


@pytest.mark.parametrize("offset", [1 << 60, (1 << 64) - 1])
def test_pages_beyond_the_end_of_any_file(tmp_path, offset):
    path = tmp_path / "labels.tif"
    path.write_bytes(b"II+\0" + struct.pack("<HHQ", 8, 0, offset))
    with pytest.raises(ValueError, match="is damaged or was cut short"):
        check_image_file(path)


@pytest.mark.slow
@fuzz(300)
@given(content=damaged(nifti(), first=352))
def test_nifti(folder, content, capfd):
    """Bytes 40 to 55 of the header are sizes, so many of these claim gigabytes that are not there."""
    path, whole = folder / "labels.nii", folder / "whole.nii"
    path.write_bytes(content)
    whole.write_bytes(nifti())
    for reader in (Reader(".nii", "SimpleITKIO"), Reader(".nii", "NibabelIOWithReorient")):
        with one_sentence():
            reader.read_labels(path).grid.differences(reader.read_labels(whole).grid)
    with one_sentence(), contextlib.redirect_stderr(io.StringIO()):
        measure_components(PLANS, DATASET, [path])
    inspection = volumes.inspect(Case("x", path, (whole,)), DESCRIPTIONS["btcv"])
    assert all("\n" not in problem for problem in inspection.problems)
    volumes.inspect(Case("x", whole, (path,)), DESCRIPTIONS["btcv"])
    capfd.readouterr()  # ITK's own warnings


@fuzz(150)
@given(content=damaged(png(), first=40))
def test_pictures(folder, content):
    path, whole = folder / "labels.png", folder / "whole.png"
    path.write_bytes(content)
    whole.write_bytes(png())
    with one_sentence():
        Reader(".png", "NaturalImage2DIO").read_labels(path)
    inspection = natural_images.inspect(Case("x", path, (whole,)), DESCRIPTIONS["bus"])
    assert all("\n" not in problem for problem in inspection.problems)
    natural_images.inspect(Case("x", whole, (path,)), DESCRIPTIONS["bus"])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint() -> bytes:
    file = io.BytesIO()
    torch.save({"network_weights": {"a": torch.ones(3)}, "_best_ema": np.float64(1), "init_args": {"x": [1]}}, file)
    return file.getvalue()


@fuzz(200)
@given(content=st.one_of(st.binary(max_size=40), damaged(checkpoint(), first=400)))
def test_checkpoints(folder, content):
    path = folder / "checkpoint_final.pth"
    path.write_bytes(content)
    with one_sentence():
        read_checkpoint(path)


# --- the command line ------------------------------------------------------------------------------------------------

words = st.one_of(
    texts.filter(lambda text: "\0" not in text and text.isprintable()),
    st.sampled_from([NAME, f"{NAME}/../x", "..", "-x", "999", "9" * 30, "~", "*", "$HOME", ".", "x" * 400]),
)


@pytest.mark.slow
@fuzz(150)
@given(
    command=st.sampled_from(["override", "plan", "profile", "evaluate", "zeroshot", "convert"]),
    arguments=st.lists(words, max_size=3),
    name=words,
)
def test_names_on_the_command_line(folder, command, arguments, name, monkeypatch, capfd):
    """Whatever the words are: an exit code, one sentence, and nothing written outside of the dataset's own folder."""
    monkeypatch.chdir(folder)
    home = folder.parents[1]
    outside = {path for path in home.rglob("*") if folder not in path.parents}
    options = {"override": ["--apply", "kernels_3", f"--as={name}"], "plan": ["--vram", "8", f"--as={name}"]}
    assert main([command, *arguments, *options.get(command, [])]) in (0, 2)
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert {path for path in home.rglob("*") if folder not in path.parents} == outside


@fuzz(200)
@given(name=st.one_of(st.text(max_size=40), texts, st.sampled_from(["../../etc/passwd", "..", "a/../b", "a\\..\\b"])))
def test_names_of_cases_stay_in_their_folder(name):
    """Files in a download name nnU-Net's cases, and so the files that a conversion writes."""
    for description in DESCRIPTIONS.values():
        assert set(description.identify(name)) <= set(string.ascii_letters + string.digits + "_")


@pytest.mark.parametrize("name", ["---.png", "\u00e4\u00f6.png"])
def test_names_without_letters_are_a_problem_of_their_own(tmp_path, name):
    for folder in ("images", "masks"):
        for file in (name, "good.png"):
            (tmp_path / "Kvasir-SEG" / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / "Kvasir-SEG" / folder / file.replace("png", "jpg")).write_bytes(png())
    found = find_cases(DESCRIPTIONS["kvasir"], tmp_path)
    assert [case.identifier for case in found.cases] == ["good"]
    assert "no letter and no digit" in found.problems[0].text
