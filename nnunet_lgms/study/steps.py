"""The steps of a study, one function a rule of ``workflow/``.

Each does its work with nnU-Net's own commands or this package's, finds out for itself what is done already, and writes
the file that says so last of all. So every step may be called again at any time, also by another study of the same
data.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from nnunet_lgms.data.convert import convert as convert_dataset
from nnunet_lgms.data.convert import write_splits
from nnunet_lgms.data.datasets import DESCRIPTIONS
from nnunet_lgms.dataset_json import read_dataset_json
from nnunet_lgms.files import atomic_write
from nnunet_lgms.locks import locked
from nnunet_lgms.nnunet_folders import dataset_number, nnunet_folder, raw_dataset
from nnunet_lgms.study.checks import (
    N_FOLDS,
    check_configuration,
    check_data,
    check_enough_cases,
    check_fold,
    overridden,
)
from nnunet_lgms.study.gpus import one_gpu
from nnunet_lgms.study.graph import UNSEEDED, Graph, Model, configuration_of, planned_for
from nnunet_lgms.study.schema import OWN_PLANS, PLANNERS

CPU_STEPS = 2
"""Steps that are timed on a CPU, after one that is not."""

# ---- data and plans --------------------------------------------------------------------------------------------------


def convert(graph: Graph, done: Path, dataset: str) -> None:
    """The raw data set is there; made by ``nnunet_lgms convert`` if the study says how."""
    conversion = (graph.study.datasets.get(dataset) or graph.study.unseen[dataset]).convert
    folder = nnunet_folder("nnUNet_raw") / dataset
    if conversion:
        description = DESCRIPTIONS[conversion.name]
        converted = convert_dataset(
            description,
            graph.resolve(conversion.source),
            dataset_number(dataset),
            raw=folder.parent,
            size=conversion.size,
            workers=graph.study.threads,
            wait=True,
        )
        print(*converted.remarks, sep="\n")
        if conversion.splits:
            print(write_splits(description, converted, nnunet_folder("nnUNet_preprocessed")))
    else:
        check_data(graph, dataset)
    _write(done, {"folder": str(folder)})


def plan(graph: Graph, done: Path, dataset: str, plans: str) -> None:
    """Fingerprint and plans; those that are there stay."""
    from nnunet_lgms.planning.plan import plan_dataset

    number, folder = dataset_number(dataset), nnunet_folder("nnUNet_preprocessed") / dataset
    with locked(folder / ".plan.lock", f"planning of {dataset}", wait=True):
        if not (folder / f"{plans}.json").is_file():
            if own := OWN_PLANS.fullmatch(plans):
                plan_dataset(dataset, float(own[1]), {}, plans, wait=True)
            else:
                check = [] if _converted_by_us(dataset) else ["--verify_dataset_integrity"]
                options = ["--no_pp", "-npfp", graph.study.threads, *check]
                nnunet("plan_and_preprocess", "-d", number, "-pl", PLANNERS[plans], *options)
        _write_splits(graph, dataset)
    _write(done, {"plans": str(folder / f"{plans}.json")})


def preprocess(graph: Graph, done: Path, dataset: str, identifier: str) -> None:
    """The preprocessed data of one data identifier; complete data is left as it is."""
    configuration, plans = configuration_of(identifier), planned_for(identifier)
    folder = nnunet_folder("nnUNet_preprocessed") / dataset
    check_configuration(dataset, plans, configuration, identifier)
    cases = _cases(dataset)
    with locked(folder / f".{identifier}.lock", f"preprocessing to {identifier} of {dataset}", wait=True):
        # a case's .pkl is the last of its files that nnU-Net writes
        if missing := [case for case in cases if not (folder / identifier / f"{case}.pkl").is_file()]:
            print(f"{len(missing)} of {len(cases)} cases are not preprocessed")
            np = ["-np", graph.study.threads]
            nnunet("preprocess", "-d", dataset_number(dataset), "-plans_name", plans, "-c", configuration, *np)
    _write(done, {"cases": len(cases)})


def override(graph: Graph, done: Path, dataset: str, plans: str) -> None:
    """New plans beside the planned ones. Where they are there already they must say the same."""
    from nnunet_lgms.planning.auto_kernels import components_of
    from nnunet_lgms.planning.plans_files import plans_file, plans_lock, read_plans, write_plans

    model = next(m for m in graph.models(dataset) if m.plans == plans)
    target = plans_file(dataset, plans)
    with plans_lock(target, wait=True):
        new = overridden(graph, model, lambda: components_of(dataset, read_plans(dataset, model.base)))
        if not target.is_file():
            write_plans(target, new, force=False)
    _write(done, {"plans": str(target)})


def profile(graph: Graph, done: Path, dataset: str, plans: str, configuration: str) -> None:
    """Parameters, GMAC, memory, and the time of a step."""
    device = graph.study.device
    with _gpu(device):
        from nnunet_lgms.planning.profile import as_table
        from nnunet_lgms.planning.profile_file import profile_plans

        steps = CPU_STEPS if device == "cpu" else None  # seconds to minutes each, where a training has thousands
        done.parent.mkdir(parents=True, exist_ok=True)
        profiles, _ = profile_plans(dataset, plans, configuration, device=device, steps=steps, target=done)
        print(as_table(profiles))


# ---- models ----------------------------------------------------------------------------------------------------------


def train(graph: Graph, done: Path, run: str, dataset: str, model: str, fold: str) -> None:
    """One fold, from where it stands: trained and validated, trained only, half-trained, or not begun."""
    _use_results_of(run)
    from nnunet_lgms.nnunet.same_training import check_same_training

    trained = graph.model(dataset, model)
    folder = _model_folder(dataset, model) / f"fold_{fold}"
    # A training outlives a Snakemake that was killed. Then the next one waits here, and finds the fold done.
    with locked(done.with_suffix(".lock"), f"training of fold {fold} of {model}", wait=True):
        check_fold(graph, dataset, int(fold))
        preprocessed = nnunet_folder("nnUNet_preprocessed") / dataset
        plans, description = (_read(preprocessed / f"{name}.json") for name in (trained.plans, "dataset"))
        check_same_training(folder.parent, plans, description, trained.configuration)
        final, latest, best = (_readable(folder / f"checkpoint_{name}.pth") for name in ("final", "latest", "best"))
        if not (final and (folder / "validation" / "summary.json").is_file()):
            with _gpu(graph.study.device):
                _train(graph, trained, run, int(fold), validate_only=final, continued=latest or best)
        _write(done, _training_record(folder / "checkpoint_final.pth", graph.study.device))


def _train(graph: Graph, model: Model, run: str, fold: int, validate_only: bool, continued: bool) -> None:
    """``nnUNetv2_train``, with a seed if the study has seeds."""
    study = graph.study
    os.environ["nnUNet_n_proc_DA"] = str(study.processes)
    probabilities = study.ensemble and len(graph.models(model.dataset, model.variant)) > 1
    flags = ["--val"] * validate_only + ["--c"] * (continued and not validate_only) + ["--npz"] * probabilities
    words = ["train", dataset_number(model.dataset), model.configuration, fold, "-tr", model.trainer]
    _say("nnUNetv2_train", *words[1:], "-p", model.plans, "-device", study.device, *flags)

    import torch

    if run != UNSEEDED:
        _seed(int(run.removeprefix("seed_")))
    # as nnUNetv2_train does, but on the CPU with the study's number of threads instead of all
    torch.set_num_threads(study.threads if study.device == "cpu" else 1)
    torch.set_num_interop_threads(1)
    from nnunetv2.run.run_training import run_training

    run_training(
        model.dataset,
        model.configuration,
        fold,
        model.trainer,
        model.plans,
        export_validation_probabilities=probabilities,
        continue_training=continued and not validate_only,
        only_run_validation=validate_only,
        device=torch.device(study.device),
    )


def _seed(seed: int) -> None:
    """Initial weights, and batches that are prepared in this process; nnU-Net's workers seed themselves."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _training_record(checkpoint: Path, device: str) -> dict[str, Any]:
    """Curves and hours of a training, interruptions left out, as nnU-Net logged them."""
    import platform

    import torch

    from nnunet_lgms.checkpoint import read_checkpoint

    log = read_checkpoint(checkpoint)["logging"]
    seconds = [end - start for start, end in zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"])]
    name = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else platform.processor()
    curves = {key: [float(v) for v in log[key]] for key in ("train_losses", "val_losses", "ema_fg_dice")}
    return {"epochs": len(seconds), "seconds": float(sum(seconds)), "device": name or platform.machine()} | curves


def _readable(checkpoint: Path) -> bool:
    """Whether a checkpoint is there as a whole; what a killed process left half-written is put aside.

    PyTorch's files are zip archives, which have their directory at the end.
    """
    if not checkpoint.is_file():
        return False
    if zipfile.is_zipfile(checkpoint):
        return True
    print(f"{checkpoint} is damaged, as if writing it was interrupted: put aside")
    checkpoint.replace(checkpoint.with_suffix(".damaged"))
    return False


def validate(graph: Graph, done: Path, run: str, dataset: str, model: str, fold: str) -> None:
    """Metrics of a fold's validation cases, with the pictures of the worst."""
    _use_results_of(run)
    predictions = _model_folder(dataset, model) / f"fold_{fold}" / "validation"
    references = nnunet_folder("nnUNet_preprocessed") / dataset / "gt_segmentations"
    _evaluate(graph, predictions, references, dataset, done.parent, f"fold {fold}")


# ---- data sets -------------------------------------------------------------------------------------------------------


def find_best(graph: Graph, done: Path, run: str, dataset: str, variant: str) -> None:
    """nnU-Net's choice among a variant's configurations, and its postprocessing.

    Where a case is validated in several folds, as in the paper's splits, nnU-Net cannot merge them. Then the best mean
    of the folds' Dice decides, and there is no postprocessing.
    """
    _use_results_of(run)
    models, folds = graph.models(dataset, variant), graph.folds(dataset)
    splits = _read(nnunet_folder("nnUNet_preprocessed") / dataset / "splits_final.json")
    validated = [case for fold in folds for case in splits[fold]["val"]]
    if len(set(validated)) < len(validated):
        scores = {model.name: _mean_dice(model, folds) for model in models}
        best = max(models, key=lambda model: scores[model.name])
        chosen = [{"configuration": best.configuration, "trainer": best.trainer, "plans_identifier": best.plans}]
        _write(done, {"folds": folds, "all_results": scores, "selected": chosen, "postprocessing": None})
        return
    from nnunetv2.evaluation.find_best_configuration import find_best_configuration

    considered = tuple({"plans": m.plans, "configuration": m.configuration, "trainer": m.trainer} for m in models)
    ensemble = graph.study.ensemble and len(models) > 1
    # nnU-Net also writes what it found to one file a data set, in nnUNet_results
    with locked(done.parent.parent / f".{dataset}.lock", f"choice of the best model of {dataset}", wait=True):
        found = find_best_configuration(
            dataset, considered, allow_ensembling=ensemble, num_processes=graph.study.threads, folds=tuple(folds)
        )
    best = found["best_model_or_ensemble"]
    chosen = {"selected": best["selected_model_or_models"], "postprocessing": best["postprocessing_file"]}
    _write(done, {"folds": folds, "all_results": found["all_results"], **chosen, "plans": best["some_plans_file"]})


def _mean_dice(model: Model, folds: list[int]) -> float:
    summaries = (_model_folder(model.dataset, model.name) / f"fold_{f}" / "validation" / "summary.json" for f in folds)
    return sum(_read(summary)["foreground_mean"]["Dice"] for summary in summaries) / len(folds)


def predict(graph: Graph, done: Path, run: str, dataset: str, variant: str) -> None:
    """Test images with all folds of what find_best chose, ensembled and postprocessed as it says."""
    _use_results_of(run)
    images = nnunet_folder("nnUNet_raw") / dataset / "imagesTs"
    if not images.is_dir():
        raise ValueError(f"{dataset} has no imagesTs: put them there, or set test: false in {graph.path.name}.")
    best = _read(graph.folder / graph.best(run, dataset, variant))
    output = graph.folder / "predictions" / run / dataset / variant
    models, several = best["selected"], len(best["selected"]) > 1
    parts = [output / model["configuration"] for model in models] if several else [output / "raw"]
    with _gpu(graph.study.device):
        for model, part in zip(models, parts):
            words = ["-i", images, "-o", part, "-d", dataset_number(dataset), "-f", *best["folds"]]
            words += ["-c", model["configuration"], "-tr", model["trainer"], "-p", model["plans_identifier"]]
            workers = max(1, graph.study.processes)
            words += ["-npp", workers, "-nps", workers, "-device", graph.study.device, "--continue_prediction"]
            nnunet("predict", *words, *["--save_probabilities"] * several)
    if several:
        nnunet("ensemble", "-i", *parts, "-o", output / "raw", "-np", graph.study.threads)
    if best["postprocessing"]:
        words = ["-i", output / "raw", "-o", output / "final", "-pp_pkl_file", best["postprocessing"]]
        nnunet("apply_postprocessing", *words, "-plans_json", best["plans"], "-np", graph.study.threads)
    _write(done, {"predictions": str(output / ("final" if best["postprocessing"] else "raw"))})


def evaluate(graph: Graph, done: Path, run: str, dataset: str, variant: str) -> None:
    """Metrics of the test cases."""
    predictions = Path(_read(graph.folder / graph.predicted(run, dataset, variant))["predictions"])
    references = nnunet_folder("nnUNet_raw") / dataset / "labelsTs"
    _evaluate(graph, predictions, references, dataset, done.parent, variant, images="imagesTs")


def zeroshot(graph: Graph, done: Path, run: str, dataset: str, model: str) -> None:
    """A model's folds on data sets that it has not seen."""
    _use_results_of(run)
    own = graph.study.datasets[dataset]
    with _gpu(graph.study.device):
        from nnunet_lgms.evaluation.label_mapping import read_mapping_file
        from nnunet_lgms.evaluation.zeroshot import table, zero_shot

        result = zero_shot(
            _model_folder(dataset, model),
            [raw_dataset(name) for name in own.zeroshot],
            done.parent,
            folds=[str(fold) for fold in graph.folds(dataset)],
            mapping=read_mapping_file(graph.resolve(own.mapping)) if own.mapping else None,
            tolerance=graph.study.nsd_tolerance,
            device=graph.study.device,
            workers=max(1, graph.study.processes),
            wait=True,
        )
        print(*result.remarks, table(result), sep="\n")


# ---- helpers ---------------------------------------------------------------------------------------------------------


def nnunet(command: str, *words: Any) -> None:
    """Runs one of nnU-Net's commands in this process, as its users type it."""
    _say(f"nnUNetv2_{command}", *words)
    entry = next(iter(entry_points(group="console_scripts", name=f"nnUNetv2_{command}")))
    before, sys.argv = sys.argv, [entry.name, *map(str, words)]
    try:
        entry.load()()
    finally:
        sys.argv = before


def _say(*words: Any) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} + {shlex.join(map(str, words))}", flush=True)


