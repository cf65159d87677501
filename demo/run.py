"""From raw MRI to evaluated predictions with nnU-Net's own commands and nnUNetTrainerLGMSNet_demo.

`make demo` runs this. Everything goes below ``demo/work``; a step whose result is there is not done again, and a
training that was interrupted goes on from its last checkpoint. To start over: remove ``demo/work``.

The data: 24 training and 6 test cases of the hippocampus set (``demo/data/hippocampus``), labels 1 anterior and
2 posterior, voxels of 1 mm. The GPU is used if there is one.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DEMO = Path(__file__).resolve().parent
DATA = DEMO / "data" / "hippocampus"
WORK = DEMO / "work"

DATASET_ID = 4
DATASET = f"Dataset{DATASET_ID:03d}_Hippocampus"
CONFIGURATION = "3d_fullres"
TRAINER = "nnUNetTrainerLGMSNet_demo"
FOLD = "all"  # no validation fold: the six test cases are what is reported

RAW = WORK / "nnUNet_raw" / DATASET
MODEL = WORK / "nnUNet_results" / DATASET / f"{TRAINER}__nnUNetPlans__{CONFIGURATION}"
PREDICTIONS = WORK / "predictions"
PICTURE = WORK / "hippocampus.png"


def main() -> int:
    device = find_device()
    environment = set_environment()
    print("nnU-Net finds its folders through these variables:")
    for name, value in environment.items():
        print(f"  export {name}={shlex.quote(value)}")

    select = ["-d", str(DATASET_ID), "-c", CONFIGURATION, "-f", FOLD, "-tr", TRAINER]
    steps: list[tuple[str, Callable[[], None]]] = [
        ("convert", copy_raw),
        ("preprocess", lambda: preprocess(environment["nnUNet_def_n_proc"])),
        ("train", lambda: train(device)),
        ("predict", lambda: nnunet("predict", "-i", RAW / "imagesTs", "-o", PREDICTIONS, *select, "-device", device)),
        ("evaluate", lambda: evaluate(environment["nnUNet_def_n_proc"])),
        ("draw", draw),
    ]
    try:
        for number, (name, step) in enumerate(steps, start=1):
            title = f"[{number}/{len(steps)}] {name}"
            if is_done(name):
                print(f"\n=== {title}: done before", flush=True)
                continue
            for later, _ in steps[number:]:  # what was made from an older result of this step
                stamp(later).unlink(missing_ok=True)
            print(f"\n=== {title}", flush=True)
            start = time.perf_counter()
            step()
            mark_done(name, time.perf_counter() - start)
            print(f"=== {title}: {time.perf_counter() - start:.0f} s", flush=True)
    except subprocess.CalledProcessError as error:
        print(f"\n{title} failed (exit code {error.returncode}); the reason is above: {shlex.join(error.cmd)}")
        return 1
    report([name for name, _ in steps])
    return 0


def find_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def set_environment() -> dict[str, str]:
    """nnU-Net's variables for the demo, set for all of its commands; a number of processes that is set stays."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = {name: str(WORK / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    environment["nnUNet_def_n_proc"] = os.environ.get("nnUNet_def_n_proc", str(min(cpus, 8)))
    trainers = [*filter(None, [os.environ.get("nnUNet_extTrainer")]), str(DEMO / "trainers")]
    environment["nnUNet_extTrainer"] = os.pathsep.join(trainers)
    os.environ.update(environment, PYTHONUNBUFFERED="1")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        Path(environment[name]).mkdir(parents=True, exist_ok=True)
    return environment


def nnunet(command: str, *args: str | Path, **environment: str) -> None:
    """Runs ``nnUNetv2_<command>`` of this Python's environment and shows the line, so that it can be typed."""
    program = Path(sys.executable).with_name(f"nnUNetv2_{command}")
    line = [program.name, *map(str, args)]
    print("$", *(f"{name}={value}" for name, value in environment.items()), shlex.join(line), flush=True)
    subprocess.run([str(program), *line[1:]], check=True, env={**os.environ, **environment})


def copy_raw() -> None:
    """The set is in nnU-Net's raw layout already: images, labels and dataset.json become a dataset by their name."""
    shutil.rmtree(RAW, ignore_errors=True)
    shutil.copytree(DATA, RAW, ignore=shutil.ignore_patterns("README.md"))
    training, test = (len(list((RAW / folder).iterdir())) for folder in ("imagesTr", "imagesTs"))
    print(f"{training} training and {test} test cases in {RAW.relative_to(DEMO.parent)}")


