"""The data of the tests' study: five discs to train on, the same to test on, and two unseen ones.

``python study_data.py FOLDER`` makes them and prints what a shell has to export.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tiny_model import raw_dataset

ROOT = Path(__file__).resolve().parents[1]
TRAINER = "nnUNetTrainerLGMSNet_2epochs"
STUDY = f"""
name: discs
device: cpu
threads: 1
processes: 0
configurations: [2d]
trainer: {TRAINER}
folds: [0, 1]
datasets:
  Dataset801_Disc: {{test: true, zeroshot: [Dataset802_Unseen]}}
unseen:
  Dataset802_Unseen: {{}}
variants:
"""


def make_study(folder: Path, overrides: Sequence[str] = ("kernels_3", "kernels_5")) -> dict[str, str]:
    """Writes the raw data and ``study.yaml`` with a variant for each override; the variables that nnU-Net needs."""
    variables = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for path in variables.values():
        Path(path).mkdir(parents=True, exist_ok=True)
    disc = raw_dataset(folder / "nnUNet_raw" / "Dataset801_Disc", seeds=range(1, 6))
    for kind in ("images", "labels"):
        shutil.copytree(disc / f"{kind}Tr", disc / f"{kind}Ts", dirs_exist_ok=True)
    raw_dataset(folder / "nnUNet_raw" / "Dataset802_Unseen", seeds=(11, 12))
    variants = "".join(f"  {name}: {{override: {name}}}\n" for name in overrides)
    (folder / "study.yaml").write_text(STUDY + variants)
    trainers = os.pathsep.join([str(ROOT / "tests" / "ext_trainers"), str(ROOT / "trainers")])
    # one process each: the cores are few, and a process costs more than what it would do here
    return variables | {"nnUNet_extTrainer": trainers, "nnUNet_def_n_proc": "1", "OMP_WAIT_POLICY": "PASSIVE"}


if __name__ == "__main__":
    for name, value in make_study(Path(sys.argv[1]).absolute()).items():
        print(f"export {name}={shlex.quote(value)}")
