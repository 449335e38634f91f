"""The checkpoint of the last finished epoch, to resume from."""

import os
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from fsspec.utils import get_protocol
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_znorm.callbacks.folders import short_key
from lightning_znorm.callbacks.representation import represented
from lightning_znorm.errors import ZNormRuntimeError

_NAME = r"last(-v\d+)?"  # without the extension


class LastCheckpoint(ModelCheckpoint):
    """Keep ``last.ckpt``: the checkpoint of the last finished epoch, whether or not a metric improved in it.

    ``ModelCheckpoint(monitor=..., save_last=True)`` writes ``last.ckpt`` only in epochs that are among its best. A
    training that is resumed from it repeats every epoch since the best one. Use this callback beside it instead::

        callbacks:
          - class_path: ModelCheckpoint
            init_args: {monitor: val/accuracy, mode: max, filename: best}
          - class_path: LastCheckpoint

    ``last.ckpt`` is replaced as a whole, and only when the epoch's metrics are in the logs. So a process that is killed
    at any moment leaves a checkpoint to resume from, and no epoch is missing from the logs. The checkpoint holds the
    state of all other callbacks after that epoch, wherever they are in the list. ``ckpt_path="last"`` finds it, and so
    does ``fit --ckpt_path last``.

    It is written at the end of every training epoch, also if ``max_steps``, ``max_time`` or
    :class:`~lightning.pytorch.callbacks.EarlyStopping` ended the epoch early. It is not written in the middle of an
    epoch (``ModelCheckpoint(every_n_train_steps=...)`` does that), after an exception, or with ``fast_dev_run``.

    With :class:`~lightning.pytorch.plugins.io.AsyncCheckpointIO`, training waits at the end of each epoch until the
    plugin's thread has written the checkpoint.

    If ``fit`` is called again on the same Trainer, the same file is replaced. With a new Trainer, the callback looks
    for the default folder again, and does not replace the file of the former Trainer unless that is resumed.

    Note:
        Lightning takes this callback for a ``ModelCheckpoint``. If it is the only one, Lightning adds none of its own:
        test with ``ckpt_path="last"``. Otherwise, ``ckpt_path="best"`` is the best checkpoint of the other one, and
        Lightning warns that there are several.

    Args:
        dirpath: Folder of the checkpoint. By default the folder of the Trainer's first ``ModelCheckpoint``, or the one
            that a ``ModelCheckpoint`` would use (``checkpoints`` beside the logs).
        enable_version_counter: Whether to keep a ``last.ckpt`` that another, finished training left in the folder, and
            to name this one ``last-v1.ckpt``. A checkpoint that is resumed is replaced in any case.

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
        self._counts_versions = enable_version_counter
        self._is_written = False  # but not in place yet
        self._found: str | Path | None = None  # the default folder
        self._trainer: weakref.ref[pl.Trainer] | None = None  # the one that wrote `last_model_path`
        self._given = None if dirpath is None else str(dirpath)

    def __repr__(self) -> str:
        # Not `dirpath`, which `setup` replaces by the folder that it finds.
        return represented(self, LastCheckpoint, {"dirpath": "_given", "enable_version_counter": "_counts_versions"})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None}  # a weak reference cannot be pickled, and a copy has no Trainer yet

    @property
    @override
    def state_key(self) -> str:
        return self._key  # Lightning refuses two callbacks with one key: here, with the same folder

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
            typed.callbacks = [*others, self]  # so that the checkpoint holds their states after the epoch

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._is_written = False
        # The folders of all callbacks are known now. Rank 0 decides, because the processes may see different links.
        if refusal := trainer.strategy.broadcast(self._refusal(trainer)):
            raise MisconfigurationException(refusal)
        if not self.last_model_path:
            self.last_model_path = self._resumed(trainer) or self._unused(trainer)
        if trainer.is_global_zero:
            self._remove(self._new)  # an unfinished one of a process that died
        trainer.strategy.barrier("LastCheckpoint.on_train_start")

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning only resumes correctly from what is saved in this hook, but logs the epoch's metrics after it.
        typed: Any = trainer
        # The progress bar of rank 0 has reduced the epoch's metrics already. The other ranks must take part in that
        # before they take part in saving.
        _ = typed.callback_metrics
        if not typed.fast_dev_run:
            trainer.save_checkpoint(self._new, weights_only=False)  # all processes take part
            self._wait_until_written(trainer)
            self._is_written = True

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_in_place(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_in_place(trainer)
        trainer.strategy.barrier("LastCheckpoint.on_train_end")  # after this, any process may read it

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Lightning raises at a SIGTERM between two epochs, when the metrics are in the logs.
        progress: Any = trainer.fit_loop.epoch_progress.current
        # A former Trainer may have left a written checkpoint, if another callback raised before this hook was called.
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
        """Return a message that names another callback that writes the same file, if there is one."""
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
        """Return whether this callback may give the name to a file. It adds a number only if it counts versions."""
        pattern = _NAME if self._counts_versions else "last"
        return other.FILE_EXTENSION == ".ckpt" and bool(re.fullmatch(pattern, name or ""))

    def _wait_until_written(self, trainer: pl.Trainer) -> None:
        plugin: Any = trainer.strategy.checkpoint_io
        wrapped, failed = plugin, None
        while wrapped is not None:  # from the outermost plugin to the innermost
            if isinstance(wrapped, AsyncCheckpointIO):
                try:
                    wrapped.teardown()  # waits for its thread, and raises its error; the next save starts a new one
                except Exception as error:  # of any type; raised below, when no process waits for this one
                    failed = error
            wrapped = getattr(wrapped, "checkpoint_io", None)
        is_written = self.file_exists(self._new, trainer)  # all processes take part
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
        # Hidden from programs that look for last*.ckpt.
        return os.path.join(str(self.dirpath), f".{os.path.basename(self.last_model_path)}.new")

    def _resumed(self, trainer: pl.Trainer) -> str:
        """Return the path of the checkpoint that training resumes from, if it is a last one of this folder."""
        folder, name = os.path.split(str(trainer.ckpt_path or ""))
        return self._path(name) if self._is_in(folder) and re.fullmatch(rf"{_NAME}\.ckpt", name) else ""

    def _unused(self, trainer: pl.Trainer) -> str:
        path, version = self._path("last.ckpt"), self.STARTING_VERSION
        while self._counts_versions and self.file_exists(path, trainer):
            path, version = self._path(f"last-v{version}.ckpt"), version + 1
        return path

    def _path(self, name: str) -> str:
        return os.path.join(str(self.dirpath), name)

    @property
    def _is_local(self) -> bool:
        return _is_local_path(str(self.dirpath))

    def _is_in(self, folder: str | Path | None) -> bool:
        return _resolved(str(self.dirpath)) == _resolved(str(folder))

    def _put_in_place(self, trainer: pl.Trainer) -> None:
        is_written, self._is_written = (
            self._is_written,
            False,
        )  # so that on_exception does not try again
        if not is_written or not trainer.is_global_zero:
            return
        if self._is_local:
            _replace(Path(self._new), Path(self.last_model_path))
        else:
            get_filesystem(self._new).mv(self._new, self.last_model_path)

    def _remove(self, path: str) -> None:
        file_system = get_filesystem(path)
        if file_system.exists(path):
            file_system.rm(path, recursive=True)


def _is_local_path(path: str) -> bool:
    return bool(get_protocol(path) == "file")


def _resolved(folder: str) -> str:
    return os.path.realpath(folder) if _is_local_path(folder) else folder.rstrip("/")


def _replace(new: Path, last: Path) -> None:
    """Replace a checkpoint by a new one. Each is a file, or a folder if the strategy shards checkpoints."""
    former = last.with_name(f"{last.stem}-former.ckpt")
    # A folder cannot replace another in one step. Meanwhile, programs that look for last*.ckpt find the former one.
    if last.is_dir() or (new.is_dir() and last.exists()):
        _discard(former)
        last.rename(former)
    new.replace(last)
    _discard(former)


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint under a hidden name, so that nobody finds a half deleted last*.ckpt."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    _delete(hidden)  # left by a process that died while deleting it
    if checkpoint.exists():
        checkpoint.rename(hidden)
        _delete(hidden)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
