"""Tiny synthetic datasets and nnU-Net's own commands on them, in this process.

A command of nnU-Net needs seconds to be imported and its worker processes seconds more, and a test of a feature needs
many of them. Here each console script of nnunetv2 is called as the function that it is, its process pools are pools of
threads, it takes as many threads for PyTorch as this process has (more of them wait for each other where tests share
the cores), and its fingerprint samples 1,000 voxels a case, not millions. Trainings draw no progress picture, whose
process would cost more than they do. Nothing else is changed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import ROOT
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.utilities import utils
from PIL import Image

from nnunet_lgms.nnunet.aside import ProgressPicture

LABELS = {"background": 0, "organ": 1, "lesion": 2}
TRAINER = "nnUNetTrainerLGMSNet_once"


class _Threads:
    """A multiprocessing context whose pools are threads."""

    def __init__(self, context):
        self._context = context

    def Pool(self, n: int) -> ThreadPool:
        return ThreadPool(n)

    def __getattr__(self, name):
        return getattr(self._context, name)


class Workshop:
    """nnU-Net's three folders under ``folder``, and its commands.

    Args:
        folder: where everything goes.
    """

    pictures = False  # whether trainings draw their progress

    def __init__(self, folder: Path):
        self.raw, self.preprocessed, self.results = (
            folder / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        )
        self.env = {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_extTrainer": os.pathsep.join([str(ROOT / "tests" / "ext_trainers"), str(ROOT / "trainers")]),
        }
        for path in (self.raw, self.preprocessed, self.results):
            path.mkdir(parents=True)

    @contextmanager
    def environment(self, **env: str) -> Iterator[None]:
        """nnU-Net's variables, threads for its pools; everything as it was afterwards."""
        get_context, n_threads = multiprocessing.get_context, torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**self.env, **env}.items():
                patch.setenv(name, value)
            patch.setattr(multiprocessing, "get_context", lambda method=None: _Threads(get_context(method)))
            patch.setattr(utils, "Pool", ThreadPool)
            patch.setattr(multiprocessing, "cpu_count", lambda: n_threads)
            if not self.pictures:
                patch.setattr(ProgressPicture, "draw", lambda picture, folder, logging: None)
            # a command sets it for CUDA, which PyTorch allows once in a process
            patch.setattr(torch, "set_num_interop_threads", lambda n: None)
            sample = DatasetFingerprintExtractor.collect_foreground_intensities
            fewer = staticmethod(lambda labels, images, seed=1234, num_samples=0: sample(labels, images, seed, 1000))
            patch.setattr(DatasetFingerprintExtractor, "collect_foreground_intensities", fewer)
            try:
                yield
            finally:
                torch.set_num_threads(n_threads)

    def __call__(self, command: str, *args: object, **env: str) -> None:
        """Runs ``nnUNetv2_<command>``."""
        (script,) = entry_points(group="console_scripts", name=f"nnUNetv2_{command}")
        with self.environment(**env), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script.name, *map(str, args)])
            script.load()()

    def dataset(
        self,
        number: int,
        name: str,
        *,
        shape: tuple[int, ...] = (20, 24, 22),
        spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
        labels: dict | None = None,
        n_channels: int = 1,
        n_cases: int = 5,
        configurations: tuple[str, ...] = ("3d_fullres",),
        ignored: int | None = None,
        **description,
    ) -> str:
        """Makes, plans and preprocesses a dataset; its name.

        Each case is noise with a bright box (label 1) that has a brighter box in it (label 2), as NIfTI, or as RGB PNG
        if the shape has two axes.

        Args:
            shape: voxels per axis.
            spacing: mm per axis.
            ignored: label of the voxels beyond the middle of the last axis.
        """
        folder = self.raw / f"Dataset{number}_{name}"
        ending = ".nii.gz" if len(shape) == 3 else ".png"
        for sub in ("imagesTr", "labelsTr", "imagesTs"):
            (folder / sub).mkdir(parents=True)
        for case in range(n_cases):
            images, label = make_case(case, shape, n_channels)
            if ignored is not None:
                label[..., shape[-1] // 2 :] = ignored
            for sub in ("imagesTr", "imagesTs") if case == 0 else ("imagesTr",):
                write(folder / sub / f"case_{case}", images, spacing, ending)
            write(folder / "labelsTr" / f"case_{case}", label, spacing, ending)
        channels = ["R", "G", "B"] if ending == ".png" else ["MRI"] * n_channels
        content = {
            "channel_names": {str(i): channel for i, channel in enumerate(channels)},
            "labels": labels or LABELS,
            "numTraining": n_cases,
            "file_ending": ending,
            **description,
        }
        (folder / "dataset.json").write_text(json.dumps(content))
        processes = ["-npfp", 1, "-np", *[1 for _ in configurations]]
        self("plan_and_preprocess", "-d", number, "-c", *configurations, *processes)
        return folder.name

    def train(
        self,
        dataset: str,
        *args: object,
        configuration: str = "3d_fullres",
        fold: object = 0,
        device: str = "cpu",
        **env: str,
    ) -> None:
        """Trains, with the trainer of one step unless ``-tr`` says otherwise, batches in this process."""
        trainer = [] if "-tr" in args else ["-tr", TRAINER]
        options = [*trainer, "-device", device, *args]
        self("train", dataset, configuration, fold, *options, **{"nnUNet_n_proc_DA": "0", **env})

    def model(self, dataset: str, configuration: str = "3d_fullres", trainer: str = TRAINER) -> Path:
        return self.results / dataset / f"{trainer}__nnUNetPlans__{configuration}"

    def checkpoint(self, dataset: str, *args, name: str = "checkpoint_final.pth", fold: object = 0) -> dict:
        return torch.load(self.model(dataset, *args) / f"fold_{fold}" / name, weights_only=False)

    def predict(self, dataset: str, output: Path, *args, configuration: str = "3d_fullres", trainer: str = TRAINER):
        """Predicts the test case in this process (``-npp 0 -nps 0``); the label image's array."""
        select = ["-d", dataset, "-c", configuration, "-tr", trainer, "-f", 0, "-device", "cpu", "-npp", 0, "-nps", 0]
        self("predict", "-i", self.raw / dataset / "imagesTs", "-o", output, *select, *args)
        (file,) = [file for file in output.glob("case_0.*") if file.name.endswith((".nii.gz", ".png"))]
        return read(file)


def make_case(seed: int, shape: tuple[int, ...], n_channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (C, *shape) and labels (*shape)."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    for value, part in ((1, 0.3), (2, 0.15)):
        edges = [(int(n * (0.5 - part)), max(int(n * (0.5 + part)), 1)) for n in shape]
        label[tuple(slice(low, high) for low, high in edges)] = value
    images = rng.normal(100, 10, (n_channels, *shape)) + 40 * label
    return images.astype(np.float32), label


def write(path: Path, samples: np.ndarray, spacing: tuple[float, ...], ending: str) -> None:
    """Labels (*shape) to one file; images (C, *shape) to one file a channel, or to one of RGB."""
    if ending == ".png":
        if path.parent.name.startswith("images"):
            rgb = np.repeat(np.clip(samples, 0, 255).astype(np.uint8)[0][..., None], 3, axis=-1)
            Image.fromarray(rgb).save(f"{path}_0000.png")
        else:
            Image.fromarray(samples).save(f"{path}.png")
        return
    channels = [samples] if samples.ndim == 3 else samples
    for i, channel in enumerate(channels):
        image = sitk.GetImageFromArray(channel)
        image.SetSpacing(spacing[::-1])
        sitk.WriteImage(image, f"{path}{f'_{i:04d}' if samples.ndim == 4 else ''}.nii.gz")


def read(path: Path) -> np.ndarray:
    """The labels of a file, (*shape)."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
