"""How strategies keep gradients: one file for each way.

- ``plain.py``: in the ``grad`` of each parameter (a single device, DDP; FSDP2 and tensor parallelism, as DTensors).
- ``fsdp1.py``: in flattened layers (``FullyShardedDataParallel``).
- ``deepspeed.py``: in DeepSpeed's optimizers (ZeRO stages 0 to 3).

To add a strategy, write one file here, with

1. a :class:`GradientAdapter`, which finds the slots of a model and of an optimizer. If the gradients of most parameters
   are in their ``grad``, derive it from :class:`~lightning_znorm.gradients.adapters.plain.PlainAdapter` and override
   ``read_slots`` alone;
2. a :class:`~lightning_znorm.gradients.slots.GradientSlot`, whose ``read`` returns the gradient, or this process'
   :class:`~lightning_znorm.gradients.shards.Shard` of it, in the memory that the optimizer will read;

and name the strategy in ``lightning_znorm/callbacks/strategies.py``. Methods and kernels serve it as they are.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_znorm.gradients.slots import GradientSlot


class GradientAdapter(ABC):
    """How a strategy keeps the gradients of a model.

    All processes must get the same slots in the same order, whatever each of them holds.

    Args:
        module: The model.

    Attributes:
        unnamed: Slots of parameters that optimizers step and that are not the model's. They are known once the
            optimizer has been asked for.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.unnamed: set[GradientSlot] = set()

    @abstractmethod
    def slots(self) -> Iterator[GradientSlot]:
        """Yield all slots of the model."""

    @abstractmethod
    def slots_of(self, optimizer: Optimizer) -> Iterator[GradientSlot]:
        """Yield the slots of the parameters that an optimizer steps, each once and the same objects each time."""

    def slots_by_group(self, optimizer: Optimizer) -> list[list[GradientSlot]]:
        """Return the slots of each parameter group of an optimizer, in the order of its groups.

        An adapter that does not override this tells those of an only group, and nothing of several.
        """
        is_only = len(optimizer.param_groups) == 1
        return [list(self.slots_of(optimizer)) if is_only else [] for _ in optimizer.param_groups]

    def clip_norm(self) -> float:
        """Return what the strategy itself clips the norm of an optimizer's gradients to; infinite if it does not."""
        return math.inf

    def is_complete(self) -> bool:
        """Return whether gradients are complete, and the optimizer is about to take its step."""
        return True

    def loss_scale(self) -> Tensor | None:
        """Return the factor by which gradients are larger than the true ones, if the optimizer will divide by it.

        Returns:
            A scalar tensor; ``None`` if gradients are the true ones, or if a ``GradScaler`` tells.
        """
        return None
