"""Gradient Centralization as a Lightning callback."""

from collections.abc import Sequence

from lightning_znorm.callbacks.gradient_transform import GradientTransform
from lightning_znorm.gradients import Centralization


class GradientCentralizationCallback(GradientTransform):
    """Subtracts from each gradient the mean of each output channel before every optimizer step.

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
