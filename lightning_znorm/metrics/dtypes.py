"""Types to compute with, chosen by device and input, never by torch's default, which a Trainer's precision changes."""

import torch
from torch import Tensor


def widest_float(device: torch.device) -> torch.dtype:
    """Return the floating-point type of the highest precision that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def at_least_float32(values: Tensor) -> Tensor:
    """Return values as they are, but those in half precision in float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def orderable(values: Tensor) -> Tensor:
    """Return values in a type that torch can compare: it hardly computes with unsigned integers of 16 bits and more."""
    return values.long() if values.dtype in (torch.uint16, torch.uint32, torch.uint64) else values
