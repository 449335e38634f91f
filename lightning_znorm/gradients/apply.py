"""What one does with gradients, however a strategy keeps them: transform, measure, check for inf and NaN."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_znorm.gradients.exceptions import NonFiniteGradientError, UnsupportedGradientError
from lightning_znorm.gradients.kernels import (
    measure_shards,
    reachable_device,
    transform_shards_,
    transform_unsharded_,
)
from lightning_znorm.gradients.methods import (
    ROUNDING_UNITS,
    AffineMethod,
    GradientMethod,
    Statistics,
    describe,
)
from lightning_znorm.gradients.shards import Shard, as_shard
from lightning_znorm.gradients.shared_memory import may_share_memory, without_duplicates
from lightning_znorm.gradients.slots import GradientSlot, UnnamedSlots, read_gradients

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MAX_NAMED = 5  # parameters that a message names


@torch.no_grad()
def transform_slots_(
    slots: Iterable[GradientSlot], method: GradientMethod, loss_scale: Tensor | None = None
) -> list[Tensor | Shard | None]:
    """Replace the gradients of some slots by what a method makes of them, in place.

    If gradients are sharded, all processes that hold a part must call this with the same slots in the same order.

    Args:
        slots: The slots.
        method: An affine method, or a function from a gradient to its replacement.
        loss_scale: Factor by which the gradients are larger than the true ones because the optimizer will divide by it,
            a scalar tensor. The method sees the true gradients, and its result is multiplied by the factor.

    Returns:
        What was read from each slot, in their order; ``None`` if there is no gradient.

    Raises:
        TypeError: If ``method`` is not a method.
        UnsupportedGradientError: Before any gradient is changed, if one is sparse, of 8 bits, or sharded in an unknown
            way; if one is sharded and the method is a function; or if gradients overlap in memory. Also if a function
            returns anything but a tensor of its argument's shape.

    Example:
        For a strategy of your own: say where each gradient is kept. Parameters with an ordinary ``grad`` have a slot
        already:

        >>> import torch
        >>> from lightning_znorm.gradients import ZScore, transform_slots_
        >>> from lightning_znorm.gradients.slots import ParameterSlot
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model(torch.tensor([[1.0, 3.0]])).sum().backward()
        >>> slots = [ParameterSlot((name,), parameter) for name, parameter in model.named_parameters()]
        >>> _ = transform_slots_(slots, ZScore())
        >>> model.weight.grad
        tensor([[-1.,  1.]])
    """
    name = describe(method)
    if not isinstance(slots, UnnamedSlots):
        slots = list(slots)
    grads = read_gradients(slots)
    unsharded = [grad for grad in grads if isinstance(grad, Tensor)]
    shards = [grad for grad in grads if isinstance(grad, Shard)] if len(unsharded) < len(grads) else []
    if may_share_memory(unsharded, shards):
        unsharded, shards = without_duplicates(slots, grads)
    if not isinstance(method, AffineMethod):
        if shards:
            name_of_first = next(slot.names[0] for slot, grad in zip(slots, grads, strict=True) if grad is shards[0])
            raise UnsupportedGradientError(
                f"the gradient of {name_of_first} is sharded over processes, and {name} is a function of unsharded "
                "gradients: write it as an AffineMethod, which works with their statistics"
            )
        for grad in unsharded:
            _replace_(grad, method, name, loss_scale)
        return grads
    if unsharded:
        for shard in shards:
            shard.reduce_groups(method.over)  # which may refuse it, before any gradient is changed
    shards = [*map(as_shard, transform_unsharded_(unsharded, method, loss_scale)), *shards]
    if shards:
        transform_shards_(shards, method, loss_scale)
        for slot in slots:
            slot.on_rewritten()
    return grads


def _replace_(grad: Tensor, method: Callable[[Tensor], Tensor], name: str, loss_scale: Tensor | None) -> None:
    """Replace a gradient by what a function makes of it."""
    if grad.numel() == 0:
        return
    result = method(grad if loss_scale is None else grad / loss_scale)
    if not isinstance(result, Tensor) or result.shape != grad.shape:
        returned = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
        raise UnsupportedGradientError(
            f"{name} made {returned} from a gradient of shape {tuple(grad.shape)}, and must return its replacement"
        )
    # An optimizer that divides by the scale looks for inf afterwards, and the function may have hidden one: 0 * inf is
    # NaN.
    grad.copy_(result if loss_scale is None else result * loss_scale + 0 * grad)


@torch.no_grad()
def measure_slots(
    slots: Iterable[GradientSlot], loss_scale: Tensor | None = None
) -> tuple[list[GradientSlot], Statistics]:
    """Take the statistics of the unsharded gradients of some slots, and bring them to the host in one copy.

    If gradients are sharded, all processes that hold a part must call this with the same slots in the same order: they
    exchange two small sums for each process group, however many gradients there are.

    Args:
        slots: The slots.
        loss_scale: Factor by which the gradients are larger than the true ones, a scalar tensor. The statistics are
            those of the true ones.

    Returns:
        The slots that have a gradient, and the statistics of these gradients in the same order, in float64 on the CPU.
        A deviation within the rounding of the mean is zero. An inf or NaN anywhere in a gradient, or squared deviations
        that overflow in the gradient's type, leave a mean or a deviation that is not finite.

    Raises:
        UnsupportedGradientError: If a gradient is sparse, of 8 bits, or is sharded in an unknown way.
    """
    slots = list(slots)
    slot_of: dict[Shard, GradientSlot] = {}
    for slot, grad in zip(slots, read_gradients(slots), strict=True):
        if grad is not None and grad.shape.numel() > 0:
            slot_of[grad if isinstance(grad, Shard) else as_shard(grad)] = slot
    if not slot_of:
        return [], Statistics(*(torch.zeros(0, dtype=torch.float64, device="cpu") for _ in range(3)))
    shards, mean, m2 = measure_shards(slot_of)
    parts = [torch.view_as_real(mean).flatten() if mean.is_complex() else mean, m2]
    if loss_scale is not None:
        parts.append(loss_scale.to(m2.device, m2.dtype, non_blocking=True).view(1))
    is_complex = mean.is_complex()
    mean, m2, *scales = torch.split(_to_host(torch.cat(parts)).double(), [part.numel() for part in parts])
    if is_complex:
        mean = torch.view_as_complex(mean.view(-1, 2))
    for scale in scales:
        mean, m2 = mean / scale, m2 / scale / scale
    count = torch.tensor([float(shard.shape.numel()) for shard in shards], dtype=torch.float64, device="cpu")
    eps = torch.tensor([_eps(shard) for shard in shards], dtype=torch.float64, device="cpu")
    rounding = ROUNDING_UNITS * eps * mean.abs()
    m2 = m2.masked_fill((m2 / count).sqrt() <= rounding, 0.0)
    # Back into the order of the slots.
    position = {shard: index for index, shard in enumerate(shards)}
    order = torch.tensor([position[shard] for shard in slot_of], device="cpu")
    return list(slot_of.values()), Statistics(count[order], mean[order], m2[order])


def _to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU. Only this step of a measurement waits for a device, and DeepSpeed's offloading."""
    return tensor.cpu()


