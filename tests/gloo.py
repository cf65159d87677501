"""nnU-Net's distributed training on CPUs, for machines without two GPUs: gloo in place of NCCL, nothing else changed.

nnU-Net's ``-num_gpus`` is for CUDA alone. What it says about devices is replaced here: the process group, the devices
of DDP and of the trainer, and SyncBatchNorm, of which PyTorch has no version for CPUs (each process keeps the
statistics of its own part of the batch, which on GPUs it does not).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(seconds=400)  # where the machine is busy, a process may begin minutes after another
IMPORTED_ONCE = ["torch._dynamo", "nnunetv2.run.run_training"]


def processes(function: Callable[..., None], args: tuple, n: int) -> None:
    """``function(rank, *args)`` in each of ``n`` processes, as ``torch.multiprocessing.spawn`` calls it.

    They are forked from one process that has imported PyTorch and nnU-Net, which costs each of them six seconds, and
    nothing of this package. Where a system cannot fork, each is started anew.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    torch.multiprocessing.start_processes(function, args, nprocs=n, start_method=method)


def start(rank: int, world_size: int, port: int) -> None:
    """Joins a process group of ``world_size`` processes on this machine."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=TIMEOUT)


def replace_devices() -> None:
    """Makes nnU-Net's trainers of this process run distributed on the CPU."""
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module

    module.DDP = lambda network, device_ids: DistributedDataParallel(network)
    torch.nn.SyncBatchNorm.convert_sync_batchnorm = staticmethod(lambda network: network)
    torch.cuda.set_device = lambda device: None
    init = module.nnUNetTrainer.__init__

    def on_the_cpu(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):  # noqa: B008
        init(self, plans, configuration, fold, dataset_json, torch.device("cpu"))
        self.device, self.grad_scaler = torch.device("cpu"), None

    module.nnUNetTrainer.__init__ = on_the_cpu
