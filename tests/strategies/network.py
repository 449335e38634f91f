"""The small network that every scenario trains, and its batches."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH_SIZE = 4  # of each process


class Overflowing(torch.autograd.Function):
    """Returns a parameter unchanged, and makes the last element of its gradient infinite, which one process holds."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.view(-1)[-1] = torch.inf
        return grad


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 7)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).tanh()


class Frozen(nn.Linear):
    """A layer that does not train. FSDP needs a class for it, because all of a flat parameter trains or none of it."""

    def __init__(self) -> None:
        super().__init__(7, 7)
        self.requires_grad_(False)


class Head(nn.Linear):
    """The last layer, whose bias is the last parameter.

    Attributes:
        overflows: Whether an element of the gradient of the bias becomes infinite, and no other.
    """

    overflows = False

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, Overflowing.apply(self.bias) if self.overflows else self.bias)


class Network(nn.Module):
    """A network whose sizes 2, 3 and 4 processes cannot share evenly, except `up` and `down`: tensor parallelism must.

    No bias stands in front of the normalization: its gradient would be rounding noise.

    Args:
        gain_ndim: Number of dimensions of the parameter that is a single number.
        channels_last: Whether the convolution's weight has the memory format ``channels_last``.
        unused: Whether there is a parameter that no process uses.
        partly_used: Whether there is one that the last process alone uses.

    Attributes:
        is_last: Whether this process is the last one.
    """

    def __init__(
        self, gain_ndim: int = 0, channels_last: bool = False, unused: bool = False, partly_used: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_last = False
        self.gain = nn.Parameter(torch.ones((1,) * gain_ndim))
        self.conv = nn.Conv2d(3, 7, 3)
        if channels_last:
            self.conv.to(memory_format=torch.channels_last)
        self.up = nn.Linear(63, 8)
        self.down = nn.Linear(8, 7, bias=False)
        self.norm = nn.LayerNorm(7)
        self.tied = Tied()
        self.frozen = Frozen()
        self.head = Head(7, 5)
        if unused:
            self.unused = nn.Parameter(torch.randn(5))
        if partly_used:
            self.of_last = nn.Parameter(torch.randn(5))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).tanh().flatten(1)
        x = self.norm(self.down(self.up(x).tanh()))
        logits = self.head(self.frozen(self.tied(x)).tanh()) * self.gain
        return logits + self.of_last.sin() if self.is_last and hasattr(self, "of_last") else logits


def batch_of(number: int, share: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return the images and labels of one batch of one process."""
    generator = torch.Generator().manual_seed(number * 4 + share)
    images = torch.randn(BATCH_SIZE, 3, 5, 5, generator=generator, dtype=dtype)
    return images, torch.randint(5, (BATCH_SIZE,), generator=generator)


def loss_of(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    logits = network(images.to(network.gain.dtype))
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)
