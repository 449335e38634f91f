"""Gradient methods for any PyTorch loop, named and shaped like :func:`torch.nn.utils.clip_grad_norm_`."""

import functools
import warnings
import weakref
from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_znorm.arguments import checked_flag, shown
from lightning_znorm.errors import ZNormRuntimeError, ZNormTypeError, ZNormValueError
from lightning_znorm.gradients import (
    Centralization,
    GradientMethod,
    UnsupportedGradientError,
    ZScore,
    transform_slots_,
)
from lightning_znorm.gradients.amp import check_grad_scaler, scale_of, unscales_in_step
from lightning_znorm.gradients.apply import check_finite
from lightning_znorm.gradients.exceptions import untested_torch
from lightning_znorm.gradients.methods import Centering, describe
from lightning_znorm.gradients.optimizers import (
    is_nested_step,
    marks_steps,
    runs_hooks,
    step_pre_hooks,
    steps_in_backward,
    takes_two_steps,
    wrapped_by,
)
from lightning_znorm.gradients.slots import (
    OptimizerSlots,
    ParameterFilter,
    UnnamedSlots,
    optimizer_slots,
    slots_by_group,
)
from lightning_znorm.gradients.step_sizes import StepSizes

__all__ = ["attach", "centralize_grads_", "transform_grads_", "zscore_grads_"]


def zscore_grads_(
    parameters: Tensor | Iterable[Tensor],
    eps: float = 1e-10,
    error_if_nonfinite: bool = False,
    centering: Centering = "full",
) -> None:
    r"""Replace each parameter's gradient by its z-score over all its elements, in place (ZNorm).

    .. math:: z = \frac{g - \mu}{\sigma + \epsilon}

    with the mean and the population standard deviation of that gradient. If a gradient of d elements is not constant,
    :math:`\langle z, g \rangle = d \sigma > 0`: a descent direction stays one. Mean and deviation are taken in float32
    for half-precision gradients and otherwise in the gradients' type, in two passes.

    - ``centering="adaptive"`` subtracts less of the mean, the larger it is compared to the deviation, so that the angle
      between a gradient and the result is always below 22.2 degrees: see :class:`~lightning_znorm.gradients.ZScore`.
    - A constant gradient becomes zero, also if it varies by rounding only (a deviation of less than 8 units of rounding
      of the mean). With adaptive centring, a constant gradient c becomes c / (abs(c) + eps).
    - A gradient of one element has no deviation and stays as it is; an empty or missing one is skipped. A parameter
      that is given twice is normalized once, and so is a gradient that several parameters share.
    - A gradient that holds an inf or NaN becomes NaN throughout. So does a gradient of d elements if the sum of its
      squared deviations overflows: with a deviation above :math:`1.8 \cdot 10^{19} / \sqrt{d}` in float32 and bfloat16
      (8e17 with 512 elements, 1.8e16 with a million), above :math:`1.3 \cdot 10^{154} / \sqrt{d}` in float64, none in
      float16.
    - ``eps`` is an absolute number: a gradient of deviation 1e-12 comes out with deviation 1e-2. In float32, deviations
      below 2e-23 count as zero, and one of 1e-22 is off by 1 %. With adaptive centring, constant gradients below 1e-19
      become zero too.
    - Complex gradients have a complex mean and a real deviation, as :func:`torch.std` defines it.

    Call it when the gradients are complete and unscaled: after ``backward()`` and ``GradScaler.unscale_``, before
    ``optimizer.step()``. Clipping afterwards bounds the normalized gradients, whose norm is :math:`\sqrt{d}` each.

    Under DDP every process has all of the gradients, and normalizes them by itself. Gradients that are DTensors (those
    of FSDP2, of tensor parallelism, and of both) are normalized with the mean and deviation of the unsharded gradient:
    all processes must call this with the same parameters in the same order, and they exchange two small sums for each
    process group, however many parameters there are.

    Source: Yun, "ZNorm: Z-Score Gradient Normalization", arXiv 2408.01215, Algorithm 1, Lemma 4.1 and Theorem 4.2.

    Args:
        parameters: Parameters, of any shape, whose ``.grad`` is replaced; an iterable of them or a single one.
        eps: Added to the standard deviation.
        error_if_nonfinite: Whether to raise if a gradient holds an inf or NaN afterwards, as
            :func:`torch.nn.utils.clip_grad_norm_` does; costs a pass over the gradients and one wait for the device.
        centering: How much of the mean is subtracted: ``"full"``, as in the paper, or ``"adaptive"``.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If ``eps`` is negative, infinite or NaN, or ``centering`` is another word.
        UnsupportedGradientError: If a gradient is sparse or of 8 bits, overlaps in memory with another parameter's, or
            is sharded by DeepSpeed or the first version of FSDP, whose parts only the callbacks put together; no
            gradient has been changed then.
        NonFiniteGradientError: If a gradient holds an inf or NaN and ``error_if_nonfinite`` is set; all have been
            replaced then.

    Example:
        >>> import torch
        >>> from lightning_znorm.functional import zscore_grads_
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> weight.grad = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
        >>> zscore_grads_(weight)
        >>> weight.grad
        tensor([[-1., -1.],
                [ 1.,  1.]])
    """
    transform_grads_(parameters, ZScore(eps, centering), error_if_nonfinite)


