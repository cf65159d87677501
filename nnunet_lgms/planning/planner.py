"""nnU-Net's experiment planning with LGMSNet's own need of memory, so that patch and batch fill the card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_lgms.config import KEY, LGMSSettings
from nnunet_lgms.config.resolve import Topology
from nnunet_lgms.config.settings import AUTO
from nnunet_lgms.dataset_json import n_channels
from nnunet_lgms.files import atomic_write, read_json
from nnunet_lgms.planning.auto_kernels import Components
from nnunet_lgms.planning.memory import CALIBRATION, StepMemory, needed_bytes, trace_training_step
from nnunet_lgms.planning.override import build_on_meta, stored, with_auto_kernels
from nnunet_lgms.planning.plans_files import plans_file

GIB = 2**30
PLANS_NAME = "nnUNetLGMSNetPlans"
#: share of the card that is planned for: estimates err, and the allocator cannot fill every block
HEADROOM = 0.92
#: patches below this many voxels do not get smaller; a card that cannot take them is too small
SMALLEST_PATCH = {2: 16**2, 3: 8**3}


class LGMSNetPlanner(ExperimentPlanner):
    """nnU-Net's planner; only the estimate of memory is LGMSNet's.

    nnU-Net finds planners inside its own package only, so ``nnunet_lgms plan`` runs this one. The plans that it writes
    are ordinary: their network is nnU-Net's own, and an LGMSNet trainer builds LGMSNet from the same topology. As in
    nnU-Net's ResEnc planners, 2d and 3d_fullres share the preprocessed data of ``nnUNetPlans``.

    Args:
        dataset: nnU-Net's number or name.
        vram: memory of the card in GiB.
        settings: of LGMSNet; they go into the plans and decide the memory.
        plans_name: name of the plans file.
        measure: gives the components of the dataset; called at most once, if kernels are "auto".
    """

    def __init__(
        self,
        dataset: str | int,
        vram: float,
        settings: Mapping[str, Any] | None = None,
        plans_name: str = PLANS_NAME,
        measure: Callable[[], Components] | None = None,
    ):
        super().__init__(dataset, gpu_memory_target_in_gb=vram, plans_name=plans_name)
        # In nnU-Net's formulas an "estimate" for a reference batch stands against a "reference". With a reference of 1
        # for a batch of 1, an estimate of 1/B says that a batch of B fits; below B = 2 the patch shrinks.
        self.UNet_reference_val_2d = self.UNet_reference_val_3d = 1.0
        self.UNet_reference_val_corresp_GB = vram
        self.UNet_reference_val_corresp_bs_2d = self.UNet_reference_val_corresp_bs_3d = 1
        self.settings = LGMSSettings.from_plan(settings or {})
        self.measure = measure
        self._components: Components | None = None
        self._counts: dict[Any, StepMemory] = {}
        self._looks: dict[Any, tuple[StepMemory, float]] = {}

    def generate_data_identifier(self, configuration_name: str) -> str:
        """2d and 3d_fullres have nnU-Net's spacing, so they have its preprocessed data as well."""
        shared = configuration_name in ("2d", "3d_fullres")
        return f"{'nnUNetPlans' if shared else self.plans_identifier}_{configuration_name}"

    def static_estimate_VRAM_usage(
        self,
        patch_size: Sequence[int],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict,
        arch_kwargs_req_import: Sequence[str],
    ) -> float:
        """1 over the largest batch that fits (see ``__init__``); what nnU-Net calls an estimate.

        Raises:
            ValueError: even a small patch does not fit, or the settings do not fit the topology.
        """
        topology = Topology.of({"patch_size": patch_size, "architecture": {"arch_kwargs": arch_kwargs}})
        if topology.n_levels < 2:
            raise ValueError(self._too_small(topology))
        batch = self._largest_batch(topology, input_channels, output_channels)
        if batch < self.UNet_min_batch_size and np.prod(patch_size) <= SMALLEST_PATCH[topology.dim]:
            raise ValueError(self._too_small(topology))
        return 1 / batch if batch else np.inf

    def memory_of(self, configuration: Mapping[str, Any]) -> int:
        """Bytes that a training step of a planned configuration needs, without what CUDA itself takes."""
        topology = Topology.of(configuration)
        counted = self._count(topology, int(configuration["batch_size"]), self._n_channels(), self._n_classes())
        return needed_bytes(counted, topology.dim)

    def limits_of(self, configuration: Mapping[str, Any]) -> str | None:
        """Says so where the dataset, not the card, decides patch and batch; None where the card does.

        nnU-Net lets no patch grow beyond the median image and no batch beyond 5 % of the dataset's voxels.
        """
        patch_size, architecture = configuration["patch_size"], configuration["architecture"]
        largest_batch = 1 / self.static_estimate_VRAM_usage(
            patch_size, self._n_channels(), self._n_classes(), "", architecture["arch_kwargs"], ()
        )
        if largest_batch < configuration["batch_size"] + 1:
            return None
        median = [round(float(n)) for n in configuration["median_image_size_in_voxels"]][-len(patch_size) :]
        return (
            f"the dataset sets the limit, not the card: patches cover at most the median image "
            f"({'x'.join(map(str, median))}), batches at most {self.max_dataset_covered:.0%} of all voxels (nnU-Net's "
            "rules)"
        )

    def get_plans_for_configuration(self, spacing, *args: Any, **kwargs: Any) -> dict:
        """nnU-Net's configuration with LGMSNet's settings."""
        self._spacing = tuple(float(s) for s in spacing)
        plan = super().get_plans_for_configuration(spacing, *args, **kwargs)
        if self.settings.model_fields_set:
            plan[KEY] = stored(self._settings_for(Topology.of(plan)))
        return plan

    def save_plans(self, plans: dict) -> None:
        """Writes the plans file whole, configurations that somebody added to an earlier one included."""
        recursive_fix_for_json_export(plans)
        path = plans_file(self.dataset_name, self.plans_identifier)
        if path.is_file():
            earlier = read_json(path).get("configurations", {})
            plans["configurations"].update({k: v for k, v in earlier.items() if k not in plans["configurations"]})
        Path(path.parent).mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(plans, indent=4) + "\n", "utf-8")

    def _too_small(self, topology: Topology) -> str:
        context = CALIBRATION[topology.dim].context / GIB
        return (
            f"--vram {self.UNet_vram_target_GB:g} is too small for LGMSNet in {topology.dim}D: not even a patch of "
            f"{'x'.join(map(str, topology.patch_size))} fits beside the {context:.1f} GiB that CUDA takes for itself; "
            f"give more, or smaller widths with --apply."
        )

    def _largest_batch(self, topology: Topology, input_channels: int, n_classes: int) -> int:
        """The largest batch whose step fits the card.

        With a topology, memory grows nearly as the voxels do, so one count serves for a look at all patches. What seems
        to fit is counted itself, because gradients do not grow, and maps too large for the kernels cost more.
        """
        calibration = CALIBRATION[topology.dim]
        card = HEADROOM * self.UNet_vram_target_GB * GIB - calibration.context - calibration.fixed
        voxels = np.prod(topology.patch_size, dtype=float)

        def fitting(counted: StepMemory, counted_voxels: float) -> int:
            per_sample = calibration.activations * counted.activations * voxels / counted_voxels
            return max(0, int((card - counted.static) // per_sample))

        key = topology.strides, topology.kernel_sizes
        if key not in self._looks:
            smallest = self.UNet_min_batch_size
            self._looks[key] = self._count(topology, smallest, input_channels, n_classes), smallest * voxels
        batch = fitting(*self._looks[key])
        if batch >= self.UNet_min_batch_size:
            batch = fitting(self._count(topology, batch, input_channels, n_classes), batch * voxels)
        while batch >= self.UNet_min_batch_size:
            smaller = fitting(self._count(topology, batch, input_channels, n_classes), batch * voxels)
            if smaller >= batch:
                break
            batch = smaller
        return batch

    def _count(self, topology: Topology, batch: int, input_channels: int, n_classes: int) -> StepMemory:
        key = (topology.patch_size, topology.strides, topology.kernel_sizes, batch)
        if key not in self._counts:
            network = build_on_meta(self._settings_for(topology), topology, input_channels, n_classes)
            shape = (batch, input_channels, *topology.patch_size)
            self._counts[key] = trace_training_step(network, shape, n_classes)
        return self._counts[key]

    def _settings_for(self, topology: Topology) -> LGMSSettings:
        if self.settings.lms_kernels != AUTO:
            return self.settings
        if self._components is None:
            self._components = self.measure()
        topology = replace(topology, spacing=topology.spacing or self._spacing)
        return with_auto_kernels(self.settings, topology, self._components, say=lambda line: None)

    def _n_channels(self) -> int:
        return n_channels(self.dataset_json)

    def _n_classes(self) -> int:
        return len(self.dataset_json["labels"])
