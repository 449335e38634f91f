r"""Ways to keep ZNorm from amplifying small gradients near convergence, each one line of mathematics.

Here :math:`\sigma_t` is the deviation of a tensor's gradient at step t, :math:`\bar\sigma_t` the mean of
:math:`\sigma_1 \dots \sigma_t`, and :math:`z = (g - \mu) / \sigma_t` plain ZNorm. For a study on a single device.
"""

from abc import abstractmethod

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer


class Candidate(Callback):
    """Base class: replaces the gradient of every tensor with more than one element, using the gradient's history."""

    def __init__(self) -> None:
        self._history: dict[Tensor, tuple[int, Tensor]] = {}

    @abstractmethod
    def replacement(self, grad: Tensor, sigma: Tensor, running: Tensor, parameter: Tensor, progress: float) -> Tensor:
        """Return what the optimizer gets in place of a gradient.

        Args:
            grad: The gradient.
            sigma: Its standard deviation.
            running: Mean of the deviations up to now, including this one.
            parameter: The parameter to which the gradient belongs.
            progress: The learning rate as a share of the first one.
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
        eps: A share of the running deviation: gradients are amplified at most ``1 / eps`` times.
    """

    def __init__(self, eps: float = 0.1) -> None:
        super().__init__()
        self.eps = eps

    def replacement(self, grad: Tensor, sigma: Tensor, running: Tensor, parameter: Tensor, progress: float) -> Tensor:
        return (grad - grad.mean()) / (sigma + self.eps * running)


class Blend(Candidate):
    r"""From z to the gradient, as noise grows: :math:`\lambda z + (1 - \lambda) g / \bar\sigma_t`.

    :math:`\lambda = |m|^2 / d`, where m is the moving average of the z-scores, and d their squared norm. Without noise,
    this is one; with nothing but noise, it is :math:`(1 - \beta) / (1 + \beta)`.

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
    r"""From z to the gradient, as the learning rate falls: :math:`p z + (1 - p) g / \bar\sigma_t`.

    p is the learning rate as a share of the first one. Without a schedule this is plain ZNorm.
    """

    def replacement(self, grad: Tensor, sigma: Tensor, running: Tensor, parameter: Tensor, progress: float) -> Tensor:
        return progress * (grad - grad.mean()) / sigma + (1 - progress) * grad / running
