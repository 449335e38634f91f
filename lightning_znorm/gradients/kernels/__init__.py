"""Kernels that rewrite gradients in place, each for every affine method, and measure them.

- ``dispatch.py`` chooses a kernel for each gradient that this process holds all of.
- ``cpu.py`` serves float32 and float64 gradients on a CPU, contiguous or channels_last, and tiny half-precision ones.
- ``cpu_blocks.py`` serves all others on a CPU.
- ``device.py`` serves gradients on all other devices, in few launches.
- ``triton.py`` serves them where the user chooses it, by the programs in ``triton_programs.py``, after
  ``triton_check.py`` has compared it with ``device.py``. ``table.py`` is what the two have in common.
- ``sharded.py`` serves gradients that are sharded over processes.
- ``affine.py``, ``memory.py``, ``parts.py`` and ``caches.py`` are what several of them use.
"""

from lightning_znorm.gradients.kernels.dispatch import transform_segments_, transform_unsharded_
from lightning_znorm.gradients.kernels.sharded import measure_shards, reachable_device, transform_shards_

__all__ = ["measure_shards", "reachable_device", "transform_segments_", "transform_shards_", "transform_unsharded_"]