def centralize_grads_(parameters: Tensor | Iterable[Tensor], error_if_nonfinite: bool = False) -> None:
    """Subtract from each gradient its mean over all dimensions but the first, in place (Gradient Centralization).

    Gradients with fewer than two dimensions stay as they are. So does that of an ``(out, 1)`` weight, whose rows are
    single elements: the authors' code sets it to zero, so that such a weight never trains.

    The authors' optimizers differ in what they subtract the mean from:

    - Their SGD, their ``Adam_GC``, and their later Adam with ``gc_loc=True``: the gradient with the L2 penalty in it,
      before momentum (SGD in one version after momentum, with the same result).
    - Their AdamW: the gradient alone, as this function does.
    - Their later Adam by default (``gc_loc=False``): the finished update.

    Without an L2 penalty, all but the last centre what this function centres. With an L2 penalty, this function leaves
    the penalty uncentred.

    In the output layer of a network, the row of a class may be little else than its mean ("this class less likely"):
    with sigmoid outputs, and with softmax too. Leave the output weight out if training stalls.

    DTensors are centred with the means of the unsharded gradients, as in :func:`zscore_grads_`. Processes exchange sums
    only if they hold parts of the same rows.

    Source: Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks", ECCV 2020
    (arXiv 2004.01461), equation 1.

    Args:
        parameters: Parameters, of any shape, whose ``.grad`` is replaced; an iterable of them or a single one.
        error_if_nonfinite: Whether to raise if a gradient holds an inf or NaN afterwards, as
            :func:`torch.nn.utils.clip_grad_norm_` does; costs a pass over the gradients and one wait for the device.

    Raises:
        TypeError: If an argument is of another type.
        UnsupportedGradientError: If a gradient is sparse or of 8 bits, overlaps in memory with another parameter's, or
            is sharded by DeepSpeed or the first version of FSDP, whose parts only the callbacks put together; no
            gradient has been changed then.
        NonFiniteGradientError: If a gradient holds an inf or NaN and ``error_if_nonfinite`` is set; all have been
            replaced then.

    Example:
        >>> import torch
        >>> from lightning_znorm.functional import centralize_grads_
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> weight.grad = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
        >>> centralize_grads_(weight)
        >>> weight.grad
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """
    transform_grads_(parameters, Centralization(), error_if_nonfinite)


def transform_grads_(
    parameters: Tensor | Iterable[Tensor], method: GradientMethod, error_if_nonfinite: bool = False
) -> None:
    """Replace each parameter's gradient by what a method makes of it, in place.

    Args:
        parameters: Parameters, of any shape, whose ``.grad`` is replaced; an iterable of them or a single one.
        method: A :class:`~lightning_znorm.gradients.AffineMethod`, or a function from a gradient to its replacement of
            the same shape.
        error_if_nonfinite: Whether to raise if a gradient holds an inf or NaN afterwards, as
            :func:`torch.nn.utils.clip_grad_norm_` does; costs a pass over the gradients and one wait for the device.

    Raises:
        TypeError: If ``method`` is not a method, or its shift and scale do not fit the statistics; or if another
            argument is of another type.
        UnsupportedGradientError: Before any gradient is changed, if one is sparse or of 8 bits, overlaps in memory with
            another parameter's, is sharded in a way that :func:`zscore_grads_` does not support, or is a sharded
            DTensor and the method is a function. Also if a function returns anything but a tensor of its argument's
            shape; gradients before that one have been replaced then.
        NonFiniteGradientError: As in :func:`zscore_grads_`.

    Example:
        >>> import torch
        >>> from lightning_znorm.functional import transform_grads_
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([-3.0, 0.5])
        >>> transform_grads_(weight, torch.sign)
        >>> weight.grad
        tensor([-1.,  1.])
    """
    if isinstance(parameters, nn.Module):
        raise ZNormTypeError(f"{type(parameters).__name__} is a module: give its parameters()")
    if not isinstance(parameters, Iterable):
        raise ZNormTypeError(f"give a parameter, or several such as model.parameters(), got {shown(parameters)}")
    error_if_nonfinite = checked_flag("error_if_nonfinite", error_if_nonfinite)
    slots = UnnamedSlots([parameters] if isinstance(parameters, Tensor) else parameters)
    transform_slots_(slots, method)
    if error_if_nonfinite:
        check_finite(slots)


