"""What a user waits for: prediction from file to file and training by the clock on the wall, with each stage's seconds.

    python benchmarks/waits.py                                  every row that this machine can measure
    python benchmarks/waits.py --rows hippocampus --device cpu  some of them
    python benchmarks/waits.py --rows ct --tools nnunet_lgms --keep     what is not measured again stays in the table

Each run is a command in a process of its own, timed from its start to its end, start of Python included: nnU-Net's own
``nnUNetv2_predict_from_modelfolder`` and ``nnUNetv2_train``, and this package's ``predict``. The runs of a row follow
each other on the same files. Stages overlap in time (several processes or threads), so their sum may exceed the clock.
Weights are random: they change no time. Memory is the most that the command and its children held together, as the
system counts it several times a second.

Trainings are some epochs of nnU-Net's 250 steps and 50 of validation; "100 epochs" is the start and the first epoch
as measured, and 99 times the median of the later ones. Writes waits.json, waits.md and waits.png (on the CPU
waits_cpu) after every run.

Stock nnU-Net's memory for 104 classes of a whole CT is more than most machines have. It is a line through two runs of
it, over the logits on the image's grid: 14 classes of that CT, and 104 classes of a small one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from commands import family, folders, measured_training, resident, start, stop
from matplotlib.figure import Figure
from record import ROOT, command_line, provenance, table, write
from training_sets import CONFIGURATION, TRAIN, prepare

HOOKS = Path(__file__).resolve().parent / "hooks"
STOCK = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as main; main()"
STAGES = ("start", "read", "preprocess", "network", "export", "write")
TORCH = {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False}


# ---- what is predicted -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Images, and the models that predict them."""

    title: str
    images: int
    shape: tuple[int, ...]  # of an image, voxels
    spacing: tuple[float, ...]  # of an image, mm
    target: tuple[float, ...]  # that the plans resample to, mm
    classes: int  # labels with the background
    runs: tuple[tuple[str, str, str], ...]  # network, tool and resampling of each
    devices: tuple[str, ...] = ("cuda",)  # on which the row is measured by default


STOCK_TOOL = "nnUNetv2_predict"
TOOLS = (STOCK_TOOL, "nnunet_lgms")
UNET, OURS = "nnU-Net's U-Net", "LGMSNet"
PAIR = ((UNET, STOCK_TOOL, "default"), (UNET, "nnunet_lgms", "default"), (OURS, "nnunet_lgms", "default"))
TORCH_PAIR = ((UNET, STOCK_TOOL, "torch"), (OURS, STOCK_TOOL, "torch"), (OURS, "nnunet_lgms", "torch"))
CT = {"images": 1, "shape": (300, 512, 512), "spacing": (1.25, 0.75, 0.75), "target": (1.5, 1.0, 1.0)}  # 250×384×384
SMALL_CT = {"images": 1, "shape": (64, 256, 256), "spacing": (2.0, 1.0, 1.0), "target": (2.0, 1.25, 1.25)}
CPU = ("cpu",)
ROWS = {
    "ct": Row("a CT, 300×512×512, 14 classes", **CT, classes=14, runs=(*PAIR, *TORCH_PAIR)),
    "cts": Row("five such CTs", **CT | {"images": 5}, classes=14, runs=PAIR[::2], devices=()),
    "classes": Row("the same CT, 104 classes", **CT, classes=104, runs=PAIR[2:], devices=()),
    "classes_small": Row("a CT, 64×256×256, 104 classes", **SMALL_CT, classes=104, runs=PAIR[::2], devices=()),
    "busi": Row("195 images, 256×256", 195, (256, 256), (1.0, 1.0), (1.0, 1.0), 2, PAIR),
    "small_ct": Row("a CT, 64×256×256, 3 classes", **SMALL_CT, classes=3, runs=PAIR, devices=CPU),
    "hippocampus": Row("the demo's hippocampus test cases", 6, (35, 50, 36), (1.0,) * 3, (1.0,) * 3, 3, PAIR, CPU),
}
TRAIN_TOOL = "nnUNetv2_train"
TRAINING_ROWS = {"training": "training, the demo's hippocampus cases", "training_128": "training, 2 × 128³"}
#: stages of a training, of which the picture shows two epochs
IN_THE_PICTURE = {"steps": "a later epoch's steps", "validation": "its validation", "between": "the rest of it"}
TRAININGS = {UNET: "nnUNetTrainer_measured", OURS: "nnUNetTrainerLGMSNet_measured"}


