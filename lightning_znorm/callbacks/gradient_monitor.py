"""Shows gradients as they are before anything is made of them."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from typing_extensions import override

from lightning_znorm.callbacks.folders import run_folder, short_key
from lightning_znorm.callbacks.gradient_callback import GradientCallback, ModelState
from lightning_znorm.callbacks.pictures import log_picture
from lightning_znorm.callbacks.sigma_history import SigmaHistory
from lightning_znorm.callbacks.step_watch import unwrapped
from lightning_znorm.errors import ZNormTypeError, ZNormValueError
from lightning_znorm.gradients import GradientMethod, ZScore
from lightning_znorm.gradients.amp import scale_of
from lightning_znorm.gradients.arguments import checked_flag, checked_number, shown
from lightning_znorm.gradients.measure import measure_places
from lightning_znorm.gradients.places import Place
from lightning_znorm.gradients.summary import GradientSummary


class GradientMonitor(GradientCallback):
    r"""Logs and draws the gradients of any optimizer: their size, spread and noise, with ZNorm or without.

    At the steps at which the Trainer logs (``log_every_n_steps``), before the update, it measures the gradient of every
    parameter and logs these aggregates. With :math:`n`, :math:`\mu` and :math:`\sigma` the number of elements, mean and
    population deviation of one tensor's gradient, and medians, least values and shares over those tensors of several
    elements whose gradients are finite:

    ==================================  ===============================================================================
    ``grad/norm``                       norm of all gradients, :math:`\sqrt{\sum n (\sigma^2 + \mu^2)}`
    ``grad/znorm_norm``                 that of what ZNorm makes of them, :math:`\sqrt{\sum n\sigma^2/(\sigma +
                                        \epsilon)^2}`
    ``grad/mean_abs_median``            of :math:`|\mu|`
    ``grad/sigma_median``, ``_min``     of :math:`\sigma`
    ``grad/cosine_median``, ``_min``    of the cosine between g and its z-score, :math:`\sigma/\sqrt{\sigma^2 + \mu^2}`
    ``grad/sigma_over_running_median``  of :math:`\sigma` over its running mean: an exponential one over the
                                        measurements before, with weight 0.9 for the past
    ``grad/share_below``                share of tensors with :math:`\sigma` below ``sigma_threshold``
    ``grad/nonfinite``                  number of tensors with an inf or NaN, or whose squared deviations overflow
    ==================================  ===============================================================================

    Gradients that are not finite make the two norms NaN or inf, and are left out of the others. Where no tensor is
    left, those are NaN. Several optimizers are told apart by their numbers: ``grad/0/norm``, ``grad/1/norm``. All of
    these are in ``trainer.callback_metrics`` too, so that a checkpoint or early stopping can follow them.

    When training ends, fails or is interrupted, two pictures go to ``gradients`` beside the logs and to each
    TensorBoard or Weights & Biases logger there is: :math:`\sigma` of every parameter over the steps, and its
    distribution by depth. They hold at most 512 steps, evenly spaced. Without a logger they go to the Trainer's
    ``default_root_dir``, and nowhere if that is the default one.

    The gradients are those of :class:`GradientTransform`: complete, of the stepping optimizer alone, without loss
    scale, whole where a strategy shards them, and as they are before this package's callbacks transform them, wherever
    this one stands in the Trainer's list. They are not changed. In manual optimization, ``self.clip_gradients`` comes
    before.

    There is one row a step and optimizer: of the evaluations of an optimizer that calls its closure several times
    (LBFGS), and of several steps of one optimizer in a batch, the first. Steps outside training, such as those of a
    ``test_step`` that adapts the model, are not shown.

    Note:
        A measurement reads the gradients twice, and is one copy from the device to the host; two small sums travel for
        each process group where gradients are sharded. Other steps cost nothing.

    Source: the argument from the deviation by depth is that of Yun, "ZNorm: Z-Score Gradient Normalization",
    arXiv 2408.01215; the cosine follows from its Theorem 4.2.

    Args:
        per_parameter: Whether to log ``grad_sigma/NAME``, and likewise ``mean``, ``norm``, ``znorm_norm``, ``cosine``
            and ``sigma_over_running``, of each parameter as well. Those of a parameter that several optimizers step
            are told apart by their numbers: ``grad_sigma/0/NAME``, ``grad_sigma/1/NAME``.
        sigma_threshold: Of ``grad/share_below``; by default Adam's ``eps``, below which Adam's own steps shrink.
        eps: That of the ZNorm that ``grad/znorm_norm`` is about.
        include: Shell-style pattern or patterns; a parameter takes part if its name in the LightningModule matches one.
        exclude: Pattern or patterns whose matches are left out.
        min_ndim: Least number of dimensions of a parameter; 2 leaves out biases and normalization scales.
        prefix: What names begin with in place of ``grad``, to tell several monitors apart.
        allow_untested_strategy: See :class:`GradientTransform`.

    Raises:
        MisconfigurationException: Before training, if the strategy is not supported, or another Trainer is using this
            callback.
        TypeError: If an argument is of another type.
        ValueError: If the threshold or ``eps`` is no finite number from 0 on, or the prefix is empty; before training,
            if a pattern matches no parameter or nothing is chosen, or if there are patterns and an optimizer steps
            parameters that the LightningModule does not register, which have no names.
        UnsupportedGradientError: Before a step, if a gradient is sparse, of 8 bits, or sharded in an unknown way.

    Warns:
        UserWarning: Once, if the Trainer logs none of the training's steps: at its start, if they are known to be fewer
            than ``log_every_n_steps``, or else at its end.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_znorm import GradientMonitor
        >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[GradientMonitor()])
    """

    _verb = "shown"
    _way_out = (
        "In manual optimization, step the optimizers that `self.optimizers()` returns, not past Lightning "
        "(`use_pl_optimizer=False`, `.optimizer.step()`)."
    )

    def __init__(
        self,
        per_parameter: bool = False,
        sigma_threshold: float = 1e-8,
        eps: float = 1e-10,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        min_ndim: int = 0,
        prefix: str = "grad",
        allow_untested_strategy: bool = False,
    ) -> None:
        super().__init__(include, exclude, min_ndim, allow_untested_strategy)
        if not isinstance(prefix, str):
            raise ZNormTypeError(f"prefix must be a string, got {shown(prefix)}")
        if not prefix:
            raise ZNormValueError("prefix must not be empty, for it is what tells these metrics from others")
        self.per_parameter = checked_flag("per_parameter", per_parameter)
        self.sigma_threshold = checked_number("sigma_threshold", sigma_threshold)
        self.eps = ZScore(eps).eps
        self.prefix = prefix
        self._history = SigmaHistory()
        self._folder: Path | None = None
        self._steps_before = 0  # of this training, in which a checkpoint may have been made
        self._has_warned = False
        self._shown: set[int] = set()  # numbers of the optimizers that have been shown in this batch
        self._has_looked = False  # before its turn, for a GradientTransform in front of it

    @property
    @override
    def state_key(self) -> str:
        return short_key(self._generate_state_key(prefix=self.prefix))

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._history.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history.load_state_dict(state_dict)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        # Without a logger, Lightning makes the folder that a program is run in the Trainer's; nobody has named it.
        has_folder = bool(trainer.loggers) or trainer.default_root_dir != os.getcwd()
        self._folder = Path(run_folder(trainer)) / "gradients" if has_folder else None  # here, where every process is
        if not has_folder and not _is_trial(trainer):
            rank_zero_info(
                f"{self._name} draws no pictures, as the Trainer has neither a logger nor a default_root_dir of its "
                "own. Its numbers are in trainer.callback_metrics."
            )

    @property
    @override
    def _required_method(self) -> GradientMethod:
        return ZScore()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self._history = SigmaHistory()
        model = self._model_of(trainer, pl_module)
        owners = _owners(trainer, model)
        for place in model.source.places():  # in the model's order, which an optimizer's need not be
            if self._filter.matches(place):
                for number in owners[place.names[0]] or [0]:
                    self._history.register(_row(place, owners, number), place.ndim or 0)
        self._steps_before, self._has_warned = _step(trainer), False
        if not self._history.steps and not _is_trial(trainer):
            self._warn_of_few_steps(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._has_looked = False
        self._shown.clear()

    def _look_ahead(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradients before the turn of this callback, for a callback in front of it that changes them."""
        if not self._has_looked:
            self.on_before_optimizer_step(trainer, pl_module, optimizer)
            self._has_looked = True

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._has_looked:
            self._has_looked = False
        else:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def _before_step(
        self,
        trainer: pl.Trainer,
        model: ModelState,
        optimizer: Optimizer,
        scaler: GradScaler | None,
        repeated: bool,
    ) -> Iterable[Place] | None:
        logs = trainer._logger_connector.should_update_logs or _is_trial(trainer)
        if repeated or not logs or not self._is_training(trainer):
            return None
        optimizers = [unwrapped(one) for one in trainer.optimizers]
        number = optimizers.index(optimizer) if len(optimizers) > 1 else 0
        if number in self._shown:
            return None
        self._shown.add(number)
        places, stats = measure_places(
            self._places(trainer, model, optimizer), model.source.loss_scale() if scaler is None else scale_of(scaler)
        )
        summary = GradientSummary(stats, self.eps)
        step = _step(trainer)
        owners = _owners(trainer, model)
        rows = [self._history.register(_row(place, owners, number), place.ndim or 0) for place in places]
        ratio = self._history.add(step, rows, summary.sigma, summary.is_finite)
        infix = f"/{number}" if len(optimizers) > 1 else ""
        metrics = {f"{self.prefix}{infix}/{name}": value for name, value in self._aggregates(summary, ratio).items()}
        if self.per_parameter:
            for name, values in _of_each(summary, ratio).items():
                for place, value in zip(places, values.tolist(), strict=True):
                    own = place.names[0]
                    metrics[f"{self.prefix}_{name}{infix if len(owners[own]) > 1 else ''}/{own}"] = value
        trainer.callback_metrics.update(
            {name: torch.tensor(value, dtype=torch.float32) for name, value in metrics.items()}
        )
        for logger in trainer.loggers:
            logger.log_metrics(metrics=metrics, step=step)  # by the names that Lightning's own calls use
        return places

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not self._history.steps and not self._has_warned and not _is_trial(trainer):
            self._warn_of_no_logged_step(trainer)
        self._draw(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        try:
            # A training that fails is one whose gradients are worth looking at.
            self._draw(trainer)
        finally:
            super().on_exception(trainer, pl_module, exception)

    def _warn_of_few_steps(self, trainer: pl.Trainer) -> None:
        """Warn before a training none of whose steps is going to be logged, as far as that is known."""
        every, steps = _every(trainer), trainer.estimated_stepping_batches
        if every == 0:
            reason, way_out = "log_every_n_steps=0 logs no step", "1 or more"
        elif 0 < steps < every:
            reason = f"log_every_n_steps={every} is more than the number of this training's steps, {steps}"
            way_out = f"{steps} or less"
        else:
            return
        self._has_warned = True
        rank_zero_warn(f"{self._name} will measure nothing, as {reason}: set that to {way_out}")

    def _warn_of_no_logged_step(self, trainer: pl.Trainer) -> None:
        """Warn after a training none of whose steps has been logged."""
        before, last, every = self._steps_before, _step(trainer), _every(trainer)
        if last > before and last // every == before // every:
            rank_zero_warn(
                f"{self._name} has measured nothing, as log_every_n_steps={every} logs none of the steps {before + 1} "
                f"to {last}: set that to {last - before} or less"
            )

    def _aggregates(self, summary: GradientSummary, ratio: Tensor) -> dict[str, float]:
        chosen = summary.is_finite & summary.has_deviation
        sigma, cosine = summary.sigma[chosen], summary.cosine[chosen]
        below = (sigma < self.sigma_threshold).double()
        return {
            "norm": float(torch.linalg.vector_norm(summary.norm)),
            "znorm_norm": float(torch.linalg.vector_norm(summary.znorm_norm)),
            "mean_abs_median": _median(summary.mean[chosen].abs()),
            "sigma_median": _median(sigma),
            "sigma_min": _min(sigma),
            "cosine_median": _median(cosine),
            "cosine_min": _min(cosine),
            "sigma_over_running_median": _median(ratio[chosen]),
            "share_below": float(below.mean()),
            "nonfinite": float((~summary.is_finite).sum()),
        }

    def _draw(self, trainer: pl.Trainer) -> None:
        if self._folder is None or not self._history.steps or not trainer.is_global_zero or _is_trial(trainer):
            return
        from lightning_znorm.callbacks.sigma_plots import by_depth, heat_map

        self._folder.mkdir(parents=True, exist_ok=True)
        for name, draw in (("sigma_over_steps", heat_map), ("sigma_by_depth", by_depth)):
            picture = draw(self._history)
            picture.save(self._folder / f"{short_key(self.prefix.replace('/', '_'))}_{name}.png")
            log_picture(trainer, f"{self.prefix}/{name}", picture)


def _owners(trainer: pl.Trainer, model: ModelState) -> defaultdict[str, list[int]]:
    """The numbers of the optimizers that step a parameter of a name, for each name.

    Where there are several, it is one parameter, or different ones that have no other names than their numbers.
    """
    owners: defaultdict[str, list[int]] = defaultdict(list)
    for number, optimizer in enumerate(map(unwrapped, trainer.optimizers)):
        for place in model.source.places_of(optimizer):
            if number not in owners[place.names[0]]:
                owners[place.names[0]].append(number)
    return owners


def _row(place: Place, owners: defaultdict[str, list[int]], number: int) -> str:
    """What a parameter is called in the pictures."""
    name = place.names[0]
    return f"{name} (optimizer {number})" if len(owners[name]) > 1 else name


def _step(trainer: Any) -> int:
    """Number of the step that is about to be taken, as Lightning counts them for its own logs."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def _every(trainer: Any) -> int:
    """Number of steps of which the Trainer logs one."""
    return int(trainer.log_every_n_steps)


def _of_each(summary: GradientSummary, ratio: Tensor) -> dict[str, Tensor]:
    return {
        "mean": summary.mean.abs() if summary.mean.is_complex() else summary.mean,
        "sigma": summary.sigma,
        "norm": summary.norm,
        "znorm_norm": summary.znorm_norm,
        "cosine": summary.cosine,
        "sigma_over_running": ratio,
    }


def _is_trial(trainer: Any) -> bool:
    """Whether this is a run of few batches that logs every step and leaves nothing behind."""
    return bool(trainer.fast_dev_run)


def _median(values: Tensor) -> float:
    values = values[~values.isnan()]
    return float(values.quantile(0.5)) if len(values) else torch.nan


def _min(values: Tensor) -> float:
    values = values[~values.isnan()]
    return float(values.min()) if len(values) else torch.nan
