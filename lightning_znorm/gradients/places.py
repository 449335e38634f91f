"""Where gradients are found: behind each parameter, whole or in part."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from types import ModuleType, NoneType

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from lightning_znorm.errors import ZNormTypeError
from lightning_znorm.gradients.errors import UnsupportedGradientError, untested_torch
from lightning_znorm.gradients.shards import Shard
from lightning_znorm.gradients.shared_memory import has_internal_overlap


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
        if vars(parameter) and _is_sharded(parameter):
            raise UnsupportedGradientError(
                f"the gradient of {self.names[0]} is sharded by DeepSpeed or by the first version of FSDP, and nothing "
                "here tells where the rest of it is: use FSDP2 (`torch.distributed.fsdp.fully_shard`), or "
                "lightning_znorm's callbacks in a Lightning Trainer"
            )
        grad = parameter.grad
        tensor = parameter if grad is None else grad
        if grad is not None and grad.dtype not in _TYPES:
            raise UnsupportedGradientError(
                f"the gradient of {self.names[0]} is of type {grad.dtype}, in which PyTorch takes neither means nor "
                "deviations: keep it in float16, bfloat16, float32 or float64, or leave this parameter out"
            )
        if _is_distributed(tensor):
            dtensor = dtensor_support()
            if dtensor.is_dtensor(tensor):
                found: Tensor | Shard | None = dtensor.find_dtensor(parameter, self.names[0])
                return found
            if not dtensor.is_async(tensor):
                raise UnsupportedGradientError(
                    f"the gradient of {self.names[0]} is a {type(tensor).__name__} of PyTorch's distributed package, "
                    "and nothing here tells what it holds of the whole: use DTensors (FSDP2, tensor parallelism), or "
                    "leave this parameter out"
                )
        if grad is None:
            return None
        if grad.layout != torch.strided:
            raise UnsupportedGradientError(
                f"the gradient of {self.names[0]} is sparse ({grad.layout}, shape {tuple(grad.shape)}), and a sparse "
                "tensor has no mean over all its elements that would leave it sparse: use dense gradients "
                "(`sparse=False` in torch.nn.Embedding), or leave this parameter out"
            )
        if has_internal_overlap(grad):
            # An expanded gradient, for one, cannot be written to.
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
                    raise ZNormTypeError(
                        f"{name} is not a tensor but a {type(parameter).__name__}: give model.parameters()"
                    )
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
    if any(_is_distributed(parameter.grad) for parameter in parameters):
        dtensor_support().replicate_partial_grads_(parameters)
    return [place.find() for place in places]


def _ordinary_grads(parameters: Sequence[Tensor]) -> list[Tensor | Shard | None] | None:
    """The gradients of parameters, if no place needs to look at one of them; ``None`` otherwise.

    In most steps this is all there is to find, and models have hundreds of parameters: asking one thing of all of them
    takes a third of the time of asking all things of each.
    """
    if not set(map(type, parameters)) <= _ORDINARY:
        return None
    # Both mark a parameter by attributes, and a tensor takes its time to say that it has not this one.
    if any(map(_is_sharded, filter(vars, parameters))):
        return None
    grads = [parameter.grad for parameter in parameters]
    if not set(map(type, grads)) <= {Tensor, NoneType}:
        return None
    strided, types = torch.strided, _TYPES
    for grad in grads:
        if grad is not None and (grad.layout is not strided or grad.dtype not in types or has_internal_overlap(grad)):
            return None
    return [*grads]


# Types of gradients whose statistics PyTorch can take: not those of eight bits and fewer.
_TYPES = frozenset(
    {
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.complex32, torch.complex64, torch.complex128),
    }
)

# Types of parameters that are neither DTensors nor lazy.
_ORDINARY = {Parameter, Tensor}


def _is_sharded(parameter: Tensor) -> bool:
    """Whether DeepSpeed or the first version of FSDP keeps a parameter's gradient, which they are asked themselves.

    A program that has parameters of theirs has loaded them; one that has not need not.

    Raises:
        UnsupportedGradientError: If a program may have such parameters, and this release of theirs cannot be asked.
    """
    try:
        if hasattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel"):
            from torch.distributed.fsdp import FlatParameter, _flat_param
            from torch.distributed.fsdp._common_utils import _is_fsdp_flattened

            if not hasattr(_flat_param, "_set_fsdp_flattened"):
                raise ImportError("torch.distributed.fsdp does not mark its parameters by _set_fsdp_flattened")
            if _is_fsdp_flattened(parameter) or isinstance(parameter, FlatParameter):
                return True
        if "deepspeed" in sys.modules:
            from deepspeed.runtime.zero.utils import is_zero_param

            return bool(is_zero_param(parameter))
    except ImportError as error:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UnsupportedGradientError(
                "whether parameters are sharded by DeepSpeed or by the first version of FSDP cannot be told in these "
                f"releases of theirs: {error}. Use older ones, or a newer one of lightning-znorm"
            ) from error
    return False


def _is_distributed(tensor: Tensor | None) -> bool:
    """Whether a tensor is of one of the kinds that torch's distributed package has, such as DTensor."""
    kind = type(tensor)
    return kind not in _LOCAL and any(cls.__module__.startswith("torch.distributed.") for cls in kind.__mro__)


_LOCAL = {Parameter, Tensor, NoneType}


@lru_cache(maxsize=1)
def dtensor_support() -> ModuleType:
    """What deals with DTensors, loaded where there are some.

    Raises:
        UnsupportedGradientError: If this release of torch lacks what it needs.
    """
    try:
        from lightning_znorm.gradients import dtensor
    except ImportError as error:
        raise untested_torch(str(error)) from error
    dtensor.check_dtensors()
    return dtensor
