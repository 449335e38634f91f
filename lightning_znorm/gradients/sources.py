"""Where strategies keep gradients, and which of them an optimizer steps."""

from collections import defaultdict
from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_znorm.gradients.places import NumberedPlaces, ParameterPlace, Place

# What torch.compile, FSDP and activation checkpointing put into the names of the modules that they wrap.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class GradientSource:
    """Where a strategy keeps the gradients of a model: here, in the ``grad`` of each parameter.

    Args:
        module: The model.

    Attributes:
        unnamed: Places of parameters that optimizers step and that are not the model's. They are known once the
            optimizer has been asked for.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.unnamed: set[Place] = set()
        # By identity, because a tensor takes its time to give its hash. The places keep the tensors alive.
        self._index: dict[int, list[Place]] = {}

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
        # An optimizer may hold a parameter twice.
        stepped = dict.fromkeys(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        if not stepped.keys() <= self._index.keys():
            # The first step, or one after the model or the optimizer has grown.
            foreign: dict[int, list[Place]] = {id(place.parameter): [place] for place in optimizer_places(optimizer)}
            own = {id(parameter): places for parameter, places in self._read().items()}
            for number in foreign.keys() - self._index.keys() - own.keys():
                self.unnamed.update(foreign[number])
            self._index = foreign | self._index | own
        for number in stepped:
            yield from self._index[number]

    def _read(self) -> dict[Tensor, list[Place]]:
        """The places behind each tensor that an optimizer may hold."""
        names = defaultdict(list)
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            names[parameter].append(clean_name(name))
        return {parameter: [ParameterPlace(tuple(own), parameter)] for parameter, own in names.items()}


def optimizer_places(optimizer: Optimizer) -> NumberedPlaces:
    """The places of an optimizer's parameters, named by their numbers."""
    return NumberedPlaces(*[group["params"] for group in optimizer.param_groups], are_an_optimizers=True)


def clean_name(name: str) -> str:
    """A parameter's name as the model's author wrote it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
