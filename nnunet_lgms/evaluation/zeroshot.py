"""How much a model loses on datasets that it was not trained on (the paper's zero-shot tests)."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from nnunet_lgms.dataset_json import channel_names, read_dataset_json
from nnunet_lgms.evaluation.evaluate import FOREGROUND, Evaluation, check_references, evaluate
from nnunet_lgms.evaluation.kept import discard_outdated, made_by
from nnunet_lgms.evaluation.label_mapping import LabelMapping, map_labels
from nnunet_lgms.evaluation.labels import LabelSet
from nnunet_lgms.evaluation.metrics import CONVENTION, METRICS
from nnunet_lgms.evaluation.output import write_all
from nnunet_lgms.evaluation.page import interval, number, render, signed
from nnunet_lgms.evaluation.requirement import require_evaluation_extra
from nnunet_lgms.evaluation.statistics import Mean, bootstrap_mean, mean_of_defined
from nnunet_lgms.files import atomic_write
from nnunet_lgms.inference import load_predictor, read_model_plans, trained_folds
from nnunet_lgms.locks import locked
from nnunet_lgms.nnunet_files import Reader, cases_in, image_files


@dataclass(frozen=True)
class Row:
    """One line of the table: one unseen dataset and label, or the foreground mean.

    Args:
        dataset: name of the unseen dataset.
        label: name of the label.
        metric: name of the metric.
        in_domain: on the validation cases of the model's own dataset; mean NaN if these are not there.
        zero_shot: on all cases of the unseen dataset.
        drop: in_domain - zero_shot.
    """

    dataset: str
    label: str
    metric: str
    in_domain: Mean
    zero_shot: Mean
    drop: float


@dataclass(frozen=True)
class ZeroShot:
    """The table and the sentences that belong to it."""

    model_folder: Path
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]


def zero_shot(
    model_folder: Path,
    datasets: Sequence[Path],
    output: Path,
    *,
    folds: Sequence[str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    mapping: Mapping[str, Mapping] | None = None,
    tolerance: float = 1.0,
    n_resamples: int = 2000,
    device: str | None = None,
    workers: int | None = None,
    wait: bool = False,
) -> ZeroShot:
    """Predict unseen datasets, evaluate, and compare with the model's own validation cases.

    Every fold's model predicts every unseen case alone, without averaging models: what is compared is what one model
    does at home and abroad. A case's metrics are averaged over folds. Predictions that are there from an earlier call
    are kept if weights, plans and images are still the same (`made_from.json`), so an interrupted run goes on.

    Args:
        model_folder: what nnU-Net trained.
        datasets: raw datasets; all their training cases are used.
        output: folder for predictions (DATASET/fold_K), reports (DATASET/report.html, in_domain/fold_K/report.html)
            and the table (zeroshot.csv, zeroshot.json).
        folds: which models; default: all that are trained.
        checkpoint: name of the weights.
        mapping: content of a mapping file, for labels with different names.
        tolerance: of NSD, in mm (pixels for flat images).
        n_resamples: bootstrap samples of each interval.
        device: where to predict; default: the GPU if there is one.
        workers: threads that read, that write and that evaluate; default: 3, 3, and one per core, at most 8.
        wait: let another run that writes to `output` end first, instead of refusing.

    Raises:
        ValueError: see `load_predictor`, `map_labels` and `evaluate`; or a dataset has other channels or files, or
            another run writes to `output`.
    """
    require_evaluation_extra()
    folds = trained_folds(model_folder, checkpoint) if folds is None else list(folds)
    if not folds:
        raise ValueError(f"No fold of {model_folder} is named: leave folds out for all that are trained.")
    model = read_dataset_json(model_folder)
    prepared = [_prepare(model_folder, model, dataset, mapping) for dataset in datasets]
    options = {"tolerance": tolerance, "n_resamples": n_resamples, "workers": workers}
    with locked(output / ".zeroshot.lock", f"zeroshot into {output}", wait=wait):
        return _zero_shot(model_folder, model, prepared, output, folds, checkpoint, options, device)


def _zero_shot(
    model_folder: Path,
    model: Mapping,
    prepared: Sequence[tuple[Path, LabelMapping]],
    output: Path,
    folds: Sequence[str],
    checkpoint: str,
    options: Mapping,
    device: str | None,
) -> ZeroShot:
    for dataset, label_mapping in prepared:  # what is wrong with them is said before hours of prediction
        images = image_files(dataset / "imagesTr", model["file_ending"])
        labels = cases_in(dataset / "labelsTr", model["file_ending"])
        references = {case: labels[case] for case in images}
        check_references(
            references, label_mapping.target, Reader.of_dataset(read_dataset_json(dataset)), options["workers"]
        )
    for fold in folds:
        predictor = load_predictor(model_folder, folds=[fold], checkpoint=checkpoint, device=device)
        for dataset, _ in prepared:
            target = output / dataset.name / f"fold_{fold}"
            target.mkdir(parents=True, exist_ok=True)
            files = image_files(dataset / "imagesTr", model["file_ending"])
            maker = made_by(model_folder, fold, checkpoint)
            missing = discard_outdated(target, maker, files, Reader.of_dataset(model))
            print(f"Predicting {dataset.name} with fold {fold}: {len(missing)} of {len(files)} cases")
            if missing:
                _predict(predictor, files, target, options["workers"])

    rows, remarks, at_home = [], [], {}
    for dataset, label_mapping in prepared:
        abroad = _evaluate_unseen(dataset, label_mapping, folds, output / dataset.name, options)
        key = json.dumps(label_mapping.source.regions)
        if key not in at_home:
            at_home[key], said = _evaluate_at_home(
                model_folder, model, label_mapping.source, folds, checkpoint, output, options
            )
            remarks += [sentence for sentence in said if sentence not in remarks]
        rows += _rows(dataset.name, at_home[key], abroad, options["n_resamples"])
    result = ZeroShot(model_folder, tuple(rows), tuple(remarks))
    _write(result, output)
    return result


def _prepare(
    model_folder: Path, model: Mapping, dataset: Path, mapping: Mapping[str, Mapping] | None
) -> tuple[Path, LabelMapping]:
    """Everything about an unseen dataset that can be wrong, before hours of prediction."""
    content = read_dataset_json(dataset)
    if dataset.name == read_model_plans(model_folder)["dataset_name"]:
        raise ValueError(f"{dataset.name} is what the model was trained on: give datasets that it has not seen.")
    if content["file_ending"] != model["file_ending"]:
        raise ValueError(
            f"{dataset.name} has {content['file_ending']} files, the model in {model_folder} reads "
            f"{model['file_ending']} files."
        )
    theirs, ours = channel_names(content), channel_names(model)
    if len(theirs) != len(ours):
        raise ValueError(
            f"{dataset.name} has {len(theirs)} channel(s), the model in {model_folder} expects {len(ours)}."
        )
    if [name.casefold() for name in theirs] != [name.casefold() for name in ours]:
        raise ValueError(
            f"{dataset.name} has the channel(s) {', '.join(theirs)}, the model in {model_folder} expects "
            f"{', '.join(ours)}: if they are the same, give them the same names in {dataset / 'dataset.json'}."
        )
    for folder in ("imagesTr", "labelsTr"):
        if not (dataset / folder).is_dir():
            raise ValueError(f"{dataset} has no folder {folder}.")
    images = image_files(dataset / "imagesTr", content["file_ending"])
    labels = cases_in(dataset / "labelsTr", content["file_ending"])
    if not images or (without := sorted(images.keys() - labels.keys())):
        missing = f"no label for {len(without)} image(s), such as {without[0]}" if images else "no images"
        raise ValueError(f"{dataset} has {missing}: complete it, as nnU-Net trains on it.")
    return dataset, map_labels(model, content, dataset.name, mapping)


def _predict(predictor, cases: Mapping[str, Sequence[Path]], target: Path, workers: int | None) -> None:
    """Those of the cases that are not there."""
    images = [[str(path) for path in files] for files in cases.values()]
    outputs = [str(target / case) for case in cases]  # to which nnU-Net adds the ending
    if workers == 1:
        predictor.predict_from_files_sequential(images, outputs, overwrite=False)
        return
    processes = (
        {}
        if workers is None
        else {
            "num_processes_preprocessing": workers,
            "num_processes_segmentation_export": workers,
        }
    )
    predictor.predict_from_files(images, outputs, overwrite=False, **processes)


def _evaluate_unseen(
    dataset: Path, mapping: LabelMapping, folds: Sequence[str], output: Path, options: Mapping
) -> Evaluation:
    evaluation = evaluate(
        {f"fold {fold}": output / f"fold_{fold}" for fold in folds},
        dataset / "labelsTr",
        mapping.target,
        Reader.of_dataset(read_dataset_json(dataset)),
        mapping=mapping.values,
        **options,
    )
    write_all(evaluation, output, images=dataset / "imagesTr")
    return evaluation


def _evaluate_at_home(
    model_folder: Path,
    model: Mapping,
    labels: LabelSet,
    folds: Sequence[str],
    checkpoint: str,
    output: Path,
    options: Mapping,
) -> tuple[list[Evaluation], list[str]]:
    """The validation cases that nnU-Net predicted with the final weights, at the end of each fold's training."""
    if checkpoint != "checkpoint_final.pth":
        return [], [f"nnU-Net's validation cases are not those of {checkpoint}: no in-domain results."]
    name = read_model_plans(model_folder)["dataset_name"]
    candidates = [
        Path(root) / name / folder
        for variable, folder in (("nnUNet_raw", "labelsTr"), ("nnUNet_preprocessed", "gt_segmentations"))
        if (root := os.environ.get(variable))
    ]
    references = next((folder for folder in candidates if folder.is_dir()), None)
    if references is None:
        return [], [f"The labels of {name} are neither in nnUNet_raw nor in nnUNet_preprocessed: no in-domain results."]
    evaluations, remarks = [], []
    reader = Reader.of_dataset(model)
    for fold in folds:
        folder = model_folder / f"fold_{fold}" / "validation"
        if not any(folder.glob(f"*{reader.file_ending}")):
            remarks.append(f"Fold {fold} has no predicted validation cases ({folder}): not in the in-domain results.")
            continue
        if (folder / "summary.json").is_file() and _is_older(folder / "summary.json", folder.parent / checkpoint):
            remarks.append(f"The validation cases of fold {fold} are older than its weights: was it trained anew?")
        evaluation = evaluate({f"fold {fold}": folder}, references, labels, reader, **options)
        write_all(evaluation, output / "in_domain" / f"fold_{fold}", images=references.parent / "imagesTr")
        evaluations.append(evaluation)
    return evaluations, remarks


