"""What callbacks share that do something with the gradients that an optimizer is about to use."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from typing_extensions import override

from lightning_znorm.callbacks.strategies import gradient_source
from lightning_znorm.gradients.amp import is_unscaled, unscales_in_step
from lightning_znorm.gradients.places import Place
from lightning_znorm.gradients.selection import ParameterFilter
from lightning_znorm.gradients.sources import GradientSource


class GradientCallback(Callback, ABC):
    """Finds the gradients of the stepping optimizer when they are complete, and tells what is special about the step.

    Args:
        include: Shell-style pattern or patterns; a parameter takes part if its name in the LightningModule matches one.
        exclude: Pattern or patterns whose matches are left alone.
        min_ndim: Least number of dimensions of a parameter.
        allow_untested_strategy: Whether to trust a strategy that is none of Lightning's tested ones.

    Raises:
        ValueError: Before training, if a pattern matches no parameter or nothing is chosen.
    """

    # What to say after an epoch without a step.
    _without_a_step: ClassVar[str]

    def __init__(
        self, include: str | Sequence[str], exclude: str | Sequence[str], min_ndim: int, allow_untested_strategy: bool
    ) -> None:
        self.allow_untested_strategy = allow_untested_strategy
        self._filter = ParameterFilter(include, exclude, min_ndim)
        self._source: GradientSource | None = None
        self._choice: dict[Place, bool] = {}
        self._used_up = False
        self._backward_in_batch = False
        self._batches = 0
        self._steps = 0
        self._warned_of_no_step = False

    @abstractmethod
    def _before_step(
        self,
        trainer: pl.Trainer,
        source: GradientSource,
        optimizer: Optimizer,
        scaler: GradScaler | None,
        repeated: bool,
    ) -> None:
        """Does something with the gradients: see :meth:`_places`.

        Args:
            trainer: The trainer.
            source: Where the strategy keeps them.
            optimizer: Is about to use them.
            scaler: The scaler by whose scale they are still larger than the true ones; the optimizer's step divides by
                it.
            repeated: Whether an earlier step has used them.
        """

    @property
    def _name(self) -> str:
        return type(self).__name__

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._source = gradient_source(trainer.strategy, pl_module)
        try:
            self._filter.check(self._source.places())
        except ValueError as error:
            raise ValueError(f"{self._name}: {error}") from None

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches = self._steps = 0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._backward_in_batch = False

    @override
    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        self._used_up = False

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._used_up = False
        self._backward_in_batch = True

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        assert self._source is not None
        self._steps += 1
        # In manual optimization, backward passes may bypass Lightning, and the step is always taken.
        automatic = pl_module.automatic_optimization
        repeated = automatic and self._used_up
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and (not scaler.is_enabled() or is_unscaled(scaler, optimizer)):
            scaler = None
        if scaler is not None:
            # Lightning unscales before this hook, unless the optimizer does or `training_step` returned None; with the
            # latter it skips the step, and gradients that go on accumulating keep their scale.
            returned_none = automatic and not self._backward_in_batch and not repeated
            if returned_none or not unscales_in_step(optimizer):
                return
        if not self._source.is_complete():
            return
        self._before_step(trainer, self._source, optimizer, scaler, repeated)
        self._used_up = True

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._batches and not self._steps and not self._warned_of_no_step:
            self._warned_of_no_step = True
            rank_zero_warn(
                f"{self._name} has seen no optimizer step in this epoch of training, so {self._without_a_step}"
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._source = None
        self._choice = {}

    def _places(self, optimizer: Optimizer) -> list[Place]:
        """Where the gradients are that the optimizer is about to use, and that take part."""
        assert self._source is not None
        places = []
        for place in self._source.places_of(optimizer):
            if place not in self._choice:
                self._choice[place] = self._filter.matches(place)
            if self._choice[place]:
                places.append(place)
        return places