def _evaluate(
    graph: Graph, predictions: Path, references: Path, dataset: str, output: Path, name: str, images: str = "imagesTr"
) -> None:
    from nnunet_lgms.evaluation.labels import LabelSet
    from nnunet_lgms.evaluation.output import evaluate_into, terminal_table
    from nnunet_lgms.nnunet_files import Reader

    raw = raw_dataset(dataset)
    description = read_dataset_json(raw)
    evaluation, _ = evaluate_into(
        output,
        {name: predictions},
        references,
        LabelSet.from_dataset_json(description),
        Reader.of_dataset(description),
        images=raw / images,
        tolerance=graph.study.nsd_tolerance,
        workers=graph.study.threads,
        wait=True,
    )
    print(*evaluation.remarks, terminal_table(evaluation), sep="\n")


@contextmanager
def _gpu(device: str) -> Iterator[None]:
    """A GPU that no other job has, named in the log; nothing on the CPU."""
    if device == "cpu":
        yield
        return
    with one_gpu() as gpu:
        print(f"On {gpu or 'the only GPU'}", flush=True)
        yield


def _use_results_of(run: str) -> None:
    """Every seed has a results folder of its own; before nnunetv2 is imported, which reads the variable then."""
    os.environ["nnUNet_results"] = str(Graph.results_of(run))


def _model_folder(dataset: str, model: str) -> Path:
    return nnunet_folder("nnUNet_results") / dataset / model


def _converted_by_us(dataset: str) -> bool:
    return (nnunet_folder("nnUNet_raw") / dataset / "conversion.json").is_file()


def _cases(dataset: str) -> list[str]:
    """Names of all training cases."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    return sorted(get_filenames_of_train_images_and_targets(str(nnunet_folder("nnUNet_raw") / dataset)))


def _write_splits(graph: Graph, dataset: str) -> None:
    """nnU-Net's folds, if there are none: else the first trainings would write them, all at the same time."""
    path = nnunet_folder("nnUNet_preprocessed") / dataset / "splits_final.json"
    if path.is_file():
        return
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    cases = _cases(dataset)
    check_enough_cases(dataset, len(cases))
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(generate_crossval_split(cases, seed=12345, n_splits=N_FOLDS), indent=4))


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _write(done: Path, content: dict[str, Any]) -> None:
    done.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(done) as temporary:
        temporary.write_text(json.dumps(content) + "\n", "utf-8")
