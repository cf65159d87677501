"""nnU-Net's predictor with other machinery."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_lgms.checkpoint import read_checkpoint
from nnunet_lgms.dataset_json import read_dataset_json
from nnunet_lgms.files import one_line, read_json
from nnunet_lgms.prediction.cases import (
    CasesFailed,
    check_outputs,
    find_cases,
    finished,
    read_case,
    remove_leftovers,
    write_case,
)
from nnunet_lgms.prediction.labels import write_labels
from nnunet_lgms.prediction.pipeline import Behind, ahead
from nnunet_lgms.prediction.preprocessing import preprocess
from nnunet_lgms.prediction.resampling import as_matrices
from nnunet_lgms.prediction.sliding_window import SlidingWindow, Start, mirrored_mean, windows_at_once
from nnunet_lgms.prediction.stages import Stages
from nnunet_lgms.prediction.without_compiler import OptimizedModule, nnUNetPredictor

#: voxels of all windows and mirrored copies that go through a network together: eight of 128^3 on a GPU. On a CPU a
#: larger batch is no faster a window.
VOXELS = {"cpu": 1 << 15, "cuda": 1 << 24, "mps": 1 << 22}
#: windows, more than fill a batch
MANY = 1 << 30
#: nnU-Net's own number of threads and processes for reading and for writing
THREADS = 3

Progress = Callable[[int, int], None]


class Predictor(nnUNetPredictor):
    """nnU-Net's predictor, for any model of nnU-Net v2: the same calls, files and numbers.

    What its parent does in worker processes, it does in threads; a case that fails is named, and the others go on. Its
    parent's arguments, and:

    Args:
        progress: called with windows done and in all of a case, in place of a progress bar.
        talk: called with what is worth a line.
        known_networks: gives what builds the network of a trainer, by the trainer's name, with the arguments of
            `build_network_architecture`; or None, and nnU-Net looks for the trainer.

    Attributes:
        stages: seconds of each stage since the predictor was made.
        tap: if set, it is called with the name and the logits (heads, Z, Y, X) of every case on the network's grid.
    """

    tap: Callable[[str | None, Tensor], None] | None = None

    def __init__(
        self,
        tile_step_size: float = 0.5,
        use_gaussian: bool = True,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature
        verbose: bool = False,
        verbose_preprocessing: bool = False,
        allow_tqdm: bool = True,
        *,
        progress: Progress | None = None,
        talk: Callable[[str], None] = lambda line: None,
        known_networks: Callable[[str], Callable[..., nn.Module] | None] = lambda trainer: None,
    ):
        with contextlib.redirect_stdout(io.StringIO()):  # that not everything can be on a CPU
            super().__init__(
                tile_step_size,
                use_gaussian,
                use_mirroring,
                perform_everything_on_device,
                device,
                verbose,
                verbose_preprocessing,
                allow_tqdm,
            )
        self.progress, self.talk, self.known_networks = progress, talk, known_networks
        self.stages = Stages()
        self._largest_batch: int | None = None  # set where memory was short
        self._largest_batches = (0, 0)  # of flat images
        self._loaded: tuple | None = None  # network and weights

    # ---- the model

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Sequence[int | str] | str | None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """As its parent's; checkpoints are read once, and without running what they hold."""
        folder = Path(model_training_output_dir)
        if use_folds is None:
            use_folds = self.auto_detect_available_folds(str(folder), checkpoint_name)
        use_folds = [use_folds] if isinstance(use_folds, str) else use_folds
        dataset_json, plans = read_dataset_json(folder), PlansManager(read_json(folder / "plans.json"))
        checkpoints = [read_checkpoint(folder / f"fold_{fold}" / checkpoint_name) for fold in use_folds]
        first = checkpoints[0]
        configuration = plans.get_configuration(first["init_args"]["configuration"])
        network = self._build(first["trainer_name"], plans, configuration, dataset_json)
        network.load_state_dict(first["network_weights"])
        self.manual_initialization(
            network,
            plans,
            configuration,
            [checkpoint["network_weights"] for checkpoint in checkpoints],
            dataset_json,
            first["trainer_name"],
            first.get("inference_allowed_mirroring_axes"),
        )

    def _build(self, trainer: str, plans: PlansManager, configuration: Any, dataset_json: dict) -> nn.Module:
        build = self.known_networks(trainer)
        if build is None:
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

            with contextlib.redirect_stdout(io.StringIO()):  # where it looks for the trainer
                build = recursive_find_trainer_class_by_name(trainer).build_network_architecture
        channels = determine_num_input_channels(plans, configuration, dataset_json)
        heads = plans.get_label_manager(dataset_json).num_segmentation_heads
        if "plans_manager" in inspect.signature(build).parameters:
            return build(plans, configuration, channels, heads, enable_deep_supervision=False)
        return build(  # trainers from before nnU-Net 2.8
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            channels,
            heads,
            enable_deep_supervision=False,
        )

    # ---- lists of cases

    def _manage_input_and_output_lists(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        folder_with_segs_from_prev_stage: str | None = None,
        overwrite: bool = True,
        part_id: int = 0,
        num_parts: int = 1,
        save_probabilities: bool = False,
    ) -> tuple[list[list[str]], list[str] | None, list[str | None]]:
        images, outputs = list_of_lists_or_source_folder, output_folder_or_list_of_truncated_output_files
        ending = self.dataset_json["file_ending"]
        if isinstance(images, str):
            images = [list(map(str, files)) for files in find_cases(Path(images), ending).values()]
        images = images[part_id::num_parts]
        names = [os.path.basename(files[0])[: -(len(ending) + 5)] for files in images]
        if isinstance(outputs, str):
            outputs = [os.path.join(outputs, name) for name in names]
        elif outputs is not None:
            outputs = outputs[part_id::num_parts]
        previous = [None] * len(images)
        if folder_with_segs_from_prev_stage is not None:
            previous = [os.path.join(folder_with_segs_from_prev_stage, name + ending) for name in names]
        if outputs is None:
            return images, None, previous
        check_outputs(outputs, ending)
        remove_leftovers(outputs, ending)
        left = [i for i, out in enumerate(outputs) if overwrite or not finished(out, ending, save_probabilities)]
        if len(left) < len(images):
            self.talk(f"{len(images) - len(left)} of {len(images)} cases are predicted already.")
        return [images[i] for i in left], [outputs[i] for i in left], [previous[i] for i in left]

    def predict_from_files_sequential(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: str | None = None,
    ) -> list | None:
        """As :meth:`predict_from_files`, one thing after the other."""
        return self.predict_from_files(
            list_of_lists_or_source_folder,
            output_folder_or_list_of_truncated_output_files,
            save_probabilities,
            overwrite,
            num_processes_preprocessing=0,
            num_processes_segmentation_export=0,
            folder_with_segs_from_prev_stage=folder_with_segs_from_prev_stage,
        )

    def _internal_get_data_iterator_from_lists_of_filenames(
        self,
        input_list_of_lists: list[list[str]],
        seg_from_prev_stage_files: list[str | None] | None,
        output_filenames_truncated: list[str] | None,
        num_processes: int,
    ) -> Iterator[dict]:
        previous = seg_from_prev_stage_files or [None] * len(input_list_of_lists)

        def prepare(i: int) -> tuple[Tensor, dict]:
            name = _name(i, output_filenames_truncated)
            with self.stages.measured("read", name):
                case = read_case(
                    input_list_of_lists[i],
                    previous[i],
                    self.plans_manager,
                    self.configuration_manager,
                    self.dataset_json,
                )
            with self.stages.measured("preprocess", name):
                return self._preprocess(*case), case[2]

        return self._prepared(prepare, len(input_list_of_lists), output_filenames_truncated, num_processes)

    def get_data_iterator_from_raw_npy_data(
        self,
        image_or_list_of_images: np.ndarray | list[np.ndarray],
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: np.ndarray | list[np.ndarray] | None,
        properties_or_list_of_properties: dict | list[dict],
        truncated_ofname: str | list[str] | None,
        num_processes: int = THREADS,
    ) -> Iterator[dict]:
        images, previous, properties, outputs = (
            value if isinstance(value, list) or value is None else [value]
            for value in (
                image_or_list_of_images,
                segs_from_prev_stage_or_list_of_segs_from_prev_stage,
                properties_or_list_of_properties,
                truncated_ofname,
            )
        )
        previous = previous or [None] * len(images)

        def prepare(i: int) -> tuple[Tensor, dict]:
            with self.stages.measured("preprocess", _name(i, outputs)):
                return self._preprocess(images[i].astype(np.float32), previous[i], properties[i]), properties[i]

        return self._prepared(prepare, len(images), outputs, num_processes)

    def _prepared(
        self,
        prepare: Callable[[int], tuple[Tensor, dict]],
        n_cases: int,
        outputs: list[str] | None,
        threads: int,
    ) -> Iterator[dict]:
        """Items as nnU-Net's iterators have them; one with an "error" in place of "data" is a case that failed."""
        threads = min(threads, n_cases, os.cpu_count() or 1)
        for i, future in enumerate(ahead(prepare, range(n_cases), threads, self._warm_up)):
            item = {"ofile": None if outputs is None else outputs[i], "name": _name(i, outputs), "of": n_cases}
            if error := future.exception():
                yield {**item, "error": error}
            else:
                data, properties = future.result()
                yield {**item, "data": data, "data_properties": properties}
                del data
            del future

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[dict],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = THREADS,
    ) -> list:
        """As its parent's; all cases are tried.

        Raises:
            CasesFailed: some of them could not be predicted; the others are.
        """
        failed: dict[str, BaseException] = {}
        results: list = []
        writing: dict[str, Future] = {}
        with Behind(num_processes_segmentation_export) as behind:
            for number, (item, logits) in enumerate(self._with_logits(data_iterator), start=1):
                name = item.get("name") or _name(number - 1, item["ofile"] and [item["ofile"]])
                title = f"[{number}/{item['of']}] {name}" if "of" in item else name
                begin = time.perf_counter()
                try:
                    if "error" in item:
                        raise item["error"]
                    data, properties = item.pop("data"), item["data_properties"]
                    result = self._predicted(data, properties, save_probabilities, name, logits)
                except Exception as error:
                    failed[name] = error
                    self.talk(f"{title}: {one_line(_reason(error))}")
                    results.append(None)
                    continue
                if item["ofile"] is None:
                    results.append(result if save_probabilities else result[0])
                    continue
                results.append(None)
                write = partial(self._write, name, item["ofile"], *result, item["data_properties"])
                writing[name] = behind.run(write)
                del data, logits, result, write
                self.talk(f"{title}: {time.perf_counter() - begin:.1f} s")
        for name, future in writing.items():
            if error := future.exception():
                failed[name] = error
                self.talk(f"{name}: {one_line(_reason(error))}")
        compute_gaussian.cache_clear()
        empty_cache(self.device)
        if failed:
            raise CasesFailed(failed, len(results))
        return results

    def _with_logits(self, items: Iterable[dict]) -> Iterator[tuple[dict, Tensor | None]]:
        """Cases, those of flat images with their logits: as many as fill a batch go through the network together."""
        largest, _ = self._batches(self.device, n_windows=MANY)
        waiting: list[dict] = []
        room = largest
        for item in items:
            n_windows = self._windows_of_flat(item.get("data")) or largest
            if n_windows > room:
                yield from self._together(waiting)
                waiting, room = [], largest
            if n_windows >= largest:
                yield item, None
                continue
            waiting.append(item)
            room -= n_windows
        yield from self._together(waiting)

    def _windows_of_flat(self, data: Tensor | str | None) -> int:
        """Windows of (C, 1, Y, X) for a flat network; 0: it is something else."""
        patch = self.configuration_manager.patch_size
        if len(patch) == 3 or not isinstance(data, Tensor) or data.shape[1] != 1:
            return 0
        return len(self._starts((1, *map(max, data.shape[2:], patch))))

    def _together(self, items: list[dict]) -> Iterator[tuple[dict, Tensor | None]]:
        logits: Sequence[Tensor | None] = [None] * len(items)
        if len(items) > 1:
            # Where that fails, each of them goes its own way, which tells whose fault it is.
            with self.stages.measured("network"), contextlib.suppress(RuntimeError, ValueError):
                logits = self._logits_of_flat_images([item["data"] for item in items])
        yield from zip(items, logits, strict=True)

    # ---- one case

    def predict_single_npy_array(
        self,
        input_image: np.ndarray,
        image_properties: dict,
        segmentation_previous_stage: np.ndarray | None = None,
        output_file_truncated: str | None = None,
        save_or_return_probabilities: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray] | None:
        """As its parent's."""
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

    def _ways(self) -> list[tuple[torch.device, torch.device]]:
        """Where the network computes and where logits are added up: as wished, and what is left if memory is short."""
        cpu = torch.device("cpu")
        ways = [(self.device, self.device)] if self.perform_everything_on_device else []
        return [*ways, (self.device, cpu), *([(cpu, cpu)] if self.device.type != "cpu" else [])]

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
        own = list(configuration.spacing)
        own = own if len(own) == len(shape) else [spacing[0], *own]
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

    # ---- the network

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """As its parent's, on the CPU: (C, Z, Y, X) -> (heads, Z, Y, X) float16. Labels need no such array."""
        with torch.inference_mode():
            return torch.cat([part.cpu() for part in self._rows(data, *self._ways()[0])], 1)

    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """As its parent's: logits (heads, Z, Y, X) of the model that the network is now."""
        with torch.inference_mode():
            return torch.cat(list(self._rows(input_image, *self._ways()[0], n_models=1, load=False)), 1)

    def _rows(
        self,
        data: Tensor,
        device: torch.device,
        sums: torch.device,
        name: str | None = None,
        n_models: int | None = None,
        load: bool = True,
    ) -> Iterator[Tensor]:
        """Mean logits (heads, n, Y, X) of all models in order along the first axis of `data` (C, Z, Y, X)."""
        data, unpadded = self._padded(data.to(sums))
        starts = self._starts(data.shape[1:])
        n_models = n_models or len(self.list_of_parameters or [None])
        with self._shown(len(starts) * n_models, name) as progress:
            position, (low, high) = 0, (unpadded[1].start, unpadded[1].stop)
            for rows in self._slid(data, starts, device, sums, n_models, load, progress):
                kept = slice(max(low - position, 0), min(high - position, rows.shape[1]))
                position += rows.shape[1]
                if kept.start < kept.stop:
                    yield _finite(rows[(slice(None), kept, *unpadded[2:])])

    @torch.inference_mode()
    def _logits_of_flat_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Logits (heads, 1, Y, X) of images (C, 1, Y, X) of any sizes, whose windows share batches."""
        device, sums = self._ways()[0]
        padded, unpadded = zip(*(self._padded(image.to(sums)) for image in images))
        # They become slices of one volume, as large as the largest of them; no window looks at what is left over.
        size = [max(image.shape[axis] for image in padded) for axis in (2, 3)]
        volume = padded[0].new_zeros((len(padded[0]), len(padded), *size))
        starts: list[Start] = []
        for z, image in enumerate(padded):
            volume[:, z, : image.shape[2], : image.shape[3]] = image[:, 0]
            starts += [(z, *start[1:]) for start in self._starts(image.shape[1:])]
        # The last ones may be few: to fill up their batch takes less than what a new size of batches costs.
        self._largest_batches = max(self._largest_batches, self._batches(device, len(starts)))
        n_models = len(self.list_of_parameters or [None])
        rows = self._slid(volume, starts, device, sums, n_models, batches=self._largest_batches)
        logits = torch.cat(list(rows), 1)
        return [_finite(logits[(slice(None), slice(z, z + 1), *own[2:])]) for z, own in enumerate(unpadded)]

    def _slid(
        self,
        data: Tensor,
        starts: Sequence[Start],
        device: torch.device,
        sums: torch.device,
        n_models: int,
        load: bool = True,
        progress: Callable[[int], None] = lambda n: None,
        batches: tuple[int, int] | None = None,
    ) -> Iterator[Tensor]:
        """Mean logits (heads, n, Y, X) of windows of `data` (C, Z, Y, X), in order along its first axis."""
        patch, axes = tuple(self.configuration_manager.patch_size), self._mirrored_axes()
        load = load and self.list_of_parameters is not None
        at_once, batch = batches or self._batches(device, len(starts))
        if self.use_gaussian:
            weights = compute_gaussian(patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=sums)
        else:
            weights = torch.ones(patch, dtype=torch.float16, device=sums)
        self.network = self.network.to(device).eval()
        if load and n_models > 1 and sums.type == "cuda":  # they change places after every few windows
            self.list_of_parameters = [{k: v.to(device) for k, v in p.items()} for p in self.list_of_parameters]

        def predict(model: int, windows: Tensor) -> Tensor:
            if load:
                self._load(self.list_of_parameters[model])
            largest = min(batch, self._largest_batch or batch)
            return mirrored_mean(self._through_network, windows.to(device), axes, largest)

        flat = len(patch) == 2
        window = SlidingWindow(
            data,
            starts,
            patch if not flat else (1, *patch),
            flat,
            weights.reshape(1, *patch) if flat else weights,
            self.label_manager.num_segmentation_heads,
            n_models,
            at_once,
        )
        yield from window.rows(predict, progress)

    def _padded(self, data: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
        """(C, Z, Y, X) at least as large as a window, and where in it the image is."""
        return pad_nd_image(data, tuple(self.configuration_manager.patch_size), "constant", {"value": 0}, True, None)

    def _starts(self, shape: Sequence[int]) -> list[Start]:
        """Of the windows of an image (Z, Y, X) that is at least as large as one."""
        slicers = self._internal_get_sliding_window_slicers(shape)
        return [tuple(s if isinstance(s, int) else s.start for s in slicer[1:]) for slicer in slicers]

    def _mirrored_axes(self) -> tuple[int, ...] | None:
        axes, patch = self.allowed_mirroring_axes, self.configuration_manager.patch_size
        if not self.use_mirroring or axes is None:
            return None
        if max(axes) >= len(patch):
            raise ValueError(f"The checkpoint has mirroring axes {axes}, the model has {len(patch)} axes.")
        return axes

    def _batches(self, device: torch.device, n_windows: int) -> tuple[int, int]:
        """Windows, and windows with mirrored copies, that go through the network together."""
        voxels = VOXELS.get(device.type, VOXELS["cpu"])
        copies = 2 ** len(self._mirrored_axes() or ())
        return windows_at_once(self.configuration_manager.patch_size, copies, n_windows, voxels)

    def _warm_up(self) -> None:
        """Sends a batch through the network while the first case is read: kernels are compiled, algorithms chosen.

        Where a window with its mirrored copies fills a batch, as in any larger volume; else its size is not known yet.
        """
        at_once, batch = self._batches(self.device, n_windows=MANY)
        if self.device.type != "cuda" or at_once > 1:
            return
        with self.stages.measured("network"), torch.inference_mode(), contextlib.suppress(RuntimeError):
            self.network = self.network.to(self.device).eval()
            channels = determine_num_input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)
            shape = (min(batch, self._largest_batch or batch), channels, *self.configuration_manager.patch_size)
            self._through_network(torch.zeros(shape, device=self.device))

    def _load(self, weights: dict[str, Tensor]) -> None:
        network = self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network
        if self._loaded is None or self._loaded[0] is not network or self._loaded[1] is not weights:
            network.load_state_dict(weights)
            self._loaded = (network, weights)

    def _through_network(self, x: Tensor) -> Tensor:
        """Logits of a batch, in smaller ones where memory is short."""
        while True:
            batch = min(len(x), self._largest_batch or len(x))
            try:
                # As in nnU-Net: on a CPU autocast is slow, and MPS has none.
                with torch.autocast("cuda") if x.is_cuda else contextlib.nullcontext():
                    parts = [self.network(part) for part in x.split(batch)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except RuntimeError as error:
                if batch == 1 or not out_of_memory(error):
                    raise
            self._largest_batch = batch // 2
            self.talk(f"Batches of {batch} windows need more memory than there is: {batch // 2} at a time.")
            empty_cache(self.device)

    @contextlib.contextmanager
    def _shown(self, total: int, name: str | None) -> Iterator[Callable[[int], None]]:
        """Progress of a case, to be called with the number of windows that are done."""
        done = 0
        # None: a bar on a terminal, nothing in a file
        hidden = None if self.allow_tqdm and self.progress is None else True
        with tqdm(desc=name, total=total, disable=hidden, leave=False) as bar:

            def show(n: int) -> None:
                nonlocal done
                done += n
                bar.update(n)
                if self.progress is not None:
                    self.progress(done, total)

            yield show


def _finite(logits: Tensor) -> Tensor:
    if not torch.isfinite(logits).all():
        raise ValueError(
            "The network gave infinity or NaN for this image: its values are far from those of the training, or the "
            "training diverged."
        )
    return logits


def out_of_memory(error: BaseException) -> bool:
    """Whether a device has not enough memory; libraries say so in their own words."""
    words = ("out of memory", "ALLOC_FAILED", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _name(i: int, outputs: Sequence[str] | None) -> str:
    return f"image {i + 1}" if outputs is None else os.path.basename(outputs[i])


def _reason(error: BaseException) -> str:
    """What a user is told; of an error without words, its kind."""
    words = str(error)
    if isinstance(error, (ValueError, OSError)) and words:
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def to_stderr(line: str) -> None:
    """Says a line without breaking a progress bar."""
    tqdm.write(line, file=sys.stderr)
