"""What prediction without PyTorch costs: installation, import, latency and memory on two CPU cores.

    python benchmarks/runtime.py [--threads 2] [--rounds 9] [--models FOLDER] [--output benchmarks/results]
    python benchmarks/runtime.py --ct 600 512 512     a large CT: never more than three times the volume

The published LGMSNet and nnU-Net's PlainConvUNet, with the stages that nnU-Net plans for the size, are exported in the
same way and run by ONNX Runtime in turns, with a pause between them, as idle threads of ONNX Runtime keep a core busy
for a while; a ratio is the median of the rounds' ratios. LGMSNet in 8 bits is calibrated on noise: the time is the same
as for images. Peak memory is what a process of its own gains while it loads the model and runs it once. Sizes are those
of the installed files of all that a package requires, in this environment. Exported models are kept in --models and
reused. Writes runtime.json and runtime.md.

With --ct a synthetic CT is resampled, predicted by windows with a network of one convolution and brought back, in a
process whose highest resident memory is read at the end; beside what one row of windows needs, it is the volume's that
counts. Writes runtime_memory.json; exit code 1 if it was more than stated. Linux.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from record import RESULTS, ROOT, processor, provenance, write
from tqdm import tqdm

import nnunet_lgms
from nnunet_lgms.files import atomic_write

ROWS = {
    "2D 256²": {"patch": (256, 256), "channels": 1, "classes": 2, "n_stages": 7},
    "3D 96³": {"patch": (96, 96, 96), "channels": 1, "classes": 14, "n_stages": 6},
}
NETWORKS = {"lgmsnet": "LGMSNet", "plain": "PlainConvUNet"}
MODELS = NETWORKS | {"lgmsnet_int8": "LGMSNet int8"}
PAUSE = 0.1  # seconds
IMPORTS = {
    "runtime": "import nnunet_lgms.runtime",
    "nnunetv2": "from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor",
}
INSTALLATIONS = {"runtime": ["numpy", "SimpleITK", "onnxruntime"], "nnunetv2": ["nnunetv2", "torch"]}
SPACING, TARGET = (1.0, 0.75, 0.75), (1.25, 0.8, 0.8)  # of the CT, mm
PATCH, CLASSES = (64, 160, 160), 2
MULTIPLE = 3  # of the volume in float32, what docs/how-to/deployment.md states

# VmHWM, as ru_maxrss of a new process starts from its parent's
PEAK = """
import json, re, sys, time
import numpy, onnxruntime
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
"""
ONE_WINDOW = """
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
options.log_severity_level = 3
before, begin = peak(), time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {"image": numpy.zeros([int(n) for n in sys.argv[3].split(",")], numpy.float32)})
"""
WHOLE_CT = """
from nnunet_lgms.runtime import Predictor
predictor = Predictor(sys.argv[1])
predictor.network(numpy.zeros([int(n) for n in sys.argv[4].split(",")], numpy.float32))
before, begin = peak(), time.perf_counter()
predictor.predict_file(sys.argv[2], sys.argv[3])
"""
TOLD = """
print(json.dumps({"seconds": time.perf_counter() - begin, "before_mib": before, "peak_mib": peak()}))
"""


def exported(folder: Path, network: str, row: dict) -> Path:
    """The network as an ONNX file for this patch, written once."""
    path = folder / f"{network}_{'x'.join(map(str, row['patch']))}.onnx"
    if not path.exists() and network.endswith("_int8"):
        from nnunet_lgms.export.precision import quantise

        with atomic_write(path) as temporary:
            quantise(exported(folder, network.removesuffix("_int8"), row), temporary, iter([noise(row)]))
    elif not path.exists():
        import onnx
        import torch
        from compared import build

        from nnunet_lgms.export.onnx_file import to_onnx

        torch.manual_seed(0)
        dim = len(row["patch"])
        module = build(network, dim, row["channels"], row["classes"], row["n_stages"])
        with atomic_write(path) as temporary:
            onnx.save(to_onnx(module, row["channels"], row["patch"], (0,) * dim).model, temporary)
    return path


def noise(row: dict) -> np.ndarray:
    """One window, (1, C, *patch)."""
    return np.random.default_rng(0).normal(size=(1, row["channels"], *row["patch"])).astype(np.float32)


def latency(files: dict[str, Path], row: dict, threads: int, rounds: int) -> dict:
    """Seconds of one window, the models in turns."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    sessions = {
        name: onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for name, file in files.items()
    }
    image = noise(row)
    times = {name: [] for name in sessions}
    for turn in range(rounds + 1):
        for name, session in sessions.items():
            time.sleep(PAUSE)
            begin = time.perf_counter()
            session.run(None, {"image": image})
            if turn:  # the first is for warming up
                times[name].append(time.perf_counter() - begin)
    ratios = {name: [a / b for a, b in zip(times[name], times["plain"], strict=True)] for name in times}
    return {
        "seconds": times,
        "median": {name: statistics.median(t) for name, t in times.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_range": {name: [min(values), max(values)] for name, values in ratios.items()},
    }


def memory(code: str, *words: object) -> dict[str, float]:
    """Seconds, and MiB before and at the peak, of a process of its own."""
    command = [sys.executable, "-c", PEAK + code + TOLD, *map(str, words)]
    return json.loads(subprocess.check_output(command, text=True, cwd=ROOT).splitlines()[-1])


def peak_memory(file: Path, row: dict, threads: int) -> float:
    """MiB that loading the model and running it once adds to a process."""
    found = memory(ONE_WINDOW, file, threads, ",".join(map(str, (1, row["channels"], *row["patch"]))))
    return found["peak_mib"] - found["before_mib"]


def import_time(statement: str, rounds: int) -> float:
    """Median seconds of a new process that imports, less that of one that does not."""

    def run(code: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - begin

    run(statement)
    return statistics.median(run(statement) - run("pass") for _ in range(rounds))


def installed_size(names: list[str]) -> tuple[float, list[str]]:
    """MiB of the files of these distributions and all that they require, and their names."""
    todo, sizes = list(names), {}
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in sizes:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another system or Python
            continue
        files = (Path(distribution.locate_file(file)) for file in distribution.files or [])
        sizes[name] = sum(file.stat().st_size for file in files if file.is_file())
        for requirement in distribution.requires or []:
            if "extra ==" not in requirement:
                todo.append(re.match(r"[\w.-]+", requirement)[0])
    return sum(sizes.values()) / 2**20, sorted(sizes)


def write_ct(path: Path, shape: tuple[int, ...]) -> None:
    """A body of soft tissue with a denser organ, in air, slice by slice."""
    import SimpleITK as sitk

    z, y, x = shape
    rng = np.random.default_rng(0)
    volume = np.empty(shape, np.int16)
    rows, columns = np.mgrid[:y, :x]
    body = ((rows - y / 2) / (0.4 * y)) ** 2 + ((columns - x / 2) / (0.45 * x)) ** 2 < 1
    organ = ((rows - y / 2) / (0.1 * y)) ** 2 + ((columns - x / 3) / (0.1 * x)) ** 2 < 1
    for index in range(z):
        volume[index] = np.where(organ, 200, np.where(body, 40, -1000)) + rng.integers(-20, 20, (y, x))
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(path))


def measure_ct(shape: tuple[int, ...]) -> dict:
    """Memory of one CT beside its volume."""
    sys.path.insert(0, str(ROOT / "tests"))
    from onnx_stub import threshold_model

    from nnunet_lgms.runtime.description import Resampling
    from nnunet_lgms.splines import new_shape

    percentiles = {"percentile_00_5": -200.0, "percentile_99_5": 300.0}
    with tempfile.TemporaryDirectory() as folder:
        model, image, labels = (Path(folder, name) for name in ("model.onnx", "ct.nii.gz", "labels.nii.gz"))
        write_ct(image, shape)
        threshold_model(
            model,
            PATCH,
            channel_names=("CT",),
            spacing=TARGET,
            normalization_schemes=("CTNormalization",),
            intensity_properties=({"mean": 60.0, "std": 80.0, **percentiles},),
            resampling_data=Resampling("resample_data_or_seg_to_shape", order=3),
        )
        found = memory(WHOLE_CT, model, image, labels, ",".join(map(str, (1, 1, *PATCH))))
    resampled = new_shape(shape, SPACING, TARGET)
    volume = 4 * max(int(np.prod(shape)), int(np.prod(resampled))) / 2**20
    row = 2 * (CLASSES + 1) * PATCH[0] * resampled[1] * resampled[2] / 2**20  # logits and weights in float16
    used = found["peak_mib"] - found["before_mib"]
    return {
        "shape": list(shape),
        "resampled": list(resampled),
        "patch": list(PATCH),
        "classes": CLASSES,
        "volume_float32_mib": volume,
        "row_of_windows_mib": row,
        **found,
        "used_mib": used,
        "multiple_of_volume": (used - row) / volume,
        "stated_multiple": MULTIPLE,
    }


def markdown(result: dict) -> str:
    lines = [
        "# Prediction without PyTorch on the CPU",
        "",
        f"{result['date']}, {result['threads']} threads of {result['cpu']}, ONNX Runtime {result['onnxruntime']}, "
        f"nnunet-lgms {result['version']}, float32 but for int8. One window; median of {result['rounds']} rounds in "
        "turns; ratio to PlainConvUNet with its range in brackets.",
        "",
        "| | | ms | ratio | file MiB | peak memory MiB |",
        "|---|---|---|---|---|---|",
    ]
    for title, row in result["rows"].items():
        for name, network in MODELS.items():
            low, high = row["ratio_range"][name]
            ratio = "" if name == "plain" else f"{row['ratio'][name]:.2f} ({low:.2f} to {high:.2f})"
            lines.append(
                f"| {title} | {network} | {row['median'][name] * 1e3:.0f} | {ratio} | {row['file_mib'][name]:.0f} | "
                f"{row['peak_mib'][name]:.0f} |"
            )
    lines += [
        "",
        "| | runtime | nnU-Net with PyTorch |",
        "|---|---|---|",
        "| installed MiB | {runtime:.0f} | {nnunetv2:.0f} |".format(**result["installed_mib"]),
        "| import s | {runtime:.2f} | {nnunetv2:.2f} |".format(**result["import_seconds"]),
        "",
        f"Installed: {', '.join(result['packages']['runtime'])}; against {len(result['packages']['nnunetv2'])} "
        f"packages with torch {result['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir(), "nnunet_lgms_benchmark"))
    parser.add_argument("--ct", type=int, nargs=3, metavar=("Z", "Y", "X"), help="memory of such a CT, nothing else")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    about = {**provenance("cpu"), "cpu": processor(), "version": nnunet_lgms.__version__}
    if args.ct:
        result = about | measure_ct(tuple(args.ct))
        write(args.output, "runtime_memory", result)
        print(json.dumps(result, indent=1))
        return int(result["multiple_of_volume"] > MULTIPLE)
    args.models.mkdir(parents=True, exist_ok=True)
    files = {
        title: {name: exported(args.models, name, row) for name in MODELS}
        for title, row in tqdm(ROWS.items(), desc="exporting")
    }
    rows = {}
    for title, row in tqdm(ROWS.items(), desc="measuring"):
        rows[title] = latency(files[title], row, args.threads, args.rounds) | {
            "file_mib": {name: file.stat().st_size / 2**20 for name, file in files[title].items()},
            "peak_mib": {name: peak_memory(file, row, args.threads) for name, file in files[title].items()},
        }
    sizes = {name: installed_size(packages) for name, packages in INSTALLATIONS.items()}
    result = about | {
        "threads": args.threads,
        "rounds": args.rounds,
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "rows": rows,
        "installed_mib": {name: size for name, (size, _) in sizes.items()},
        "packages": {name: packages for name, (_, packages) in sizes.items()},
        "import_seconds": {name: import_time(code, 5) for name, code in IMPORTS.items()},
    }
    write(args.output, "runtime", result, markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
