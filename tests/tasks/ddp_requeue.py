"""Two processes train, and SLURM's signal reaches the first alone. Called by test_random_states.py."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch import nn
from torch.utils.data import DataLoader

from lightning_znorm.tasks import ClassificationTask
from tests.trainers import trainer

SIGNAL = signal.SIGUSR2  # the tests' own processes use the other one


class Slurm(TorchElasticEnvironment, SLURMEnvironment):
    """Processes that SLURM requeues, which find each other as torchrun's do."""


class Strategy(DDPStrategy):
    """Lightning waits for all processes once the checkpoint is on disk. That is not what is tested."""

    def barrier(self, name: str | None = None) -> None:
        if name != "Trainer.save_checkpoint":
            super().barrier(name)


class Signal(Callback):
    """Sends the signal to the first process before it backpropagates, which the other does without it."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        if trainer.is_global_zero and trainer.global_step == self.at:
            os.kill(os.getpid(), SIGNAL)


class SignalInSanityCheck(Callback):
    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero and trainer.sanity_checking:
            os.kill(os.getpid(), SIGNAL)


def handler(name: str) -> Callable[..., None]:
    """Lightning's handler under another name."""
    own = _SignalConnector._slurm_sigusr_handler_fn
    return FunctionType(own.__code__.replace(co_name=name), own.__globals__, name)


INNER = handler("inner")


def wrapped(self: _SignalConnector, *args: Any) -> None:
    INNER(self, *args)


HANDLERS = {"as it is": _SignalConnector._slurm_sigusr_handler_fn, "renamed": handler("another"), "wrapped": wrapped}
MOMENTS = {"step": Signal(1), "sanity check": SignalInSanityCheck()}


def requeue(change: str, moment: str) -> tuple[list[bool], list[bool], bool]:
    """Train three steps.

    Returns:
        Of which processes the checkpoint of the signal holds random numbers, of which the one after training, and
        whether the signal's handler is again what it was.
    """
    _SignalConnector._slurm_sigusr_handler_fn = HANDLERS[change]
    os.environ["SLURM_JOB_ID"] = "0"
    rank, before = int(os.environ["RANK"]), signal.getsignal(SIGNAL)
    task = ClassificationTask(nn.Linear(4, 2), num_classes=2)
    loader = DataLoader([(torch.randn(2, 4), torch.tensor([0, 1])) for _ in range(3)], batch_size=None)
    run = trainer(
        devices=2,
        strategy=Strategy(cluster_environment=Slurm(requeue_signal=SIGNAL)),
        callbacks=[MOMENTS[moment]],
        default_root_dir=os.getcwd(),
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
    )
    run.fit(task, loader, loader)
    run.save_checkpoint("end.ckpt")
    known = []
    for path in (*Path.cwd().glob("hpc_ckpt_*.ckpt"), *Path.cwd().glob("end.ckpt")):
        known.append([state is not None for state in torch.load(path)["random_states"]])
    if rank == 1:  # which saves nothing
        assert known == []
        known = [[], []]
    return known[0], known[1], signal.getsignal(SIGNAL) == before and not task.is_being_requeued
