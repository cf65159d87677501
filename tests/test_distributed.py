"""Two processes with half of the batch each learn what one process learns with all of it (gloo, on the CPU).

What the numbers of a process depend on, beside its own samples: the gradients, which DDP averages; the Dice over a
whole batch, if that is planned, which nnU-Net gathers; and the statistics of batch norm, in 2D, for which nnU-Net puts
SyncBatchNorm. PyTorch has that for GPUs only, so a few lines stand in for it here. In 3D only levels with attention
have batch norms.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import gloo
import numpy as np
import pytest
import torch
from tiny_plans import LABELS, REGIONS
from tiny_trainer import make_batch, make_trainer
from torch import distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from nnunet_lgms.graphs import network as graphed
from nnunet_lgms.graphs.data_parallel import GraphedDataParallel
from nnunet_lgms.nnunet.validating import ValidatingTrainer

N_PROCESSES = 2
BATCH_SIZE = 4
PATCH = {2: [12, 10], 3: [8, 6, 8]}
DEEP = [[1] * 3, [2] * 3, [2] * 3, [1] * 3]  # the fourth level has attention, and batch norms
CASES = {
    "3D labels": {"dim": 3},
    "3D with attention": {"dim": 3, "strides": DEEP, "batch_dice": True},
    "3D regions, Dice of the batch": {"dim": 3, "labels": REGIONS, "batch_dice": True},
    "3D deep supervision": {"dim": 3, "lgmsnet": {"deep_supervision": True}},
    "3D compiled": {"dim": 3, "compiled": True, "lgmsnet": {"deep_supervision": True}},
    "2D labels, Dice of the batch": {"dim": 2, "batch_dice": True},
    "2D compiled": {"dim": 2, "compiled": True, "lgmsnet": {"deep_supervision": True}},
}
GLOBAL_BATCHES = [2, 3, 4, 7, 12]


class SyncedBatchNorm(_BatchNorm):
    """What SyncBatchNorm computes, on any device: statistics over all processes, differentiable."""

    def _check_input_dim(self, x: torch.Tensor) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axes = [0, *range(2, x.ndim)]
        mean, square = x.mean(axes), x.square().mean(axes)  # every process has as many samples
        if dist.is_initialized():
            mean, square = (all_reduce(value) / dist.get_world_size() for value in (mean, square))
        shape = [1, -1, *[1] * (x.ndim - 2)]
        scale = torch.rsqrt(square - mean.square() + self.eps) * self.weight
        return (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)


def synced(module: nn.Module) -> nn.Module:
    """All batch norms replaced, as ``SyncBatchNorm.convert_sync_batchnorm`` does."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            new = SyncedBatchNorm(child.num_features, child.eps)
            new.load_state_dict(child.state_dict())
            setattr(module, name, new.to(child.weight.dtype))
        else:
            synced(child)
    return module


def trained(case: dict, device: str = "cpu") -> list[torch.Tensor]:
    """The network's parameters after two steps of the trainer in float64; with DDP if there is a process group."""
    case = dict(case)
    dim, labels, compiled = case.pop("dim"), case.pop("labels", LABELS), case.pop("compiled", False)
    torch.manual_seed(0)
    trainer = make_trainer(labels=labels, patch_size=PATCH[dim], batch_size=BATCH_SIZE, **case)
    if device == "cuda":  # PyTorch's own synchronised norm, and all processes on the one GPU
        trainer.device = torch.device("cuda", 0)
        network = trainer.network.double().cuda()
        trainer.network = network = TO_SYNC_BATCH_NORM(network) if trainer.is_ddp else network
    else:
        trainer.network = network = synced(trainer.network.double())
    if compiled:
        torch._dynamo.reset()
        # nnU-Net compiles the Dice loss as well
        trainer._do_i_compile = lambda: True
        torch.compile = partial(COMPILE, backend="aot_eager")
        trainer.network = torch.compile(trainer.network)
        trainer.loss = trainer._build_loss()
    if trainer.is_ddp:
        trainer.network = DistributedDataParallel(trainer.network)
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()

    whole = make_trainer(labels=labels, patch_size=PATCH[dim], batch_size=BATCH_SIZE, **case)
    whole.batch_size = BATCH_SIZE
    np.random.seed(0)
    torch.manual_seed(1)
    batch = make_batch(whole)
    batch["data"] = batch["data"].double()
    first = trainer.local_rank * trainer.batch_size
    mine = slice(first, first + trainer.batch_size)
    trainer.on_train_epoch_start()
    for _ in range(2):  # a parameter without a gradient stops DDP at the second step
        target = batch["target"]
        target = [t[mine] for t in target] if isinstance(target, list) else target[mine]
        loss = trainer.train_step({"data": batch["data"][mine], "target": target})["loss"]
        assert np.isfinite(loss)
    return [p.detach().cpu() for p in network.parameters()]


