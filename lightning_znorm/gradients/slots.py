"""Where the gradient of each parameter is kept, and which parameters take part."""

import difflib
import operator
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from types import ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_znorm.arguments import checked_integer, checked_patterns, shown
from lightning_znorm.errors import ZNormTypeError, ZNormValueError
from lightning_znorm.gradients.exceptions import UnsupportedGradientError, untested_torch
from lightning_znorm.gradients.shards import Shard
from lightning_znorm.gradients.shared_memory import has_internal_overlap


class GradientSlot(ABC):
    """Where the gradient of one parameter is kept. It is read anew at each step.

    Attributes:
        names: The parameter's names. It has several if modules share it.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    @property
    @abstractmethod
    def shape(self) -> torch.Size | None:
        """Shape of the unsharded parameter; ``None`` while a lazy layer waits for its first batch."""

    @property
    def ndim(self) -> int | None:
        """Number of dimensions of the unsharded parameter; ``None`` while a lazy layer waits for its first batch."""
        return None if self.shape is None else len(self.shape)

    @abstractmethod
    def read(self) -> Tensor | Shard | None:
        """Return the gradient, in the memory where the optimizer will look for it.

        Returns:
            The unsharded gradient, or this process' shard of it, or ``None`` if no process has a gradient.

        Raises:
            UnsupportedGradientError: If the gradient cannot be normalized.
        """

    def local_parameter(self) -> Tensor | None:
        """Return this process' part of the parameter, of any shape; ``None`` if there is none, or it is not known."""
        return None

    def on_rewritten(self) -> None:  # noqa: B027
        """Update what was computed from the gradient. Called after the gradient has been rewritten in place."""

    @abstractmethod
    def clear(self) -> None:
        """Remove the gradient, so that the step leaves the parameter as it is."""


class ParameterSlot(GradientSlot):
    """The slot of a parameter whose gradient is in its ``grad``: an unsharded tensor, or a DTensor.

    Args:
        names: The parameter's names.
        parameter: The parameter.
    """

    def __init__(self, names: tuple[str, ...], parameter: Tensor) -> None:
        super().__init__(names)
        self.parameter = parameter

    @property
    def shape(self) -> torch.Size | None:  # noqa: D102
        return None if is_lazy(self.parameter) else self.parameter.shape

    def read(self) -> Tensor | Shard | None:  # noqa: D102
        parameter = self.parameter
        if vars(parameter) and _is_sharded(parameter):
            raise UnsupportedGradientError(
                f"the gradient of {self.names[0]} is sharded by DeepSpeed or by the first version of FSDP, and the "
                "parameter alone does not tell where its other parts are: use FSDP2 "
                "(`torch.distributed.fsdp.fully_shard`), or lightning_znorm's callbacks in a Lightning Trainer"
            )
        grad = parameter.grad
        tensor = parameter if grad is None else grad
        if grad is not None and grad.dtype not in _SUPPORTED_TYPES:
            raise UnsupportedGradientError(
                f"the gradient of {self.names[0]} is of type {grad.dtype}, in which PyTorch takes neither means nor "
                "deviations: keep it in float16, bfloat16, float32 or float64, or leave this parameter out"
            )
        if _is_distributed(tensor):
            dtensor = dtensor_support()
            if dtensor.is_dtensor(tensor):
                read: Tensor | Shard | None = dtensor.read_dtensor(parameter, self.names[0])
                return read
            if not dtensor.is_async(tensor):
                raise UnsupportedGradientError(
                    f"the gradient of {self.names[0]} is a {type(tensor).__name__} of PyTorch's distributed package, "
                    "which does not tell which part of the gradient it holds: use DTensors (FSDP2, tensor "
                    "parallelism), or leave this parameter out"
                )
        if grad is None:
            return None
        if grad.layout != torch.strided:
            raise UnsupportedGradientError(
                f"the gradient of {self.names[0]} is sparse ({grad.layout}, shape {tuple(grad.shape)}), and to "
                "subtract the mean over all its elements would make it dense: use dense gradients (`sparse=False` in "
                "torch.nn.Embedding), or leave this parameter out"
            )
        if has_internal_overlap(grad):
            # An expanded gradient, for one, cannot be written to.
            grad = parameter.grad = grad.clone(memory_format=torch.contiguous_format)
        return grad

    def local_parameter(self) -> Tensor | None:  # noqa: D102
        if is_lazy(self.parameter):
            return None
        to_local = getattr(self.parameter, "to_local", None)  # of a DTensor
        local: Tensor = self.parameter if to_local is None else to_local()
        return local

    def clear(self) -> None:  # noqa: D102
        self.parameter.grad = None


