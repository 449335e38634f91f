"""The Trainer that a command makes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from lightning_znorm.errors import ZNormValueError

# Lightning divides by some without a look at them, and takes a negative clip for none.
_AT_LEAST_ONE = ("accumulate_grad_batches", "check_val_every_n_epoch")


class CommandTrainer(Trainer):
    """Lightning's Trainer, for which ``limit_train_batches: 1`` is one batch on the command line and in YAML.

    Lightning's own annotation is ``Optional[Union[int, float]]``. ``typing`` may give for it the equal
    ``Optional[Union[float, int]]`` that it keeps in a cache from somewhere else: numbers are then read as floats, 1 as
    everything, and 2 is refused. What is written with ``|`` is in no cache, unless its default is None: Python 3.10
    then makes it an ``Optional`` of its own, which is.

    Args:
        limit_train_batches: How much of the training data to take: a number of batches, or a share.
        limit_val_batches: The same of the validation data.
        limit_test_batches: The same of the test data.
        limit_predict_batches: The same of the data to predict.
        **kwargs: Further arguments of `lightning.pytorch.Trainer`.

    Raises:
        ValueError: If one of these is out of range.

    Attributes:
        config_files: The config files that were named.
        flags: What else was typed, but for the checkpoint.
        given_callbacks: The callbacks that it was made with: a model may add others.
    """

    config_files: Sequence[Path] = ()
    flags: Sequence[str] = ()

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = 1.0,
        limit_val_batches: int | float | None = 1.0,
        limit_test_batches: int | float | None = 1.0,
        limit_predict_batches: int | float | None = 1.0,
        **kwargs: Any,
    ) -> None:
        for name in _AT_LEAST_ONE:
            if (count := kwargs.get(name)) is not None and count < 1:
                raise ZNormValueError(f"trainer.{name} must be at least 1, got {count}.")
        if (norm := kwargs.get("gradient_clip_val")) is not None and norm < 0:
            raise ZNormValueError(f"trainer.gradient_clip_val must be at least 0, got {norm}.")
        if isinstance(interval := kwargs.get("val_check_interval"), int | float) and interval <= 0:  # else a time
            raise ZNormValueError(f"trainer.val_check_interval must be more than 0, got {interval}.")
        super().__init__(
            limit_train_batches=_unless_all(limit_train_batches),
            limit_val_batches=_unless_all(limit_val_batches),
            limit_test_batches=_unless_all(limit_test_batches),
            limit_predict_batches=_unless_all(limit_predict_batches),
            **kwargs,
        )
        callbacks: Any = self  # of which Lightning declares none
        self.given_callbacks: list[Callback] = list(callbacks.callbacks)


def _unless_all(limit: int | float | None) -> int | float | None:
    """No limit where it is all: Lightning has something to say about limits that are given."""
    return None if isinstance(limit, float) and limit == 1 else limit
