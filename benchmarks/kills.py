"""Callbacks that end a training as a power cut or a scheduler does; YAML may name them, too."""

import os
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class Kill(Callback):
    """Kills all processes of the training in the middle of a batch.

    Args:
        batch: Index of the batch, from the start of the training.
        rank: The process that kills all of them.
    """

    def __init__(self, batch: int, rank: int) -> None:
        self.batch = batch
        self.rank = rank

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch and trainer.global_rank == self.rank:
            os.killpg(os.getpgid(0), signal.SIGKILL)


class KillWhileSaving(Callback):
    """Kills all processes of the training while a checkpoint is written, or a moment before or after.

    Args:
        save: Number of the checkpoint, from 1.
        delay: Seconds from the moment when its content is collected.
    """

    def __init__(self, save: int, delay: float) -> None:
        self.save = save
        self.delay = delay

    def on_save_checkpoint(self, *_: object) -> None:
        self.save -= 1
        if self.save == 0 and not os.fork():  # a new process, because a thread would wait while this one writes
            time.sleep(self.delay)
            os.killpg(os.getpgid(0), signal.SIGKILL)


class Pace(Callback):
    """Makes a file when the first batch begins, and slows down each batch, so that a signal can be sent in between.

    Args:
        started: Path of the file.
        seconds: Time to wait at each batch.
    """

    def __init__(self, started: str, seconds: float) -> None:
        self.started = started
        self.seconds = seconds

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.is_global_zero:
            Path(self.started).touch()
        time.sleep(self.seconds)


class Terminate(Callback):
    """Sends SIGTERM from each process to itself when a batch begins."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)