class UnnamedSlots:
    """The slots of parameters that have no names. They are made when iterated over, because most steps need no slots.

    Args:
        groups: The parameters; one that occurs twice counts once.
        names_groups: Whether each group is a parameter group of an optimizer, and the slots' names tell its number.

    Raises:
        TypeError: If something other than a tensor is given.
    """

    def __init__(self, *groups: Iterable[Tensor], names_groups: bool = False) -> None:
        self._names_groups = names_groups
        self._groups = [list(group) for group in groups]
        parameters = [parameter for group in self._groups for parameter in group]
        if not set(map(type, parameters)) <= _ORDINARY_TYPES:
            for name, parameter in self._named():
                if not isinstance(parameter, Tensor):
                    raise ZNormTypeError(
                        f"{name} is not a tensor but a {type(parameter).__name__}: give model.parameters()"
                    )
        # By identity, because the hash of a tensor is slow.
        self.parameters = list({id(parameter): parameter for parameter in parameters}.values())

    def __iter__(self) -> Iterator[ParameterSlot]:
        names: dict[int, str] = {}
        for name, parameter in self._named():
            names.setdefault(id(parameter), name)
        for parameter in self.parameters:
            yield ParameterSlot((names[id(parameter)],), parameter)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for number, group in enumerate(self._groups):
            of_group = f" of group {number}" if self._names_groups else ""
            for index, parameter in enumerate(group):
                yield f"parameter {index}{of_group}", parameter


def optimizer_slots(optimizer: Optimizer) -> UnnamedSlots:
    """Return the slots of an optimizer's parameters, named by their numbers."""
    return UnnamedSlots(*[group["params"] for group in optimizer.param_groups], names_groups=True)


def slots_by_group(optimizer: Optimizer, slots_by_id: Mapping[int, Sequence[GradientSlot]]) -> list[list[GradientSlot]]:
    """Return the slots of each parameter group of an optimizer, in the order of its groups.

    Args:
        optimizer: The optimizer.
        slots_by_id: The slots behind each parameter, by its identity; others are left out.
    """
    groups: list[list[Tensor]] = [group["params"] for group in optimizer.param_groups]
    return [
        [slot for number in dict.fromkeys(map(id, group)) for slot in slots_by_id.get(number, ())] for group in groups
    ]


# What torch.compile, FSDP, activation checkpointing and Fabric put into the names of the modules that they wrap.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


def clean_name(name: str) -> str:
    """Return a parameter's name as the model's author wrote it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def read_gradients(slots: Sequence[GradientSlot] | UnnamedSlots) -> list[Tensor | Shard | None]:
    """Read the gradients of several slots, in their order. ``Partial`` DTensors are all-reduced before.

    Raises:
        UnsupportedGradientError: If one of the gradients cannot be normalized.
    """
    if isinstance(slots, UnnamedSlots):
        parameters, all_in_parameters = slots.parameters, True
    else:
        parameters = [slot.parameter for slot in slots if isinstance(slot, ParameterSlot)]
        all_in_parameters = set(map(type, slots)) <= {ParameterSlot}
    if all_in_parameters and (grads := _ordinary_grads(parameters)) is not None:
        return grads
    if any(_is_distributed(parameter.grad) for parameter in parameters):
        dtensor_support().replicate_partial_grads_(parameters)
    return [slot.read() for slot in slots]


def _ordinary_grads(parameters: Sequence[Tensor]) -> list[Tensor | Shard | None] | None:
    """Return the gradients of parameters if ``slot.read()`` would return ``parameter.grad`` for each, else ``None``.

    So it is in most steps, and models have hundreds of parameters: to ask one question about all of them takes a third
    of the time of asking all questions about each.
    """
    if not set(map(type, parameters)) <= _ORDINARY_TYPES:
        return None
    # FSDP1 and DeepSpeed mark a parameter by attributes. `vars` tells fast that a tensor has none.
    if any(map(_is_sharded, filter(vars, parameters))):
        return None
    grads = [parameter.grad for parameter in parameters]
    if not set(map(type, grads)) <= {Tensor, NoneType}:
        return None
    strided, types = torch.strided, _SUPPORTED_TYPES
    for grad in grads:
        if grad is not None and (grad.layout is not strided or grad.dtype not in types or has_internal_overlap(grad)):
            return None
    return [*grads]


# Types of gradients whose statistics PyTorch can take: not those of eight bits and fewer.
_SUPPORTED_TYPES = frozenset(
    {
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.complex32, torch.complex64, torch.complex128),
    }
)

# Types of parameters that are neither DTensors nor lazy.
_ORDINARY_TYPES = {Parameter, Tensor}


def _is_sharded(parameter: Tensor) -> bool:
    """Return whether DeepSpeed or the first version of FSDP keeps a parameter's gradient. Their own functions tell.

    A program that has parameters of theirs has loaded them, so nothing is imported for others.

    Raises:
        UnsupportedGradientError: If a program may have such parameters, and this release of theirs cannot be asked.
    """
    try:
        if hasattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel"):
            # FSDP has no public function that tells which parameters are its own.
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
    """Return whether a tensor is of one of the classes of torch's distributed package, such as DTensor."""
    kind = type(tensor)
    return kind not in _LOCAL_TYPES and any(cls.__module__.startswith("torch.distributed.") for cls in kind.__mro__)


