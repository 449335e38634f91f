"""The same method twice on the same parameters is refused before the first step."""

from functools import partial

import pytest
import pytorch_lightning
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_znorm import GradientCentralizationCallback, GradientTransform, SINGCallback, ZNormCallback
from lightning_znorm.gradients import Centralization, ZScore
from tests.callbacks.test_pytorch_lightning import Training as OtherTraining
from tests.callbacks.training import Training, assert_every_step, batches


def scaled(grad: Tensor, factor: float) -> Tensor:
    return grad * factor


class OwnZNorm(ZNormCallback):
    """Another name for the same."""


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (ZNormCallback(), ZNormCallback(min_ndim=2), "net.first.weight and 1 more"),
        (ZNormCallback(), ZNormCallback(eps=1e-3), "net.first.weight and 2 more"),
        (ZNormCallback(include="*.bias"), ZNormCallback(include="net.first.*"), "net.first.bias"),
        (ZNormCallback(), GradientTransform(ZScore(), min_ndim=2), "net.first.weight and 1 more"),
        (OwnZNorm(), ZNormCallback(), "net.first.weight and 2 more"),
        (GradientCentralizationCallback("*last*"), GradientTransform(Centralization()), "net.last.weight"),
        (SINGCallback(), SINGCallback(1e-3), "net.first.weight and 2 more"),
        (GradientTransform(torch.sign), GradientTransform(torch.sign, min_ndim=2), "net.first.weight and 1 more"),
        (
            GradientTransform(partial(scaled, factor=2)),
            GradientTransform(partial(scaled, factor=3), "*bias"),
            "net.first.bias",
        ),
    ],
    ids=["options", "eps", "patterns", "transform", "subclass", "centralization", "sing", "function", "partial"],
)
def test_overlapping_parameters(fit, first, second, shared: str) -> None:
    module = Training()
    message = f"{type(second).__name__} with .* would repeat what {type(first).__name__} with .* gradients of {shared}"
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, batches(1), first, second)
    assert not module.weights


def test_with_another_method_in_between(fit) -> None:
    with (
        pytest.warns(UserWarning, match="SINGCallback transforms .* after ZNormCallback"),
        pytest.raises(MisconfigurationException, match=r"ZNormCallback with .* would repeat what ZNormCallback"),
    ):
        fit(Training(), batches(1), ZNormCallback(), SINGCallback(), ZNormCallback(min_ndim=2))


def test_in_the_other_package(fit) -> None:
    with pytest.raises(MisconfigurationException, match="would repeat what ZNormCallback with ZScore"):
        fit(OtherTraining(), batches(1), ZNormCallback(), ZNormCallback(min_ndim=2), cls=pytorch_lightning.Trainer)


def test_disjoint_parameters_are_fine(fit) -> None:
    module, data = Training(), batches(2)
    fit(module, data, ZNormCallback(exclude="*.bias"), ZNormCallback(eps=1e-3, include="*.bias"))
    assert_every_step(module, data, atol=1e-3)


def test_layers_that_are_lazy_at_first(fit) -> None:
    class Lazy(Training):
        def on_train_start(self) -> None:  # there are no weights yet
            pass

    def module() -> Lazy:
        return Lazy(nn.Sequential(nn.LazyLinear(3)))

    # Disjoint by their numbers of dimensions, which are known after the first forward pass.
    fit(module(), batches(2), ZNormCallback(min_ndim=2), ZNormCallback(include="*.bias"))
    refused = module()
    with pytest.raises(MisconfigurationException, match=r"would repeat .* gradients of net\.0\.weight: remove"):
        fit(refused, batches(2), ZNormCallback(min_ndim=2), ZNormCallback(include="*.weight"))
    assert not refused.weights


def test_parameters_that_come_later(fit) -> None:
    class Growing(Training):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.net.append(nn.Linear(3, 2, bias=False))
                self.optimizers().add_param_group({"params": self.net[-1].parameters()})

    module = Growing()
    with pytest.raises(MisconfigurationException, match=r"would repeat .* gradients of net\.3\.weight: remove"):
        fit(module, batches(1), ZNormCallback(exclude="*last*"), ZNormCallback(exclude="*first*"), max_epochs=2)
    assert module.moved == [True]
