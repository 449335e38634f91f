"""Gradients in the ``grad`` of each parameter: on a single device, under DDP, and as DTensors."""

from collections import defaultdict
from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_znorm.gradients.adapters import GradientAdapter
from lightning_znorm.gradients.slots import GradientSlot, ParameterSlot, clean_name, optimizer_slots, slots_by_group


class PlainAdapter(GradientAdapter):
    """The gradients of a model whose strategy leaves them in ``grad``.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # By identity, because the hash of a tensor is slow. The slots keep the tensors alive.
        self._slots_by_id: dict[int, list[GradientSlot]] = {}

    def slots(self) -> Iterator[GradientSlot]:  # noqa: D102
        for slots in self.read_slots().values():
            yield from slots

    def slots_of(self, optimizer: Optimizer) -> Iterator[GradientSlot]:
        """Yield the slots of the parameters that an optimizer steps, named by their numbers if not the model's."""
        # An optimizer may hold a parameter twice.
        stepped = dict.fromkeys(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        if not stepped.keys() <= self._slots_by_id.keys():
            # The first step, or one after the model or the optimizer has grown.
            unnamed: dict[int, list[GradientSlot]] = {id(slot.parameter): [slot] for slot in optimizer_slots(optimizer)}
            named = {id(parameter): slots for parameter, slots in self.read_slots().items()}
            for number in unnamed.keys() - self._slots_by_id.keys() - named.keys():
                self.unnamed.update(unnamed[number])
            self._slots_by_id = unnamed | self._slots_by_id | named
        for number in stepped:
            yield from self._slots_by_id[number]

    def slots_by_group(self, optimizer: Optimizer) -> list[list[GradientSlot]]:  # noqa: D102
        list(self.slots_of(optimizer))  # which finds new ones
        return slots_by_group(optimizer, self._slots_by_id)

    def read_slots(self) -> dict[Tensor, list[GradientSlot]]:
        """Return the slots behind each tensor that an optimizer may hold, in the model as it is now.

        A strategy that puts other tensors in place of parameters, or keeps their gradients elsewhere, overrides this.
        """
        return {parameter: [ParameterSlot(names, parameter)] for parameter, names in named_tensors(self.module).items()}


def named_tensors(module: nn.Module) -> dict[Tensor, tuple[str, ...]]:
    """Return the names of each parameter of a model; a parameter that modules share has several."""
    names = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[parameter].append(clean_name(name))
    return {parameter: tuple(parameter_names) for parameter, parameter_names in names.items()}
