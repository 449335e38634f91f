"""Where strategies keep gradients, and which of them an optimizer steps."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_znorm.gradients.places import ParameterPlace, Place

# What torch.compile, FSDP and activation checkpointing put into the names of the modules that they wrap.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class GradientSource:
    """Where a strategy keeps the gradients of a model: here, in the ``grad`` of each parameter.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._index: dict[Tensor, list[Place]] = {}

    def is_complete(self) -> bool:
        """Whether gradients are complete, and the optimizer about to take its step."""
        return True

    def loss_scale(self) -> Tensor | None:
        """Factor by which gradients are larger than the true ones because the optimizer will divide by it, a scalar."""
        return None

    def places(self) -> Iterator[Place]:
        """All places of the model."""
        for places in self._read().values():
            yield from places

    def places_of(self, optimizer: Optimizer) -> Iterator[Place]:
        """Those of the parameters that an optimizer steps, named by their numbers if they are not the model's."""
        index = self._index
        if any(parameter not in index for group in optimizer.param_groups for parameter in group["params"]):
            # The first step, or one after the model or the optimizer has grown.
            foreign: dict[Tensor, list[Place]] = {place.parameter: [place] for place in optimizer_places(optimizer)}
            index = self._index = foreign | self._index | self._read()
        # An optimizer may hold a parameter twice.
        for parameter in dict.fromkeys(parameter for group in optimizer.param_groups for parameter in group["params"]):
            yield from index[parameter]

    def _read(self) -> dict[Tensor, list[Place]]:
        """The places behind each tensor that an optimizer may hold."""
        names = defaultdict(list)
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            names[parameter].append(clean_name(name))
        return {parameter: [ParameterPlace(tuple(own), parameter)] for parameter, own in names.items()}


def optimizer_places(optimizer: Optimizer) -> list[ParameterPlace]:
    """The places of an optimizer's parameters, named by their numbers."""
    return parameter_places(
        (f"parameter {index} of group {group_index}", parameter)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
    )


def parameter_places(named_parameters: Iterable[tuple[str, Tensor]]) -> list[ParameterPlace]:
    """The places of parameters; one that occurs twice counts once.

    Raises:
        TypeError: If something is given that is not a tensor.
    """
    places: dict[int, ParameterPlace] = {}  # by identity, because a tensor takes its time to give its hash
    for name, parameter in named_parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name} is not a tensor but a {type(parameter).__name__}: give model.parameters()")
        if id(parameter) not in places:
            places[id(parameter)] = ParameterPlace((name,), parameter)
    return list(places.values())


def clean_name(name: str) -> str:
    """A parameter's name as the model's author wrote it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
