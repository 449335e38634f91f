"""What the kernels for devices have in common: they measure and rewrite many gradients together."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels.affine import shift_and_scale
from lightning_znorm.gradients.kernels.caches import kept_on_device
from lightning_znorm.gradients.kernels.parts import sums_of_pieces
from lightning_znorm.gradients.methods import AffineMethod, Statistics, rows_share_std
from lightning_znorm.gradients.shards import Segment


class Table(ABC):
    """Gradients of one type on one device.

    Attributes:
        segments: Their memory. Statistics come in the order of the segments.
    """

    segments: Sequence[Segment]

    def transform_(self, method: AffineMethod, loss_scale: Tensor | None = None) -> None:
        """Apply a method.

        Args:
            method: Returns shift and scale from the statistics of each tensor or row.
            loss_scale: Factor by which the gradients are larger than the true ones, a scalar tensor.
        """
        stats = self.measure(method.needs_std, from_zero=rows_share_std(method))
        if rows_share_std(method):
            stats = self._with_std_of_tensors(stats)
        self.rewrite_(*shift_and_scale(stats, method, loss_scale))

    @abstractmethod
    def measure(self, needs_std: bool = True, from_zero: bool = False) -> Statistics:
        """Take the statistics of each tensor or row.

        Args:
            needs_std: Whether to take squared deviations.
            from_zero: Whether a tensor that is not by row is given the mean zero, and its squares in place of the
                squared deviations.
        """

    @abstractmethod
    def rewrite_(self, shift: Tensor | None, scale: Tensor | None) -> None:
        """Replace each tensor or row ``g`` by ``(g - shift) * scale``, where ``None`` is no shift and no scale.

        It may be computed as ``g * scale - shift * scale``.
        """

    def forget_copies(self) -> None:  # noqa: B027
        """Free what is kept between measuring and rewriting for speed alone, if anything."""

    def _with_std_of_tensors(self, stats: Statistics) -> Statistics:
        """Return statistics where rows have the count and the squared deviation of their tensor."""
        assert stats.m2 is not None
        sizes = tuple([(segment.tensor.numel(), segment.num_stats) for segment in self.segments])
        tensors, numel = _tensors_of(sizes, stats.m2.dtype, stats.m2.device)
        m2 = sums_of_pieces(stats.m2, tuple([number for _, number in sizes]))
        return Statistics(numel, stats.mean, m2.index_select(0, tensors))


@kept_on_device(maxsize=64)
def _tensors_of(sizes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return for each of the statistics the index of its tensor, and the tensor's number of elements."""
    numel, times = (torch.tensor(column) for column in zip(*sizes, strict=True))
    tensors = torch.arange(len(sizes)).repeat_interleave(times, output_size=sum(number for _, number in sizes))
    return tensors.to(device), numel[tensors].to(device, dtype)
