"""What a configuration costs: parameters, GMAC, receptive field, memory and time of a step on this machine."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from nnunet_lgms.architecture.encoder import MaxPool
from nnunet_lgms.blocks.attention import SparseTransformer
from nnunet_lgms.blocks.lms import MultiKernelDepthwise
from nnunet_lgms.config import settings_of
from nnunet_lgms.config.resolve import Topology
from nnunet_lgms.nnunet.builder import build_network, unused_heads
from nnunet_lgms.nnunet_files import WITHOUT_SPACING
from nnunet_lgms.planning.memory import needed_bytes, trace_training_step
from nnunet_lgms.planning.training_step import WARM_UP, InferenceStep, peak_memory, planned_training_step

LGMSNET, NNUNET = "LGMSNet", "nnU-Net"
MIB = 2**20


@register_flop_formula(torch.ops.nnunet_lgms.multi_kernel_depthwise)
def _depthwise_flop(x_shape, parameters_shape, channels, kernels, *args: Any, out_shape=None, **kwargs: Any) -> int:
    """Two operations per tap, voxel and channel; the flat ``kernels`` hold one number per axis and group."""
    dim = len(kernels) // len(channels)
    taps = sum(n * _product(kernels[i * dim : (i + 1) * dim]) for i, n in enumerate(channels))
    return 2 * x_shape[0] * _product(x_shape[2:]) * taps


@dataclass(frozen=True)
class Subject:
    """One network of one configuration; small enough to be sent to another process.

    Attributes:
        kind: ``LGMSNET``, or ``NNUNET`` for the network that the plan itself names.
        plans: nnU-Net's plans.
        configuration: its name.
        dataset_json: the dataset's description.
    """

    kind: str
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]

    @property
    def manager(self) -> ConfigurationManager:
        """The resolved configuration."""
        return PlansManager(self.plans).get_configuration(self.configuration)

    @property
    def name(self) -> str:
        """LGMSNet, or the class of nnU-Net's network."""
        return LGMSNET if self.kind == LGMSNET else self.manager.network_arch_class_name.split(".")[-1]

    @property
    def n_classes(self) -> int:
        """Channels of the output."""
        return PlansManager(self.plans).get_label_manager(self.dataset_json).num_segmentation_heads

    @property
    def deep_supervision(self) -> bool:
        """As trained: nnU-Net's networks with, LGMSNet as its settings say."""
        return self.kind == NNUNET or settings_of(self.manager).deep_supervision

    def input_shape(self, batch: int | None = None) -> tuple[int, ...]:
        """(B, C, *patch), the planned batch unless given."""
        manager = self.manager
        channels = determine_num_input_channels(PlansManager(self.plans), manager, self.dataset_json)
        return (batch or manager.batch_size, channels, *manager.patch_size)

    def build(self, deep_supervision: bool) -> nn.Module:
        """The network, on the device of the surrounding ``with torch.device``."""
        manager, channels = self.manager, self.input_shape()[1]
        if self.kind == LGMSNET:
            return build_network(manager, channels, self.n_classes, deep_supervision)
        return get_network_from_plans(
            manager.network_arch_class_name,
            manager.network_arch_init_kwargs,
            manager.network_arch_init_kwargs_req_import,
            channels,
            self.n_classes,
            allow_init=False,
            deep_supervision=deep_supervision,
        )


def static_profile(subject: Subject) -> dict[str, Any]:
    """What needs no step: parameters, GMAC of one patch, receptive field per encoder level, estimated GPU memory.

    Heads that only deep supervision has are counted by themselves, as prediction has no use for them.
    """
    topology = Topology.of(subject.manager.configuration)
    if subject.plans.get("image_reader_writer") in WITHOUT_SPACING:
        topology = replace(topology, spacing=None)  # nnU-Net writes 1, which is no mm
    with torch.device("meta"):
        network = subject.build(deep_supervision=False)
    with torch.device("meta"):
        trained = subject.build(subject.deep_supervision).train()
    memory = trace_training_step(trained, subject.input_shape(), subject.n_classes)
    return {
        "network": subject.name,
        "plans": subject.plans["plans_name"],
        "configuration": subject.configuration,
        "patch_size": list(topology.patch_size),
        "spacing_mm": list(topology.spacing or ()),
        "batch_size": subject.manager.batch_size,
        "parameters": sum(p.numel() for p in network.parameters()) - unused_heads(network),
        "unused_heads": unused_heads(network),
        "gmac": count_gmac(network, subject.input_shape(batch=1)),
        "receptive_field": receptive_fields(network, topology),
        "estimated_training_mib": needed_bytes(memory, topology.dim) / MIB if subject.kind == LGMSNET else None,
    }


