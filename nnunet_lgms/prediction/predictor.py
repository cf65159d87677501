"""nnU-Net's predictor with other machinery: the model and lists of cases."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_lgms.channel_files import check_channel_files, images_left_out
from nnunet_lgms.checkpoint import read_checkpoint
from nnunet_lgms.dataset_json import read_dataset_json
from nnunet_lgms.files import one_line, read_json
from nnunet_lgms.prediction.amount import grid_of, n_windows
from nnunet_lgms.prediction.cases import (
    CasesFailed,
    check_outputs,
    find_cases,
    finished,
    has_labels,
    is_readable,
    read_case,
    remove_leftovers,
)
from nnunet_lgms.prediction.logits import MANY
from nnunet_lgms.prediction.one_case import CasePredictor
from nnunet_lgms.prediction.pipeline import Behind, ahead
from nnunet_lgms.prediction.same_model import check_same_model, write_model

#: nnU-Net's own number of threads and processes for reading and for writing
THREADS = 3


class Predictor(CasePredictor):
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
        n_cases: for each of which `predict_single_npy_array` is called; what LGMSNet has to compute is counted for all.
        tap: if set, it is called with the name and the logits (heads, Z, Y, X) of every case on the network's grid.
    """

    _list_is_little = False
    _model: dict[str, Any] | None = None

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
        self._model = {
            "trainer": first["trainer_name"],
            "configuration": first["init_args"]["configuration"],
            "folds": sorted(map(str, use_folds)),
            "checkpoint": checkpoint_name,
        }

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

    def predict_from_files(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int = THREADS,
        num_processes_segmentation_export: int = THREADS,
        folder_with_segs_from_prev_stage: str | None = None,
        num_parts: int = 1,
        part_id: int = 0,
    ) -> list | None:
        """As its parent's; labels that are kept have to be of this model.

        Raises:
            ValueError: labels that are there are of another model, or outputs are not as they should be.
            CasesFailed: some cases could not be predicted; the others are.
        """
        outputs, ending = output_folder_or_list_of_truncated_output_files, self.dataset_json["file_ending"]
        # Both before plans and description are written over.
        if isinstance(list_of_lists_or_source_folder, str):
            find_cases(Path(list_of_lists_or_source_folder), ending)
        if outputs and not overwrite:
            folder = Path(outputs if isinstance(outputs, str) else os.path.dirname(outputs[0]))
            if has_labels(outputs, ending):
                check_same_model(folder, self.plans_manager.plans, self.dataset_json, self._model)
        return super().predict_from_files(
            list_of_lists_or_source_folder,
            outputs,
            save_probabilities,
            overwrite,
            num_processes_preprocessing,
            num_processes_segmentation_export,
            folder_with_segs_from_prev_stage,
            num_parts,
            part_id,
        )

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
            cases = find_cases(Path(images), ending)
            if outputs is None:  # which otherwise name the cases, each of which is checked when it is read
                for case, files in cases.items():
                    check_channel_files(case, files, ending)
            if left_out := images_left_out(Path(images), ending):
                self.talk(left_out)
            images = [list(map(str, files)) for files in cases.values()]
        images = images[part_id::num_parts]
        names = [os.path.basename(files[0])[: -(len(ending) + 5)] for files in images]
        if isinstance(outputs, str):
            outputs = [os.path.join(outputs, name) for name in names]
        elif outputs is not None:
            outputs = outputs[part_id::num_parts]
        previous = [None] * len(images)
        if folder_with_segs_from_prev_stage is not None:
            previous = [os.path.join(folder_with_segs_from_prev_stage, name + ending) for name in names]
        # Also of cases that are predicted already: a call that was killed goes on as it began.
        reader = self.plans_manager.image_reader_writer_class
        self._list_is_little = self._is_little(len(images), lambda: grid_of(images[0], reader()))
        if outputs is None:
            return images, None, previous
        check_outputs(outputs, ending)
        remove_leftovers(outputs, ending)
        if self._model is not None and outputs:
            write_model(Path(outputs[0]).parent, self._model)
        done = [] if overwrite else [out for out in outputs if finished(out, ending, save_probabilities)]
        with ThreadPoolExecutor(THREADS) as pool:
            whole = set(compress(done, pool.map(lambda out: is_readable(out + ending, reader()), done)))
        for output in done:
            if output not in whole:
                self.talk(f"{output}{ending} is no label map that can be read: it is predicted anew.")
        left = [i for i, out in enumerate(outputs) if out not in whole]
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
        little, self._list_is_little = self._list_is_little, False  # for this list alone

        def prepare(i: int) -> tuple[Tensor, dict]:
            name = _name(i, output_filenames_truncated)
            with self.stages.measured("read", name):
                case = read_case(
                    input_list_of_lists[i],
                    previous[i],
                    self.plans_manager,
                    self.configuration_manager,
                    self.dataset_json,
                    case=name,
                )
            with self.stages.measured("preprocess", name):
                return self._preprocess(*case), case[2]

        return self._prepared(prepare, len(input_list_of_lists), output_filenames_truncated, num_processes, little)

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
        little = self._is_little(len(images), lambda: (images[0].shape[1:], properties[0]["spacing"]))

        def prepare(i: int) -> tuple[Tensor, dict]:
            with self.stages.measured("preprocess", _name(i, outputs)):
                return self._preprocess(images[i].astype(np.float32), previous[i], properties[i]), properties[i]

        return self._prepared(prepare, len(images), outputs, num_processes, little)

    def _prepared(
        self,
        prepare: Callable[[int], tuple[Tensor, dict]],
        n_cases: int,
        outputs: list[str] | None,
        threads: int,
        little: bool,
    ) -> Iterator[dict]:
        """Items as nnU-Net's iterators have them, and what :meth:`_is_little` says of the list.

        One with an "error" in place of "data" is a case that failed.
        """
        threads = min(threads, n_cases, os.cpu_count() or 1)
        for i, future in enumerate(ahead(prepare, range(n_cases), threads, partial(self._warm_up, little))):
            item = {"ofile": None if outputs is None else outputs[i], "name": _name(i, outputs), "of": n_cases}
            item["little"] = little
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
        waiting: list[dict] = []
        taken = 0
        for item in items:
            self._expect(item.get("little", False))  # a validation has most kernels from its training's own steps
            largest, _ = self._batches(self.device, n_windows=MANY)  # as it depends on what is expected
            windows = self._windows_of_flat(item.get("data")) or largest
            if taken + windows > largest:
                yield from self._together(waiting)
                waiting, taken = [], 0
            if windows >= largest:
                yield item, None
                continue
            waiting.append(item)
            taken += windows
        yield from self._together(waiting)

    def _windows_of_flat(self, data: Tensor | str | None) -> int:
        """Windows of (C, 1, Y, X) for a flat network; 0: it is something else."""
        patch = self.configuration_manager.patch_size
        if len(patch) == 3 or not isinstance(data, Tensor) or data.shape[1] != 1:
            return 0
        return n_windows(data.shape[1:], patch, self.tile_step_size)

    def _together(self, items: list[dict]) -> Iterator[tuple[dict, Tensor | None]]:
        logits: Sequence[Tensor | None] = [None] * len(items)
        if len(items) > 1:
            # Where that fails, each of them goes its own way, which tells whose fault it is.
            with self.stages.measured("network"), contextlib.suppress(RuntimeError, ValueError):
                logits = self._logits_of_flat_images([item["data"] for item in items])
        yield from zip(items, logits, strict=True)


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
