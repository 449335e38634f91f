"""The callback that applies a gradient method to the gradients of the stepping optimizer."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import dropwhile, takewhile
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_znorm.arguments import checked_flag, listed
from lightning_znorm.callbacks.base import GradientCallback
from lightning_znorm.callbacks.folders import short_key
from lightning_znorm.callbacks.monitor import GradientMonitor
from lightning_znorm.callbacks.padding_rows import with_padding_row
from lightning_znorm.callbacks.representation import represented
from lightning_znorm.callbacks.steps import Step
from lightning_znorm.functional import is_attached
from lightning_znorm.gradients import AffineMethod, GradientMethod, transform_slots_
from lightning_znorm.gradients.adapters import GradientAdapter
from lightning_znorm.gradients.amp import found_inf
from lightning_znorm.gradients.apply import check_finite
from lightning_znorm.gradients.methods import describe, is_zscore
from lightning_znorm.gradients.optimizers import takes_two_steps, wrapped_by
from lightning_znorm.gradients.slots import GradientSlot, ParameterFilter
from lightning_znorm.gradients.step_sizes import StepSizes

OPTIONS = {
    "include": "parameter_filter.include",
    "exclude": "parameter_filter.exclude",
    "min_ndim": "parameter_filter.min_ndim",
    "allow_untested_strategy": "allow_untested_strategy",
    "error_if_nonfinite": "error_if_nonfinite",
}
"""Where these callbacks keep the options that they share."""


class GradientTransform(GradientCallback):
    """Apply a gradient method before every optimizer step, right before gradient clipping.

    The Trainer may be that of ``lightning.pytorch`` or of ``pytorch_lightning``, version 2.6 or later.

    The callback works with automatic and manual optimization, several optimizers (only the gradients of the stepping
    one change), accumulation, and the precisions 32, 64, bf16 and 16, true and mixed. The method always sees the true,
    unscaled gradients. A step that a ``GradScaler`` skips stays skipped.

    Several of these callbacks apply their methods in the order of the list. A warning says if they share parameters;
    the same method twice for the same parameters is refused. What runs later in the step (the module's own
    ``on_before_optimizer_step``, ``gradient_clip_val``) sees the transformed gradients. In manual optimization,
    ``self.clip_gradients`` runs before the step, so that the method undoes it.

    :class:`~lightning.pytorch.callbacks.StochasticWeightAveraging` updates batch normalization in an extra epoch
    without backward passes. Its steps would use gradients that are transformed already; these gradients are dropped.
    If two optimizers share a parameter and step after the same backward pass, the second one steps with a gradient that
    was transformed twice.

    Some strategies shard gradients: FSDP, ``ModelParallelStrategy`` with FSDP2 and tensor parallelism, and DeepSpeed.
    There, an :class:`~lightning_znorm.gradients.AffineMethod` works with the statistics of whole gradients, which are
    never gathered. A function is refused, because it would see parts of them.

    Steps outside training (in ``on_fit_start``, in a ``test_step`` that adapts the model, after ``fit``) are treated
    like those of training.

    Note:
        This callback does not see steps that bypass Lightning (``self.optimizers(use_pl_optimizer=False)``), and
        gradients that an optimizer uses up in the backward pass or fills itself in ``step``. A warning says so after
        ten steps, or after the first epoch if it is shorter; it also names chosen parameters that are frozen or in no
        optimizer. ``Tuner.lr_find`` and ``Tuner.scale_batch_size`` run without callbacks: the learning rate that they
        find is not one for transformed gradients.

    Args:
        method: An ``AffineMethod``, or a function from a gradient to its replacement of the same shape.
        include: Shell-style pattern or patterns; a parameter takes part if its name in the LightningModule matches one.
        exclude: Pattern or patterns whose matches are left alone.
        min_ndim: Least number of dimensions of a parameter; 2 leaves biases and normalization scales alone.
        allow_untested_strategy: Whether to trust, with a warning, a strategy that is not one of Lightning's tested
            ones, such as a subclass. It must leave gradients where the strategy of Lightning does that it derives from,
            or, if it derives from none, in the ``grad`` of each parameter.
        error_if_nonfinite: Whether to raise, before the update and on all processes, if a gradient that the optimizer
            is about to use holds an inf or NaN after the method. Parameters that do not take part are checked too,
            unless their gradients are sparse or of 8 bits. The check costs a pass over the gradients and one wait for
            the device at each step. A step that a ``GradScaler`` is going to skip is no error. By default, inf and NaN
            pass, as in ``torch.nn.utils.clip_grad_norm_``.

    Raises:
        TypeError: If ``method`` is not a method, or another argument has the wrong type; in a step, if the shift and
            scale of an affine method do not fit the statistics.
        MisconfigurationException: Before training, if the strategy is not supported; if it shards gradients and
            ``method`` is a function; if another callback applies the same method to one of the parameters; or if
            another Trainer is using this callback.
        ValueError: Before training, if a pattern matches no parameter or nothing is chosen; or if there are patterns,
            and an optimizer steps parameters without names, because the LightningModule does not register them.
        UnsupportedGradientError: Before a step, if a gradient is sparse, of 8 bits, or sharded in an unknown way.
        NonFiniteGradientError: Before a step, if a gradient holds an inf or NaN and ``error_if_nonfinite`` is set.

    Warns:
        UserWarning: Once for each optimizer, if the method is ZNorm or SING, and steps of SGD would be larger than half
            the weights that they move: before the first step, or when the learning rate has grown so far. Where weights
            are sharded, the first process judges by its own part. Once, if the method is ZNorm and the weight of an
            embedding with a padding row takes part: that row would not stay as it is.

    Example:
        A method of one's own (root mean square normalization) for all weights but the last layer's:

        >>> from lightning_znorm import GradientTransform
        >>> from lightning_znorm.gradients import AffineMethod
        >>> class RMSNorm(AffineMethod):
        ...     def affine(self, stats):
        ...         return None, (stats.std.square() + stats.mean.abs().square()).rsqrt()
        >>> callback = GradientTransform(RMSNorm(), exclude="*.fc.*", min_ndim=2)
    """

    action = "transformed"
    advice = (
        "In manual optimization, step the optimizers that `self.optimizers()` returns; for those stepped past "
        "Lightning (`use_pl_optimizer=False`, `.optimizer.step()`), call `lightning_znorm.functional.attach(optimizer)`"
        " instead."
    )

    def __init__(
        self,
        method: GradientMethod,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        min_ndim: int = 0,
        allow_untested_strategy: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        super().__init__(include, exclude, min_ndim, allow_untested_strategy)
        self.method = method
        self.error_if_nonfinite = checked_flag("error_if_nonfinite", error_if_nonfinite)
        self.description = describe(method)
        self._overlaps: set[int] = set()  # ids of the callbacks that a warning has named
        self._step_sizes: StepSizes | None = None

    def __repr__(self) -> str:
        return represented(self, GradientTransform, {"method": "method", **OPTIONS})

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_step_sizes": None}

    @property
    @override
    def state_key(self) -> str:
        return short_key(self._generate_state_key(**self.state_dict()))

    @override
    def state_dict(self) -> dict[str, Any]:
        # A resumed run needs nothing of this. But Lightning warns if a run is resumed without a callback that had a
        # state, and refuses two callbacks with the same state: a method must not vanish, or work twice, in silence.
        return {
            "method": self.description,
            "include": list(self.parameter_filter.include),
            "exclude": list(self.parameter_filter.exclude),
            "min_ndim": self.parameter_filter.min_ndim,
        }

    @property
    @override
    def applied_method(self) -> GradientMethod:
        return self.method

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        # A monitor shows gradients before any method changes them, wherever it stands in the list.
        callbacks: Any = getattr(trainer, "callbacks", ())
        for monitor in dropwhile(lambda callback: callback is not self, callbacks):
            if isinstance(monitor, GradientMonitor):
                monitor.measure_early(trainer, pl_module, optimizer)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._overlaps = set()
        super().on_train_start(trainer, pl_module)
        self._warn_of_padding_rows(trainer, pl_module)
        self._step_sizes = StepSizes(self.method) if self._decides_gradients(trainer, pl_module) else None
        if trainer.gradient_clip_val:
            rank_zero_info(
                f"{self.label}: gradient clipping (gradient_clip_val={trainer.gradient_clip_val}) runs afterwards and "
                "bounds the transformed gradients."
            )
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                rank_zero_warn(
                    f"{self.label}: LBFGS searches along the true gradient, and builds its curvature from it. With "
                    f"{self.description} it takes steps that the loss does not confirm, and may diverge."
                )
            if takes_two_steps(optimizer) and not self.is_handled_elsewhere(optimizer):
                rank_zero_warn(
                    f"{self.label}: {type(optimizer).__name__} takes two steps: it climbs along one gradient and "
                    "descends along another. Lightning sees neither step, and the climb would use transformed "
                    "gradients. examples/sam.py shows how to transform only the gradient of the descent."
                )

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._step_sizes = None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._step_sizes = None

    @override
    def is_handled_elsewhere(self, optimizer: Optimizer) -> bool:
        return any(map(is_attached, (optimizer, *wrapped_by(optimizer))))

    @override
    def check_slots(self, trainer: pl.Trainer, adapter: GradientAdapter, slots: Iterable[GradientSlot]) -> None:
        """Check also what callbacks before this one do to the same parameters.

        Raises:
            MisconfigurationException: If one of them applies the same method.
        """
        slots = list(slots)
        super().check_slots(trainer, adapter, slots)
        callbacks: Any = getattr(trainer, "callbacks", ())
        for other in takewhile(lambda callback: callback is not self, callbacks):
            if not isinstance(other, GradientTransform):
                continue
            shared = _shared_names(self.parameter_filter, other.parameter_filter, slots)
            if not shared:
                continue
            names = listed(shared, 1)
            if _is_same_method(self.method, other.method):
                raise MisconfigurationException(
                    f"{self.label} with {self.description} would repeat what {other.label} with {other.description}, "
                    f"before it in the list of callbacks, does to the gradients of {names}: remove one of them, or "
                    "give each its own parameters (include, exclude, min_ndim)"
                )
            if id(other) not in self._overlaps:
                self._overlaps.add(id(other))
                rank_zero_warn(
                    f"{self.label} transforms the gradients of {names} after {other.label}, which is before it in the "
                    "list of callbacks: the result belongs to neither method. To compare them, use one at a time."
                )

    @override
    def process_gradients(self, step: Step) -> Iterable[GradientSlot] | None:
        loss_scale = step.take_over_scale_()
        slots = step.slots()
        if step.is_repeat:
            for slot in slots:
                slot.clear()
            return None
        grads = transform_slots_(slots, self.method, loss_scale)
        if self._step_sizes is not None and step.is_training:
            # Frozen parameters stay where they are.
            stepping = [slot for slot, grad in zip(slots, grads, strict=True) if grad is not None]
            self._warn_of_large_steps(self._step_sizes, step, stepping)
        # Where the optimizer divides by a scale itself, it also looks for inf and NaN itself, and skips the step.
        if self.error_if_nonfinite and loss_scale is None:
            scaler = getattr(step.trainer.precision_plugin, "scaler", None)
            found = found_inf(scaler, step.optimizer)
            check_finite(step.adapter.slots_of(step.optimizer), found, step.trainer.global_step)
        return (slot for slot, grad in zip(slots, grads, strict=True) if grad is not None)

    def _warn_of_padding_rows(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of padding rows that the method would move."""
        if not is_zscore(self.method):
            return
        adapter = self.model_of(trainer, pl_module).adapter
        stepped = {slot: None for optimizer in trainer.optimizers for slot in adapter.slots_of(optimizer)}
        chosen = [slot for slot in stepped if self.parameter_filter.matches(slot)]
        if found := list(with_padding_row(pl_module, chosen)):
            rows = listed([f"{name} (padding_idx={number})" for name, number in found])
            names = [name for name, _ in found]
            rank_zero_warn(
                f"{self.label} would train the padding row of {rows}: its gradient is zero, and ZNorm subtracts the "
                "mean of the whole gradient from it, so that the row does not stay as it is. Leave the embedding out: "
                f"exclude={names[0] if len(names) == 1 else names!r}"
            )

    def _decides_gradients(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Return whether the gradients that this callback makes are those that the optimizer will use, but clipped."""
        # A module's own clipping may do anything.
        clips = getattr(type(pl_module), "configure_gradient_clipping", None)
        if not str(getattr(clips, "__module__", "")).startswith(("lightning.pytorch.", "pytorch_lightning.")):
            return False
        callbacks: Any = getattr(trainer, "callbacks", ())
        following = list(dropwhile(lambda callback: callback is not self, callbacks))[1:]
        adapter = self.model_of(trainer, pl_module).adapter
        slots = [slot for optimizer in trainer.optimizers for slot in adapter.slots_of(optimizer)]
        return not any(
            _shared_names(self.parameter_filter, other.parameter_filter, slots)
            for other in following
            if isinstance(other, GradientTransform)
        )

    def _warn_of_large_steps(self, step_sizes: StepSizes, step: Step, slots: Sequence[GradientSlot]) -> None:
        """Warn of steps that are too large for the weights. The first process judges, without asking the others."""
        trainer: Any = step.trainer
        if not trainer.is_global_zero:
            return
        clipping = {"clip_norm": step.adapter.clip_norm()}
        if trainer.gradient_clip_val:
            name = "clip_value" if trainer.gradient_clip_algorithm == "value" else "clip_norm"
            clipping[name] = min(float(trainer.gradient_clip_val), clipping.get(name, math.inf))

        def slots_by_group() -> list[list[GradientSlot]]:
            chosen = set(slots)
            groups = step.adapter.slots_by_group(step.optimizer)
            return [[slot for slot in group if slot in chosen] for group in groups]

        if warning := step_sizes.warning_for(step.optimizer, slots_by_group, **clipping):
            rank_zero_warn(f"{self.label}: {warning}")


def _shared_names(first: ParameterFilter, second: ParameterFilter, slots: Iterable[GradientSlot]) -> list[str]:
    """Return the names of the parameters that both filters choose, one name for each parameter."""
    return [slot.names[0] for slot in slots if first.matches(slot) and second.matches(slot)]


def _is_same_method(first: GradientMethod, second: GradientMethod) -> bool:
    """Return whether two methods are the same, whatever their options."""
    return bool(_kind(first) == _kind(second))


def _kind(method: Any) -> Any:
    if isinstance(method, partial):
        return _kind(method.func)
    return type(method) if isinstance(method, AffineMethod) else method
