"""The callback behind every gradient method: applies it to the stepping optimizer's gradients."""

from collections.abc import Iterable, Sequence
from itertools import dropwhile, takewhile
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from typing_extensions import override

from lightning_znorm.callbacks.folders import short_key
from lightning_znorm.callbacks.gradient_callback import GradientCallback, ModelState
from lightning_znorm.callbacks.gradient_monitor import GradientMonitor
from lightning_znorm.callbacks.overlap import is_same_method, shared_names
from lightning_znorm.functional import is_attached
from lightning_znorm.gradients import GradientMethod, transform_gradients_
from lightning_znorm.gradients.adapters import GradientAdapter
from lightning_znorm.gradients.amp import found_inf, take_over_scale_
from lightning_znorm.gradients.apply import check_finite
from lightning_znorm.gradients.arguments import checked_flag
from lightning_znorm.gradients.methods import describe
from lightning_znorm.gradients.optimizers import takes_two_steps, wrapped_by
from lightning_znorm.gradients.slots import GradientSlot


class GradientTransform(GradientCallback):
    """Applies a gradient method before every optimizer step, right before gradient clipping.

    In the Trainers of ``lightning.pytorch`` and ``pytorch_lightning``, both from 2.6 on.

    Works with automatic and manual optimization, any number of optimizers (only the stepping one's gradients change),
    accumulation, and the precisions 32, 64, bf16 and 16, true and mixed: the method always sees the true, unscaled
    gradients, and a step that a ``GradScaler`` skips stays skipped.

    Several of these callbacks compose in the order of the list, with a warning if they share parameters; the same
    method twice for the same parameters is refused. What runs later in the step (the module's own
    ``on_before_optimizer_step``, ``gradient_clip_val``) sees the transformed gradients. In manual optimization,
    ``self.clip_gradients`` comes before the step: the method undoes it.

    A step of the extra epoch in which :class:`~lightning.pytorch.callbacks.StochasticWeightAveraging` updates batch
    normalization, without backward passes, would repeat gradients that are transformed already: they are dropped. Two
    optimizers that share a parameter and step after the same backward pass are no such case: the second one sees the
    gradient transformed twice.

    Under strategies that shard gradients (FSDP, ``ModelParallelStrategy`` with FSDP2 and tensor parallelism, and
    DeepSpeed), an :class:`~lightning_znorm.gradients.AffineMethod` works with the statistics of whole gradients, which
    are never gathered; a function is refused, because it would see parts.

    Gradients of steps outside training (in ``on_fit_start``, in a ``test_step`` that adapts the model, after ``fit``)
    are transformed as those of training are.

    Note:
        Not seen by this callback: steps that bypass Lightning (``self.optimizers(use_pl_optimizer=False)``); gradients
        that an optimizer uses up in the backward pass, or fills itself in ``step``; and runs of ``Tuner.lr_find`` and
        ``Tuner.scale_batch_size``, which drop all callbacks, so that a learning rate they find is not one for the
        transformed gradients. A warning tells of the first two, and of chosen parameters that are frozen or in no
        optimizer, after ten steps, or after the epoch if it has fewer.

    Args:
        method: A :class:`~lightning_znorm.gradients.AffineMethod`, or a function from a gradient to its replacement of
            the same shape.
        include: Shell-style pattern or patterns; a parameter takes part if its name in the LightningModule matches one.
        exclude: Pattern or patterns whose matches are left alone.
        min_ndim: Least number of dimensions of a parameter; 2 leaves biases and normalization scales alone.
        allow_untested_strategy: Whether to trust, with a warning, that a strategy that is none of Lightning's tested
            ones, such as a subclass, leaves gradients where the class of Lightning's that it derives from does; or, if
            it derives from none of them, in the ``grad`` of each parameter.
        error_if_nonfinite: Whether to raise, before the update and on all processes, if a gradient that the optimizer
            is about to use holds an inf or NaN after the method, also one that is left out (unless it is sparse or of 8
            bits). Costs a pass over the gradients and one wait for the device at each step. A step that a
            ``GradScaler`` is going to skip is no error. By default they pass, as in
            :func:`torch.nn.utils.clip_grad_norm_`.

    Raises:
        TypeError: If ``method`` is no method, or another argument of another type; in a step, if the shift and scale of
            an affine method do not fit the statistics.
        MisconfigurationException: Before training, if the strategy is not supported, or shards gradients and ``method``
            is a function; if another callback does the same to one of the parameters; or if another Trainer is using
            this callback.
        ValueError: Before training, if a pattern matches no parameter or nothing is chosen, or if there are patterns
            and an optimizer steps parameters that the LightningModule does not register, which have no names.
        UnsupportedGradientError: Before a step, if a gradient is sparse, of 8 bits, or sharded in an unknown way.
        NonFiniteGradientError: Before a step, if a gradient holds an inf or NaN and ``error_if_nonfinite`` is set.

    Example:
        A method of one's own (root mean square normalization) for all weights but the last layer's:

        >>> from lightning_znorm import GradientTransform
        >>> from lightning_znorm.gradients import AffineMethod
        >>> class RMSNorm(AffineMethod):
        ...     def affine(self, stats):
        ...         return None, (stats.std.square() + stats.mean.abs().square()).rsqrt()
        >>> callback = GradientTransform(RMSNorm(), exclude="*.fc.*", min_ndim=2)
    """

    _verb = "transformed"
    _way_out = (
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
        self._description = describe(method)
        self._overlaps: set[int] = set()  # callbacks of which a warning has told

    @property
    @override
    def state_key(self) -> str:
        return short_key(self._generate_state_key(**self.state_dict()))

    @override
    def state_dict(self) -> dict[str, Any]:
        # Nothing that a resumed run needs; but Lightning warns of a run that is resumed without a callback that has a
        # state, and refuses two callbacks with the same one. A method must not vanish, or work twice, without a word.
        return {
            "method": self._description,
            "include": list(self._filter.include),
            "exclude": list(self._filter.exclude),
            "min_ndim": self._filter.min_ndim,
        }

    @property
    @override
    def _required_method(self) -> GradientMethod:
        return self.method

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        # A monitor shows gradients as they are before anything is made of them, wherever in the list it stands.
        callbacks: Any = getattr(trainer, "callbacks", ())
        for monitor in dropwhile(lambda callback: callback is not self, callbacks):
            if isinstance(monitor, GradientMonitor):
                monitor._look_ahead(trainer, pl_module, optimizer)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._overlaps = set()
        super().on_train_start(trainer, pl_module)
        if trainer.gradient_clip_val:
            rank_zero_info(
                f"{self._name}: gradient clipping (gradient_clip_val={trainer.gradient_clip_val}) follows and bounds "
                "the transformed gradients."
            )
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                rank_zero_warn(
                    f"{self._name}: LBFGS searches along the true gradient, and builds its curvature from it. With "
                    f"{self._description} it takes steps that the loss does not confirm, and may diverge."
                )
            if takes_two_steps(optimizer) and not self._is_served(optimizer):
                rank_zero_warn(
                    f"{self._name}: {type(optimizer).__name__} climbs along one gradient and descends along another, "
                    "in steps of its own that Lightning does not see, and its `step` climbs along gradients that are "
                    "transformed already. examples/sam.py shows how to climb along the true gradient and to transform "
                    "the one of the descent."
                )

    @override
    def _is_served(self, optimizer: Optimizer) -> bool:
        return any(map(is_attached, (optimizer, *wrapped_by(optimizer))))

    @override
    def _check_slots(self, trainer: pl.Trainer, adapter: GradientAdapter, slots: Iterable[GradientSlot]) -> None:
        """Look also at what callbacks before this one do to the same parameters.

        Raises:
            MisconfigurationException: If it is the same.
        """
        slots = list(slots)
        super()._check_slots(trainer, adapter, slots)
        callbacks: Any = getattr(trainer, "callbacks", ())
        for other in takewhile(lambda callback: callback is not self, callbacks):
            if not isinstance(other, GradientTransform):
                continue
            shared = shared_names(self._filter, other._filter, slots)
            if not shared:
                continue
            listed = shared[0] + (f" and {len(shared) - 1} more" if len(shared) > 1 else "")
            if is_same_method(self.method, other.method):
                raise MisconfigurationException(
                    f"{self._name} with {self._description} would do again what {other._name} with "
                    f"{other._description}, before it in the list of callbacks, does to the gradients of {listed}: "
                    "take one of them out, or give each parameters of its own (include, exclude, min_ndim)"
                )
            if id(other) not in self._overlaps:
                self._overlaps.add(id(other))
                rank_zero_warn(
                    f"{self._name} transforms what {other._name}, before it in the list of callbacks, has made of the "
                    f"gradients of {listed}: the result is neither method's. To compare them, use one at a time."
                )

    @override
    def _before_step(
        self,
        trainer: pl.Trainer,
        model: ModelState,
        optimizer: Optimizer,
        scaler: GradScaler | None,
        repeated: bool,
    ) -> Iterable[GradientSlot] | None:
        loss_scale = model.adapter.loss_scale() if scaler is None else take_over_scale_(scaler, optimizer)
        slots = self._slots(trainer, model, optimizer)
        if repeated:
            for slot in slots:
                slot.clear()
            return None
        grads = transform_gradients_(slots, self.method, loss_scale)
        # Where the optimizer divides by a scale itself, it also looks for inf and NaN itself, and skips the step.
        if self.error_if_nonfinite and loss_scale is None:
            own_scaler = getattr(trainer.precision_plugin, "scaler", None)
            check_finite(model.adapter.slots_of(optimizer), found_inf(own_scaler, optimizer), trainer.global_step)
        return (slot for slot, grad in zip(slots, grads, strict=True) if grad is not None)
