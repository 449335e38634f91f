"""Base class of the scores of masks, and dtypes to compute them in."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from typing_extensions import override

from lightning_znorm.errors import ZNormTypeError, ZNormValueError


class MaskMetric(Metric):
    """Base of the scores of masks: each image and channel has a score, and the result is their mean.

    The policy for empty masks is the same in all of them:

    - both empty: there is nothing to find and nothing was found. The mask is left out of the mean, and counted in
      ``skipped``.
    - one empty: it gets the worst score (:meth:`worst`), so that predicting nothing never pays.
    - all left out: the mean is NaN, with one warning.

    A subclass implements :meth:`scores` and :meth:`worst`, and passes its other arguments as ``settings``.

    Args:
        threshold: Smallest probability of a pixel in the predicted mask.
        settings: All other arguments that the scores depend on.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Attributes:
        total: Sum of the scores in the mean.

    Raises:
        ValueError: If ``threshold`` is not in (0, 1).
    """

    full_state_update = False
    is_differentiable = False
    plot_lower_bound = 0.0

    total: Tensor

    def __init__(self, threshold: float, settings: Sequence[object] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < threshold < 1:
            raise ZNormValueError(f"threshold is a probability, in (0, 1), got {threshold}.")
        self.threshold = threshold
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        # MetricCollection takes metrics for equal if their states agree after the first batch, and then updates only
        # the first. Over empty or perfect masks all of ours agree, so the name of this state tells them apart.
        self._counts = f"counts of {type(self).__name__}{(threshold, *settings)}"
        # Masks in the mean, masks left out, batches with impossible values in preds, batches with such in target.
        self.add_state(self._counts, torch.tensor([0, 0, 0, 0], dtype=torch.int64), dist_reduce_fx="sum")
        self._within_forward = False
        self._warned = False

    @property
    def counted(self) -> Tensor:
        """Number of masks in the mean: of this process, or of all processes while the metric is synchronised."""
        return self._numbers[0]

    @property
    def skipped(self) -> Tensor:
        """Number of masks left out because they are empty in prediction and truth, of the same processes."""
        return self._numbers[1]

    @property
    def _numbers(self) -> Tensor:
        numbers: Tensor = getattr(self, self._counts)
        return numbers

    @abstractmethod
    def scores(self, preds: Tensor, target: Tensor) -> Tensor:
        """Score pairs of masks.

        Args:
            preds: Predicted masks, shape ``(M, H, W)`` or ``(M, D, H, W)``, bool.
            target: True masks, of the same shape and dtype.

        Returns:
            Shape ``(M,)``, float32 or float64 whatever torch's default is. If a mask is empty, any number.
        """

    @abstractmethod
    def worst(self, size: Sequence[int]) -> float:
        """Return the score of a pair of masks of which one is empty.

        Args:
            size: Number of pixels along each axis.
        """

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch to the mean.

        On the CPU, the values are checked at once. On other devices a check makes the program wait, so they are checked
        when the mean is computed.

        Args:
            preds: Probabilities or bool, shape ``(N, C, H, W)`` or ``(N, C, D, H, W)``.
            target: Bool, or integers 0 and 1, of the same shape.

        Raises:
            TypeError: If ``preds`` are neither floating point nor bool, or ``target`` is neither bool nor integer.
            ValueError: If the shapes are none of these or differ, or on the CPU if probabilities are NaN or outside
                [0, 1], or a value of ``target`` is neither 0 nor 1.
        """
        self._require_masks(preds, target)
        misfits = torch.stack([_leaves_unit_interval(preds), _leaves_unit_interval(target)])
        if preds.device.type == "cpu":
            self._require_fitting_values(misfits)
        preds, target = self._marked(preds).flatten(0, 1), target.bool().flatten(0, 1)

        predicted, true = _not_empty(preds), _not_empty(target)
        scores = torch.where(predicted & true, self.scores(preds, target), self.worst(preds.shape[1:]))
        counted = predicted | true
        numbers = torch.cat([torch.stack([counted.sum(), (~counted).sum()]), misfits])
        # Not in place: a state that was reset in inference mode cannot be changed in place outside of it.
        self.total = self.total + torch.where(counted, scores, 0.0).sum(dtype=self.total.dtype)
        setattr(self, self._counts, self._numbers + numbers)

    @override
    def compute(self) -> Tensor:
        """Return the mean over all masks that are not left out, in float32; NaN if there are none.

        Raises:
            ValueError: If ``preds`` or ``target`` had impossible values.
        """
        if not self._within_forward:
            self._require_fitting_values(self._numbers[2:])
            self._warn_of_nothing()
        return (self.total / self.counted).float()

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch to the mean, and return the mean of this batch."""
        # One batch of empty masks is no reason to warn, and to read the states would wait for the device.
        self._within_forward = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._within_forward = False

    @override
    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value or several. Needs matplotlib.

        Args:
            val: What ``compute`` or ``forward`` returned, or a list of such values; by default ``compute()``.
            ax: The matplotlib axes to draw in; new ones by default.

        Returns:
            Figure and axes; no figure if ``ax`` is given.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return self._plot(val, ax)  # what torchmetrics tells subclasses to call

    @override
    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> nn.Module:
        # A sum in half precision stops growing at a few hundred. So Module.to(dtype), which Lightning calls for
        # "bf16-true", and Metric.set_dtype may move the states to another device, but not change their dtypes. There is
        # no public hook for that: torch and torchmetrics convert in `_apply`, with `_defaults` and `_computed`.
        computed = self._computed
        super()._apply(fn, [*exclude_state, *self._defaults])
        for name, default in self._defaults.items():
            setattr(self, name, self._moved(getattr(self, name)))
            self._defaults[name] = self._moved(default)
        self._computed = None if computed is None else computed.to(self.device)
        return self

    def _moved(self, state: Any) -> Tensor:
        dtype = widest_float(self.device) if state.is_floating_point() else state.dtype
        moved: Tensor = state.to(self.device, dtype)
        return moved

    def _marked(self, preds: Tensor) -> Tensor:
        # In half precision the threshold would be rounded too.
        return preds if preds.dtype == torch.bool else at_least_float32(preds) >= self.threshold

    def _require_masks(self, preds: Tensor, target: Tensor) -> None:
        name = type(self).__name__
        if not (preds.dtype == torch.bool or preds.is_floating_point()):
            raise ZNormTypeError(
                f"{name} takes preds that are probabilities or bool, got {preds.dtype}: for masks of 0 and 1 pass "
                "preds.bool(), for class labels a mask for each class."
            )
        if target.is_floating_point() or target.is_complex():
            raise ZNormTypeError(
                f"{name} takes a target that is bool or integer, got {target.dtype}: pass target.bool(), or "
                "target > 0.5 if it holds anything between 0 and 1."
            )
        if preds.shape != target.shape or preds.ndim not in (4, 5):
            raise ZNormValueError(
                f"{name} takes preds and target of one shape, (N, C, H, W) or (N, C, D, H, W), got "
                f"{tuple(preds.shape)} and {tuple(target.shape)}."
            )

    def _require_fitting_values(self, misfits: Tensor) -> None:
        preds, target = misfits.tolist()
        name = type(self).__name__
        if preds:
            raise ZNormValueError(
                f"{name} takes preds that are probabilities, and some were NaN or outside [0, 1]: turn logits into "
                "probabilities by sigmoid or softmax."
            )
        if target:
            raise ZNormValueError(
                f"{name} takes a target of 0 and 1, and some values were neither: for masks of 0 and 255 pass "
                "target > 0, for class labels a mask for each class."
            )

    def _warn_of_nothing(self) -> None:
        # If there was no update, torchmetrics warns.
        if self._warned or not self.update_called or self.counted:
            return
        self._warned = True
        rank_zero_warn(
            f"{type(self).__name__} is NaN: all {int(self.skipped)} masks are empty in prediction and truth, so "
            "there is nothing to score.",
            UserWarning,
        )


def _not_empty(masks: Tensor) -> Tensor:
    if masks.device.type == "cpu":
        # NumPy searches in one thread. torch divides the search among threads, which wait for one another: on a busy
        # machine much longer than the search takes.
        return torch.from_numpy(masks.flatten(1).numpy().any(axis=1))
    return masks.flatten(1).any(dim=1)


def _leaves_unit_interval(values: Tensor) -> Tensor:
    if values.dtype == torch.bool or values.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=values.device)
    low, high = orderable(values.detach()).aminmax()  # NaN if there is one: then no comparison is true
    return ~((low >= 0) & (high <= 1))


# Dtypes are chosen by device and input, never by torch's default dtype, which a Trainer's precision changes.
def widest_float(device: torch.device) -> torch.dtype:
    """Return the floating-point dtype of the highest precision that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def at_least_float32(values: Tensor) -> Tensor:
    """Return values in float32 if they are in half precision, and otherwise as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def orderable(values: Tensor) -> Tensor:
    """Return values in a dtype that torch can compare: it can hardly compute with uint16, uint32 and uint64."""
    return values.long() if values.dtype in (torch.uint16, torch.uint32, torch.uint64) else values
