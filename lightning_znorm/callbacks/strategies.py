"""Which strategies are supported, and which adapter belongs to each of them."""

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_znorm.gradients import AffineMethod, GradientMethod
from lightning_znorm.gradients.adapters.plain import GradientAdapter
from lightning_znorm.gradients.amp import check_grad_scaler
from lightning_znorm.gradients.methods import describe
from lightning_znorm.gradients.slots import dtensor_support

# Classes are compared by name, because lightning.pytorch and pytorch_lightning each have their own. `isinstance` would
# not do: DeepSpeedStrategy is a DDPStrategy, and a subclass could do anything with the gradients.
_UNSHARDED = {"SingleDeviceStrategy", "DDPStrategy"}
_SHARDED = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}
_PACKAGES = ("lightning.pytorch.", "pytorch_lightning.")


def check_strategy(strategy: Any, callback: str, method: GradientMethod, allow_untested: bool) -> None:
    """Refuse an unknown strategy, and a method that cannot work with a strategy's shards.

    Args:
        strategy: The Trainer's strategy.
        callback: The name of the callback, for messages.
        method: The gradient method.
        allow_untested: Whether to trust a strategy that is not one of Lightning's tested ones, with a warning.

    Raises:
        MisconfigurationException: If the strategy is not one of Lightning's tested ones and ``allow_untested`` is not
            set, or if it shards gradients and the method is a function of whole gradients.
    """
    cls = type(strategy)
    if cls.__name__ not in _UNSHARDED | _SHARDED or not cls.__module__.startswith(_PACKAGES):
        untested = f"{callback} has not been tested with {cls.__name__} ({cls.__module__})"
        if not allow_untested:
            raise MisconfigurationException(
                f"{untested}: if a strategy keeps gradients elsewhere or in parts, `parameter.grad` does not have the "
                "statistics of the gradient. Use a single device, 'ddp', 'fsdp', ModelParallelStrategy or 'deepspeed'; "
                "or make sure that it leaves gradients where these do, and set allow_untested_strategy=True."
            )
        rank_zero_warn(f"{untested}: it is trusted to leave gradients where Lightning's strategies do.")
    if not isinstance(method, AffineMethod) and _family(strategy) in _SHARDED:
        raise MisconfigurationException(
            f"{callback}: {describe(method)} is a function of whole gradients, and {cls.__name__} shards them. Write "
            "it as an AffineMethod, which works with statistics of whole gradients, or use a single device or 'ddp'."
        )


def gradient_adapter(strategy: Any, module: LightningModule, callback: str) -> GradientAdapter:
    """Return the adapter for a strategy that has set up its model.

    Args:
        strategy: The Trainer's strategy.
        module: The LightningModule.
        callback: The name of the callback, for messages.

    Raises:
        RuntimeError: If the strategy has not set up its model yet, or has torn it down.
        UnsupportedGradientError: If this release of PyTorch or DeepSpeed cannot tell where gradients are, or with which
            scale.
    """
    scaler = getattr(getattr(strategy, "precision_plugin", None), "scaler", None)
    if scaler is not None and scaler.is_enabled():
        check_grad_scaler()
    family = _family(strategy)
    if family == "FSDPStrategy":
        from lightning_znorm.gradients.adapters.fsdp1 import FSDP1Adapter

        return FSDP1Adapter(module, strategy.model)
    if family == "DeepSpeedStrategy":
        if strategy.model is None or strategy.model is module:
            raise RuntimeError(
                f"{callback}.on_before_optimizer_step was called, and {type(strategy).__name__} has no engine for the "
                "model, where its gradients would be: step optimizers between `on_fit_start` and `on_fit_end` only"
            )
        from lightning_znorm.gradients.adapters.deepspeed import DeepSpeedAdapter

        return DeepSpeedAdapter(module, strategy.model)
    if family == "ModelParallelStrategy":
        dtensor_support()
    return GradientAdapter(module)


def _family(strategy: Any) -> str | None:
    """Return the name of the first of Lightning's tested classes that a strategy is or derives from."""
    for cls in type(strategy).__mro__:
        if cls.__name__ in _UNSHARDED | _SHARDED and cls.__module__.startswith(_PACKAGES):
            return cls.__name__
    return None