_LOCAL_TYPES = {Parameter, Tensor, NoneType}


@lru_cache(maxsize=1)
def dtensor_support() -> ModuleType:
    """Return the module that reads DTensors, which is imported only by programs that have some.

    Raises:
        UnsupportedGradientError: If this release of torch lacks what the module needs.
    """
    try:
        from lightning_znorm.gradients import dtensor
    except ImportError as error:
        raise untested_torch(str(error)) from error
    dtensor.check_dtensors()
    return dtensor


class ParameterFilter:
    """A choice of parameters by shell-style patterns on their names, and by their number of dimensions.

    Names are those of ``named_parameters()``, without what ``torch.compile`` and FSDP insert. ``*`` matches dots too.

    Args:
        include: Pattern or patterns. A parameter must match one of them.
        exclude: Pattern or patterns. A parameter must match none of them.
        min_ndim: Least number of dimensions: 2 leaves out biases and normalization scales.

    Raises:
        TypeError: If a pattern is not a string, or ``min_ndim`` is not a whole number.
        ValueError: If ``min_ndim`` is negative.
    """

    def __init__(
        self, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = (), min_ndim: int = 0
    ) -> None:
        self.include = checked_patterns("include", include)
        self.exclude = checked_patterns("exclude", exclude)
        self.min_ndim = checked_integer("min_ndim", min_ndim, minimum=0)

    def matches(self, slot: GradientSlot) -> bool:
        """Return whether a parameter is chosen. A shared one needs one name that is included, and none excluded."""
        is_large = slot.ndim is None or slot.ndim >= self.min_ndim
        return is_large and _any_match(slot.names, self.include) and not _any_match(slot.names, self.exclude)

    def includes(self, names: Iterable[str], pattern: str) -> bool:
        """Return whether one of the names of a parameter matches an ``include`` pattern."""
        return _any_match(names, [pattern])

    @property
    def needs_names(self) -> bool:
        """Whether the choice depends on names. The default patterns choose parameters whatever their names are."""
        return "*" not in self.include or bool(self.exclude)

    def check(self, slots: Iterable[GradientSlot]) -> None:
        """Refuse a filter that does not fit a model.

        Raises:
            ValueError: If a pattern matches no parameter at all, or no parameter is chosen.
        """
        slots = list(slots)
        names = [name for slot in slots for name in slot.names]
        for pattern in [*self.include, *self.exclude]:
            if not _any_match(names, [pattern]):
                nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
                raise ZNormValueError(
                    f"the pattern {pattern!r} matches none of the model's {len(names)} parameters; "
                    f"the nearest names are {', '.join(nearest)}"
                )
        if not any(self.matches(slot) for slot in slots):
            raise ZNormValueError(
                f"include={self.include}, exclude={self.exclude} and min_ndim={self.min_ndim} together leave none of "
                f"the model's {len(names)} parameters"
            )


