"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def clean_env() -> dict[str, str]:
    """This process's environment without anything of nnU-Net's or of Python's own, for subprocesses."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("nnUNet", "PYTHON"))}


@pytest.fixture(scope="session")
def hippocampus() -> Path:
    """The hippocampus set that ships with the demo, in nnU-Net's raw layout: 24 training and 6 test cases."""
    return ROOT / "demo" / "data" / "hippocampus"
