"""The network on one image, or on several flat ones: from samples on its grid to logits, window by window."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_lgms.prediction.amount import LITTLE, Grid, n_windows
from nnunet_lgms.prediction.preprocessing import own_spacing
from nnunet_lgms.prediction.sliding_window import SlidingWindow, Start, mirrored_mean, windows_at_once
from nnunet_lgms.prediction.stages import Stages
from nnunet_lgms.prediction.without_compiler import OptimizedModule, nnUNetPredictor
from nnunet_lgms.splines import new_shape

#: voxels of all windows and mirrored copies that go through a network together: eight of 128^3 on a GPU. On a CPU a
#: larger batch is no faster a window.
VOXELS = {"cpu": 1 << 15, "cuda": 1 << 24, "mps": 1 << 22}
#: as many times smaller is a batch of PyTorch's operators in place of kernels: they need two to five times the memory
WITHOUT_KERNELS = 4
#: windows, more than fill a batch
MANY = 1 << 30

Progress = Callable[[int, int], None]


class LogitsPredictor(nnUNetPredictor):
    """The part of :class:`nnunet_lgms.prediction.predictor.Predictor` that runs the network.

    Windows go through the network in batches, with their mirrored copies, and are added up on the device while it has
    room. Where memory is short, batches get smaller, and stay so.
    """

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
        self._little_fits = True  # into memory without kernels
        self._loaded: tuple | None = None  # network and weights

    def _ways(self) -> list[tuple[torch.device, torch.device]]:
        """Where the network computes and where logits are added up: as wished, and what is left if memory is short."""
        cpu = torch.device("cpu")
        ways = [(self.device, self.device)] if self.perform_everything_on_device else []
        return [*ways, (self.device, cpu), *([(cpu, cpu)] if self.device.type != "cpu" else [])]

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """As its parent's, on the CPU: (C, Z, Y, X) -> (heads, Z, Y, X) float16. Labels need no such array."""
        self._expect(little=False)
        with torch.inference_mode():
            return torch.cat([part.cpu() for part in self._rows(data, *self._ways()[0])], 1)

    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """As its parent's: logits (heads, Z, Y, X) of the model that the network is now."""
        self._expect(little=False)
        with torch.inference_mode():
            return torch.cat(list(self._rows(input_image, *self._ways()[0], n_models=1, load=False)), 1)

    def _is_little(self, n_cases: int, first: Callable[[], Grid]) -> bool:
        """Whether the network of a list of cases has so little to compute that it had better compile nothing.

        It depends on the work alone, not on what is compiled already, so that the same call gives the same labels.

        Args:
            n_cases: of the list, with those that are predicted already.
            first: gives the grid of the first of them, which stands for all.
        """
        if self.device.type != "cuda" or self._expects_few is None:  # nothing would be compiled
            return False
        from nnunet_lgms.ops.backend import are_asked_for

        if are_asked_for():
            return False
        configuration, order = self.configuration_manager, self.plans_manager.transpose_forward
        try:
            size, spacing = ([of_axes[axis] for axis in order] for of_axes in first())
            shape = new_shape(size, spacing, own_spacing(configuration, spacing))
        except Exception:  # readers raise whatever their libraries raise; it is said when the case is read
            return False
        patch = configuration.patch_size
        copies = 2 ** len(self._mirrored_axes() or ()) * len(self.list_of_parameters or [None])
        return n_cases * n_windows(shape, patch, self.tile_step_size) * copies * math.prod(patch) < LITTLE

    @property
    def _expects_few(self) -> bool | None:
        """Whether the network was told that few predictions are to come; None for one that does not ask."""
        return getattr(self.network, "few_predictions", None)

    def _expect(self, little: bool) -> None:
        """Tells a network that asks for it how much is to come."""
        little = little and self._little_fits
        if self._expects_few not in (None, little):
            self.network.few_predictions = little
            self._largest_batches = (0, 0)

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
        if device.type == "cuda" and self._expects_few:
            voxels //= WITHOUT_KERNELS
        copies = 2 ** len(self._mirrored_axes() or ())
        return windows_at_once(self.configuration_manager.patch_size, copies, n_windows, voxels)

    def _warm_up(self, little: bool) -> None:
        """Sends a batch through the network while the first case is read: kernels are compiled, algorithms chosen.

        Where a window with its mirrored copies fills a batch, as in any larger volume; else its size is not known yet.
        """
        self._expect(little)
        at_once, batch = self._batches(self.device, n_windows=MANY)
        if self.device.type != "cuda" or at_once > 1:
            return
        measured = self.stages.measured("network")
        with self._compilation(), measured, torch.inference_mode(), contextlib.suppress(RuntimeError):
            self.network = self.network.to(self.device).eval()
            channels = determine_num_input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)
            shape = (min(batch, self._largest_batch or batch), channels, *self.configuration_manager.patch_size)
            self._through_network(torch.zeros(shape, device=self.device))

    def _compilation(self) -> contextlib.AbstractContextManager[None]:
        """Workers that compile kernels, for a network that has some and takes them."""
        if self._expects_few is not False:
            return contextlib.nullcontext()
        from nnunet_lgms.ops.compiling import workers_begin

        return workers_begin(self.device)

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
                if not out_of_memory(error) or (batch == 1 and not self._expects_few):
                    raise
            if batch > 1:
                self._largest_batch = batch // 2
                self.talk(f"Batches of {batch} windows need more memory than there is: {batch // 2} at a time.")
            else:  # kernels need less, and compiling them takes less than the CPU would
                self._little_fits = False
                self._expect(little=False)
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