def _any_match(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


class OptimizerSlots:
    """The slots of an optimizer's parameters by their names in a model, and a choice of them.

    It holds no reference to the optimizer, whose hook may hold this object.

    Args:
        optimizer: The optimizer. Its parameter groups may grow.
        parameter_filter: The choice.
        named_parameters: Names and parameters, as ``model.named_parameters()`` yields them. ``None`` leaves it to the
            names that the optimizer itself was given (``param_names`` in its groups), if there are any.

    Raises:
        TypeError: If ``named_parameters`` holds anything but pairs of a name and a parameter.
        ValueError: If it is empty, as a generator that has been used up; if a pattern matches no name, or no parameter
            of the optimizer is chosen; or if there are patterns, and a parameter of the optimizer has no name.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameter_filter: ParameterFilter,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    ) -> None:
        self._filter = parameter_filter
        self._names: dict[Tensor, tuple[str, ...]] = {}
        for name, parameter in _checked_pairs(named_parameters) if named_parameters is not None else ():
            self._names[parameter] = (*self._names.get(parameter, ()), clean_name(name))
        self._slots: list[ParameterSlot] = []
        self._chosen: list[ParameterSlot] | None = None
        slots = self.all(optimizer, optimizer_slots(optimizer))
        parameter_filter.check([ParameterSlot(names, parameter) for parameter, names in self._names.items()] or slots)
        if slots and not any(map(parameter_filter.matches, slots)):
            raise ZNormValueError(
                f"of the {len(slots)} parameters of {type(optimizer).__name__} none is chosen by include="
                f"{parameter_filter.include}, exclude={parameter_filter.exclude} and min_ndim="
                f"{parameter_filter.min_ndim}: the first is {slots[0].names[0]}"
            )

    def all(self, optimizer: Optimizer, unnamed: UnnamedSlots) -> list[ParameterSlot]:
        """Return the slots of all parameters of the optimizer, by their names.

        Args:
            optimizer: The optimizer.
            unnamed: Its slots, as :func:`optimizer_slots` returns them.

        Raises:
            ValueError: If the choice needs names, and a parameter that has been added has none.
        """
        known = [slot.parameter for slot in self._slots]
        if len(known) != len(unnamed.parameters) or any(map(operator.is_not, known, unnamed.parameters)):
            self._slots = [self._with_name(slot, optimizer) for slot in unnamed]
            self._chosen = None
        return self._slots

    def chosen(self, optimizer: Optimizer, unnamed: UnnamedSlots) -> list[ParameterSlot]:
        """Return those of :meth:`all` that are chosen."""
        slots = self.all(optimizer, unnamed)
        if self._chosen is not None:
            return self._chosen
        chosen = [slot for slot in slots if self._filter.matches(slot)]
        if all(slot.ndim is not None for slot in slots):  # a lazy layer may yet turn out to have too few dimensions
            self._chosen = chosen
        return chosen

    def _with_name(self, slot: ParameterSlot, optimizer: Optimizer) -> ParameterSlot:
        names = self._names.get(slot.parameter) or _names_in_groups(optimizer, slot.parameter)
        if not names and self._filter.needs_names:
            raise ZNormValueError(
                f"include={self._filter.include} and exclude={self._filter.exclude} are patterns on names, and "
                f"{slot.names[0]} of {type(optimizer).__name__} has none: give named_parameters, such as "
                "model.named_parameters(), with all parameters of the optimizer"
            )
        return ParameterSlot(names or slot.names, slot.parameter)


def _names_in_groups(optimizer: Optimizer, parameter: Tensor) -> tuple[str, ...]:
    """Return the name of a parameter in the groups of an optimizer that was made from named parameters."""
    for group in optimizer.param_groups:
        for name, other in zip(group.get("param_names", ()), group["params"], strict=False):
            if other is parameter:
                return (clean_name(name),)
    return ()


def _checked_pairs(named_parameters: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return names and parameters as a list of pairs.

    Raises:
        TypeError: If they are anything else.
        ValueError: If there are none.
    """
    is_iterable = isinstance(named_parameters, Iterable) and not isinstance(named_parameters, (str, Tensor, dict))
    pairs: list[Any] = list(named_parameters) if is_iterable else [named_parameters]
    for pair in pairs:
        is_pair = isinstance(pair, tuple) and len(pair) == 2
        if not (is_pair and isinstance(pair[0], str) and isinstance(pair[1], Tensor)):
            raise ZNormTypeError(
                "named_parameters must be pairs of a name and a parameter, such as model.named_parameters(), got "
                f"{shown(pair)}"
            )
    if not pairs:
        raise ZNormValueError("named_parameters must hold all parameters of the optimizer, and is empty or used up.")
    return pairs
