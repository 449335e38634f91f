"""What all tasks share: a network by name or as a module, its optimizer, and losses in the log."""

import inspect
import json
import traceback
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_znorm.tasks.random_state import random_state, set_random_state

_RANDOM_STATES = "random_states"


class Task(LightningModule):
    """Base of the tasks.

    Its checkpoints hold the state of all random numbers (Python's, NumPy's, torch's and the device's, of each process),
    and a training that is resumed goes on from it: dropout and augmentations draw what they would have drawn.

    Args:
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning rate scheduler from the optimizer; none by default. A
            `lightning.pytorch.cli.ReduceLROnPlateau` follows the metric that it names as its ``monitor``, torch's own
            follows ``val/loss``.
        lr_scheduler_interval: Whether the scheduler steps after every epoch, or after every optimizer step.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        lr_scheduler_interval: Literal["epoch", "step"],
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self._random_states: list[dict[str, Any] | None] = []

    def save_arguments(self, **objects: object) -> None:
        """Save the arguments of the calling constructor as hyperparameters, but for objects.

        Args:
            **objects: Arguments that may be objects; a checkpoint holds plain values only.
        """
        caller = inspect.currentframe()
        frame = None if caller is None else caller.f_back
        self.save_hyperparameters(ignore=[name for name, value in objects.items() if callable(value)], frame=frame)
        if "_instantiator" in self.hparams:  # LightningCLI built the task, and has these as plain values as well
            self.save_hyperparameters(frame=frame)

    def configure_network(
        self, model: str | nn.Module, create: Callable[..., nn.Module], kwargs: dict[str, Any], compile: bool
    ) -> None:
        """Set the network, as ``self.model``.

        Args:
            model: Its name, or the network.
            create: Makes it from its name and ``kwargs``.
            kwargs: Arguments of a network by name.
            compile: Compile it in place.

        Raises:
            ValueError: If ``kwargs`` come with a module, or hold anything but plain values.
        """
        if isinstance(model, str):
            _require_plain(kwargs)
            model = create(model, **kwargs)
        elif kwargs:
            raise ValueError(f"model_kwargs are for a model by name, and {type(model).__name__} is a module already.")
        if compile:
            model.compile()
        self.model = model

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer, and the scheduler if there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": self.lr_scheduler_interval,
                "monitor": getattr(scheduler, "monitor", "val/loss"),
            },
        }

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of all random numbers, of each process; where one failed, of that alone."""
        trainer = self._trainer
        if trainer is None:  # under Fabric
            return
        states: list[dict[str, Any] | None] = [random_state(self.device)]
        if trainer.world_size > 1:
            own, states = states[0], [None] * trainer.world_size
            states[trainer.global_rank] = own
            if torch.distributed.is_initialized() and not trainer.interrupted and not _is_requeued():
                torch.distributed.all_gather_object(states, own)
        checkpoint[_RANDOM_STATES] = states

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the random numbers, if training is to go on."""
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._random_states = checkpoint.get(_RANDOM_STATES, [])

    @override
    def on_train_start(self) -> None:
        """Go on with the random numbers of the training that is resumed: here, for to get here may have drawn some."""
        states, self._random_states = self._random_states, []
        state = states[self.global_rank] if len(states) == self.trainer.world_size else None
        if state is not None:
            set_random_state(state, self.device)
        # Every process looks at all of them: the first, which warns, may have its own where others have none.
        known = sum(each is not None for each in states)
        if states and (state is None or known < len(states)):
            rank_zero_warn(
                f"The checkpoint holds the random numbers of {known} processes, and {self.trainer.world_size} go on: "
                "dropout and augmentations draw others than they would have."
            )

    def log_loss(self, name: str, loss: Tensor, batch_size: int) -> None:
        """Log the mean of a loss over an epoch and all processes."""
        self.log(name, loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=batch_size, sync_dist=True)


def _is_requeued() -> bool:
    """Whether Lightning saves in the handler of SLURM's signal: in the middle of a step, which others wait for."""
    return any(frame.f_code.co_name == "_slurm_sigusr_handler_fn" for frame, _ in traceback.walk_stack(None))


def _require_plain(kwargs: dict[str, Any]) -> None:
    try:
        json.dumps(kwargs)
    except TypeError as error:
        raise ValueError(
            f"model_kwargs must hold plain values, which a checkpoint can hold ({error}): build the network yourself "
            "and pass it as the model."
        ) from error
