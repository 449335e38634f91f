"""Kernels that rewrite gradients in place, each for every affine method, and measure them.

- ``dispatch.py`` chooses a kernel for each gradient that this process holds all of.
- ``cpu.py`` serves float32 and float64 gradients on a CPU, contiguous or channels_last, and tiny half-precision ones.
- ``triton.py`` serves gradients on devices that run Triton, by the programs in ``triton_programs.py``.
- ``torch_ops.py`` serves all others, on any device.
- ``sharded.py`` serves gradients that are sharded over processes.
"""

from lightning_znorm.gradients.kernels.dispatch import transform_segments_, transform_unsharded_
from lightning_znorm.gradients.kernels.sharded import measure_shards, reachable_device, transform_shards_

__all__ = ["measure_shards", "reachable_device", "transform_segments_", "transform_shards_", "transform_unsharded_"]
