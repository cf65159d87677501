"""Patch and batch that fill a card: what `nnunet_lgms plan` gives LGMSNet, and nnU-Net's own planner its U-Net.

    python benchmarks/planners.py [--vram 8]       to benchmarks/results/planned.{json,md}

The fingerprints are those of tests/planned_by_nnunet; nnU-Net's plans are made by its own planner with the same memory.
Nothing is measured: LGMSNet's memory is counted on PyTorch's meta device (see nnunet_lgms/planning/memory.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from record import ROOT, command_line, provenance, table, write

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from planned_by_nnunet.make import FOLDER, preprocessed_folder  # noqa: E402

CONFIGURATIONS = ("2d", "3d_fullres")


def planned(fingerprint: dict[str, Any], dataset_json: dict[str, Any], name: str, vram: float) -> dict[str, Any]:
    """Patch and batch of both planners by configuration, and what LGMSNet's step needs, in GiB."""
    with preprocessed_folder(fingerprint, dataset_json, name):
        from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

        from nnunet_lgms.planning.planner import GIB, LGMSNetPlanner

        with contextlib.redirect_stdout(io.StringIO()), torch.device("meta"):
            unet = ExperimentPlanner(name, gpu_memory_target_in_gb=vram).plan_experiment()["configurations"]
        with contextlib.redirect_stdout(io.StringIO()):
            planner = LGMSNetPlanner(name, vram)
            lgmsnet = planner.plan_experiment()["configurations"]
        return {
            configuration: {
                "unet": _size(unet[configuration]),
                "lgmsnet": _size(lgmsnet[configuration]),
                "gib": round(planner.memory_of(lgmsnet[configuration]) / GIB, 2),
                "limited_by_the_dataset": planner.limits_of(lgmsnet[configuration]) is not None,
            }
            for configuration in CONFIGURATIONS
            if configuration in unet
        }


def _size(configuration: dict[str, Any]) -> dict[str, Any]:
    return {"patch": [int(n) for n in configuration["patch_size"]], "batch": int(configuration["batch_size"])}


def markdown(report: dict[str, Any]) -> str:
    rows = []
    for name, configurations in report["fingerprints"].items():
        for configuration, row in configurations.items():
            sizes = row["unet"], row["lgmsnet"]
            unet, lgmsnet = (f"{size['batch']} × {'x'.join(map(str, size['patch']))}" for size in sizes)
            voxels = [size["batch"] * math.prod(size["patch"]) for size in sizes]
            ratio = f"{voxels[1] / voxels[0]:.2f}"
            star = " *" if row["limited_by_the_dataset"] else ""
            rows.append((name.replace("_", " "), configuration, unet, lgmsnet + star, ratio, f"{row['gib']:.1f}"))
    lines = [
        f"Patch and batch for a card of {report['vram']:g} GiB, as nnU-Net's planner gives them to its U-Net and "
        "`nnunet_lgms plan` to LGMSNet.",
        "",
        "× is voxels of a batch against the U-Net's. GiB is what LGMSNet's training step needs beside what CUDA holds, "
        "as counted. * where nnU-Net's rules about the dataset (a patch no larger than the median image, a batch of at "
        "most 5 % of all voxels) set the limit and not the card.",
        "",
        *table("fingerprint | | U-Net: batch × patch | LGMSNet: batch × patch | × | GiB", rows),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--vram", type=float, default=8, help="memory of the card in GiB (8)")
    args = parser.parse_args(arguments)
    found = {}
    for i, folder in enumerate(sorted(path.parent for path in FOLDER.glob("*/fingerprint.json")), start=1):
        files = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("fingerprint", "dataset"))
        found[folder.name] = planned(*files, f"Dataset{900 + i:03d}_{folder.name}", args.vram)
        print(folder.name, json.dumps(found[folder.name]), flush=True)
    report = {**provenance("cpu"), "vram": args.vram, "fingerprints": found}
    write(args.output, "planned", report, markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
