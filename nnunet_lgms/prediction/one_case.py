"""One case, from its samples to labels on its own grid."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.helpers import empty_cache
from torch import Tensor

from nnunet_lgms.prediction.cases import write_case
from nnunet_lgms.prediction.labels import write_labels
from nnunet_lgms.prediction.logits import LogitsPredictor, out_of_memory
from nnunet_lgms.prediction.preprocessing import own_spacing, preprocess
from nnunet_lgms.prediction.resampling import as_matrices


class CasePredictor(LogitsPredictor):
    """The part of :class:`nnunet_lgms.prediction.predictor.Predictor` that takes a case to its labels.

    Where a GPU has not enough memory, logits are added up in the host's memory, and then the CPU computes.
    """

    tap: Callable[[str | None, Tensor], None] | None = None
    n_cases = 1

    def predict_single_npy_array(
        self,
        input_image: np.ndarray,
        image_properties: dict,
        segmentation_previous_stage: np.ndarray | None = None,
        output_file_truncated: str | None = None,
        save_or_return_probabilities: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray] | None:
        """As its parent's."""
        grid = input_image.shape[1:], image_properties["spacing"]
        self._expect(self._is_little(self.n_cases, lambda: grid))
        with self.stages.measured("preprocess"):
            data = self._preprocess(input_image.astype(np.float32), segmentation_previous_stage, image_properties)
        result = self._predicted(data, image_properties, save_or_return_probabilities)
        if output_file_truncated is None:
            return result if save_or_return_probabilities else result[0]
        return self._write(None, output_file_truncated, *result, image_properties)

    def _preprocess(self, samples: np.ndarray, previous: np.ndarray | None, properties: dict) -> Tensor:
        with torch.inference_mode():
            return preprocess(
                samples,
                previous,
                properties,
                self.plans_manager,
                self.configuration_manager,
                self.dataset_json,
                self._where_there_is_room,
                self.verbose_preprocessing,
            )

    def _where_there_is_room(self, function: Callable[[torch.device], Tensor]) -> Tensor:
        if self.device.type == "cuda" and self.perform_everything_on_device:
            try:
                return function(self.device)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self.talk("The GPU has no room to resample this image: it is resampled by the CPU.")
                empty_cache(self.device)
        return function(torch.device("cpu"))

    @torch.inference_mode()
    def _predicted(
        self,
        data: Tensor | str,
        properties: dict,
        with_probabilities: bool,
        name: str | None = None,
        logits: Tensor | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Labels on the image's grid, and probabilities (heads, Z, Y, X) if they are wanted.

        Args:
            data: (C, Z', Y', X') as the network takes it, or nnU-Net's file of it.
            properties: of the image.
            with_probabilities: whether they are wanted.
            name: of the case.
            logits: (heads, Z', Y', X'), if they are there already.
        """
        if isinstance(data, str):  # nnU-Net's iterators may hand over a file
            file, data = data, torch.from_numpy(np.load(data))
            os.remove(file)
        *ways, last = self._ways()
        for device, sums in ways:
            try:
                return self._segmented(data, properties, with_probabilities, device, sums, name, logits)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            where = "the CPU computes" if sums.type == "cpu" else "logits are added up in the host's memory"
            self.talk(f"{name or 'The image'}: the GPU has not enough memory; {where}.")
            empty_cache(self.device)
        return self._segmented(data, properties, with_probabilities, *last, name, logits)

    def _segmented(
        self,
        data: Tensor,
        properties: dict,
        with_probabilities: bool,
        device: torch.device,
        sums: torch.device,
        name: str | None,
        logits: Tensor | None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        plans, configuration, label_manager = self.plans_manager, self.configuration_manager, self.label_manager
        shape = properties["shape_after_cropping_and_before_resampling"]
        spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
        own = own_spacing(configuration, spacing)
        resampling = as_matrices(configuration.resampling_fn_probabilities, data.shape[1:], shape, own, spacing)
        begin, network_before = time.perf_counter(), self.stages.seconds["network"]
        rows = [logits] if logits is not None else self._timed(self._rows(data, device, sums, name), name)
        if self.tap is not None:
            rows = [torch.cat(list(rows), 1)]
            self.tap(name, rows[0])
        if resampling is None:  # a function that nobody but nnU-Net knows
            whole = torch.cat([part.cpu() for part in rows], 1)
            result = convert_predicted_logits_to_segmentation_with_correct_shape(
                whole.numpy(), plans, configuration, label_manager, properties, with_probabilities
            )
            return result if with_probabilities else (result, None)
        many = len(label_manager.foreground_labels) >= 255
        labels = np.zeros(properties["shape_before_cropping"], np.uint16 if many else np.uint8)
        inside = tuple(slice(*ends) for ends in properties["bbox_used_for_cropping"])
        probabilities = None
        if with_probabilities:
            probabilities = np.zeros((label_manager.num_segmentation_heads, *labels.shape), np.float32)
            if not label_manager.has_regions:
                probabilities[0] = 1  # outside of the crop
        inside_probabilities = None if probabilities is None else probabilities[(slice(None), *inside)]
        write_labels(rows, resampling, label_manager, labels[inside], inside_probabilities, device)
        labels = labels.transpose(plans.transpose_backward)
        if probabilities is not None:
            probabilities = probabilities.transpose(0, *(axis + 1 for axis in plans.transpose_backward))
        network = self.stages.seconds["network"] - network_before
        self.stages.add("export", time.perf_counter() - begin - network, name)
        return labels, probabilities

    def _timed(self, rows: Iterator[Tensor], name: str | None) -> Iterator[Tensor]:
        while True:
            with self.stages.measured("network", name):
                part = next(rows, None)
            if part is None:
                return
            yield part

    def _write(
        self, name: str | None, output: str, labels: np.ndarray, probabilities: np.ndarray | None, properties: dict
    ) -> None:
        with self.stages.measured("write", name):
            write_case(output, labels, probabilities, properties, self.plans_manager, self.dataset_json)
