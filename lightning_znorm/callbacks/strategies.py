"""Strategies under which every process holds whole gradients when the optimizer steps."""

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

# By name, because lightning.pytorch and pytorch_lightning each have their own classes. Not by isinstance, because
# DeepSpeedStrategy is a DDPStrategy.
_WHOLE_GRADIENTS = {"SingleDeviceStrategy", "DDPStrategy"}
_PACKAGES = ("lightning.pytorch.", "pytorch_lightning.")


def check_strategy(strategy: Any, callback: str) -> None:
    """Refuses a strategy whose gradients may be sharded, or of which nothing is known.

    Raises:
        MisconfigurationException: If it is not Lightning's single-device or DDP strategy.
    """
    cls = type(strategy)
    if cls.__name__ not in _WHOLE_GRADIENTS or not cls.__module__.startswith(_PACKAGES):
        raise MisconfigurationException(
            f"{callback} does not support {cls.__name__} ({cls.__module__}): where a strategy shards the gradients or "
            "keeps them elsewhere, the statistics of what a process sees are not those of the gradient. "
            "Use a single device or DDP (`strategy='ddp'`)."
        )
