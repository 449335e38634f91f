"""Gradient methods as affine maps of each tensor, or of each of its rows, from their statistics."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, TypeAlias

from torch import Tensor

from lightning_znorm.errors import ZNormTypeError
from lightning_znorm.gradients.arguments import checked_number, shown
from lightning_znorm.gradients.statistics import Statistics

Over: TypeAlias = Literal["tensor", "row"]
"""What statistics are taken of: each whole tensor, or each of its rows (all elements of one index of dimension 0)."""


def _check_over(over: str, method: str) -> None:
    if over not in ("tensor", "row"):
        raise ZNormTypeError(f"{method}.over must be 'tensor' or 'row', got {shown(over)}")


class AffineMethod(ABC):
    """A gradient method ``z = (g - shift) * scale`` whose shift and scale follow from statistics of ``g``.

    Count, mean and squared deviation can be merged across blocks and processes, so a method of this form is right
    wherever a gradient lives, and every kernel serves it. A tensor or row of a single element has no deviation to speak
    of: it is left as it is, whatever the method.

    Attributes:
        over: Whether the statistics are those of each whole ``"tensor"`` or of each ``"row"`` (all elements that share
            an index of the first dimension).
        needs_std: Whether :meth:`affine` reads the deviation; without it, one pass over the gradient is saved.
        pooled: With ``over = "row"``, whether the squared deviations of all rows of a tensor from their own means are
            added up: each row's entry then has the mean of the row, and count and deviation of the whole tensor. A
            tensor without rows (a vector, or rows of single elements) is one entry, whose mean is given as zero: such a
            tensor cannot be centred by row.

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
    pooled: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.pooled and not (cls.over == "row" and cls.needs_std):
            raise ZNormTypeError(
                f"{cls.__name__}.pooled is about deviations of rows: it needs over = 'row' and needs_std"
            )
        _check_over(cls.over, cls.__name__)

    @abstractmethod
    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
        """Returns shift and scale, each of shape ``(S,)`` like the statistics, or ``None`` for no shift or no scale."""

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class ZScore(AffineMethod):
    r"""ZNorm: :math:`z = (g - \mu) / (\sigma + \epsilon)` over all elements of a tensor; a constant one becomes zero.

    Source: Yun, "ZNorm: Z-Score Gradient Normalization", arXiv 2408.01215, Algorithm 1; :math:`\sigma` is the
    population deviation of Lemma 4.1.

    Args:
        eps: Added to the standard deviation, an absolute number: gradients whose deviation is not far above it come out
            smaller than unit size.

    Raises:
        TypeError: If ``eps`` is not a number.
        ValueError: If ``eps`` is negative, infinite or NaN.
    """

    def __init__(self, eps: float = 1e-10) -> None:
        self.eps = checked_number("eps", eps)

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:  # noqa: D102
        std = stats.std
        return stats.mean, (std + self.eps).reciprocal_().masked_fill_(std == 0, 0.0)


class Centralization(AffineMethod):
    """Gradient Centralization: the mean of each row (output channel) is subtracted, in tensors of several dimensions.

    Source: Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks", ECCV 2020,
    equation 1. See :func:`lightning_znorm.functional.centralize_grads_` for what differs from the authors' code.
    """

    over = "row"
    needs_std = False

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:  # noqa: D102
        return stats.mean, None


class SING(AffineMethod):
    r"""Stabilized and normalized gradient: rows are centred, and the tensor divided by its norm.

    .. math:: z = \frac{g - \mu}{\lVert g - \mu \rVert + \epsilon}

    with the mean :math:`\mu` of each row (output channel) and the norm over the whole tensor. A vector, such as a bias,
    is not centred, but divided by its norm, as in the authors' code; and so are rows of single elements, ``(out, 1)``,
    which their code sets to zero. Rows that are constant become zero, but for rounding; a tensor of a single element
    stays as it is here, and becomes its sign there.

    A tensor of n elements in R rows comes out with norm 1, where ZNorm's has :math:`\sqrt{n}`: with SGD, steps are
    shorter by that. Adam divides the size of the gradient out again, so that under Adam the two differ in what is
    subtracted (each row's mean, or the tensor's), and in Adam's own ``eps`` (1e-8), which is nearer to elements of size
    :math:`1/\sqrt{n}` than to those of size 1.

    This is the gradient's part of the method alone. The authors' optimizer also is AdamW whose denominator goes through
    a softplus (``beta=50``) in place of ``eps``, decays weights of two or more dimensions only, and averages weights
    by LookAhead (every 5 steps, half way). They advise ten times AdamW's best learning rate, a tenth of its weight
    decay, and warm-up with cosine decay.

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
    pooled = True

    def __init__(self, eps: float = 1e-8) -> None:
        self.eps = checked_number("eps", eps)

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:  # noqa: D102
        norm = stats.std * stats.count.sqrt()
        return stats.mean, (norm + self.eps).reciprocal_().masked_fill_(norm == 0, 0.0)


GradientMethod: TypeAlias = AffineMethod | Callable[[Tensor], Tensor]
"""An affine method, or any function from a whole gradient to its replacement of the same shape."""


def describe(method: GradientMethod) -> str:
    """A method's name, for messages and checkpoints.

    Raises:
        TypeError: If it is no method: an affine method's class in place of an object, or nothing to call; or if it is
            about statistics of something else than tensors and rows.
    """
    if isinstance(method, AffineMethod):
        _check_over(method.over, type(method).__name__)
        return repr(method)
    if isinstance(method, type) or not callable(method):
        raise ZNormTypeError(
            "a gradient method is an AffineMethod object or a function from a gradient to its replacement, got "
            f"{shown(method)}"
        )
    return getattr(method, "__qualname__", type(method).__qualname__)
