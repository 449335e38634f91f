"""The gradient methods as Lightning callbacks: a class for each, with its options."""

from collections.abc import Sequence

from lightning_znorm.callbacks.transform import GradientTransform
from lightning_znorm.gradients import SING, Centralization, ZScore


class ZNormCallback(GradientTransform):
    r"""Replace every layer's gradient by its z-score before each optimizer step (ZNorm).

    .. math:: z = \frac{g - \mu}{\sigma + \epsilon}

    with the mean and the population standard deviation over all elements of a parameter's gradient. The paper defines
    this for the weight matrices and convolution tensors of a network; by default every parameter takes part, biases and
    normalization scales included, which is this library's reading. ``min_ndim=2`` is the strict one.

    Note:
        - A z-scored gradient of d elements has norm :math:`\sqrt{d}` whatever the loss: a learning rate chosen for
          plain SGD is far too large. Adam divides most of the scale out again: its usual learning rates work.
        - Gradients that are structurally zero do not stay so, because the mean is subtracted: exclude embeddings with a
          padding row or unseen tokens (``exclude="*embed*"``), and pruned weights.
        - A bias in front of a normalization layer has a true gradient of zero. What is there is rounding noise, and
          becomes unit size; harmless to the output, and avoided by ``bias=False`` or ``min_ndim=2``.
        - A tensor of two elements always becomes :math:`\pm 1`.
        - See :func:`lightning_znorm.functional.zscore_grads_` for constant gradients, ``eps``, inf and NaN, and
          :class:`GradientTransform` for optimizers, precisions and strategies.

    Source: Yun, "ZNorm: Z-Score Gradient Normalization", arXiv 2408.01215, Algorithm 1.

    Args:
        eps: Added to the standard deviation, an absolute number.
        include: Shell-style pattern or patterns; a parameter takes part if its name in the LightningModule matches one.
        exclude: Pattern or patterns whose matches are left alone.
        min_ndim: Least number of dimensions of a parameter; 2 leaves biases and normalization scales alone.
        allow_untested_strategy: See :class:`GradientTransform`.
        error_if_nonfinite: See :class:`GradientTransform`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If ``eps`` is negative, infinite or NaN, and as :class:`GradientTransform` does.
        MisconfigurationException: As :class:`GradientTransform` does.
        UnsupportedGradientError: Before a step, if a gradient is sparse, of 8 bits, or sharded in an unknown way.
        NonFiniteGradientError: Before a step, if a gradient holds an inf or NaN and ``error_if_nonfinite`` is set.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_znorm import ZNormCallback
        >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[ZNormCallback()])
    """

    def __init__(
        self,
        eps: float = 1e-10,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        min_ndim: int = 0,
        allow_untested_strategy: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        super().__init__(ZScore(eps), include, exclude, min_ndim, allow_untested_strategy, error_if_nonfinite)


class GradientCentralizationCallback(GradientTransform):
    """Subtract from each gradient the mean of each output channel before every optimizer step.

    Tensors of one dimension stay as they are. :func:`lightning_znorm.functional.centralize_grads_` says what differs
    from the authors' optimizers.

    Source: Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks", ECCV 2020
    (arXiv 2004.01461), equation 1.

    Args:
        include: Shell-style pattern or patterns; a parameter takes part if its name in the LightningModule matches one.
        exclude: Pattern or patterns whose matches are left alone.
        min_ndim: Least number of dimensions of a parameter; 4 restricts it to convolutions, as in the authors'
            ``gc_conv_only``.
        allow_untested_strategy: See :class:`GradientTransform`.
        error_if_nonfinite: See :class:`GradientTransform`.

    Raises:
        TypeError: If an argument is of another type.
        MisconfigurationException: As :class:`GradientTransform` does.
        ValueError: As :class:`GradientTransform` does.
        UnsupportedGradientError: Before a step, if a gradient is sparse, of 8 bits, or sharded in an unknown way.
        NonFiniteGradientError: Before a step, if a gradient holds an inf or NaN and ``error_if_nonfinite`` is set.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_znorm import GradientCentralizationCallback
        >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[GradientCentralizationCallback()])
    """

    def __init__(
        self,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        min_ndim: int = 0,
        allow_untested_strategy: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        super().__init__(Centralization(), include, exclude, min_ndim, allow_untested_strategy, error_if_nonfinite)


class SINGCallback(GradientTransform):
    """Centre each output channel's gradient and divide each tensor's by its norm, before every optimizer step.

    This is the gradient's part of SING alone: :class:`~lightning_znorm.gradients.SING` says what else its authors'
    optimizer does, which learning rate they advise, and how it differs from ZNorm.

    Source: Courtois et al., "SING: A Plug-and-Play DNN Learning Technique", arXiv 2305.15997.

    Args:
        eps: Added to the norm, an absolute number.
        include: Shell-style pattern or patterns; a parameter takes part if its name in the LightningModule matches one.
        exclude: Pattern or patterns whose matches are left alone.
        min_ndim: Least number of dimensions of a parameter; 2 leaves biases and normalization scales alone.
        allow_untested_strategy: See :class:`GradientTransform`.
        error_if_nonfinite: See :class:`GradientTransform`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If ``eps`` is negative, infinite or NaN, and as :class:`GradientTransform` does.
        MisconfigurationException: As :class:`GradientTransform` does.
        UnsupportedGradientError: Before a step, if a gradient is sparse, of 8 bits, or sharded in an unknown way.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_znorm import SINGCallback
        >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[SINGCallback()])
    """

    def __init__(
        self,
        eps: float = 1e-8,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        min_ndim: int = 0,
        allow_untested_strategy: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        super().__init__(SING(eps), include, exclude, min_ndim, allow_untested_strategy, error_if_nonfinite)
