"""Strategies of which nothing is known, and methods that shards do not allow, are refused before the first step."""

import inspect
import warnings

import lightning.pytorch.strategies
import pytest
import pytorch_lightning.strategies
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_znorm import GradientCentralizationCallback, GradientTransform, ZNormCallback
from lightning_znorm.callbacks.strategies import check_strategy
from lightning_znorm.gradients import GradientMethod, ZScore
from tests.callbacks.training import Training, assert_every_step, batches

ZSCORE = ZScore()
WHOLE = {"SingleDeviceStrategy", "DDPStrategy"}
SHARDED = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}
PACKAGES = (lightning.pytorch.strategies, pytorch_lightning.strategies)
ALL = [
    pytest.param(cls, id=f"{cls.__module__.split('.')[0]}-{cls.__name__}")
    for package in PACKAGES
    for cls in vars(package).values()
    if inspect.isclass(cls) and cls.__name__.endswith("Strategy") and not inspect.isabstract(cls)
]


def check(cls: type, method: GradientMethod = ZSCORE, allow_untested: bool = False) -> None:
    # Most strategies need an accelerator, or a package, to be made.
    check_strategy(object.__new__(cls), "ZNormCallback", method, allow_untested)


@pytest.mark.parametrize("cls", ALL)
def test_every_strategy_of_lightning(cls: type) -> None:
    if cls.__name__ in WHOLE | SHARDED:
        check(cls)
    else:
        message = (
            rf"ZNormCallback has not been tested with {cls.__name__} \({cls.__module__}\).*Use a single device, 'ddp'"
        )
        with pytest.raises(MisconfigurationException, match=message):
            check(cls)


@pytest.mark.parametrize("cls", ALL)
def test_function_needs_whole_gradients(cls: type) -> None:
    if cls.__name__ in WHOLE:
        check(cls, torch.sign)
    elif cls.__name__ in SHARDED:
        message = rf"sign is a function of unsharded gradients, and {cls.__name__} shards them.*AffineMethod.*'ddp'"
        with pytest.raises(MisconfigurationException, match=message):
            check(cls, torch.sign)


def test_the_lists_above_are_not_empty_handed() -> None:
    names = [parameter.values[0].__name__ for parameter in ALL]
    for name in WHOLE | SHARDED:
        assert names.count(name) == len(PACKAGES)
    assert {"XLAStrategy", "SingleDeviceXLAStrategy"} <= set(names) - WHOLE - SHARDED


@pytest.mark.parametrize("module", ["colossal.strategies", "lightning.pytorch_plus.ddp", "my.lightning.pytorch.x"])
def test_namesake_of_another_package_is_refused(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    namesake = type("DDPStrategy", (DDPStrategy,), {})
    monkeypatch.setattr(namesake, "__module__", module)
    with pytest.raises(MisconfigurationException, match=rf"DDPStrategy \({module}\)"):
        check(namesake)


class ThirdParty(SingleDeviceStrategy):
    """Could do anything with the gradients."""


@pytest.mark.parametrize("base", [DDPStrategy, FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_subclasses(base: type) -> None:
    subclass = type("ThirdParty", (base,), {})
    with pytest.raises(
        MisconfigurationException, match=r"has not been tested with ThirdParty.*allow_untested_strategy=True"
    ):
        check(subclass)
    with pytest.warns(UserWarning, match="has not been tested with ThirdParty"):
        check(subclass, allow_untested=True)
    if base is not DDPStrategy:
        # To allow an untested strategy is not to allow what its base cannot do.
        with (
            pytest.warns(UserWarning, match="has not been tested with ThirdParty"),
            pytest.raises(MisconfigurationException, match="ThirdParty shards them"),
        ):
            check(subclass, torch.sign, allow_untested=True)


CALLBACKS = {
    "znorm": ZNormCallback,
    "centralization": GradientCentralizationCallback,
    "transform": lambda **options: GradientTransform(torch.sign, **options),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_third_party_strategy_is_refused_before_the_first_step(fit, name: str) -> None:
    class NotReached(Training):
        def configure_optimizers(self) -> None:
            raise AssertionError("after the model's setup")

    callback = CALLBACKS[name]()
    message = rf"{type(callback).__name__} has not been tested with ThirdParty \({__name__}\)"
    with pytest.raises(MisconfigurationException, match=message):
        fit(NotReached(), batches(1), callback, strategy=ThirdParty(device=torch.device("cpu")))


@pytest.mark.parametrize("name", CALLBACKS)
def test_third_party_strategy_is_allowed_with_one_warning(fit, name: str) -> None:
    module, data = Training(), batches(3)
    callback = CALLBACKS[name](allow_untested_strategy=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", ".*has not been tested")
        fit(module, data, callback, strategy=ThirdParty(device=torch.device("cpu")), max_epochs=2)
    assert [str(warning.message) for warning in caught] == [
        f"{type(callback).__name__} has not been tested with ThirdParty ({__name__}): it is trusted to leave gradients "
        "where Lightning's strategies do."
    ]
    assert all(module.moved)


def test_third_party_strategy_is_trained_with_the_z_score(fit) -> None:
    module, data = Training(), batches(3)
    with pytest.warns(UserWarning, match="has not been tested with ThirdParty"):
        fit(
            module,
            data,
            ZNormCallback(allow_untested_strategy=True),
            strategy=ThirdParty(device=torch.device("cpu")),
        )
    assert_every_step(module, data)


@pytest.mark.parametrize("strategy", ["auto", SingleDeviceStrategy(device=torch.device("cpu"))], ids=["auto", "object"])
def test_single_device_is_accepted(fit, strategy: str | Strategy) -> None:
    module = Training()
    fit(module, batches(1), ZNormCallback(), strategy=strategy)
    assert module.moved == [True]
