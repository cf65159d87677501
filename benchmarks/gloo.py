"""nnU-Net's distributed training on CPUs, for machines without two GPUs: gloo in place of NCCL, nothing else changed.

nnU-Net's ``-num_gpus`` is for CUDA alone. What it says about devices is replaced here: the process group, the devices
of DDP and of the trainer, and SyncBatchNorm, of which PyTorch has no version for CPUs (each process keeps the
statistics of its own part of the batch, which on GPUs it does not).
"""

from __future__ import annotations

import argparse
import os
import socket
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(seconds=120)


def start(rank: int, world_size: int, port: int, threads: int = 1) -> None:
    """Joins a process group of ``world_size`` processes on this machine."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(threads)
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


def run(rank: int, port: int, world_size: int, arguments: tuple) -> None:
    """A process of nnU-Net's distributed training: ``arguments`` are those of its ``run_ddp`` after the rank."""
    from nnunetv2.run import run_training

    replace_devices()
    run_training.setup_ddp = lambda rank, world_size: start(rank, world_size, port)
    run_training.run_ddp(rank, *arguments, world_size)


def main() -> None:
    """``python gloo.py DATASET CONFIGURATION FOLD -tr TRAINER -p PLANS -num_gpus N [--c]``, as ``nnUNetv2_train``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("fold", type=int)
    parser.add_argument("-tr", required=True)
    parser.add_argument("-p", required=True)
    parser.add_argument("-num_gpus", type=int, default=2)
    parser.add_argument("--c", action="store_true")
    args = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # no --disable_checkpointing, --val, -pretrained_weights, --npz, --val_best
    arguments = (args.dataset, args.configuration, args.fold, args.tr, args.p, False, args.c, False, None, False, False)
    torch.multiprocessing.spawn(run, (port, args.num_gpus, arguments), nprocs=args.num_gpus)


if __name__ == "__main__":
    main()
