"""Which strategies are supported, and which adapter belongs to each of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_znorm.errors import ZNormRuntimeError
from lightning_znorm.gradients import AffineMethod, GradientMethod
from lightning_znorm.gradients.adapters import GradientAdapter
from lightning_znorm.gradients.adapters.plain import PlainAdapter
from lightning_znorm.gradients.amp import check_grad_scaler
from lightning_znorm.gradients.methods import describe
from lightning_znorm.gradients.slots import dtensor_support

_PACKAGES = ("lightning.pytorch.", "pytorch_lightning.")


@dataclass(frozen=True)
class Support:
    """How a strategy is supported.

    Attributes:
        make_adapter: Makes the adapter from the LightningModule and the strategy, which has set up its model.
        shards_gradients: Whether a process may hold only a part of a gradient.
        packages: What the names of the modules that define the strategy begin with.
    """

    make_adapter: Callable[[LightningModule, Any], GradientAdapter]
    shards_gradients: bool
    packages: tuple[str, ...] = _PACKAGES


def check_strategy(strategy: Any, callback: str, method: GradientMethod | None, allow_untested: bool) -> None:
    """Refuse an unknown strategy, and a method that cannot work with a strategy's shards.

    Args:
        strategy: The Trainer's strategy.
        callback: The name of the callback, for messages.
        method: The gradient method; ``None`` if the callback applies none.
        allow_untested: Whether to trust a strategy that is not one of Lightning's tested ones, with a warning.

    Raises:
        MisconfigurationException: If the strategy is not one of Lightning's tested ones and ``allow_untested`` is not
            set, or if it shards gradients and the method is a function of unsharded gradients.
    """
    cls = type(strategy)
    if not is_tested(cls):
        untested = f"{callback} has not been tested with {cls.__name__} ({cls.__module__})"
        if not allow_untested:
            raise MisconfigurationException(
                f"{untested}: it may keep gradients elsewhere, or only parts of them in `parameter.grad`, and the "
                "statistics would be wrong. Use a single device, 'ddp', 'fsdp', ModelParallelStrategy or 'deepspeed'; "
                "or make sure that it leaves gradients where these do, and set allow_untested_strategy=True."
            )
        rank_zero_warn(f"{untested}: it is trusted to leave gradients where Lightning's strategies do.")
    if not isinstance(method, AffineMethod | None) and shards_gradients(strategy):
        raise MisconfigurationException(
            f"{callback}: {describe(method)} is a function of unsharded gradients, and {cls.__name__} shards them. "
            "Write it as an AffineMethod, which works with their statistics, or use a single device or 'ddp'."
        )


def gradient_adapter(module: LightningModule, strategy: Any) -> GradientAdapter:
    """Return the adapter for a strategy that has set up its model.

    Args:
        module: The LightningModule.
        strategy: The Trainer's strategy.

    Raises:
        RuntimeError: If the strategy has not set up its model yet, or has torn it down.
        UnsupportedGradientError: If this release of PyTorch or DeepSpeed cannot tell where gradients are, or with which
            scale.
    """
    scaler = getattr(getattr(strategy, "precision_plugin", None), "scaler", None)
    if scaler is not None and scaler.is_enabled():
        check_grad_scaler()
    support = find_support(strategy)
    return PlainAdapter(module) if support is None else support.make_adapter(module, strategy)


def _make_plain(module: LightningModule, strategy: Any) -> GradientAdapter:
    return PlainAdapter(module)


def _make_dtensor(module: LightningModule, strategy: Any) -> GradientAdapter:
    dtensor_support()
    return PlainAdapter(module)


def _make_fsdp1(module: LightningModule, strategy: Any) -> GradientAdapter:
    from lightning_znorm.gradients.adapters.fsdp1 import FSDP1Adapter

    return FSDP1Adapter(module, strategy.model)


def _make_deepspeed(module: LightningModule, strategy: Any) -> GradientAdapter:
    if strategy.model is None or strategy.model is module:
        raise ZNormRuntimeError(
            f"{type(strategy).__name__} keeps gradients in its engine, and has no engine at this "
            "on_before_optimizer_step: step optimizers only between `on_fit_start` and `on_fit_end`"
        )
    from lightning_znorm.gradients.adapters.deepspeed import DeepSpeedAdapter

    return DeepSpeedAdapter(module, strategy.model)


SUPPORTED = {
    "SingleDeviceStrategy": Support(_make_plain, shards_gradients=False),
    "DDPStrategy": Support(_make_plain, shards_gradients=False),
    "FSDPStrategy": Support(_make_fsdp1, shards_gradients=True),
    "ModelParallelStrategy": Support(_make_dtensor, shards_gradients=True),
    "DeepSpeedStrategy": Support(_make_deepspeed, shards_gradients=True),
}
"""The strategies of ``lightning.pytorch`` and ``pytorch_lightning`` that are tested, by the names of their classes.

By name, because each of the two packages has its own classes. ``isinstance`` would not do: ``DeepSpeedStrategy`` is a
``DDPStrategy``, and a subclass could do anything with the gradients.
"""


def is_tested(cls: type) -> bool:
    """Return whether a class of strategies is one of the tested ones itself."""
    support = SUPPORTED.get(cls.__name__)
    return support is not None and cls.__module__.startswith(support.packages)


def find_support(strategy: Any) -> Support | None:
    """Return how the first of the tested classes that a strategy is or derives from is supported, if there is one."""
    return next((SUPPORTED[cls.__name__] for cls in type(strategy).__mro__ if is_tested(cls)), None)


def shards_gradients(strategy: Any) -> bool:
    """Return whether a process may hold only a part of a gradient, as far as a strategy is known."""
    support = find_support(strategy)
    return support is not None and support.shards_gradients
