"""Strategies that shard the gradients, or of which nothing is known, are refused before the first step."""

import inspect

import lightning.pytorch.strategies
import pytest
import pytorch_lightning.strategies
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_znorm import GradientCentralizationCallback, GradientTransform, ZNormCallback
from lightning_znorm.callbacks.strategies import check_strategy
from tests.callbacks.training import Training, batches

SUPPORTED = {"SingleDeviceStrategy", "DDPStrategy"}
PACKAGES = (lightning.pytorch.strategies, pytorch_lightning.strategies)
ALL = [
    pytest.param(cls, id=f"{cls.__module__.split('.')[0]}-{cls.__name__}")
    for package in PACKAGES
    for cls in vars(package).values()
    if inspect.isclass(cls) and cls.__name__.endswith("Strategy") and not inspect.isabstract(cls)
]


@pytest.mark.parametrize("cls", ALL)
def test_every_strategy_of_lightning(cls: type) -> None:
    strategy = object.__new__(cls)  # most need an accelerator, or a package, to be made
    if cls.__name__ in SUPPORTED:
        check_strategy(strategy, "ZNormCallback")
    else:
        message = rf"ZNormCallback does not support {cls.__name__} \({cls.__module__}\).*Use a single device or DDP"
        with pytest.raises(MisconfigurationException, match=message):
            check_strategy(strategy, "ZNormCallback")


def test_the_list_above_is_not_empty_handed() -> None:
    names = [parameter.values[0].__name__ for parameter in ALL]
    for name in [*SUPPORTED, "FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"]:
        assert names.count(name) == len(PACKAGES)


@pytest.mark.parametrize("module", ["colossal.strategies", "lightning.pytorch_plus.ddp", "my.lightning.pytorch.x"])
def test_namesake_of_another_package_is_refused(module: str) -> None:
    namesake = type("DDPStrategy", (DDPStrategy,), {"__module__": module})
    with pytest.raises(MisconfigurationException, match=rf"DDPStrategy \({module}\)"):
        check_strategy(object.__new__(namesake), "ZNormCallback")


class ThirdParty(SingleDeviceStrategy):
    """Could do anything with the gradients."""


class ThirdPartyDDP(DDPStrategy):
    """DeepSpeed's, too, is one of these."""


@pytest.mark.parametrize(
    "callback",
    [ZNormCallback(), GradientCentralizationCallback(), GradientTransform(torch.sign)],
    ids=lambda callback: type(callback).__name__,
)
def test_third_party_strategy_is_refused_before_the_first_step(fit, callback: GradientTransform) -> None:
    class NotReached(Training):
        def configure_optimizers(self) -> None:
            raise AssertionError("after the model's setup")

    message = rf"{type(callback).__name__} does not support ThirdParty \({__name__}\)"
    with pytest.raises(MisconfigurationException, match=message):
        fit(NotReached(), batches(1), callback, strategy=ThirdParty(device=torch.device("cpu")))


def test_subclass_of_ddp_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="does not support ThirdPartyDDP"):
        check_strategy(ThirdPartyDDP(), "ZNormCallback")


@pytest.mark.parametrize("strategy", ["auto", SingleDeviceStrategy(device=torch.device("cpu"))], ids=["auto", "object"])
def test_single_device_is_accepted(fit, strategy: str | Strategy) -> None:
    module = Training()
    fit(module, batches(1), ZNormCallback(), strategy=strategy)
    assert module.moved == [True]
