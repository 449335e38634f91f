"""The base of callbacks that work with the gradients that an optimizer is about to use."""

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_znorm.arguments import checked_flag
from lightning_znorm.callbacks.missed_steps import MissedSteps
from lightning_znorm.callbacks.steps import Step, StepTracker
from lightning_znorm.callbacks.strategies import check_strategy, gradient_adapter
from lightning_znorm.errors import ZNormValueError
from lightning_znorm.gradients import GradientMethod
from lightning_znorm.gradients.adapters import GradientAdapter
from lightning_znorm.gradients.slots import GradientSlot, ParameterFilter


@dataclass(eq=False)
class ModelState:
    """What a callback knows of a model that a strategy has set up.

    Attributes:
        wrapped: The strategy's model. If it is another one at the next step, the strategy has set up its model again.
        adapter: Knows where the strategy keeps the gradients.
        watch: Warns of steps that the callback has no effect on.
        has_lazy: Whether there are lazy layers that have not been used yet.
        is_chosen: Whether a slot takes part, for those slots that a step has asked for.
    """

    wrapped: Any
    adapter: GradientAdapter
    watch: MissedSteps
    has_lazy: bool
    is_chosen: dict[GradientSlot, bool] = field(default_factory=dict)


class GradientCallback(Callback, ABC):
    """Find the gradients of the stepping optimizer once they are complete, and hand them to :meth:`process_gradients`.

    A subclass implements :meth:`process_gradients`, and sets :attr:`action` and :attr:`advice`.

    Args:
        include: Shell-style pattern or patterns; a parameter takes part if its name in the LightningModule matches one.
        exclude: Pattern or patterns whose matches are left alone.
        min_ndim: Least number of dimensions of a parameter.
        allow_untested_strategy: Whether to trust a strategy that is not one of Lightning's tested ones.

    Attributes:
        action: What happens to gradients, for warnings: "no gradient will be {action}".
        advice: What to do where an optimizer steps past Lightning's hook, for warnings.
        parameter_filter: Chooses the parameters that take part.

    Raises:
        TypeError: If an argument is of another type.
        MisconfigurationException: Before training, if another Trainer is using the callback.
        ValueError: Before training, if a pattern matches no parameter or nothing is chosen, or if there are patterns
            and an optimizer steps parameters that have no names.
    """

    action: ClassVar[str]
    advice: ClassVar[str]

    def __init__(
        self, include: str | Sequence[str], exclude: str | Sequence[str], min_ndim: int, allow_untested_strategy: bool
    ) -> None:
        _warn_of_old_pytorch_lightning(self.label)
        self.allow_untested_strategy = checked_flag("allow_untested_strategy", allow_untested_strategy)
        self.parameter_filter = ParameterFilter(include, exclude, min_ndim)
        # These belong to a run and are dropped with it, so that the callback does not keep a model alive.
        self._trainer: pl.Trainer | None = None
        self._model: ModelState | None = None
        self._tracker = StepTracker()

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer that uses this callback does not use a copy of it.
        return {**vars(self), "_trainer": None, "_model": None}

    @cached_property  # and not a property, so that a subclass of a user's may have a label of its own
    def label(self) -> str:
        """The name of the callback in messages."""
        return type(self).__name__

    @property
    def applied_method(self) -> GradientMethod | None:
        """The method that the strategy must support; ``None`` if the callback applies none."""
        return None

    @abstractmethod
    def process_gradients(self, step: Step) -> Iterable[GradientSlot] | None:
        """Process the gradients of a step, which are in ``step.slots()``.

        Args:
            step: The step that is about to be taken.

        Returns:
            The slots that have a gradient; ``None`` if the callback has not looked at them.
        """

    def is_handled_elsewhere(self, optimizer: Optimizer) -> bool:
        """Return whether something else processes an optimizer's gradients as this callback would."""
        return False

    def check_slots(self, trainer: pl.Trainer, adapter: GradientAdapter, slots: Iterable[GradientSlot]) -> None:
        """Check parameters before their first step. Parameters of lazy layers are checked once they exist.

        Raises:
            ValueError: If there are patterns, and a parameter has no name.
        """
        if not adapter.unnamed or not self.parameter_filter.needs_names:
            return
        if unnamed := [slot for slot in slots if slot in adapter.unnamed]:
            include, exclude = self.parameter_filter.include, self.parameter_filter.exclude
            raise ZNormValueError(
                f"{self.label}: include={include} and exclude={exclude} are patterns on the names of the "
                f"LightningModule's parameters, and an optimizer steps {len(unnamed)} that it does not register, such "
                f"as {unnamed[0].names[0]}: register them (assign each to an attribute of a module as a "
                "torch.nn.Parameter), or leave the patterns out, which chooses all"
            )

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # A Trainer that has stopped without calling `teardown` has failed in another callback.
        if self._trainer is not None and self._trainer is not trainer and not self._trainer.state.stopped:
            raise MisconfigurationException(
                f"{self.label} is in use by a Trainer that is still running, and cannot serve another one at the same "
                "time: give each Trainer a callback of its own (copy.deepcopy makes one)"
            )
        self._begin(trainer)
        if stage == "fit":
            self._check_strategy(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)  # a step in `on_fit_start` may have stored the model before its checkpoint was loaded
        self._tracker.start_training()
        model = self.model_of(trainer, pl_module)
        model.watch.start(trainer.optimizers)
        for optimizer in trainer.optimizers:
            self.check_slots(trainer, model.adapter, _not_lazy(model.adapter.slots_of(optimizer)))

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._model is not None:
            self._model.watch.start_epoch(trainer.optimizers)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._tracker.start_batch()
        if self._model is not None:
            self._model.watch.start_batch()

    @override
    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        self._tracker.zero_grad()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tracker.backward()
        if self._model is not None:
            self._model.watch.backwards += 1
            self._model.watch.look_for_gradients()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        model = self.model_of(trainer, pl_module)
        model.watch.hook(optimizer)
        step = self._tracker.before_step(
            trainer, pl_module, optimizer, model.adapter, lambda: self._chosen_slots(trainer, model, optimizer)
        )
        if step is None:
            return
        found = self.process_gradients(step)
        if found is not None and step.is_training:
            model.watch.search(optimizer, found, may_miss_backwards=not pl_module.automatic_optimization)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tracker.end_batch()
        if self._model is not None:
            self._model.watch.end_batch()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._model is not None:
            self._model.watch.end_epoch()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tracker.end_training()

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
        self._trainer, self._model, self._tracker = trainer, None, StepTracker()

    def _end(self, trainer: pl.Trainer) -> None:
        if self._trainer is trainer:
            self._begin(None)
            for name in ("log", "log_dict"):  # Lightning makes them methods of the model, in each run anew
                vars(self).pop(name, None)

    def _check_strategy(self, trainer: pl.Trainer) -> None:
        check_strategy(trainer.strategy, self.label, self.applied_method, self.allow_untested_strategy)

    def model_of(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> ModelState:
        """Return what is known of the model that the strategy has set up. It is stored only during a run."""
        wrapped = trainer.strategy.model
        model = self._model
        if model is not None and model.wrapped is wrapped and model.adapter.module is pl_module:
            return model
        if trainer.state.fn != "fit":
            self._check_strategy(trainer)
        adapter = gradient_adapter(pl_module, trainer.strategy)
        has_lazy = self._check_filter(adapter)
        self.check_slots(trainer, adapter, _not_lazy(adapter.slots()))
        watch = MissedSteps(
            self.label,
            self.action,
            self.advice,
            self.parameter_filter,
            adapter,
            self.is_handled_elsewhere,
            is_finetuned=any(map(_finetunes, getattr(trainer, "callbacks", ()))),
        )
        model = ModelState(wrapped, adapter, watch, has_lazy)
        if trainer is self._trainer:
            if self._model is not None:  # in the middle of a training
                self._model.watch.close()
                watch.watch(trainer.optimizers)
            self._model = model
        return model

    def _check_filter(self, adapter: GradientAdapter) -> bool:
        """Raise for a filter that does not fit the model; return whether lazy layers may change that."""
        slots = list(adapter.slots())
        try:
            self.parameter_filter.check(slots)
        except ValueError as error:
            raise ZNormValueError(f"{self.label}: {error}") from None
        return any(slot.ndim is None for slot in slots)

    def _chosen_slots(self, trainer: pl.Trainer, model: ModelState, optimizer: Optimizer) -> list[GradientSlot]:
        """Return the slots of those of an optimizer's parameters that take part."""
        slots = list(model.adapter.slots_of(optimizer))
        is_chosen = model.is_chosen
        if new := [slot for slot in slots if slot not in is_chosen]:
            if model.has_lazy:
                model.has_lazy = self._check_filter(model.adapter)
            is_chosen |= {slot: self.parameter_filter.matches(slot) for slot in new}
            self.check_slots(trainer, model.adapter, _not_lazy(new))
            # A lazy layer that has not been used yet is asked for again.
            model.is_chosen = {slot: chosen for slot, chosen in is_chosen.items() if slot.ndim is not None}
        return [slot for slot in slots if is_chosen[slot]]


def _warn_of_old_pytorch_lightning(callback: str) -> None:
    """Warn if pytorch_lightning is loaded, in a release whose Trainer fails with callbacks of lightning."""
    version = getattr(sys.modules.get("pytorch_lightning"), "__version__", "")
    if (numbers := re.match(r"(\d+)\.(\d+)", str(version))) and tuple(map(int, numbers.groups())) < (2, 6):
        rank_zero_warn(
            f"{callback}: pytorch_lightning {version} is loaded. Before version 2.6, its Trainer fails with callbacks "
            "of lightning (`Expected a parent`): upgrade it (`pip install 'pytorch-lightning>=2.6'`), or use the "
            "Trainer of lightning.pytorch"
        )


def _not_lazy(slots: Iterable[GradientSlot]) -> list[GradientSlot]:
    """Return the slots whose parameters exist: only of those is it known whether they take part."""
    return [slot for slot in slots if slot.ndim is not None]


def _finetunes(callback: Any) -> bool:
    """Return whether a callback unfreezes parameters in the course of a training."""
    # By name, because lightning.pytorch and pytorch_lightning each have a class of their own.
    return any(cls.__name__ == "BaseFinetuning" for cls in type(callback).__mro__)
