"""Which strategies are supported, and where each of them keeps its gradients."""

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_znorm.errors import ZNormRuntimeError
from lightning_znorm.gradients import AffineMethod, GradientMethod
from lightning_znorm.gradients.amp import check_grad_scaler
from lightning_znorm.gradients.methods import describe
from lightning_znorm.gradients.places import dtensor_support
from lightning_znorm.gradients.sources import GradientSource

# By name, because lightning.pytorch and pytorch_lightning each have their own classes. Not by isinstance, because
# DeepSpeedStrategy is a DDPStrategy, and a subclass could do anything with the gradients.
_WHOLE = {"SingleDeviceStrategy", "DDPStrategy"}
_SHARDED = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}
_PACKAGES = ("lightning.pytorch.", "pytorch_lightning.")


def check_strategy(strategy: Any, callback: str, method: GradientMethod, allow_untested: bool) -> None:
    """Refuses a strategy of which nothing is known, and a method that a strategy's shards do not allow.

    Raises:
        MisconfigurationException: If the strategy is none of Lightning's tested ones and untested ones are not allowed,
            or if it shards gradients and the method is a function of whole ones.
    """
    cls = type(strategy)
    if cls.__name__ not in _WHOLE | _SHARDED or not cls.__module__.startswith(_PACKAGES):
        untested = f"{callback} has not been tested with {cls.__name__} ({cls.__module__})"
        if not allow_untested:
            raise MisconfigurationException(
                f"{untested}: where a strategy keeps gradients elsewhere or in parts, the statistics of what is found "
                "in `parameter.grad` are not those of the gradient. Use a single device, 'ddp', 'fsdp', "
                "ModelParallelStrategy or 'deepspeed', or make sure yourself that it leaves gradients where these do "
                "and set allow_untested_strategy=True."
            )
        rank_zero_warn(f"{untested}: it is trusted to leave gradients where Lightning's strategies do.")
    if not isinstance(method, AffineMethod) and _family(strategy) in _SHARDED:
        raise MisconfigurationException(
            f"{callback}: {describe(method)} is a function of whole gradients, and {cls.__name__} shards them. Write "
            "it as an AffineMethod, which works with the statistics of the whole, or use a single device or 'ddp'."
        )


def gradient_source(strategy: Any, module: LightningModule, callback: str) -> GradientSource:
    """Where a strategy keeps the gradients of a module, once it has set up its model.

    Raises:
        RuntimeError: If it has not, or has taken it down.
        UnsupportedGradientError: If PyTorch or DeepSpeed lack what tells where gradients are, and in which scale.
    """
    scaler = getattr(getattr(strategy, "precision_plugin", None), "scaler", None)
    if scaler is not None and scaler.is_enabled():
        check_grad_scaler()
    family = _family(strategy)
    if family == "FSDPStrategy":
        from lightning_znorm.gradients.fsdp1 import FSDP1Source

        return FSDP1Source(module, strategy.model)
    if family == "DeepSpeedStrategy":
        if strategy.model is None or strategy.model is module:
            raise ZNormRuntimeError(
                f"{callback}.on_before_optimizer_step was called, and {type(strategy).__name__} has no engine for the "
                "model, where its gradients would be: step optimizers between `on_fit_start` and `on_fit_end` only"
            )
        from lightning_znorm.gradients.deepspeed import DeepSpeedSource

        return DeepSpeedSource(module, strategy.model)
    if family == "ModelParallelStrategy":
        dtensor_support()
    return GradientSource(module)


def _family(strategy: Any) -> str | None:
    """The class of Lightning's that a strategy is or derives from, the most special one."""
    for cls in type(strategy).__mro__:
        if cls.__name__ in _WHOLE | _SHARDED and cls.__module__.startswith(_PACKAGES):
            return cls.__name__
    return None
