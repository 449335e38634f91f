"""Sees that no inf or NaN reaches the optimizer."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_znorm.gradients.errors import NonFiniteGradientError, UnsupportedGradientError
from lightning_znorm.gradients.kernels.sharded import reachable_device
from lightning_znorm.gradients.shards import Shard
from lightning_znorm.gradients.slots import GradientSlot

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NAMED = 5  # so many parameters are named in the message


@torch.no_grad()
def check_finite(slots: Iterable[GradientSlot], found_inf: Iterable[Tensor] = (), step: int | None = None) -> None:
    """Raises if gradients that an optimizer is about to use hold an inf or NaN.

    One pass over the gradients, and one wait for the device. Where gradients are sharded, the processes that hold their
    parts exchange a number for each parameter and all come to the same answer, so that none is left waiting: they must
    call this with the same slots in the same order. Gradients that cannot be normalized, such as sparse ones, are
    passed over.

    Args:
        slots: Where the gradients are.
        found_inf: What a ``GradScaler`` has found in these gradients, scalar tensors that are the same on all
            processes; if one is not zero, the scaler is going to skip the step, and nothing is raised.
        step: Number of the step, for the message.

    Raises:
        NonFiniteGradientError: If there are such gradients. The message names their parameters.
    """
    names: list[str] = []
    parts: list[Tensor | None] = []
    groups: dict[ProcessGroup, None] = {}
    device: torch.device | None = None
    for slot in slots:
        try:
            found = slot.read()
        except UnsupportedGradientError:
            continue
        if isinstance(found, Shard):
            groups |= dict.fromkeys(found.holders)
        if device is None and found is not None:
            device = found.device
        names.append(slot.names[0])
        parts.append(found.local if isinstance(found, Shard) else found)
    if device is None:
        return
    device = reachable_device(device, tuple(groups))
    # A norm may overflow, so it has not the last word; but it is had in half the time of a look at every element.
    suspected = _on_any_process(_norm_is_not_finite(parts, device), groups)
    for found_one in found_inf:
        suspected *= found_one.to(device) == 0
    numbers = _numbers(suspected)
    if not numbers:
        return
    flags = torch.zeros(len(parts), dtype=torch.float32)
    for number in numbers:
        part = parts[number]
        flags[number] = part is not None and not part.isfinite().all()
    if guilty := [names[number] for number in _numbers(_on_any_process(flags.to(device), groups))]:
        raise NonFiniteGradientError(_message(guilty, step))


def _norm_is_not_finite(parts: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """1 for each part whose norm is inf or NaN, and 0 for the others."""
    alike: defaultdict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = defaultdict(dict)
    for number, part in enumerate(parts):
        if part is not None and part.numel() > 0:
            alike[part.device, part.dtype][number] = part
    flags = dict.fromkeys(range(len(parts)), torch.zeros((), dtype=torch.float32, device=device))
    for (_, dtype), members in alike.items():
        # In half precision the norm of any large layer overflows.
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        norms = torch.stack(torch._foreach_norm(list(members.values()), 2, dtype=wide))
        flags |= zip(members, norms.isfinite().logical_not().to(device, torch.float32), strict=True)
    return torch.stack(list(flags.values()))


def _on_any_process(flags: Tensor, groups: Iterable["ProcessGroup"]) -> Tensor:
    for group in groups:
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group)
    return flags


def _numbers(flags: Tensor) -> list[int]:
    return [number for number, flag in enumerate(flags.tolist()) if flag]


def _message(names: Sequence[str], step: int | None) -> str:
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if is_distributed else 0
    when = f"rank {rank}" if step is None else f"global step {step}, rank {rank}"
    listed = ", ".join(names[:_NAMED])
    if len(names) > _NAMED:
        listed += f" and {len(names) - _NAMED} more"
    return (
        f"there are inf or NaN in the gradients of {listed} ({when}), and the optimizer has not stepped. Look for the "
        "cause in the loss, the data and the learning rate (torch.autograd.detect_anomaly names the operation that "
        "made a NaN), or let them through, as PyTorch does, with error_if_nonfinite=False"
    )