def _eps(shard: Shard) -> float:
    """Return the unit of rounding of the type that a shard's statistics are computed in."""
    # A process that holds nothing of a gradient does not know its type, which is nearly always single precision.
    is_double = shard.local is not None and shard.local.dtype in (torch.float64, torch.complex128)
    return torch.finfo(torch.float64 if is_double else torch.float32).eps


class GradientSummary:
    r"""What the statistics of gradients tell about them, and about what ZNorm makes of them.

    .. math::
        \lVert g \rVert = \sqrt{n (\sigma^2 + |\mu|^2)} \qquad
        \lVert z \rVert = \sqrt{n} \frac{\sigma}{\sigma + \epsilon} \qquad
        \cos(g, z) = \frac{\sigma}{\sqrt{\sigma^2 + |\mu|^2}}

    because :math:`\langle g, z \rangle = n \sigma^2 / (\sigma + \epsilon)` for a z-scored gradient z (Yun, "ZNorm:
    Z-Score Gradient Normalization", arXiv 2408.01215, Theorem 4.2).

    Args:
        stats: Statistics of gradients, one of each.
        eps: ZNorm's ``eps``.

    Attributes:
        count: Number of elements.
        mean: Arithmetic mean.
        sigma: Population standard deviation; zero where it is within the rounding of the mean, NaN where the squared
            deviations overflow.
        norm: Euclidean norm.
        znorm_norm: Norm of the z-scored gradient; a single element stays as it is.
        cosine: Cosine of the angle between the gradient and the z-scored one; NaN for a gradient of zero, or one so
            small (below 1e-19) that the squares of its deviations underflow in single precision.
        mean_share: Share of the mean in the squared gradient, :math:`|\mu|^2 / (\sigma^2 + |\mu|^2)`, which centring
            removes; NaN where the cosine is, and for a single element, which stays as it is.
        has_deviation: Whether it has several elements.
        is_finite: Whether it holds no inf and no NaN, and its squared deviations do not overflow.

    Example:
        >>> import torch
        >>> from lightning_znorm.gradients import Statistics
        >>> from lightning_znorm.gradients.apply import GradientSummary
        >>> of_7_and_1 = Statistics(torch.tensor([2.0]), torch.tensor([4.0]), torch.tensor([18.0]))
        >>> summary = GradientSummary(of_7_and_1)
        >>> summary.sigma, summary.norm**2, summary.cosine
        (tensor([3.]), tensor([50.]), tensor([0.6000]))
    """

    def __init__(self, stats: Statistics, eps: float = 1e-10) -> None:
        self.count, self.mean, self.sigma = stats.count, stats.mean, stats.std
        size = torch.hypot(self.sigma, self.mean.abs())
        self.norm = self.count.sqrt() * size
        self.has_deviation = self.count > 1
        z = (self.sigma / (self.sigma + eps)).masked_fill(self.sigma == 0, 0.0)
        self.znorm_norm = torch.where(self.has_deviation, self.count.sqrt() * z, self.norm)
        underflows = self.has_deviation & (self.sigma == 0) & (size <= torch.finfo(torch.float32).tiny ** 0.5)
        self.cosine = torch.where(self.has_deviation, self.sigma / size, size / size).masked_fill(underflows, torch.nan)
        self.mean_share = (self.mean.abs() / size).square().masked_fill(underflows | ~self.has_deviation, torch.nan)
        self.is_finite: Tensor = size.isfinite()


