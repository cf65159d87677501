"""Epochs of nnU-Net's own training loop, LGMSNet's trainer beside nnU-Net's: what a user waits for.

    python benchmarks/epochs.py [--epochs 4] [--iterations 50] [--synthetic 128] [--output benchmarks/results]

Both train on the hippocampus cases of the demo and on noise with planned patches of 128^3, one after the other, with
batches from nnU-Net's worker processes. The first epoch, which compiles or records, is told apart; of the others the
median. "waiting" is the share of their time in which the training waited for a batch; of LGMSNet's trainers at most, as
the GPU may still work meanwhile. The utilisation of the GPU is what nvidia-smi says during them, several times a
second. Writes epochs.json and epochs.md. A CPU will do for a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from provenance import provenance
from training_sets import CONFIGURATION, TRAIN, prepare, timings

from nnunet_lgms.files import atomic_write

HERE = Path(__file__).resolve().parent
TRAINERS = {"LGMSNet": "nnUNetTrainerLGMSNet_measured", "nnU-Net's U-Net": "nnUNetTrainer_measured"}
UTILISATION = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]


class Utilisation:
    """What nvidia-smi says of the first GPU, with the time, in a file."""

    def __init__(self, folder: Path):
        self.said, self.process = [], None
        if torch.cuda.is_available():
            self.file = (folder / "utilisation").open("w+")
            this = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"  # CUDA_VISIBLE_DEVICES may hide others
            self.process = subprocess.Popen([*UTILISATION, this, "-lms", "200"], stdout=self.file)
            self.begin = time.time()

    def mean(self, begin: float, end: float) -> float | None:
        """Per cent between two times."""
        if self.process is None:
            return None
        self.file.seek(0)
        said = [float(line) for line in self.file.read().split()]
        step = (time.time() - self.begin) / max(1, len(said))
        those = [value for i, value in enumerate(said) if begin <= self.begin + i * step <= end]
        return statistics.fmean(those) if those else None

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()


def train(dataset: str, trainer: str, folder: Path, environment: dict[str, str], device: str) -> dict:
    """What the trainer measured.

    Raises:
        RuntimeError: the training failed.
    """
    utilisation, begin = Utilisation(folder), time.time()
    log = folder / f"{dataset}_{trainer}.txt"
    with log.open("w") as file:
        command = [*TRAIN, dataset, CONFIGURATION, "0", "-tr", trainer, "-device", device]
        code = subprocess.run(command, env={**os.environ, **environment}, stdout=file, stderr=file).returncode
    utilisation.stop()
    if code:
        raise RuntimeError(f"{trainer} on dataset {dataset} ended with {code}: {log.read_text()[-1500:]}")
    (path,) = (folder / "nnUNet_results").glob(f"Dataset{int(dataset):03d}_*/{trainer}__*/fold_0/measured.json")
    found = json.loads(path.read_text())
    return {
        **timings(found, begin),
        "utilisation": utilisation.mean(found["times"][1], found["times"][-1] + found["seconds"][-1]),
        "batch_size": found["batch_size"],
        "measured": found,
    }


def markdown(results: dict) -> str:
    lines = [
        "# Epochs in nnU-Net's training loop",
        "",
        f"{results['date']}, {results['device']}, torch {results['versions']['torch']}, nnunetv2 "
        f"{results['versions']['nnunetv2']}; {results['iterations']} steps an epoch, median of "
        f"{results['epochs'] - 1} epochs after the first. nnU-Net's epochs have 250 steps.",
        "",
        "| dataset | patch, batch | network | first epoch and start, s | epoch, s | × | waiting for batches | GPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, dataset in results["datasets"].items():
        reference = dataset["runs"].get("nnU-Net's U-Net", {}).get("epoch_s")
        for network, run in dataset["runs"].items():
            cells = [
                name,
                f"{' × '.join(map(str, dataset['patch_size']))}, {run['batch_size']}",
                network,
                f"{run['first_epoch_s']:.0f}",
                f"{run['epoch_s']:.2f}",
                f"{run['epoch_s'] / reference:.2f}" if reference else "",
                f"{100 * run['waiting']:.0f} %",
                "" if run["utilisation"] is None else f"{run['utilisation']:.0f} %",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=50, help="steps an epoch")
    parser.add_argument("--synthetic", type=int, default=128, metavar="SIZE", help="voxels per axis of the noise")
    parser.add_argument(
        "--data", type=Path, help="folder of the two datasets, made if it is not there (a temporary one)"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if args.epochs < 2:
        parser.error("--epochs must be 2 or more: the first one compiles")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = {"MEASURED_EPOCHS": str(args.epochs), "MEASURED_ITERATIONS": str(args.iterations)}
    results = {
        **provenance(device),
        "epochs": args.epochs,
        "iterations": args.iterations,
        "datasets": {},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        folder = args.data.resolve() if args.data else Path(made) / "data"
        os.environ["nnUNet_extTrainer"] = str(HERE / "trainers")
        for dataset in prepare(folder, args.synthetic):
            (plans,) = (folder / "nnUNet_preprocessed").glob(f"Dataset{int(dataset):03d}_*/nnUNetPlans.json")
            patch_size = json.loads(plans.read_text())["configurations"][CONFIGURATION]["patch_size"]
            runs = {}
            results["datasets"][plans.parent.name] = {"patch_size": patch_size, "runs": runs}
            for network, trainer in TRAINERS.items():
                runs[network] = train(dataset, trainer, folder, environment, device)
                print(f"{plans.parent.name}, {network}: {runs[network]['epoch_s']:.2f} s an epoch", flush=True)
                with atomic_write(args.output / "epochs.json") as temporary:
                    temporary.write_text(json.dumps(results, indent=1) + "\n")
                with atomic_write(args.output / "epochs.md") as temporary:
                    temporary.write_text(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
