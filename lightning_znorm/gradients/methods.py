"""Gradient methods: from the statistics of each tensor or row to the shift and scale that are applied to it."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_znorm.arguments import checked_choice, checked_number, shown
from lightning_znorm.errors import ZNormRuntimeError, ZNormTypeError

Over: TypeAlias = Literal["tensor", "row"]
"""What statistics are taken over: each whole tensor, or each of its rows (all elements of one index of dimension 0)."""

Centering: TypeAlias = Literal["full", "adaptive"]
"""How much of the mean :class:`ZScore` subtracts: all, or the less, the larger it is compared to the deviation."""

# A deviation of fewer than this many rounding units of the mean is rounding. Summing a constant float32 tensor of up to
# 1e7 elements was measured to leave at most 4.9 of them.
ROUNDING_UNITS = 8


@dataclass(frozen=True)
class Statistics:
    """Statistics of several tensors, or of several rows (first dimension) of tensors.

    Each attribute has the shape ``(S,)``, with one number for each tensor or row. They are in the precision of the
    computation: float32 for half-precision gradients, otherwise that of the gradients.

    Attributes:
        count: Number of elements, as a floating-point tensor. Where all rows of a tensor share its deviation
            (:attr:`AffineMethod.std_over`), the number of elements of the tensor.
        mean: Arithmetic mean of the elements. Complex if the gradients are complex.
        m2: Sum of the squared deviations from the mean (of their magnitudes, if the gradients are complex). ``None`` if
            the method says that it does not need it (:attr:`AffineMethod.needs_std`).

    Example:
        Of two gradients, (1, 7) and (2, 2, 2):

        >>> import torch
        >>> from lightning_znorm.gradients import Statistics
        >>> stats = Statistics(torch.tensor([2.0, 3.0]), torch.tensor([4.0, 2.0]), torch.tensor([18.0, 0.0]))
        >>> stats.std
        tensor([3., 0.])
    """

    count: Tensor
    mean: Tensor
    m2: Tensor | None

    @property
    def std(self) -> Tensor:
        """Population standard deviation ``sqrt(m2 / count)``, shape ``(S,)``, real.

        Zero where the deviation is within the rounding of the mean, so that a constant gradient is seen as one. NaN
        where the squared deviations overflow: an infinite deviation would otherwise silently become a scale of zero.
        """
        if self.m2 is None:
            raise ZNormRuntimeError("these statistics hold no deviation: set `needs_std = True` on the method")
        std = (self.m2 / self.count).sqrt_()
        rounding = ROUNDING_UNITS * torch.finfo(std.dtype).eps * self.mean.abs()
        # One operation for two: within rounding, std - std is zero; elsewhere, std - 0 * std is std, and NaN for inf.
        return torch.addcmul(std, std, std <= rounding, value=-1)


class _Pooled:
    """``AffineMethod.pooled``: the former name of ``std_over = "tensor"``, which version 0.2 removes."""

    def __get__(self, method: "AffineMethod | None", cls: "type[AffineMethod]") -> bool:
        _warn_of_pooled(cls.__name__, stacklevel=3)
        return rows_share_std(cls if method is None else method)

    def __set__(self, method: "AffineMethod", value: bool) -> None:
        _warn_of_pooled(type(method).__name__, stacklevel=3)
        setattr(method, "std_over", "tensor" if value else None)  # noqa: B010  # for mypy, it is the class's


class AffineMethod(ABC):
    """A gradient method ``z = (g - shift) * scale`` whose shift and scale follow from statistics of ``g``.

    Count, mean and squared deviation can be merged across blocks and processes. So a method of this form is right
    wherever a gradient is kept, and every kernel serves it. A tensor or row of a single element has no meaningful
    deviation: it is left as it is, whatever the method.

    Attributes:
        over: What the statistics are taken over: each whole ``"tensor"``, or each ``"row"`` (all elements that share
            an index of the first dimension).
        needs_std: Whether :meth:`affine` reads the deviation. Without it, one pass over the gradient is saved.
        std_over: What the deviation is taken over; ``None`` is the same as ``over``. With ``over = "row"`` and
            ``std_over = "tensor"``, the squared deviations of all rows of a tensor from their own means are added up.
            Each row then has its own mean, and the count and deviation of the whole tensor. A tensor without rows (a
            vector, or rows of single elements) cannot be centred by row: its mean is given as zero.

    Example:
        Root mean square normalization, which keeps the mean:

        >>> import torch
        >>> from lightning_znorm.functional import transform_grads_
        >>> from lightning_znorm.gradients import AffineMethod
        >>> class RMSNorm(AffineMethod):
        ...     def affine(self, stats):
        ...         return None, (stats.std.square() + stats.mean.abs().square()).rsqrt()
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([1.0, 7.0])
        >>> transform_grads_(weight, RMSNorm())
        >>> weight.grad
        tensor([0.2000, 1.4000])
    """

    over: ClassVar[Over] = "tensor"
    needs_std: ClassVar[bool] = True
    std_over: ClassVar[Over | None] = None
    pooled = _Pooled()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _adopt_pooled(cls, stacklevel=5)  # 4 would point into ABCMeta.__new__
        _check_over(cls, cls.__name__)

    @abstractmethod
    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
        """Return shift and scale, each of shape ``(S,)`` like the statistics, or ``None`` for no shift or no scale.

        The statistics must not be changed in place. Where :attr:`Statistics.std` is zero, a tensor is constant but for
        rounding, which a large scale would make large: give it the scale zero. On a device, ``(g - shift) * scale`` is
        computed as ``g * scale - shift * scale``, in one pass: the product of shift and scale must not overflow.
        """

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


def rows_share_std(method: AffineMethod | type[AffineMethod]) -> bool:
    """Return whether each row has its own mean, and the deviation of its whole tensor."""
    return method.over == "row" and method.std_over == "tensor"


def _adopt_pooled(cls: type[AffineMethod], stacklevel: int) -> None:
    """Take ``std_over`` of a class from its ``pooled``, if its author or somebody later has set that."""
    pooled = next(vars(base)["pooled"] for base in cls.__mro__ if "pooled" in vars(base))
    if isinstance(pooled, _Pooled):
        return
    _warn_of_pooled(cls.__name__, stacklevel)
    if not isinstance(pooled, bool):
        raise ZNormTypeError(f"{cls.__name__}.pooled must be True or False, got {shown(pooled)}: set std_over instead")
    if pooled and cls.over != "row":
        raise ZNormTypeError(f"{cls.__name__}.pooled is about deviations of rows: it needs over = 'row'")
    cls.std_over = "tensor" if pooled else None
    cls.pooled = vars(AffineMethod)["pooled"]


def _warn_of_pooled(name: str, stacklevel: int) -> None:
    warnings.warn(
        f'{name}.pooled is now called std_over: write `std_over = "tensor"` in place of `pooled = True`, and nothing '
        "in place of `pooled = False`. Version 0.2 removes the old name",
        FutureWarning,
        stacklevel=stacklevel,
    )


def _check_over(method: AffineMethod | type[AffineMethod], name: str) -> None:
    if method.over not in ("tensor", "row"):
        raise ZNormTypeError(f"{name}.over must be 'tensor' or 'row', got {shown(method.over)}")
    if method.std_over not in (None, "tensor", "row"):
        raise ZNormTypeError(f"{name}.std_over must be None, 'tensor' or 'row', got {shown(method.std_over)}")
    if method.std_over not in (None, method.over) and not (method.over == "row" and method.needs_std):
        raise ZNormTypeError(
            f"{name}.std_over = {method.std_over!r} is about deviations of rows: it needs over = 'row' and needs_std = "
            "True"
        )


class ZScore(AffineMethod):
    r"""ZNorm: :math:`z = (g - \mu) / (\sigma + \epsilon)` over all elements of a tensor; a constant one becomes zero.

    With ``centering="adaptive"``, less of the mean is subtracted, the larger it is compared to the deviation:

    .. math:: z = \frac{g - r\mu}{\sqrt{\sigma^2 + (1 - r)^2 \lvert\mu\rvert^2} + \epsilon},
        \qquad r = \frac{\sigma^2}{\sigma^2 + \lvert\mu\rvert^2}

    r is the squared cosine between g and its z-score. Where the mean is small, this is ZNorm; where the mean dominates,
    g is divided by its root mean square. A constant gradient c becomes :math:`c / (\lvert c\rvert + \epsilon)`. For
    every gradient of n elements that is not zero,
    :math:`\langle z, g \rangle = n (\sigma^2 + (1 - r) \lvert\mu\rvert^2) / (\dots) > 0`. With :math:`x = 1 - r`, the
    squared cosine between z and g is :math:`(1 - x + x^2)^2 / (1 - x + x^3)`: it is never below that of full centring,
    r, and the cosine is never below 0.926 (the angle is below 22.2 degrees).

    Source: Yun, "ZNorm: Z-Score Gradient Normalization", arXiv 2408.01215, Algorithm 1; :math:`\sigma` is the
    population deviation of Lemma 4.1. Adaptive centring is this package's own
    (``docs/methods/adaptive-centring.md``).

    Args:
        eps: Added to the standard deviation (adaptive: to the root), an absolute number: gradients whose deviation is
            not far above it come out smaller than unit size.
        centering: ``"full"`` subtracts the mean, as in the paper; ``"adaptive"`` keeps it where it is the signal, as it
            often is in the output layer of a network with sigmoid outputs.

    Raises:
        TypeError: If ``eps`` is not a number.
        ValueError: If ``eps`` is negative, infinite or NaN, or if ``centering`` is neither ``"full"`` nor
            ``"adaptive"``.

    Example:
        >>> import torch
        >>> from lightning_znorm.functional import transform_grads_
        >>> from lightning_znorm.gradients import ZScore
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([4.0, 6.0])  # mean 5, deviation 1: both elements keep their sign
        >>> transform_grads_(weight, ZScore(centering="adaptive"))
        >>> weight.grad
        tensor([0.7754, 1.1827])
    """

    centering: Centering = "full"  # also of objects that were pickled before there was a choice

    def __init__(self, eps: float = 1e-10, centering: Centering = "full") -> None:
        self.eps = checked_number("eps", eps, minimum=0, finite=True)
        self.centering = checked_choice("centering", centering, ("full", "adaptive"))

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:  # noqa: D102
        std = stats.std
        if self.centering == "full":
            return stats.mean, _reciprocal(std, self.eps)
        mean = stats.mean.abs()
        # By sine and cosine: the squares of the deviation and the mean may overflow.
        root_mean_square = torch.hypot(std, mean)
        cosine, sine = std / root_mean_square, mean / root_mean_square
        scale = (torch.hypot(std, sine.square() * mean) + self.eps).reciprocal_()
        # With a deviation of which the square underflows, such a small gradient may be anything but constant.
        is_zero = (std == 0) & (mean <= torch.finfo(std.dtype).tiny ** 0.5)
        shift = cosine.square().masked_fill_(is_zero, 0.0) * stats.mean
        return shift, scale.masked_fill_(is_zero, 0.0)

    def __repr__(self) -> str:
        # Checkpoints know a method by this text, and some were written before there was a choice.
        options = {name: value for name, value in vars(self).items() if (name, value) != ("centering", "full")}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in options.items())})"


class Centralization(AffineMethod):
    """Gradient Centralization: the mean of each row (output channel) is subtracted, in tensors of several dimensions.

    In the output layer of a network, the row of a class may be little else than its mean ("this class less likely"),
    with softmax too. Patterns (``exclude``) leave the layer out, and :class:`ZScore` with adaptive centring keeps the
    mean of a tensor.

    Source: Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks", ECCV 2020,
    equation 1. :func:`lightning_znorm.functional.centralize_grads_` says how it differs from the authors' code.

    Example:
        >>> import torch
        >>> from lightning_znorm.functional import transform_grads_
        >>> from lightning_znorm.gradients import Centralization
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> weight.grad = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
        >>> transform_grads_(weight, Centralization())
        >>> weight.grad
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """

    over = "row"
    needs_std = False

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:  # noqa: D102
        return stats.mean, None


class SING(AffineMethod):
    r"""Stabilized and normalized gradient: rows are centred, and the tensor is divided by its norm.

    .. math:: z = \frac{g - \mu}{\lVert g - \mu \rVert + \epsilon}

    with the mean :math:`\mu` of each row (output channel) and the norm over the whole tensor. In an output layer, these
    means may be most of the gradient (:class:`Centralization`). A vector, such as a bias,
    is divided by its norm without being centred, as in the authors' code. So are rows of single elements, ``(out, 1)``,
    which the authors' code sets to zero. Constant rows become zero, up to rounding. A tensor of a single element stays
    as it is; in the authors' code it becomes its sign.

    A tensor of n elements in R rows comes out with norm 1, and ZNorm's with :math:`\sqrt{n}`. So with SGD, steps are
    shorter by this factor. Adam divides the size of the gradient out again: under Adam, the two methods differ in what
    is subtracted (each row's mean, or the tensor's), and in the effect of Adam's own ``eps`` (1e-8), which is nearer to
    elements of size :math:`1/\sqrt{n}` than to those of size 1.

    This is the gradient's part of the method alone. The authors' optimizer is also an AdamW whose denominator goes
    through a softplus (``beta=50``) in place of ``eps``. It decays weights of two or more dimensions only, and averages
    weights by LookAhead (every 5 steps, half way). The authors advise ten times AdamW's best learning rate, a tenth of
    its weight decay, and warm-up with cosine decay.

    Source: Courtois et al., "SING: A Plug-and-Play DNN Learning Technique", arXiv 2305.15997, and the authors' code
    (github.com/AdrienCourtois/SING).

    Args:
        eps: Added to the norm, an absolute number.

    Raises:
        TypeError: If ``eps`` is not a number.
        ValueError: If ``eps`` is negative, infinite or NaN.

    Example:
        >>> import torch
        >>> from lightning_znorm.functional import transform_grads_
        >>> from lightning_znorm.gradients import SING
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> weight.grad = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
        >>> transform_grads_(weight, SING())
        >>> weight.grad
        tensor([[-0.7071,  0.7071],
                [ 0.0000,  0.0000]])
    """

    over = "row"
    std_over = "tensor"

    def __init__(self, eps: float = 1e-8) -> None:
        self.eps = checked_number("eps", eps, minimum=0, finite=True)

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:  # noqa: D102
        norm = stats.std * stats.count.sqrt()
        return stats.mean, _reciprocal(norm, self.eps)


def _reciprocal(size: Tensor, eps: float) -> Tensor:
    """Return ``1 / (size + eps)``, and zero where the size is zero.

    ``eps`` is at least the smallest normal number, so that there is no 0 / 0. On a device, it is a launch less than to
    mask the zeros.
    """
    return size.sign().div_(size + max(eps, torch.finfo(size.dtype).tiny))


GradientMethod: TypeAlias = AffineMethod | Callable[[Tensor], Tensor]
"""An affine method, or any function from an unsharded gradient to its replacement of the same shape."""


def is_zscore(method: GradientMethod) -> bool:
    """Return whether a method is :class:`ZScore`, and not a class derived from it that does something else."""
    return getattr(type(method), "affine", None) is ZScore.affine


def describe(method: GradientMethod) -> str:
    """Return a method's name, for messages and checkpoints.

    Raises:
        TypeError: If ``method`` is not a method (an affine method's class in place of an object, or nothing to call),
            or if its statistics are over something other than tensors and rows.
    """
    if isinstance(method, AffineMethod):
        _adopt_pooled(type(method), stacklevel=4)
        _check_over(method, type(method).__name__)
        return repr(method)
    if isinstance(method, type) or not callable(method):
        raise ZNormTypeError(
            "a gradient method is an AffineMethod object or a function from a gradient to its replacement, got "
            f"{shown(method)}"
        )
    return getattr(method, "__qualname__", type(method).__qualname__)
