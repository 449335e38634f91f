"""The methods by their definitions, in float64, to compare everything with."""

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """A copy in double precision."""
    return tensor.detach().clone().to(torch.complex128 if tensor.is_complex() else torch.float64)


def zscore(grad: Tensor, eps: float = 1e-10, centering: str = "full") -> Tensor:
    grad = wide(grad)
    mean = grad.mean()
    variance, squared_mean = (grad - mean).abs().square().mean(), mean.abs().square()
    removed = 1.0
    if centering == "adaptive" and squared_mean > 0:
        removed = variance / (variance + squared_mean)
    return (grad - removed * mean) / ((variance + (1 - removed) ** 2 * squared_mean).sqrt() + eps)


def centralized(grad: Tensor) -> Tensor:
    grad = wide(grad)
    return grad - grad.mean(dim=tuple(range(1, grad.ndim)), keepdim=True)


def rms_normalized(grad: Tensor) -> Tensor:
    grad = wide(grad)
    return grad / grad.abs().square().mean().sqrt()


def sing(grad: Tensor, eps: float = 1e-8) -> Tensor:
    centered = centralized(grad) if grad.ndim > 1 and grad[0].numel() > 1 else wide(grad)
    return centered / (centered.abs().square().sum().sqrt() + eps)
