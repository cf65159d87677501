"""A fast trainer of nnU-Net's for LGMSNet: CUDA graphs, Python a step ahead of the GPU, unusable steps left out."""

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunet_lgms.files import one_line
from nnunet_lgms.graphs.ahead import LossOfAStep, StepResult, copied_ahead
from nnunet_lgms.graphs.compilation import is_wanted, why_not_compiled
from nnunet_lgms.graphs.data_parallel import GraphedDataParallel
from nnunet_lgms.graphs.recording import can_be_recorded
from nnunet_lgms.graphs.step import record_step, training_step
from nnunet_lgms.graphs.update import RecordedUpdate
from nnunet_lgms.nnunet.checks import check_images
from nnunet_lgms.nnunet.errors import TrainingError, said_in_one_sentence
from nnunet_lgms.nnunet.robust import RobustTrainer
from nnunet_lgms.ops.backend import use_kernels, with_fallback
from nnunet_lgms.ops.compiling import workers_begin

# A step that a precision cannot hold is nothing unusual, and it is left out; this many in a row are the end.
MAX_STEPS_LEFT_OUT = 20


class GraphedTrainer(RobustTrainer):
    """nnU-Net's training of LGMSNet, with the same steps in less time.

    Where nnU-Net would compile and the Triton kernels run, and where nothing can be compiled, the step is recorded as
    CUDA graphs. On a GPU, Python is a step ahead, and a loss is looked at when it is there. A step whose gradients are
    not finite is left out and counted.
    """

    _initializes = False  # nnU-Net makes the network and the loss, and asks whether to compile them

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature, to the letter
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.recorded_update: RecordedUpdate | None = None
        self.steps_ahead = int(device.type == "cuda")  # that Python may be, and the GPU not
        self.launched: deque[tuple[dict, LossOfAStep]] = deque()  # steps whose loss was not looked at
        self.steps_left_out = 0  # of the epoch
        self.steps_left_out_in_a_row = 0

    def initialize(self):
        self._initializes = True
        try:
            super().initialize()
        finally:
            self._initializes = False
        if super()._do_i_compile() and not self._do_i_compile():
            self.print_to_log_file(f"The network is not compiled. {why_not_compiled(self.device)}")
        if self._trains_on_graphs():
            network = self._own_network()
            network = getattr(network, "_orig_mod", network)  # of a trainer that compiles in any case
            self.network = GraphedDataParallel(network, device_ids=[self.local_rank]) if self.is_ddp else network

    def _do_i_compile(self) -> bool:
        """As nnU-Net's, but for GPUs that ``torch.compile`` is not for, where the first step would be the last.

        While nnU-Net makes the network and the loss, the answer is no where the kernels run: a recording takes the
        place of what it would compile, and to import Inductor takes seconds.
        """
        if not super()._do_i_compile() or (self.device.type == "cuda" and why_not_compiled(self.device) is not None):
            return False
        return not (self._initializes and use_kernels(next(self.network.parameters())))

    def _trains_on_graphs(self) -> bool:
        """Whether steps are replayed as CUDA graphs: where nnU-Net would compile and the kernels run.

        PyTorch's operators are compiled, as nnU-Net does, and recorded where that cannot be; never where the user has
        switched compilation off. On several GPUs, what batch norms exchange and the mean of the gradients are part of
        the graphs; of PyTorch's operators that was not tried.
        """
        parameter = next(self.network.parameters())
        if use_kernels(parameter):
            return self._do_i_compile()
        if not is_wanted() or self.is_ddp:
            return False
        return can_be_recorded(parameter) and why_not_compiled(self.device) is not None

    def _own_network(self) -> nn.Module:
        return self.network.module if self.is_ddp else self.network

    def _record_step(self):
        """Records the training step before the loaders' threads, which use the GPU as well, begin."""
        self.print_to_log_file("Recording the training step as a CUDA graph...")
        shape = (self.batch_size, self.num_input_channels, *self.configuration_manager.patch_size)
        self.network.train()
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        network = self._own_network()
        x, group = torch.zeros(shape, device=self.device), self.network.process_group if self.is_ddp else None
        reason = None
        try:
            step = network, self.optimizer, self.grad_scaler, x, group
            self.recorded_update = with_fallback(record_step, *step)
        except RuntimeError as error:  # for want of memory: a graph holds what a step takes, and shares it with nobody
            reason = one_line(error)
        if reason is not None:
            torch.cuda.empty_cache()
            self.print_to_log_file(f"The step could not be recorded ({reason}); training goes on, slower, without.")

    def on_train_start(self):
        with workers_begin(self.device) if self._do_i_compile() else nullcontext():
            if not self.was_initialized:
                self.initialize()
            if self._trains_on_graphs():
                self._record_step()
        super().on_train_start()

    def run_training(self):
        self.launched.clear()
        self.steps_left_out_in_a_row = 0
        try:
            super().run_training()
        finally:
            network = None if self.network is None else self._own_network()
            if getattr(network, "has_recorded_training", False):
                # The validation can do with their memory, and processes cannot part while a graph holds an exchange.
                network.forget_graphs()
                self.recorded_update = None

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.steps_left_out = 0

    def train_step(self, batch: dict) -> StepResult:
        """nnU-Net's step on ``{"data": (B, C, *patch), "target": (B, 1, *patch) or a list of them}``.

        It ends when the step before it has: on a GPU, this one is being computed while nnU-Net gets the next batch.

        Raises:
            TrainingError: the loss is no number, on a GPU that of the step before, so going on would only lose time:
                images hold NaN or infinity, or the network diverged.
        """
        data, target = copied_ahead((batch["data"], batch["target"]), self.device)
        arriving = LossOfAStep(*self._take_step(data, target))
        self.launched.append((batch, arriving))
        self._look_at_losses(self.steps_ahead)
        return StepResult(loss=arriving)

    def _take_step(self, data: torch.Tensor, target: torch.Tensor | list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The loss and the norm of its gradients, on the device (see :func:`training_step`)."""
        return self._without_graphs_if_memory_is_short(
            lambda: training_step(
                self.network, self.loss, self.optimizer, self.grad_scaler, data, target, self.recorded_update
            )
        )

    def validation_step(self, batch: dict) -> dict:
        return self._without_graphs_if_memory_is_short(lambda: super(GraphedTrainer, self).validation_step(batch))

    def _without_graphs_if_memory_is_short(self, function: Callable[[], Any]) -> Any:
        """What the function gives; graphs hold memory that nothing else can use, and go if it runs out of that.

        Of several processes none goes its own way: graphs and DDP exchange different things.
        """
        reason = None
        try:
            return function()
        except torch.OutOfMemoryError as error:
            if self.is_ddp or not getattr(self._own_network(), "has_recorded_training", False):
                raise
            reason = one_line(error)
        self._own_network().forget_graphs()
        self.recorded_update = None
        torch.cuda.empty_cache()
        self.print_to_log_file(f"Memory is short ({reason}); training goes on, slower, without CUDA graphs.")
        return function()

    def _look_at_losses(self, but: int):
        """Looks at the losses of all steps so far but the latest ``but``."""
        while len(self.launched) > but:
            self._look_at_loss(*self.launched.popleft())

    def _look_at_loss(self, batch: dict, loss: LossOfAStep):
        has_loss, was_taken = bool(np.isfinite(loss.read())), loss.step_was_taken()
        self.steps_left_out += not was_taken
        if has_loss and was_taken:
            self.steps_left_out_in_a_row = 0
            return
        if not has_loss:
            with said_in_one_sentence():
                check_images(batch)
        self.steps_left_out_in_a_row += 1
        # without float16 there is nothing that would bring a loss back
        no_loss_comes_back = not has_loss and self.grad_scaler is None
        if no_loss_comes_back or self.steps_left_out_in_a_row == MAX_STEPS_LEFT_OUT:
            found = f"The gradients are not finite in epoch {self.current_epoch}, {MAX_STEPS_LEFT_OUT} steps in a row"
            if not has_loss:
                found = f"The loss is {float(loss.read())} in epoch {self.current_epoch}"
            raise TrainingError(
                f"{found}, for images that are finite: the training diverged; continue from the last checkpoint with "
                "--c, and with a lower initial_lr if it happens again."
            )

    def on_train_epoch_end(self, train_outputs: list[StepResult]):
        self._look_at_losses(0)
        if self.steps_left_out:
            self.print_to_log_file(
                f"{self.steps_left_out} of {self.num_iterations_per_epoch} steps were left out: their gradients were "
                "not finite."
            )
        super().on_train_epoch_end(train_outputs)