def attach(
    optimizer: Optimizer,
    method: GradientMethod | None = None,
    error_if_nonfinite: bool = False,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    min_ndim: int = 0,
) -> RemovableHandle:
    """Make an optimizer apply a gradient method before each of its steps, in a loop without Lightning.

    It works under automatic mixed precision too: if ``GradScaler.step`` leaves it to the optimizer to unscale the
    gradients (fused optimizers), the method still sees the true gradients. The method runs after a clipping that comes
    before the step, and undoes it. In a Lightning ``Trainer`` use :class:`~lightning_znorm.ZNormCallback`, because a
    step of Lightning computes its gradients in a closure. If something wraps the optimizer (Accelerate,
    ``timm.optim.Lookahead``, the Trainer of transformers), attach before it does.

    The method is bound to this object: ``copy.deepcopy`` and pickle leave out the hooks of an optimizer, so attach to
    the copy again. ``state_dict`` does not hold the method, and ``load_state_dict`` leaves it attached.

    Sharpness-aware minimization (SAM) climbs along the gradient in ``first_step``. In ``second_step``, it descends
    along the gradient at the point that it has reached, by a step of its base optimizer. Attach to that one,
    ``sam.base_optimizer``: the method then sees the gradient of the descent alone. ``examples/sam.py`` shows this, and
    how to do the same by hand and in a Lightning ``Trainer``.

    Args:
        optimizer: Any optimizer but LBFGS. All its parameters take part, also those of groups that are added later,
            unless the arguments below leave some alone.
        method: The method; ``None`` is ZNorm, :class:`~lightning_znorm.gradients.ZScore` with its default ``eps``.
        error_if_nonfinite: Whether to raise if a gradient holds an inf or NaN after the method; costs a pass over the
            gradients and one wait for the device. A step that a ``GradScaler`` is going to skip is no error.
        named_parameters: Names and parameters, such as ``model.named_parameters()``, for patterns and messages. An
            optimizer that was made from these (``SGD(model.named_parameters(), ...)``) knows the names itself. Only
            ``model.named_parameters(remove_duplicate=False)`` gives all names of parameters that modules share.
        include: Shell-style pattern or patterns; a parameter takes part if its name matches one.
        exclude: Pattern or patterns whose matches are left alone, such as ``"output.*"``.
        min_ndim: Least number of dimensions of a parameter that takes part; 2 leaves out biases and normalization
            scales. It needs no names.

    Returns:
        A handle whose ``remove()`` detaches the method.

    Raises:
        TypeError: If ``method`` is not a method, or ``optimizer`` is not an optimizer whose ``step`` runs hooks, or
            ``named_parameters`` are no pairs, or another argument is of another type.
        ValueError: If the optimizer is LBFGS, which steps with a closure only; if ``min_ndim`` is negative,
            ``named_parameters`` are empty, a pattern matches no name, or nothing is chosen; or, also in a step, if
            there are patterns and a parameter of the optimizer has no name.
        RuntimeError: In a step that is called with a closure, which computes the gradients too late for the method; or
            after a step, if something else was assigned to ``optimizer.step`` and does not call the original.
        UnsupportedGradientError: In a step, as in :func:`transform_grads_`, or if something (DeepSpeed) has replaced
            the optimizer's parameters by flat ones; at once, if this release of PyTorch does not tell what is needed.
        NonFiniteGradientError: In a step, before the update, as in :func:`zscore_grads_`.

    Warns:
        UserWarning: Once, if no parameter has a gradient in a step. Once, if the method is ZNorm or SING, and steps of
            SGD would be larger than half the weights that they move: before the first step, or when the learning rate
            has grown so far. The first process judges, where weights are sharded by its own part.

    Note:
        An optimizer knows parameters, and not the layers that they belong to. So nothing warns here of an embedding
        with ``padding_idx``: its padding row has a gradient of zero, and ZNorm, which subtracts the mean, would train
        that row. Leave it out: ``named_parameters=model.named_parameters(), exclude="embedding.weight"``.

    Example:
        >>> import torch
        >>> from lightning_znorm.functional import attach
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = attach(optimizer)
        >>> weight.grad = torch.tensor([2.0, 6.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([ 1., -1.])
        >>> handle.remove()

        All layers but the output layer:

        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> handle = attach(optimizer, named_parameters=model.named_parameters(), exclude="1.*")
    """
    method = ZScore() if method is None else method
    name = describe(method)
    error_if_nonfinite = checked_flag("error_if_nonfinite", error_if_nonfinite)
    parameter_filter = ParameterFilter(include, exclude, min_ndim)
    replaced = _check_optimizer(optimizer)
    if unscales_in_step(optimizer) or any(group.get("fused") for group in optimizer.param_groups):
        check_grad_scaler()
    known = optimizer_slots(optimizer).parameters
    # Without names and a choice, no step makes a slot for each parameter.
    by_name: OptimizerSlots | None = None
    if named_parameters is not None or parameter_filter.needs_names or parameter_filter.min_ndim > 0:
        by_name = OptimizerSlots(optimizer, parameter_filter, named_parameters)
    warned_of_no_gradient = has_run = False
    step_sizes = StepSizes(method)

    def transform(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal warned_of_no_gradient, has_run
        has_run = True
        # torch hands the hook the arguments of the unbound step, which begin with the optimizer.
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise ZNormRuntimeError(
                f"{type(optimizer).__name__}.step was called with a closure, which computes the gradients after the "
                f"attached {name} has run: compute them before the step, and call it without a closure"
            )
        if is_nested_step(optimizer):
            return
        slots = optimizer_slots(optimizer)
        _check_parameters(optimizer, known, slots.parameters)
        chosen = slots if by_name is None else by_name.chosen(optimizer, slots)
        transform_slots_(chosen, method, _loss_scale(optimizer, kwargs))
        warning = step_sizes.warning_for(
            optimizer,
            lambda: slots_by_group(
                optimizer, {id(slot.parameter): [slot] for slot in chosen if slot.parameter.grad is not None}
            ),
        )
        if warning is not None and _is_first_process():
            warnings.warn(f"{name} is attached: {warning}", stacklevel=4)
        if not warned_of_no_gradient and all(parameter.grad is None for parameter in slots.parameters):
            warned_of_no_gradient = True
            warnings.warn(
                f"{type(optimizer).__name__} steps, and none of its parameters has a gradient for the attached {name}: "
                "either none has been computed yet, or the optimizer takes them from elsewhere (master weights), out "
                "of reach",
                stacklevel=4,
            )
        # An optimizer that takes the scaler itself looks for inf and NaN itself, and skips the step.
        if error_if_nonfinite and kwargs.get("grad_scaler") is None:
            found_inf = getattr(optimizer, "found_inf", None)  # what the scaler hands to fused optimizers
            check_finite(
                slots if by_name is None else by_name.all(optimizer, slots), () if found_inf is None else (found_inf,)
            )

    _attached.add(optimizer)
    # If the step is compiled, the hook is not: it reads the call stack, and has kernels of its own.
    handle = optimizer.register_step_pre_hook(torch.compiler.disable(transform))  # type: ignore[no-untyped-call]
    if replaced is not None:
        step = replaced.step

        @functools.wraps(step)
        def checked(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            nonlocal has_run
            has_run = False
            result = step(*args, **kwargs)
            if not has_run and handle.id in (step_pre_hooks(optimizer) or {}):
                raise ZNormRuntimeError(
                    f"{type(optimizer).__name__} has stepped without the attached {name}: its step has been replaced "
                    f"by {getattr(step, '__qualname__', type(step).__name__)}, which does not call the original one, "
                    "which runs hooks. Call lightning_znorm.functional.transform_grads_ before each step instead"
                )
            return result

        # A bound method, because schedulers that come later look for the function in it.
        vars(replaced)["step"] = MethodType(checked, replaced)
    return handle


_attached: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def attached_optimizers() -> list[Optimizer]:
    """Return the optimizers that have a method attached."""
    return [optimizer for optimizer in _attached if is_attached(optimizer)]


def is_attached(optimizer: Optimizer) -> bool:
    """Return whether a method is attached to an optimizer."""
    hooks = (step_pre_hooks(optimizer) or {}).values()
    return any(getattr(hook, "__module__", None) == attach.__module__ for hook in hooks)


def _check_optimizer(optimizer: object) -> Optimizer | None:
    """Refuse an optimizer that would never run the hook, or would run it too early.

    Returns:
        The optimizer whose ``step`` was replaced, if it was: whether the replacement runs the hook shows in a step.
    """
    kind = type(optimizer).__name__
    if isinstance(optimizer, nn.Module):
        raise ZNormTypeError(f"{kind} is a module: give the optimizer of its parameters")
    if isinstance(optimizer, type):
        raise ZNormTypeError(
            f"{optimizer.__name__} is a class: give an optimizer, {optimizer.__name__}(model.parameters(), ...)"
        )
    if isinstance(optimizer, Iterable):
        raise ZNormTypeError(f"attach takes one optimizer at a time, got a {kind}: attach to each optimizer by itself")
    if not hasattr(optimizer, "param_groups") and not hasattr(optimizer, "optimizer"):
        raise ZNormTypeError(f"{shown(optimizer)} is no optimizer: give a torch.optim.Optimizer")
    if not isinstance(optimizer, Optimizer):
        raise ZNormTypeError(
            f"{kind} runs no hooks before its step, because it is no torch.optim.Optimizer: if it stands for one, as "
            "Accelerate's DummyOptim does, or wraps one, attach to that one, before it is wrapped"
        )
    if isinstance(optimizer, LBFGS):
        raise ZNormValueError(
            "LBFGS computes its gradients in the closure of its step, out of an attached method's reach"
        )
    wrapped = wrapped_by(optimizer)
    if takes_two_steps(optimizer):
        way_out = f"attach to its {type(wrapped[0]).__name__}, which descends" if wrapped else "climb by hand"
        raise ZNormTypeError(
            f"{kind} climbs along one gradient and descends along another, in steps that run no hooks: {way_out} (see "
            "examples/sam.py)"
        )
    if steps_in_backward(optimizer):
        raise ZNormTypeError(f"{kind} steps in the backward pass with overlap_with_ddp=True, and runs no hooks before")
    if not marks_steps():
        raise untested_torch("torch.optim.Optimizer has no `profile_hook_step`")
    # The optimizers of Lightning and Fabric share the hooks of the one that they wrap.
    hooks = step_pre_hooks(optimizer)
    for candidate in (optimizer, *(inner for inner in wrapped if hooks is not None and step_pre_hooks(inner) is hooks)):
        if runs_hooks(candidate):
            return None
        if "step" in vars(candidate) or type(candidate).__module__.startswith("torch.optim."):
            return candidate  # its step was replaced by a scheduler or a user, and may call the original
    which = f"the {type(wrapped[0]).__name__} that it wraps" if wrapped else "the one that it wraps, if it does"
    raise ZNormTypeError(f"{kind} runs no hooks before its step: attach to {which}, before it is wrapped")


def _is_first_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _check_parameters(optimizer: Optimizer, known: list[Tensor], now: list[Tensor]) -> None:
    """Refuse flat tensors that something has put in place of parameters of other shapes."""
    if Tensor not in map(type, now):  # they are not parameters
        return
    known_ids, ids = {id(parameter) for parameter in known}, {id(parameter) for parameter in now}
    gone = [parameter.shape for parameter in known if id(parameter) not in ids]
    new = [parameter.shape for parameter in now if id(parameter) not in known_ids and type(parameter) is Tensor]
    if gone and new and gone != new[: len(gone)]:
        raise UnsupportedGradientError(
            f"the parameters that {type(optimizer).__name__} had when the method was attached have been replaced by "
            f"others (a tensor of shape {tuple(new[0])}, where there was one of {tuple(gone[0])}), as DeepSpeed does. "
            "Parts of flattened weights have no statistics of their own: use lightning_znorm's callbacks in a "
            "Lightning Trainer, or ZeRO stage 0"
        )


def _loss_scale(optimizer: Optimizer, step_kwargs: dict[str, Any]) -> Tensor | None:
    """Return the factor by which the step will divide the gradients, as ``torch.amp.GradScaler.step`` hands it over."""
    scaler = step_kwargs.get("grad_scaler")
    scale = getattr(optimizer, "grad_scale", None) if scaler is None else scale_of(scaler)
    return scale if isinstance(scale, Tensor) else None