def _is_older(file: Path, other: Path) -> bool:
    return file.stat().st_mtime < other.stat().st_mtime


def _rows(dataset: str, at_home: Sequence[Evaluation], abroad: Evaluation, n_resamples: int) -> list[Row]:
    labels = list(abroad.labels.regions)
    # (cases, labels, metrics): cases of all folds at home, the folds' mean in every case abroad
    home = np.concatenate([v for e in at_home for v in e.values.values()]) if at_home else np.empty((0, len(labels), 6))
    away = mean_of_defined(np.stack(list(abroad.values.values())), axis=0)  # over folds
    rows = []
    for label in labels if len(labels) == 1 else [*labels, FOREGROUND]:
        for m, metric in enumerate(METRICS):
            columns = slice(None) if label == FOREGROUND else labels.index(label)
            in_domain = bootstrap_mean(home[:, columns, m], n_resamples)
            zero = bootstrap_mean(away[:, columns, m], n_resamples)
            rows.append(Row(dataset, label, metric, in_domain, zero, in_domain.mean - zero.mean))
    return rows


def table(result: ZeroShot) -> str:
    """The table for the terminal."""
    lines = [["dataset", "label", "metric", "in-domain", "zero-shot", "drop", "cases"]]
    for row in result.rows:
        cells = [_cell(row.in_domain), _cell(row.zero_shot), "–" if np.isnan(row.drop) else f"{row.drop:+.4f}"]
        lines.append([row.dataset, row.label, row.metric, *cells, str(row.zero_shot.n)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def _cell(mean: Mean) -> str:
    if np.isnan(mean.mean):
        return "–"
    interval = "" if np.isnan(mean.low) else f" [{mean.low:.4f}, {mean.high:.4f}]"
    return f"{mean.mean:.4f}{interval}"


def _write(result: ZeroShot, output: Path) -> None:
    with atomic_write(output / "zeroshot.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        parts = ("mean", "low", "high", "n")
        header = [f"{where}_{part}" for where in ("in_domain", "zero_shot") for part in parts]
        writer.writerow(["dataset", "label", "metric", *header, "drop"])
        for row in result.rows:
            cells = [getattr(mean, part) for mean in (row.in_domain, row.zero_shot) for part in parts]
            writer.writerow([row.dataset, row.label, row.metric, *map(_empty_if_nan, [*cells, row.drop])])
    content = {
        "model": str(result.model_folder),
        "convention": CONVENTION,
        "remarks": list(result.remarks),
        "rows": [asdict(row) for row in result.rows],
    }
    with atomic_write(output / "report.html") as temporary:
        temporary.write_text(report_html(result, output), encoding="utf-8")
    with atomic_write(output / "zeroshot.json") as temporary:
        # JSON knows no NaN
        temporary.write_text(json.dumps(json.loads(json.dumps(content), parse_constant=lambda name: None), indent=2))


def report_html(result: ZeroShot, output: Path) -> str:
    """The table as a page that leads to the reports of each data set."""
    datasets: dict[str, list[dict]] = {}
    for row in result.rows:
        datasets.setdefault(row.dataset, []).append(
            {
                "label": row.label,
                "is_mean": row.label == FOREGROUND,
                "metric": row.metric,
                "at_home": _page_cell(row.in_domain),
                "n_home": row.in_domain.n,
                "abroad": _page_cell(row.zero_shot),
                "n_abroad": row.zero_shot.n,
                "drop": signed(row.drop),
            }
        )
    at_home = sorted(path.parent.name for path in (output / "in_domain").glob("fold_*/report.html"))
    return render(
        __package__,
        "zeroshot.html",
        title=f"Zero-shot: {', '.join(datasets)}",
        model=result.model_folder,
        remarks=result.remarks,
        convention=CONVENTION,
        datasets=[
            {"name": name, "report": f"{quote(name)}/report.html", "rows": rows} for name, rows in datasets.items()
        ],
        at_home=[{"name": n.removeprefix("fold_"), "report": f"in_domain/{n}/report.html"} for n in at_home],
    )


def _page_cell(mean: Mean) -> dict[str, str]:
    return {"mean": number(mean.mean), "interval": interval(mean.low, mean.high)}


def _empty_if_nan(value: float) -> float | str:
    return "" if np.isnan(value) else value
