"""ZNorm as a Lightning callback."""

from collections.abc import Sequence

from lightning_znorm.callbacks.gradient_transform import GradientTransform
from lightning_znorm.gradients import ZScore


class ZNormCallback(GradientTransform):
    r"""Replaces every layer's gradient by its z-score before each optimizer step (ZNorm).

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
