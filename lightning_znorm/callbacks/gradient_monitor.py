"""Shows gradients as they are before anything is made of them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from typing_extensions import override

from lightning_znorm.callbacks.folders import run_folder
from lightning_znorm.callbacks.gradient_callback import GradientCallback, ModelState
from lightning_znorm.callbacks.gradient_transform import GradientTransform
from lightning_znorm.callbacks.pictures import log_picture
from lightning_znorm.callbacks.sigma_history import SigmaHistory
from lightning_znorm.callbacks.step_watch import unwrapped
from lightning_znorm.gradients import GradientMethod, ZScore
from lightning_znorm.gradients.amp import scale_of
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
    distribution by depth. They hold at most 512 steps, evenly spaced.

    The gradients are those of :class:`GradientTransform`: complete, of the stepping optimizer alone, without loss
    scale, whole where a strategy shards them, and before the callbacks that transform them, in front of which this one
    puts itself in the Trainer's list. They are not changed. In manual optimization, ``self.clip_gradients`` comes
    before.

    Steps outside training, such as those of a ``test_step`` that adapts the model, are not shown.

    Note:
        A measurement reads the gradients twice, and is one copy from the device to the host; two small sums travel for
        each process group where gradients are sharded. Other steps cost nothing.

    Source: the argument from the deviation by depth is that of Yun, "ZNorm: Z-Score Gradient Normalization",
    arXiv 2408.01215; the cosine follows from its Theorem 4.2.

    Args:
        per_parameter: Whether to log ``grad_sigma/NAME``, and likewise ``mean``, ``norm``, ``znorm_norm``, ``cosine``
            and ``sigma_over_running``, of each parameter as well.
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
        ValueError: If the threshold or ``eps`` is no number from 0 on; before training, if a pattern matches no
            parameter or nothing is chosen, or if there are patterns and an optimizer steps parameters that the
            LightningModule does not register, which have no names.
        UnsupportedGradientError: Before a step, if a gradient is sparse, or sharded in an unknown way.

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
        if not sigma_threshold >= 0:
            raise ValueError(f"sigma_threshold must be a number from 0 on, got {sigma_threshold!r}")
        self.per_parameter = per_parameter
        self.sigma_threshold = sigma_threshold
        self.eps = ZScore(eps).eps
        self.prefix = prefix
        self._history = SigmaHistory()
        self._folder = Path()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(prefix=self.prefix)

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
        self._folder = Path(run_folder(trainer)) / "gradients"  # here, where every process is
        self._step_forward(trainer)

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
        for place in model.source.places():  # in the model's order, which an optimizer's need not be
            if self._filter.matches(place):
                self._history.register(place.names[0], place.ndim or 0)

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
        places, stats = measure_places(
            self._places(trainer, model, optimizer), model.source.loss_scale() if scaler is None else scale_of(scaler)
        )
        summary = GradientSummary(stats, self.eps)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # as Lightning counts them for its own logs
        rows = [self._history.register(place.names[0], place.ndim or 0) for place in places]
        ratio = self._history.add(step, rows, summary.sigma, summary.is_finite)
        optimizers = [unwrapped(one) for one in trainer.optimizers]
        number = f"/{optimizers.index(optimizer)}" if len(optimizers) > 1 else ""
        metrics = {f"{self.prefix}{number}/{name}": value for name, value in self._aggregates(summary, ratio).items()}
        if self.per_parameter:
            for name, values in _of_each(summary, ratio).items():
                for place, value in zip(places, values.tolist(), strict=True):
                    metrics[f"{self.prefix}_{name}/{place.names[0]}"] = value
        trainer.callback_metrics.update(
            {name: torch.tensor(value, dtype=torch.float32) for name, value in metrics.items()}
        )
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        return places

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._draw(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        try:
            # A training that fails is one whose gradients are worth looking at.
            self._draw(trainer)
        finally:
            super().on_exception(trainer, pl_module, exception)

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

    def _step_forward(self, trainer: Any) -> None:
        """Puts this callback in front of those that transform gradients."""
        callbacks = trainer.callbacks
        place = callbacks.index(self)
        first = next((i for i, callback in enumerate(callbacks) if isinstance(callback, GradientTransform)), place)
        if first < place:
            # Another list, because the Trainer is going through this one.
            trainer.callbacks = [*callbacks[:first], self, *callbacks[first:place], *callbacks[place + 1 :]]
            rank_zero_info(
                f"{self._name} goes in front of {type(callbacks[first]).__name__} in the Trainer's callbacks: it shows "
                "gradients as they are before that transforms them."
            )

    def _draw(self, trainer: pl.Trainer) -> None:
        if not self._history.steps or not trainer.is_global_zero or _is_trial(trainer):
            return
        from lightning_znorm.callbacks.sigma_plots import by_depth, heat_map

        self._folder.mkdir(parents=True, exist_ok=True)
        for name, draw in (("sigma_over_steps", heat_map), ("sigma_by_depth", by_depth)):
            picture = draw(self._history)
            picture.save(self._folder / f"{self.prefix.replace('/', '_')}_{name}.png")
            log_picture(trainer, f"{self.prefix}/{name}", picture)


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
