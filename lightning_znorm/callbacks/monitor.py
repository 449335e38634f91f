"""The callback that logs and draws gradients as they are before a method changes them."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_znorm.arguments import checked_flag, checked_number, shown
from lightning_znorm.callbacks.base import GradientCallback
from lightning_znorm.callbacks.dominating_means import DOMINATING_SHARE, name_dominating_means
from lightning_znorm.callbacks.drawing import log_picture
from lightning_znorm.callbacks.folders import run_folder, short_key
from lightning_znorm.callbacks.measurement import GradientMeter, logged_step
from lightning_znorm.callbacks.monitor_history import GradientHistory
from lightning_znorm.callbacks.notebook import is_notebook, show_in_notebook
from lightning_znorm.callbacks.representation import represented
from lightning_znorm.callbacks.steps import Step, unwrapped
from lightning_znorm.errors import ZNormRuntimeError, ZNormTypeError, ZNormValueError
from lightning_znorm.gradients import ZScore
from lightning_znorm.gradients.adapters import GradientAdapter
from lightning_znorm.gradients.apply import GradientSummary
from lightning_znorm.gradients.slots import GradientSlot
from lightning_znorm.requirements import missing, needs, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ENOUGH_STEPS = 5  # before the layers are named


class GradientMonitor(GradientCallback):
    r"""Log and draw the gradients of any optimizer: their size, spread and noise, with ZNorm or without.

    At the steps that the Trainer logs (``log_every_n_steps``), before the update, the callback measures the gradient of
    every parameter and logs the aggregates below. There, :math:`n`, :math:`\mu` and :math:`\sigma` are the number of
    elements, the mean and the population standard deviation of one tensor's gradient. Medians, least and greatest
    values and shares are taken over the tensors of several elements whose gradients are finite.

    ==================================  ===============================================================================
    ``grad/norm``                       norm of all gradients, :math:`\sqrt{\sum n (\sigma^2 + \mu^2)}`
    ``grad/znorm_norm``                 norm of all gradients after ZNorm, :math:`\sqrt{\sum n\sigma^2/(\sigma +
                                        \epsilon)^2}`
    ``grad/mean_abs_median``            median of :math:`|\mu|`
    ``grad/sigma_median``, ``_min``     median and least value of :math:`\sigma`
    ``grad/cosine_median``, ``_min``    the same of the cosine of g and its z-score, :math:`\sigma/\sqrt{\sigma^2 +
                                        \mu^2}`
    ``grad/mean_share_median``,         median and greatest value of the share of the mean in the squared gradient,
    ``_max``                            :math:`\mu^2/(\sigma^2 + \mu^2)`: what centring removes
    ``grad/sigma_over_running_median``  median of :math:`\sigma` over its running mean, an exponential mean of the
                                        measurements before, with weight 0.9 for the past
    ``grad/share_below``                share of tensors with :math:`\sigma` below ``sigma_threshold``
    ``grad/nonfinite``                  number of tensors with an inf or NaN, or whose squared deviations overflow
    ==================================  ===============================================================================

    Gradients that are not finite make the two norms NaN or inf, and do not enter the other aggregates. If no tensor
    remains, these are NaN. Several optimizers are told apart by their numbers: ``grad/0/norm``, ``grad/1/norm``. All
    aggregates are in ``trainer.callback_metrics`` too, so that a checkpoint or early stopping can monitor them.

    Parameters where the mean holds more than 0.9 of the squared gradient, over all measurements, are named once: at the
    end of the first epoch after five measured steps, or when training ends. ZNorm with full centring subtracts that
    mean. If a callback of the Trainer does so, it is a warning. Very small tensors are named only after several
    measurements, because in one of them the share is a matter of luck. The means of rows, which Gradient Centralization
    and SING subtract, are not measured.

    When training ends, fails or is interrupted, the callback draws four pictures: :math:`\sigma` of every parameter
    over the steps, its distribution by depth, the share of the mean in every parameter's squared gradient, and what
    ZNorm would change of the step of each layer l. That is its direction, the cosine of g and its z-score, and its
    size compared to the whole step, :math:`(\lVert z_l\rVert / \lVert g_l\rVert) / (\lVert z\rVert / \lVert
    g\rVert)`: how much more of an SGD step the layer gets. Adam divides the size out again, so under Adam the direction
    alone changes. The pictures show at most 512 steps, evenly spaced; the shares are means over all measurements.

    The pictures are written to ``gradients`` beside the logs, and sent to every TensorBoard, Weights & Biases, MLflow
    and Comet logger. Without a logger they are written to the Trainer's ``default_root_dir``; if that is the default
    one too, none is written. A line says where they are. A notebook shows them below the cell, and :meth:`figures`
    returns them. Without matplotlib or Pillow nothing is drawn, and a message at the start of training says so.

    The gradients are those of :class:`GradientTransform`: complete, of the stepping optimizer alone, without loss
    scale, and whole where a strategy shards them. They are measured before this package's callbacks transform them,
    wherever this callback stands in the Trainer's list, and they are not changed. In manual optimization,
    ``self.clip_gradients`` runs before the measurement.

    Each batch has one measurement for each optimizer. Where an optimizer calls its closure several times (LBFGS), or
    steps several times in a batch, this is the first one. Steps outside training, such as those of a ``test_step`` that
    adapts the model, are not measured.

    Note:
        A measurement reads the gradients twice and copies once from the device to the host. Where gradients are
        sharded, the processes exchange two small sums for each process group. Other steps cost nothing.

    Source: the deviation by depth is the argument of Yun, "ZNorm: Z-Score Gradient Normalization", arXiv 2408.01215;
    the cosine follows from its Theorem 4.2.

    Args:
        per_parameter: Whether to log ``mean``, ``sigma``, ``norm``, ``znorm_norm``, ``cosine``, ``mean_share`` and
            ``sigma_over_running`` of each parameter as well, as ``grad_sigma/NAME``. If several optimizers step a
            parameter, their numbers tell the values apart: ``grad_sigma/0/NAME``, ``grad_sigma/1/NAME``.
        sigma_threshold: The threshold of ``grad/share_below``. The default is Adam's ``eps``, below which Adam's own
            steps shrink.
        eps: The ``eps`` of the ZNorm that ``grad/znorm_norm`` and the fourth picture describe.
        include: Shell-style pattern or patterns; a parameter takes part if its name in the LightningModule matches one.
        exclude: Pattern or patterns whose matches are left out.
        min_ndim: Least number of dimensions of a parameter; 2 leaves out biases and normalization scales.
        prefix: What the names begin with instead of ``grad``. It tells several monitors apart.
        allow_untested_strategy: Whether to trust, with a warning, a strategy that is not one of Lightning's tested
            ones, such as a subclass of one, to leave gradients where the tested ones do.

    Raises:
        MisconfigurationException: Before training, if the strategy is not supported, or another Trainer is using this
            callback.
        TypeError: If an argument is of another type.
        ValueError: If the threshold or ``eps`` is negative or not finite, or the prefix is empty; before training, if a
            pattern matches no parameter or nothing is chosen; or if there are patterns, and an optimizer steps
            parameters without names, because the LightningModule does not register them.
        UnsupportedGradientError: Before a step, if a gradient is sparse, of 8 bits, or sharded in an unknown way.

    Warns:
        UserWarning: Once, if the Trainer logs none of the training's steps. The warning comes at the start of training
            if its number of steps is known, and otherwise at its end. Once, if the mean dominates gradients that a
            callback of the Trainer centres.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_znorm import GradientMonitor
        >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[GradientMonitor()])
    """

    action = "shown"
    advice = (
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
            raise ZNormValueError("prefix must not be empty: it tells these metrics from others")
        self.per_parameter = checked_flag("per_parameter", per_parameter)
        self.sigma_threshold = checked_number("sigma_threshold", sigma_threshold, minimum=0, finite=True)
        self.eps = ZScore(eps).eps
        self.prefix = prefix
        self._history = GradientHistory()
        self._folder: Path | None = None
        self._steps_before = 0  # steps before this training, which may resume a checkpoint
        self._has_warned = False
        self._meter = GradientMeter(self.eps)
        self._has_measured_early = False
        self._has_named_means = False
        self._parameters: dict[int, str] = {}  # their names, by their rows in the history

    def __repr__(self) -> str:
        names = ("per_parameter", "sigma_threshold", "eps", "prefix", "allow_untested_strategy")
        chosen = {name: f"parameter_filter.{name}" for name in ("include", "exclude", "min_ndim")}
        return represented(self, GradientMonitor, {**{name: name for name in names}, **chosen})

    def figures(self) -> dict[str, "Figure"]:
        """Return the pictures of what has been measured so far, to restyle, save or show.

        They are drawn anew at each call, during a training too. A notebook shows each of them. If training ran in other
        processes (``strategy="ddp_notebook"``), what was measured is there.

        Returns:
            Figures of matplotlib by name: ``sigma_over_steps``, ``sigma_by_depth``, ``mean_share``, ``znorm_change``.

        Raises:
            RuntimeError: If nothing has been measured yet.
            ImportError: If matplotlib is not installed.

        Example:
            >>> figure = monitor.figures()["znorm_change"]  # doctest: +SKIP
            >>> figure.axes[0].set_title("ResNet-20 on the digits")  # doctest: +SKIP
            >>> figure.savefig("change.pdf")  # doctest: +SKIP
        """
        if not self._history.steps:
            raise ZNormRuntimeError(
                f"{self.label} has measured nothing yet, so there are no figures: train with it first, for at least "
                "log_every_n_steps steps. If the training ran in processes of its own, its pictures are in the folder "
                "`gradients` beside the logs"
            )
        require(f"{self.label}.figures", "matplotlib")
        from lightning_znorm.callbacks.monitor_plots import figures_of

        return figures_of(self._history, DOMINATING_SHARE)

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
        # Without a logger and default_root_dir, Lightning takes the current folder, which nobody has asked for.
        has_folder = bool(trainer.loggers) or trainer.default_root_dir != os.getcwd()
        self._folder = (
            Path(run_folder(trainer)) / "gradients" if has_folder else None
        )  # in `setup`, because all processes must take part
        if absent := missing("matplotlib", "PIL"):
            self._folder = None
            rank_zero_info(f"{self.label} logs its numbers, and draws no pictures. {needs('Drawing', *absent)}")
        elif not has_folder and not _is_fast_dev_run(trainer):
            rank_zero_info(
                f"{self.label} writes no pictures, because the Trainer has neither a logger nor a default_root_dir of "
                "its own. Its method `figures()` returns them after training, and the numbers are in "
                "trainer.callback_metrics."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self._history, self._parameters = GradientHistory(), {}
        model = self.model_of(trainer, pl_module)
        steppers = _steppers(trainer, model.adapter)
        for slot in model.adapter.slots():  # in the order of the model, which may not be the optimizer's
            if self.parameter_filter.matches(slot):
                for number in steppers[slot.names[0]] or [0]:
                    self._history.register(_row(slot, steppers, number), slot.ndim or 0)
        self._steps_before, self._has_warned, self._has_named_means = logged_step(trainer), False, False
        if not self._history.steps and not _is_fast_dev_run(trainer):
            self._warn_of_few_steps(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._has_measured_early = False
        self._meter.start_batch()

    def measure_early(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Measure the gradients before this callback's turn, because a callback in front of it is going to change them.

        Args:
            trainer: The Trainer.
            pl_module: The LightningModule.
            optimizer: The optimizer that is about to step.
        """
        if not self._has_measured_early:
            self.on_before_optimizer_step(trainer, pl_module, optimizer)
            self._has_measured_early = True

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._has_measured_early:
            self._has_measured_early = False
        else:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def process_gradients(self, step: Step) -> Iterable[GradientSlot] | None:
        measurement = self._meter.measure(step)
        if measurement is None:
            return None
        trainer, slots, summary = step.trainer, measurement.slots, measurement.summary
        steppers = _steppers(trainer, step.adapter)
        number = measurement.optimizer_number
        rows = [self._history.register(_row(slot, steppers, number or 0), slot.ndim or 0) for slot in slots]
        ratio = self._history.add(
            measurement.logged_step,
            rows,
            summary.sigma,
            summary.is_finite,
            summary.cosine,
            measurement.relative_size,
        )
        self._history.add_shares(rows, summary.mean_share, summary.count)
        self._parameters |= {row: slot.names[0] for row, slot in zip(rows, slots, strict=True)}
        infix = "" if number is None else f"/{number}"
        metrics = {f"{self.prefix}{infix}/norm": measurement.norm}
        for name, value in self._aggregates(summary, ratio).items():
            metrics[f"{self.prefix}{infix}/{name}"] = value
        if self.per_parameter:
            for name, values in _of_each(summary, ratio).items():
                for slot, value in zip(slots, values.tolist(), strict=True):
                    parameter = slot.names[0]
                    is_shared = len(steppers[parameter]) > 1
                    metrics[f"{self.prefix}_{name}{infix if is_shared else ''}/{parameter}"] = value
        trainer.callback_metrics.update(
            {name: torch.tensor(value, dtype=torch.float32) for name, value in metrics.items()}
        )
        for logger in trainer.loggers:
            logger.log_metrics(metrics=metrics, step=measurement.logged_step)  # by keyword, as Lightning calls it
        return slots

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._history.num_steps >= _ENOUGH_STEPS:
            self._name_means(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._name_means(trainer, pl_module)
        if not self._history.steps and not self._has_warned and not _is_fast_dev_run(trainer):
            self._warn_of_no_logged_step(trainer)
        self._draw(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        try:
            # The gradients of a training that fails are worth a look.
            self._draw(trainer)
        finally:
            super().on_exception(trainer, pl_module, exception)

    def _warn_of_few_steps(self, trainer: pl.Trainer) -> None:
        """Warn before training if it is known that none of its steps will be logged."""
        every, steps = _log_interval(trainer), trainer.estimated_stepping_batches
        if every == 0:
            reason, way_out = "log_every_n_steps=0 logs no step", "1 or more"
        elif 0 < steps < every:
            reason = f"log_every_n_steps={every} is more than the number of this training's steps, {steps}"
            way_out = f"{steps} or less"
        else:
            return
        self._has_warned = True
        rank_zero_warn(f"{self.label} will measure nothing, because {reason}: set it to {way_out}")

    def _warn_of_no_logged_step(self, trainer: pl.Trainer) -> None:
        """Warn after training if none of its steps was logged."""
        before, last, every = self._steps_before, logged_step(trainer), _log_interval(trainer)
        if last > before and last // every == before // every:
            rank_zero_warn(
                f"{self.label} has measured nothing, because log_every_n_steps={every} logs none of the steps "
                f"{before + 1} to {last}: set it to {last - before} or less"
            )

    def _name_means(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the parameters in whose gradients the mean dominates, once in a training."""
        if self._has_named_means or not self._history.steps or _is_fast_dev_run(trainer):
            return
        self._has_named_means = True
        slots = {slot.names[0]: slot for slot in self.model_of(trainer, pl_module).adapter.slots()}
        parameters = (self._parameters.get(row, name) for row, name in enumerate(self._history.names))
        slot_of = {row: slots[name] for row, name in enumerate(parameters) if name in slots}
        callbacks: Any = getattr(trainer, "callbacks", ())
        name_dominating_means(self.label, self._history, slot_of, callbacks)

    def _aggregates(self, summary: GradientSummary, ratio: Tensor) -> dict[str, float]:
        chosen = summary.is_finite & summary.has_deviation
        sigma, cosine = summary.sigma[chosen], summary.cosine[chosen]
        below = (sigma < self.sigma_threshold).double()
        return {
            "znorm_norm": float(torch.linalg.vector_norm(summary.znorm_norm)),
            "mean_abs_median": _median(summary.mean[chosen].abs()),
            "sigma_median": _median(sigma),
            "sigma_min": _min(sigma),
            "cosine_median": _median(cosine),
            "cosine_min": _min(cosine),
            "mean_share_median": _median(summary.mean_share[chosen]),
            "mean_share_max": -_min(-summary.mean_share[chosen]),
            "sigma_over_running_median": _median(ratio[chosen]),
            "share_below": float(below.mean()),
            "nonfinite": float((~summary.is_finite).sum()),
        }

    def _draw(self, trainer: pl.Trainer) -> None:
        """Write the pictures, and send them to loggers and to a notebook that the program runs in."""
        if not self._history.steps or not trainer.is_global_zero or _is_fast_dev_run(trainer):
            return
        if (self._folder is None and not is_notebook()) or missing("matplotlib", "PIL"):
            return
        figures = self.figures()
        if self._folder is not None:
            from lightning_znorm.callbacks.monitor_plots import image_of

            self._folder.mkdir(parents=True, exist_ok=True)
            prefix = short_key(self.prefix.replace("/", "_"))
            for name, figure in figures.items():
                picture = image_of(figure)
                picture.save(self._folder / f"{prefix}_{name}.png")
                log_picture(trainer, f"{self.prefix}/{name}", picture)
            rank_zero_info(
                f"{self.label}: the pictures of the gradients are {self._folder}{os.sep}{prefix}_*.png. Its method "
                "`figures()` returns them as matplotlib figures."
            )
        if is_notebook():
            show_in_notebook(*figures.values())


def _steppers(trainer: pl.Trainer, adapter: GradientAdapter) -> defaultdict[str, list[int]]:
    """Return the numbers of the optimizers that step a parameter of a name, for each name.

    Several numbers mean one parameter that several optimizers step, or several parameters that are named by their
    numbers alone.
    """
    steppers: defaultdict[str, list[int]] = defaultdict(list)
    for number, optimizer in enumerate(map(unwrapped, trainer.optimizers)):
        for slot in adapter.slots_of(optimizer):
            if number not in steppers[slot.names[0]]:
                steppers[slot.names[0]].append(number)
    return steppers


def _row(slot: GradientSlot, steppers: defaultdict[str, list[int]], number: int) -> str:
    """Return what a parameter is called in the pictures."""
    name = slot.names[0]
    return f"{name} (optimizer {number})" if len(steppers[name]) > 1 else name


def _log_interval(trainer: Any) -> int:
    """Return the number of steps of which the Trainer logs one."""
    return int(trainer.log_every_n_steps)


def _of_each(summary: GradientSummary, ratio: Tensor) -> dict[str, Tensor]:
    return {
        "mean": summary.mean.abs() if summary.mean.is_complex() else summary.mean,
        "sigma": summary.sigma,
        "norm": summary.norm,
        "znorm_norm": summary.znorm_norm,
        "cosine": summary.cosine,
        "mean_share": summary.mean_share,
        "sigma_over_running": ratio,
    }


def _is_fast_dev_run(trainer: Any) -> bool:
    """Return whether this is a run of few batches, which logs every step and writes no files."""
    return bool(trainer.fast_dev_run)


def _median(values: Tensor) -> float:
    values = values[~values.isnan()]
    return float(values.quantile(0.5)) if len(values) else torch.nan


def _min(values: Tensor) -> float:
    values = values[~values.isnan()]
    return float(values.min()) if len(values) else torch.nan