@torch.no_grad()
def check_finite(slots: Iterable[GradientSlot], found_inf: Iterable[Tensor] = (), step: int | None = None) -> None:
    """Raise if gradients that an optimizer is about to use hold an inf or NaN.

    It takes one pass over the gradients, and one wait for the device. If gradients are sharded, all processes that hold
    a part must call this with the same slots in the same order. They exchange a number for each parameter and come to
    the same answer, so that all of them raise. Gradients that cannot be normalized, such as sparse ones, are not
    checked.

    Args:
        slots: The slots.
        found_inf: What a ``GradScaler`` has found in these gradients, scalar tensors that are the same on all
            processes. If one is not zero, the scaler is going to skip the step, and nothing is raised.
        step: Number of the step, for the message.

    Raises:
        NonFiniteGradientError: If there are such gradients. The message names their parameters.
    """
    names: list[str] = []
    local_grads: list[Tensor | None] = []
    groups: dict[ProcessGroup, None] = {}
    device: torch.device | None = None
    for slot in slots:
        try:
            grad = slot.read()
        except UnsupportedGradientError:
            continue
        if isinstance(grad, Shard):
            groups |= dict.fromkeys(grad.holders)
        if device is None and grad is not None:
            device = grad.device
        names.append(slot.names[0])
        local_grads.append(grad.local if isinstance(grad, Shard) else grad)
    if device is None:
        return
    device = reachable_device(device, tuple(groups))
    # A norm may overflow, so it only raises a suspicion; but it takes half the time of a look at every element.
    suspected = _on_any_process(_norm_is_not_finite(local_grads, device), groups)
    for flag in found_inf:
        suspected *= flag.to(device) == 0
    suspects = _indices_of_flags(suspected)
    if not suspects:
        return
    flags = torch.zeros(len(local_grads), dtype=torch.float32, device="cpu")
    for index in suspects:
        local = local_grads[index]
        flags[index] = local is not None and not local.isfinite().all()
    if guilty := [names[index] for index in _indices_of_flags(_on_any_process(flags.to(device), groups))]:
        raise NonFiniteGradientError(_nonfinite_message(guilty, step))


def _norm_is_not_finite(grads: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return 1 for each gradient whose norm is inf or NaN, and 0 for the others."""
    by_type: defaultdict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = defaultdict(dict)
    for index, grad in enumerate(grads):
        if grad is not None and grad.numel() > 0:
            if grad.is_complex():  # the norms of a list of complex tensors would take a launch each
                grad = torch.view_as_real(grad.resolve_conj())
            by_type[grad.device, grad.dtype][index] = grad
    flags = dict.fromkeys(range(len(grads)), torch.zeros((), dtype=torch.float32, device=device))
    for (_, dtype), members in by_type.items():
        # In half precision the norm of any large layer overflows.
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        # torch.nn.utils.get_total_norm is built on this function too, and returns the norm of all alone.
        norms = torch.stack(torch._foreach_norm(list(members.values()), 2, dtype=wide))
        flags |= zip(members, norms.isfinite().logical_not().to(device, torch.float32), strict=True)
    return torch.stack(list(flags.values()))


def _on_any_process(flags: Tensor, groups: Iterable["ProcessGroup"]) -> Tensor:
    for group in groups:
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group)
    return flags


def _indices_of_flags(flags: Tensor) -> list[int]:
    return [index for index, flag in enumerate(flags.tolist()) if flag]


def _nonfinite_message(names: Sequence[str], step: int | None) -> str:
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if is_distributed else 0
    when = f"rank {rank}" if step is None else f"global step {step}, rank {rank}"
    listed = ", ".join(names[:_MAX_NAMED])
    if len(names) > _MAX_NAMED:
        listed += f" and {len(names) - _MAX_NAMED} more"
    return (
        f"there are inf or NaN in the gradients of {listed} ({when}), and the optimizer has not stepped. Look for the "
        "cause in the loss, the data and the learning rate (torch.autograd.detect_anomaly names the operation that "
        "made a NaN), or let them through, as PyTorch does, with error_if_nonfinite=False"
    )
