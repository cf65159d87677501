"""The figure of the report, and the worst cases of what may be shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunet_lgms.files import atomic_write, read_json

from .report import Results, interval, per_case
from .runs import HIPPOCAMPUS, STAGES, STU

SHOWN_WORST = 6
REFERENCE_COLOUR, PREDICTION_COLOUR = "#00a6d6", "#e4572e"


def draw(folder: Path) -> bool:
    """``evidence.png``: IoU on BUSI and STU with intervals and the authors' range, and training losses.

    Returns:
        whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = Results(folder)
    schedules = results.schedules("busi")
    if not schedules:
        return False
    models = {n: m for n, m in STAGES["busi"].models.items() if results.of("busi", n, schedules[0])}
    figure, axes = plt.subplots(1, 3, figsize=(13, max(3.0, 1.6 + 0.45 * len(models))), layout="constrained")
    for axis, (scores, data, title) in zip(axes, (("validation", "busi", "BUSI"), (STU, "stu", "STU, zero-shot"))):
        means = [interval(results.of("busi", name, schedules[0]), scores, "IoU") for name in models]
        values = np.array(means).T
        errors = np.abs(values[1:] - values[0])
        axis.errorbar(values[0], range(len(models)), xerr=errors, fmt="o", capsize=3)
        low, high = results.references["authors"][data]["IoU"]
        axis.axvspan(low - 5e-4, high + 5e-4, color="C1", alpha=0.4, label="the authors' network")
        axis.set_yticks(range(len(models)), [m.title for m in models.values()] if data == "busi" else [])
        axis.invert_yaxis()
        axis.set_title(f"{title}: IoU, 95 % interval", fontsize=10)
        axis.legend(fontsize=7)
    for name, model in models.items():
        axes[2].plot(results.of("busi", name, schedules[0])[0]["train_losses"], label=model.title, lw=1)
    axes[2].set(xlabel="epoch")
    axes[2].set_title("training loss, each trainer's own", fontsize=10)
    axes[2].legend(fontsize=6)
    with atomic_write(folder / "evidence.png") as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)
    return True


def draw_worst_cases(unpacked: Path, raw: Path, folder: Path) -> bool:
    """``evidence_worst_cases.png``: LGMSNet's worst hippocampus cases. Ultrasound images may not be passed on.

    Args:
        unpacked: a bundle as `evidence.py scores` unpacked it.
        raw: ``nnUNet_raw``, for the images.
        folder: ``benchmarks/results``.

    Returns:
        whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    results = Results(folder)
    runs = [r for epochs in results.schedules("hippocampus") for r in results.of("hippocampus", "lgmsnet", epochs)]
    run = runs[0] if runs else None
    from .runs import Run

    file = unpacked / "runs" / Run(**run["run"]).name / "validation.npz" if run else None
    dataset = raw / HIPPOCAMPUS
    if file is None or not file.is_file() or not dataset.is_dir():
        return False
    ending = read_json(dataset / "dataset.json")["file_ending"]
    dice = per_case([run], "validation", "Dice")
    worst = sorted(dice, key=dice.get)[:SHOWN_WORST]
    figure, axes = plt.subplots(1, len(worst), figsize=(2.4 * len(worst), 2.8), layout="constrained", squeeze=False)
    with np.load(file) as predictions:
        for axis, case in zip(axes[0], worst):
            image = SimpleITKIO().read_images([str(dataset / "imagesTr" / f"{case}_0000{ending}")])[0][0]
            reference = SimpleITKIO().read_seg(str(dataset / "labelsTr" / f"{case}{ending}"))[0][0]
            prediction = predictions[case]
            z = int((prediction != reference).sum((1, 2)).argmax())
            axis.imshow(image[z], cmap="gray")
            for labels, colour in ((reference[z], REFERENCE_COLOUR), (prediction[z], PREDICTION_COLOUR)):
                for label in np.unique(labels[labels > 0]):
                    axis.contour(labels == label, levels=[0.5], colors=[colour], linewidths=1)
            axis.set_title(f"{case}\nDice {dice[case]:.3f}", fontsize=8)
            axis.set_axis_off()
    figure.suptitle("reference blue, prediction red; images: Medical Segmentation Decathlon, CC-BY-SA 4.0", fontsize=8)
    with atomic_write(folder / "evidence_worst_cases.png") as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)
    return True
