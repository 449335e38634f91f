"""Which patients are for training, validation and test."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lightning_znorm.errors import ZNormValueError


def split_patients(
    shares: Mapping[str, float], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, list[str]]:
    """Split patients in three, with little and much tumour alike in each part.

    Args:
        shares: How much tumour each patient has, in any measure.
        val_fraction: Share of the patients to validate on; at least one.
        test_fraction: Share of the patients to test on; at least one.
        seed: Draws them. Who is drawn for the test does not hang on ``val_fraction``.

    Returns:
        The patients of ``"train"``, ``"val"`` and ``"test"``, each list sorted.

    Raises:
        ValueError: If nobody is left for training.

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
    names = rng.permutation(sorted(shares))  # so that chance decides among equals
    ordered = names[np.argsort([shares[name] for name in names], kind="stable")]
    rest, test = _drawn_evenly(ordered, n_test, rng)
    train, val = _drawn_evenly(rest, n_val, rng)
    return {name: sorted(part.tolist()) for name, part in (("train", train), ("val", val), ("test", test))}


def _drawn_evenly(
    ordered: NDArray[np.str_], count: int, rng: np.random.Generator
) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """Draw one of each of ``count`` groups of neighbours; return those that are left, and the drawn."""
    drawn = [rng.choice(group) for group in np.array_split(np.arange(len(ordered)), count)]
    return np.delete(ordered, drawn), ordered[drawn]
