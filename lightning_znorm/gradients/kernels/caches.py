"""What kernels keep on a device between steps, because a copy to a device waits for it."""

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import TypeVar, cast

import torch

from lightning_znorm.errors import ZNormRuntimeError

Function = TypeVar("Function", bound=Callable[..., object])

# A captured CUDA graph reads these, and may be replayed any time. They are kept for good.
_captured: dict[int, object] = {}


def kept_on_device(maxsize: int) -> Callable[[Function], Function]:
    """Return a decorator like ``lru_cache``, which does not forget what a captured CUDA graph reads.

    One argument of the function is the device that the result is for.

    Raises:
        RuntimeError: When something is asked for the first time while a CUDA graph is captured.
    """

    def decorate(function: Function) -> Function:
        @lru_cache(maxsize)
        @torch.inference_mode(False)  # the next caller may need a normal tensor
        def cached(*args: Hashable) -> object:
            if is_capturing(_device_of(args)):
                raise ZNormRuntimeError(
                    "gradients of these sizes are new, and tables of them cannot be copied to the device while a CUDA "
                    "graph is captured: take a step with them before, as in the warm-up of the graph"
                )
            with torch.device("cpu"):  # whatever the program's default is
                return function(*args)

        @wraps(function)
        def call(*args: Hashable) -> object:
            result = cached(*args)
            if is_capturing(_device_of(args)):
                _captured[id(result)] = result
            return result

        call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
        return cast("Function", call)

    return decorate


def _device_of(args: tuple[object, ...]) -> torch.device:
    return next(arg for arg in args if isinstance(arg, torch.device))


def is_capturing(device: torch.device) -> bool:
    """Return whether what is launched on a device is recorded for a CUDA graph."""
    if device.type != "cuda" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
