"""Random numbers in checkpoints: a training that is resumed draws the numbers that it would have drawn."""

import random
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

_KEY = "random_states"


class SavesRandomStates(LightningModule):
    """A module whose checkpoints hold the state of all random numbers: Python's, NumPy's, torch's and the device's.

    The checkpoint holds the state of each process. An all-gather collects them, for which all processes must arrive at
    the same point, as they do when a callback saves. They may not all arrive after an error in one of them, nor while
    Lightning handles the signal by which SLURM announces that it will requeue the job: that signal may come in the
    middle of a step. Then a process saves its own state alone.

    A subclass calls ``super()`` in the hooks that it overrides.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loaded_states: list[dict[str, Any] | None] = []
        self.is_being_requeued = False
        """Whether the handler of SLURM's requeue signal is running."""

    @property
    def attached_trainer(self) -> Trainer | None:
        """The Trainer; ``None`` without one, and under Fabric."""
        # The public `trainer` raises without a Trainer, and gives a stand-in under Fabric.
        return self._trainer

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random states of all processes, or of this one alone where the others may not be saving."""
        trainer = self.attached_trainer
        if trainer is None:
            return
        state = random_state(self.device)
        states: list[dict[str, Any] | None] = [None] * trainer.world_size
        states[trainer.global_rank] = state
        others_may_be_elsewhere = trainer.interrupted or self.is_being_requeued
        if trainer.world_size > 1 and torch.distributed.is_initialized() and not others_may_be_elsewhere:
            torch.distributed.all_gather_object(states, state)
        checkpoint[_KEY] = states

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random states of the checkpoint, if training is to go on."""
        trainer = self.attached_trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self._loaded_states = checkpoint.get(_KEY, [])

    @override
    def on_validation_start(self) -> None:
        """Watch the requeue signal: it may come before a training starts, or without one."""
        self._watch_requeue_signal()

    on_test_start = on_predict_start = on_validation_start

    @override
    def on_train_start(self) -> None:
        """Restore the random states of the training that is resumed, as late as possible: setup may draw numbers."""
        self._watch_requeue_signal()
        states, self._loaded_states = self._loaded_states, []
        state = states[self.global_rank] if len(states) == self.trainer.world_size else None
        if state is not None:
            set_random_state(state, self.device)
        # Every process counts the states of all. The first, which warns, may have its own where others have none.
        known = sum(each is not None for each in states)
        if states and (state is None or known < len(states)):
            rank_zero_warn(
                f"The checkpoint holds the random numbers of {known} processes, and {self.trainer.world_size} go on: "
                "dropout and augmentations draw others than they would have."
            )

    def _watch_requeue_signal(self) -> None:
        """Put a handler around the one of the requeue signal. Lightning restores all handlers when it ends."""
        strategy = None if self.attached_trainer is None else self.attached_trainer.strategy
        environment = getattr(strategy, "cluster_environment", None)
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return
        if environment.requeue_signal is None:
            return
        handler = signal.getsignal(environment.requeue_signal)
        is_watched = isinstance(handler, _RequeueHandler) and handler.module is self
        # Python takes handlers in the main thread alone, and so does Lightning.
        if callable(handler) and not is_watched and threading.current_thread() is threading.main_thread():
            signal.signal(environment.requeue_signal, _RequeueHandler(self, handler))


class _RequeueHandler:
    """Calls a handler of a signal, and marks a module for as long as the handler runs."""

    def __init__(self, module: SavesRandomStates, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.module = module
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.module.is_being_requeued = True
        try:
            self.handler(number, frame)
        finally:
            self.module.is_being_requeued = False


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the random generators, as plain values that a checkpoint can hold.

    Args:
        device: The device whose generator is asked, besides those of Python, NumPy and torch.
    """
    name, keys, *remaining = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *remaining),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the random generators back to a state.

    Args:
        state: What `random_state` returned.
        device: The device whose generator is set. It stays as it is if the state is of another kind of device.
    """
    name, keys, *remaining = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *remaining))
    torch.set_rng_state(state["torch"].cpu())
    if device.type in state:
        getattr(torch, device.type).set_rng_state(state[device.type].cpu(), device)
