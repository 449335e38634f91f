"""A small network in a real Trainer, which keeps its weights after every batch, and the same steps by hand in float64.

Plain SGD throughout: Adam would hide a wrong scale.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.func import functional_call
from torch.optim import SGD, Optimizer

from tests.gradients.reference import wide, zscore

LR = 0.1

Weights = dict[str, Tensor]
Method = Callable[[Tensor], Tensor]


class ScalerTakingSGD(SGD):
    """Is handed the scaler, and always divides by its scale, as Transformer Engine's capturable FusedAdam does."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None, *, grad_scaler: GradScaler | None = None) -> Any:
        if grad_scaler is None:
            return super().step(closure)
        if any(found.item() for found in grad_scaler._check_inf_per_device(self).values()):
            return None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad / grad_scaler._get_scale_async(), alpha=group["lr"])
        return None


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "plain": partial(SGD, lr=LR),
    "fused": partial(SGD, lr=LR, fused=True),
    "scaler-taking": partial(ScalerTakingSGD, lr=LR),
}


def network(seed: int = 0) -> nn.Sequential:
    """Without biases in front of a normalization, whose gradient would be rounding noise."""
    torch.manual_seed(seed)
    layers = {"first": nn.Linear(6, 5), "tanh": nn.Tanh(), "last": nn.Linear(5, 3, bias=False)}
    return nn.Sequential(OrderedDict(layers))


def batches(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 6, generator=generator) for _ in range(count)]


def loss_of(net: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return (net(batch) - 1).square().sum(1).mean()


def amp(**scaler: Any) -> dict[str, Any]:
    """Trainer arguments for 16-mixed on a CPU, where the precision's name alone would mean bfloat16."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu", **scaler))]}


def weights_of(net: nn.Module) -> Weights:
    return {name: param.detach().clone() for name, param in net.named_parameters()}


class Recording:
    """A LightningModule of either package, once mixed with it, that writes down what each batch does.

    Attributes:
        weights: Those of the network before the first batch and after each.
        scales: The loss scale after each batch.
    """

    def __init__(
        self,
        net: nn.Module | None = None,
        optimizer: Callable[[Any], Any] = OPTIMIZERS["plain"],
        returns_none: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.net = network() if net is None else net
        self.optimizer = optimizer
        self.returns_none = returns_none
        self.weights: list[Weights] = []
        self.scales: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return None if batch_idx in self.returns_none else loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())

    def on_train_start(self) -> None:
        self.weights.append(weights_of(self.net))

    def on_train_batch_end(self, *_: Any) -> None:
        self.weights.append(weights_of(self.net))
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.scales.append(scaler.get_scale())

    @property
    def moved(self) -> list[bool]:
        """Whether each batch changed any weight."""
        return [
            any(not torch.equal(before[name], after[name]) for name in before)
            for before, after in zip(self.weights, self.weights[1:], strict=False)
        ]


class Training(Recording, LightningModule):
    """With automatic optimization."""


class ManualTraining(Training):
    """With a training step given as a function of the module and the batch."""

    def __init__(self, script: Callable[[LightningModule, Tensor], None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.script = script

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.script(self, batch)


def stepped(
    net: nn.Module,
    before: Weights,
    window: Sequence[Tensor],
    method: Method = zscore,
    chosen: Callable[[str], bool] = lambda name: True,
    lr: float = LR,
    accumulate: int | None = None,
) -> Weights:
    """The weights after one step by hand.

    Args:
        net: Gives the forward pass.
        before: The weights to start from.
        window: The batches whose losses are accumulated.
        method: Makes the update of a gradient.
        chosen: Which parameters, by name, the method applies to.
        lr: Learning rate.
        accumulate: What the sum of the losses is divided by, if not the number of batches.
    """
    twin = copy.deepcopy(net).double()
    weights = {name: wide(weight).requires_grad_() for name, weight in before.items()}
    losses = [loss_of(lambda x: functional_call(twin, weights, (x,)), batch.double()) for batch in window]
    total = torch.stack(losses).sum() / (accumulate or len(window))
    grads = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    after = {}
    for (name, weight), grad in zip(weights.items(), grads, strict=True):
        update = 0.0 if grad is None else method(grad) if chosen(name) else grad
        after[name] = weight.detach() - lr * update
    return after


def assert_weights(actual: Weights, expected: Weights, atol: float = 1e-6) -> None:
    assert list(actual) == list(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(
            wide(actual[name]), weight, rtol=0, atol=atol, msg=lambda message, name=name: f"{name}: {message}"
        )


def assert_every_step(module: Recording, data: Sequence[Tensor], atol: float = 1e-6, **how: Any) -> None:
    """Compares what each batch did to the weights with a step by hand from the weights before it."""
    assert len(module.weights) == len(data) + 1
    for before, batch, after in zip(module.weights, data, module.weights[1:], strict=False):
        assert_weights(after, stepped(module.net, before, [batch], **how), atol)
