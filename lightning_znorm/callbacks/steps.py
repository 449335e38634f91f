"""The step that an optimizer is about to take: whether its gradients are complete, and what is special about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lightning_znorm.gradients.adapters import GradientAdapter
from lightning_znorm.gradients.amp import is_unscaled, scale_of, take_over_scale_, unscales_in_step
from lightning_znorm.gradients.slots import GradientSlot


@dataclass(frozen=True, eq=False)
class Step:
    """A step that an optimizer is about to take, with complete gradients.

    Attributes:
        trainer: The Trainer.
        optimizer: The optimizer that steps.
        adapter: Knows where the strategy keeps the gradients.
        slots: Returns the slots of those of the optimizer's parameters that take part.
        grad_scaler: The scaler whose scale the gradients still hold, because the optimizer divides by it in its step;
            ``None`` if there is no such scaler.
        is_repeat: Whether an earlier step has used the same gradients.
        is_training: Whether this is a step of the training loop. A step in ``on_fit_start`` or in a validation is not.
    """

    trainer: pl.Trainer
    optimizer: Optimizer
    adapter: GradientAdapter
    slots: Callable[[], list[GradientSlot]]
    grad_scaler: GradScaler | None
    is_repeat: bool
    is_training: bool

    def loss_scale(self) -> Tensor | None:
        """Return the factor by which gradients are too large, a scalar tensor; ``None`` if they are the true ones."""
        return self.adapter.loss_scale() if self.grad_scaler is None else scale_of(self.grad_scaler)

    def take_over_scale_(self) -> Tensor | None:
        """Unscale the gradients now where possible; return the factor that they hold if it is not.

        Returns:
            The factor that the gradients hold, and must hold after a method too; ``None`` if they are the true ones.
        """
        if self.grad_scaler is None:
            return self.adapter.loss_scale()
        return take_over_scale_(self.grad_scaler, self.optimizer)


class StepTracker:
    """Follow a run through Lightning's hooks, to tell what is special about each step.

    A callback calls the method of each hook, and :meth:`before_step` in ``on_before_optimizer_step``.
    """

    def __init__(self) -> None:
        self._in_fit_loop = False
        self._in_batch = False
        self._backward_in_batch = False
        self._used_gradients = False

    def is_training(self, trainer: pl.Trainer) -> bool:
        """Return whether a step now is one of the training loop."""
        return self._in_fit_loop and trainer.training

    def start_training(self) -> None:
        """Note that the training loop begins."""
        self._in_fit_loop = True

    def end_training(self) -> None:
        """Note that the training loop has ended."""
        self._in_fit_loop = False

    def start_batch(self) -> None:
        """Note that a training batch begins."""
        self._in_batch, self._backward_in_batch = True, False

    def end_batch(self) -> None:
        """Note that a training batch has ended."""
        self._in_batch = self._backward_in_batch = False

    def zero_grad(self) -> None:
        """Note that Lightning is about to set gradients to zero."""
        self._used_gradients = False

    def backward(self) -> None:
        """Note that a backward pass has ended."""
        self._used_gradients, self._backward_in_batch = False, True

    def before_step(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        optimizer: Optimizer,
        adapter: GradientAdapter,
        slots: Callable[[], list[GradientSlot]],
    ) -> Step | None:
        """Note that an optimizer is about to step, and return what is special about the step.

        Args:
            trainer: The Trainer.
            module: The LightningModule.
            optimizer: The optimizer that steps.
            adapter: Knows where the strategy keeps the gradients.
            slots: Returns the slots of those of the optimizer's parameters that take part.

        Returns:
            The step; ``None`` if gradients are not complete yet, or if Lightning is going to skip the step.
        """
        # In manual optimization, and outside training, backward passes may bypass Lightning.
        automatic = module.automatic_optimization
        is_repeat = automatic and self._used_gradients and self._in_batch and _skips_backward(trainer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and (not scaler.is_enabled() or is_unscaled(scaler, optimizer)):
            scaler = None
        if scaler is not None:
            # Lightning unscales before this hook, unless the optimizer does it or `training_step` returned None. In
            # the latter case it skips the step, and gradients that go on accumulating keep their scale.
            returned_none = automatic and not self._backward_in_batch and not is_repeat
            if returned_none or not unscales_in_step(optimizer):
                return None
        if not adapter.is_complete():
            return None
        self._used_gradients = True
        return Step(trainer, optimizer, adapter, slots, scaler, is_repeat, self.is_training(trainer))


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer that Lightning's hook is given, out of a wrapper that the user may have made."""
    # By name, because lightning.pytorch and pytorch_lightning each have a class of their own.
    is_wrapper = any(cls.__name__ == "LightningOptimizer" for cls in type(optimizer).__mro__)
    return optimizer.optimizer if is_wrapper else optimizer


def _skips_backward(trainer: pl.Trainer) -> bool:
    """Return whether the training loop takes steps without gradients of their own, for StochasticWeightAveraging."""
    # Lightning has no public name for what its own callback asks of its loop.
    return bool(getattr(trainer.fit_loop, "_skip_backward", True))
