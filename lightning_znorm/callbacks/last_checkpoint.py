"""The checkpoint of the last finished epoch, to resume from."""

import os
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_znorm.callbacks.folders import short_key
from lightning_znorm.errors import ZNormRuntimeError

_NAME = r"last(-v\d+)?"  # without the extension


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``: the checkpoint of the last finished epoch, whether or not a metric improved in it.

    ``ModelCheckpoint(monitor=..., save_last=True)`` writes ``last.ckpt`` only in epochs that are among its best: a
    training that is resumed from it repeats every epoch since the best one. Use this callback beside it instead::

        callbacks:
          - class_path: ModelCheckpoint
            init_args: {monitor: val/accuracy, mode: max, filename: best}
          - class_path: LastCheckpoint

    ``last.ckpt`` is replaced as a whole, and only once the epoch's metrics are in the logs. So a process that is killed
    at any moment leaves a checkpoint to resume from, and no epoch is missing from the logs. It holds the state of all
    other callbacks after that epoch, wherever they stand in the list. Lightning finds it by ``ckpt_path="last"``, and
    so does ``fit --ckpt_path last``.

    It is written at the end of every training epoch, also of one that ``max_steps``, ``max_time`` or
    :class:`~lightning.pytorch.callbacks.EarlyStopping` ended early; otherwise not in the middle of an epoch (for that
    there is ``ModelCheckpoint(every_n_train_steps=...)``), after an exception, or with ``fast_dev_run``.

    With :class:`~lightning.pytorch.plugins.io.AsyncCheckpointIO`, training waits at the end of each epoch until the
    plugin's thread has written the checkpoint.

    ``fit`` called again on the same Trainer goes on with the same file. With a new Trainer, the callback starts anew:
    it looks for the default folder again, and does not replace the file of the former Trainer unless that is resumed.

    Note:
        Lightning takes this callback for a ``ModelCheckpoint``. Without another one it adds none of its own: test with
        ``ckpt_path="last"``. With another one, ``ckpt_path="best"`` is the best checkpoint of that one, and Lightning
        warns that there are several.

    Args:
        dirpath: Folder of the checkpoint. Default: that of the Trainer's first ``ModelCheckpoint``, or the one it would
            use (``checkpoints`` beside the logs).
        enable_version_counter: Whether to keep a ``last.ckpt`` that another, finished training left in the folder, and
            to name this one ``last-v1.ckpt``. One that is resumed is replaced in any case.

    Raises:
        MisconfigurationException:
            Before the first step, if another callback of the Trainer writes the same file: a second ``LastCheckpoint``
            with the same folder, or a ``ModelCheckpoint`` in that folder with ``save_last``, or with
            ``filename="last"``. Also if the Trainer is not one of ``lightning.pytorch``.
        RuntimeError:
            If the checkpoint does not exist after the Trainer has saved it, because a ``CheckpointIO`` other than
            ``AsyncCheckpointIO`` writes it later.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> from lightning_znorm import LastCheckpoint
        >>> best = ModelCheckpoint(monitor="val/accuracy", mode="max", filename="best")
        >>> trainer = Trainer(callbacks=[best, LastCheckpoint()])
        >>> trainer.fit(model, ckpt_path="last")  # doctest: +SKIP
    """

    # A ModelCheckpoint that itself saves nothing: Lightning asks only those for the last checkpoint and its folder.

    def __init__(self, dirpath: str | Path | None = None, enable_version_counter: bool = True) -> None:
        super().__init__(dirpath, save_top_k=0, enable_version_counter=enable_version_counter)
        self._key = short_key(self._generate_state_key(dirpath=str(dirpath)))
        self._is_written = False  # and has not taken its place yet
        self._found: str | Path | None = None  # the default folder
        self._trainer: weakref.ref[pl.Trainer] | None = None  # the one that `last_model_path` is of

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None}  # a weak reference cannot be pickled, and a copy has no Trainer yet

    @property
    @override
    def state_key(self) -> str:
        return self._key  # Lightning refuses a second one for the same folder

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(trainer, pl.Trainer):
            raise MisconfigurationException(
                f"LastCheckpoint is a callback of lightning.pytorch, and {type(trainer).__module__} calls it before an "
                "epoch has ended: use lightning.pytorch.Trainer"
            )
        typed: Any = trainer  # Lightning declares no callbacks of it
        others = [callback for callback in typed.callbacks if callback is not self]
        if stage == "fit" and not self._is_of(trainer):
            self._start_anew(trainer)
        is_known = self.dirpath is not None
        if not is_known:
            checkpoints = (other for other in others if isinstance(other, ModelCheckpoint))
            self.dirpath = next((other.dirpath for other in checkpoints if not isinstance(other, LastCheckpoint)), None)
        super().setup(trainer, pl_module, stage)
        if not is_known:
            self._found = self.dirpath
        following = typed.callbacks[typed.callbacks.index(self) + 1 :]
        if not all(isinstance(callback, LastCheckpoint) for callback in following):
            typed.callbacks = [*others, self]  # for the checkpoint is to hold what they keep of the epoch

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._is_written = False
        # The folders of all callbacks are known by now. One process decides for all: they may see other links.
        if refusal := trainer.strategy.broadcast(self._refusal(trainer)):
            raise MisconfigurationException(refusal)
        if not self.last_model_path:
            self.last_model_path = self._resumed(trainer) or self._unused(trainer)
        if trainer.is_global_zero:
            self._remove(self._new)  # unfinished, of a process that died
        trainer.strategy.barrier("LastCheckpoint.on_train_start")

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning restores rightly only what is saved in this hook, but logs the epoch's metrics after it.
        typed: Any = trainer
        # The progress bar of rank 0 has reduced the epoch's metrics by now: the other ranks join it in that first.
        _ = typed.callback_metrics
        if not typed.fast_dev_run:
            trainer.save_checkpoint(self._new, weights_only=False)  # by all processes
            self._wait_until_written(trainer)
            self._is_written = True

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_in_place(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_in_place(trainer)
        trainer.strategy.barrier("LastCheckpoint.on_train_end")  # any process may read it from here on

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # A SIGTERM is raised between two epochs, when the metrics are in the logs.
        progress: Any = trainer.fit_loop.epoch_progress.current
        # A former Trainer may have left a checkpoint behind: another callback raised before this one heard of an error.
        if self._is_of(trainer) and progress.completed == progress.processed:
            self._put_in_place(trainer)

    def _is_of(self, trainer: pl.Trainer) -> bool:
        return self._trainer is not None and self._trainer() is trainer

    def _start_anew(self, trainer: pl.Trainer) -> None:
        if self.dirpath == self._found:
            self.dirpath = None
        self.last_model_path, self._is_written = "", False
        self._trainer = weakref.ref(trainer)

    def _refusal(self, trainer: pl.Trainer) -> str | None:
        """Say which other callback writes the same file, if one does."""
        typed: Any = trainer
        for other in typed.callbacks:
            if other is self or not isinstance(other, ModelCheckpoint) or not self._is_in(other.dirpath):
                continue
            if isinstance(other, LastCheckpoint):
                return (
                    f"Two LastCheckpoint callbacks keep last.ckpt in the same folder ({self.dirpath}): leave one of "
                    "them out, or give them different dirpaths."
                )
            name = type(other).__name__
            writes = "writes {}.ckpt, and so may LastCheckpoint in the same folder (" + str(self.dirpath) + ")"
            if other.save_last and self._is_name(other.CHECKPOINT_NAME_LAST, other):
                written = writes.format(other.CHECKPOINT_NAME_LAST)
                return f"{name}(save_last={other.save_last!r}) {written}: take save_last out of it."
            if (other.save_top_k or other.save_on_exception) and self._is_name(other.filename, other):
                return f"{name}(filename={other.filename!r}) {writes.format(other.filename)}: give it another filename."
        return None

    def _is_name(self, name: str | None, other: ModelCheckpoint) -> bool:
        """Whether a name is one that this callback gives, with a number only if it counts versions."""
        own = _NAME if self._enable_version_counter else "last"
        return other.FILE_EXTENSION == ".ckpt" and bool(re.fullmatch(own, name or ""))

    def _wait_until_written(self, trainer: pl.Trainer) -> None:
        plugin: Any = trainer.strategy.checkpoint_io
        wrapped, failed = plugin, None
        while wrapped is not None:  # from the outermost to those that it wraps
            if isinstance(wrapped, AsyncCheckpointIO):
                try:
                    wrapped.teardown()  # waits for its thread, and raises what that raised; the next save starts one
                except Exception as error:  # the thread may have met any; raised below, when no process waits for it
                    failed = error
            wrapped = getattr(wrapped, "checkpoint_io", None)
        is_written = self.file_exists(self._new, trainer)  # with all processes
        if failed is not None:
            raise failed
        if not is_written:
            raise ZNormRuntimeError(
                f"{type(plugin).__name__} had not written {self._new} when Trainer.save_checkpoint returned, and "
                "LastCheckpoint cannot wait for it: use a CheckpointIO that returns once the checkpoint is complete, "
                "or leave LastCheckpoint out."
            )

    @property
    def _new(self) -> str:
        # Hidden from those who look for last*.ckpt.
        return os.path.join(str(self.dirpath), f".{os.path.basename(self.last_model_path)}.new")

    def _resumed(self, trainer: pl.Trainer) -> str:
        """The last checkpoint of this folder that training goes on from, if it is one."""
        folder, name = os.path.split(str(trainer.ckpt_path or ""))
        return self._path(name) if self._is_in(folder) and re.fullmatch(rf"{_NAME}\.ckpt", name) else ""

    def _unused(self, trainer: pl.Trainer) -> str:
        path, version = self._path("last.ckpt"), self.STARTING_VERSION
        while self._enable_version_counter and self.file_exists(path, trainer):
            path, version = self._path(f"last-v{version}.ckpt"), version + 1
        return path

    def _path(self, name: str) -> str:
        return os.path.join(str(self.dirpath), name)

    @property
    def _is_local(self) -> bool:
        return _is_local_file_protocol(str(self.dirpath))

    def _is_in(self, folder: str | Path | None) -> bool:
        return _resolved(str(self.dirpath)) == _resolved(str(folder))

    def _put_in_place(self, trainer: pl.Trainer) -> None:
        is_written, self._is_written = self._is_written, False  # an error is not to bring us here again
        if not is_written or not trainer.is_global_zero:
            return
        if self._is_local:
            _replace(Path(self._new), Path(self.last_model_path))
        else:
            self._fs.mv(self._new, self.last_model_path)

    def _remove(self, path: str) -> None:
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)


def _resolved(folder: str) -> str:
    return os.path.realpath(folder) if _is_local_file_protocol(folder) else folder.rstrip("/")


def _replace(new: Path, last: Path) -> None:
    """Put one checkpoint in the place of another, each a file or, of a strategy that shards checkpoints, a folder."""
    former = last.with_name(f"{last.stem}-former.ckpt")
    # A folder can't take the place of another in one step. Meanwhile, who looks for last*.ckpt finds the former one.
    if last.is_dir() or (new.is_dir() and last.exists()):
        _discard(former)
        last.rename(former)
    new.replace(last)
    _discard(former)


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint under a hidden name: who looks for last*.ckpt must find none that is half deleted."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    _delete(hidden)  # of a process that died before it was gone
    if checkpoint.exists():
        checkpoint.rename(hidden)
        _delete(hidden)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
