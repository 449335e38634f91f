"""Where strategies keep gradients, and which of them an optimizer steps."""

from collections import defaultdict
from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_znorm.gradients.slots import GradientSlot, ParameterSlot, UnnamedSlots

# What torch.compile, FSDP and activation checkpointing put into the names of the modules that they wrap.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class GradientAdapter:
    """Where a strategy keeps the gradients of a model: here, in the ``grad`` of each parameter.

    Args:
        module: The model.

    Attributes:
        unnamed: Places of parameters that optimizers step and that are not the model's. They are known once the
            optimizer has been asked for.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.unnamed: set[GradientSlot] = set()
        # By identity, because a tensor takes its time to give its hash. The slots keep the tensors alive.
        self._index: dict[int, list[GradientSlot]] = {}

    def is_complete(self) -> bool:
        """Whether gradients are complete, and the optimizer about to take its step."""
        return True

    def loss_scale(self) -> Tensor | None:
        """Factor by which gradients are larger than the true ones because the optimizer will divide by it, a scalar."""
        return None

    def slots(self) -> Iterator[GradientSlot]:
        """All slots of the model."""
        for slots in self._read().values():
            yield from slots

    def slots_of(self, optimizer: Optimizer) -> Iterator[GradientSlot]:
        """Those of the parameters that an optimizer steps, named by their numbers if they are not the model's."""
        # An optimizer may hold a parameter twice.
        stepped = dict.fromkeys(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        if not stepped.keys() <= self._index.keys():
            # The first step, or one after the model or the optimizer has grown.
            foreign: dict[int, list[GradientSlot]] = {id(slot.parameter): [slot] for slot in optimizer_slots(optimizer)}
            own = {id(parameter): slots for parameter, slots in self._read().items()}
            for number in foreign.keys() - self._index.keys() - own.keys():
                self.unnamed.update(foreign[number])
            self._index = foreign | self._index | own
        for number in stepped:
            yield from self._index[number]

    def _read(self) -> dict[Tensor, list[GradientSlot]]:
        """The slots behind each tensor that an optimizer may hold."""
        names = defaultdict(list)
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            names[parameter].append(clean_name(name))
        return {parameter: [ParameterSlot(tuple(own), parameter)] for parameter, own in names.items()}


def optimizer_slots(optimizer: Optimizer) -> UnnamedSlots:
    """The slots of an optimizer's parameters, named by their numbers."""
    return UnnamedSlots(*[group["params"] for group in optimizer.param_groups], are_an_optimizers=True)


def clean_name(name: str) -> str:
    """A parameter's name as the model's author wrote it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
