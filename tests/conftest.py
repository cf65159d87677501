"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


# By their seconds; a worker of `make test` takes whole files, and none is left with one of these at the end.
DEAREST = ["study_run", "export", "faults", "features", "end_to_end", "ops_dense", "distributed", "network_runtimes"]
DEAREST += ["config", "many_gpus", "override", "ops_attention"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": i for i, name in enumerate(DEAREST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(DEAREST)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def clean_env() -> dict[str, str]:
    """This process's environment without anything of nnU-Net's or of Python's own, for subprocesses."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("nnUNet", "PYTHON"))}


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's three variables, with folders that need not be there."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.fixture
def no_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command `override` without its remarks on memory, which cost 2.4 CPU seconds each time."""
    from nnunet_lgms.planning import memory

    monkeypatch.setattr(memory, "memory_remarks", lambda *plans: [])


@pytest.fixture(scope="session")
def hippocampus() -> Path:
    """The hippocampus set that ships with the demo, in nnU-Net's raw layout: 24 training and 6 test cases."""
    return ROOT / "demo" / "data" / "hippocampus"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data that may not be shipped; NNUNET_LGMS_DATA names its folder, by default the checkout's neighbour."""
    folder = Path(os.environ.get("NNUNET_LGMS_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real data is not on this machine (NNUNET_LGMS_DATA)")
    return folder


@pytest.fixture
def verify_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's integrity check as it is, but in threads: its worker processes need seconds to start."""
    from multiprocessing.pool import ThreadPool
    from types import SimpleNamespace

    from nnunetv2.experiment_planning import verify_dataset_integrity
    from nnunetv2.utilities import utils

    context = SimpleNamespace(Pool=ThreadPool)
    fake = SimpleNamespace(get_context=lambda method: context)
    monkeypatch.setattr(verify_dataset_integrity, "multiprocessing", fake)
    monkeypatch.setattr(utils, "Pool", ThreadPool)
