"""500 steps at the recipe's learning rate under float16 autocast, on real MRI and ultrasound: does a number overflow?

    python benchmarks/amp_soundness.py [--ultrasound FOLDER] [--steps 500] [--eager]

MRI is the hippocampus set of the demo (3D, patches of 64x64x64, batch 2); ultrasound is a folder of flat images with
``images/*.png`` and ``masks/*.png`` of the same names, such as BUSI resized to 256x256 (2D, batch 16; left out without
the option). Images become z-scores, as nnU-Net makes them, and every batch is rotated and flipped as in the recipe:
SGD at 0.02 with momentum 0.9 and weight decay 1e-4, 0.5 * cross-entropy + Dice, clipping at 12. On a GPU the step
is a CUDA graph and a gradient scaler works as in nnU-Net. Without a GPU the script rehearses in bfloat16, which needs
no scaler.

Writes benchmarks/results/amp_soundness.json and exits with 1 if a loss or a weight was not finite, or if the scale
fell below ``SCALE_FLOOR``: a network that needs so small a scale trains on gradients that have lost their small ends.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from provenance import provenance
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SCALE_FLOOR = 256  # GradScaler begins at 65536 and halves at every overflow
RATE, MOMENTUM, WEIGHT_DECAY, CLIP = 0.02, 0.9, 1e-4, 12
Pair = tuple[np.ndarray, np.ndarray]


def mri(folder: Path) -> list[Pair]:
    """(image, labels), (Z, Y, X), from nnU-Net's raw layout."""
    import SimpleITK as sitk

    pairs = []
    for path in sorted((folder / "labelsTr").glob("*.nii.gz")):
        image = folder / "imagesTr" / path.name.replace(".nii.gz", "_0000.nii.gz")
        pairs.append(tuple(sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in (image, path)))
    return pairs


def ultrasound(folder: Path) -> list[Pair]:
    """(image, labels), (Y, X), from images/ and masks/."""
    from PIL import Image

    pairs = []
    for path in sorted((folder / "images").glob("*.png")):
        image = np.asarray(Image.open(path).convert("L"))
        pairs.append((image, (np.asarray(Image.open(folder / "masks" / path.name).convert("L")) > 0).astype(np.uint8)))
    return pairs


def z_score(pairs: Sequence[Pair]) -> list[Pair]:
    """Images of mean 0 and standard deviation 1."""
    return [((image - image.mean()) / max(image.std(), 1e-8), labels) for image, labels in pairs]


def make_batches(pairs: Sequence[Pair], patch: Sequence[int], batch: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Random patches, (B, 1, *patch) each; what lies outside an image is 0, as in nnU-Net."""
    random = np.random.default_rng(0)
    axes = tuple(range(len(patch)))

    def crop(array: np.ndarray, start: np.ndarray) -> np.ndarray:
        short = [(0, max(0, p - n)) for n, p in zip(array.shape, patch, strict=True)]
        return np.pad(array, short)[tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))]

    def draw() -> tuple[torch.Tensor, ...]:
        images, targets = [], []
        for index in random.integers(len(pairs), size=batch):
            image, labels = pairs[index]
            start = [random.integers(max(1, n - p + 1)) for n, p in zip(image.shape, patch, strict=True)]
            turns, plane = random.integers(4), tuple(random.permutation(axes)[:2])
            flips = [axis for axis in axes if random.integers(2)]
            for array, out in ((image, images), (labels, targets)):
                out.append(np.flip(np.rot90(crop(array, np.array(start)), turns, plane), flips)[None].copy())
        return torch.from_numpy(np.stack(images)).float(), torch.from_numpy(np.stack(targets)).to(torch.int16)

    return draw


def train(pairs: Sequence[Pair], patch: Sequence[int], batch: int, classes: int, steps: int, eager: bool) -> dict:
    """All figures of one training."""
    from nnunet_lgms.graphs.network import GraphedLGMSNet
    from nnunet_lgms.nnunet.loss import cross_entropy_and_dice
    from nnunet_lgms.planning.memory import label_manager

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    torch.manual_seed(0)
    network = GraphedLGMSNet.paper(1, classes, dim=len(patch)).to(device).train()
    recorded = device.type == "cuda" and not eager
    if recorded:
        with torch.autocast("cuda", dtype):
            network.record_training(torch.zeros(batch, 1, *patch, device=device))
    loss_function = cross_entropy_and_dice(label_manager(classes), batch_dice=len(patch) == 2, ddp=False)
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    scaler = torch.amp.GradScaler("cuda", enabled=device.type == "cuda")
    draw = make_batches(z_score(pairs), patch, batch)

    losses, norms, scales, largest = [], [], [], 0.0
    for _ in tqdm(range(steps), desc=f"{len(patch)}D, {dtype}"):
        data, target = (tensor.to(device) for tensor in draw())
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype):
            output = network(data)
            loss = loss_function(output, target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP).item())
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        largest = max(largest, output.detach().abs().max().item())
    finite = [norm for norm in norms if np.isfinite(norm)]
    return {
        "cases": len(pairs),
        "input": [batch, 1, *patch],
        "classes": classes,
        "dtype": str(dtype).removeprefix("torch."),
        "cuda_graph": recorded,
        "steps": steps,
        "losses_not_finite": sum(not np.isfinite(loss) for loss in losses),
        "steps_skipped_by_the_scaler": len(norms) - len(finite),
        "weights_finite": all(bool(p.isfinite().all()) for p in network.parameters()),
        "smallest_scale": min(scales) if scaler.is_enabled() else None,
        "last_scale": scales[-1] if scaler.is_enabled() else None,
        "largest_gradient_norm": max(finite, default=None),
        "steps_clipped": sum(norm > CLIP for norm in finite),
        "largest_logit": largest,
        "losses": [round(loss, 5) if np.isfinite(loss) else None for loss in losses],
    }


def is_sound(result: dict) -> bool:
    """Nothing was lost, and the scaler stayed above its floor."""
    above = result["smallest_scale"] is None or result["smallest_scale"] >= SCALE_FLOOR
    return result["losses_not_finite"] == 0 and result["weights_finite"] and above


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mri", type=Path, default=ROOT / "demo/data/hippocampus", metavar="FOLDER")
    parser.add_argument("--ultrasound", type=Path, metavar="FOLDER", help="with images/ and masks/")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--patch", type=int, default=None, help="edge of all patches (3D: 64, 2D: 256)")
    parser.add_argument("--batch", type=int, default=None, help="batch of all (3D: 2, 2D: 16)")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks/results/amp_soundness.json")
    args = parser.parse_args()

    from nnunet_lgms.files import atomic_write

    trainings = {"mri": (mri(args.mri), (args.patch or 64,) * 3, args.batch or 2, 3)}
    if args.ultrasound:
        trainings["ultrasound"] = (ultrasound(args.ultrasound), (args.patch or 256,) * 2, args.batch or 16, 2)
    results = {}
    for name, (pairs, patch, batch, classes) in trainings.items():
        if not pairs:
            parser.error(f"there are no images for {name}")
        results[name] = train(pairs, patch, batch, classes, args.steps, args.eager)
    content = {**provenance(), "scale_floor": SCALE_FLOOR, "rate": RATE, "trainings": results}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    for name, result in results.items():
        print(name, "sound:" if is_sound(result) else "NOT SOUND:", {k: v for k, v in result.items() if k != "losses"})
    return int(not all(map(is_sound, results.values())))


if __name__ == "__main__":
    sys.exit(main())
