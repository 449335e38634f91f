"""The size of SGD's steps along gradients of known size, compared to the size of the weights that they move."""

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_znorm.gradients.methods import SING, GradientMethod, is_zscore
from lightning_znorm.gradients.slots import GradientSlot

# Accuracies over this size: benchmarks/results/sgd_steps.md. At 0.5, an MLP trains clearly worse than at its best, with
# and without momentum, and at 1 it fails; at 0.03, it trains well.
LARGEST_STEP = 0.5
"""Size of steps over size of weights above which :class:`StepSizes` warns."""
_GOOD_STEP = 0.03  # what the message advises
_AGAIN = 1.1  # the weights are measured again when the step has grown by this factor
_FIRST_RETRY = 16  # step at which weights that were all zero are measured again: younger ones are as small as a step
_LARGEST_EPS = 1e-3  # above it, a method may not bring gradients to unit size

# Optimizers whose steps are proportional to the gradient: torch's, and timm's.
_PROPORTIONAL = ("SGD.step", "ASGD.step", "SGDP.step", "SGDW.step")


def is_proportional(optimizer: object) -> bool:
    """Return whether the steps of an optimizer are known to be proportional to the gradient, as those of SGD are."""
    # By the name of the class that defines `step`: LARS may derive from SGD, and divides by the norm.
    step = getattr(type(_inside(optimizer)), "step", None)
    return ".".join(getattr(step, "__qualname__", "").split(".")[-2:]) in _PROPORTIONAL


def effective_rate(group: dict[str, Any]) -> float:
    """Return by how many times the size of the gradients the steps of a parameter group move a weight.

    Near the size of the weights, the gradients of different steps have little in common. So with momentum m, the
    velocity, a sum of gradients with the factors 1, m, m^2 and so on, is 1 / sqrt(1 - m^2) times as large as they are,
    less what dampening leaves out. Nesterov's step adds one more gradient to m times the velocity.

    Args:
        group: A parameter group of an optimizer. If its rate is on a device, this waits for the device.
    """
    rate, momentum = float(group["lr"]), float(group.get("momentum", 0.0))
    if not 0 < momentum < 1:
        return rate
    kept = 1 - float(group.get("dampening", 0.0))
    if group.get("nesterov", False):
        # The newest gradient has the factor 1 + m, and each older one of the velocity m times its factor there.
        return rate * math.sqrt((1 + momentum * kept) ** 2 + (momentum**2 * kept) ** 2 / (1 - momentum**2))
    return rate * kept / math.sqrt(1 - momentum**2)


def relative_steps(
    groups: Iterable[Iterable[GradientSlot]],
    method: GradientMethod,
    clip_norm: float = math.inf,
    clip_value: float = math.inf,
) -> list[float]:
    """Return, for each parameter group, the norm of transformed gradients over that of their weights; 0 if not known.

    Only weights (two or more dimensions) count, because biases begin at zero. Where weights are sharded, this process'
    parts stand for the whole. However many weights there are, the norms are read from a device at once.

    Args:
        groups: The slots of all parameter groups of an optimizer, of those parameters that the method transforms.
        method: What is applied to their gradients.
        clip_norm: What the norm of all gradients of the optimizer is clipped to afterwards. Parameters that the method
            leaves alone have gradients of unknown norm, which count as zero: the steps may then be smaller.
        clip_value: The value that each element is clipped to afterwards.
    """
    all_gradients = 0.0
    gradients: list[float] = []
    norms: list[tuple[int, Tensor]] = []  # each with the number of its group
    for number, slots in enumerate(groups):
        gradients.append(0.0)
        for slot in slots:
            count = math.prod(slot.shape or ())
            size = _element_size(method, count)
            if size is None:
                continue
            size = min(size, clip_value)
            all_gradients += count * size**2
            local = slot.local_parameter() if (slot.ndim or 0) > 1 and count > 1 else None
            if local is not None and local.dtype in _WIDE:
                gradients[number] += local.numel() * size**2
                norms.append((number, torch.linalg.vector_norm(local.detach(), dtype=_WIDE[local.dtype])))
    weights = [0.0] * len(gradients)
    for (number, _), norm in zip(norms, _read([norm for _, norm in norms]), strict=True):
        weights[number] += norm**2
    clipped = min(1.0, clip_norm / math.sqrt(all_gradients)) if all_gradients else 1.0
    return [
        clipped * math.sqrt(gradient / weight) if 0 < weight < math.inf else 0.0
        for gradient, weight in zip(gradients, weights, strict=True)
    ]


