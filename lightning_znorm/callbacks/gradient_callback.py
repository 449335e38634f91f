"""What callbacks share that do something with the gradients that an optimizer is about to use."""

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from typing_extensions import override

from lightning_znorm.callbacks.step_watch import StepWatch
from lightning_znorm.callbacks.strategies import check_strategy, gradient_source
from lightning_znorm.errors import ZNormValueError
from lightning_znorm.gradients import GradientMethod
from lightning_znorm.gradients.amp import is_unscaled, unscales_in_step
from lightning_znorm.gradients.arguments import checked_flag
from lightning_znorm.gradients.places import Place
from lightning_znorm.gradients.selection import ParameterFilter
from lightning_znorm.gradients.sources import GradientSource


@dataclass(eq=False)
class ModelState:
    """What a callback knows of a model that a strategy has set up.

    Attributes:
        wrapped: The strategy's model, by which to see whether it has set up another one.
        source: Where its gradients are.
        watch: Sees whether steps have an effect.
        has_lazy: Whether there are lazy layers that have not been used yet.
        choice: Which places take part, of those that have been asked for.
    """

    wrapped: Any
    source: GradientSource
    watch: StepWatch
    has_lazy: bool
    choice: dict[Place, bool] = field(default_factory=dict)


class GradientCallback(Callback, ABC):
    """Finds the gradients of the stepping optimizer when they are complete, and tells what is special about the step.

    Args:
        include: Shell-style pattern or patterns; a parameter takes part if its name in the LightningModule matches one.
        exclude: Pattern or patterns whose matches are left alone.
        min_ndim: Least number of dimensions of a parameter.
        allow_untested_strategy: Whether to trust a strategy that is none of Lightning's tested ones.

    Raises:
        TypeError: If an argument is of another type.
        MisconfigurationException: Before training, if another Trainer is using the callback.
        ValueError: Before training, if a pattern matches no parameter or nothing is chosen, or if patterns meet
            parameters that have no names.
    """

    # For warnings: what the callback does with gradients, and what to do where Lightning's hook does not run.
    _verb: ClassVar[str]
    _way_out: ClassVar[str]

    def __init__(
        self, include: str | Sequence[str], exclude: str | Sequence[str], min_ndim: int, allow_untested_strategy: bool
    ) -> None:
        _warn_of_other_package(self._name)
        self.allow_untested_strategy = checked_flag("allow_untested_strategy", allow_untested_strategy)
        self._filter = ParameterFilter(include, exclude, min_ndim)
        # Of a run, and gone with it, so that the callback does not keep a model alive.
        self._trainer: pl.Trainer | None = None
        self._model: ModelState | None = None
        self._in_fit_loop = False
        self._used_up = False
        self._in_batch = False
        self._backward_in_batch = False

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer that uses this callback does not use a copy of it.
        return {**vars(self), "_trainer": None, "_model": None}

    @property
    @abstractmethod
    def _required_method(self) -> GradientMethod:
        """A method for which a strategy must have gradients that fit."""

    @abstractmethod
    def _before_step(
        self,
        trainer: pl.Trainer,
        model: ModelState,
        optimizer: Optimizer,
        scaler: GradScaler | None,
        repeated: bool,
    ) -> Iterable[Place] | None:
        """Do something with the gradients: see :meth:`_places`.

        Args:
            trainer: The trainer.
            model: The model.
            optimizer: Is about to use them.
            scaler: The scaler by whose scale they are still larger than the true ones; the optimizer's step divides by
                it.
            repeated: Whether an earlier step has used them.

        Returns:
            The places that have a gradient, or ``None`` if it has not looked.
        """

    def _is_served(self, optimizer: Optimizer) -> bool:
        """Whether something else does to an optimizer's gradients what this callback is for."""
        return False

    def _check_places(self, trainer: pl.Trainer, source: GradientSource, places: Iterable[Place]) -> None:
        """Look at parameters before their first step, those of lazy layers once they are there.

        Raises:
            ValueError: If patterns on names meet a parameter without one.
        """
        if not source.unnamed or not self._filter.needs_names:
            return
        if unnamed := [place for place in places if place in source.unnamed]:
            raise ZNormValueError(
                f"{self._name}: include={self._filter.include} and exclude={self._filter.exclude} are patterns on the "
                f"names of the LightningModule's parameters, and an optimizer steps {len(unnamed)} that it does not "
                f"register, such as {unnamed[0].names[0]}: register them (assign each to an attribute of a module as "
                "a torch.nn.Parameter), or leave the patterns out, which chooses all"
            )

    @property
    def _name(self) -> str:
        return type(self).__name__

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # A Trainer that has stopped without a word has failed in another callback.
        if self._trainer is not None and self._trainer is not trainer and not self._trainer.state.stopped:
            raise MisconfigurationException(
                f"{self._name} is in use by a Trainer that is still running, and cannot serve another one at the same "
                "time: give each Trainer a callback of its own (copy.deepcopy makes one)"
            )
        self._begin(trainer)
        if stage == "fit":
            self._check_strategy(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)  # a step before this may have met the model before a checkpoint was loaded
        self._in_fit_loop = True
        model = self._model_of(trainer, pl_module)
        model.watch.start(trainer.optimizers)
        for optimizer in trainer.optimizers:
            self._check_places(trainer, model.source, _not_lazy(model.source.places_of(optimizer)))

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._model is not None:
            self._model.watch.start_epoch(trainer.optimizers)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = True
        self._backward_in_batch = False
        if self._model is not None:
            self._model.watch.start_batch()

    @override
    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        self._used_up = False

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._used_up = False
        self._backward_in_batch = True
        if self._model is not None:
            self._model.watch.backwards += 1
            self._model.watch.look_for_gradients()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        model = self._model_of(trainer, pl_module)
        model.watch.hook(optimizer)
        # In manual optimization, and outside training, backward passes may bypass Lightning.
        automatic = pl_module.automatic_optimization
        repeated = automatic and self._used_up and self._in_batch and _skips_backward(trainer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and (not scaler.is_enabled() or is_unscaled(scaler, optimizer)):
            scaler = None
        if scaler is not None:
            # Lightning unscales before this hook, unless the optimizer does or `training_step` returned None; with the
            # latter it skips the step, and gradients that go on accumulating keep their scale.
            returned_none = automatic and not self._backward_in_batch and not repeated
            if returned_none or not unscales_in_step(optimizer):
                return
        if not model.source.is_complete():
            return
        found = self._before_step(trainer, model, optimizer, scaler, repeated)
        self._used_up = True
        if found is not None and self._is_training(trainer):
            model.watch.search(optimizer, found, may_miss_backwards=not automatic)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = self._backward_in_batch = False
        if self._model is not None:
            self._model.watch.end_batch()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._model is not None:
            self._model.watch.end_epoch()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._in_fit_loop = False

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end(trainer)  # Lightning calls no `teardown` then

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end(trainer)

    def _begin(self, trainer: pl.Trainer | None) -> None:
        """Forget the run before."""
        if self._model is not None:
            self._model.watch.close()
        self._trainer, self._model = trainer, None
        self._in_fit_loop = self._used_up = self._in_batch = self._backward_in_batch = False

    def _end(self, trainer: pl.Trainer) -> None:
        if self._trainer is trainer:
            self._begin(None)
            for name in ("log", "log_dict"):  # Lightning makes them methods of the model, in each run anew
                vars(self).pop(name, None)

    def _is_training(self, trainer: pl.Trainer) -> bool:
        """Whether a step is one of training, which a step in `on_fit_start`, or of a validation in between, is not."""
        return self._in_fit_loop and trainer.training

    def _check_strategy(self, trainer: pl.Trainer) -> None:
        check_strategy(trainer.strategy, self._name, self._required_method, self.allow_untested_strategy)

    def _model_of(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> ModelState:
        """The model as the strategy has set it up last; outside a run, it is not kept."""
        wrapped = trainer.strategy.model
        model = self._model
        if model is not None and model.wrapped is wrapped and model.source.module is pl_module:
            return model
        if trainer.state.fn != "fit":
            self._check_strategy(trainer)
        source = gradient_source(trainer.strategy, pl_module, self._name)
        has_lazy = self._check_filter(source)
        self._check_places(trainer, source, _not_lazy(source.places()))
        watch = StepWatch(
            self._name,
            self._verb,
            self._way_out,
            self._filter,
            source,
            self._is_served,
            is_finetuned=any(map(_finetunes, getattr(trainer, "callbacks", ()))),
        )
        model = ModelState(wrapped, source, watch, has_lazy)
        if trainer is self._trainer:
            if self._model is not None:  # in the middle of a training
                self._model.watch.close()
                watch.watch(trainer.optimizers)
            self._model = model
        return model

    def _check_filter(self, source: GradientSource) -> bool:
        """Raise for a filter that does not fit the model; return whether lazy layers may change that."""
        places = list(source.places())
        try:
            self._filter.check(places)
        except ValueError as error:
            raise ZNormValueError(f"{self._name}: {error}") from None
        return any(place.ndim is None for place in places)

    def _places(self, trainer: pl.Trainer, model: ModelState, optimizer: Optimizer) -> list[Place]:
        """Where the gradients are that the optimizer is about to use, and that take part."""
        places = list(model.source.places_of(optimizer))
        choice = model.choice
        if new := [place for place in places if place not in choice]:
            if model.has_lazy:
                model.has_lazy = self._check_filter(model.source)
            choice |= {place: self._filter.matches(place) for place in new}
            self._check_places(trainer, model.source, _not_lazy(new))
            # A lazy layer that has not been used yet is asked for again.
            model.choice = {place: is_chosen for place, is_chosen in choice.items() if place.ndim is not None}
        return [place for place in places if choice[place]]


def _warn_of_other_package(callback: str) -> None:
    """Warn if pytorch_lightning is loaded, in a release whose Trainer fails with callbacks of lightning."""
    version = getattr(sys.modules.get("pytorch_lightning"), "__version__", "")
    if (numbers := re.match(r"(\d+)\.(\d+)", str(version))) and tuple(map(int, numbers.groups())) < (2, 6):
        rank_zero_warn(
            f"{callback}: pytorch_lightning {version} is loaded, whose Trainer fails with callbacks of lightning "
            "(`Expected a parent`) and takes them from 2.6 on: upgrade it (`pip install 'pytorch-lightning>=2.6'`), or "
            "use the Trainer of lightning.pytorch"
        )


def _not_lazy(places: Iterable[Place]) -> list[Place]:
    """The places of parameters that are there, of which alone it is known whether they take part."""
    return [place for place in places if place.ndim is not None]


def _skips_backward(trainer: pl.Trainer) -> bool:
    """Whether the training loop takes steps without gradients of their own, as StochasticWeightAveraging has it do."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", True))  # Lightning's name for its own callback's request


def _finetunes(callback: Any) -> bool:
    """Whether a callback unfreezes parameters in the course of a training."""
    # By name, because lightning.pytorch and pytorch_lightning each have a class of their own.
    return any(cls.__name__ == "BaseFinetuning" for cls in type(callback).__mro__)
