"""Where gradients are found: behind each parameter, whole or in part."""

import sys
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_znorm.gradients.errors import UnsupportedGradientError
from lightning_znorm.gradients.shards import Shard


class Place(ABC):
    """Where one gradient is found, at each step anew.

    Attributes:
        names: The parameter's names, of which it has several where modules share it.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    @property
    @abstractmethod
    def ndim(self) -> int | None:
        """Number of dimensions of the whole parameter; ``None`` while a lazy layer waits for its first batch."""

    @abstractmethod
    def find(self) -> Tensor | Shard | None:
        """The gradient as it is now: whole, or in part, or ``None`` if the parameter has none on any process.

        Raises:
            UnsupportedGradientError: If it cannot be normalized.
        """

    def rewritten(self) -> None:  # noqa: B027
        """Is called once the gradient has been rewritten, for those who keep what they have computed of it before."""

    @abstractmethod
    def drop(self) -> None:
        """Removes the gradient, so that the step leaves the parameter as it is."""


class ParameterPlace(Place):
    """A parameter whose gradient is in its ``grad``: a tensor that is whole on every process, or a DTensor.

    Args:
        names: The parameter's names.
        parameter: The parameter.
    """

    def __init__(self, names: tuple[str, ...], parameter: Tensor) -> None:
        super().__init__(names)
        self.parameter = parameter

    @property
    def ndim(self) -> int | None:  # noqa: D102
        return None if is_lazy(self.parameter) else self.parameter.ndim

    def find(self) -> Tensor | Shard | None:  # noqa: D102
        parameter = self.parameter
        # Attributes are looked up where they are kept, because a tensor takes its time to say that it has none.
        attributes = vars(parameter)
        if attributes and ("_fsdp_flattened" in attributes or "_is_flat_param" in attributes or "ds_id" in attributes):
            raise UnsupportedGradientError(
                f"the gradient of {self.names[0]} is sharded by DeepSpeed or by the first version of FSDP, and nothing "
                "here tells where the rest of it is: use FSDP2 (`torch.distributed.fsdp.fully_shard`), or "
                "lightning_znorm's callbacks in a Lightning Trainer"
            )
        grad = parameter.grad
        if type(grad) is not Tensor and has_dtensors():
            from lightning_znorm.gradients.dtensor import find_dtensor, is_dtensor

            if is_dtensor(parameter if grad is None else grad):
                return find_dtensor(parameter, self.names[0])
        if grad is None:
            return None
        if grad.layout != torch.strided:
            raise UnsupportedGradientError(
                f"the gradient of {self.names[0]} is sparse ({grad.layout}, shape {tuple(grad.shape)}), and a sparse "
                "tensor has no mean over all its elements that would leave it sparse: use dense gradients "
                "(`sparse=False` in torch.nn.Embedding), or leave this parameter out"
            )
        if not grad.is_contiguous() and 0 in grad.stride():
            # An expanded gradient, whose elements share memory, cannot be written to.
            grad = parameter.grad = grad.clone(memory_format=torch.contiguous_format)
        return grad

    def drop(self) -> None:  # noqa: D102
        self.parameter.grad = None


def has_dtensors() -> bool:
    """Whether any tensor of this program may be a DTensor."""
    # A program that has DTensors has loaded them; one that has not need not.
    return "torch.distributed.tensor" in sys.modules
