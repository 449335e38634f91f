"""Scores of masks in an epoch: which are logged by default, for all classes together and for each class."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TypeGuard

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_znorm.batches import Cases
from lightning_znorm.errors import ZNormTypeError, ZNormValueError
from lightning_znorm.metrics import (
    DiceScore,
    HausdorffDistance,
    MaskCount,
    PatientCount,
    PatientDiceScore,
    TverskyIndex,
)
from lightning_znorm.metrics.mask_metric import MaskMetric, MetricOfMasks, sizes_of
from lightning_znorm.metrics.patients import PatientMetric

_COUNTS: dict[str, Callable[[], Metric]] = {
    "masks_counted": MaskCount,
    "masks_left_out": partial(MaskCount, left_out=True),
    "masks_foreground": partial(MaskCount, empty="skip_true"),
    "patients_counted": PatientCount,
    "patients_left_out": partial(PatientCount, left_out=True),
}
# Columns of scores.csv, which cannot be names of scores too.
_COLUMNS = {"loader", "image", "patient", "slice", "class", "predicted_pixels", "true_pixels"}
_COLUMNS |= {"mask", "pixels", "fraction", "max_probability", "mean_probability"}  # in prediction


def default_metrics() -> dict[str, Metric]:
    """Return the scores that a task logs if it is given none, by name."""
    return {
        "dice": DiceScore(),
        "tversky": TverskyIndex(),
        "hausdorff": HausdorffDistance(),
        "dice_per_patient": PatientDiceScore(),
        "dice_foreground": DiceScore(empty="skip_true"),
    }


def checked_metrics(metrics: Mapping[str, Metric] | None) -> dict[str, Metric]:
    """Return the scores of a task: those that it was given, or those that it logs by default.

    Args:
        metrics: Metrics by name.

    Raises:
        TypeError: If they are no mapping, or one is no metric.
        ValueError: If there are none, or a name is taken or cannot be logged.
    """
    if metrics is None:
        return default_metrics()
    example = "{'dice': DiceScore(), 'hd95': HausdorffDistance(percentile=95)}"
    if not isinstance(metrics, Mapping):
        raise ZNormTypeError(f"metrics are metrics by name, such as {example}, got {type(metrics).__name__}.")
    if not metrics:
        raise ZNormValueError(f"metrics holds no metric: leave it out for the default, or give some as {example}.")
    for name, metric in metrics.items():
        if not isinstance(metric, Metric):
            raise ZNormTypeError(
                f"metrics[{name!r}] must be a metric of torchmetrics or lightning_znorm.metrics, got "
                f"{type(metric).__name__}."
            )
        taken = {"loss", *_COUNTS, *_COLUMNS}
        if not isinstance(name, str) or not name or set(name) & set("/.") or name in taken:
            raise ZNormValueError(
                f"metrics cannot hold the name {name!r}, which is taken or cannot be logged: choose another, without "
                "'/' and '.'."
            )
        if isinstance(metric, MetricOfMasks) and metric.threshold != 0.5:
            raise ZNormValueError(
                f"metrics[{name!r}] has threshold={metric.threshold}, and the task hands it masks in which there is "
                "nothing to compare with it: set threshold of the task."
            )
    return dict(metrics)


def collection(metrics: Mapping[str, Metric], class_names: Sequence[str]) -> MetricCollection:
    """Return the scores of all classes together, those of each class if there are several, and the counts.

    A score of a class has the name of the score, ``_`` and the name of the class. Metrics of other packages score all
    classes together only.

    Args:
        metrics: The scores by name, as ``checked_metrics`` returns them.
        class_names: Names of the classes that are scored.

    Raises:
        ValueError: If a score of a class would have the name of another score.
    """
    found: dict[str, Metric | MetricCollection] = {name: metric.clone() for name, metric in metrics.items()}
    found |= {name: make() for name, make in _COUNTS.items()}
    if len(class_names) > 1:
        for name, metric in metrics.items():
            for each in class_names if isinstance(metric, (MaskMetric, PatientDiceScore)) else ():
                if (of_class := _of_class(name, each)) in found:
                    raise ZNormValueError(
                        f"{of_class!r} would be the name of two scores: rename a metric or the class {each!r}."
                    )
                found[of_class] = metric.clone()
    # Each is updated by itself, so there are no groups of equal metrics.
    return MetricCollection(found, compute_groups=False)


def update(
    metrics: MetricCollection,
    preds: Tensor,
    target: Tensor,
    cases: Cases,
    class_names: Sequence[str],
    patients_expected: Collection[str] = (),
) -> tuple[dict[str, Tensor], set[str]]:
    """Add a batch to the scores, and return the scores of each mask.

    Args:
        metrics: What ``collection`` returned, or a clone of it.
        preds: Predicted masks, bool, shape ``(N, K, ...)``.
        target: True masks, of the same shape and dtype.
        cases: Whom they belong to. If they do not speak of patients, the scores of patients have no meaning.
        class_names: Names of the ``K`` classes.
        patients_expected: Names of metrics that must not do without patients.

    Returns:
        The score of each mask, shape ``(N, K)`` and NaN where it is left out, by the name of the metric: for all
        metrics that score masks one by one. And the names of the metrics that have no meaning.

    Raises:
        ValueError: If a metric that needs patients is expected, and the batch does not speak of them.
    """
    by_name = dict(metrics.items(keep_base=True, copy_state=False))
    sizes = sizes_of(preds, target)
    without: set[str] = set()
    parents = _parents(by_name, class_names)
    of_masks = mask_scores(
        {name: metric for name, metric in by_name.items() if name not in parents}, preds, target, cases
    )
    for name, metric in by_name.items():
        number = parents[name][1] if name in parents else None
        part = slice(None) if number is None else slice(number, number + 1)
        masks = preds[:, part], target[:, part]
        if isinstance(metric, PatientMetric):
            if not cases.names_patients:
                if name in patients_expected:
                    raise ZNormValueError(
                        f"metrics[{name!r}] scores patients, and the batches name none: let a dictionary with "
                        "'patient' follow images and masks, as LGGDataModule does, or take another metric."
                    )
                without.add(name)
                continue
            metric.update(*masks, patient=cases.patient, sizes=sizes[:, :, part])
        elif isinstance(metric, MaskCount):
            metric.update(*masks, sizes=sizes[:, :, part])
        elif _scores_each(metric):
            scores = of_masks[parents[name][0] if name in parents else name][:, part]
            metric.update(*masks, spacing=_spacing(cases), scores=scores)
        else:
            metric.update(*masks)
    return of_masks, without


def mask_scores(metrics: Mapping[str, Metric], preds: Tensor, target: Tensor, cases: Cases) -> dict[str, Tensor]:
    """Return the scores of each mask of a batch, and change no state.

    Args:
        metrics: Metrics by name. Those that do not score masks one by one are left out.
        preds: Predicted masks, bool, shape ``(N, K, ...)``.
        target: True masks, of the same shape and dtype.
        cases: Whom they belong to.

    Returns:
        By the name of the metric, shape ``(N, K)``, NaN where a mask is left out.
    """
    return {
        name: metric.score_each(preds, target, spacing=_spacing(cases))
        for name, metric in metrics.items()
        if _scores_each(metric)
    }


def _scores_each(metric: Metric) -> TypeGuard[MaskMetric]:
    return isinstance(metric, MaskMetric) and type(metric).update is MaskMetric.update


def _spacing(cases: Cases) -> list[tuple[float, ...] | None] | None:
    return cases.spacing if any(each is not None for each in cases.spacing) else None


def _parents(by_name: Mapping[str, Metric], class_names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Return which scores are those of a class: the score that they belong to, and the number of the class."""
    if len(class_names) < 2:
        return {}
    return {
        _of_class(name, each): (name, number)
        for name, metric in by_name.items()
        if isinstance(metric, (MaskMetric, PatientDiceScore))
        for number, each in enumerate(class_names)
        if _of_class(name, each) in by_name
    }


def is_headline(name: str, class_names: Sequence[str]) -> bool:
    """Return whether a progress bar has room for a score: not for counts, and not for those of each class.

    Args:
        name: Name of the score, without a prefix.
        class_names: Names of the classes.
    """
    return name not in _COUNTS and not (
        len(class_names) > 1 and name.endswith(tuple(f"_{each}" for each in class_names))
    )


def _of_class(name: str, class_name: str) -> str:
    return f"{name}_{class_name}"
