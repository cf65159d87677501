"""A trainer of nnU-Net's that predicts its validation cases as `nnunet_lgms predict` does."""

import os
from collections.abc import Iterator
from itertools import islice
from os.path import join
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from torch import Tensor
from torch import distributed as dist

from nnunet_lgms.prediction.cases import CasesFailed
from nnunet_lgms.prediction.labels import write_labels
from nnunet_lgms.prediction.predictor import Predictor
from nnunet_lgms.prediction.resampling import as_matrices

# With NCCL a process waits half an hour for another one: they meet after so many cases, as nnU-Net's do.
CASES_BETWEEN_BARRIERS = 20


class ValidatingTrainer(nnUNetTrainer):
    """nnU-Net's trainer, whatever it trains, whose validation at the end takes less time and memory.

    Files and numbers are nnU-Net's: `validation/`, its `summary.json`, and the labels for the next stage of a cascade.
    """

    def perform_actual_validation(self, save_probabilities: bool = False):
        self.set_deep_supervision_enabled(False)
        self.network.eval()
        predictor = Predictor(device=self.device, allow_tqdm=False, talk=self.print_to_log_file)
        predictor.manual_initialization(
            self.network,
            self.plans_manager,
            self.configuration_manager,
            None,
            self.dataset_json,
            type(self).__name__,
            self.inference_allowed_mirroring_axes,
        )
        if self.configuration_manager.next_stage_names:
            predictor.tap = self._predict_for_next_stages
        folder = join(self.output_folder, "validation")
        os.makedirs(folder, exist_ok=True)
        try:
            predictor.predict_from_data_iterator(self._validation_cases(folder), save_probabilities)
        except CasesFailed as failed:
            raise next(iter(failed.errors.values())) from failed
        if self.is_ddp:
            dist.barrier()
        if self.local_rank == 0:
            self._evaluate_validation(folder)
        self.set_deep_supervision_enabled(True)

    def _validation_cases(self, folder: str) -> Iterator[dict[str, Any]]:
        """The preprocessed cases that this process predicts."""
        keys = list(self.do_split()[1])
        world = dist.get_world_size() if self.is_ddp else 1
        shared = len(keys) // world - 1  # after this one, processes may have none to predict
        dataset = self.dataset_class(
            self.preprocessed_dataset_folder,
            keys[self.local_rank :: world] if self.is_ddp else keys,
            folder_with_segs_from_previous_stage=self.folder_with_segs_from_previous_stage,
        )
        for i, case in enumerate(dataset.identifiers):
            self.print_to_log_file(f"predicting {case}")
            data, _, previous, properties = dataset.load_case(case)
            data = torch.from_numpy(np.array(data[:]))
            if self.is_cascaded:
                labels = self.label_manager.foreground_labels
                one_hot = convert_labelmap_to_one_hot(previous[:], labels, output_dtype=np.float32)
                data = torch.cat([data, torch.from_numpy(one_hot)])
            self.print_to_log_file(f"{case}, shape {data.shape}, rank {self.local_rank}")
            yield {
                "data": data,
                "data_properties": properties,
                "ofile": join(folder, case),
                "name": case,
                "of": len(dataset.identifiers),
            }
            if self.is_ddp and i < shared and (i + 1) % CASES_BETWEEN_BARRIERS == 0:
                dist.barrier()

    def _predict_for_next_stages(self, case: str, logits: Tensor) -> None:
        """Labels of the validation cases as the next stages of a cascade are trained on them."""
        for stage in self.configuration_manager.next_stage_names:
            configuration = self.plans_manager.get_configuration(stage)
            source = join(nnUNet_preprocessed, self.plans_manager.dataset_name, configuration.data_identifier)
            dataset_class = infer_dataset_class(source)
            try:
                shape = dataset_class(source, [case]).load_case(case)[0].shape[1:]
            except FileNotFoundError:
                self.print_to_log_file(
                    f"Predicting next stage {stage} failed for case {case} because the preprocessed file is missing! "
                    "Run the preprocessing for this configuration first!"
                )
                continue
            target = Path(self.output_folder_base, "predicted_next_stage", stage, case)
            target.parent.mkdir(parents=True, exist_ok=True)
            _save_labels(self._labels_on(shape, logits), target, dataset_class, self.configuration_manager.patch_size)

    def _labels_on(self, shape: tuple[int, ...], logits: Tensor) -> np.ndarray:
        """Labels on another preprocessed grid of the same case."""
        own = list(self.configuration_manager.spacing)
        function = self.configuration_manager.resampling_fn_probabilities
        resampling = as_matrices(function, logits.shape[1:], shape, own, own)
        if resampling is None:
            moved = function(logits.cpu().numpy(), shape, own, own)
            return np.asarray(self.label_manager.convert_logits_to_segmentation(moved))
        labels = np.empty(shape, np.uint8 if len(self.label_manager.foreground_labels) < 255 else np.uint16)
        write_labels([logits], resampling, self.label_manager, labels, None, logits.device)
        return labels

    def _evaluate_validation(self, folder: str) -> None:
        manager = self.label_manager
        world = dist.get_world_size() if self.is_ddp else 1
        n_cases = sum(name.endswith(self.dataset_json["file_ending"]) for name in os.listdir(folder))
        metrics = compute_metrics_on_folder(
            join(self.preprocessed_dataset_folder_base, "gt_segmentations"),
            folder,
            join(folder, "summary.json"),
            self.plans_manager.image_reader_writer_class(),
            self.dataset_json["file_ending"],
            manager.foreground_regions if manager.has_regions else manager.foreground_labels,
            manager.ignore_label,
            chill=True,
            num_processes=max(1, min(default_num_processes * world, n_cases, os.cpu_count() or 1)),
        )
        for label in metrics["mean"]:
            self.logger.log_summary(f"final_val/class_{label}_dice", metrics["mean"][label]["Dice"])
        self.logger.log_summary("final_val/foreground_dice", metrics["foreground_mean"]["Dice"])
        self.print_to_log_file("Validation complete", also_print_to_console=True)
        dice = metrics["foreground_mean"]["Dice"]
        self.print_to_log_file("Mean Validation Dice: ", dice, also_print_to_console=True)


def _save_labels(labels: np.ndarray, target: Path, dataset_class: type, patch_size: list[int]) -> None:
    """As nnU-Net's ``resample_and_save`` writes them."""
    if dataset_class is not nnUNetDatasetBlosc2:
        dataset_class.save_seg(labels, str(target))
        return
    blocks, chunks = comp_blosc2_params((1, *labels.shape), tuple(patch_size), bytes_per_pixel=labels.itemsize)
    sizes = ([int(size) for size in islice(part, 1, None)] for part in (chunks, blocks))
    nnUNetDatasetBlosc2.save_seg(labels, str(target), *sizes)
