"""Two processes that would write the same: one is told of the other, and what a killed one held is free."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_model
import tiny_plans
from another_process import another_process_holds
from conftest import ROOT
from dataset_replicas import REPLICAS, disc, grey, save

from nnunet_lgms import cli
from nnunet_lgms.locks import locked


def test_the_sentence_names_the_other_process(tmp_path: Path):
    lock = tmp_path / ".lock"
    with another_process_holds(lock) as other:
        sentence = rf"^Another test is running \(process {other.pid}\): wait until it has ended, or stop it\.$"
        with pytest.raises(ValueError, match=sentence), locked(lock, "test"):
            pass
        # as it reads where the folder is shared by several machines
        lock.write_text("4711 another-machine\n")
        with pytest.raises(ValueError, match=r"\(process 4711 on another-machine\)"), locked(lock, "test"):
            pass


@pytest.mark.parametrize("forked", [(), ("with a process that it forked",)])
def test_what_a_killed_process_held_is_free_at_once(tmp_path: Path, forked: tuple[str, ...]):
    lock = tmp_path / ".lock"
    with another_process_holds(lock, *forked) as other:
        other.kill()
        other.wait()
        assert lock.exists()
        with locked(lock, "test"):
            assert lock.read_text() == f"{os.getpid()} {socket.gethostname()}\n"


def test_what_waits_goes_on_when_the_other_ends(tmp_path: Path, capsys):
    lock = tmp_path / ".lock"
    with another_process_holds(lock) as other:
        threading.Timer(0.2, other.stdin.close).start()
        with locked(lock, "test", wait=True):
            assert capsys.readouterr().out == f"Waiting: another test is running (process {other.pid})\n"
            assert other.wait() == 0


def test_nothing_is_left_behind_but_what_was_written(tmp_path: Path):
    with pytest.raises(RuntimeError), locked(tmp_path / "a" / "b" / ".lock", "test"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a" / "b" / ".lock", "test"):
        (tmp_path / "a" / "result").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["a", "a/result"]


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path: Path, monkeypatch, capsys):
    def flock(descriptor: int, operation: int):
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path / ".lock", "test"):
        assert capsys.readouterr().err == (
            f"{tmp_path / '.lock'} cannot be locked (Function not implemented): see to it that no other test runs\n"
        )
    assert not list(tmp_path.iterdir())


def test_what_the_process_becomes_keeps_the_lock(tmp_path: Path):
    code = """
import os, sys
from pathlib import Path
from nnunet_lgms.locks import locked
with locked(Path(sys.argv[1]), "test", survives_exec=True):
    os.execv(sys.executable, [sys.executable, "-c", "print('another program', flush=True); input()"])
"""
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "another program\n"
        with pytest.raises(ValueError, match=f"process {other.pid}"), locked(tmp_path / ".lock", "test"):
            pass
        other.kill()


# ---- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch) -> Path:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("nnUNet_extTrainer", str(ROOT / "trainers"))
    return tmp_path


def conversion(folder: Path) -> tuple[Path, list]:
    REPLICAS["bus", "published"][0](folder / "download")
    return folder / "nnUNet_raw" / ".Dataset007.lock", ["convert", "bus", folder / "download", "--id", 7]


def override(folder: Path) -> tuple[Path, list]:
    dataset = folder / "nnUNet_preprocessed" / tiny_plans.DATASET_NAME
    dataset.mkdir()
    (dataset / "dataset.json").write_text(json.dumps(tiny_plans.dataset_json()))
    plans = tiny_plans.plans(**{"2d": tiny_plans.configuration([32, 32])})
    (dataset / "nnUNetPlans.json").write_text(json.dumps(plans))
    return dataset / ".k3.lock", ["override", dataset.name, "--apply", "kernels_3", "--as", "k3"]


def evaluation(folder: Path) -> tuple[Path, list]:
    for kind in ("predictions", "references"):
        save(folder / kind / "case.png", grey(disc(1)) // 255)
    output = folder / "predictions" / "evaluation"
    return output / ".evaluate.lock", ["evaluate", folder / "predictions", folder / "references", "--labels", 1]


def zeroshot(folder: Path) -> tuple[Path, list]:
    model = tiny_model.model_folder(folder / "nnUNet_results", "Dataset901_Home")
    away = tiny_model.raw_dataset(folder / "nnUNet_raw" / "Dataset902_Away")
    return model / "zeroshot" / ".zeroshot.lock", ["zeroshot", model, away, "--device", "cpu"]


def export(folder: Path) -> tuple[Path, list]:
    pytest.importorskip("onnxscript", reason="needs the extra [export]")
    model = tiny_model.model_folder(folder / "nnUNet_results", "Dataset901_Home")
    return folder / ".model.onnx.lock", ["export", model, "-o", folder / "model.onnx"]


@pytest.mark.parametrize(
    "prepare", [conversion, override, evaluation, zeroshot, pytest.param(export, marks=pytest.mark.slow)]
)
def test_a_command_refuses_to_write_what_another_one_writes(folders: Path, capsys, prepare: Callable):
    lock, words = prepare(folders)
    with another_process_holds(lock) as other:
        before = sorted(folders.rglob("*"))
        assert cli.main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("nnunet_lgms: Another ") and error.count("\n") == 1
        assert f" is running (process {other.pid}): wait until it has ended" in error
        assert sorted(folders.rglob("*")) == before


def test_a_study_is_run_once_at_a_time(tmp_path: Path):
    from nnunet_lgms.cli.study import _become_snakemake

    graph = SimpleNamespace(folder=tmp_path / "study", study=SimpleNamespace(name="kernels"))
    with another_process_holds(graph.folder / ".study.lock") as other:
        with pytest.raises(ValueError, match=rf"Another run of the study kernels is running \(process {other.pid}\)"):
            _become_snakemake(graph, ["snakemake"])


def test_two_conversions_to_one_number(folders: Path, verify_in_threads):
    """With other settings or the same: one is refused, the other one's dataset is whole."""
    _, words = conversion(folders)
    with open(folders / "errors", "w") as errors:
        pids = []
        for more in ([], ["--size", 32]):
            pid = os.fork()
            if pid == 0:
                with redirect_stderr(errors):
                    code = cli.main([str(word) for word in [*words, "--workers", 1, *more]])
                    errors.flush()
                    os._exit(code)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    said = (folders / "errors").read_text()
    dataset = folders / "nnUNet_raw" / "Dataset007_BUS"
    assert sorted(codes) == [0, 2]
    assert f"(process {pids[codes.index(0)]})" in said or "was made otherwise" in said
    assert json.loads((dataset / "dataset.json").read_text())["numTraining"] == len(list(dataset.glob("imagesTr/*")))
    assert not list((folders / "nnUNet_raw").glob(".*"))
