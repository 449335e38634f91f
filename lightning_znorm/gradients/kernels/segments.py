"""The affine kernel for many tiny tensors on a CPU, biases and scales: as segments of one vector, whatever their sizes.

Operations on tensors of this size cost their calls. Copies in double precision, of which the vector is made, make the
order of summation and the size of the mean of no account.
"""

from functools import lru_cache

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels.maps import residual_map
from lightning_znorm.gradients.methods import AffineMethod
from lightning_znorm.gradients.statistics import Statistics

TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

# From here on it is faster to work on a tensor of its own.
MAX_NUMEL = 512
# Elements in a vector, of 8 bytes each, of which there are four at a time.
_VECTOR = 2**16


def affine_(tensors: list[Tensor], method: AffineMethod, loss_scale: Tensor | None = None) -> None:
    """Applies a method, as :func:`~lightning_znorm.gradients.kernels.blockwise.affine_` does.

    Args:
        tensors: On a CPU, contiguous, all of one of the ``TYPES``, of no more than ``MAX_NUMEL`` elements; each has one
            entry of the statistics, in this order.
        method: As there.
        loss_scale: As there.
    """
    at_once = _VECTOR // MAX_NUMEL
    for start in range(0, len(tensors), at_once):
        _affine_(tensors[start : start + at_once], method, loss_scale)


def _affine_(tensors: list[Tensor], method: AffineMethod, loss_scale: Tensor | None) -> None:
    flats = [tensor if tensor.ndim == 1 else tensor.view(-1) for tensor in tensors]
    sizes = [flat.numel() for flat in flats]
    lengths, count, numbers = _lengths(tuple(sizes))
    vector = torch.cat(flats).double()
    mean = _sums(vector, lengths) / count
    vector.sub_(mean.index_select(0, numbers))
    m2 = _sums(vector.square(), lengths).float() if method.needs_std else None
    offset, scale = residual_map(Statistics(count, mean.float(), m2), method, loss_scale)
    if offset is not None:
        vector.add_(offset.index_select(0, numbers))
    if scale is not None:
        vector.mul_(scale.index_select(0, numbers))
    torch.split_with_sizes_copy(vector.to(flats[0].dtype), sizes, out=flats)


def _sums(vector: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(vector, "sum", lengths=lengths, unsafe=True)


@lru_cache(maxsize=32)  # of half a MiB at most each
@torch.inference_mode(False)  # for whoever asks next
def _lengths(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of segments, to count with and to compute with, and the number of each element's segment."""
    lengths = torch.tensor(sizes)
    return lengths, lengths.float(), torch.arange(len(sizes)).repeat_interleave(lengths)