def write_images(row: Row, folder: Path) -> None:
    """Soft tissue with organs in air, or a picture with a disc: the labels are random, so only the size matters."""
    import nibabel
    from PIL import Image

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(row.images):
        axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in row.shape), indexing="ij", sparse=True)
        inside = sum(axis**2 for axis in axes[-2:]) < 0.7
        noise = random.integers(-20, 20, row.shape, dtype=np.int16)
        if len(row.shape) == 2:
            Image.fromarray((100 + 60 * inside + noise).astype(np.uint8)).save(folder / f"case_{i:03d}_0000.png")
            continue
        volume = (np.where(inside, 40, -1000) + noise).astype(np.int16)
        affine = np.diag([*row.spacing[::-1], 1.0])
        nibabel.save(nibabel.Nifti1Image(volume.T, affine), folder / f"case_{i:03d}_0000.nii.gz")


def write_model(row: Row, network: str, resampling: str, folder: Path) -> None:
    """A model folder as a training leaves it, with the plans of nnU-Net's planner and random weights."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    flat = len(row.shape) == 2
    planned = ROOT / "tests" / "planned_by_nnunet" / ("breast_ultrasound" if flat else "ct_isotropic")
    plans, dataset = (json.loads((planned / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    name, order = ("2d" if flat else "3d_fullres"), list(range(3))
    configuration = plans["configurations"][name]
    patch = [256, 256] if flat else [128] * 3 if max(row.shape) > 100 else [40, 56, 40]
    levels = configuration["architecture"]["arch_kwargs"]
    if max(patch) < 128:  # as nnU-Net plans for patches of this size
        for key in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_conv_per_stage_decoder"):
            levels[key] = levels[key][: 4 - key.endswith("decoder")]
        levels["n_stages"] = 4
    configuration |= {"patch_size": patch, "spacing": list(row.target)}
    if resampling == "torch":
        for what in ("data", "seg", "probabilities"):
            configuration[f"resampling_fn_{what}"] = "resample_torch_fornnunet"
            configuration[f"resampling_fn_{what}_kwargs"] = TORCH | {"is_seg": what == "seg"}
    reader = "NaturalImage2DIO" if flat else "NibabelIO"
    plans |= {"transpose_forward": order, "transpose_backward": order, "image_reader_writer": reader}
    labels = {"background": 0} | {f"label {i}": i for i in range(1, row.classes)}
    dataset |= {"labels": labels, "overwrite_image_reader_writer": reader}

    os.environ["nnUNet_extTrainer"] = str(ROOT / "trainers")
    cls = recursive_find_trainer_class_by_name("nnUNetTrainer" if network == UNET else "nnUNetTrainerLGMSNet")
    managers = PlansManager(plans), PlansManager(plans).get_configuration(name)
    channels = determine_num_input_channels(*managers, dataset)
    torch.manual_seed(0)
    weights = cls.build_network_architecture(*managers, channels, row.classes, enable_deep_supervision=False)
    (folder / "fold_0").mkdir(parents=True)
    for file, content in (("plans.json", plans), ("dataset.json", dataset)):
        (folder / file).write_text(json.dumps(content))
    checkpoint = {
        "network_weights": weights.state_dict(),
        "trainer_name": cls.__name__,
        "init_args": {"configuration": name, "fold": 0, "plans": plans, "dataset_json": dataset},
        "inference_allowed_mirroring_axes": tuple(range(len(patch))),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")


# ---- commands and their clock ----------------------------------------------------------------------------------------


def run(command: list[str], environment: dict[str, str], log: Path) -> dict:
    """Runs a command; seconds by the clock, and the most memory of it and its children, GiB.

    Raises:
        RuntimeError: it failed.
    """
    begin, peak = time.time(), 0
    log.unlink(missing_ok=True)
    process = start(command, log, environment)
    try:
        while process.poll() is None:
            peak = max(peak, sum(map(resident, family(process.pid))))
            time.sleep(0.1)
        seconds = time.time() - begin
    finally:
        stop(process)  # also where this is interrupted
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]} ended with {process.returncode}: {log.read_text()[-600:]}")
    return {"begin": begin, "seconds": seconds, "peak_gib": peak / 2**30}


def stock_stages(file: Path, begin: float) -> dict[str, float]:
    """Seconds of each stage, summed over processes, of what `hooks/sitecustomize.py` noted."""
    said = [json.loads(line) for line in file.read_text().splitlines()]
    found = {stage: sum(line["seconds"] for line in said if line["stage"] == stage) for stage in STAGES}
    found["export"] -= found["write"]
    found["start"] = next(line["begin"] for line in said if line["stage"] == "all") - begin
    return found


def predict(model: Path, images: Path, tool: str, device: str, folder: Path) -> dict:
    """One run of one tool."""
    out, times = folder / "out", folder / "times"
    shutil.rmtree(out, ignore_errors=True)
    times.unlink(missing_ok=True)
    options = ["-i", str(images), "-o", str(out), "-m", str(model), "-f", "0", "-device", device]
    environment = {"nnUNet_extTrainer": str(ROOT / "trainers"), "WAITS_STAGES": str(times)}
    path = (ROOT, os.environ.get("PYTHONPATH", ""))
    if tool == STOCK_TOOL:
        command = [sys.executable, "-c", STOCK, *options]
        environment["PYTHONPATH"] = folders(HOOKS, *path)
    else:
        command = [sys.executable, "-m", "nnunet_lgms", "predict", *options, "--json-times", str(times)]
        environment["PYTHONPATH"] = folders(*path)
    found = run(command, environment, folder / "log.txt")
    made = [path for path in out.iterdir() if path.name.startswith(("case_", "hippocampus_"))]
    if len(made) != len(list(images.iterdir())):
        raise RuntimeError(f"{tool} predicted {len(made)} cases: {(folder / 'log.txt').read_text()[-600:]}")
    if tool == STOCK_TOOL:
        return found | {"stages": stock_stages(times, found["begin"])}
    said = json.loads(times.read_text())["seconds"]
    return found | {"stages": {stage: said.get(stage, 0.0) for stage in STAGES}}


def measure_row(name: str, device: str, work: Path, tools: list[str], done: Callable[[dict], None]) -> None:
    """Each run of a row, by these tools; ``done`` is given what was found of it."""
    row = ROWS[name]
    images = work / name / "images"
    if name == "hippocampus":
        shutil.copytree(ROOT / "demo" / "data" / "hippocampus" / "imagesTs", images)
    else:
        write_images(row, images)
    for network, tool, resampling in row.runs:
        if tool not in tools:
            continue
        model = work / name / f"{'unet' if network == UNET else 'lgmsnet'}_{resampling}"
        if not model.is_dir():
            write_model(row, network, resampling, model)
        try:
            found = predict(model, images, tool, device, work / name)
        except RuntimeError as error:
            found = {"failed": str(error)}
        done({"row": name, "title": row.title, "network": network, "tool": tool, "plans": resampling, **found})


def measure_training(name: str, dataset: str, epochs: int, iterations: int, device: str, folder: Path, done) -> None:
    """A training of each network, from command to command, in its parts; nothing was compiled before."""
    environment = measured_training(epochs, iterations, MEASURED_LIKE_NNUNET=1)
    for network, trainer in TRAININGS.items():
        compiled = folder / f"{name}_{trainer}_compiled"
        environment |= {"TRITON_CACHE_DIR": f"{compiled}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{compiled}/inductor"}
        command = [*TRAIN, dataset, CONFIGURATION, "0", "-tr", trainer, "-device", device]
        about = {"row": name, "title": TRAINING_ROWS[name], "network": network, "tool": TRAIN_TOOL, "plans": "default"}
        try:
            found = run(command, environment, folder / f"{trainer}.txt")
        except RuntimeError as error:
            done(about | {"failed": str(error)})
            continue
        (file,) = (folder / "nnUNet_results").glob(f"Dataset{int(dataset):03d}_*/{trainer}__*/fold_0/measured.json")
        done(about | found | training_parts(json.loads(file.read_text()), found, epochs))


def training_parts(measured: dict, found: dict, epochs: int) -> dict:
    """Start, and of an epoch (median of the later ones) steps, validation and the rest; and 100 epochs of these."""
    begins, steps, validation = (np.array(measured[name]) for name in ("times", "seconds", "validating"))
    whole = np.diff(begins)  # of each epoch but the last, from begin to begin
    epoch = statistics.median(whole[1:])
    validating = statistics.median(validation[1:-1])
    between = statistics.median(whole[1:] - steps[1:-1] - validation[1:-1])
    before = begins[0] - found["begin"]
    end = found["begin"] + found["seconds"] - begins[-1] - steps[-1]
    later = {"steps": epoch - validating - between, "validation": validating, "between": between}
    return {
        "stages": {"start": before, "first epoch": whole[0], **later, "end": end},
        "epoch_s": epoch,
        "hundred_epochs_s": before + whole[0] + 99 * epoch,
        "epochs": epochs,
    }


# ---- tables and the picture ------------------------------------------------------------------------------------------


def markdown(results: dict) -> str:
    predictions = [run for run in results["runs"] if run["row"] not in TRAINING_ROWS]
    trainings = [run for run in results["runs"] if run["row"] in TRAINING_ROWS]
    columns = f"| network | tool | plans' resampling | s | × | GiB | {' | '.join(STAGES)}"
    lines = [
        "# What a user waits for",
        "",
        f"{results['date']}, {results['device']}, {results['cores']} cores, torch {results['versions']['torch']}, "
        f"nnunetv2 {results['versions']['nnunetv2']}. Seconds by the clock, from command to command; × against the "
        f"row's first run of {STOCK_TOOL}. Stages overlap, so they need not add up.",
        "",
        *table(columns, of_predictions(predictions)),
        *memory_of_104_classes(predictions),
    ]
    earlier = sorted({f"{run['title']}, {run['tool']}, {run['kept']}" for run in results["runs"] if "kept" in run})
    lines += ["", "Of an earlier run on such a machine: " + "; ".join(earlier) + "."] if earlier else []
    if trainings:
        lines += [
            "",
            "Training; an epoch is the median of those after the first, from its begin to the next one's; 100 epochs "
            "are start, first epoch and 99 of these.",
            "",
            *table(
                "| network | epochs run | start s | first epoch s | epoch s | validation | neither steps nor it "
                "| start and what the first epoch takes more | × | 100 epochs s | ×",
                of_trainings(trainings),
            ),
        ]
    return "\n".join(lines) + "\n"


def of_predictions(runs: list[dict]) -> Iterator[list[str]]:
    """Cells of the table."""
    first: dict[str, float] = {}
    for run in runs:
        cells = [run["title"], run["network"], run["tool"], run["plans"]]
        if "failed" in run:
            yield [*cells, f"failed: {run['failed'][:80]}"]
            continue
        if run["tool"] == STOCK_TOOL:
            first.setdefault(run["row"], run["seconds"])
        ratio = f"{run['seconds'] / first[run['row']]:.2f}" if run["row"] in first else "–"
        cells += [f"{run['seconds']:.1f}", ratio, f"{run['peak_gib']:.1f}"]
        yield [*cells, *(f"{run['stages'][stage]:.1f}" for stage in STAGES)]


def of_trainings(runs: list[dict]) -> Iterator[list[str]]:
    first: dict[str, dict] = {}
    for run in runs:
        cells = [run["title"], run["network"]]
        if "failed" in run:
            yield [*cells, f"failed: {run['failed'][:80]}"]
            continue
        peer, stages = first.setdefault(run["row"], run), run["stages"]
        cells += [str(run["epochs"]), f"{stages['start']:.1f}", f"{stages['first epoch']:.1f}", f"{run['epoch_s']:.2f}"]
        cells += [f"{stages['validation']:.2f}", f"{stages['between']:.2f}"]
        cells += [f"{until_it_runs(run):.1f}", f"{until_it_runs(run) / until_it_runs(peer):.2f}"]
        yield [*cells, f"{run['hundred_epochs_s']:.0f}", f"{run['hundred_epochs_s'] / peer['hundred_epochs_s']:.2f}"]


def until_it_runs(run: dict) -> float:
    """Seconds before the first epoch, and of it what a later one does not take."""
    return run["stages"]["start"] + run["stages"]["first epoch"] - run["epoch_s"]


def memory_of_104_classes(runs: list[dict]) -> list[str]:
    """What stock nnU-Net's memory would be for the CT with 104 classes, and this package's of it."""
    default = [run for run in runs if run["plans"] == "default" and "failed" not in run]
    peaks = {(run["row"], run["tool"]): run["peak_gib"] for run in default}
    known, wanted = [("ct", STOCK_TOOL), ("classes_small", STOCK_TOOL)], ("classes", "nnunet_lgms")
    if not {*known, wanted} <= peaks.keys():
        return []
    logits = {name: row.classes * math.prod(row.shape) / 1e9 for name, row in ROWS.items()}
    slope, base = np.polyfit([logits[row] for row, _ in known], [peaks[run] for run in known], 1)
    stock, ours = base + slope * logits["classes"], peaks[wanted]
    return [
        "",
        f"nnU-Net's memory for the CT with 104 classes would be {stock:.0f} GiB, by its runs with 14 classes and on "
        f"the small CT ({slope:.1f} GiB per 10⁹ logits); {ours:.1f} GiB are {ours / stock:.2f} of it.",
    ]


def draw(results: dict, file: Path) -> None:
    """Stacked bars: the seconds of each stage; of predictions, whose stages overlap, a line where the clock stopped."""
    rows = [found for found in results["runs"] if "failed" not in found]
    titles = list(dict.fromkeys(found["title"] for found in rows))
    heights = [1 + sum(found["title"] == title for found in rows) for title in titles]
    figure = Figure(figsize=(9, 0.42 * sum(heights) + 1.2), layout="constrained")
    axes = figure.subplots(len(titles), 1, squeeze=False, height_ratios=heights)
    explained = set()
    for title, axis in zip(titles, axes[:, 0]):
        those = [found for found in rows if found["title"] == title][::-1]
        training = those[0]["row"] in TRAINING_ROWS
        for y, found in enumerate(those):
            left = 0.0
            for i, (stage, seconds) in enumerate(found["stages"].items()):
                label = IN_THE_PICTURE.get(stage, stage) if y == 0 else None
                axis.barh(y, seconds, left=left, color=f"C{i}", label=label)
                left += seconds
            if not training:
                label = "by the clock" if y == 0 else None
                axis.plot([found["seconds"]] * 2, [y - 0.45, y + 0.45], "k-", linewidth=2, label=label)
        resampling = {"default": "", "torch": ", torch resampling"}
        names = [f"{r['network']},\n{r['tool']}{resampling[r['plans']]}" for r in those]
        axis.set_yticks(range(len(those)), names, fontsize=8)
        axis.set_title(f"{title}: seconds", fontsize=9, loc="left", pad=6 if training in explained else 20)
        axis.tick_params(axis="x", labelsize=8)
        if training not in explained:  # the stages of all predictions are the same, and those of all trainings
            place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "frameon": False}
            axis.legend(fontsize=8, ncols=7, handlelength=1.4, columnspacing=1.4, **place)
        explained.add(training)
    figure.savefig(file, dpi=120, format="png")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *TRAINING_ROWS], help="(those of the device)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS, help="of predictions (both)")
    parser.add_argument("--keep", action="store_true", help="runs of the file that is there and are not measured again")
    parser.add_argument("--epochs", type=int, default=5, help="of a training; 3 or more")
    parser.add_argument("--iterations", type=int, default=250, help="steps an epoch")
    args = parser.parse_args(arguments)
    if args.epochs < 3:
        parser.error("--epochs must be 3 or more: the first one compiles, and the last has no next one")
    name = "waits_cpu" if args.device == "cpu" else "waits"
    rows = args.rows or [n for n, row in ROWS.items() if args.device in row.devices]
    rows = rows if args.rows or args.device == "cpu" else [*rows, *TRAINING_ROWS]
    results = {**provenance(args.device), "cores": len(os.sched_getaffinity(0)), "runs": []}
    file = args.output / f"{name}.json"
    if args.keep and file.is_file():
        results["runs"] = kept(json.loads(file.read_text("utf-8")), results)

    def done(found: dict) -> None:
        results["runs"] = in_order([run for run in results["runs"] if which(run) != which(found)] + [found])
        said = found.get("failed") or f"{found['seconds']:.1f} s"
        print(f"{found['title']}, {found['network']}, {found['tool']}, {found['plans']}: {said}", flush=True)
        measured = any("failed" not in r for r in results["runs"])
        picture = (lambda file: draw(results, file)) if measured else None
        write(args.output, name, results, markdown(results), picture)

    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            if row in ROWS:
                measure_row(row, args.device, Path(folder) / "predict", args.tools, done)
                continue
            sets = prepare(Path(folder) / "train", 24 if args.device == "cpu" else 128)
            dataset = sets[list(TRAINING_ROWS).index(row)]
            measure_training(row, dataset, args.epochs, args.iterations, args.device, Path(folder) / "train", done)
    return int(any("failed" in found for found in results["runs"]))


def kept(before: dict, now: dict) -> list[dict]:
    """Runs of an earlier time, with their date.

    Raises:
        SystemExit: they are of another kind of machine or another nnU-Net, whose seconds are not to be compared.
    """
    for what in (lambda r: r["device"], lambda r: r["cores"], lambda r: r["versions"]["nnunetv2"]):
        if what(before) != what(now):
            raise SystemExit(f"--keep: the file that is there is of {what(before)}, this machine of {what(now)}.")
    return [{"kept": before["date"], "kept_code": before["code"], **run} for run in before["runs"]]


def which(run: dict) -> tuple[str, ...]:
    return run["row"], run["network"], run["tool"], run["plans"]


def in_order(runs: list[dict]) -> list[dict]:
    """As the table has them: rows, and in a row the runs that all are compared with first."""
    order = [(name, *run) for name, row in ROWS.items() for run in row.runs]
    order += [(name, network, TRAIN_TOOL, "default") for name in TRAINING_ROWS for network in TRAININGS]
    return sorted(runs, key=lambda run: order.index(which(run)))


if __name__ == "__main__":
    sys.exit(main())
