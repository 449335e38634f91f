"""The callback in Lightning's other package, whose classes are not lightning.pytorch's."""

import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from lightning_znorm import GradientCentralizationCallback, GradientMonitor, GradientTransform, ZNormCallback
from tests.callbacks.training import OPTIMIZERS, Method, Recording, assert_every_step, batches, loss_of
from tests.gradients.reference import centralized, zscore


class Training(Recording, pytorch_lightning.LightningModule):
    """With automatic optimization."""


class ManualTraining(Training):
    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.net, batch))
        optimizer.step()


def amp() -> dict[str, Any]:
    scaler = GradScaler("cpu", init_scale=2.0**10)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


@pytest.mark.parametrize("module_class", [Training, ManualTraining])
@pytest.mark.parametrize("kind", ["plain", "fused"])
@pytest.mark.parametrize(("arguments", "atol"), [(dict, 1e-6), (amp, 1e-3)], ids=["32", "16-mixed"])
@pytest.mark.parametrize(
    ("callback", "method"),
    [
        (ZNormCallback(eps=0.3), lambda grad: zscore(grad, 0.3)),
        (GradientCentralizationCallback(min_ndim=2), lambda grad: centralized(grad) if grad.ndim > 1 else grad),
        (GradientTransform(torch.tanh), torch.tanh),
    ],
    ids=["znorm", "centralization", "function"],
)
def test_every_step(fit, module_class, kind: str, arguments, atol: float, callback, method: Method) -> None:
    module, data = module_class(optimizer=OPTIMIZERS[kind]), batches(3)
    fit(module, data, callback, cls=pytorch_lightning.Trainer, **arguments())
    assert_every_step(module, data, atol, method=method)


@pytest.mark.parametrize("make", [ZNormCallback, GradientMonitor])
def test_release_whose_trainer_takes_no_callback_of_ours_is_named(monkeypatch: pytest.MonkeyPatch, make) -> None:
    """pytorch_lightning 2.5 can be installed beside lightning 2.6, and says no more than "Expected a parent"."""
    for version in ("2.5.6", "2.5rc1", "1.9.5"):
        monkeypatch.setitem(sys.modules, "pytorch_lightning", SimpleNamespace(__version__=version))
        message = (
            rf"{make.__name__}: pytorch_lightning {version} is loaded. Before version 2\.6, .*'pytorch-lightning>=2\.6'"
        )
        with pytest.warns(UserWarning, match=message):
            make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in ("2.6.0", "2.6rc1", "2.10.0", "3.0", "unknown"):
            monkeypatch.setitem(sys.modules, "pytorch_lightning", SimpleNamespace(__version__=version))
            make()
        monkeypatch.delitem(sys.modules, "pytorch_lightning")
        make()


def test_third_party_strategy_is_refused(fit) -> None:
    class ThirdParty(SingleDeviceStrategy):
        pass

    module = Training()
    with pytest.raises(MisconfigurationException, match="ZNormCallback has not been tested with ThirdParty"):
        fit(module, batches(1), ZNormCallback(), cls=pytorch_lightning.Trainer,
            strategy=ThirdParty(device=torch.device("cpu")))  # fmt: skip
    assert not module.weights


def test_bypassed_optimizer_warns_once(fit) -> None:
    class Bypassing(Training):
        automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.manual_backward(loss_of(self.net, batch))
            optimizer.step()

    with pytest.warns(
        UserWarning, match=r"ZNormCallback: optimizer 0 \(SGD\) stepped past Lightning 2 times"
    ) as caught:
        fit(Bypassing(), batches(2), ZNormCallback(), cls=pytorch_lightning.Trainer, max_epochs=3)
    assert sum("ZNormCallback" in str(warning.message) for warning in caught) == 1
