"""Splits of a data set: by class, or by patient."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_znorm.arguments import shown
from lightning_znorm.data.datasets import Images, Indices, Labels
from lightning_znorm.errors import ZNormTypeError, ZNormValueError


def stratified_indices(labels: Labels, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Split the indices of images in two, with the same share of every class in each part.

    Args:
        labels: Labels of the images.
        fraction: Share of the images in the second part.
        seed: Seed of the split.

    Returns:
        The indices of both parts.

    Raises:
        ValueError: If there are too few images.
    """
    from sklearn.model_selection import train_test_split

    try:
        first, second = train_test_split(np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed)
    except ValueError as error:
        raise ZNormValueError(
            f"{len(labels)} images of {len(np.unique(labels))} classes cannot be split so that a share of {fraction} "
            "and the other images both hold images of every class: add images, or change the share."
        ) from error
    return first, second


def stratified_split(
    images: Images, labels: Labels, fraction: float, seed: int
) -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """Split images and labels as `stratified_indices` does."""
    first, second = stratified_indices(labels, fraction, seed)
    return (images[first], labels[first]), (images[second], labels[second])


def checked_pattern(pattern: Any) -> re.Pattern[str] | None:
    """Return the compiled ``patient_pattern`` of a data module, if it has one.

    Raises:
        ValueError: If it is no regular expression.
        TypeError: If it is no text.
    """
    if pattern is None:
        return None
    if not isinstance(pattern, str):
        raise ZNormTypeError(f"patient_pattern must be a regular expression, got {shown(pattern)}.")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ZNormValueError(
            f"patient_pattern is no regular expression ({error}): {pattern!r}. '^([^_]+)_' takes what is in front of "
            "the first underscore."
        ) from error


def patient_of(name: str, pattern: re.Pattern[str] | None) -> str:
    """Return the patient that a pattern finds in a name: its first group, or the whole match if it has none.

    Args:
        name: Name of an image.
        pattern: Without it, each image is a patient of its own, of that name.

    Returns:
        The patient; empty if none is found.

    Example:
        >>> patient_of("anna_007", re.compile("^([^_]+)_")), patient_of("anna_007", None)
        ('anna', 'anna_007')
    """
    if pattern is None:
        return name
    found = pattern.search(name)
    return "" if found is None else found[1 if pattern.groups else 0] or ""


def split_patients(
    shares: Mapping[str, float], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, list[str]]:
    """Split patients into three parts with similar amounts of tumour.

    scikit-learn cannot stratify by a continuous share.

    Args:
        shares: How much tumour each patient has, in any measure.
        val_fraction: Share of the patients to validate on; at least one.
        test_fraction: Share of the patients to test on; at least one.
        seed: Seed of the split. The patients of the test set do not depend on ``val_fraction``.

    Returns:
        The patients of ``"train"``, ``"val"`` and ``"test"``, each list sorted.

    Raises:
        ValueError: If no patient remains for training.

    Example:
        >>> split = split_patients({"a": 0.1, "b": 0.1, "c": 0.8, "d": 0.9}, 0.25, 0.5, seed=0)
        >>> {name: len(patients) for name, patients in split.items()}
        {'train': 1, 'val': 1, 'test': 2}
    """
    n_val, n_test = (max(1, round(fraction * len(shares))) for fraction in (val_fraction, test_fraction))
    if n_val + n_test >= len(shares):
        raise ZNormValueError(
            f"Of {len(shares)} patients, val_fraction={val_fraction} takes {n_val} and test_fraction={test_fraction} "
            f"{n_test}, which leaves none for training: lower them, or add patients."
        )
    rng = np.random.default_rng(seed)
    names = rng.permutation(sorted(shares))  # a random order among patients with equal shares
    ordered = names[np.argsort([shares[name] for name in names], kind="stable")]
    remaining, test = _drawn_evenly(ordered, n_test, rng)
    train, val = _drawn_evenly(remaining, n_val, rng)
    return {name: sorted(part.tolist()) for name, part in (("train", train), ("val", val), ("test", test))}


def _drawn_evenly(
    ordered: NDArray[np.str_], count: int, rng: np.random.Generator
) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """Draw one from each of ``count`` groups of neighbours; return the others, and the drawn."""
    drawn = [rng.choice(group) for group in np.array_split(np.arange(len(ordered)), count)]
    return np.delete(ordered, drawn), ordered[drawn]