def preprocess(processes: str) -> None:
    select = ["-d", str(DATASET_ID), "-c", CONFIGURATION]
    nnunet("plan_and_preprocess", *select, "-npfp", processes, "-np", processes, "--verify_dataset_integrity")


def train(device: str) -> None:
    go_on = ["--c"] if (MODEL / f"fold_{FOLD}" / "checkpoint_latest.pth").exists() else []
    # Training on the CPU takes all cores: its small batches are best prepared in the same process. For this command
    # alone, as nnU-Net cannot plan with 0 processes.
    environment = {} if device == "cuda" or "nnUNet_n_proc_DA" in os.environ else {"nnUNet_n_proc_DA": "0"}
    nnunet("train", str(DATASET_ID), CONFIGURATION, FOLD, "-tr", TRAINER, "-device", device, *go_on, **environment)


def evaluate(processes: str) -> None:
    description = ["-djfile", MODEL / "dataset.json", "-pfile", MODEL / "plans.json"]
    nnunet("evaluate_folder", RAW / "labelsTs", PREDICTIONS, *description, "-np", processes)


def draw() -> None:
    """Image, reference and prediction of every test case, at the sagittal slice that holds most of the reference."""
    import matplotlib
    import numpy as np
    import SimpleITK as sitk

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap

    labels, summary = read_results()
    colours = ListedColormap(["#00000000", "#e8a33d", "#3d8fe8"])  # background is transparent
    cases = summary["metric_per_case"]
    figure, axes = plt.subplots(len(cases) // 2, 6, figsize=(12, 1.9 * (len(cases) // 2) + 0.4), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for case, (image_axis, *label_axes) in zip(cases, axes.reshape(-1, 3)):
        reference_file, prediction_file = Path(case["reference_file"]), Path(case["prediction_file"])
        image_file = RAW / "imagesTs" / reference_file.name.replace(".nii.gz", "_0000.nii.gz")
        image, reference, prediction = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in (image_file, reference_file, prediction_file)
        )
        x = int(np.count_nonzero(reference, axis=(0, 1)).argmax())  # arrays are (z, y, x)
        for axis in (image_axis, *label_axes):
            axis.imshow(image[:, :, x], cmap="gray", origin="lower")
        for axis, segmentation in zip(label_axes, (reference, prediction)):
            axis.imshow(segmentation[:, :, x], cmap=colours, vmin=0, vmax=2, origin="lower", interpolation="nearest")
        dice = ", ".join(f"{case['metrics'][label]['Dice']:.2f}" for label in labels)
        for axis, title in zip(
            (image_axis, *label_axes), (reference_file.name[:-7], "reference", f"prediction, Dice {dice}")
        ):
            axis.set_title(title, fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours(int(label))) for label in labels]
    figure.legend(handles, labels.values(), loc="outside lower center", ncols=len(labels), frameon=False)
    temporary = PICTURE.with_suffix(".part.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, PICTURE)


def read_results() -> tuple[dict[str, str], dict]:
    """The foreground labels, ``{"1": "anterior", …}``, and nnU-Net's summary of the test cases."""
    labels = json.loads((RAW / "dataset.json").read_text("utf-8"))["labels"]
    summary = json.loads((PREDICTIONS / "summary.json").read_text("utf-8"))
    return {str(value): name for name, value in labels.items() if value}, summary


def report(steps: list[str]) -> None:
    labels, summary = read_results()
    seconds = {name: json.loads(stamp(name).read_text("utf-8"))["seconds"] for name in steps}
    print(f"\nDice on the {len(summary['metric_per_case'])} test cases, by nnU-Net's own evaluation:")
    for label, name in labels.items():
        print(f"  {name:12} {summary['mean'][label]['Dice']:.3f}")
    print(f"  {'mean':12} {summary['foreground_mean']['Dice']:.3f}")
    print(f"\n{sum(seconds.values()) / 60:.1f} minutes: {', '.join(f'{n} {s:.0f} s' for n, s in seconds.items())}")
    print(f"picture: {PICTURE.relative_to(DEMO.parent)}\nmodel:   {MODEL.relative_to(DEMO.parent)}")


def stamp(step: str) -> Path:
    return WORK / "done" / f"{step}.json"


def is_done(step: str) -> bool:
    return stamp(step).exists()


def mark_done(step: str, seconds: float) -> None:
    stamp(step).parent.mkdir(parents=True, exist_ok=True)
    temporary = stamp(step).with_suffix(".part")
    temporary.write_text(json.dumps({"seconds": round(seconds, 1)}) + "\n", encoding="utf-8")
    os.replace(temporary, stamp(step))


if __name__ == "__main__":
    sys.exit(main())