COMPILE, TO_SYNC_BATCH_NORM = torch.compile, nn.SyncBatchNorm.convert_sync_batchnorm


def shares(global_batch: int) -> tuple[int, float]:
    trainer = make_trainer(batch_size=global_batch)
    return trainer.batch_size, trainer.oversample_foreground_percent


class FailingStep:
    """A recorded step for which the second process has not enough memory in one of its parts."""

    fails_in = ""

    def __init__(self, x, parameters, group):
        pass

    def rehearse(self, forward):
        self.do("rehearse")

    def record(self, forward):
        all_reduce(torch.ones(()))  # in step with the other process
        self.do("record")

    def do(self, part: str) -> None:
        if dist.get_rank() == 1 and part == self.fails_in:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def end(self):
        pass


def graphs_left() -> dict[str, bool]:
    """Whether a process keeps its graph if the other fails in a part of the recording."""
    trainer = make_trainer(batch_size=BATCH_SIZE)
    trainer.num_input_channels, network = 1, trainer.network
    trainer.network, found = DistributedDataParallel(network), {}
    with patch.object(graphed, "RecordedStep", FailingStep):
        for part in ("rehearse", "record", "nowhere"):
            FailingStep.fails_in = part
            trainer._record_step()
            found[part] = network._training_step is not None
    return found


def one_step_left_out(rank: int) -> dict[str, object]:
    """Three steps, in the second of which the gradients of the second process alone become infinite."""
    torch.manual_seed(0)
    trainer = make_trainer(patch_size=PATCH[3])
    trainer.network = DistributedDataParallel(trainer.network)
    loss_function, moved = trainer.loss, []
    steps = [False, True, False]  # whether gradients overflow

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if steps[0] and rank == 1:
            output.register_hook(lambda gradient: gradient * float("inf"))
        return loss_function(output, target)

    trainer.loss = loss
    trainer.on_train_epoch_start()
    weights = list(trainer.network.parameters())
    while steps:
        before = [p.detach().clone() for p in weights]
        trainer.train_step(make_batch(trainer))
        moved.append(not all(map(torch.equal, before, weights)))
        steps.pop(0)
    return {"moved": moved, "left_out": trainer.steps_left_out, "weights": [p.detach().clone() for p in weights]}


def read_of_split(rank: int, folder: Path) -> str:
    """What a process finds of a file that the making of the split leaves, at its end."""
    trainer, file = make_trainer(), folder / "split"

    def split() -> str:
        if rank == 0:
            time.sleep(0.5)
            file.write_text("whole")
        return file.read_text()

    trainer._split_checked = split
    return trainer.do_split()


def validated_without_a_case(rank: int) -> bool:
    """Only the first process has one; nnU-Net's processes meet at the end of the validation."""
    trainer = make_trainer(patch_size=PATCH[3], strides=DEEP)
    network = trainer.network = DistributedDataParallel(trainer.network)
    assert list(network.buffers())

    def predict(*_):
        if rank == 0:
            with torch.no_grad():
                network.eval()(torch.zeros(1, 1, *PATCH[3]))
        dist.barrier()

    with patch.object(ValidatingTrainer, "perform_actual_validation", predict):
        trainer.perform_actual_validation()
    return True