def count_gmac(network: nn.Module, input_shape: Sequence[int]) -> float:
    """Multiplications and additions, in 10^9, of a forward pass of a network on the meta device.

    Convolutions, linear layers and attention products, as ``torch.utils.flop_counter`` counts them.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.empty(tuple(input_shape), device="meta"))
    return counter.get_total_flops() / 2e9


def receptive_fields(network: nn.Module, topology: Topology) -> list[dict[str, Any]]:
    """Receptive field of each encoder level, in voxels and mm of the input.

    From kernels and strides alone, along the longest path; "whole" levels have attention that spans the patch, and all
    levels below see the whole patch through them.
    """
    field, jump, whole, seen = [1] * topology.dim, [1] * topology.dim, False, set()
    levels = []
    parts = [getattr(network.encoder, "stem", None), *network.encoder.stages]
    for part in parts:
        for kernel, stride in _windows(part, seen):
            if kernel is None:
                whole = True
                continue
            field = [f + (k - 1) * j for f, k, j in zip(field, kernel, jump, strict=True)]
            jump = [j * s for j, s in zip(jump, stride, strict=True)]
        if part is not parts[0]:
            voxels = [min(f, 10**9) for f in field]
            mm = [v * s for v, s in zip(voxels, topology.spacing)] if topology.spacing else None
            levels.append({"level": len(levels) + 1, "voxels": voxels, "mm": mm, "whole_patch": whole})
    return levels


def _windows(module: nn.Module | None, seen: set[int]) -> Iterator[tuple[Sequence[int] | None, Sequence[int] | None]]:
    """Kernel and stride of every window in the order of the forward pass; (None, None) for attention."""
    if module is None or id(module) in seen:  # nnU-Net's blocks register their convolutions twice
        return
    seen.add(id(module))
    if isinstance(module, SparseTransformer):
        yield None, None
    elif isinstance(module, MultiKernelDepthwise):
        yield [max(k) for k in zip(*(conv.kernel_size for conv in module))], [1] * len(module[0].kernel_size)
    elif isinstance(module, _ConvNd):
        yield module.kernel_size, module.stride
    elif isinstance(module, MaxPool):
        yield module.stride, module.stride
    else:
        for child in module.children():
            yield from _windows(child, seen)


def measured_profile(subject: Subject, device: str, steps: int, compiled: bool) -> dict[str, Any]:
    """Time and peak memory of a training and an inference step, each in a process of its own.

    A step that fails, for want of memory say, gives ``{"failed": reason}``.
    """
    results = {}
    context = multiprocessing.get_context("spawn")
    for kind in ("training", "inference"):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                results[kind] = pool.submit(_measure, subject, kind, device, steps, compiled).result()
            except Exception as error:  # out of memory, mostly; what could be measured is still worth having
                lines = str(error).strip().splitlines()
                results[kind] = {"failed": lines[0] if lines else type(error).__name__}
    return results


def _measure(subject: Subject, kind: str, device_name: str, steps: int, compiled: bool) -> dict[str, Any]:
    device = torch.device(device_name)
    on_cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    before = 0 if on_cuda else _peak_of_process()
    network = subject.build(subject.deep_supervision if kind == "training" else False)
    if kind == "training":
        step = planned_training_step(network, subject.input_shape(), subject.n_classes, device, fast=compiled)
    else:
        step = InferenceStep(network, subject.input_shape(), device)
    for _ in range(WARM_UP if on_cuda else 1):
        step()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()  # cuDNN has tried its algorithms, graphs are recorded
    seconds = []
    for _ in range(steps):
        if on_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if on_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = peak_memory() if on_cuda else _peak_of_process() - before
    ms = [1000 * s for s in seconds]
    return {"ms": statistics.median(ms), "ms_fastest": min(ms), "ms_slowest": max(ms), "peak_mib": peak / MIB}


def _peak_of_process() -> int:
    """Most memory that this process has had, in bytes.

    Raises:
        ValueError: Windows does not say it.
    """
    try:
        import resource
    except ImportError:
        raise ValueError("Windows does not tell the memory of a step on a CPU: profile on a GPU.") from None

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine(device: str) -> dict[str, str]:
    """What the measurements were made on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"device": device, "name": name, "torch": torch.__version__, "threads": str(torch.get_num_threads())}


def as_table(profiles: Sequence[dict[str, Any]]) -> str:
    """The profiles side by side, one column each."""
    samples = "voxels" if any(p["spacing_mm"] for p in profiles) else "pixels"
    rows: list[tuple[str, list[str]]] = [
        ("plans", [p["plans"] for p in profiles]),
        (f"patch ({samples})", ["x".join(map(str, p["patch_size"])) for p in profiles]),
        ("batch", [str(p["batch_size"]) for p in profiles]),
        ("parameters", [f"{p['parameters']:,}" for p in profiles]),
        ("heads for deep supervision only", [f"{p['unused_heads']:,}" for p in profiles]),
        ("GMAC, one patch", [f"{p['gmac']:.2f}" for p in profiles]),
    ]
    for level in range(max(len(p["receptive_field"]) for p in profiles)):
        rows.append((f"receptive field, level {level + 1}", [_field(p["receptive_field"], level) for p in profiles]))
    rows.append(
        (
            "training step, GPU memory (estimate)",
            [f"{p['estimated_training_mib']:.0f} MiB" if p["estimated_training_mib"] else "" for p in profiles],
        )
    )
    for kind in ("training", "inference"):
        if any("steps" in p for p in profiles):
            rows.append((f"{kind} step", [_step(p["steps"][kind]) for p in profiles]))
    widths = [max(len(row[1][i]) for row in rows) for i in range(len(profiles))]
    widths = [max(w, len(p["network"])) for w, p in zip(widths, profiles)]
    left = max(len(row[0]) for row in rows)
    lines = [f"{'':{left}}  " + "  ".join(f"{p['network']:>{w}}" for p, w in zip(profiles, widths))]
    lines += [f"{name:{left}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths)) for name, cells in rows]
    return "\n".join(lines)


def _field(levels: list[dict[str, Any]], i: int) -> str:
    if i >= len(levels):
        return ""
    level = levels[i]
    text = "x".join(map(str, level["voxels"])) + ("" if level["mm"] else " pixels")
    if level["mm"]:
        text += " (" + "x".join(f"{v:.0f}" for v in level["mm"]) + " mm)"
    return "whole patch" if level["whole_patch"] else text


def _step(step: dict[str, Any]) -> str:
    if "failed" in step:
        return f"failed: {step['failed'][:40]}"
    return f"{step['ms']:.0f} ms ({step['ms_fastest']:.0f} to {step['ms_slowest']:.0f}), {step['peak_mib']:.0f} MiB"


def _product(values: Sequence[int]) -> int:
    out = 1
    for value in values:
        out *= value
    return out
