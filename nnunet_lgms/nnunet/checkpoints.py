"""A trainer of nnU-Net's whose checkpoints are whole, and written while the next epoch runs."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from nnunet_lgms.checkpoint import read_checkpoint
from nnunet_lgms.files import atomic_write, one_line
from nnunet_lgms.nnunet.aside import ProgressPicture, Writer
from nnunet_lgms.nnunet.errors import TrainingError
from nnunet_lgms.nnunet.validating import ValidatingTrainer

LEFT_BEHIND = (".*.checkpoint_*.pth", ".*.progress.png")  # by a training that was killed while it wrote
HOW_TO_GO_ON = "the checkpoints before are still there: make room, then continue with --c."


class CheckpointingTrainer(ValidatingTrainer):
    """nnU-Net's trainer, whatever it trains, that goes on with ``--c`` whenever it is killed.

    A checkpoint appears whole or not at all. What nnU-Net writes between two epochs is written aside (`aside.py`): the
    state is copied, and the next epoch begins. An error then surfaces at the next epoch's end, and a training ends when
    all is written.
    """

    writer: Writer | None = None  # while a training runs
    is_between_epochs = False

    def run_training(self):
        picture, self.writer = ProgressPicture(), Writer()
        self.logger.plot_progress_png = lambda folder: picture.draw(folder, self.logger.get_checkpoint())
        try:
            super().run_training()
            self.writer.wait()
            with self._said_of_its_folder():
                picture.finish()
        except BaseException:
            for finish in (self.writer.wait, picture.finish):
                with suppress(TrainingError, OSError):  # what ended the training is said
                    finish()
            raise
        finally:
            self.writer = None
            del self.logger.plot_progress_png

    def on_train_start(self):
        if self.local_rank == 0:
            for pattern in LEFT_BEHIND:
                for file in Path(self.output_folder).glob(pattern):
                    file.unlink(missing_ok=True)
        super().on_train_start()

    def on_epoch_end(self):
        if self.writer is not None:
            self.writer.wait()
        self.is_between_epochs = True
        try:
            with self._said_of_its_folder():
                super().on_epoch_end()
        finally:
            self.is_between_epochs = False

    @contextmanager
    def _said_of_its_folder(self) -> Iterator[None]:
        """Says of an error of the progress picture how to go on; checkpoints say so themselves."""
        try:
            yield
        except OSError as error:
            raise TrainingError(f"{self.output_folder} cannot be written ({error}); {HOW_TO_GO_ON}") from error

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net's, but the file appears whole or not at all: ``--c`` loads it whatever happens while writing."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        content = io.BytesIO()
        super().save_checkpoint(content)
        write = partial(write_checkpoint, content, Path(filename))
        if self.writer is not None and self.is_between_epochs:
            self.writer.write(write)
            return
        if self.writer is not None:
            self.writer.wait()  # nnU-Net removes the latest checkpoint after it has saved the final one
        write()

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """As nnU-Net's; a training that stopped between its latest and its best checkpoint makes up for the latter.

        The file is read without running code first: nnU-Net's own way of reading runs what a file tells it to.
        """
        way_out = "remove it, and --c goes on from another checkpoint if there is one"
        if isinstance(filename_or_checkpoint, str):
            try:
                read_checkpoint(filename_or_checkpoint)
            except ValueError as error:
                raise TrainingError(f"{str(error).rstrip('.')}; {way_out}.") from error
        try:
            super().load_checkpoint(filename_or_checkpoint)
        except KeyError as error:
            raise TrainingError(f"{filename_or_checkpoint} has no {error}; {way_out}.") from error
        except RuntimeError as error:
            if "state_dict" not in str(error):
                raise
            reason = one_line(error)
            raise TrainingError(
                f"{filename_or_checkpoint} is of another network than these plans describe ({reason}): continue with "
                "the plans that it was trained with, or train anew."
            ) from error
        # nnU-Net saves the latest before it looks whether the epoch was the best
        averages = self.logger.get_value("ema_fg_dice", step=None)
        if averages and (self._best_ema is None or averages[-1] > self._best_ema):
            self._best_ema = averages[-1]
            self.current_epoch -= 1  # save_checkpoint adds one
            self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_best.pth"))
            self.current_epoch += 1


def write_checkpoint(content: io.BytesIO, file: Path) -> None:
    """Writes what a checkpoint holds, whole or not at all, and onto the disk before it takes the old one's place.

    Raises:
        TrainingError: it cannot be written.
    """
    try:
        with atomic_write(file) as temporary, temporary.open("wb") as stream:
            stream.write(content.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise TrainingError(f"{file} cannot be written ({error.strerror}); {HOW_TO_GO_ON}") from error