class Replaying(nn.Linear):
    """A network that says that it replays its step, and so averages its gradients itself, or does not."""

    answer = False

    def replays(self, x: torch.Tensor) -> bool:
        return self.answer


def gradients_by_ddp(rank: int) -> dict[bool, float]:
    """Of a network that replays its step and of one that does not, each process with an input of its own."""
    network = GraphedDataParallel(Replaying(1, 1, bias=False))
    found = {}
    for network.module.answer in (False, True, False):
        network.zero_grad()
        network(torch.full((1, 1), 1.0 + rank)).sum().backward()
        found[network.module.answer] = network.module.weight.grad.item()
    return found


def process(rank: int, port: int, folder: str, device: str) -> None:
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = f"{folder}/{name}"
    gloo.replace_devices()
    if device == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm = TO_SYNC_BATCH_NORM  # it calls itself by this name
    gloo.start(rank, N_PROCESSES, port)
    result = {"parameters": {name: trained(case, device) for name, case in CASES.items()}}
    if device == "cpu":  # the rest has devices that are stand-ins
        result |= {"shares": [shares(n) for n in GLOBAL_BATCHES], "graphs": graphs_left()}
        result |= {"by_ddp": gradients_by_ddp(rank), "one_left_out": one_step_left_out(rank)}
        result |= {"split": read_of_split(rank, Path(folder)), "validated": validated_without_a_case(rank)}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_two_processes(folder: Path, device: str) -> list[dict]:
    """What each process has at its end."""
    arguments = (free_port(), str(folder), device)
    if device == "cuda":  # which may not be forked
        torch.multiprocessing.spawn(process, arguments, nprocs=N_PROCESSES)
    else:
        gloo.processes(process, arguments, N_PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(N_PROCESSES)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    return run_two_processes(tmp_path_factory.mktemp("processes"), "cpu")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_learns(two_processes, folders, monkeypatch, name):
    monkeypatch.setattr(torch, "compile", COMPILE)
    expected = trained({key: value for key, value in CASES[name].items() if key != "compiled"})
    for result in two_processes:
        assert_close(result["parameters"][name], expected, name)


def assert_close(parameters: list[torch.Tensor], expected: list[torch.Tensor], name: str) -> None:
    close = {"rtol": 1e-4, "atol": 1e-6} if CASES[name].get("compiled") else {"rtol": 1e-5, "atol": 1e-7}
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter, value, **close)


@pytest.mark.slow
def test_graphs_are_in_all_processes_or_in_none(two_processes):
    """Whatever one of them exchanges with others, it does so when all have shown that they can."""
    for result in two_processes:
        assert result["graphs"] == {"rehearse": False, "record": False, "nowhere": True}


@pytest.mark.slow
def test_a_step_is_left_out_by_all_processes_or_by_none(two_processes):
    first, second = (result["one_left_out"] for result in two_processes)
    assert first["moved"] == second["moved"] == [True, False, True]
    assert first["left_out"] == second["left_out"] == 1
    assert all(map(torch.equal, first["weights"], second["weights"]))


@pytest.mark.slow
def test_one_process_splits_and_the_others_read(two_processes):
    assert [result["split"] for result in two_processes] == ["whole", "whole"]


@pytest.mark.slow
def test_a_process_without_a_case_to_predict_keeps_none_waiting(two_processes):
    assert [result["validated"] for result in two_processes] == [True, True]


ENDS_WITH_ITS_PARENT = """
import multiprocessing, os, signal, sys, time
from nnunet_lgms.nnunet.workers import end_with_parent

def child():
    end_with_parent(os.getpid())
    print(os.getpid(), flush=True)
    time.sleep(60)

signal.signal(signal.SIGINT, signal.SIG_IGN)
multiprocessing.get_context("fork").Process(target=child).start()
time.sleep(60)
"""


