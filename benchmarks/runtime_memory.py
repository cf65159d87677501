"""Memory of the runtime for a large CT: never more than three times the volume, beside what one row of windows needs.

    python benchmarks/runtime_memory.py [--shape 600 512 512] [--output benchmarks/results]

A synthetic CT is written, resampled, predicted by windows with a network of one convolution and brought back, in a
process whose highest resident memory is read at the end. The network is tiny on purpose: its own need is measured by
benchmarks/runtime.py, here it is the volume's that counts. Writes runtime_memory.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

import nnunet_lgms

SPACING, TARGET = (1.0, 0.75, 0.75), (1.25, 0.8, 0.8)  # mm
PATCH, CLASSES = (64, 160, 160), 3
MULTIPLE = 3  # of the volume in float32, what docs/how-to/deployment.md states


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


def write_model(path: Path) -> None:
    """One convolution over 27 voxels, three classes, and the JSON of a CT model."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from nnunet_lgms.runtime.description import Description, Resampling

    weight = np.zeros((CLASSES, 1, 3, 3, 3), np.float32)
    weight[1], weight[2] = 1 / 27, 3 / 27
    constants = [
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.array([0, 0, -1], np.float32), "bias"),
    ]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "weight", "bias"], ["logits"], pads=[1] * 6)],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, *PATCH])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES, *PATCH])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    description = Description(
        trainer="none",
        dataset="synthetic CT",
        plans="none",
        configuration="3d_fullres",
        folds=(),
        precision="fp32",
        reader="SimpleITKIO",
        file_ending=".nii.gz",
        channel_names=("CT",),
        transpose_forward=(0, 1, 2),
        transpose_backward=(0, 1, 2),
        spacing=TARGET,
        normalization_schemes=("CTNormalization",),
        use_mask_for_norm=(False,),
        intensity_properties=({"mean": 60.0, "std": 80.0, "percentile_00_5": -200.0, "percentile_99_5": 300.0},),
        resampling_data=Resampling("resample_data_or_seg_to_shape", order=3),
        resampling_probabilities=Resampling("resample_data_or_seg_to_shape", order=1),
        patch_size=PATCH,
        steps=(0, 0, 0),
        mirror_axes=(),
        labels={"background": 0, "body": 1, "organ": 2},
    )
    path.with_suffix(".json").write_text(description.to_json(), "utf-8")


def measure(folder: Path) -> dict:
    """Predict, and read the highest resident memory of this process; kibibytes on Linux."""
    from nnunet_lgms.runtime import Predictor

    predictor = Predictor(folder / "model.onnx")
    predictor.network(np.zeros((1, 1, *PATCH), np.float32))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    predictor.predict_file(folder / "ct.nii.gz", folder / "labels.nii.gz")
    return {
        "seconds": time.perf_counter() - begin,
        "before_mib": before / 1024,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of the runtime for a large CT.")
    parser.add_argument("--shape", type=int, nargs=3, default=(600, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--step", choices=["write", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "write":
        write_ct(args.folder / "ct.nii.gz", tuple(args.shape))
        write_model(args.folder / "model.onnx")
        return
    if args.step == "measure":
        print(json.dumps(measure(args.folder)))
        return

    from record import write

    from nnunet_lgms.splines import new_shape

    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--folder", folder, "--shape", *map(str, args.shape), "--step"]
        subprocess.run([*words, "write"], check=True)
        found = json.loads(subprocess.check_output([*words, "measure"], text=True).splitlines()[-1])
    resampled = new_shape(args.shape, SPACING, TARGET)
    volume = 4 * max(int(np.prod(args.shape)), int(np.prod(resampled))) / 2**20
    # logits and weights in float16
    row = 2 * (CLASSES + 1) * PATCH[0] * resampled[1] * resampled[2] / 2**20
    used = found["peak_mib"] - found["before_mib"]
    result = {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "version": nnunet_lgms.__version__,
        "shape": list(args.shape),
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
    write(args.output, "runtime_memory", result)
    print(json.dumps(result, indent=1))
    if result["multiple_of_volume"] > MULTIPLE:
        sys.exit(f"more than {MULTIPLE} times the volume")


if __name__ == "__main__":
    main()
