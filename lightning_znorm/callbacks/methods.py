"""The gradient methods as Lightning callbacks: a class for each, with its options."""

from collections.abc import Sequence

from lightning_znorm.callbacks.representation import represented
from lightning_znorm.callbacks.transform import OPTIONS, GradientTransform
from lightning_znorm.gradients import SING, Centralization, ZScore
from lightning_znorm.gradients.methods import Centering


class ZNormCallback(GradientTransform):
    r"""Replace every layer's gradient by its z-score before each optimizer step (ZNorm).

    .. math:: z = \frac{g - \mu}{\sigma + \epsilon}

    with the mean and the population standard deviation over all elements of a parameter's gradient. The paper defines
    this for the weight matrices and convolution tensors of a network. By default every parameter takes part here,
    biases and normalization scales included; with ``min_ndim=2`` only weights do, as in the paper's definition.

    Note:
        - A z-scored gradient of d elements has norm :math:`\sqrt{d}` whatever the loss: a learning rate chosen for
          plain SGD is far too large, and a warning says so once if steps are larger than half the weights they move.
          Adam divides most of the scale out again: its usual learning rates work.
        - Gradients that are structurally zero do not stay zero, because the mean is subtracted: exclude embeddings with
          a padding row (a warning names them) or unseen tokens (``exclude="*embed*"``), and pruned weights.
        - A bias in front of a normalization layer has a true gradient of zero. Its gradient is rounding noise, which
          becomes unit size. This does not change the output; ``bias=False`` or ``min_ndim=2`` avoids it.
        - With full centring, a tensor of two elements always becomes :math:`\pm 1`.
        - With sigmoid outputs, most of the output layer's gradient may be its mean: "everything less likely". Full
          centring subtracts exactly that, and training may stall. Use ``centering="adaptive"``, or leave out the
          output layer with ``exclude``. :class:`GradientMonitor` names layers where the mean dominates.
          :class:`~lightning_znorm.gradients.ZScore` has the formula of adaptive centring.
        - See :func:`lightning_znorm.functional.zscore_grads_` for constant gradients, ``eps``, inf and NaN. See
          :class:`GradientTransform` for optimizers, precisions and strategies.

    Source: Yun, "ZNorm: Z-Score Gradient Normalization", arXiv 2408.01215, Algorithm 1.

    Args:
        eps: An absolute number that is added to the standard deviation.
        include: Shell-style pattern or patterns; a parameter takes part if its name in the LightningModule matches one.
        exclude: Pattern or patterns whose matches do not take part.
        min_ndim: Least number of dimensions of a parameter that takes part; 2 leaves out biases and normalization
            scales.
        allow_untested_strategy: Whether to trust, with a warning, a strategy that is not one of Lightning's tested
            ones, such as a subclass of one, to leave gradients where the tested ones do.
        error_if_nonfinite: Whether to raise, before the update, if a gradient holds an inf or NaN after the method.
            The check costs a pass over the gradients and one wait for the device at each step.
        centering: ``"full"`` subtracts the mean, as in the paper. ``"adaptive"`` subtracts less of it, the larger it is
            compared to the deviation, so that the angle between a gradient and the result is always below 22.2
            degrees.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``eps`` is negative, infinite or NaN, or ``centering`` is another word, and as
            :class:`GradientTransform` does.
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
        centering: Centering = "full",
    ) -> None:
        super().__init__(
            ZScore(eps, centering), include, exclude, min_ndim, allow_untested_strategy, error_if_nonfinite
        )

    def __repr__(self) -> str:
        options = {"eps": "method.eps", **OPTIONS, "centering": "method.centering"}
        return represented(self, ZNormCallback, options)


class GradientCentralizationCallback(GradientTransform):
    """Subtract from each gradient the mean of each output channel before every optimizer step.

    Tensors of one dimension are not changed. See :func:`lightning_znorm.functional.centralize_grads_` for what differs
    from the authors' optimizers. The output layer's gradient may be little else than these means, and centring loses
    them: ``exclude`` leaves that layer out.

    Source: Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks", ECCV 2020
    (arXiv 2004.01461), equation 1.

    Args:
        include: Shell-style pattern or patterns; a parameter takes part if its name in the LightningModule matches one.
        exclude: Pattern or patterns whose matches do not take part.
        min_ndim: Least number of dimensions of a parameter that takes part; 4 leaves only convolutions, as the authors'
            ``gc_conv_only`` does.
        allow_untested_strategy: Whether to trust, with a warning, a strategy that is not one of Lightning's tested
            ones, such as a subclass of one, to leave gradients where the tested ones do.
        error_if_nonfinite: Whether to raise, before the update, if a gradient holds an inf or NaN after the method.
            The check costs a pass over the gradients and one wait for the device at each step.

    Raises:
        TypeError: If an argument has the wrong type.
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

    def __repr__(self) -> str:
        return represented(self, GradientCentralizationCallback, OPTIONS)


class SINGCallback(GradientTransform):
    """Centre each output channel's gradient and divide each tensor's by its norm, before every optimizer step.

    This is only the part of SING that changes gradients. It centres the output layer too, whose gradient may be little
    else than the means of its rows: ``exclude`` leaves that layer out.

    See :class:`~lightning_znorm.gradients.SING` for what else its authors' optimizer does, for the learning rate that
    they advise, and for how it differs from ZNorm.

    Source: Courtois et al., "SING: A Plug-and-Play DNN Learning Technique", arXiv 2305.15997.

    Args:
        eps: An absolute number that is added to the norm.
        include: Shell-style pattern or patterns; a parameter takes part if its name in the LightningModule matches one.
        exclude: Pattern or patterns whose matches do not take part.
        min_ndim: Least number of dimensions of a parameter that takes part; 2 leaves out biases and normalization
            scales.
        allow_untested_strategy: Whether to trust, with a warning, a strategy that is not one of Lightning's tested
            ones, such as a subclass of one, to leave gradients where the tested ones do.
        error_if_nonfinite: Whether to raise, before the update, if a gradient holds an inf or NaN after the method.
            The check costs a pass over the gradients and one wait for the device at each step.

    Raises:
        TypeError: If an argument has the wrong type.
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

    def __repr__(self) -> str:
        return represented(self, SINGCallback, {"eps": "method.eps", **OPTIONS})
