"""A trainer of nnU-Net's that has its folder for itself, and that lets no plans stand for weights of others."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from nnunet_lgms.locks import locked
from nnunet_lgms.names import check_plans_names
from nnunet_lgms.nnunet.checkpoints import CheckpointingTrainer
from nnunet_lgms.nnunet.errors import TrainingError, said_in_one_sentence
from nnunet_lgms.nnunet.same_training import check_same_training


class OwnFolderTrainer(CheckpointingTrainer):
    """nnU-Net's trainer, whatever it trains, of which one at a time writes to a fold's folder.

    nnU-Net writes ``plans.json`` and ``dataset.json`` of a model's folder anew with every training. They are what
    prediction goes by, so a training with others is refused where weights are that were not trained with them.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature, to the letter
    ):
        with said_in_one_sentence():
            check_plans_names(plans, "The plans file")  # folders are made of its names
        super().__init__(plans, configuration, fold, dataset_json, device)

    def run_training(self):
        with self._alone():
            super().run_training()

    def on_train_start(self):
        base, own = Path(self.output_folder_base), Path(self.output_folder)
        if any(file.parent != own for file in base.glob("fold_*/checkpoint_*.pth")):
            self._check_same_training()
        super().on_train_start()

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        if isinstance(filename_or_checkpoint, str) and Path(filename_or_checkpoint).parent == Path(self.output_folder):
            self._check_same_training()
        super().load_checkpoint(filename_or_checkpoint)

    def perform_actual_validation(self, save_probabilities: bool = False):
        with self._alone():
            super().perform_actual_validation(save_probabilities)

    def _check_same_training(self):
        with said_in_one_sentence():
            check_same_training(
                Path(self.output_folder_base), self.plans_manager.plans, self.dataset_json, self.configuration_name
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the fold's folder; of several processes the first does.

        Raises:
            TrainingError: another training holds it, or the folder cannot be written.
        """
        folder = Path(self.output_folder)
        with ExitStack() as stack:
            if self.local_rank == 0:
                try:
                    with said_in_one_sentence():
                        what = f"training of {folder.name} of {folder.parent.name}"
                        stack.enter_context(locked(folder / ".training.lock", what))
                except OSError as error:
                    raise TrainingError(
                        f"{folder} cannot be written ({error.strerror}): make it writable or set nnUNet_results to "
                        "another folder."
                    ) from error
            yield