def test_processes_end_with_the_command():
    """Also where it was started in the background of a script, and they ignore the system's interrupt."""
    with subprocess.Popen([sys.executable, "-c", ENDS_WITH_ITS_PARENT], stdout=subprocess.PIPE, text=True) as command:
        child = int(command.stdout.readline())
        assert runs(child)
        command.kill()
    end = time.monotonic() + 60
    while runs(child):
        assert time.monotonic() < end
        time.sleep(0.1)


def runs(pid: int) -> bool:
    """Whether a process has not ended; its command line is empty where nobody asked for its end."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


@pytest.mark.slow
def test_ddp_averages_gradients_where_no_graph_does(two_processes):
    assert [result["by_ddp"] for result in two_processes] == [{False: 1.5, True: 1.0}, {False: 1.5, True: 2.0}]


def test_the_benchmark_removes_nothing_that_is_not_its_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    import ddp

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit):
        ddp.main(["--work", str(tmp_path)])
    assert "holds other things" in capsys.readouterr().err
    assert (tmp_path / "data" / "thesis.txt").read_text() == "mine"
    with pytest.raises(SystemExit):
        ddp.main(["--work", str(tmp_path), "--gpus", "3"])
    assert "--gpus 3: give 2 to 2" in capsys.readouterr().err


@pytest.mark.parametrize("n_gpus", [1, 2, 3, 8])
def test_the_benchmark_knows_no_number_of_gpus(tmp_path, monkeypatch, capsys, n_gpus):
    """Every training has a process a GPU, or one, or half of them, and a sample for each."""
    import ddp

    trained, plans = [], {"configurations": {ddp.CONFIGURATION: {"batch_size": 2, "patch_size": [8] * 3}}}
    folder = tmp_path / "preprocessed" / "Dataset004_X"
    folder.mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))

    class Bench(ddp.Bench):
        def train(self, run, n, batch, *args, **more):
            assert (folder / f"{self.plans(batch)}.json").is_file()
            trained.append((n, batch))
            fold = self.log(run).parent / "a" / "b" / "fold_0"
            fold.mkdir(parents=True, exist_ok=True)
            for name in ("latest", "final"):
                torch.save({"network_weights": {}}, fold / f"checkpoint_{name}.pth")
            losses = [0.5] * (self.epochs // 2 if more.get("stops") else self.epochs)
            times = {"seconds": [2.0] * 4, "waiting": [0.1] * 4, "times": [0.0] * 4, "started": 0.0}
            return {"losses": losses, "batch_size": batch, "epochs_done": len(losses), **times}

    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(ddp, "Bench", Bench)
    monkeypatch.setattr(ddp, "prepare", lambda *_: ["4", "4"])
    monkeypatch.setattr(ddp, "provenance", lambda: {})
    words = ["--work", str(tmp_path / "work"), "--output", str(tmp_path), "--epochs", "4"]
    words += ["--parts", "speed_hippocampus", "losses", "continue"]
    if n_gpus == 1:
        with pytest.raises(SystemExit):
            ddp.main(words)
        assert "1 GPUs found, 2 needed" in capsys.readouterr().err
        return
    assert ddp.main(words) == 0
    assert {n for n, _ in trained} == {1, n_gpus // 2, n_gpus} and all(batch >= n for n, batch in trained)
    assert (n_gpus, 2 * n_gpus) in trained and (1, 2) in trained  # the planned batch on each, and on one
    found = json.loads((tmp_path / "ddp.json").read_text())["datasets"]["Dataset004_X"][f"{n_gpus} GPUs"]
    assert found["compare_speed"]["ratio_at_equal_batch_per_device"] == pytest.approx(n_gpus)
    assert found["continue_on_another_number"][f"from_{n_gpus}_to_{n_gpus // 2}"]["losses_go_on"]


@pytest.mark.gpu
def test_two_processes_share_a_gpu(folders, tmp_path):
    """gloo with CUDA tensors, as NCCL wants a GPU for each process; batch norms of float64 are PyTorch's."""
    results = run_two_processes(tmp_path, "cuda")
    for name, case in CASES.items():
        expected = trained({key: value for key, value in case.items() if key != "compiled"}, "cuda")
        for result in results:
            assert_close(result["parameters"][name], expected, name)