class StepSizes:
    """Find, at the first step and when rates grow later, the optimizers whose steps are too large for their weights.

    A step only compares numbers. The weights are measured before the first step, and again when a rate has grown so far
    that it would be too large for them. A rate that is kept on a device is read at the steps 1, 2, 4, 8 and so on.
    Weights that were all zero, or none of this process', are looked for again at the steps 16, 32 and so on.

    Args:
        method: What is applied to the gradients. Only ZNorm and SING are known to give them a size.
    """

    def __init__(self, method: GradientMethod) -> None:
        self._method = method
        self._is_known = _element_size(method, 1) is not None
        self._optimizers: weakref.WeakKeyDictionary[Optimizer, _Watched] = weakref.WeakKeyDictionary()

    def warning_for(
        self, optimizer: Optimizer, slots_by_group: Callable[[], Sequence[Iterable[GradientSlot]]], **clipping: float
    ) -> str | None:
        """Return what is wrong with the step that an optimizer is about to take, once; ``None`` if nothing is.

        Args:
            optimizer: The optimizer.
            slots_by_group: Returns, for each parameter group, those slots whose gradients the method transforms.
            clipping: ``clip_norm`` and ``clip_value`` of :func:`relative_steps`.
        """
        if not self._is_known:
            return None
        watched = self._optimizers.get(optimizer)
        if watched is None:
            watched = self._optimizers[optimizer] = _Watched(is_proportional(optimizer))
        if not watched.may_warn or _is_capturing():
            return None
        watched.step += 1
        watched.limits += [0.0] * (len(optimizer.param_groups) - len(watched.limits))
        is_power = watched.step & (watched.step - 1) == 0
        rates: dict[int, float] = {}  # of the groups whose weights must be measured
        for number, group in enumerate(optimizer.param_groups):
            is_unknown = watched.limits[number] == math.inf
            if (is_unknown and watched.step < _FIRST_RETRY) or (
                not is_power and (is_unknown or _is_on_device(group["lr"]))
            ):
                continue
            rate = effective_rate(group)
            if is_unknown or rate > watched.limits[number]:
                rates[number] = rate
        if not rates:
            return None
        relative = relative_steps(slots_by_group(), self._method, **clipping)
        for number, rate in rates.items():
            found = relative[number]
            watched.limits[number] = max(LARGEST_STEP / found, _AGAIN * rate) if found else math.inf
        worst = max(rates, key=lambda number: rates[number] * relative[number])
        if rates[worst] * relative[worst] <= LARGEST_STEP:
            return None
        watched.may_warn = False
        return _message(optimizer, optimizer.param_groups[worst], rates[worst] * relative[worst])


@dataclass
class _Watched:
    """What is known of an optimizer.

    Attributes:
        may_warn: Whether its steps may be too large, and nobody has been told.
        step: How many steps it has taken.
        limits: For each parameter group the largest :func:`effective_rate` that needs no look at the weights; infinite
            if nothing is known of them.
    """

    may_warn: bool
    step: int = 0
    limits: list[float] = field(default_factory=list)


def _inside(optimizer: object) -> object:
    """Return the optimizer that DeepSpeed has wrapped, or the same one."""
    is_wrapper = type(optimizer).__module__.startswith("deepspeed.")
    return getattr(optimizer, "optimizer", optimizer) if is_wrapper else optimizer


def _message(optimizer: Optimizer, group: dict[str, Any], relative: float) -> str:
    rate, momentum = float(group["lr"]), float(group.get("momentum", 0.0))
    settings = f"lr={rate:g}" + (f" and momentum={momentum:g}" if momentum else "")
    kind = type(_inside(optimizer)).__name__
    several = " in one of its parameter groups" if len(optimizer.param_groups) > 1 else ""
    return (
        f"with {settings}{several}, the steps of {kind} are about {relative:.2g} times as large as the weights that "
        "they move, because the transformed gradients have a fixed size, however small the loss. Training fails or "
        f"suffers above {LARGEST_STEP} times: set lr to about {_GOOD_STEP * rate / relative:.0e}, or use Adam, which "
        "divides the size of the gradients out"
    )


def _element_size(method: GradientMethod, count: int) -> float | None:
    """Return the root mean square of the elements of a transformed gradient; ``None`` if it is not known."""
    is_sing = getattr(type(method), "affine", None) is SING.affine
    if not (is_sing or is_zscore(method)) or getattr(method, "eps", 0.0) > _LARGEST_EPS:
        return None
    return max(count, 1) ** -0.5 if is_sing else 1.0


# Types of weights, and those in which their norms do not overflow (`None`: in their own).
_WIDE: dict[torch.dtype, torch.dtype | None] = {
    **dict.fromkeys((torch.float16, torch.bfloat16), torch.float32),
    **dict.fromkeys((torch.float32, torch.float64, torch.complex64, torch.complex128)),
}


def _read(numbers: Sequence[Tensor]) -> list[float]:
    """Return the values of scalar tensors, with one wait for each device that they are on."""
    values = [0.0] * len(numbers)
    devices: dict[torch.device, list[int]] = {}
    for index, number in enumerate(numbers):
        devices.setdefault(number.device, []).append(index)
    for indices in devices.values():
        # Devices differ in whether they have float64; float32 has the digits and the range for norms.
        read = torch.stack([numbers[index].float() for index in indices]).tolist()
        for index, value in zip(indices, read, strict=True):
            values[index] = value
    return values


def _is_on_device(rate: Any) -> bool:
    return isinstance(rate, Tensor) and rate.device.type != "cpu"


def _is_capturing() -> bool:
    """Return whether operations are recorded for a CUDA graph, which takes none that wait for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
