"""Beside the callbacks that average weights over training."""

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.optim import SGD

from lightning_znorm import ZNormCallback
from tests.callbacks.training import LR, Training, amp, assert_every_step, assert_weights, batches, weights_of

FUSED = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
PRECISION = pytest.mark.parametrize(
    "arguments", [dict, partial(amp, init_scale=2.0**8, growth_interval=5)], ids=["32", "16-mixed"]
)


def with_batch_norm() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3, bias=False))


@FUSED
@PRECISION
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_swa_update_of_batch_norm_does_not_move_the_averaged_weights(
    fit, arguments: Any, fused: bool, momentum: float
) -> None:
    """Its extra epoch makes an optimizer step without a backward pass; without the callback, that moves the weights."""

    def configure(parameters: Any) -> SGD:
        return SGD(parameters, LR, momentum=momentum, fused=fused)

    module, data = Training(with_batch_norm(), configure), batches(3)
    fit(module, data, ZNormCallback(), StochasticWeightAveraging(LR, swa_epoch_start=2), max_epochs=4, **arguments())

    assert module.moved[:12] == [True] * 12
    assert module.moved[13:] == [False] * 2  # of the extra epoch, which begins with the averaged weights
    starts = [module.weights[3 * epoch] for epoch in (1, 2, 3)]  # "epoch 2" counts from one
    expected = {name: torch.stack([start[name].double() for start in starts]).mean(0) for name in starts[0]}
    assert_weights(weights_of(module.net), expected)
    assert module.net[1].num_batches_tracked == 3  # the extra epoch has done its work


@FUSED
@PRECISION
def test_swa_update_of_batch_norm_ends_with_the_loss_scale_that_it_has_without_the_callback(
    fit, arguments: Any, fused: bool
) -> None:
    scales = []
    for znorm in ([], [ZNormCallback()]):
        module = Training(with_batch_norm(), lambda own: SGD(own, LR, fused=fused))
        swa = StochasticWeightAveraging(LR, swa_epoch_start=1)
        fit(module, batches(3), *znorm, swa, max_epochs=3, **arguments())
        scales.append(module.scales)
    assert scales[0] == scales[1]


def test_training_goes_on_after_swa(fit) -> None:
    znorm, module, data = ZNormCallback(), Training(with_batch_norm()), batches(2)
    fit(module, data, znorm, StochasticWeightAveraging(LR, swa_epoch_start=1), max_epochs=2)
    module.net[1].momentum = 0.1
    module.weights.clear()
    fit(module, data, znorm)
    assert_every_step(module, data)


def test_ema(fit) -> None:
    module, data = Training(), batches(4)
    fit(module, data, ZNormCallback(), callbacks.EMAWeightAveraging(decay=0.5))

    assert_every_step(module, data)
    average = {name: weight.double() for name, weight in module.weights[1].items()}
    for weights in module.weights[2:]:
        average = {name: (average[name] + weights[name].double()) / 2 for name in average}
    assert_weights(weights_of(module.net), average)