ON_GRAPHS = {
    "3D with attention, and so batch norms": {
        "patch_size": [32, 24, 32],
        "strides": [[1] * 3, [2] * 3, [2] * 3, [2] * 3],
        "lgmsnet": {"deep_supervision": True},
    },
    "2D, Dice of the batch": {"patch_size": [64, 48], "batch_dice": True},
}


def trained_on_gpus(case: dict, rank: int = 0) -> torch.Tensor:
    """How far two steps of the trainer, on CUDA graphs and in float16, move the parameters."""
    torch.manual_seed(0)
    trainer, whole = (make_trainer(batch_size=BATCH_SIZE, **case) for _ in range(2))
    trainer.device, trainer.num_input_channels = torch.device("cuda", rank), 1
    torch.cuda.set_device(rank)
    network = trainer.network.cuda()
    if trainer.is_ddp:
        network = TO_SYNC_BATCH_NORM(network)
        trainer.network = GraphedDataParallel(network, device_ids=[rank])
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    trainer._record_step()
    assert network._training_step is not None
    before = torch.cat([p.detach().flatten() for p in network.parameters()])
    whole.batch_size = BATCH_SIZE
    np.random.seed(0)
    torch.manual_seed(1)
    batch = make_batch(whole)
    first = rank * trainer.batch_size
    mine = slice(first, first + trainer.batch_size)
    trainer.on_train_epoch_start()
    for _ in range(2):
        target = batch["target"]
        target = [t[mine] for t in target] if isinstance(target, list) else target[mine]
        assert np.isfinite(trainer.train_step({"data": batch["data"][mine], "target": target})["loss"])
    return (torch.cat([p.detach().flatten() for p in network.parameters()]) - before).cpu()


def process_on_a_gpu(rank: int, port: int, folder: str) -> None:
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = f"{folder}/{name}"
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("nccl", rank=rank, world_size=N_PROCESSES)
    torch.save({name: trained_on_gpus(case, rank) for name, case in ON_GRAPHS.items()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < N_PROCESSES, reason="needs two GPUs")
def test_two_gpus_learn_on_graphs_what_one_learns(folders, tmp_path):
    """What batch norms exchange and the mean of the gradients are part of the graphs; NCCL."""
    torch.multiprocessing.spawn(process_on_a_gpu, (free_port(), str(tmp_path)), nprocs=N_PROCESSES)
    for name, case in ON_GRAPHS.items():
        expected = trained_on_gpus(case)
        results = [torch.load(tmp_path / f"{rank}.pt")[name] for rank in range(N_PROCESSES)]
        assert torch.equal(*results)
        assert (results[0] - expected).norm() < 0.1 * expected.norm()  # float16: 0.05; without exchange about 1


@pytest.mark.slow
@pytest.mark.parametrize("global_batch", GLOBAL_BATCHES)
def test_batch_and_oversampling_are_shared_as_nnunet_does(two_processes, global_batch):
    """nnU-Net: a third of the samples of the whole batch show foreground, the last ones."""
    at = GLOBAL_BATCHES.index(global_batch)
    (first, low), (second, high) = (result["shares"][at] for result in two_processes)
    assert first + second == global_batch and first - second in (0, 1)
    forced = global_batch - round(global_batch * 0.67)
    assert first * low + second * high == pytest.approx(forced)
    assert high > low


@pytest.mark.parametrize(
    ("dim", "strides", "there_are_some"), [(2, None, True), (3, None, False), (3, DEEP, True)], ids=str
)
def test_every_batch_norm_is_synchronised(folders, dim, strides, there_are_some):
    """nnU-Net's conversion before DDP reaches each of them; none hides in a function or a list."""
    network = make_trainer(patch_size=PATCH[dim], strides=strides).network
    n = sum(isinstance(module, _BatchNorm) for module in network.modules())
    assert (n > 0) == there_are_some
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == n
    assert sum(isinstance(module, _BatchNorm) for module in converted.modules()) == n
