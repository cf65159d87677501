"""What can be seen to be wrong before the first job."""

from __future__ import annotations

import os

from nnunet_lgms.data.datasets import DESCRIPTIONS
from nnunet_lgms.planning.plans_files import read_override
from nnunet_lgms.study.graph import Graph, nnunet_folder


def check_inputs(graph: Graph) -> None:
    """nnU-Net's folders, data sets, downloads and overrides.

    Raises:
        ValueError: something is not there, or is something else than the study says.
    """
    raw = nnunet_folder("nnUNet_raw")
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        nnunet_folder(variable)
    for dataset, own in (graph.study.datasets | graph.study.unseen).items():
        if own.convert:
            title = DESCRIPTIONS[own.convert.name].title
            if dataset[11:] != title:
                raise ValueError(f"{dataset} is made from {own.convert.name}: call it {dataset[:11]}{title}.")
        if (raw / dataset / "dataset.json").is_file():
            continue
        if not own.convert:
            raise ValueError(f"{dataset} is not in nnUNet_raw: put it there, or give it convert: in {graph.path.name}.")
        if not graph.resolve(own.convert.source).is_dir():
            raise ValueError(f"{dataset} is to be made from {graph.resolve(own.convert.source)}, which is no folder.")
    for dataset, own in graph.study.datasets.items():
        for folder in ("imagesTs", "labelsTs") if own.test and (raw / dataset).is_dir() else ():
            if not os.path.isdir(raw / dataset / folder):
                raise ValueError(f"{dataset} has no {folder}: put it there, or set test: false in {graph.path.name}.")
        if own.mapping and not graph.resolve(own.mapping).is_file():
            raise ValueError(f"datasets.{dataset}.mapping names {graph.resolve(own.mapping)}, which does not exist.")
    for variant in graph.study.variants.values():
        if variant.override:
            read_override(graph.override_file(variant.override))
