"""The methods by their definitions, in float64, to compare everything with."""

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """A copy in double precision."""
    return tensor.detach().clone().to(torch.complex128 if tensor.is_complex() else torch.float64)


def zscore(grad: Tensor, eps: float = 1e-10) -> Tensor:
    grad = wide(grad)
    centered = grad - grad.mean()
    return centered / (centered.abs().square().mean().sqrt() + eps)


def centralized(grad: Tensor) -> Tensor:
    grad = wide(grad)
    return grad - grad.mean(dim=tuple(range(1, grad.ndim)), keepdim=True)


def rms_normalized(grad: Tensor) -> Tensor:
    grad = wide(grad)
    return grad / grad.abs().square().mean().sqrt()


def sing(grad: Tensor, eps: float = 1e-8) -> Tensor:
    centered = centralized(grad) if grad.ndim > 1 and grad[0].numel() > 1 else wide(grad)
    return centered / (centered.abs().square().sum().sqrt() + eps)
