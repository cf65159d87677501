"""Nothing knows a number of GPUs: batches are shared by any, eight processes learn what one does, and a study has one
job a GPU.

Stand-ins for GPUs: processes on the CPU (gloo), and names that a study's jobs take for GPUs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import gloo
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_distributed import DEEP, PATCH, free_port, synced
from tiny_trainer import make_batch, make_trainer
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

MANY, HALF = 8, 4
CASE = {"patch_size": PATCH[3], "strides": DEEP, "batch_dice": True}  # with batch norms, and a Dice of the whole batch


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path


@pytest.mark.parametrize("n_gpus", [1, 2, 3, 8])
@pytest.mark.parametrize("global_batch", [8, 11])
def test_a_batch_is_shared_by_any_number_of_gpus(folders: Path, n_gpus: int, global_batch: int) -> None:
    """As nnU-Net shares it: a third of all samples, the last ones, show foreground."""
    shares = []
    for rank in range(n_gpus):
        with (
            patch.object(dist, "is_initialized", lambda: n_gpus > 1),
            patch.object(dist, "get_rank", lambda rank=rank: rank),
            patch.object(dist, "get_world_size", lambda: n_gpus),
            patch.object(torch.cuda, "device_count", lambda: n_gpus),
            patch.object(torch.cuda, "set_device", lambda device: None),
            patch.dict(os.environ, nnUNet_compile="f"),  # or these GPUs are asked what they are
        ):
            trainer = make_trainer(batch_size=global_batch)
            shares.append((trainer.batch_size, trainer.oversample_foreground_percent))
    sizes = [size for size, _ in shares]
    assert sum(sizes) == global_batch and max(sizes) - min(sizes) <= 1
    forced = sum(size * share for size, share in shares)
    assert forced == pytest.approx(global_batch - round(global_batch * 0.67) if n_gpus > 1 else 0.33 * global_batch)


# ---- eight processes -------------------------------------------------------------------------------------------------


def step_of(folder: Path, rank: int, n: int, goes_on: bool) -> list[torch.Tensor]:
    """The parameters after a step, of the whole batch on one process or of its share on each of several.

    The first process leaves a checkpoint; one that goes on starts from it.
    """
    torch.manual_seed(0)
    trainer = make_trainer(batch_size=MANY, **CASE)
    trainer.network = network = synced(trainer.network.double())
    trainer.was_initialized = True
    if n > 1:
        trainer.network = DistributedDataParallel(network)
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    if goes_on:
        trainer.load_checkpoint(str(folder / "checkpoint.pth"))
    with patch.object(dist, "is_initialized", lambda: False):  # the batch of all, in every process
        whole = make_trainer(batch_size=MANY, **CASE)
    np.random.seed(0)
    torch.manual_seed(1 + goes_on)
    batch = make_batch(whole)
    mine = slice(rank * trainer.batch_size, (rank + 1) * trainer.batch_size)
    trainer.on_train_epoch_start()
    loss = trainer.train_step({"data": batch["data"][mine].double(), "target": batch["target"][mine]})["loss"]
    assert np.isfinite(loss)
    if not goes_on:
        trainer.save_checkpoint(str(folder / ("checkpoint.pth" if n > 1 else "alone.pth")))
    return [p.detach() for p in network.parameters()]


def process(rank: int, port: int, folder: Path, n: int, goes_on: bool) -> None:
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(folder / name)
    gloo.replace_devices()
    gloo.start(rank, n, port)
    torch.save(step_of(folder, rank, n, goes_on), folder / f"{n}_{rank}.pt")
    dist.barrier()
    if not goes_on:  # one dies, the others wait for it
        (folder / f"pid_{rank}").write_text(str(os.getpid()))
        dist.barrier()
        if rank == n - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
        (folder / "outlived").touch()


@pytest.mark.slow
def test_eight_processes_learn_what_one_learns_and_four_go_on(folders: Path) -> None:
    """One of the eight is killed at last: the command ends with it, and no process stays."""
    from torch.multiprocessing import ProcessExitedException

    begin = time.monotonic()
    with pytest.raises(ProcessExitedException, match="SIGKILL|SIGABRT|exit code"):
        gloo.processes(process, (free_port(), folders, MANY, False), MANY)
    assert not (folders / "outlived").exists()
    pids = [int((folders / f"pid_{rank}").read_text()) for rank in range(MANY)]
    assert len(set(pids)) == MANY and not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    gloo.processes(process, (free_port(), folders, HALF, True), HALF)
    print(f"{MANY} processes and {HALF}: {time.monotonic() - begin:.0f} s")

    for n, goes_on in ((MANY, False), (HALF, True)):
        expected = step_of(folders, 0, 1, goes_on)
        for rank in range(n):
            for parameter, value in zip(torch.load(folders / f"{n}_{rank}.pt"), expected, strict=True):
                torch.testing.assert_close(parameter, value, rtol=1e-5, atol=1e-7)


# ---- a study on eight GPUs -------------------------------------------------------------------------------------------

STUDY = """
name: eight
threads: 1
configurations: [2d]
folds: [0, 1, 2, 3, 4, 5, 6, 7]
datasets: {Dataset101_B: {}}
variants: {a: {}, b: {override: kernels_3}}
"""
KILLED = "nnUNetTrainerLGMSNet__nnUNetPlans_kernels_3__2d fold 5"
STAND_INS = '''
"""In place of the steps of a study: jobs that take a GPU as the real ones do, write down when, and do nothing."""

import os, sys, time
from pathlib import Path

if "nnunet_lgms.study" in sys.orig_argv:
    import types

    FOLDER = Path(os.environ["MANY_GPUS"])

    def done(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")

    def other(graph, file, *names):
        done(file)

    def train(graph, file, run, dataset, model, fold):
        from nnunet_lgms.study.gpus import one_gpu

        with one_gpu(poll_seconds=0.1) as gpu:
            begin = time.time()
            name = f"{model} fold {fold}"
            epochs = FOLDER / f"{name}.epochs"
            (FOLDER / f"{gpu}.taken").touch()
            while len(list(FOLDER.glob("*.taken"))) < 8 and time.time() < begin + 120:
                time.sleep(0.05)  # until all are taken: the machine may be slow to start jobs
            with epochs.open("a") as checkpoint:
                checkpoint.write("epoch\\n")
            if name == os.environ["KILLED"] and len(epochs.read_text().split()) == 1:
                os.kill(os.getpid(), 9)
            time.sleep(0.2)
            with (FOLDER / "jobs").open("a") as jobs:
                jobs.write(f"{gpu};{begin};{time.time()};{name}\\n")
        done(file)

    class Steps(types.ModuleType):
        def __getattr__(self, name):
            return other

    steps = sys.modules["nnunet_lgms.study.steps"] = Steps("nnunet_lgms.study.steps")
    steps.train = train
'''


@pytest.mark.slow
def test_a_study_on_eight_gpus_has_one_job_a_gpu_and_continues_a_killed_one(folders: Path, monkeypatch) -> None:
    """Eight folds of two variants, by Snakemake with the gpus profile as it is shipped."""
    pytest.importorskip("snakemake", reason="the extra [study] needs Python 3.11")
    from nnunet_lgms.cli.study import snakemake_command
    from nnunet_lgms.study.graph import Graph
    from nnunet_lgms.study.profiles import Profile

    gpus = [f"GPU-{os.getpid()}-{n}" for n in range(MANY)]  # locks of one user's GPUs are common to all his jobs
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(gpus))
    (folders / "sitecustomize.py").write_text(STAND_INS)
    (folders / "study.yaml").write_text(STUDY)
    graph = Graph(folders / "study.yaml")
    options = Namespace(profile="gpus", snakemake="--cores 8 --until train --quiet all")  # more than there may be here
    command = snakemake_command(graph, Profile.read("gpus"), options)
    path = os.pathsep.join(filter(None, [str(folders), str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "MANY_GPUS": str(folders), "KILLED": KILLED}

    def run() -> int:
        return subprocess.run([sys.executable, "-m", *command], env=env, cwd=folders, capture_output=True).returncode

    def jobs() -> list[tuple[str, float, float, str]]:
        lines = (line.split(";") for line in (folders / "jobs").read_text().splitlines())
        return [(gpu, float(begin), float(end), name) for gpu, begin, end, name in lines]

    assert run() != 0
    finished = jobs()
    assert len(finished) == 15 and KILLED not in {name for *_, name in finished}  # the others went on
    of_gpu = defaultdict(list)
    for gpu, begin, end, _ in finished:
        of_gpu[gpu].append((begin, end))
    assert set(of_gpu) == set(gpus)
    for times in map(sorted, of_gpu.values()):
        assert all(end <= begin for (_, end), (begin, _) in zip(times, times[1:]))  # never two
    together = max(sum(b <= begin < e for _, b, e, _ in finished) for _, begin, _, _ in finished)
    assert MANY - 1 <= together <= MANY  # the one that was killed is not among them

    assert run() == 0
    assert [name for *_, name in jobs()][15:] == [KILLED]  # that one alone
    assert (folders / f"{KILLED}.epochs").read_text().split() == ["epoch", "epoch"]  # from where it stood
    others = [f for f in folders.glob("*.epochs") if f.stem != KILLED]
    assert len(others) == 15 and all(f.read_text().split() == ["epoch"] for f in others)
