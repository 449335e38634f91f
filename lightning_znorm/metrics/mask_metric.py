"""Base classes of the metrics of masks, and dtypes to compute them in."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from typing_extensions import override

from lightning_znorm.arguments import checked_choice
from lightning_znorm.errors import ZNormTypeError, ZNormValueError
from lightning_znorm.requirements import require

Empty: TypeAlias = Literal["skip", "best", "skip_true"]


def sizes_of(preds: Tensor, target: Tensor) -> Tensor:
    """Return the numbers of pixels of masks: in both, in the predicted one, and in the true one.

    Args:
        preds: Predicted masks, bool, shape ``(N, C, ...)``.
        target: True masks, of the same shape and dtype.

    Returns:
        Shape ``(3, N, C)``, int64.
    """
    return torch.stack([masks.flatten(2).sum(dim=2) for masks in (preds & target, preds, target)])


class MetricOfMasks(Metric):
    """Base of all metrics of masks: what they take, what an empty mask means, and how their states are converted.

    Args:
        threshold: Smallest probability of a pixel in the predicted mask.
        empty: What an empty mask means; see :class:`MaskMetric`.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: If ``threshold`` is not in (0, 1), or ``empty`` is another word.
    """

    full_state_update = False
    is_differentiable = False
    plot_lower_bound = 0.0
    empty: Empty = "skip"  # of the class, so that metrics that were pickled before there was a choice have it too

    def __init__(self, threshold: float, empty: Empty = "skip", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < threshold < 1:
            raise ZNormValueError(f"threshold is a probability, in (0, 1), got {threshold}.")
        self.threshold = threshold
        self.empty = checked_choice("empty", empty, get_args(Empty))
        self._within_forward = False
        self._warned = False

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch, and return the value of this batch alone."""
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
            ImportError: If matplotlib is missing.
        """
        require(f"{type(self).__name__}.plot", "matplotlib")
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

    def _moved(self, state: Any) -> Any:
        if isinstance(state, list):
            return [self._moved(each) for each in state]
        return state.to(self.device, widest_float(self.device) if state.is_floating_point() else state.dtype)

    def counts_in(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Return which masks are in the mean, by the policy ``empty``.

        Args:
            predicted: Which masks are not empty in the prediction, bool.
            true: Which are not empty in the truth, of the same shape.
        """
        if self.empty == "skip":
            return predicted | true
        return torch.ones_like(true) if self.empty == "best" else true

    def _marked(self, preds: Tensor) -> Tensor:
        # In half precision the threshold would be rounded too.
        return preds if preds.dtype == torch.bool else at_least_float32(preds) >= self.threshold

    def checked(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Check a batch, and turn it into masks.

        Returns:
            Predicted masks and true masks, bool; and whether ``preds`` and ``target`` had impossible values, shape
            ``(2,)``, bool. On the CPU they had none.

        Raises:
            TypeError: If ``preds`` are neither floating point nor bool, or ``target`` is neither bool nor integer.
            ValueError: If the shapes are not allowed or differ, or on the CPU if a value is impossible.
        """
        self._require_masks(preds, target)
        misfits = torch.stack([_leaves_unit_interval(preds), _leaves_unit_interval(target)])
        if preds.device.type == "cpu":
            self._require_fitting_values(misfits)
        return self._marked(preds), target.bool(), misfits

    def check_values(self, misfits: Tensor) -> None:
        """Raise if a batch had impossible values; not within ``forward``, since to look at them waits for the device.

        Args:
            misfits: Number of batches with such values in ``preds`` and in ``target``, shape ``(2,)``.

        Raises:
            ValueError: If one of them is not 0.
        """
        if not self._within_forward:
            self._require_fitting_values(misfits)

    def warn_of_nothing(self, counted: Tensor, skipped: Tensor, scored: str) -> None:
        """Warn once if nothing is counted; not within ``forward``.

        Args:
            counted: Number of what is in the mean.
            skipped: Number of what is left out.
            scored: What the warning calls it, in plural.
        """
        # If there was no update, torchmetrics warns.
        if self._within_forward or self._warned or not self.update_called or counted:
            return
        self._warned = True
        where = "the truth" if self.empty == "skip_true" else "prediction and truth"
        rank_zero_warn(
            f"{type(self).__name__} is NaN: all {int(skipped)} {scored} are empty in {where}, so there is nothing to "
            "score.",
            UserWarning,
        )

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


class MaskMetric(MetricOfMasks):
    """Base of the scores of masks: each image and channel has a score, and the result is their mean.

    The policy for empty masks is the same in all of them. ``empty="skip"``, the default:

    - both empty: there is nothing to find and nothing was found. The mask is left out of the mean, and counted in
      ``skipped``.
    - one empty: it gets the worst score (:meth:`worst`), so that predicting nothing never pays.
    - all left out: the mean is NaN, with one warning.

    Two other policies make results comparable with those of MONAI's ``DiceMetric``:

    - ``empty="best"``: if both are empty, the mask gets the best score (:meth:`best`), as with ``ignore_empty=False``.
      Where most masks are empty, they decide the mean.
    - ``empty="skip_true"``: a mask whose truth is empty is left out, whatever was predicted for it, as with
      ``ignore_empty=True``. The mean then says nothing about false alarms in such images.

    A subclass implements :meth:`scores` and :meth:`worst`, and passes its other arguments as ``settings``.

    Args:
        threshold: Smallest probability of a pixel in the predicted mask.
        settings: All other arguments that the scores depend on.
        empty: What an empty mask means: ``"skip"``, ``"best"`` or ``"skip_true"``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Attributes:
        total: Sum of the scores in the mean.

    Raises:
        ValueError: If ``threshold`` is not in (0, 1), or ``empty`` is another word.
    """

    total: Tensor

    def __init__(self, threshold: float, settings: Sequence[object] = (), empty: Empty = "skip", **kwargs: Any) -> None:
        super().__init__(threshold, empty, **kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        # MetricCollection takes metrics for equal if their states agree after the first batch, and then updates only
        # the first. Over empty or perfect masks all of ours agree, so the name of this state tells them apart.
        self._counts = f"counts of {type(self).__name__}{(threshold, self.empty, *settings)}"
        # Masks in the mean, masks left out, batches with impossible values in preds, batches with such in target.
        self.add_state(self._counts, torch.tensor([0, 0, 0, 0], dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def counted(self) -> Tensor:
        """Number of masks in the mean: of this process, or of all processes while the metric is synchronised."""
        return self._numbers[0]

    @property
    def skipped(self) -> Tensor:
        """Number of masks left out because of ``empty``, of the same processes."""
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

    def best(self) -> float:
        """Return the score of two equal masks, which ``empty="best"`` gives to two empty ones.

        It is 1 if ``higher_is_better``, and otherwise 0. Override it for a score on another scale.

        Raises:
            ValueError: If ``higher_is_better`` is None.
        """
        if self.higher_is_better is None:
            raise ZNormValueError(
                f"{type(self).__name__} does not say what its best score is: set its higher_is_better, or override "
                "best()."
            )
        return float(self.higher_is_better)

    def score_each(
        self, preds: Tensor, target: Tensor, spacing: Sequence[Sequence[float] | None] | None = None
    ) -> Tensor:
        """Score each mask of a batch, and change no state.

        Values are checked on the CPU. On other devices a check makes the program wait; only ``update`` checks there.

        Args:
            preds: Probabilities or bool, shape ``(N, C, H, W)`` or ``(N, C, D, H, W)``.
            target: Bool, or integers 0 and 1, of the same shape.
            spacing: For each image, the distance of neighbouring pixels along each axis. Only
                ``HausdorffDistance(spacing="image")`` reads it.

        Returns:
            Shape ``(N, C)``, float32 or float64; NaN where a mask is left out of the mean.

        Raises:
            TypeError: As ``update`` does.
            ValueError: As ``update`` does.

        Example:
            >>> from lightning_znorm.metrics import DiceScore
            >>> masks = torch.tensor([[[[True, True]], [[False, False]]]])  # one image, two channels
            >>> DiceScore().score_each(masks, masks).tolist()
            [[1.0, nan]]
        """
        preds, target, _ = self.checked(preds, target)
        predicted, true = not_empty(preds), not_empty(target)
        return torch.where(
            self.counts_in(predicted, true), self._scored(preds, target, predicted, true, spacing), torch.nan
        )

    @override
    def update(
        self,
        preds: Tensor,
        target: Tensor,
        spacing: Sequence[Sequence[float] | None] | None = None,
        scores: Tensor | None = None,
    ) -> None:
        """Add a batch to the mean.

        On the CPU, the values are checked at once. On other devices a check makes the program wait, so they are checked
        when the mean is computed.

        Args:
            preds: Probabilities or bool, shape ``(N, C, H, W)`` or ``(N, C, D, H, W)``.
            target: Bool, or integers 0 and 1, of the same shape.
            spacing: For each image, the distance of neighbouring pixels along each axis. Only
                ``HausdorffDistance(spacing="image")`` reads it.
            scores: What :meth:`score_each` returned for the same masks, if it was called, so that they are not scored
                again.

        Raises:
            TypeError: If ``preds`` are neither floating point nor bool, or ``target`` is neither bool nor integer.
            ValueError: If the shapes are none of these or differ, or ``scores`` is not of shape ``(N, C)``, or on the
                CPU if probabilities are NaN or outside [0, 1], or a value of ``target`` is neither 0 nor 1.
        """
        preds, target, misfits = self.checked(preds, target)
        if scores is not None and scores.shape != preds.shape[:2]:
            raise ZNormValueError(
                f"scores must be what score_each returned for these masks, of shape {tuple(preds.shape[:2])}, got "
                f"{tuple(scores.shape)}."
            )
        predicted, true = not_empty(preds), not_empty(target)
        counted = self.counts_in(predicted, true)
        if scores is None:
            scores = self._scored(preds, target, predicted, true, spacing)
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
        self.check_values(self._numbers[2:])
        self.warn_of_nothing(self.counted, self.skipped, "masks")
        return (self.total / self.counted).float()

    def _scored(
        self,
        preds: Tensor,
        target: Tensor,
        predicted: Tensor,
        true: Tensor,
        spacing: Sequence[Sequence[float] | None] | None,
    ) -> Tensor:
        """Return the scores of a batch of bool masks, where an empty mask has what it gets: shape ``(N, C)``."""
        scores, worst = self.scores_and_worst(preds, target, spacing)
        scores = torch.where(predicted & true, scores, worst)
        return torch.where(predicted | true, scores, self.best()) if self.empty == "best" else scores

    def scores_and_worst(
        self, preds: Tensor, target: Tensor, spacing: Sequence[Sequence[float] | None] | None
    ) -> tuple[Tensor, Tensor | float]:
        """Score a batch of bool masks, and say what the worst score is.

        By default from :meth:`scores` and :meth:`worst`. Override it if they depend on the spacing of each image.

        Args:
            preds: Shape ``(N, C, H, W)`` or ``(N, C, D, H, W)``, bool.
            target: Of the same shape and dtype.
            spacing: What ``update`` got.

        Returns:
            Scores, shape ``(N, C)``, any number where a mask is empty; and the worst score, as a number or in a shape
            that fits the scores.
        """
        scores = self.scores(preds.flatten(0, 1), target.flatten(0, 1))
        return scores.view(preds.shape[:2]), self.worst(preds.shape[2:])


def not_empty(masks: Tensor) -> Tensor:
    """Return which masks of a batch are not empty, shape ``(N, C)``."""
    if masks.device.type == "cpu":
        # NumPy searches in one thread. torch divides the search among threads, which wait for one another: on a busy
        # machine much longer than the search takes.
        return torch.from_numpy(masks.flatten(2).numpy().any(axis=2))
    return masks.flatten(2).any(dim=2)


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
