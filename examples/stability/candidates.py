r"""Ways to keep ZNorm from amplifying a gradient that has become small, each one line of mathematics.

In the formulas, :math:`\sigma_t` is the deviation of a tensor's gradient at step t, :math:`\bar\sigma_t` the mean of
:math:`\sigma_1 \dots \sigma_t`, and :math:`z = (g - \mu) / \sigma_t` plain ZNorm. For study, on a single device.
"""

from abc import abstractmethod

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer


class Candidate(Callback):
    """Replaces the gradient of every tensor of several elements, with the help of its history."""

    def __init__(self) -> None:
        self._history: dict[Tensor, tuple[int, Tensor]] = {}

    @abstractmethod
    def replacement(self, grad: Tensor, sigma: Tensor, running: Tensor, parameter: Tensor, progress: float) -> Tensor:
        """Return what the optimizer gets in place of a gradient.

        Args:
            grad: The gradient, of mean ``grad.mean()`` and deviation ``sigma``.
            sigma: Its deviation.
            running: Mean of the deviations up to now, this one among them.
            parameter: The parameter.
            progress: The learning rate, relative to the first one.
        """

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Replace the gradients."""
        for group in optimizer.param_groups:
            progress = group["lr"] / group.get("initial_lr", group["lr"])
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None or grad.numel() < 2:
                    continue
                sigma = grad.std(correction=0)
                count, running = self._history.get(parameter, (0, torch.zeros_like(sigma)))
                running = running + (sigma - running) / (count + 1)
                self._history[parameter] = count + 1, running
                grad.copy_(self.replacement(grad, sigma, running, parameter, progress))


class Floor(Candidate):
    r"""A one-sided floor: :math:`(g - \mu) / \max(\sigma_t, \bar\sigma_t)`."""

    def replacement(self, grad: Tensor, sigma: Tensor, running: Tensor, parameter: Tensor, progress: float) -> Tensor:
        return (grad - grad.mean()) / torch.maximum(sigma, running)


class Geometric(Candidate):
    r"""Half-way to the gradient's history: :math:`(g - \mu) / \sqrt{\sigma_t \bar\sigma_t}`."""

    def replacement(self, grad: Tensor, sigma: Tensor, running: Tensor, parameter: Tensor, progress: float) -> Tensor:
        return (grad - grad.mean()) / (sigma * running).sqrt()


class RelativeEps(Candidate):
    r"""An eps that follows the gradient's history: :math:`(g - \mu) / (\sigma_t + \epsilon \bar\sigma_t)`.

    Args:
        eps: Its share of the running deviation: gradients are amplified no more than ``1 / eps`` times.
    """

    def __init__(self, eps: float = 0.1) -> None:
        super().__init__()
        self.eps = eps

    def replacement(self, grad: Tensor, sigma: Tensor, running: Tensor, parameter: Tensor, progress: float) -> Tensor:
        return (grad - grad.mean()) / (sigma + self.eps * running)


class Blend(Candidate):
    r"""As noise takes over, from z to the gradient: :math:`\lambda z + (1 - \lambda) g / \bar\sigma_t`.

    With :math:`\lambda = |m|^2 / d` from the moving average m of the z-scores, whose squared norm is d. It is 1 without
    noise, and :math:`(1 - \beta) / (1 + \beta)` for noise alone.

    Args:
        beta: Decay of the moving average.
    """

    def __init__(self, beta: float = 0.9) -> None:
        super().__init__()
        self.beta = beta
        self._averages: dict[Tensor, tuple[float, Tensor]] = {}

    def replacement(self, grad: Tensor, sigma: Tensor, running: Tensor, parameter: Tensor, progress: float) -> Tensor:
        z = (grad - grad.mean()) / sigma
        weight, average = self._averages.get(parameter, (0.0, torch.zeros_like(z)))
        weight = self.beta * weight + 1 - self.beta
        average = average.lerp(z, 1 - self.beta)
        self._averages[parameter] = weight, average
        share = (average / weight).square().mean().clamp(max=1)
        return share * z + (1 - share) * grad / running


class Handover(Candidate):
    r"""With the learning rate, from z to the gradient: :math:`p z + (1 - p) g / \bar\sigma_t`.

    With p the learning rate, relative to the first one. Without a schedule this is plain ZNorm.
    """

    def replacement(self, grad: Tensor, sigma: Tensor, running: Tensor, parameter: Tensor, progress: float) -> Tensor:
        return progress * (grad - grad.mean()) / sigma + (1 - progress) * grad / running
