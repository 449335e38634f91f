"""Where gradients are found: behind each parameter, whole or in part."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType

import torch
from torch import Tensor
from torch.nn import Parameter
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
        if _are_of_shards(vars(parameter)):
            raise UnsupportedGradientError(
                f"the gradient of {self.names[0]} is sharded by DeepSpeed or by the first version of FSDP, and nothing "
                "here tells where the rest of it is: use FSDP2 (`torch.distributed.fsdp.fully_shard`), or "
                "lightning_znorm's callbacks in a Lightning Trainer"
            )
        grad = parameter.grad
        if type(grad) is not Tensor and _has_dtensors():
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


class NumberedPlaces:
    """The places of parameters that have no names: iterable, and made only then, as most steps need none.

    Args:
        groups: The parameters; one that occurs twice counts once.
        are_an_optimizers: Whether to name the group of each.

    Raises:
        TypeError: If something is given that is not a tensor.
    """

    def __init__(self, *groups: Iterable[Tensor], are_an_optimizers: bool = False) -> None:
        self._names_groups = are_an_optimizers
        self._groups = [list(group) for group in groups]
        every = [parameter for group in self._groups for parameter in group]
        if not set(map(type, every)) <= _ORDINARY:
            for name, parameter in self._named():
                if not isinstance(parameter, Tensor):
                    raise TypeError(f"{name} is not a tensor but a {type(parameter).__name__}: give model.parameters()")
        # By identity, because a tensor takes its time to give its hash.
        self.parameters = list({id(parameter): parameter for parameter in every}.values())

    def __iter__(self) -> Iterator[ParameterPlace]:
        names: dict[int, str] = {}
        for name, parameter in self._named():
            names.setdefault(id(parameter), name)
        for parameter in self.parameters:
            yield ParameterPlace((names[id(parameter)],), parameter)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for number, group in enumerate(self._groups):
            of_group = f" of group {number}" if self._names_groups else ""
            for index, parameter in enumerate(group):
                yield f"parameter {index}{of_group}", parameter


def find_all(places: Sequence[Place] | NumberedPlaces) -> list[Tensor | Shard | None]:
    """The gradients as they are now, in the order of their places; sums that DTensors stand for are taken before.

    Raises:
        UnsupportedGradientError: If one of them cannot be normalized.
    """
    if isinstance(places, NumberedPlaces):
        parameters, all_in_parameters = places.parameters, True
    else:
        parameters = [place.parameter for place in places if isinstance(place, ParameterPlace)]
        all_in_parameters = set(map(type, places)) <= {ParameterPlace}
    if all_in_parameters and (grads := _ordinary_grads(parameters)) is not None:
        return grads
    if _has_dtensors():
        from lightning_znorm.gradients.dtensor import replicate_partial_grads_

        replicate_partial_grads_(parameters)
    return [place.find() for place in places]


def _ordinary_grads(parameters: Sequence[Tensor]) -> list[Tensor | Shard | None] | None:
    """The gradients of parameters, if no place needs to look at one of them; ``None`` otherwise.

    In most steps this is all there is to find, and models have hundreds of parameters: asking one thing of all of them
    takes a third of the time of asking all things of each.
    """
    if not set(map(type, parameters)) <= _ORDINARY:
        return None
    if any(map(_are_of_shards, filter(None, map(vars, parameters)))):
        return None
    grads = [parameter.grad for parameter in parameters]
    if not set(map(type, grads)) <= {Tensor, NoneType}:
        return None
    strided = torch.strided
    for grad in grads:
        if grad is not None and (grad.layout is not strided or (not grad.is_contiguous() and 0 in grad.stride())):
            return None
    return [*grads]


# Types of parameters that are neither DTensors nor lazy.
_ORDINARY = {Parameter, Tensor}


def _are_of_shards(attributes: Mapping[str, object]) -> bool:
    """Whether a parameter's attributes tell that DeepSpeed or the first version of FSDP keeps its gradient."""
    return "_fsdp_flattened" in attributes or "_is_flat_param" in attributes or "ds_id" in attributes


def _has_dtensors() -> bool:
    """Whether any tensor of this program may be a DTensor."""
    # A program that has DTensors has loaded them; one that has not need not.
    return "torch.distributed.tensor" in sys.modules
